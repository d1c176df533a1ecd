"""What can be seen of a data set before a training: how many images and masks, how large the objects, what is wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .base import DataSets, ItemDataset
from .errors import DataError, some
from .files import FileItems, spread

LOOKED_AT = 60  #: annotated images of each split whose objects are measured
EMPTY = 0.002  #: share of an image that an object at least covers
FULL = 0.98  #: share that it at most covers
EDGE = 0.9  #: share of the outermost pixels that a background reaches at most if it is taken for the object
MOST = 0.5  #: share of masks that must look wrong before the whole set does
DARK = 0.03  #: mean brightness, of 1, below which an image is nearly black


@dataclass(frozen=True)
class SplitReport:
    """One split of a set."""

    count: int  #: images
    images: tuple[int, ...]  #: of each class, in which an image may be several times
    annotated: float  #: share in [0,1] of the images with a mask or box
    areas: tuple[float, ...]  #: share of the image that the object covers, of each image that was looked at
    edges: tuple[float, ...]  #: share of the outermost pixels that it covers
    brightness: tuple[float, ...]  #: mean of the image, in [0,1]


@dataclass(frozen=True)
class Report:
    """What :func:`check` found."""

    classes: tuple[str, ...]
    splits: dict[str, SplitReport]  #: by the names of ``DataSets.splits``
    skipped: tuple[str, ...]  #: what was left out and why
    problems: tuple[str, ...]  #: what cannot be right, one sentence each, the worst first

    def stop(self) -> None:
        """Does nothing where there is no problem.

        Raises:
            DataError: the first problem.
        """
        if self.problems:
            raise DataError(self.problems[0])


def check(data: DataSets, most: int = LOOKED_AT, least: int = 2) -> Report:
    """Counts images, and looks at ``most`` annotated images of each split, evenly spread; reads no others.

    Args:
        least: training images of a class; fewer are a problem.

    Raises:
        DataError: a file that cannot be read.
    """
    splits = {name: _look_at(split, len(data.classes), most) for name, split in data.splits().items()}
    return Report(data.classes, splits, data.skipped, tuple(_problems(data, splits, least)))


def _look_at(split: ItemDataset, classes: int, most: int) -> SplitReport:
    # Annotations that the training may not see are there all the same.
    of_files = [sample.annotated for sample in split.samples] if isinstance(split, FileItems) else None
    known = split.annotated.tolist() if of_files is None else of_files
    rows = [row for row, annotated in enumerate(known) if annotated] or list(range(len(split)))
    seen = [measured(split, rows[place], known[rows[place]]) for place in spread(len(rows), most)]
    return SplitReport(
        len(split),
        tuple(images_of_classes(split.labels, classes)),
        float(np.mean(known)),
        tuple(area for area, _, _ in seen if area is not None),
        tuple(edge for _, edge, _ in seen if edge is not None),
        tuple(brightness for _, _, brightness in seen),
    )


def images_of_classes(labels: Tensor, classes: int) -> list[int]:
    """How many images each class has, of labels [N], or [N,K] not 0 where there."""
    counts = torch.bincount(labels, minlength=classes) if labels.dim() == 1 else (labels != 0).sum(0)
    return counts.tolist()


def measured(split: ItemDataset, row: int, annotated: bool) -> tuple[float | None, float | None, float]:
    """Share of a whole image and of its outermost pixels that the object covers (None without one), and the image's
    mean brightness, in [0,1]."""
    layers = split.layers(row)
    scale = 1.0 if layers.is_floating_point() else 255.0
    brightness = float(layers[:3].float().mean()) / scale
    if not annotated or len(layers) == 3:
        return None, None, brightness
    mask = layers[3:].amax(0).float().numpy() / scale
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return float(mask.mean()), float(edge.mean()), brightness


def _problems(data: DataSets, splits: dict[str, SplitReport], least: int) -> list[str]:
    if data.multilabel:  # of each label; together they may well fill a picture
        splits = {name: replace(split, areas=(), edges=()) for name, split in splits.items()}
    areas, edges = (np.array([v for s in splits.values() for v in getattr(s, name)]) for name in ("areas", "edges"))
    brightness = np.array([value for split in splits.values() for value in split.brightness])
    found = []
    if _mostly(areas < EMPTY):
        found.append(
            f"{_of(areas < EMPTY)} masks that were looked at mark nearly nothing (less than {EMPTY:.1%} of the image): "
            "look at the masks, and say what marks the object with the option mask_values."
        )
    if _mostly(areas > FULL):
        found.append(
            f"{_of(areas > FULL)} masks that were looked at mark nearly the whole image: look at the masks, and say "
            "what marks the object with the option mask_values, or that it is the background with invert_masks=true."
        )
    elif _mostly((edges > EDGE) & (areas > MOST)):
        found.append(
            f"{_of((edges > EDGE) & (areas > MOST))} masks that were looked at cover the edge of the image and most of "
            "it, as masks of the background do: turn them round with the option invert_masks=true."
        )
    if _mostly(brightness < DARK):
        found.append(
            f"{_of(brightness < DARK)} images that were looked at are nearly black: 16-bit images are read by their "
            "whole range, so scale them to it (or save them with 8 bits)."
        )
    train = splits["train"].images
    if few := [name for name, count in zip(data.classes, train, strict=True) if count < least]:
        count = "no training image" if least == 1 else f"fewer than {least} training images"
        found.append(
            f"{len(few)} of {len(data.classes)} classes have {count} ({some(few)}): add images, remove the class "
            "everywhere, or raise the limit if one was set."
        )
    return found


def _mostly(wrong: Sequence[bool] | np.ndarray) -> bool:
    return len(wrong) > 0 and float(np.mean(wrong)) > MOST


def _of(wrong: np.ndarray) -> str:
    return f"{int(wrong.sum())} of the {len(wrong)}"
