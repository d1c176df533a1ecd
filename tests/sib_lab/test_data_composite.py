import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import RED_ON_BLUE, save, square, write_backgrounds, write_objects
from PIL import Image
from sib_lab.data import DataError, images, open_data, stack
from sib_lab.data.composite import FLIPPED, Region, background, cut_out, draw_groups
from sib_lab.data.files import Sample
from sib_lab.data.identity import changed
from sib_lab.data.images import ZipEntry
from torch.utils.data import DataLoader

SHARED = Path(os.environ.get("SIB_EXT_SHARED", Path(__file__).parents[3] / "shared"))


@pytest.fixture
def root(tmp_path):
    write_objects(tmp_path / "objects")
    write_backgrounds(tmp_path / "backgrounds")
    return tmp_path


def all_splits(data):
    return [("train", data.train), *data.validation.items(), *data.test.items()]


def everything(dataset):
    return stack(dataset, range(len(dataset)))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_splits_and_groups_are_as_asked(root):
    data = open_data("composite", root, size=32, copies=4)
    assert data.classes == ("ball", "cube", "ring", "star") and data.groups == ("forest", "sea")
    assert [(name, len(split)) for name, split in all_splits(data)] == [
        ("train", 4 * 2 * 2 * 4),  # classes, objects 1 and 2 of 5, views, copies
        ("matched", 4 * 1 * 2),
        ("uncorrelated", 4 * 1 * 2),
        ("uncorrelated", 4 * 2 * 2),
        ("matched", 4 * 2 * 2),
        ("flipped", 4 * 2 * 2),
    ]
    for _, split in all_splits(data):
        assert split.annotated.all() and len(set(torch.bincount(split.labels).tolist())) == 1


@pytest.mark.parametrize("augment", [False, True])
def test_the_boxes_of_a_composite_follow_its_transforms(root, augment):
    masks, boxes = (
        open_data("composite", root, size=48, augment=augment, annotation=annotation).train
        for annotation in ("masks", "boxes")
    )
    for as_mask, as_box in zip(masks, boxes, strict=True):
        assert torch.equal(as_mask.image, as_box.image)
        object_, box = as_mask.mask[0] > 0.5, as_box.mask[0] > 0.5
        if not augment:
            rows, columns = object_.any(1).nonzero(), object_.any(0).nonzero()
            expected = torch.zeros(48, 48)
            expected[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1
            assert torch.equal(as_box.mask[0], expected)
        assert not ((as_mask.mask[0] > 0.9) & ~box).any()  # edges may fall between two pixels
        assert box.sum() >= 0.9 * box.any(1).sum() * box.any(0).sum()  # all but corners between pixels


def objects(split):
    return {(photograph.label, photograph.object) for photograph in split.photographs}


def test_no_object_is_in_two_parts_and_named_ones_are_taken_in_order(root):
    data = open_data("composite", root, size=32)
    train, validation, test = objects(data.train), objects(data.validation["matched"]), objects(data.test["flipped"])
    assert {o for _, o in train} == {"1", "2"} or {o for _, o in train} == {"1", "2", "3"}
    assert not train & validation and not train & test and not validation & test
    assert len(train | validation | test) == 20
    assert all(objects(split) == test for split in data.test.values())
    assert max(o for _, o in train) < min(o for _, o in validation) < min(o for _, o in test)


def test_objects_are_numbered_not_spelled(tmp_path):
    write_objects(tmp_path / "objects", objects=10, views=1)
    write_backgrounds(tmp_path / "backgrounds")
    data = open_data("composite", tmp_path, size=32)
    assert {o for _, o in objects(data.test["matched"])} == {"8", "9", "10"}
    assert {o for _, o in objects(data.validation["matched"])} == {"6", "7"}


def test_backgrounds_are_shared_by_no_two_parts(root):
    data = open_data("composite", root, size=32)
    used = {}
    for name, split in (
        ("train", data.train),
        ("validation", data.validation["matched"]),
        ("test", data.test["flipped"]),
    ):
        used[name] = {region.picture for group in split.regions for region in group}
        assert all(region == Region(region.picture) for group in split.regions for region in group)
        # Green tells the group and blue the file of a background pixel.
        for item in split:
            colour = ((item.image * 0.5 + 0.5) * 255).round()[1:, (item.mask[0] == 0)][:, 0].int().tolist()
            path = root / "backgrounds" / data.groups[item.group] / f"{colour[1] // 20}.png"
            assert colour[0] == 50 + 100 * item.group and path in used[name]
    assert not used["train"] & used["validation"] and not used["train"] & used["test"]
    assert not used["validation"] & used["test"] and len(set.union(*used.values())) == 10


def test_pictures_of_one_scene_stay_together_across_groups(root):
    lines = [f"{group}/{i}.png,scene {i // 2}" for group in ("forest", "sea") for i in range(5)]
    (root / "backgrounds" / "backgrounds.csv").write_text("\n".join(["file,source", *lines]))
    for seed in range(4):
        data = open_data("composite", root, size=32, seed=seed)
        parts = (data.train, data.validation["matched"], data.test["matched"])
        scenes = [{int(r.picture.stem) // 2 for group in split.regions for r in group} for split in parts]
        assert sum(map(len, scenes)) == 3 == len(set.union(*scenes))


def test_a_group_of_two_pictures_is_split_by_region(tmp_path):
    write_objects(tmp_path / "objects")
    ramp = np.tile(np.arange(200, dtype=np.uint8), (60, 1))
    for group in ("a", "b"):
        for place in range(2):
            save(tmp_path / "backgrounds" / group / f"{place}.png", np.dstack([0 * ramp, ramp, 0 * ramp]))
    data = open_data("composite", tmp_path, size=32)
    spans = {}
    for name, split in (
        ("train", data.train),
        ("validation", data.validation["matched"]),
        ("test", data.test["matched"]),
    ):
        green = torch.cat([((i.image * 0.5 + 0.5) * 255)[1][i.mask[0] == 0] for i in split])
        spans[name] = (green.min().item(), green.max().item())
    assert spans["train"][1] <= 120 and 119 <= spans["validation"][0] and spans["validation"][1] <= 160
    assert 159 <= spans["test"][0]


def test_an_upright_picture_is_cut_across(tmp_path):
    assert Region(Path("x"), 0.6, 0.8).box(100, 50) == (60, 0, 80, 50)
    assert Region(Path("x"), 0.6, 0.8).box(50, 100) == (0, 60, 50, 80)


# ------------------------------------------------------------------------------------------------- groups


def test_backgrounds_agree_as_often_as_asked_in_every_class():
    labels = np.repeat(np.arange(6), 40)
    rng = np.random.default_rng(0)
    for kinds in (2, 3):
        own = labels % kinds
        for agreement in (0.0, 0.5, 0.95, 1.0):
            groups = draw_groups(labels, kinds, agreement, rng)
            shares = [(groups == own)[labels == label].mean() for label in range(6)]
            assert shares == [agreement] * 6 and set(groups) <= set(range(kinds))


def test_uncorrelated_means_every_group_equally_often_in_every_class_and_flipped_means_never_its_own():
    labels = np.repeat(np.arange(6), 42)
    rng = np.random.default_rng(0)
    for kinds in (2, 3):
        groups = draw_groups(labels, kinds, None, rng)
        for label in range(6):
            assert np.bincount(groups[labels == label]).tolist() == [42 // kinds] * kinds
        flipped = draw_groups(labels, kinds, FLIPPED, rng)
        np.testing.assert_array_equal(flipped, (labels % kinds + 1) % kinds)


def test_the_test_sets_differ_in_their_backgrounds_only(root):
    data = open_data("composite", root, size=32, agreement=1.0)
    matched, flipped = everything(data.test["matched"]), everything(data.test["flipped"])
    assert torch.equal(matched.mask, flipped.mask) and torch.equal(matched.label, flipped.label)
    assert (matched.group == matched.label % 2).all() and (flipped.group != matched.group).all()
    assert torch.equal(matched.image[:, :1], flipped.image[:, :1])  # red is the object's alone


# ---------------------------------------------------------------------------------------------- composites


def test_the_mask_is_the_exact_opacity_of_the_object(root):
    data = open_data("composite", root, size=48)
    for _, split in all_splits(data):
        batch = everything(split)
        image = batch.image * 0.5 + 0.5
        # Pure red objects and backgrounds without red: the red channel is the opacity.
        torch.testing.assert_close(image[:, :1], batch.mask, rtol=0, atol=1.01 / 255)
        # No blue of the backdrop came along: green and blue are the background's share alone.
        background_share = 1 - batch.mask
        green = (50 + 100 * batch.group.view(-1, 1, 1, 1)) / 255 * background_share
        torch.testing.assert_close(image[:, 1:2], green, rtol=0, atol=1.01 / 255)
        blue = image[:, 2:] / background_share.clamp_min(0.05)
        assert (blue <= 80 / 255 + 0.05)[background_share > 0.2].all()


def test_augmented_masks_follow_their_images(root):
    batch = everything(open_data("composite", root, size=48, augment=True).train)
    torch.testing.assert_close(batch.image[:, :1] * 0.5 + 0.5, batch.mask, rtol=0, atol=2.01 / 255)


def test_the_cut_out_loses_a_pixel_and_the_backdrop_and_has_a_soft_edge(tmp_path):
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[10:30, 5:35] = 1
    sample = Sample(save(tmp_path / "i.png", RED_ON_BLUE[mask]), 0, save(tmp_path / "m.png", mask * 255))
    thing = cut_out(sample, longest=100)
    colours, alpha = thing[:3], thing[3]
    assert alpha.shape == (20, 30)
    torch.testing.assert_close(colours[0], alpha)
    assert not colours[1:].any()
    assert (alpha[2:-2, 2:-2] > 0.9).all() and (alpha[5:-5, 5:-5] == 1).all()
    assert (alpha[0] < 0.5).all() and (alpha[:, -1] < 0.5).all() and (alpha[:, 10] > 0).all()


def test_large_photographs_are_made_smaller_first(tmp_path):
    mask = np.zeros((300, 500), dtype=np.uint8)
    mask[50:250, 50:450] = 1
    sample = Sample(save(tmp_path / "i.png", RED_ON_BLUE[mask]), 0, save(tmp_path / "m.png", mask * 255))
    for longest, most in ((30, 256), (80, 320), (200, 400)):
        thing = cut_out(sample, longest)
        assert thing.shape == (4, most // 2, most)
        torch.testing.assert_close(thing[0], thing[3])


def test_a_line_of_one_pixel_is_not_eroded_away(tmp_path):
    mask = np.eye(40, dtype=np.uint8)
    sample = Sample(save(tmp_path / "i.png", RED_ON_BLUE[mask]), 0, save(tmp_path / "m.png", mask * 255))
    assert cut_out(sample, longest=100)[3].diagonal().min() > 0.2


def test_objects_have_the_size_and_the_freedom_that_were_asked_for(root):
    data = open_data("composite", root, size=64, copies=8, scale="0.25,0.5")
    boxes = []
    for item in data.train:
        rows, columns = (torch.nonzero(item.mask[0].amax(axis) > 0)[:, 0] for axis in (1, 0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    x1, y1, x2, y2 = np.array(boxes, dtype=float).T
    longest = np.maximum(x2 - x1, y2 - y1)
    assert 14 <= longest.min() < 19 and 28 < longest.max() <= 32
    assert x1.min() < 5 and y1.min() < 5 and x2.max() > 59 and y2.max() > 59


def test_a_background_crop_is_a_square_of_its_region(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 90).astype(np.uint8), (60, 1))
    path = save(tmp_path / "ramp.png", np.dstack([ramp, ramp, ramp]))
    seen = [background(Region(path, 0.6, 1.0), 16, np.random.default_rng(i)) for i in range(30)]
    for crop in seen:
        assert crop.shape == (3, 16, 16) and crop.min() > 0.58 and (crop[0] - crop[0, :1]).abs().max() < 0.02
        assert 0.6 * 36 / 90 * 0.8 < crop[0, 0].max() - crop[0, 0].min() < 36 / 90
    assert {bool(crop[0, 0, 0] < crop[0, 0, -1]) for crop in seen} == {True, False}


def test_item_i_is_the_same_in_every_order_worker_and_run(root):
    data = open_data("composite", root, size=32)
    reverse = [data.train[row] for row in reversed(range(len(data.train)))][::-1]
    again = open_data("composite", root, size=32)
    loaded = [
        item for batch in DataLoader(again.train, batch_size=1, num_workers=2) for item in zip(*batch, strict=True)
    ]
    for a, b in zip(reverse, loaded, strict=True):
        assert torch.equal(a.image, b[0]) and torch.equal(a.mask, b[2]) and a.label == b[1] and a.group == b[4]
    assert equal(everything(data.train), everything(again.train))
    other = open_data("composite", root, size=32, seed=1)
    assert not torch.equal(everything(data.train).image, everything(other.train).image)


def test_composites_can_be_sent_to_workers_that_start_afresh(root):
    train = open_data("composite", root, size=32).train
    assert equal(everything(pickle.loads(pickle.dumps(train))), everything(train))


def test_sets_too_large_to_keep_give_the_same_items(root):
    data = open_data("composite", root, size=32)
    kept = everything(data.train)
    data.train.keep, data.train.kept = False, {}
    assert equal(kept, everything(data.train)) and not data.train.kept


# ------------------------------------------------------------------------------------------- layouts, errors


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("prefix", ["", "eth80/"])
def test_an_archive_is_read_like_the_folder_also_in_workers(root, tmp_path, prefix):
    archive = zipped(root / "objects", tmp_path / "objects.zip", prefix)
    folder = open_data("composite", root, size=32)
    packed = open_data("composite", objects=archive, backgrounds=root / "backgrounds", size=32)
    assert equal(everything(folder.train), everything(packed.train))
    fresh = open_data("composite", objects=archive, backgrounds=root / "backgrounds", size=32)
    (batch,) = DataLoader(fresh.train, batch_size=len(fresh.train), num_workers=1)
    assert equal(batch, everything(folder.train))


def test_no_two_processes_read_an_archive_through_one_handle(root, tmp_path, monkeypatch):
    entry = ZipEntry(zipped(root / "objects", tmp_path / "objects.zip"), "masks/ball/1/0.png")
    opened = []
    monkeypatch.setattr(images, "ZipFile", lambda path: opened.append(path) or zipfile.ZipFile(path))
    for process in (1, 1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        entry.open()
    assert opened == [entry.archive] * 2


def test_the_only_archive_in_root_is_taken(root):
    zipped(root / "objects", root / "things.zip")
    (root / "objects").rename(root / "old")
    assert len(open_data("composite", root, size=32).test["matched"]) == 16


def test_labels_csv_says_which_photographs_show_one_object(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["image,mask,label,class,object,view"]
    for name in ("apple", "car"):
        for number in range(1, 5):
            for view in ("a", "b"):
                mask = square(rng)
                stem = f"{name}{number}-{view}"
                save(tmp_path / "objects" / "images" / name / f"{stem}.jpg", RED_ON_BLUE[mask])
                save(tmp_path / "objects" / "masks" / name / f"{stem}.png", mask)
                lines.append(f"images/{name}/{stem}.jpg,masks/{name}/{stem}.png,0,{name},{number},{view}")
    (tmp_path / "objects" / "labels.csv").write_text("\n".join(lines))
    write_backgrounds(tmp_path / "backgrounds")
    data = open_data("composite", tmp_path, size=32)
    assert data.classes == ("apple", "car")
    assert objects(data.train) == {(0, "1"), (0, "2"), (1, "1"), (1, "2")} and len(data.train) == 8
    assert objects(data.test["matched"]) == {(0, "4"), (1, "4")}
    (tmp_path / "objects" / "images" / "car" / "car1-a.jpg").unlink()
    with pytest.raises(DataError, match="car1-a.jpg is missing"):
        open_data("composite", tmp_path)
    (tmp_path / "objects" / "labels.csv").write_text("file,class\n")
    with pytest.raises(DataError, match="labels.csv has no column image and mask|has no column image, mask"):
        open_data("composite", tmp_path)


def test_without_names_every_photograph_is_an_object_taken_by_chance(tmp_path):
    for number in range(10):
        for name in ("apple", "car"):
            mask = square(np.random.default_rng(number))
            save(tmp_path / "objects" / name / f"{number}.jpg", RED_ON_BLUE[mask])
            save(tmp_path / "objects" / "masks" / name / f"{number}.png", mask)
    write_backgrounds(tmp_path / "backgrounds")
    data = open_data("composite", tmp_path, size=32)
    images = [[str(p.image) for p in s.photographs] for _, s in all_splits(data)]
    assert [len(listed) for listed in images] == [10, 4, 4, 6, 6, 6] and len({*images[0], *images[1], *images[3]}) == 20
    tests = {
        tuple(
            sorted(p.image.stem for p in open_data("composite", tmp_path, size=32, seed=s).test["matched"].photographs)
        )
        for s in range(4)
    }
    assert len(tests) > 1


def refused(root, sentence, **options):
    with pytest.raises(DataError, match=sentence) as caught:
        open_data("composite", root, size=32, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"copies": 0}, "copies must be at least 1"),
        ({"scale": (0.5, 0.2)}, "scale must be two rising shares"),
        ({"scale": "0.5,1.2"}, "scale must be two rising shares"),
        ({"validation_share": 0.5, "test_share": 0.5}, "leave objects to train on"),
        ({"validation_share": 0.39, "test_share": 0.6}, "class ball has 5 objects"),
        ({"objects": "/nowhere"}, "objects is not there: /nowhere"),
        ({"backgrounds": "/nowhere"}, "backgrounds is not a folder: /nowhere"),
        ({"limit": 3}, r"1 of 4 classes have no training image"),
    ],
)
def test_wrong_options_are_one_sentence(root, options, sentence):
    refused(root, sentence, **options)


def test_one_group_of_backgrounds_or_an_empty_one_is_refused(root):
    (root / "backgrounds" / "city").mkdir()
    refused(root, "background folder .*city holds no pictures")
    for name in ("city", "sea"):
        (root / "backgrounds" / name).rename(root / name)
    refused(root, "has 1 folders where at least 2 are needed")


def test_a_tiny_background_is_refused(root):
    save(root / "backgrounds" / "sea" / "9.png", np.zeros((9, 90, 3), dtype=np.uint8))
    refused(root, "9.png is too small for a background: 90 x 9 px")


def test_no_objects_one_class_or_no_archive_are_told(root, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(root, "holds no images/<class>/ with pictures", objects=tmp_path / "empty")
    write_objects(tmp_path / "one", classes=("ball",))
    refused(root, "has 1 class where at least 2", objects=tmp_path / "one")
    (tmp_path / "bad.zip").write_bytes(b"PK?")
    refused(root, "bad.zip cannot be read as a .zip", objects=tmp_path / "bad.zip")


def test_broken_photographs_are_counted_named_and_skipped_on_request(root):
    folder = root / "objects"
    (folder / "images" / "ball" / "1" / "0.png").write_bytes(b"")
    save(folder / "masks" / "cube" / "1" / "0.png", np.ones((5, 5), dtype=np.uint8))
    refused(root, r"composite \(objects\): 2 of 40 images cannot be used")
    (folder / "masks" / "ring" / "1" / "0.png").unlink()
    refused(root, "1 of 40 photographs of objects have no mask .*ring/1/0.png")
    (root / "backgrounds" / "sea" / "0.png").write_bytes(b"")
    data = open_data("composite", root, size=32, skip_broken=True)
    assert len(data.skipped) == 4 and sum("sea/0.png" in text for text in data.skipped) == 1
    everything(data.train)


def test_an_empty_mask_is_named(root):
    path = root / "objects" / "masks" / "ball" / "1" / "0.png"
    with Image.open(path) as mask:
        save(path, np.zeros_like(np.asarray(mask)))
    with pytest.raises(DataError, match="ball/1/0.png is empty: it marks no object"):
        everything(open_data("composite", root, size=32).train)
    skipped = open_data("composite", root, size=32, skip_broken=True).skipped
    assert len(skipped) == 1 and "is empty" in skipped[0]


# ---------------------------------------------------------------------------------------------- real images


def test_the_real_eth80_on_bsds_backgrounds():
    folder = SHARED / "data"
    if not (folder / "eth80_128.zip").is_file():
        pytest.skip("no data/eth80_128.zip in SIB_EXT_SHARED or ../shared")
    data = open_data("composite", folder)
    assert data.classes == ("apple", "car", "cow", "cup", "dog", "horse", "pear", "tomato")
    assert data.groups == ("land", "water")
    assert [len(split) for _, split in all_splits(data)] == [8 * 5 * 41, 656, 656, 984, 984, 984]
    assert {o for _, o in objects(data.test["matched"])} == {"8", "9", "10"}
    assert (data.train.groups == data.train.labels % 2).double().mean() == pytest.approx(0.95, abs=0.005)
    batch = stack(data.test["uncorrelated"], range(0, 984, 20))
    share = (batch.mask > 0.5).double().mean((1, 2, 3))
    assert 0.01 < share.min() and share.max() < 0.36 and 0.08 < share.mean() < 0.2
    scenes = []
    for split in (data.train, data.validation["matched"], data.test["matched"]):
        scenes.append({r.picture.stem.split("_")[1] for group in split.regions for r in group})
    assert not scenes[0] & scenes[1] and not scenes[0] & scenes[2] and not scenes[1] & scenes[2]


def test_an_identity_follows_the_files_and_their_groups_wherever_they_lie(root, tmp_path):
    before = open_data("composite", root, size=32).identity()
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("objects", "backgrounds"):
        (root / name).rename(moved / name)
    assert open_data("composite", moved, size=32).identity() == before
    assert open_data("composite", moved, size=32, agreement=0.5).identity()["train"] != before["train"]
    save(moved / "objects/images/ball/1/0.png", np.zeros((50, 60, 3), np.uint8))
    save(moved / "objects/masks/ball/1/0.png", np.full((50, 60), 255, np.uint8))
    assert changed(before, open_data("composite", moved, size=32).identity()) == "the training split differs"
