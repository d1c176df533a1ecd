"""Images in files, with masks or boxes beside them: annotations, checking and splitting."""

import csv
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sib_ext.functional import boxes_to_mask

from .base import (
    Common,
    DataSets,
    ItemDataset,
    Transform,
    check_classes,
    drawn,
    limited,
    photo_transforms,
    stratified,
    visible,
)
from .errors import DataError
from .identity import Split, digest, file_digest
from .images import SUFFIXES, File, read_orientation, read_size, read_smaller, turned
from .masks import read_mask

Box = tuple[float, ...]  #: x1, y1, x2, y2 in pixels, x2 and y2 excluded
THREADS = 4  #: that check files
MANY = 50_000  #: images; splits of more are identified by names and sizes
MARGIN = 0.02  #: of a side, or 2 px: as far a box may reach out of its image


@dataclass(frozen=True, slots=True)
class Sample:
    """One image file with its label and at most one kind of annotation, of which a mask comes first."""

    image: File
    label: int
    mask: File | None = None
    boxes: tuple[Box, ...] = ()  #: their union is the object
    xml: Path | str | None = None  #: an annotation with the boxes, read when they are wanted
    upright: bool = False  #: whether the image is turned as its EXIF orientation says; boxes never are
    group: int = -1  #: kind of background; -1 where nobody said
    shares: bool = False  #: whether boxes are shares of the image's width and height

    @property
    def annotated(self) -> bool:
        return self.mask is not None or bool(self.boxes) or self.xml is not None

    def all_boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """The boxes in pixels of the image, which has this size."""
        if self.shares:
            return tuple((x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in self.boxes)
        if self.xml is None:
            return self.boxes
        boxes, size = read_xml_boxes(self.xml)
        x, y = (width / size[0], height / size[1]) if size else (1, 1)
        return tuple((x1 * x, y1 * y, x2 * x, y2 * y) for x1, y1, x2, y2 in boxes)


# ----------------------------------------------------------------------------------------------- reading


def read_xml_boxes(path: Path | str) -> tuple[tuple[Box, ...], tuple[float, float] | None]:
    """The boxes of an annotation in Pascal VOC's XML, as ImageNet and Stanford Dogs have them, and the width and height
    of the image that they were drawn on (copies of ImageNet may have been resized since); None where it says nothing.

    Raises:
        DataError: the file is missing, is no such XML, or holds no box.
    """
    try:
        root = ElementTree.parse(path)
        boxes = [
            tuple(float(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")) for box in root.iter("bndbox")
        ]
        width, height = (float(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an XML annotation with boxes.") from error
    if not boxes:
        raise DataError(f"{path} holds no box.")
    return tuple(boxes), (width, height) if width > 0 and height > 0 else None


def rasterise(boxes: Sequence[Box], width: int, height: int) -> np.ndarray:
    """Mask [H,W] uint8 of the union of boxes, clipped to the image; a pixel cut by an edge gets its covered share.

    Raises:
        DataError: a box has no area inside the image.
    """
    clipped = torch.tensor([clip(box, width, height) for box in boxes])
    mask = boxes_to_mask(clipped, height, width).amax(0)[0]
    return (mask * 255).round().to(torch.uint8).numpy()


def in_unit(box: Box) -> bool:
    """Whether a box may be one of shares of an image's width and height."""
    return all(0 <= side <= 1 for side in box)


def clip(box: Box, width: int, height: int) -> Box:
    """A box cut at the image's edges.

    Raises:
        DataError: nothing is left of it.
    """
    x1, y1, x2, y2 = box
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if not (inside[0] < inside[2] and inside[1] < inside[3]):
        sides = ", ".join(f"{side:g}" for side in box)
        hint = "" if x1 < x2 and y1 < y2 else ": x2 must be greater than x1, and y2 than y1"
        raise DataError(f"the box ({sides}) has no area inside the image of {width} x {height} px{hint}.")
    return inside


# ---------------------------------------------------------------------------------------------- checking

#: How far every file is read when a set is opened.
CHECKS = ("none", "header", "mask", "full")


def problem(sample: Sample, check: str, mask_reader: Callable = read_mask) -> str | None:
    """What is wrong with a sample, or None: image and mask are there and readable (their headers, or all of them),
    of one size, and boxes have an area inside the image."""
    try:
        if check == "full":
            read_layers(sample, mask_reader)
        else:
            size = read_size(sample.image, sample.upright)
            if sample.mask is not None:
                mask_size = read_size(sample.mask)
                check_size(sample, size, mask_size[::-1] if _turns(sample, size, mask_size) else mask_size)
                if check == "mask":
                    mask_reader(sample.mask)
            check_boxes(sample, sample.all_boxes(*size), *size)
    except DataError as error:
        return str(error).removesuffix(".")
    return None


def _turns(sample: Sample, size: tuple[int, int], mask_size: tuple[int, int]) -> bool:
    """Whether a mask of this size (as stored) has to be turned with its image of this size (upright): it fits the image
    as that is stored, and only so."""
    return sample.upright and size == mask_size[::-1] != mask_size and read_orientation(sample.image) >= 5


def check_size(sample: Sample, size: tuple[int, int], mask_size: tuple[int, int]) -> None:
    """
    Raises:
        DataError: a mask of this size is not as large as its image.
    """
    if size != mask_size:
        raise DataError(
            f"{sample.mask} is {mask_size[0]} x {mask_size[1]} px, but its image {sample.image} is "
            f"{size[0]} x {size[1]} px."
        )


def check_boxes(sample: Sample, boxes: Sequence[Box], width: int, height: int) -> None:
    """
    Raises:
        DataError: a box has no area inside the image, or reaches out of it.
    """
    try:
        for box in boxes:
            clip(box, width, height)
            if sample.boxes:  # copies of ImageNet may have been cropped since
                _check_inside(box, width, height)
    except DataError as error:
        raise DataError(f"{sample.image}: {error}") from error


def _check_inside(box: Box, width: int, height: int) -> None:
    x, y = max(2, MARGIN * width), max(2, MARGIN * height)
    if box[0] < -x or box[1] < -y or box[2] > width + x or box[3] > height + y:
        sides = ", ".join(f"{side:g}" for side in box)
        raise DataError(
            f"the box ({sides}) reaches out of the image of {width} x {height} px: give x1, y1, x2, y2 in pixels of "
            "this very image."
        )


S = TypeVar("S", bound=Sample)


def usable(
    name: str,
    samples: list[S],
    check: str,
    skip_broken: bool,
    skipped: list[str],
    mask_reader: Callable = read_mask,
    masks_read: int = 0,
) -> list[S]:
    """The samples without a problem; the others are added to ``skipped``, each with its reason. Of ``masks_read``
    samples, spread over all, the masks are read in full where headers are checked.

    Raises:
        DataError: there are others and ``skip_broken`` is False.
    """
    if check == "none":
        return samples
    checks = [check] * len(samples)
    if check == "header":
        for row in spread(len(samples), masks_read):
            checks[row] = "mask"
    with ThreadPoolExecutor(THREADS) as pool:
        problems = list(pool.map(lambda sample, check: problem(sample, check, mask_reader), samples, checks))
    found = [text for text in problems if text]
    if found and not skip_broken:
        raise broken(name, len(found), f"{len(samples)} images cannot be used", found[0])
    skipped.extend(found)
    return [sample for sample, text in zip(samples, problems, strict=True) if text is None]


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` rows of ``count``, evenly spread."""
    return sorted({row * count // most for row in range(most)}) if count > most else list(range(count))


def broken(name: str, count: int, what: str, first: str) -> DataError:
    """The sentence that stops a set with broken files."""
    return DataError(
        f"{name}: {count} of {what} (the first: {first}): repair or remove them, or leave them out with skip_broken "
        "(--skip-broken)."
    )


# -------------------------------------------------------------------------------------------------- sets


def read_layers(sample: Sample, mask_reader: Callable = read_mask) -> Tensor:
    """Red, green, blue and mask of a sample, [4,H,W] uint8; without annotation the mask is 0.

    Raises:
        DataError: a file is missing or broken, or the mask has another size than its image.
    """
    image, times = read_smaller(sample.image, sample.upright)
    height, width, _ = image.shape
    if sample.mask is not None:
        mask = mask_reader(sample.mask)
        if _turns(sample, (width, height), mask.shape[::-1]):
            mask = np.asarray(turned(Image.fromarray(mask), read_orientation(sample.image)))
        check_size(sample, (width, height), mask.shape[::-1])
    elif sample.annotated:
        size = (width, height) if times == 1 else read_size(sample.image, sample.upright)
        boxes = sample.all_boxes(*size)
        check_boxes(sample, boxes, *size)
        mask = rasterise([tuple(side / times for side in box) for box in boxes], width, height)
    else:
        mask = np.zeros((height, width), dtype=np.uint8)
    return torch.from_numpy(np.concatenate([image.transpose(2, 0, 1), mask[None]]))


def name_of(image: Path | str, root: Path) -> str:
    """The path of an image under root, the same on every system."""
    return Path(os.path.relpath(image, root)).as_posix()


def name_of_row(samples: Sequence, root: Path, row: int) -> str:
    return name_of(samples[row].image, root)


def _bytes(file: Path | str) -> int:
    return os.path.getsize(file) if os.path.exists(file) else -1


class FileItems(ItemDataset, ABC):
    """Items of image files, each described by a sample with its path, ``image``, and whether it is ``annotated``.

    Args:
        samples: of the items.
        listed: the samples with those that were left out as broken, for the identity.
        root: what names of files are relative to.
        arguments: of :class:`sib_lab.data.base.ItemDataset`.
    """

    def __init__(self, samples: list, listed: Sequence, root: Path, *arguments):
        super().__init__(*arguments)
        self.samples, self.listed, self.root = samples, listed, root

    def identity(self, classes: Sequence[str]) -> Split:
        if len(self.listed) > MANY:
            return digest(
                f"{name_of(s.image, self.root)} {_bytes(s.image)} {self.told(s, classes)}" for s in self.listed
            )
        with ThreadPoolExecutor(THREADS) as pool:
            entries = list(pool.map(partial(self._entry, classes=classes), self.listed))
        return {name_of(s.image, self.root): entry for s, entry in zip(self.listed, entries, strict=True)}

    def _entry(self, sample, classes: Sequence[str]) -> str:
        return f"{file_digest(sample.image)} {self.annotation_digest(sample, classes)} {self.told(sample, classes)}"

    @staticmethod
    @abstractmethod
    def told(sample, classes: Sequence[str]) -> str:
        """What the identity says of its labels."""

    @staticmethod
    @abstractmethod
    def annotation_digest(sample, classes: Sequence[str]) -> str:
        """What it says of its annotation: a hash without blanks, "-" without one."""


class ImageFiles(FileItems):
    """Images read from their files when they are asked for; ``samples`` are of :class:`Sample`."""

    def __init__(
        self,
        samples: list[Sample],
        transform: Transform,
        annotated: Sequence[bool] | Tensor,
        mask_reader: Callable = read_mask,
        listed: Sequence[Sample] = (),
        root: Path = Path(),
    ):
        labels, groups = [sample.label for sample in samples], [sample.group for sample in samples]
        super().__init__(samples, listed, root, labels, transform, annotated, groups)
        self.mask_reader = mask_reader

    @staticmethod
    def told(sample: Sample, classes: Sequence[str]) -> str:
        return classes[sample.label] + ("" if sample.group < 0 else f", group {sample.group}")

    @staticmethod
    def annotation_digest(sample: Sample, classes: Sequence[str]) -> str:
        if sample.mask is not None or sample.xml is not None:
            path = sample.mask if sample.mask is not None else sample.xml
            return file_digest(path)  # type: ignore[arg-type]  # of no archive
        return digest(map(repr, sample.boxes)) if sample.boxes else "-"

    def layers(self, row: int) -> Tensor:
        return read_layers(self.samples[row], self.mask_reader)

    def of(self, samples: list[Sample], transform: Transform, annotated: Sequence[bool] | Tensor) -> "ImageFiles":
        """The same kind of set of other samples, all of them listed."""
        return ImageFiles(samples, transform, annotated, self.mask_reader, listed=samples, root=self.root)


def file_sets(
    name: str,
    classes: Sequence[str],
    parts: dict[str, list[Sample]],
    common: Common,
    shares: dict[str, float],
    root: Path,
    mask_reader: Callable = read_mask,
    check: str = "header",
    full: bool = True,
    skipped: Sequence[str] = (),
    by_name: bool = False,
    masks_read: int = 0,
    groups: Sequence[str] = (),
) -> DataSets:
    """DataSets of image files.

    Args:
        parts: samples of ``train`` and of any of ``validation`` and ``test``.
        shares: what is taken from every class of ``train`` for a part that is not there.
        root: the folder that the files' names are relative to.
        check: how far files are read now, of :data:`CHECKS`.
        full: whether ``skip_broken`` reads every file to its end.
        skipped: what the caller has left out already.
        by_name: draw the parts that are not there by :func:`base.drawn` rather than by :func:`base.stratified`, for
            folders whose files come and go.
        masks_read: so many masks, spread over all, are read now.
        groups: the names of the samples' groups.

    Raises:
        DataError: broken files (without ``skip_broken``), a class without training images, or an empty part.
    """
    parts, skipped = dict(parts), list(skipped)
    if missing := {part: share for part, share in shares.items() if part not in parts}:
        train = parts["train"]
        labels = [sample.label for sample in train]
        if by_name:
            names = [name_of(sample.image, root) for sample in train]  # type: ignore[arg-type]  # of no archive
            rows = drawn(names, labels, classes, missing, common.seed)
        else:
            rows = stratified(labels, classes, missing, common.seed)
        parts |= {part: [train[row] for row in chosen] for part, chosen in rows.items()}
    if common.skip_broken and full:
        check = "full"
    for part, samples in parts.items():
        kinds = [sample.label * (len(groups) + 1) + sample.group for sample in samples]
        rows = limited(kinds, common.limit, common.seed, partial(name_of_row, samples, root))
        parts[part] = [samples[row] for row in rows]
    listed = dict(parts)
    everything = [sample for samples in parts.values() for sample in samples]
    good = usable(name, everything, check, common.skip_broken, skipped, mask_reader, masks_read)
    if len(good) < len(everything):
        kept = set(good)
        parts = {part: [sample for sample in samples if sample in kept] for part, samples in parts.items()}
    for part, samples in parts.items():
        if not samples:
            raise DataError(f"{name}: the {part} split has no image that can be used.")
    check_classes(classes, [sample.label for sample in parts["train"]], name)
    for_training, fixed = photo_transforms(common)
    known = {part: [sample.annotated for sample in samples] for part, samples in parts.items()}
    seen = visible(known["train"], common.annotated, common.seed, partial(name_of_row, parts["train"], root))

    def files(part: str, transform: Transform, annotated: Sequence[bool] | Tensor) -> ImageFiles:
        return ImageFiles(parts[part], transform, annotated, mask_reader, listed[part], root)

    return DataSets(
        name,
        tuple(classes),
        common.size,
        files("train", for_training, seen),
        {"validation": files("validation", fixed, known["validation"])},
        {"test": files("test", fixed, known["test"])},
        tuple(skipped),
        tuple(groups),
    )


def read_table(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of a CSV, and its columns.

    Raises:
        FileNotFoundError: there is none.
        DataError: it cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            rows = [{k: v.strip() if isinstance(v, str) else v for k, v in row.items()} for row in reader]
            return rows, list(reader.fieldnames)
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV.") from error


def image_files(folder: Path) -> list[Path]:
    """The image files under a folder, at any depth, in order; hidden ones left out."""
    return [path for path in files_under(folder) if path.suffix.lower() in SUFFIXES]


def files_under(folder: Path, but: Collection[Path] = ()) -> list[Path]:
    """All files under a folder, at any depth, in order, but hidden ones and those in the folders ``but`` (resolved)."""
    found = []
    for top, inner, names in walk(folder):
        inner[:] = [name for name in inner if (top / name).resolve() not in but]
        found += [top / name for name in names]
    return sorted(found)


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """``os.walk`` without what is hidden, also through links to folders, except for those that lead back to a folder on
    their way."""
    for name, inner, names in os.walk(folder, followlinks=True):
        top = Path(name)
        inner[:] = sorted(name for name in inner if not is_hidden(name))
        if any((top / name).is_symlink() for name in inner):
            way = {above for place in (top, *top.parents) for above in (place.resolve(), *place.resolve().parents)}
            inner[:] = [name for name in inner if (top / name).resolve() not in way]
        yield top, inner, [name for name in names if not is_hidden(name)]


def is_hidden(name: str) -> bool:
    """Files and folders that systems leave beside a user's own."""
    return name.startswith((".", "__MACOSX"))


def read_lines(path: Path, columns: int) -> list[list[str]]:
    """The lines of a text table, split at white space into at least ``columns``; the last keeps what is left.

    Raises:
        DataError: the file is missing, or a line has fewer columns.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text.") from error
    lines = [line.strip().split(maxsplit=columns - 1) for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        if len(line) < columns:
            raise DataError(f"{path}: entry {number} has {len(line)} columns where {columns} are expected.")
    return lines
