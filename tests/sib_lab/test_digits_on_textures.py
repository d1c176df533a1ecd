import socket

import pytest
import torch
from sib_lab.data import digits_on_textures as data

SMALL = {"train": 60, "validation": 30, "test": 30}


@pytest.fixture(scope="module")
def splits():
    return data.build(0, **SMALL)


def fields(splits):
    return [field for split in splits.values() for field in vars(split).values()]


def test_one_seed_gives_one_data_set_bit_for_bit(splits):
    assert all(torch.equal(a, b) for a, b in zip(fields(splits), fields(data.build(0, **SMALL)), strict=True))


def test_another_seed_gives_another_data_set(splits):
    assert not torch.equal(splits["train"].images, data.build(1, **SMALL)["train"].images)


def test_train_validation_and_test_share_no_digit(splits):
    train, validation, test = (
        set(splits[name].digits.tolist()) for name in ("train", "validation_matched", "test_matched")
    )
    assert not train & validation and not train & test and not validation & test
    assert test == set(splits["test_uncorrelated"].digits.tolist())


@pytest.mark.parametrize("name", data.BACKGROUNDS)
def test_every_picture_has_room_for_every_part_and_no_pixel_in_two(name):
    height, width, _ = data.picture(name).shape
    owners = torch.zeros(height, width)
    for part in data.PARTS:
        corners = data.crop_corners(height, width, part)
        assert len(corners) >= 3
        for y, x in corners:
            assert y + data.BLOCK <= height and x + data.BLOCK <= width
            owners[y : y + data.BLOCK, x : x + data.BLOCK] += 1
    assert owners.max() == 1


def test_a_crop_shows_only_blocks_of_its_own_part(monkeypatch):
    painted = torch.zeros(240, 240, 3)
    for value, part in enumerate(data.PARTS, start=1):
        for y, x in data.crop_corners(240, 240, part):
            painted[y : y + data.BLOCK, x : x + data.BLOCK] = value / 4
    monkeypatch.setattr(data, "picture", lambda name: painted.numpy())
    for name, split in data.build(0, **SMALL).items():
        value = 1 + data.PARTS.index(name.split("_")[0])
        off_the_digit = (split.masks == 0).expand_as(split.images)
        assert (split.images[off_the_digit] == value / 4).all()


def test_the_mask_is_the_exact_opacity_of_the_stroke(monkeypatch):
    monkeypatch.setattr(data, "picture", lambda name: torch.full((240, 240, 3), 0.5).numpy())
    split = data.build(0, **SMALL)["train"]
    for image, mask in zip(split.images, split.masks, strict=True):
        colour = image[:, mask[0] == 1][:, :1, None]
        torch.testing.assert_close(image, 0.5 * (1 - mask) + colour * mask)


def test_values_lie_between_0_and_1_and_every_digit_covers_some_of_the_image(splits):
    for split in splits.values():
        assert 0 <= split.images.min() and split.images.max() <= 1 and 0 <= split.masks.min() and split.masks.max() <= 1
        share = (split.masks > 0.5).float().mean((1, 2, 3))
        assert 0.02 < share.min() and share.max() < 0.25


def test_strokes_stand_out_against_their_background(monkeypatch):
    monkeypatch.setattr(data, "picture", lambda name: torch.full((240, 240, 3), 0.5).numpy())
    split = data.build(0, **SMALL)["train"]
    for image, mask in zip(split.images, split.masks, strict=True):
        luminance = image[:, mask[0] == 1].T @ torch.tensor(data.LUMINANCE)
        assert (luminance - 0.5).abs().min() > data.LEAST_CONTRAST - 1e-5


def test_backgrounds_agree_in_95_percent_of_training_and_by_chance_in_the_uncorrelated_test():
    splits = data.build(0)

    def agreement(name):
        return (splits[name].backgrounds == splits[name].labels).double().mean().item()

    assert agreement("train") == pytest.approx(0.95, abs=1e-9)
    assert agreement("test_matched") == pytest.approx(0.95, abs=1e-9)
    assert agreement("test_uncorrelated") == pytest.approx(0.1, abs=0.05)
    assert set(splits["train"].backgrounds.tolist()) == set(range(10))


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    data.picture.cache_clear()
    assert all(data.picture(name).shape[2] == 3 for name in data.BACKGROUNDS)


@pytest.mark.parametrize("counts", [(1500, 200, 200), (0, 10, 10)])
def test_more_digits_than_there_are_and_empty_parts_are_refused(counts):
    with pytest.raises(ValueError, match="every part needs a digit and all together at most 1797"):
        data.build(0, *counts)
