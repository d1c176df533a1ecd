import csv
import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import RED_ON_BLUE, box_of, save, save_picture, square, write_folder
from PIL import ExifTags, Image
from sib_lab.data import DataError, open_data, stack
from sib_lab.data import files as files_module
from sib_lab.data import folder as folder_module
from sib_lab.data.identity import changed
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
    assert [len(split) for split in splits(data)] == [41, 9, 10]  # 65, 15 and 20 % of 60 on average
    a, b, c = map(paths, splits(data))
    assert not a & b and not a & c and not b & c and len(a | b | c) == 60
    assert_masks_are_the_red_channel(data)


def test_shares_can_be_chosen_as_on_a_command_line(tmp_path):
    data = open_data("folder", write_folder(tmp_path, count=20), validation_share="0.25", test_share="0.25")
    assert [len(split) for split in splits(data)] == [30, 13, 17]


@pytest.mark.parametrize("split", [False, True])
def test_what_this_program_wrote_beside_the_images_is_no_part_of_them(tmp_path, split):
    for part in ("train", "val", "test") if split else ("",):
        write_folder(tmp_path / part, count=6)
    before = open_data("folder", tmp_path, size=32)
    for name in ("runs/compare/comparison.json", "runs/compare/runs/ce-seed0/run.yaml", "mine/run.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        Image.new("RGB", (8, 8)).save((tmp_path / name).parent / "gallery.png")
    after = open_data("folder", tmp_path, size=32)
    assert after.classes == before.classes and after.identity() == before.identity()
    assert after.skipped == before.skipped
    (tmp_path / "runs/more").mkdir()  # a folder that is the user's
    Image.new("RGB", (8, 8)).save(tmp_path / "runs/more/picture.png")
    sentence = "has runs beside test, train, val" if split else "The class runs has 1 image to share out"
    with pytest.raises(DataError, match=sentence):
        open_data("folder", tmp_path, size=32)


def test_a_link_from_one_class_to_another_is_refused(tmp_path):
    write_folder(tmp_path, count=6)
    (tmp_path / "zebra").symlink_to(tmp_path / "cat")
    with pytest.raises(DataError, match="zebra and .*cat are one folder, through a link"):
        open_data("folder", tmp_path, size=32)


def test_the_files_that_tell_what_this_program_wrote_are_the_ones_that_it_writes():
    from sib_lab.reporting.results import COMPARISON
    from sib_lab.training.runs import OPTIONS

    assert {COMPARISON, OPTIONS} == folder_module.WRITTEN


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
    assert [len(split) for split in splits(data)] == [27, 3, 6]
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


@pytest.mark.parametrize("option", [True, False])
def test_an_image_without_a_mask_takes_its_boxes(tmp_path, option):
    root = write_folder(tmp_path)
    write_boxes(root)
    for path in (root / "masks").rglob("[0-3].png"):
        path.unlink()
    data = open_data(
        "folder", root, size=32, **({"masks": root / "masks", "boxes": root / "boxes.csv"} if option else {})
    )
    assert_masks_are_the_red_channel(data)
    masked = [sample.mask is not None for split in splits(data) for sample in split.samples]
    assert sum(masked) == 12 and all(s.boxes for split in splits(data) for s in split.samples if s.mask is None)


def test_folders_are_known_in_any_case(tmp_path):
    for name in ("Train", "TEST"):
        write_folder(tmp_path / name)
    for name in ("Train", "TEST"):
        shutil.move(tmp_path / name / "masks", tmp_path / "Masks" / name.lower())
    data = open_data("folder", tmp_path, size=32)
    assert data.classes == ("cat", "dog", "owl") and len(data.test["test"]) == 24
    assert_masks_are_the_red_channel(data)


@pytest.mark.parametrize("place", ["train/masks/cat", "train/cat/masks", "train/cat/Segmentations"])
def test_masks_may_lie_in_the_folder_of_a_split_or_class(tmp_path, place):
    root = write_folder(tmp_path / "train", count=20)
    if place != "train/masks/cat":
        for name in ("cat", "dog", "owl"):
            (root / "masks" / name).rename(tmp_path / place.replace("cat", name))
        (root / "masks").rmdir()
    data = open_data("folder", tmp_path, size=32)
    assert data.classes == ("cat", "dog", "owl") and sum(map(len, splits(data))) == 60
    assert_masks_are_the_red_channel(data)


def test_boxes_may_lie_in_the_folder_of_a_split_and_name_files_as_windows_does(tmp_path):
    root = write_folder(tmp_path / "train", masks=False)
    write_boxes(root, name="Boxes.csv")
    table = root / "Boxes.csv"
    table.write_text(table.read_text().replace("/", "\\").replace("cat", "Cat"))
    assert_masks_are_the_red_channel(open_data("folder", tmp_path, size=32))


def test_boxes_in_0_to_1_are_shares(tmp_path):
    root = write_folder(tmp_path, masks=False)
    write_boxes(root)
    with open(root / "boxes.csv") as file:
        rows = list(csv.DictReader(file))
    lines = ["file,x1,y1,x2,y2"]
    for row in rows:
        width, height = read_size(root / row["file"])
        sides = (width, height, width, height)
        box = [float(row[side]) / length for side, length in zip(("x1", "y1", "x2", "y2"), sides, strict=True)]
        lines.append(",".join([row["file"], *(f"{side:.8f}" for side in box)]))
    (root / "boxes.csv").write_text("\n".join(lines))
    assert_masks_are_the_red_channel(open_data("folder", root, size=32))
    (root / "boxes.csv").write_text("\n".join([*lines, "cat/0.jpg,1,1,20,20"]))
    refused(
        root, "24 of 25 rows of boxes cannot be used .the first: line 2 of .* box in 0..1 where others are in pixels"
    )


def test_values_of_masks_can_be_named_and_inverted(tmp_path):
    root = write_folder(tmp_path)
    for path in (root / "masks").rglob("*.png"):
        values = np.asarray(Image.open(path)) // 255
        save(path, np.where(values, np.uint8(1), np.uint8(2)))
    refused(
        root,
        "100|24 of 24 images cannot be used .the first: .*masks/cat/0.png holds the values 1, 2, .*mask_values=1,3",
    )
    assert_masks_are_the_red_channel(open_data("folder", root, size=32, mask_values="1"))
    assert_masks_are_the_red_channel(open_data("folder", root, size=32, mask_values="2", invert_masks="true"))
    refused(root, "The option invert_masks must be true or false, got 'maybe'", invert_masks="maybe")


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, classes=("train", "bus"), masks=False)
    assert open_data("folder", tmp_path, size=32).classes == ("bus", "train")


def test_the_drawn_split_of_an_image_stays_when_others_go_or_come(tmp_path):
    root = write_folder(tmp_path, count=40, masks=False)
    before = open_data("folder", root, size=32)
    for path in [root / "cat" / "7.jpg", root / "dog" / "0.jpg", root / "owl" / "39.jpg"]:
        path.unlink()
    write_folder(root, classes=("zebra",), masks=False)
    after = open_data("folder", root, size=32)
    for a, b in zip(splits(before), splits(after), strict=True):
        assert {p for p in paths(a) - paths(b)} <= {str(root / p) for p in ("cat/7.jpg", "dog/0.jpg", "owl/39.jpg")}
        assert all("zebra" in path for path in paths(b) - paths(a))
    assert paths(open_data("folder", root, size=32, seed=1).train) != paths(after.train)


def test_the_images_of_a_limit_and_the_masks_that_are_seen_stay_when_others_go(tmp_path):
    def seen(data):
        return {
            str(s.image) for s, annotated in zip(data.train.samples, data.train.annotated, strict=True) if annotated
        }

    root = write_folder(tmp_path, count=40)
    options = {"size": 32, "limit": 30, "annotated": 0.5}
    before = open_data("folder", root, **options)
    assert len(before.train) == 30
    assert before.train.labels.bincount().tolist() == [10, 10, 10] and len(seen(before)) == 15
    gone = next(iter(seen(before)))
    Path(gone).unlink()
    (root / "masks" / Path(gone).relative_to(root).with_suffix(".png")).unlink()
    after = open_data("folder", root, **options)
    for a, b in zip(splits(before), splits(after), strict=True):
        assert paths(a) - paths(b) <= {gone} and len(paths(b) - paths(a)) <= 1
    assert after.train.labels.bincount().tolist() == [10, 10, 10]
    assert gone not in seen(after) and len(seen(after)) == 15 and len(seen(before) - seen(after)) <= 2


# ------------------------------------------------------------------------------------------ names and links


def composed(path, form):
    """A path with é in its name, composed (NFC) or not (NFD)."""
    return path.with_name(unicodedata.normalize(form, path.name))


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_masks_and_boxes_belong_to_images_however_accents_are_composed(tmp_path, forms):
    root = write_folder(tmp_path, classes=("café", "dog"))
    (root / "masks" / "café").rename(composed(root / "masks" / "café", forms[1]))
    (root / "café").rename(composed(root / "café", forms[0]))
    assert_masks_are_the_red_channel(open_data("folder", root, size=32))
    shutil.rmtree(root / "masks")
    rows = "".join(f"café/{place}.jpg,10,10,20,20\n" for place in range(8))
    (root / "boxes.csv").write_text("file,x1,y1,x2,y2\n" + unicodedata.normalize(forms[1], rows), encoding="utf-8")
    data = open_data("folder", root, size=32)
    assert sum(int(split.annotated.sum()) for split in splits(data)) == 8


@pytest.mark.parametrize("twin", ["Cat", "CAT", "caf\u0065\u0301"])
@pytest.mark.parametrize("split", ["", "val"])
def test_two_class_folders_of_one_name_are_refused(tmp_path, twin, split):
    classes = ("cat", "caf\u00e9")
    root = write_folder(tmp_path / "train" if split else tmp_path, classes=classes, masks=False)
    write_folder(tmp_path / split, classes=(twin,), masks=False)
    with pytest.raises(DataError, match="differ only in upper and lower case or in how their accents are stored"):
        open_data("folder", root if not split else tmp_path, size=32)


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb"])
def test_a_class_folder_whose_name_cannot_be_printed_is_refused(tmp_path, name):
    root = write_folder(tmp_path, masks=False)
    (root / "cat").rename(root / os.fsdecode(name))
    with pytest.raises(DataError, match=r"The class folder '.*\\.*' has letters that cannot be printed"):
        open_data("folder", root, size=32)
    (root / os.fsdecode(name)).rename(root / "می\u200cروم")  # which has a letter of no width
    assert len(open_data("folder", root, size=32).classes) == 3


@pytest.mark.parametrize("end", ["_mask", "-Mask", "_segmentation", "_GT"])
def test_masks_beside_their_images_are_not_taken_for_images(tmp_path, end):
    root = write_folder(tmp_path, masks=False)
    save(root / "cat" / f"3{end}.png", np.zeros((40, 40), np.uint8))
    with pytest.raises(DataError, match=rf"3{end}.png lies beside an image whose mask it is by its name \(1 such\): "):
        open_data("folder", root, size=32)
    (root / "cat" / f"3{end}.png").rename(root / "cat" / f"other{end}.png")  # the name of no image
    assert sum(map(len, splits(open_data("folder", root, size=32)))) == 25


def test_links_to_folders_are_followed_but_for_loops(tmp_path):
    real = write_folder(tmp_path / "real")
    root = tmp_path / "linked"
    (root / "masks").mkdir(parents=True)
    for name in ("cat", "dog"):
        (root / "masks" / name).symlink_to(real / "masks" / name)
        (root / name).symlink_to(real / name)
    (root / "owl").mkdir()
    (root / "owl" / "more").symlink_to(real / "owl")
    (root / "masks" / "owl").mkdir()
    (root / "masks" / "owl" / "more").symlink_to(real / "masks" / "owl")
    for place in (real / "cat" / "loop", real / "dog" / "loop"):
        place.symlink_to(root)
    data = open_data("folder", root, size=32)
    assert data.classes == ("cat", "dog", "owl") and sum(map(len, splits(data))) == 24
    assert_masks_are_the_red_channel(data)


def test_masks_in_a_linked_split_are_no_class(tmp_path):
    real = write_folder(tmp_path / "real")
    root = tmp_path / "linked"
    root.mkdir()
    (root / "train").symlink_to(real)
    data = open_data("folder", root, size=32)
    assert data.classes == ("cat", "dog", "owl")
    assert_masks_are_the_red_channel(data)


# ---------------------------------------------------------------------------------------------- identity


def moved(root, to):
    shutil.copytree(root, to)
    return to


def test_an_identity_is_of_the_contents_wherever_they_lie_and_can_be_stored(tmp_path):
    data = open_data("folder", write_folder(tmp_path / "a"), size=32)
    identity = data.identity()
    assert list(identity) == ["train", "validation/validation", "test/test"] and data.identity() is identity
    assert {f"cat/{place}.jpg" for place in range(8)} <= {name for images in identity.values() for name in images}
    again = open_data("folder", moved(tmp_path / "a", tmp_path / "b"), size=48, skip_broken=True)
    assert json.loads(json.dumps(again.identity())) == identity and changed(identity, again.identity()) is None


def test_a_broken_image_counts_whether_it_is_skipped_or_not(tmp_path):
    root = write_folder(tmp_path)
    (root / "cat" / "0.jpg").write_bytes((root / "cat" / "0.jpg").read_bytes()[:-30])
    a, b = (open_data("folder", root, size=32, skip_broken=skip) for skip in (False, True))
    assert len(b.skipped) == 1 and changed(a.identity(), b.identity()) is None


def given_splits(root):
    for name in ("train", "val", "test"):
        write_folder(root / name)
    return root


def test_what_has_changed_is_one_clause(tmp_path):
    root = given_splits(tmp_path)
    for number, path in enumerate(sorted(root.rglob("*.jpg"))):
        save(path, np.asarray(Image.open(path)) // 2 + np.uint8(number))  # no two images are alike
    before = open_data("folder", root, size=32).identity()

    def now():
        return changed(before, open_data("folder", root, size=32).identity())

    save(root / "test/masks/cat/3.png", np.asarray(Image.open(root / "test/masks/cat/3.png")) // 2)
    assert now() == "1 mask differs (first: that of test/cat/3.jpg)"
    for place in (5, 6):
        (root / f"train/cat/{place}.jpg").rename(root / f"test/cat/1{place}.jpg")
        (root / f"train/masks/cat/{place}.png").rename(root / f"test/masks/cat/1{place}.png")
    (root / "val/dog/0.jpg").unlink()
    (root / "val/masks/dog/0.png").unlink()
    save(root / "test/owl/77.jpg", np.full((50, 50, 3), 9, np.uint8))
    save(root / "val/cat/1.jpg", np.asarray(Image.open(root / "val/cat/1.jpg")) + np.uint8(1))
    (root / "train/owl/0.jpg").rename(root / "train/owl/zero.jpg")
    (root / "train/masks/owl/0.png").rename(root / "train/masks/owl/zero.png")
    assert now() == (
        "1 image of the test split is new, 1 image of the validation split is gone, 2 images moved from training to "
        "test, 1 mask differs (first: that of test/cat/3.jpg), 1 image has another name (first: train/owl/zero.jpg), "
        "1 image differs (first: val/cat/1.jpg)"
    )


def test_a_change_of_labels_boxes_or_kind_is_told(tmp_path):
    root = write_folder(tmp_path / "a", masks=False)
    write_boxes(root)
    before = open_data("folder", root, size=32).identity()
    table = root / "boxes.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:-1], "owl/7.jpg,1,1,9,9"]))
    assert changed(before, open_data("folder", root, size=32).identity()) == "1 mask differs (first: that of owl/7.jpg)"
    assert changed(before, {"train": "0"}) == "the splits were training, validation, test and are training"
    assert changed(before, before | {"train": "0"}) == "the training split differs"


def test_many_images_have_one_digest_of_names_and_sizes(tmp_path, monkeypatch):
    root = write_folder(tmp_path, masks=False)
    monkeypatch.setattr(files_module, "MANY", 3)
    before = open_data("folder", root, size=32).identity()
    assert isinstance(before["train"], str)
    assert changed(before, open_data("folder", root, size=32).identity()) is None
    path = open_data("folder", root, size=32).train.samples[0].image
    path.write_bytes(path.read_bytes() + b"0")
    assert changed(before, open_data("folder", root, size=32).identity()) == "the training split differs"


# ------------------------------------------------------------------------------------------------- errors


def test_pictures_of_a_kind_that_is_not_read_are_counted_by_it(tmp_path):
    root = write_folder(tmp_path, masks=False)
    for name in ("cat/a.CR2", "cat/b.cr2", "dog/c.svg", "dog/notes.txt"):
        (root / name).write_bytes(b"0")
    save(root / "loose.png", np.zeros((9, 9), np.uint8))
    refused(root, r"3 of 27 pictures cannot be read here .the first: 2 .cr2: save them as .jpg or .png, 1 .svg")
    data = open_data("folder", root, size=32, skip_broken=True)
    assert [line.split(" (the first")[0] for line in data.skipped] == [
        "2 .cr2: save them as .jpg or .png, 1 .svg: save them as .jpg or .png cannot be read here",
        "1 .png lie in no class folder",
        "1 .txt are no pictures",
    ]


def test_a_class_of_unread_pictures_says_so(tmp_path):
    root = write_folder(tmp_path, masks=False)
    (root / "emu").mkdir()
    (root / "emu" / "1.jxl").write_bytes(b"0")
    refused(root, "The class folder .*emu holds no images that can be read here .1 .jxl: save them as")


@pytest.mark.parametrize("suffix", ["jfif", "gif", "JPG"])
def test_images_of_other_suffixes_are_read(tmp_path, suffix):
    root = write_folder(tmp_path, masks=False)
    for path in list(root.rglob("*.jpg")):
        path.rename(path.with_suffix(f".{suffix}"))
    assert sum(map(len, splits(open_data("folder", root, size=32)))) == 24


def test_class_folders_beside_splits_are_refused(tmp_path):
    root = write_folder(tmp_path / "train", masks=False).parent
    write_folder(root, classes=("emu", "fox"), masks=False)
    refused(root, "has emu, fox beside train, in no split: move the images into the folders of the splits")


@pytest.mark.parametrize("other", ["valid", "VAL"])
def test_two_folders_for_one_split_are_refused(tmp_path, other):
    for name in ("train", "val", other):
        write_folder(tmp_path / name, masks=False)
    refused(tmp_path, "two folders for one split: put their images in one")


def test_two_masks_of_one_image_are_refused(tmp_path):
    root = write_folder(tmp_path)
    shutil.copy(root / "masks/cat/0.png", root / "masks/cat/0.tif")
    refused(root, "1 of 25 masks cannot be used .the first: .*cat/0.tif is the second mask of .*cat/0.jpg")


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
