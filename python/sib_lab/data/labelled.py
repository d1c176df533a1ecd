"""Photographs with several labels each: what is known of every label's objects, and (image, label) pairs to explain."""

import json
from collections.abc import Sequence
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
from .files import Box, FileItems, Sample, check_boxes, check_size, name_of, name_of_row, rasterise, usable
from .identity import digest, file_digest
from .images import loaded, opened, read_size, read_smaller, reduction

UNDECIDED = 255  #: in a label map: an object's outline, and what nobody named
PRESENT, ABSENT, DIFFICULT = 1, 0, -1  #: of labels: DIFFICULT where every object of the label is


class Object(NamedTuple):
    """One of a photograph's."""

    label: int
    box: Box
    difficult: bool = False  #: so small, dark or hidden that nothing is measured on it


@dataclass(frozen=True, slots=True)
class Photograph:
    """One image file with its labels, its objects, and perhaps a label map, which shows them better."""

    image: Path
    labels: tuple[int, ...]  #: what is there, rising
    objects: tuple[Object, ...] = ()
    annotated: bool = False  #: whether the place of the objects may be looked at
    label_map: Path | None = None
    values: tuple[int, ...] = ()  #: of the labels in the label map, which has 0 on the background, and UNDECIDED
    shares: bool = False  #: whether boxes are shares of the image's width and height
    upright: bool = False  #: whether the image is turned as its EXIF orientation says; boxes never are

    @property
    def difficult(self) -> frozenset[int]:
        """The labels whose objects are all difficult."""
        return frozenset(o.label for o in self.objects) - {o.label for o in self.objects if not o.difficult}

    def knows(self, label: int) -> bool:
        """Whether something can be measured on a label's objects."""
        sure = any(o.label == label and not o.difficult for o in self.objects)
        return self.annotated and (sure or self.label_map is not None)

    @property
    def sample(self) -> Sample:
        """What is checked of it."""
        boxes = tuple(o.box for o in self.objects)
        return Sample(self.image, 0, self.label_map, boxes, upright=self.upright, shares=self.shares)


def read_label_map(path: Path) -> np.ndarray:
    """[H,W] uint8, a value a class; of more than ``LARGE`` pixels as much smaller as its image.

    Raises:
        DataError: the file is missing, cannot be read, or has no palette or single channel.
    """
    with opened(path) as image:
        if image.mode not in ("P", "L"):
            raise DataError(f"{path} is no label map: it must be a PNG of one channel or with a palette.")
        times = reduction(image.size)
        width, height = (-(-side // times) for side in image.size)
        loaded(image, path)
        return np.asarray(image if times == 1 else image.resize((width, height), Image.Resampling.NEAREST))


class Layers(NamedTuple):
    """A photograph as it is stored, uint8."""

    image: Tensor  #: [3,H,W]
    sure: Tensor  #: [P,H,W], 255 on the objects of each label that is there, but the difficult ones
    difficult: Tensor  #: [P,H,W], 255 on these
    undecided: Tensor  #: [P,H,W], 255 where a label map says so


def read_photograph(photograph: Photograph, boxes_alone: bool = False) -> Layers:
    """
    Args:
        boxes_alone: do not look at its label map.

    Raises:
        DataError: a file is missing or broken, or a label map has another size than its image.
    """
    image, times = read_smaller(photograph.image, photograph.upright)
    height, width, _ = image.shape
    areas = np.zeros((3, len(photograph.labels), height, width), np.uint8)
    if photograph.annotated:
        sample = photograph.sample
        size = (width, height) if times == 1 else read_size(photograph.image, photograph.upright)
        boxes = sample.all_boxes(*size)
        check_boxes(sample, boxes, *size)
        for difficult in (False, True):
            for place, label in enumerate(photograph.labels):
                of_label = [
                    tuple(side / times for side in box)
                    for box, of in zip(boxes, photograph.objects, strict=True)
                    if of.label == label and of.difficult == difficult
                ]
                if of_label:
                    areas[int(difficult), place] = rasterise(of_label, width, height)
        if photograph.label_map is not None and not boxes_alone:
            values = read_label_map(photograph.label_map)
            check_size(sample, (width, height), values.shape[::-1])
            areas = _by_label_map(areas, values, photograph.values)
    return Layers(torch.from_numpy(image.transpose(2, 0, 1).copy()), *map(torch.from_numpy, areas))


def _by_label_map(areas: np.ndarray, values: np.ndarray, of_labels: Sequence[int]) -> np.ndarray:
    """The areas [3,P,H,W] of a label map [H,W]. Of which object of its label a pixel is, the boxes' areas say."""
    found = np.zeros_like(areas)
    for place, value in enumerate(of_labels):
        sure, difficult, _ = areas[:, place] > 127
        difficult = (values == value) & difficult & ~sure
        found[0, place] = ((values == value) & ~difficult) * 255
        found[1, place] = difficult * 255
    found[2] = (values == UNDECIDED) * 255
    return found


class Photographs(FileItems):
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
        super().__init__(samples, listed, root, labels, transform, annotated)

    @staticmethod
    def told(sample: Photograph, classes: Sequence[str]) -> str:
        """Its labels, and which of them count neither way."""
        return json.dumps([[classes[label], label in sample.difficult] for label in sample.labels])

    @staticmethod
    def annotation_digest(sample: Photograph, classes: Sequence[str]) -> str:
        boxes = [f"{classes[o.label]} {o.box} {o.difficult}" for o in sample.objects]
        label_map = [] if sample.label_map is None else [file_digest(sample.label_map)]
        return digest([*label_map, *boxes]) if sample.annotated else "-"

    def of(self, samples: list[Photograph], transform: Transform, annotated: Sequence[bool] | Tensor) -> "Photographs":
        """The same kind of set of other photographs, all of them listed."""
        return Photographs(samples, self.labels.shape[1], transform, annotated, listed=samples, root=self.root)

    def layers(self, row: int) -> Tensor:
        """Red, green, blue and the objects of each label that is there, [3+P,H,W] uint8."""
        layers = read_photograph(self.samples[row], boxes_alone=self.annotation == "boxes")
        return torch.cat([layers.image, torch.maximum(layers.sure, layers.difficult)])

    def __getitem__(self, row: int) -> Item:
        row = self.checked(row)
        layers = as_float(self.transform(self.layers(row), row))
        there = torch.tensor(self.samples[row].labels, dtype=torch.int64)
        masks = layers.new_zeros(self.labels.shape[1], *layers.shape[1:])
        if self.annotated[row]:
            masks[there] = layers[3:]
        label = (self.labels[row] != ABSENT).float()
        return Item(normalise(layers[:3]), label, masks, masks.amax((1, 2)) > 0.5, int(self.groups[row]))


class LabelPairs(ItemDataset):
    """Every (image, label that is there), as items of one label each, to explain and to measure. A label whose objects
    are all difficult has none."""

    def __init__(self, of: Photographs):
        rows, labels = (of.labels == PRESENT).nonzero(as_tuple=True)
        self.of, self.rows = of, rows.tolist()
        known = [of.samples[row].knows(label) for row, label in zip(self.rows, labels.tolist(), strict=True)]
        super().__init__(labels, of.transform, known)

    def _pair(self, row: int) -> Tensor:
        """Red, green, blue, the label's objects, and what counts neither way, [5,H,W] uint8."""
        photograph = self.of.samples[self.rows[row]]
        place = photograph.labels.index(int(self.labels[row]))
        image, *areas = read_photograph(photograph)
        sure, difficult, undecided = (area[place, None] for area in areas)
        return torch.cat([image, sure, torch.maximum(difficult, undecided)])

    def layers(self, row: int) -> Tensor:
        return self._pair(row)[:4]

    def left_out(self, row: int) -> Tensor:
        """[1,size,size] bool: pixels of difficult objects alone and undecided ones, which count in neither map nor
        object."""
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
    # In the order of their names, whichever order a table has.
    parts = {part: sorted(of_part, key=lambda p: name_of(p.image, root)) for part, of_part in parts.items()}
    skipped = list(skipped)
    _check_apart(name, parts, root)
    if missing := {part: share for part, share in shares.items() if part not in parts}:
        train = parts["train"]
        rows = drawn([name_of(p.image, root) for p in train], [0] * len(train), ["images"], missing, common.seed)
        parts |= {part: [train[row] for row in chosen] for part, chosen in rows.items()}
    for part, of_part in parts.items():
        rows = limited([0] * len(of_part), common.limit, common.seed, partial(name_of_row, of_part, root))
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
    seen = visible(known["train"], common.annotated, common.seed, partial(name_of_row, parts["train"], root))

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


def _check_apart(name: str, parts: dict[str, list[Photograph]], root: Path) -> None:
    """
    Raises:
        DataError: an image is there twice.
    """
    seen: dict[str, str] = {}
    for part, of_part in parts.items():
        for photograph in of_part:
            image = name_of(photograph.image, root)
            if image in seen:
                raise DataError(f"{name}: {image} is in the {seen[image]} and the {part} split: name it once.")
            seen[image] = part


def whole_transforms(common: Common) -> tuple[Transform, Transform]:
    """For training and for evaluation: the whole picture, squeezed into a square, as objects stand at its edges, too;
    with ``augment``, random resized crops of at least half of it, and flips, for training."""
    from torchvision.transforms import v2

    size = (common.size, common.size)
    fixed = v2.Resize(size, antialias=True)
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
    random = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return Transform(fixed, random if common.augment else None, common.seed), Transform(fixed)
