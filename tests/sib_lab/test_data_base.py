import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from data_samples import square, write_folder
from sib_lab.data import SETS, DataError, Item, open_data, set_epoch, stack
from sib_lab.data import digits_on_textures as textures
from sib_lab.data.base import Common, bounding_box, drawn, limited, photo_transforms, stratified, visible
from torch.utils.data import DataLoader

TINY = {"train": 40, "validation": 20, "test": 20, "copies": 2}


@pytest.fixture(scope="module")
def digits():
    return open_data("digits", **TINY)


# -------------------------------------------------------------------------------------------------- items


def test_an_item_of_the_digits_is_the_normalised_image_with_its_mask(digits):
    split = textures.build(0, 40, 20, 20, copies=2)["train"]
    batch = stack(digits.train, range(len(split)))
    assert torch.equal(batch.image, split.inputs) and torch.equal(batch.mask, split.masks)
    assert torch.equal(batch.label, split.labels) and torch.equal(batch.group, split.backgrounds)
    assert batch.annotated.all() and batch.image.dtype == batch.mask.dtype == torch.float32


def test_a_loader_stacks_items_with_every_field_in_its_type(digits):
    batch = next(iter(DataLoader(digits.train, batch_size=4)))
    assert isinstance(batch, Item)
    assert batch.image.shape == (4, 3, 40, 40) and batch.mask.shape == (4, 1, 40, 40)
    assert batch.label.dtype == batch.group.dtype == torch.int64 and batch.annotated.dtype == torch.bool


def test_a_row_outside_is_an_index_error_and_stacking_nothing_is_refused(digits):
    with pytest.raises(IndexError):
        digits.train[len(digits.train)]
    with pytest.raises(DataError, match="at least one row"):
        stack(digits.train, [])


def test_the_flipped_digits_stand_on_the_background_of_the_next_label(digits):
    flipped, uncorrelated = digits.test["flipped"], digits.test["uncorrelated"]
    assert torch.equal(flipped.groups, (flipped.labels + 1) % 10)
    assert torch.equal(flipped.labels, uncorrelated.labels) and list(digits.test)[0] == "uncorrelated"
    assert list(digits.validation) == ["matched", "uncorrelated"]


def test_the_agreement_of_the_digits_can_be_chosen():
    data = open_data("digits", agreement=0.5, **TINY)
    assert (data.train.groups == data.train.labels).double().mean() == 0.5


def test_digits_of_another_size_keep_mask_and_image_aligned():
    data = open_data("digits", size=80, **TINY)
    batch = stack(data.train, range(8))
    assert batch.image.shape == (8, 3, 80, 80) and 0 <= batch.mask.min() and batch.mask.max() <= 1
    small = stack(open_data("digits", **TINY).train, range(8))
    pooled = torch.nn.functional.avg_pool2d(batch.mask, 2)
    assert (pooled - small.mask).abs().mean() < 0.02


# ----------------------------------------------------------------------------------------------- open_data


def test_every_option_of_every_set_is_documented_and_taken():
    import inspect
    from importlib import import_module

    for info in SETS.values():
        opener = import_module(f"sib_lab.data.{info.module}").open_set
        assert inspect.signature(opener).parameters.keys() - {"root", "common"} == info.options.keys()


def test_importing_the_list_of_sets_loads_no_torch_of_its_own():
    code = "import sys; from sib_lab.data import SETS, DataError, open_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("birds", {}, "no data set 'birds': choose one of digits"),
        ("digits", {"size": 4}, "size must be a whole number of at least 8"),
        ("digits", {"masks": "x"}, "has no option 'masks': it takes train, validation, test, copies"),
        ("digits", {"train": "many"}, "option train must be a whole number, got 'many'"),
        ("digits", {"train": 1790}, "at most 1797"),
        ("digits", {"agreement": 1.5}, "agreement must be a share between 0 and 1"),
        ("digits", {"annotated": -0.1}, "annotated must be a share between 0 and 1"),
        ("digits", {"annotation": "points"}, "annotation must be one of masks, boxes, got 'points'"),
        ("cifar100", {"annotation": "boxes"}, "cifar100 has no masks to take the boxes of: leave annotation out"),
        ("digits", {"limit": 0}, "limit must be at least 1"),
        ("cub200", {}, "cub200 needs root, the folder with CUB_200_2011"),
        ("cub200", {"root": "/nowhere/at/all"}, "root is not a folder: /nowhere/at/all"),
        ("composite", {}, "composite needs objects and backgrounds, or root"),
        ("composite", {"scale": "0.3"}, "option scale must be 2 numbers with commas between them"),
    ],
)
def test_a_wrong_choice_is_one_sentence(name, options, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        open_data(name, **options)
    assert "\n" not in str(caught.value)


def test_options_may_be_strings():
    data = open_data("digits", **{key: str(value) for key, value in TINY.items()})
    assert len(data.train) == 80


# -------------------------------------------------------------------------------------------------- splits


def test_a_stratified_split_takes_its_share_of_every_class_and_repeats_with_its_seed():
    labels = np.repeat([0, 1, 2], [20, 10, 5])
    parts = stratified(labels, "abc", {"validation": 0.2, "test": 0.1}, seed=0)
    assert [len(parts[p]) for p in ("train", "validation", "test")] == [14 + 7 + 3, 4 + 2 + 1, 2 + 1 + 1]
    assert sorted(sum(parts.values(), [])) == list(range(35))
    assert set(labels[parts["validation"]]) == set(labels[parts["test"]]) == {0, 1, 2}
    assert parts == stratified(labels, "abc", {"validation": 0.2, "test": 0.1}, seed=0)
    assert parts != stratified(labels, "abc", {"validation": 0.2, "test": 0.1}, seed=1)


def test_a_class_too_small_to_share_out_is_named():
    with pytest.raises(DataError, match="The class b has 2 images .* at least 3 are needed"):
        stratified([0] * 9 + [1] * 2, "ab", {"validation": 0.1, "test": 0.1}, 0)


@pytest.mark.parametrize("shares", [{"validation": 0.0}, {"validation": 0.6, "test": 0.4}])
def test_shares_that_leave_nothing_are_refused(shares):
    with pytest.raises(DataError, match="shares of the splits"):
        stratified([0] * 9, "a", shares, 0)


def test_a_limit_takes_as_many_of_each_class():
    labels = np.repeat([0, 1, 2], [50, 5, 50])
    rows = limited(labels, 30, seed=0)
    assert len(rows) == 30 and rows == sorted(rows)
    counts = np.bincount(labels[rows])
    assert counts[1] == 5 and {counts[0], counts[2]} <= {12, 13}
    assert limited(labels, None, 0) == list(range(105))


def test_a_limit_by_names_takes_as_many_of_each_class_and_loses_no_other_image_than_one_that_goes():
    labels = np.repeat([0, 1, 2], [50, 5, 50])
    names = [f"{label}/{place}" for place, label in enumerate(labels)]
    for limit in (1, 16, 30, 31, 104):
        taken = limited(labels, limit, 0, names.__getitem__)
        assert taken == sorted(set(taken)) and len(taken) == limit
        counts, by_number = (np.bincount(labels[rows], minlength=3) for rows in (taken, limited(labels, limit, 0)))
        assert abs(counts - by_number).max() <= 1
        for gone in range(105):
            left = [row for row in range(105) if row != gone]
            of_left = limited(labels[left], limit, 0, lambda row, left=left: names[left[row]])
            lost = set(taken) - {left[row] for row in of_left}
            assert lost == {gone} & set(taken)
    assert taken != limited(labels, 104, 1, names.__getitem__)
    assert limited(labels, 105, 0, names.__getitem__) == list(range(105))


def test_the_masks_seen_by_names_are_the_share_asked_for_and_stay_when_an_image_goes():
    known = torch.tensor([True, True, True, False] * 20)
    names = [f"{place}.jpg" for place in range(80)]
    before = torch.zeros(80, dtype=torch.bool)
    for share in (0.0, 0.1, 0.5, 0.99, 1.0):
        seen = visible(known, share, 0, names.__getitem__)
        assert seen.sum() == math.floor(share * 60 + 0.5) and not (seen & ~known).any() and not (before & ~seen).any()
        before = seen
        for gone in range(80):
            left = [row for row in range(80) if row != gone]
            of_left = visible(known[left], share, 0, lambda row, left=left: names[left[row]])
            # The number of a share of one mask less may round down to one less, or the next mask be taken.
            assert (of_left != seen[left]).sum() <= 1
    assert torch.equal(seen, known)


def test_a_limit_applies_to_every_split_and_one_below_the_classes_is_refused():
    data = open_data("digits", limit=15, **TINY)
    assert {len(s) for s in (data.train, *data.validation.values(), *data.test.values())} == {15}
    with pytest.raises(DataError, match="classes have no training image"):
        open_data("digits", limit=5, **TINY)


def test_a_share_of_the_masks_can_be_hidden_from_the_training_only():
    half = open_data("digits", annotated=0.5, **TINY)
    less = open_data("digits", annotated=0.25, **TINY)
    batch = stack(half.train, range(80))
    assert batch.annotated.sum() == 40 and torch.equal(batch.annotated, half.train.annotated)
    assert not batch.mask[~batch.annotated].any() and batch.mask[batch.annotated].flatten(1).any(1).all()
    assert less.train.annotated.sum() == 20 and not (less.train.annotated & ~half.train.annotated).any()
    assert half.test["uncorrelated"].annotated.all() and half.validation["matched"].annotated.all()


def test_the_training_can_be_shown_boxes_instead_of_masks_and_nothing_else_changes():
    masks = open_data("digits", annotated=0.5, **TINY)
    boxes = open_data("digits", annotated=0.5, annotation="boxes", **TINY)
    as_masks, as_boxes = (stack(data.train, range(80)) for data in (masks, boxes))
    for field in ("image", "label", "annotated", "group"):
        assert torch.equal(getattr(as_masks, field), getattr(as_boxes, field))
    for mask, box, annotated in zip(as_masks.mask[:, 0], as_boxes.mask[:, 0], as_masks.annotated, strict=True):
        places = [(i, j) for i in range(40) for j in range(40) if mask[i, j] > mask.max() / 2]
        rows, columns = {i for i, _ in places}, {j for _, j in places}
        for i in range(40):
            for j in range(40):
                inside = annotated and min(rows) <= i <= max(rows) and min(columns) <= j <= max(columns)
                assert box[i, j] == float(inside)
    for name in masks.test:
        assert torch.equal(stack(masks.test[name], range(20)).mask, stack(boxes.test[name], range(20)).mask)
    for name in masks.validation:
        assert torch.equal(stack(masks.validation[name], range(20)).mask, stack(boxes.validation[name], range(20)).mask)


@pytest.mark.parametrize(("dtype", "highest"), [(torch.uint8, 255), (torch.float32, 1.0)])
def test_a_bounding_box_keeps_the_type_and_is_empty_without_an_object(dtype, highest):
    mask = torch.zeros(1, 5, 6, dtype=dtype)
    assert not bounding_box(mask).any()
    mask[0, 1, 2], mask[0, 3, 4], mask[0, 0, 0] = highest // 2 or 0.6, highest, highest // 4 or 0.3
    mask[0, 1, 2] += 1 if dtype == torch.uint8 else 0
    expected = torch.zeros_like(mask)
    expected[:, 1:4, 2:5] = highest
    assert bounding_box(mask).dtype == dtype and torch.equal(bounding_box(mask), expected)


def test_what_was_never_annotated_stays_so():
    known = torch.tensor([True, False] * 10)
    assert torch.equal(visible(known, 1.0, 0), known)
    assert not (visible(known, 0.5, 0) & ~known).any() and visible(known, 0.5, 0).sum() == 5


# ---------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("augment", [False, True])
def test_a_mask_follows_every_transform_of_its_image(augment):
    transform, _ = photo_transforms(Common(size=32, augment=augment))
    rng = np.random.default_rng(0)
    for row in range(20):
        mask = torch.from_numpy(square(rng) * 255)
        layers = transform(torch.stack([mask, 0 * mask, 255 - mask, mask]), row)
        assert layers.shape == (4, 32, 32)
        assert torch.equal(layers[0], layers[3])


def test_the_protocol_is_resize_256_and_centre_crop_224_scaled_to_the_size():
    _, transform = photo_transforms(Common(size=112))
    layers = torch.zeros(4, 256, 512)
    layers[:, 16:240, 144:368] = 1  # exactly what a crop of 224 from the middle keeps
    assert transform(layers, 0).mean() > 0.99
    layers[:, 16:240, 144:368] = 0
    layers[:, :8] = layers[:, -8:] = layers[..., :136] = layers[..., -136:] = 1
    assert transform(layers, 0).max() < 1e-6


def test_augmentation_follows_from_seed_epoch_and_row_and_leaves_the_random_numbers_alone(tmp_path):
    data = open_data("folder", write_folder(tmp_path), size=24, augment=True)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = stack(data.train, range(6)).image
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(stack(data.train, [5, 3]).image, first[[5, 3]])
    set_epoch(data.train, 1)
    second = stack(data.train, range(6)).image
    assert not torch.equal(first, second)
    set_epoch(data.train, 0)
    assert torch.equal(stack(data.train, range(6)).image, first)
    layers = data.train.layers(0)
    assert not torch.equal(data.train.transform(layers, 0), data.train.transform(layers, 1))


def test_workers_that_live_on_see_the_epoch_and_make_the_same_items(tmp_path):
    data = open_data("folder", write_folder(tmp_path, count=4), size=24, augment=True)
    loader = DataLoader(data.train, batch_size=len(data.train), num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        set_epoch(data.train, epoch)
        (batch,) = loader
        expected = stack(data.train, range(len(data.train)))
        assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


def test_data_sets_can_be_sent_to_workers_that_start_afresh(tmp_path, digits):
    folder = open_data("folder", write_folder(tmp_path), size=24, augment=True)
    for dataset in (folder.train, digits.train):
        sent = pickle.loads(pickle.dumps(dataset))
        assert all(torch.equal(a, b) for a, b in zip(stack(sent, [3, 1]), stack(dataset, [3, 1]), strict=True))


def test_only_training_images_are_augmented_and_digits_are_never_flipped(tmp_path):
    data = open_data("folder", write_folder(tmp_path), size=24, augment=True)
    plain = open_data("folder", tmp_path, size=24)
    for name in ("validation", "test"):
        a, b = getattr(data, name)[name], getattr(plain, name)[name]
        assert torch.equal(stack(a, range(len(a))).image, stack(b, range(len(b))).image)
    augmented = stack(open_data("digits", augment=True, **TINY).train, range(80))
    whole = stack(open_data("digits", **TINY).train, range(80))
    assert not torch.equal(augmented.image, whole.image)
    similar = torch.nn.functional.cosine_similarity(augmented.mask.flatten(1), whole.mask.flatten(1)).mean()
    mirrored = torch.nn.functional.cosine_similarity(augmented.mask.flatten(1), whole.mask.flip(3).flatten(1)).mean()
    assert similar > mirrored + 0.1


def test_an_error_in_a_worker_stays_one_sentence(tmp_path):
    data = open_data("folder", write_folder(tmp_path, count=4), size=24)
    data.train.samples[0].image.write_bytes(b"gone")
    loader = DataLoader(data.train, num_workers=1)
    with pytest.raises(DataError, match="cannot be read as an image") as caught:
        list(loader)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_a_drawn_split_follows_from_names_and_gives_every_part_an_image():
    names = [f"{label}/{place}.jpg" for label in "ab" for place in range(400)] + ["c/0.jpg", "c/1.jpg", "c/2.jpg"]
    labels = ["abc".index(name[0]) for name in names]
    shares = {"validation": 0.15, "test": 0.2}
    parts = drawn(names, labels, "abc", shares, seed=0)
    assert sorted(sum(parts.values(), [])) == list(range(803))
    for part, share in (("validation", 0.15), ("test", 0.2), ("train", 0.65)):
        for label in range(2):
            assert abs(sum(labels[row] == label for row in parts[part]) / 400 - share) < 0.06
        assert sum(labels[row] == 2 for row in parts[part]) == 1
    fewer = drawn(names[7:], labels[7:], "abc", shares, seed=0)
    assert all({names[7:][row] for row in fewer[part]} <= {names[row] for row in parts[part]} for part in parts)
    composed, decomposed = (drawn([f"{e}{i}" for i in range(99)], [0] * 99, "a", shares, 0) for e in ("é", "e\u0301"))
    assert composed == decomposed
    with pytest.raises(DataError, match="class b has 2 images to share out among train, .* at least 3"):
        drawn("abcdef", [0] * 4 + [1] * 2, "ab", shares, 0)
