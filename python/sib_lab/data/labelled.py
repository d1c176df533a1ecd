"""Photographs with several labels each: what is known of every label's objects, and (image, label) pairs to explain."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .base import (
    Common,
    DataSets,
    Item,
    ItemDataset,
    Transform,
    as_float,
    check_classes,
    drawn,
    limited,
    normalise,
    visible,
)
from .errors import DataError
from .files import MANY, THREADS, Box, Sample, check_boxes, check_size, name_of, rasterise, usable
from .identity import Split, digest, file_digest
from .images import opened, read_size, read_smaller, reduction

UNDECIDED = 255  #: in a label map: an object's outline, and what nobody named
PRESENT, ABSENT, DIFFICULT = 1, 0, -1  #: of labels: DIFFICULT where every object of the label is


class Object(NamedTuple):
    """One of a photograph's."""

    label: int
    box: Box
    difficult: bool = False  #: so small, dark or hidden that nothing is measured on it


@dataclass(frozen=True, slots=True)
class Photograph:
    """One image file with its labels and at most one kind of annotation, of which a label map comes first."""

    image: Path
    labels: tuple[int, ...]  #: what is there, rising
    objects: tuple[Object, ...] = ()
    label_map: Path | None = None
    values: tuple[int, ...] = ()  #: of the labels in the label map, which has 0 on the background, and UNDECIDED

    @property
    def annotated(self) -> bool:
        return self.label_map is not None or bool(self.objects)

    def knows(self, label: int) -> bool:
        """Whether something can be measured on a label's objects."""
        return self.label_map is not None or any(o.label == label and _sure(o) for o in self.objects)

    @property
    def difficult(self) -> frozenset[int]:
        """The labels whose objects are all difficult."""
        return frozenset(self.labels) & ({o.label for o in self.objects} - {o.label for o in self.objects if _sure(o)})

    @property
    def sample(self) -> Sample:
        """What is checked of it."""
        return Sample(self.image, 0, self.label_map, tuple(o.box for o in self.objects))


def _sure(of: Object) -> bool:
    return not of.difficult


def read_label_map(path: Path) -> np.ndarray:
    """[H,W] uint8, a value a class; of more than ``LARGE`` pixels as much smaller as its image.

    Raises:
        DataError: the file is missing, cannot be read, or has no palette or single channel.
    """
    with opened(path) as image:
        if image.mode not in ("P", "L"):
            raise DataError(f"{path} is no label map: it must be a PNG of one channel or with a palette.")
        values = np.asarray(image)
    times = reduction(values.shape)
    return values if times == 1 else values[times // 2 :: times, times // 2 :: times]


class Layers(NamedTuple):
    """A photograph as it is stored, uint8."""

    image: Tensor  #: [3,H,W]
    sure: Tensor  #: [P,H,W], 255 on the objects of each label that is there, but the difficult ones
    unsure: Tensor  #: [P,H,W], 255 on the difficult ones


def read_photograph(photograph: Photograph) -> Layers:
    """
    Raises:
        DataError: a file is missing or broken, or a label map has another size than its image.
    """
    image, times = read_smaller(photograph.image)
    height, width, _ = image.shape
    areas = np.zeros((2, len(photograph.labels), height, width), np.uint8)
    if photograph.label_map is not None:
        values = read_label_map(photograph.label_map)
        if times > 1:
            values = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))
        check_size(photograph.sample, (width, height), values.shape[::-1])
        areas[0] = np.stack([values == of_label for of_label in photograph.values]) * 255
        areas[1] = (values == UNDECIDED) * 255
    elif photograph.objects:
        size = (width, height) if times == 1 else read_size(photograph.image)
        check_boxes(photograph.sample, photograph.sample.boxes, *size)
        for difficult in (False, True):
            for place, label in enumerate(photograph.labels):
                boxes = [o.box for o in photograph.objects if o.label == label and o.difficult == difficult]
                if boxes:
                    shrunk = [tuple(side / times for side in box) for box in boxes]
                    areas[int(difficult), place] = rasterise(shrunk, width, height)
    return Layers(torch.from_numpy(image.transpose(2, 0, 1).copy()), *map(torch.from_numpy, areas))


class Photographs(ItemDataset):
    """Photographs read from their files when they are asked for. An item's ``label`` is [K] float32, 1 on what is
    there; its ``mask`` [K,size,size], of each label the union of its objects; its ``annotated`` [K] bool.

    A label whose objects are not in view (a crop left them out) counts as not annotated.

    Attributes:
        labels: [N,K] int64: PRESENT, ABSENT, DIFFICULT.

    Args:
        classes: K.
        listed: the photographs with those that were left out as broken, for the identity.
        root: what names of files are relative to.
    """

    def __init__(
        self,
        samples: list[Photograph],
        classes: int,
        transform: Transform,
        annotated: Sequence[bool] | Tensor,
        listed: Sequence[Photograph] = (),
        root: Path = Path(),
    ):
        labels = torch.full((len(samples), classes), ABSENT)
        for row, photograph in enumerate(samples):
            for label in photograph.labels:
                labels[row, label] = DIFFICULT if label in photograph.difficult else PRESENT
        super().__init__(labels, transform, annotated)
        self.samples = samples
        self.listed = listed
        self.root = root

    def of(self, samples: list[Photograph], transform: Transform, annotated: Sequence[bool] | Tensor) -> "Photographs":
        """The same kind of set of other photographs, all of them listed."""
        return Photographs(samples, self.labels.shape[1], transform, annotated, listed=samples, root=self.root)

    def layers(self, row: int) -> Tensor:
        """Red, green, blue and the objects of each label that is there, [3+P,H,W] uint8."""
        image, sure, unsure = read_photograph(self.samples[row])
        if self.samples[row].label_map is not None:
            return torch.cat([image, sure])
        return torch.cat([image, torch.maximum(sure, unsure)])

    def __getitem__(self, row: int) -> Item:
        row = self.checked(row)
        layers = as_float(self.transform(self.layers(row), row))
        there = torch.tensor(self.samples[row].labels, dtype=torch.int64)
        masks = layers.new_zeros(self.labels.shape[1], *layers.shape[1:])
        if self.annotated[row]:
            masks[there] = layers[3:]
        label = (self.labels[row] != ABSENT).float()
        return Item(normalise(layers[:3]), label, masks, masks.amax((1, 2)) > 0.5, int(self.groups[row]))

    def identity(self, classes: Sequence[str]) -> Split:
        if len(self.listed) > MANY:
            return digest(f"{name_of(p.image, self.root)} {_told(p, classes)}" for p in self.listed)
        with ThreadPoolExecutor(THREADS) as pool:
            entries = list(pool.map(partial(_entry, classes=classes), self.listed))
        return {name_of(p.image, self.root): entry for p, entry in zip(self.listed, entries, strict=True)}


def _told(photograph: Photograph, classes: Sequence[str]) -> str:
    return "+".join(classes[label] for label in photograph.labels) or "-"


def _entry(photograph: Photograph, classes: Sequence[str]) -> str:
    """What the identity holds: hashes of the image and of its annotation, and its labels."""
    if photograph.label_map is not None:
        annotation = file_digest(photograph.label_map)
    else:
        boxes = (f"{classes[o.label]} {o.box} {o.difficult}" for o in photograph.objects)
        annotation = digest(boxes) if photograph.objects else "-"
    return f"{file_digest(photograph.image)} {annotation} {_told(photograph, classes)}"


class LabelPairs(ItemDataset):
    """Every (image, label that is there), as items of one label each, to explain and to measure. A label whose objects
    are all difficult has none."""

    def __init__(self, of: Photographs):
        rows, labels = (of.labels == PRESENT).nonzero(as_tuple=True)
        self.of, self.rows = of, rows.tolist()
        known = [of.samples[row].knows(label) for row, label in zip(self.rows, labels.tolist(), strict=True)]
        super().__init__(labels, of.transform, known)

    def _pair(self, row: int) -> Tensor:
        """Red, green, blue, the label's objects, and its difficult ones, [5,H,W] uint8."""
        photograph = self.of.samples[self.rows[row]]
        place = photograph.labels.index(int(self.labels[row]))
        image, sure, unsure = read_photograph(photograph)
        return torch.cat([image, sure[place, None], unsure[place, None]])

    def layers(self, row: int) -> Tensor:
        return self._pair(row)[:4]

    def left_out(self, row: int) -> Tensor:
        """[1,size,size] bool: pixels of difficult objects alone, which count in neither map nor object."""
        layers = as_float(self.transform(self._pair(row), row))
        return (layers[4:] > 0.5) & (layers[3:4] <= 0.5)


def labelled_sets(
    name: str,
    classes: Sequence[str],
    parts: dict[str, list[Photograph]],
    common: Common,
    shares: dict[str, float],
    root: Path,
    skipped: Sequence[str] = (),
) -> DataSets:
    """DataSets of photographs with several labels each.

    Args:
        parts: photographs of ``train`` and of any of ``validation`` and ``test``.
        shares: what is taken of ``train`` for a part that is not there, each image by its name.
        root: the folder that the files' names are relative to.
        skipped: what the caller has left out already.

    Raises:
        DataError: broken files (without ``skip_broken``), a class without training images, or an empty part.
    """
    parts, skipped = dict(parts), list(skipped)
    if missing := {part: share for part, share in shares.items() if part not in parts}:
        train = parts["train"]
        rows = drawn([name_of(p.image, root) for p in train], [0] * len(train), ["images"], missing, common.seed)
        parts |= {part: [train[row] for row in chosen] for part, chosen in rows.items()}
    for part, of_part in parts.items():
        rows = limited([0] * len(of_part), common.limit, common.seed, partial(_name_of_row, of_part, root))
        parts[part] = [of_part[row] for row in rows]
    listed = {part: list(of_part) for part, of_part in parts.items()}
    everything = [photograph.sample for of_part in parts.values() for photograph in of_part]
    check = "full" if common.skip_broken else "header"
    good = set(usable(name, everything, check, common.skip_broken, skipped, read_label_map))
    parts = {part: [p for p in of_part if p.sample in good] for part, of_part in parts.items()}
    for part, of_part in parts.items():
        if not of_part:
            raise DataError(f"{name}: the {part} split has no image that can be used.")
        if not any(set(photograph.labels) - photograph.difficult for photograph in of_part):
            raise DataError(f"{name}: no image of the {part} split has a label: nothing can be measured there.")
    check_classes(classes, [label for p in parts["train"] for label in p.labels], name)
    for_training, fixed = whole_transforms(common)
    known = {part: [photograph.annotated for photograph in of_part] for part, of_part in parts.items()}
    seen = visible(known["train"], common.annotated, common.seed, partial(_name_of_row, parts["train"], root))

    def photographs(part: str, transform: Transform, annotated: Sequence[bool] | Tensor) -> Photographs:
        return Photographs(parts[part], len(classes), transform, annotated, listed[part], root)

    return DataSets(
        name,
        tuple(classes),
        common.size,
        photographs("train", for_training, seen),
        {"validation": photographs("validation", fixed, known["validation"])},
        {"test": photographs("test", fixed, known["test"])},
        tuple(skipped),
    )


def _name_of_row(photographs: Sequence[Photograph], root: Path, row: int) -> str:
    return name_of(photographs[row].image, root)


def whole_transforms(common: Common) -> tuple[Transform, Transform]:
    """For training and for evaluation: the whole picture, squeezed into a square, as objects stand at its edges, too;
    with ``augment``, random resized crops of at least half of it, and flips, for training."""
    from torchvision.transforms import v2

    size = (common.size, common.size)
    fixed = v2.Resize(size, antialias=True)
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
    random = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return Transform(fixed, random if common.augment else None, common.seed), Transform(fixed)
