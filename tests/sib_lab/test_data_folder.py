import csv
import shutil

import numpy as np
import pytest
import torch
from data_samples import RED_ON_BLUE, box_of, save, save_picture, square, write_folder
from PIL import ExifTags, Image
from sib_lab.data import DataError, open_data, stack
from sib_lab.data.images import read_size


def paths(dataset):
    return {str(sample.image) for sample in dataset.samples}


def splits(data):
    return data.train, data.validation["validation"], data.test["test"]


def assert_masks_are_the_red_channel(data):
    for split in splits(data):
        batch = stack(split, range(len(split)))
        assert batch.annotated.all()
        torch.testing.assert_close(batch.image[:, :1] * 0.5 + 0.5, batch.mask, rtol=0, atol=1.5 / 255)


def write_boxes(root, name="boxes.csv", prefix=""):
    """boxes.csv of all squares under root."""
    with open(root / name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "x1", "y1", "x2", "y2"])
        rng = np.random.default_rng(5)  # as in write_folder
        for path in sorted(root.rglob("*.jpg")):
            writer.writerow([prefix + path.relative_to(root).as_posix(), *box_of(square(rng))])


def test_class_folders_are_shared_out_and_masks_follow(tmp_path):
    data = open_data("folder", write_folder(tmp_path, count=20), size=32)
    assert data.classes == ("cat", "dog", "owl")
    assert [len(split) for split in splits(data)] == [3 * 13, 3 * 3, 3 * 4]
    a, b, c = map(paths, splits(data))
    assert not a & b and not a & c and not b & c and len(a | b | c) == 60
    assert_masks_are_the_red_channel(data)


def test_shares_can_be_chosen_as_on_a_command_line(tmp_path):
    data = open_data("folder", write_folder(tmp_path, count=20), validation_share="0.25", test_share="0.25")
    assert [len(split) for split in splits(data)] == [30, 15, 15]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("training", "validation", "testing")])
def test_given_splits_are_kept(tmp_path, names):
    for name, count in zip(names, (4, 2, 3), strict=True):
        write_folder(tmp_path / name, count=count)
        (tmp_path / name / "masks").rename(tmp_path / f"masks_{name}")
    for name in names:
        shutil.move(tmp_path / f"masks_{name}", tmp_path / "masks" / name)
    data = open_data("folder", tmp_path, size=32)
    assert [len(split) for split in splits(data)] == [12, 6, 9]
    for split, name in zip(splits(data), names, strict=True):
        assert all(path.startswith(str(tmp_path / name)) for path in paths(split))
    assert_masks_are_the_red_channel(data)


def test_a_split_without_a_folder_is_taken_from_training(tmp_path):
    write_folder(tmp_path / "train", count=10, masks=False)
    write_folder(tmp_path / "test", count=2, masks=False)
    data = open_data("folder", tmp_path, size=32)
    assert [len(split) for split in splits(data)] == [24, 6, 6]
    assert paths(data.validation["validation"]) <= {str(p) for p in (tmp_path / "train").rglob("*.jpg")}
    assert not data.train.annotated.any()


def test_images_and_masks_may_lie_side_by_side(tmp_path):
    write_folder(tmp_path / "images")
    (tmp_path / "images" / "masks").rename(tmp_path / "masks")
    assert_masks_are_the_red_channel(open_data("folder", tmp_path, size=32))


def test_masks_may_lie_elsewhere_and_cover_some_images_only(tmp_path):
    root = write_folder(tmp_path / "mine")
    (root / "masks").rename(tmp_path / "outlines")
    for path in (tmp_path / "outlines").rglob("[0-3].png"):
        path.unlink()
    data = open_data("folder", root, size=32, masks=str(tmp_path / "outlines"))
    for split in splits(data):
        for sample, annotated in zip(split.samples, split.annotated.tolist(), strict=True):
            assert annotated == (int(sample.image.stem) > 3)


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_boxes_from_a_csv(tmp_path, prefix):
    root = write_folder(tmp_path / prefix, masks=False)
    write_boxes(root, prefix=prefix)
    if prefix:
        (root / "boxes.csv").rename(tmp_path / "boxes.csv")
    data = open_data("folder", tmp_path, size=32)
    assert_masks_are_the_red_channel(data)


def test_a_share_of_the_masks_can_be_hidden_from_the_training_only(tmp_path):
    data = open_data("folder", write_folder(tmp_path), size=32, annotated=0.5)
    train, validation, test = splits(data)
    assert train.annotated.sum() == (len(train) + 1) // 2
    batch = stack(train, range(len(train)))
    assert torch.equal(batch.annotated, train.annotated) and not batch.mask[~batch.annotated].any()
    assert validation.annotated.all() and test.annotated.all()


def test_several_boxes_of_one_file_are_one_object(tmp_path):
    root = write_folder(tmp_path, masks=False)
    (tmp_path / "two.csv").write_text("file,x1,y1,x2,y2\ncat/0.jpg, 0,0,5,5\ncat/0.jpg, 10,10,20,20\n")
    data = open_data("folder", root, size=32, boxes=tmp_path / "two.csv")
    annotated = [s for split in splits(data) for s in split.samples if s.annotated]
    assert [s.boxes for s in annotated] == [((0, 0, 5, 5), (10, 10, 20, 20))]


def test_images_of_other_modes_are_read_as_rgb(tmp_path):
    root = write_folder(tmp_path, masks=False)
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    for name in ("cat", "dog", "owl"):
        for path in (root / name).iterdir():
            save(path, grey if name == "cat" else np.dstack([grey] * 4))
    data = open_data("folder", root, size=56)
    image = data.train[0].image
    assert image.shape == (3, 56, 56) and torch.equal(image[0], image[2])


def test_photographs_are_turned_upright_and_masks_fit_what_is_seen(tmp_path):
    for name in ("cat", "dog"):
        for place in range(6):
            mask = square(np.random.default_rng(place), width=40, height=60)
            save(tmp_path / "masks" / name / f"{place}.png", mask * 255)
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 6  # stored lying on its left side
            path = tmp_path / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rot90(RED_ON_BLUE[mask], k=1)).save(path, exif=exif)
    data = open_data("folder", tmp_path, size=32)
    assert read_size(data.train.samples[0].image) == (60, 40)
    assert read_size(data.train.samples[0].image, upright=True) == (40, 60)
    assert_masks_are_the_red_channel(data)


# ------------------------------------------------------------------------------------------------- errors


def refused(root, sentence, **options):
    with pytest.raises(DataError, match=sentence) as caught:
        open_data("folder", root, size=32, **options)
    assert "\n" not in str(caught.value)


def test_no_class_folders_are_explained(tmp_path):
    refused(tmp_path, "has 0 class folders with images where at least 2 are needed: one folder a class")
    save_picture(tmp_path / "cat" / "0.jpg", square(np.random.default_rng(0)))
    refused(tmp_path, "has 1 class folders")


def test_an_empty_class_folder_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "zebra").mkdir()
    refused(tmp_path, "The class folder .*zebra holds no images: add some, or remove it")


def test_a_class_only_in_the_test_is_named(tmp_path):
    write_folder(tmp_path / "train", masks=False)
    write_folder(tmp_path / "test", classes=("cat", "zebra"), masks=False)
    refused(tmp_path, r"1 of 4 classes have no training image \(zebra\)")


def test_a_class_of_two_images_is_named(tmp_path):
    write_folder(tmp_path, masks=False)
    write_folder(tmp_path, classes=("zebra",), count=2, masks=False)
    refused(tmp_path, "class zebra has 2 images to share out among train, validation and test: at least 3")


def test_test_without_train_is_explained(tmp_path):
    write_folder(tmp_path / "test", masks=False)
    refused(tmp_path, "has test but no train: add it")


def test_masks_and_boxes_at_once_are_refused(tmp_path):
    root = write_folder(tmp_path)
    write_boxes(root, name="mine.csv")
    refused(root, "masks or boxes, not both", masks=root / "masks", boxes=root / "mine.csv")


def test_masks_that_are_not_there_are_told(tmp_path):
    root = write_folder(tmp_path, masks=False)
    refused(root, "masks is not a folder: .*nowhere", masks=root / "nowhere")
    refused(root, "boxes is not a file: .*nowhere", boxes=root / "nowhere")


def test_a_mask_of_another_size_is_named_and_can_be_skipped_with_its_image(tmp_path):
    root = write_folder(tmp_path)
    save(root / "masks" / "cat" / "0.png", np.ones((7, 9), dtype=np.uint8))
    refused(root, r"1 of \d+ images cannot be used .*cat/0.png is 9 x 7 px, but its image .*cat/0.jpg is")
    data = open_data("folder", root, size=32, skip_broken=True)
    assert len(data.skipped) == 1 and "cat/0.png is 9 x 7 px" in data.skipped[0]
    assert not any("cat/0.jpg" in path for split in splits(data) for path in paths(split))


def test_a_mask_without_an_image_is_named_and_can_be_skipped(tmp_path):
    root = write_folder(tmp_path)
    save(root / "masks" / "cat" / "IMG_99.png", np.ones((7, 9), dtype=np.uint8))
    refused(root, r"1 of 25 masks cannot be used \(the first: .*IMG_99.png belongs to no image\)")
    assert open_data("folder", root, size=32, skip_broken=True).skipped[0].endswith("belongs to no image")


def test_a_folder_of_masks_with_other_names_is_explained(tmp_path):
    root = write_folder(tmp_path)
    for path in list((root / "masks").rglob("*.png")):
        path.rename(path.with_stem(path.stem + "_mask"))
    refused(root, "24 of 24 masks cannot be used")
    refused(root, "has no mask with the path of an image under .* mirror its folders and names", skip_broken=True)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("name,x,y,w,h\n", "has no column file, x1, y1 and 2 more: its first line must be file,x1,y1,x2,y2"),
        ("", "has no column file"),
        ("file,x1,y1,x2,y2\ncat/0.jpg,1,2,three,4\n", "line 2 of .* has no four numbers"),
        ("file,x1,y1,x2,y2\ncat/0.jpg,1,2\n", "line 2 of .* has no four numbers"),
        ("file,x1,y1,x2,y2\ncat/99.jpg,1,2,3,4\n", "line 2 of .* names cat/99.jpg, which is no image of the set"),
    ],
)
def test_a_damaged_csv_is_one_sentence(tmp_path, text, sentence):
    root = write_folder(tmp_path, masks=False)
    (root / "boxes.csv").write_text(text)
    refused(root, sentence)


def test_a_box_outside_its_image_is_named_with_it(tmp_path):
    root = write_folder(tmp_path, masks=False)
    (root / "boxes.csv").write_text("file,x1,y1,x2,y2\ncat/0.jpg,5,5,5,9\n")
    refused(root, r"cat/0.jpg: the box \(5, 5, 5, 9\) has no area inside the image")


def test_an_unreadable_image_is_named_and_can_be_skipped(tmp_path):
    root = write_folder(tmp_path)
    (root / "owl" / "3.jpg").write_bytes(b"")
    refused(root, "owl/3.jpg cannot be read as an image")
    data = open_data("folder", root, size=32, skip_broken=True)
    assert len(data.skipped) == 1 and sum(map(len, splits(data))) == 23


def test_a_class_whose_every_image_is_broken_is_named(tmp_path):
    root = write_folder(tmp_path, masks=False)
    for path in (root / "owl").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no training image \(owl\)"):
        open_data("folder", root, skip_broken=True)


def test_hidden_files_are_not_looked_at(tmp_path):
    root = write_folder(tmp_path)
    (root / ".cache").mkdir()
    (root / "__MACOSX" / "cat").mkdir(parents=True)
    (root / "cat" / "._0.jpg").write_bytes(b"")
    assert sum(map(len, splits(open_data("folder", root, size=32)))) == 24
