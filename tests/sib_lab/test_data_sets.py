"""Each set from a tiny copy of its standard layout."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import (
    box_of,
    save,
    save_picture,
    square,
    write_cifar100,
    write_cub200,
    write_dogs,
    write_imagenet,
    write_pets,
    write_xml,
)
from PIL import Image
from sib_lab.data import DataError, open_data, stack
from sib_lab.data.files import rasterise, read_layers, read_xml_boxes
from sib_lab.data.masks import read_mask, read_trimap

WRITERS = {"cub200": write_cub200, "dogs": write_dogs, "pets": write_pets, "imagenet": write_imagenet}
NAMES = {
    "cub200": ("Grey Bird 1", "Grey Bird 2", "Grey Bird 3"),
    "dogs": ("Chihuahua", "Japanese spaniel", "Maltese dog"),
    "pets": ("Abyssinian", "american bulldog", "Maine Coon"),
    "imagenet": ("tench", "goldfish", "Shih-Tzu"),
}
#: Training, validation and test images of all three classes, one validation image a class.
COUNTS = {"cub200": (12, 3, 9), "dogs": (9, 3, 6), "pets": (9, 3, 6), "imagenet": (9, 3, 6)}


@pytest.fixture(params=WRITERS)
def written(request, tmp_path):
    """A set's name and the folder with its tiny copy."""
    return request.param, WRITERS[request.param](tmp_path)


def everything(data):
    return [data.train, *data.validation.values(), *data.test.values()]


def files(dataset):
    return {str(sample.image) for sample in dataset.samples}


def test_classes_splits_and_labels_are_those_of_the_layout(written):
    name, root = written
    data = open_data(name, root, size=32)
    assert data.name == name and data.classes == NAMES[name] and data.size == 32 and data.skipped == ()
    assert [len(split) for split in everything(data)] == list(COUNTS[name])
    assert list(data.validation) == ["validation"] and list(data.test) == ["test"]
    for split in everything(data):
        assert torch.bincount(split.labels).tolist() == [len(split) // 3] * 3
        assert (split.groups == -1).all()
        for sample, label in zip(split.samples, split.labels.tolist(), strict=True):
            wanted = {"imagenet": ("n01440764", "n01443537", "n02086240")}.get(name, data.classes)[label]
            assert wanted.replace(" ", "_") in str(sample.image)


def test_no_image_is_in_two_splits_and_validation_comes_from_training(written):
    name, root = written
    data = open_data(name, root, size=32)
    train, validation, test = (files(split) for split in everything(data))
    assert not train & validation and not train & test and not validation & test
    again = open_data(name, root, size=32)
    assert [files(split) for split in everything(again)] == [train, validation, test]
    assert files(open_data(name, root, size=32, seed=3).test["test"]) == test
    others = [files(open_data(name, root, size=32, seed=seed).validation["validation"]) for seed in range(1, 4)]
    assert any(other != validation for other in others) and all(other <= train | validation for other in others)


@pytest.mark.parametrize("augment", [False, True])
def test_the_mask_is_the_red_square_after_every_transform(written, augment):
    """Boxes and masks are exact here, so the red channel shows where the mask must be."""
    name, root = written
    data = open_data(name, root, size=48, augment=augment)
    for split in everything(data):
        batch = stack(split, range(len(split)))
        assert torch.equal(batch.annotated, split.annotated)
        red = batch.image[:, :1] * 0.5 + 0.5
        torch.testing.assert_close(red[batch.annotated], batch.mask[batch.annotated], rtol=0, atol=1.5 / 255)
        assert not batch.mask[~batch.annotated].any()
    assert data.test["test"].annotated.all()
    assert data.train.annotated.all() or name == "imagenet"


def test_images_without_a_box_are_not_annotated_in_imagenet(tmp_path):
    data = open_data("imagenet", write_imagenet(tmp_path), size=32)
    for split in (data.train, data.validation["validation"]):
        for sample, annotated in zip(split.samples, split.annotated.tolist(), strict=True):
            assert annotated == (int(Path(sample.image).stem.split("_")[1]) % 2 == 1)


def test_imagenet_may_be_laid_out_as_kaggle_does_and_without_names_or_boxes(tmp_path):
    write_imagenet(tmp_path / "plain")
    inner = tmp_path / "kaggle" / "Data" / "CLS-LOC"
    inner.parent.mkdir(parents=True)
    (tmp_path / "plain" / "Annotations").rename(tmp_path / "kaggle" / "Annotations")
    (tmp_path / "plain").rename(inner)
    data = open_data("imagenet", tmp_path / "kaggle", size=32)
    assert data.test["test"].annotated.all() and data.classes[0] == "n01440764"
    shutil.rmtree(tmp_path / "kaggle" / "Annotations")
    assert not open_data("imagenet", tmp_path / "kaggle", size=32).test["test"].annotated.any()


def test_imagenet_val_without_class_folders_is_explained(tmp_path):
    write_imagenet(tmp_path)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(DataError, match="val has no class folders: sort its images"):
        open_data("imagenet", tmp_path)
    save_picture(tmp_path / "val" / "n09999999" / "a.JPEG", square(np.random.default_rng(0)))
    with pytest.raises(DataError, match="val has classes that train has not: n09999999"):
        open_data("imagenet", tmp_path)


def test_the_folder_itself_can_be_root(tmp_path):
    assert len(open_data("cub200", write_cub200(tmp_path / "a") / "CUB_200_2011", size=32).train) == 12
    assert len(open_data("pets", write_pets(tmp_path / "b") / "oxford-iiit-pet", size=32).train) == 9


def test_cub_boxes_can_be_taken_for_segmentations(tmp_path):
    root = write_cub200(tmp_path)
    masks, boxes = (open_data("cub200", root, size=32, masks=m) for m in ("segmentations", "boxes"))
    a, b = (stack(data.train, range(12)).mask for data in (masks, boxes))
    assert torch.equal(a, b)  # the squares fill their boxes
    shutil.rmtree(root / "segmentations")
    assert open_data("cub200", root, size=32).train.annotated.all()
    with pytest.raises(DataError, match="no folder segmentations"):
        open_data("cub200", root, masks="segmentations")
    with pytest.raises(DataError, match="masks must be one of auto, segmentations, boxes, got 'trimaps'"):
        open_data("cub200", root, masks="trimaps")


def test_soft_segmentations_stay_soft(tmp_path):
    values = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", values)), values)


def test_masks_of_indices_and_bits_are_made_whole(tmp_path):
    object_ = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "01.png", object_)), object_ * 255)
    Image.fromarray(object_ * 255).convert("1").save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "bits.png"), object_ * 255)
    palette = Image.fromarray(object_ * 7).convert("P")
    palette.putpalette([0, 0, 0] * 7 + [1, 0, 0])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), object_ * 255)
    assert not read_mask(save(tmp_path / "empty.png", object_ * 0)).any()
    packed = Image.fromarray(1 - object_).convert("P")  # white comes first in this palette of greys
    packed.putpalette([255, 255, 255, 0, 0, 0])
    packed.save(tmp_path / "packed.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "packed.png"), object_ * 255)


def test_a_trimaps_outline_belongs_to_the_animal(tmp_path):
    trimap = np.array([[2, 3, 1], [2, 2, 3]], dtype=np.uint8)
    expected = np.array([[0, 255, 255], [0, 0, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(read_trimap(save(tmp_path / "t.png", trimap)), expected)


def test_boxes_become_the_union_of_their_rectangles_cut_at_the_image(tmp_path):
    write_xml(tmp_path / "a", [(1, 1, 3, 2), (2, 1, 9, 3)])
    mask = rasterise(read_xml_boxes(tmp_path / "a")[0], width=4, height=3)
    np.testing.assert_array_equal(mask, 255 * np.array([[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]]))
    np.testing.assert_array_equal(rasterise([(0.5, 0, 2, 1)], 3, 1), [[128, 255, 0]])


# --------------------------------------------------------------------------------------------------- CIFAR


def test_cifar_images_labels_and_splits(tmp_path, monkeypatch):
    data = open_data("cifar100", write_cifar100(tmp_path, monkeypatch), size=32)
    assert data.classes == ("kind 0", "kind 1", "kind 2")
    assert [len(split) for split in everything(data)] == [15, 3, 6]
    for split in everything(data):
        assert not split.annotated.any() and torch.bincount(split.labels).tolist() == [len(split) // 3] * 3
        assert not stack(split, [0]).mask.any()
    from torchvision.datasets import CIFAR100

    truth = CIFAR100(str(tmp_path), train=False)
    assert data.test["test"].labels.tolist() == truth.targets
    assert torch.equal(data.test["test"].images[4], torch.from_numpy(truth.data[4]).permute(2, 0, 1))
    assert len(open_data("cifar100", tmp_path / "cifar-100-python", size=224, limit=3).train) == 3


def test_cifar_is_upsampled_before_the_crop(tmp_path, monkeypatch):
    data = open_data("cifar100", write_cifar100(tmp_path, monkeypatch), size=224)
    test = data.test["test"]
    test.images = torch.zeros_like(test.images)
    test.images[:, :, 2:30, 2:30] = 255  # 32 -> 256 px enlarges 8 times, and the crop of 224 keeps 28 of 32
    assert test[0].image.shape == (3, 224, 224) and test[0].image[:, 8:-8, 8:-8].min() == 1


def test_a_missing_or_damaged_cifar_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="has no folder cifar-100-python"):
        open_data("cifar100", tmp_path)
    write_cifar100(tmp_path, monkeypatch)
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"half of it")
    with pytest.raises(DataError, match="missing or damaged: unpack"):
        open_data("cifar100", tmp_path)


# --------------------------------------------------------------------------------------------- broken files


def spoil(name, root, how):
    """Spoils one training file of every class, so that some remain in every split; returns what must be named."""
    data = open_data(name, root, size=32)
    named = []
    for label in range(3):
        row = next(
            i
            for i, sample in enumerate(data.train.samples)
            if sample.label == label and (sample.annotated or how != "annotation")
        )
        sample = data.train.samples[row]
        image = Path(sample.image)
        if how == "missing":
            image.unlink()
        elif how == "not an image":
            image.write_bytes(b"<html>404</html>")
        elif how == "truncated":
            image.write_bytes(image.read_bytes()[:-60])
        elif sample.mask:
            save(sample.mask, np.full((9, 9), 2, dtype=np.uint8))
        elif sample.xml:
            sample.xml.write_text("<annotation><object></object></annotation>")
        named.append(str(sample.image if how != "annotation" else sample.mask or sample.xml))
    return named


@pytest.mark.parametrize("how", ["missing", "not an image", "annotation"])
@pytest.mark.parametrize("name", ["cub200", "dogs", "pets"])
def test_broken_files_stop_with_their_number_and_the_first_name_or_are_skipped_by_name(name, how, tmp_path):
    root = WRITERS[name](tmp_path)
    named = spoil(name, root, how)
    with pytest.raises(
        DataError, match=f"{name}: 3 of {sum(COUNTS[name])} images cannot be used .the first: "
    ) as caught:
        open_data(name, root, size=32)
    assert any(n in str(caught.value) for n in named) and "\n" not in str(caught.value)
    data = open_data(name, root, size=32, skip_broken=True)
    assert len(data.skipped) == 3 and all(any(n in text for text in data.skipped) for n in named)
    assert len(data.train) == COUNTS[name][0] - 3
    stack(data.train, range(len(data.train)))


@pytest.mark.parametrize("name", ["cub200", "dogs", "pets"])
def test_a_truncated_image_is_named_when_it_is_read_and_found_before_when_skipping(name, tmp_path):
    root = WRITERS[name](tmp_path)
    named = spoil(name, root, "truncated")
    data = open_data(name, root, size=32)
    with pytest.raises(DataError, match="damaged: it cannot be read to its end") as caught:
        stack(data.train, range(len(data.train)))
    assert any(n in str(caught.value) for n in named)
    assert len(open_data(name, root, size=32, skip_broken=True).skipped) == 3


def test_imagenet_checks_headers_only_when_skipping(tmp_path):
    root = write_imagenet(tmp_path)
    named = spoil("imagenet", root, "not an image")
    data = open_data("imagenet", root, size=32)
    with pytest.raises(DataError, match="cannot be read as an image"):
        stack(data.train, range(len(data.train)))
    skipped = open_data("imagenet", root, size=32, skip_broken=True).skipped
    assert len(skipped) == 3 and all(any(n in text for text in skipped) for n in named)


def test_a_mask_of_another_size_and_a_box_outside_are_told_with_their_sizes(tmp_path):
    root = write_cub200(tmp_path / "a")
    path = sorted((root / "segmentations").rglob("*.png"))[0]
    save(path, np.zeros((9, 8), dtype=np.uint8))
    with pytest.raises(DataError, match=r"is 8 x 9 px, but its image .* is \d+ x \d+ px"):
        open_data("cub200", root)
    root = write_dogs(tmp_path / "b")
    write_xml(sorted((root / "Annotation").rglob("n*_0"))[0], [(500, 1, 600, 2)])
    with pytest.raises(DataError, match=r"the box \(500, 1, 600, 2\) has no area inside the image of \d+ x \d+ px"):
        open_data("dogs", root)


def test_a_class_missing_from_training_is_named(tmp_path):
    root = write_imagenet(tmp_path / "a")
    for path in (root / "train" / "n01443537").glob("*"):
        path.unlink()
    with pytest.raises(DataError, match=r"1 of 3 classes have no training image \(goldfish\)"):
        open_data("imagenet", root)
    root = write_cub200(tmp_path / "b")
    split = root / "CUB_200_2011" / "train_test_split.txt"
    lines = [line.split() for line in split.read_text().splitlines()]
    split.write_text("\n".join(f"{key} {0 if int(key) > 16 else value}" for key, value in lines))
    with pytest.raises(DataError, match=r"1 of 3 classes have no training image \(Grey Bird 3\)"):
        open_data("cub200", root)


@pytest.mark.parametrize(
    "name, path, sentence",
    [
        (
            "cub200",
            "CUB_200_2011/images.txt",
            "has no images.txt: give the folder that CUB_200_2011.tgz",
        ),
        ("cub200", "CUB_200_2011/image_class_labels.txt", "image_class_labels.txt is missing"),
        ("dogs", "lists/test_list.mat", "test_list.mat is missing: give the folder"),
        ("pets", "oxford-iiit-pet/annotations/test.txt", "no images/ and annotations/ with trainval.txt and test.txt"),
    ],
)
def test_a_missing_list_is_one_sentence(name, path, sentence, tmp_path):
    root = WRITERS[name](tmp_path)
    (root / path).unlink()
    with pytest.raises(DataError, match=sentence):
        open_data(name, root)


@pytest.mark.parametrize("name", ["cub200", "dogs", "pets", "imagenet"])
def test_an_empty_folder_is_one_sentence(name, tmp_path):
    with pytest.raises(DataError) as caught:
        open_data(name, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "table, text, sentence",
    [
        ("bounding_boxes", "1 60.0 27.0 wide 304.0", "is no box of x, y, width and height"),
        ("bounding_boxes", "1 60.0 27.0 30.0 30.0", "no line for 23 of the images"),
        ("images", "1", "entry 1 has 1 columns where 2 are expected"),
        ("classes", "7 007.Other", "has the class 1, which classes.txt does not list"),
    ],
)
def test_a_damaged_table_of_cub_is_one_sentence(table, text, sentence, tmp_path):
    root = write_cub200(tmp_path)
    path = root / "CUB_200_2011" / f"{table}.txt"
    keep = path.read_text().splitlines()[1:] if "wide" in text else []
    path.write_text("\n".join([text, *keep]))
    with pytest.raises(DataError, match=sentence):
        open_data("cub200", root, masks="boxes")


def test_a_damaged_list_of_dogs_is_one_sentence(tmp_path):
    root = write_dogs(tmp_path)
    (root / "lists" / "train_list.mat").write_bytes(b"no matlab")
    with pytest.raises(DataError, match="cannot be read as a list of Stanford Dogs"):
        open_data("dogs", root)


def test_layers_hold_the_image_and_its_mask(tmp_path):
    root = write_dogs(tmp_path)
    sample = open_data("dogs", root).train.samples[0]
    layers = read_layers(sample)
    red = np.asarray(Image.open(sample.image))[..., 0]
    np.testing.assert_array_equal(layers[0].numpy(), red)
    np.testing.assert_array_equal(layers[3].numpy(), red)
    assert read_xml_boxes(sample.xml) == ((box_of(red > 0),), red.shape[::-1])


def test_boxes_follow_images_that_were_resized_after_they_were_drawn(tmp_path):
    root = write_imagenet(tmp_path)
    for path in (root / "val").rglob("*.JPEG"):
        with Image.open(path) as image:
            image.resize((3 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path, format="PNG")
    batch = stack(open_data("imagenet", root, size=48).test["test"], range(6))
    torch.testing.assert_close(batch.image[:, :1] * 0.5 + 0.5, batch.mask, rtol=0, atol=1.5 / 255)


def test_an_annotation_may_leave_out_the_size(tmp_path):
    write_xml(tmp_path / "a", [(1, 2, 3, 4)])
    assert read_xml_boxes(tmp_path / "a") == (((1, 2, 3, 4),), None)
