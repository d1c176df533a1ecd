"""Real handwritten digits on real backgrounds, with exact masks and a background that gives the label away.

scikit-learn's 1,797 digits (8 x 8 px) are enlarged, coloured and pasted at random places on crops of ten pictures that
ship inside scikit-image. Each label has a picture of its own: where the background *agrees*, the digit stands on it.
Nothing is downloaded, and one seed gives one data set, bit for bit.

Nothing is shared between training, validation and test: the digits are split, and so is every picture, into blocks
of 48 px that belong to one part each (see :func:`picture_part`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from .base import ArrayItems, Common, DataSets, Transform, check_classes, gentle_transforms, limited, normalise, visible
from .errors import DataError

SIZE = 40  #: side of an image, px
BLOCK = 48  #: side of a block of a picture, px; a crop never leaves its block
DIGIT_SIZES = (20, 25)  #: side of an enlarged digit, px, upper end excluded
LEAST_CONTRAST = 0.35  #: between the luminance of a stroke and the mean luminance of the background under it
AGREEMENT = 0.95  #: share of training images whose background agrees with the label

#: The background of label 0, 1, ..., 9: functions of skimage.data whose picture is part of the scikit-image wheel.
BACKGROUNDS = (
    "brick",
    "grass",
    "gravel",
    "coins",
    "page",
    "hubble_deep_field",
    "immunohistochemistry",
    "chelsea",
    "coffee",
    "rocket",
)
FLIPPED = "flipped"  #: instead of an agreement: the background is always that of the next label
PARTS = ("train", "validation", "test")
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Split:
    """N composites; row i of every field belongs to the same image."""

    images: Tensor  #: [N,3,40,40] float32 in [0,1]
    masks: Tensor  #: [N,1,40,40] float32 in [0,1]: the opacity of the stroke, so 0 off the digit
    labels: Tensor  #: [N] int64 in 0..9
    backgrounds: Tensor  #: [N] int64, index into BACKGROUNDS; equals the label where the background agrees
    digits: Tensor  #: [N] int64, index into scikit-learn's digits

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> Tensor:
        """What the network sees, [N,3,40,40] in [-1,1]."""
        return normalise(self.images)


def open_set(
    root: Path | None,
    common: Common,
    *,
    train: int = 1200,
    validation: int = 197,
    test: int = 400,
    copies: int = 4,
) -> DataSets:
    """The digits as DataSets; see :func:`sib_lab.data.open_data` and :func:`build`. ``root`` is not looked at."""
    try:
        splits = build(common.seed, train, validation, test, copies, common.agreement)
    except ValueError as error:
        raise DataError(f"digits: {error}.") from error
    transforms = dict(zip(("train", "test"), gentle_transforms(common, flip=False), strict=True))
    training = _items(splits["train"], common, transforms["train"], common.annotated)
    check_classes("0123456789", training.labels, "digits")
    return DataSets(
        "digits",
        tuple("0123456789"),
        common.size,
        training,
        {
            kind: _items(splits[f"validation_{kind}"], common, transforms["test"])
            for kind in ("matched", "uncorrelated")
        },
        {
            kind: _items(splits[f"test_{kind}"], common, transforms["test"])
            for kind in ("uncorrelated", "matched", "flipped")
        },
        groups=BACKGROUNDS,
    )


def _items(split: Split, common: Common, transform: Transform, annotated: float = 1.0) -> ArrayItems:
    """A split at the wanted size, with all its masks or a share of them."""
    rows = torch.tensor(limited(split.labels.tolist(), common.limit, common.seed))
    layers = torch.cat([split.images[rows], split.masks[rows]], 1)
    if common.size != SIZE:
        layers = F.interpolate(layers, (common.size, common.size), mode="bilinear", antialias=True).clamp(0, 1)
    seen = visible(torch.ones(len(rows), dtype=torch.bool), annotated, common.seed)
    return ArrayItems(layers, split.labels[rows], transform, seen, split.backgrounds[rows])


def build(
    seed: int,
    train: int = 1200,
    validation: int = 197,
    test: int = 400,
    copies: int = 2,
    agreement: float = AGREEMENT,
) -> dict[str, Split]:
    """All splits, from one seed.

    Args:
        seed: any int >= 0.
        train, validation, test: how many different digits each part gets; at most 1797 together.
        copies: how many times each training digit is pasted, each time elsewhere, on another crop, in another colour.
        agreement: share of training images, and of the matched ones, whose background agrees with the label.

    Returns:
        ``train``; and ``validation`` and ``test``, each as ``*_matched`` (the background agrees with the label as often
        as in training) and ``*_uncorrelated`` (the background is drawn independently of the label); and
        ``test_flipped``, where the background of label k is always that of label k + 1 (of 9: 0).

    Raises:
        ValueError: more digits wanted than there are.
    """
    alphas, labels = _digits()
    counts = (train, validation, test)
    if min(counts) < 1 or sum(counts) > len(labels):
        raise ValueError(f"every part needs a digit and all together at most {len(labels)}, got {counts}")
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    digits = dict(zip(PARTS, np.split(order, np.cumsum(counts))[:3], strict=True))
    wanted: dict[str, tuple[str, np.ndarray, Any]] = {
        "train": ("train", np.tile(digits["train"], copies), agreement),
        "validation_matched": ("validation", digits["validation"], agreement),
        "validation_uncorrelated": ("validation", digits["validation"], None),
        "test_matched": ("test", digits["test"], agreement),
        "test_uncorrelated": ("test", digits["test"], None),
        "test_flipped": ("test", digits["test"], FLIPPED),
    }
    return {
        name: _compose(np.random.default_rng([seed, number]), part, indices, alphas, labels, agreement)
        for number, (name, (part, indices, agreement)) in enumerate(wanted.items(), start=1)
    }


def picture_part(row: int, column: int) -> str:
    """Which part a block of a picture belongs to: two of four diagonals train, one validation, one test."""
    return ("train", "train", "validation", "test")[(row + column) % 4]


def crop_corners(height: int, width: int, part: str) -> list[tuple[int, int]]:
    """The upper left corner (y, x) of every 48 px block of a picture that belongs to ``part``."""
    rows, columns = height // BLOCK, width // BLOCK
    return [(r * BLOCK, c * BLOCK) for r in range(rows) for c in range(columns) if picture_part(r, c) == part]


@cache
def picture(name: str) -> np.ndarray:
    """One of BACKGROUNDS, [H,W,3] float32 in [0,1]; grey pictures get three equal channels."""
    values = getattr(skimage.data, name)().astype(np.float32) / 255
    return np.repeat(values[..., None], 3, axis=2) if values.ndim == 2 else values[..., :3]


@cache
def _digits() -> tuple[Tensor, np.ndarray]:
    """Digits [1797,1,8,8] float32 in [0,1] and labels [1797]."""
    bunch = load_digits()
    return torch.from_numpy(bunch.images.astype(np.float32) / 16)[:, None], bunch.target


def stroke(digit: Tensor, size: int) -> np.ndarray:
    """An 8 x 8 digit [1,8,8] in [0,1] -> opacity [size,size] in [0,1]: enlarged bicubically, edges made crisp."""
    enlarged = F.interpolate(digit[None], size=(size, size), mode="bicubic", align_corners=False)[0, 0]
    return ((enlarged - 0.3) / 0.3).clamp(0, 1).numpy()


def _drawn_backgrounds(rng: np.random.Generator, labels: np.ndarray, agreement: float | str | None) -> np.ndarray:
    """Background of each image: the label's own in ``agreement`` of them and another one in the rest; None: any."""
    kinds = len(BACKGROUNDS)
    if agreement == FLIPPED:
        return (labels + 1) % kinds
    if agreement is None:
        return rng.integers(kinds, size=len(labels))
    shift = np.zeros(len(labels), dtype=np.int64)
    odd = rng.permutation(len(labels))[: round((1 - agreement) * len(labels))]  # type: ignore[operator]  # no word
    shift[odd] = rng.integers(1, kinds, size=len(odd))
    return (labels + shift) % kinds


def _compose(
    rng: np.random.Generator,
    part: str,
    digits: np.ndarray,
    alphas: Tensor,
    labels: np.ndarray,
    agreement: float | str | None,
) -> Split:
    backgrounds = _drawn_backgrounds(rng, labels[digits], agreement)
    pairs = [_paste(rng, _crop(rng, b, part), alphas[d]) for d, b in zip(digits, backgrounds, strict=True)]
    images, masks = (np.stack(stack) for stack in zip(*pairs, strict=True))
    return Split(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(masks)[:, None],
        torch.from_numpy(labels[digits].astype(np.int64)),
        torch.from_numpy(backgrounds.astype(np.int64)),
        torch.from_numpy(digits.astype(np.int64)),
    )


def _crop(rng: np.random.Generator, background: int, part: str) -> np.ndarray:
    """A crop [40,40,3] from a random place of a random block of ``part``."""
    whole = picture(BACKGROUNDS[background])
    corners = crop_corners(whole.shape[0], whole.shape[1], part)
    y, x = corners[rng.integers(len(corners))] + rng.integers(BLOCK - SIZE + 1, size=2)
    return whole[y : y + SIZE, x : x + SIZE]


def _paste(rng: np.random.Generator, crop: np.ndarray, digit: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The composite [40,40,3] and the opacity of its stroke [40,40]."""
    size = int(rng.integers(*DIGIT_SIZES))
    y, x = rng.integers(SIZE - size + 1, size=2)
    mask = np.zeros((SIZE, SIZE), dtype=np.float32)
    mask[y : y + size, x : x + size] = stroke(digit, size)
    under = float((crop * mask[..., None]).sum(axis=(0, 1)) @ LUMINANCE / mask.sum())
    opacity = mask[..., None]
    return crop * (1 - opacity) + next(_legible_colours(rng, under)) * opacity, mask


def _legible_colours(rng: np.random.Generator, under: float) -> Iterator[np.ndarray]:
    """Random colours [3] in [0,1] that stand out against a background of luminance ``under``."""
    while True:
        colour = rng.random(3, dtype=np.float32)
        if abs(float(colour @ LUMINANCE) - under) >= LEAST_CONTRAST:
            yield colour
