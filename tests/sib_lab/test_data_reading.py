"""Photographs and masks of every kind that people have: read rightly, or refused with one sentence."""

import numpy as np
import pytest
import torch
from data_samples import save
from PIL import ExifTags, Image, features
from sib_lab.data import DataError
from sib_lab.data import images as images_module
from sib_lab.data.files import Sample, problem, read_layers
from sib_lab.data.images import read_image, read_size
from sib_lab.data.masks import mask_values, read_mask

RAMP = np.tile(np.arange(0, 256, 5, dtype=np.uint8), (8, 1))
OBJECT = np.zeros((6, 8), np.uint8)
OBJECT[2:5, 3:7] = 1


def stored(path, values, mode=None, **options):
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


# ------------------------------------------------------------------------------------------------ photographs


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_by_their_range(tmp_path, suffix):
    path = stored(tmp_path / f"deep.{suffix}", RAMP.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(path), np.dstack([RAMP] * 3))


@pytest.mark.parametrize("scale", [1, 1 / 255])
def test_floats_in_a_known_range_are_read(tmp_path, scale):
    path = stored(tmp_path / "floats.tif", RAMP.astype(np.float32) * scale)
    np.testing.assert_array_equal(read_image(path), np.dstack([RAMP] * 3))


@pytest.mark.parametrize("values", [RAMP * 40.0, RAMP - 1.0, RAMP * np.nan])
def test_numbers_of_unknown_range_are_refused(tmp_path, values):
    with pytest.raises(DataError, match=r"floats.tif holds numbers from .* not known .*: scale them to 0..1 or 0..255"):
        read_image(stored(tmp_path / "floats.tif", values.astype(np.float32)))
    with pytest.raises(DataError, match="integers.tif holds numbers from 0 to 70000"):
        read_image(stored(tmp_path / "integers.tif", np.array([[0, 70000]], np.int32)))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "gif"])
def test_what_is_transparent_is_white(tmp_path, kind):
    colours = np.full((6, 8, 3), 90, np.uint8)
    path = tmp_path / f"clear.{'gif' if kind == 'gif' else 'png'}"
    if kind in ("palette", "gif"):
        image = Image.fromarray(OBJECT).convert("P")
        image.putpalette([1, 2, 3, 90, 90, 90])
        image.save(path, transparency=0)
    else:
        image = Image.fromarray(np.dstack([colours, OBJECT * 255]))
        image.convert(kind).save(path)
    np.testing.assert_array_equal(read_image(path), np.where(OBJECT[..., None], 90, 255).repeat(3, 2))


def test_half_transparent_is_mixed_with_white(tmp_path):
    assert read_image(save(tmp_path / "a.png", np.full((2, 2, 4), [0, 0, 0, 51], np.uint8)))[0, 0].tolist() == [204] * 3


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (50, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "moving.gif") == 50).all()


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow with AVIF")
def test_avif_is_read_where_pillow_can(tmp_path):
    assert ".avif" in images_module.SUFFIXES
    path = stored(tmp_path / "a.avif", np.full((16, 16, 3), 120, np.uint8))
    assert abs(read_image(path).astype(int) - 120).max() < 5


@pytest.mark.skipif(bool(images_module.HEIF), reason="HEIC is read here")
def test_heic_under_any_name_says_what_to_install(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(80))
    with pytest.raises(DataError, match=r"a.jpg cannot be read as an image: it holds HEIC \(pip install pillow-heif\)"):
        read_image(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"b.jpg cannot be read as an image\."):
        read_image(tmp_path / "b.jpg")


@pytest.mark.skipif(not images_module.HEIF, reason="needs pillow-heif")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_read_upright_and_its_transparency_is_white(tmp_path, orientation):
    upright = np.full((48, 64, 4), [200, 40, 40, 255], np.uint8)
    upright[:16, :24] = [0, 0, 0, 0]
    undone = {6: 8, 8: 6}.get(orientation, orientation)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    images_module.turned(Image.fromarray(upright), undone).save(tmp_path / "a.heic", exif=exif.tobytes())
    read = read_image(tmp_path / "a.heic", upright=True).astype(int)
    assert read.shape == (48, 64, 3) and read_size(tmp_path / "a.heic", upright=True) == (64, 48)
    assert (read[:12, :20] > 240).all() and abs(read[20:, 30:] - [200, 40, 40]).max() < 20


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_large_images_are_read_smaller_with_their_mask_and_boxes(tmp_path, monkeypatch, suffix):
    inside = np.zeros((401, 403), bool)
    inside[100:200, 40:120] = True
    image = stored(tmp_path / f"i.{suffix}", np.where(inside[..., None], 255, [0, 0, 128]).astype(np.uint8))
    mask = stored(tmp_path / "m.png", inside)
    monkeypatch.setattr(images_module, "LARGE", 12_000)
    monkeypatch.setattr(images_module.Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow refuses twice as many
    for sample in (Sample(image, 0, mask), Sample(image, 0, boxes=((40, 100, 120, 200),))):
        assert problem(sample, "header") is None
        layers = read_layers(sample)
        assert layers.shape == (4, 101, 101)
        assert (layers[3].bool() == (layers[0] > 100)).float().mean() > 0.99
    assert images_module.Image.MAX_IMAGE_PIXELS == 10_000
    monkeypatch.setattr(images_module, "LARGEST", 100_000)
    with pytest.raises(DataError, match="has 403 x 401 px, more than .* that are read: make it smaller"):
        read_image(image)


@pytest.mark.slow
def test_14000_px_a_side_are_read(tmp_path):
    Image.new("L", (14_000, 14_000), 77).save(tmp_path / "huge.png")
    read = read_image(tmp_path / "huge.png")
    assert read.shape == (3500, 3500, 3) and (read == 77).all()


# ----------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    "values",
    [
        OBJECT.astype(bool),
        OBJECT,
        OBJECT * 2,
        OBJECT * 15,
        OBJECT * 128,
        OBJECT * 255,
        OBJECT.astype(np.uint16) * 1000,
        OBJECT.astype(np.uint16) * 65535,
        OBJECT.astype(np.int32) * 3,
        OBJECT.astype(np.float32),
        OBJECT.astype(np.float32) * 255,
        np.dstack([OBJECT * 255] * 3),
        np.dstack([OBJECT * 128, OBJECT * 0, OBJECT * 0]),
    ],
    ids=lambda values: f"{values.dtype}-{values.max()}-{values.ndim}",
)
def test_nothing_and_one_other_value_are_an_object(tmp_path, values):
    path = stored(tmp_path / "m.tif", values)
    np.testing.assert_array_equal(read_mask(path), OBJECT * 255)
    np.testing.assert_array_equal(read_mask(path, "nonzero"), OBJECT * 255)
    np.testing.assert_array_equal(read_mask(path, invert=True), 255 - OBJECT * 255)


SOFT = np.array([[0, 128, 255, 0], [0, 255, 255, 0]], np.uint8)


@pytest.mark.parametrize(
    "values", [SOFT, np.arange(256, dtype=np.uint8)[None], np.array([[0, 51, 102, 153, 204, 255]], np.uint8)]
)
def test_opacities_stay(tmp_path, values):
    np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", values)), values)
    np.testing.assert_array_equal(read_mask(stored(tmp_path / "d.png", values.astype(np.uint16) * 257)), values)
    np.testing.assert_array_equal(read_mask(stored(tmp_path / "f.tif", values.astype(np.float32) / 255)), values)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "c.png", np.dstack([values] * 3))), values)


def test_softened_edges_and_noise_of_jpeg_stay(tmp_path):
    big = Image.fromarray(OBJECT * 255).resize((80, 60), Image.Resampling.BICUBIC)
    big.save(tmp_path / "edges.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "edges.png"), np.asarray(big))
    hard = np.kron(OBJECT, np.ones((10, 10), np.uint8))
    for name, values in (("grey", hard * 255), ("red", np.dstack([hard * 255, hard * 0, hard * 0]))):
        mask = read_mask(stored(tmp_path / f"{name}.jpg", values, quality=80))
        assert ((mask > 127) == (hard > 0)).all()


LABELS = OBJECT.copy()
LABELS[0] = 3
VOID = OBJECT * 15
VOID[1] = 255


@pytest.mark.parametrize("values", [LABELS, VOID, LABELS.astype(np.int32), OBJECT + 1, LABELS * 60, RAMP // 5])
def test_several_values_that_may_be_labels_are_refused_with_what_to_do(tmp_path, values):
    with pytest.raises(DataError, match=r"m.tif holds the values \d+, \d.* not certain .* mask_values=1,3") as caught:
        read_mask(stored(tmp_path / "m.tif", values))
    assert "\n" not in str(caught.value)


def labelled(path, **options):
    """A palette image with the index 0, black, 1, red, and 3, green."""
    image = Image.fromarray(LABELS).convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255, 0, 255, 0])
    image.save(path, **options)
    return path


def test_coloured_labels_are_refused_and_can_be_named(tmp_path):
    palette = labelled(tmp_path / "palette.png")
    colours = stored(tmp_path / "rgb.png", np.asarray(Image.open(palette).convert("RGB")))
    for path in (palette, colours):
        with pytest.raises(DataError, match="holds the colours #000000, #00ff00, #ff0000, .* mask_values=#ff0000"):
            read_mask(path)
        np.testing.assert_array_equal(read_mask(path, mask_values("nonzero")), (LABELS > 0) * 255)
        np.testing.assert_array_equal(read_mask(path, mask_values("#ff0000")), (LABELS == 1) * 255)
    np.testing.assert_array_equal(read_mask(palette, mask_values("1,3")), (LABELS > 0) * 255)
    np.testing.assert_array_equal(read_mask(palette, mask_values("3")), (LABELS == 3) * 255)
    with pytest.raises(DataError, match="holds colours, but mask_values names numbers"):
        read_mask(colours, mask_values("1,3"))


def test_labels_can_be_named(tmp_path):
    path = save(tmp_path / "m.png", VOID)
    np.testing.assert_array_equal(read_mask(path, mask_values("15")), (VOID == 15) * 255)
    np.testing.assert_array_equal(read_mask(path, mask_values("15, 255")), (VOID > 0) * 255)
    np.testing.assert_array_equal(read_mask(path, mask_values("grey")), VOID)


@pytest.mark.parametrize("text", ["", "red", "1;3", "#ff", "nonzero,1", "1.5"])
def test_other_words_for_values_are_refused(text):
    with pytest.raises(DataError, match="mask_values must be nonzero, grey, alpha, or a list of values or colours"):
        mask_values(text)


def test_indices_of_a_palette_that_shows_nothing_are_values(tmp_path):
    image = Image.fromarray(OBJECT * 4).convert("P")
    image.putpalette([0, 0, 0] * 256)
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), OBJECT * 255)


def test_black_is_the_background_of_two_colours_whatever_their_indices(tmp_path):
    image = Image.fromarray(1 - OBJECT).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), OBJECT * 255)


def test_alpha_that_varies_is_the_mask(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    for name, shown in (("cut-out", colours), ("one colour", colours * 0), ("white", colours * 0 + 255)):
        path = save(tmp_path / f"{name}.png", np.dstack([shown, OBJECT * 255]))
        np.testing.assert_array_equal(read_mask(path), OBJECT * 255)
    Image.fromarray(np.dstack([colours, OBJECT * 255])).convert("LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "la.png"), OBJECT * 255)


def test_alpha_that_is_the_same_everywhere_says_nothing(tmp_path):
    for alpha in (255, 200):
        path = save(tmp_path / "m.png", np.dstack([OBJECT * 255] * 3 + [OBJECT * 0 + alpha]))
        np.testing.assert_array_equal(read_mask(path), OBJECT * 255)


def test_two_masks_in_one_file_are_refused_and_can_be_told_apart(tmp_path):
    opaque = np.full_like(OBJECT, 255)
    opaque[0, 0] = 0
    path = save(tmp_path / "m.png", np.dstack([OBJECT * 255] * 3 + [opaque]))
    with pytest.raises(DataError, match="mask in black and white and another one as its transparency"):
        read_mask(path)
    np.testing.assert_array_equal(read_mask(path, mask_values("grey")), OBJECT * 255)
    np.testing.assert_array_equal(read_mask(path, mask_values("alpha")), opaque)
    with pytest.raises(DataError, match="no alpha channel, which mask_values=alpha asks for"):
        read_mask(save(tmp_path / "grey.png", OBJECT), mask_values("alpha"))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_a_mask_as_the_photograph_is_stored_turns_with_it(tmp_path, orientation, suffix):
    inside = np.zeros((48, 64), np.uint8)
    inside[8:24, 16:56] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = tmp_path / f"i.{suffix}"
    Image.fromarray(np.dstack([inside] * 3)).save(image, exif=exif)
    mask = save(tmp_path / "m.png", inside)
    sample = Sample(image, 0, mask, upright=True)
    assert read_size(image, upright=True) == (48, 64) and problem(sample, "header") is None
    layers = read_layers(sample)
    assert ((layers[0] > 127) == (layers[3] > 127)).all()
    seen = save(tmp_path / "seen.png", layers[3].numpy())
    assert torch.equal(read_layers(Sample(image, 0, seen, upright=True))[3], layers[3])


def test_a_mask_of_turned_size_beside_an_image_that_is_not_turned_is_refused(tmp_path):
    sample = Sample(save(tmp_path / "i.png", OBJECT), 0, save(tmp_path / "m.png", OBJECT.T.copy()), upright=True)
    assert "m.png is 6 x 8 px, but its image" in problem(sample, "header")
    with pytest.raises(DataError, match="is 6 x 8 px, but its image"):
        read_layers(sample)


@pytest.mark.parametrize("box", [(-9, 0, 30, 20), (0, 0, 120, 90)])
def test_a_box_that_reaches_far_out_of_its_image_is_refused(tmp_path, box):
    image = save(tmp_path / "i.png", np.zeros((40, 60), np.uint8))
    assert "reaches out of the image of 60 x 40 px: give x1, y1, x2, y2" in problem(
        Sample(image, 0, boxes=(box,)), "header"
    )
    assert problem(Sample(image, 0, boxes=((-1, 0, 60.3, 41),)), "header") is None
