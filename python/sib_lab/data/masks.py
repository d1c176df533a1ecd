"""Mask files as opacities of the object: what is certain is read, what is not is refused with what to do."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from .errors import DataError, some
from .images import File, eight_bits, has_alpha, is_deep, loaded, opened, reduction

WORDS = ("nonzero", "grey", "alpha")
FEW, MANY = 8, 64  #: up to so many values are levels or labels, from so many on shades
LEAST_STEP = 32  #: of 255, between the levels of a soft mask that has few of them


def mask_values(text: str) -> str | tuple[int, ...]:
    """What marks the object: one of ``WORDS``, or the values (of a palette: indices) and colours of a list such as
    "1,3" or "#ff0000"; colours become 0xrrggbb + 2**24.

    Raises:
        DataError: anything else.
    """
    if text in WORDS:
        return text
    try:
        return tuple(_value(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise DataError(
            f"mask_values must be {', '.join(WORDS)}, or a list of values or colours such as 1,3 or #ff0000, "
            f"got {text!r}."
        ) from error


def _value(text: str) -> int:
    return 2**24 + int(text[1:], 16) if text.startswith("#") and len(text) == 7 else int(text)


def read_mask(path: File, values: str | tuple[int, ...] | None = None, invert: bool = False) -> np.ndarray:
    """Mask [H,W] uint8, 255 on the object; of more than ``LARGE`` pixels as much smaller as its image.

    Without ``values`` these are read: 1 bit; 0 and one other value; grey values that are opacities (a JPEG, many
    shades, or few levels far apart, up to white); black and shades of one colour; and an alpha channel that is not the
    same everywhere, which then is the mask.

    Args:
        values: of :func:`mask_values`; "nonzero": all but 0 or black, "grey": opacities, "alpha": the alpha channel.
        invert: the object is what is not marked.

    Raises:
        DataError: the file is missing or cannot be read as an image, or it is not certain what marks the object.
    """
    with opened(path) as image:
        loaded(image, path)
        mask = _guessed(image, path) if values is None else _named(image, path, values)
    if invert:
        mask = 255 - mask
    times = reduction(mask.shape)
    return mask if times == 1 else np.asarray(Image.fromarray(mask).reduce(times))


def read_grey_mask(path: File) -> np.ndarray:
    """Mask [H,W] uint8 whose grey values are opacities, as CUB's segmentations are.

    Raises:
        DataError: the file is missing or cannot be read as an image.
    """
    return read_mask(path, "grey")


def read_trimap(path: File) -> np.ndarray:
    """Oxford-IIIT Pet's trimap -> mask [H,W] uint8: 255 on the animal (1) and on its unclassified outline (3), 0 on the
    background (2).

    Raises:
        DataError: the file is missing or cannot be read as an image.
    """
    with opened(path) as image:
        return np.where(np.asarray(loaded(image, path)) == 2, 0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------- by itself


def _guessed(image: Image.Image, path: File) -> np.ndarray:
    lossy = image.format in ("JPEG", "MPO")
    if has_alpha(image):
        alpha = _alpha(image)
        if alpha.min() < alpha.max():
            return _of_alpha(image, alpha, path)
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8) * 255
    if is_deep(image):
        return _of_numbers(image, path)
    if image.mode in ("L", "LA", "La") or (image.mode == "P" and _is_grey(image)):
        return _of_levels(np.asarray(image.convert("L")), lossy, path)
    if image.mode == "P" and _repeats_a_colour(image):
        return _of_levels(np.asarray(image), lossy, path)
    return _of_colours(np.asarray(image.convert("RGB")), lossy, path)


def _alpha(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGBA").getchannel("A"))


def _of_alpha(image: Image.Image, alpha: np.ndarray, path: File) -> np.ndarray:
    """The alpha channel, unless what it shows is black and white and so a mask, too."""
    visible = np.asarray(image.convert("RGB"))[alpha > 127]
    if visible.size and set(np.unique(visible)) == {0, 255} and (visible == visible[:, :1]).all():
        raise DataError(
            f"{path} holds a mask in black and white and another one as its transparency: name one with the option "
            "mask_values=grey or mask_values=alpha, or save it without transparency."
        )
    return alpha


def _is_grey(image: Image.Image) -> bool:
    """Whether every colour of a palette is grey, so that the palette only packs a greyscale image."""
    palette = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all()) and not _repeats_a_colour(image)


def _repeats_a_colour(image: Image.Image) -> bool:
    """Whether two values of a palette image look the same, so that its colours mean nothing."""
    used = np.flatnonzero(np.asarray(image.histogram()))
    palette = np.zeros((256, 3), np.uint8)
    given = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    palette[: len(given)] = given
    return len(np.unique(palette[used], axis=0)) < len(used)


def _of_numbers(image: Image.Image, path: File) -> np.ndarray:
    """A mask from one channel of more than 8 bits."""
    values = np.asarray(image)
    if image.mode == "F":
        if values.max() <= 1:
            return eight_bits(image, path)
        if (values != values.round()).any():
            return _of_levels(eight_bits(image, path), False, path)
    if values.min() < 0 or values.max() > 65535:
        raise _unclear(path, "values", np.unique(values))
    return _of_levels(values.astype(np.uint16), False, path)


def _of_levels(values: np.ndarray, lossy: bool, path: File, few: bool = True) -> np.ndarray:
    """A mask from grey values [H,W] uint8 or uint16; ``few``: whether few levels may be those of a soft mask."""
    counts = np.bincount(values.ravel())
    levels = np.flatnonzero(counts)
    if len(levels) == 1 or (len(levels) == 2 and levels[0] == 0):
        return np.where(values > 0, 255, 0).astype(np.uint8)
    scale = 255 / (255 if levels[-1] <= 255 else 65535)
    if not _are_shades(levels * scale, counts[levels], lossy, few):
        raise _unclear(path, "values", levels)
    return (values * scale).round().astype(np.uint8)


def _are_shades(levels: np.ndarray, counts: np.ndarray, lossy: bool, few: bool) -> bool:
    """Whether grey levels (of 255, rising) with their numbers of pixels are opacities rather than labels."""
    highest = levels[-1]
    if lossy or len(levels) >= MANY:  # a lossy file can hold no labels
        return bool(highest >= 128)
    if len(levels) <= FEW:
        return few and levels[0] == 0 and highest >= 250 and np.diff(levels).min() >= LEAST_STEP
    # Softened edges around an object that is white for the most part.
    return levels[0] == 0 and highest >= 250 and 2 * counts[levels >= 247].sum() >= counts[levels > 8].sum()


def _of_colours(rgb: np.ndarray, lossy: bool, path: File) -> np.ndarray:
    """A mask from black and shades of one colour."""
    highest = rgb.max(2)
    colour = rgb.reshape(-1, 3)[highest.argmax()].astype(np.float32)
    if not colour.any():
        return highest
    shade = highest.astype(np.float32) / colour.max()
    if all((abs(shade * colour[i] - rgb[..., i]) <= (64 if lossy else 2)).all() for i in range(3)):
        is_grey = colour.min() == colour.max()
        return _of_levels((shade * 255).round().astype(np.uint8), lossy, path, few=bool(is_grey))
    packed = rgb.astype(np.uint32) @ np.array([2**16, 2**8, 1], np.uint32)
    raise _unclear(path, "colours", [f"#{value:06x}" for value in np.unique(packed)])


def _unclear(path: File, what: str, found: Iterable) -> DataError:
    example = "#ff0000" if what == "colours" else "1,3"
    return DataError(
        f"{path} holds the {what} {some([f'{value}' for value in found], 6)}, and it is not certain which mark the "
        "object: save masks in black and white with the object white, or (for the set folder) say it with the option "
        f"mask_values={example}, mask_values=nonzero, or mask_values=grey for opacities."
    )


# ---------------------------------------------------------------------------------------------- as was said


def _named(image: Image.Image, path: File, values: str | tuple[int, ...]) -> np.ndarray:
    """The mask that ``values`` name."""
    if values == "alpha":
        if not has_alpha(image):
            raise DataError(f"{path} has no alpha channel, which mask_values=alpha asks for.")
        return _alpha(image)
    if values == "grey":
        grey = eight_bits(image, path) if is_deep(image) else np.asarray(image.convert("L"))
        return grey if grey.max(initial=0) > 1 else grey * 255
    if values == "nonzero":
        return _whole((_shown(image).max(2) if _is_coloured(image) else np.asarray(image)) != 0)
    colours = [value for value in values if value >= 2**24]  # type: ignore[operator]  # no word any more
    mask = np.zeros(image.size[::-1], bool)
    if colours:
        packed = np.asarray(image.convert("RGB")).astype(np.uint32) @ np.array([2**16, 2**8, 1], np.uint32)
        mask |= np.isin(packed + 2**24, colours)
    if len(colours) < len(values):
        numbers = _shown(image) if _is_coloured(image) else np.asarray(image)[..., None]
        if (numbers != numbers[..., :1]).any():
            raise DataError(f"{path} holds colours, but mask_values names numbers: name colours, such as #ff0000.")
        mask |= np.isin(numbers[..., 0], values)
    return _whole(mask)


def _is_coloured(image: Image.Image) -> bool:
    return not is_deep(image) and image.mode not in ("1", "L", "P")


def _shown(image: Image.Image) -> np.ndarray:
    """RGB [H,W,3] uint8, black where it is transparent."""
    rgb = np.asarray(image.convert("RGB"))
    return np.where(_alpha(image)[..., None] > 0, rgb, 0) if has_alpha(image) else rgb


def _whole(inside: np.ndarray) -> np.ndarray:
    return inside.astype(np.uint8) * 255
