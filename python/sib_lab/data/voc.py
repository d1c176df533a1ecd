"""Pascal VOC (Everingham et al. 2010), several labels a photograph: the official layout, or tables of one's own."""

from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

from .base import Common, DataSets
from .errors import DataError, some
from .files import Box, broken, in_unit, read_lines, read_table
from .labelled import Object, Photograph, labelled_sets

#: The order of the values in SegmentationClass, from 1.
CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow")
CLASSES += ("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
MASKS = ("boxes", "segmentations")
IMAGES, BOXES = "images.csv", "boxes.csv"
PARTS = {"train": "train", "val": "validation", "test": "test"}
SIDES = ("x1", "y1", "x2", "y2")


def open_set(
    root: Path, common: Common, *, masks: str = "boxes", validation_share: float = 0.1, test_share: float = 0.2
) -> DataSets:
    """Photographs with several labels as DataSets; see :func:`sib_lab.data.open_data`.

    Official layout: the lists train, val and test of ImageSets/Main are the splits. Where test is missing (2012), val
    is the test and validation is drawn from train. Classes are those that occur in the annotations, in alphabetical
    order.

    Tables: ``images.csv`` with file, split (train, val, test), classes (names with spaces between them), and
    ``boxes.csv`` with file, x1, y1, x2, y2 in pixels of the upright image (or all in 0..1, as shares of its width and
    height), class and, where wanted, difficult (0 or 1); the class of a difficult object need not be named in
    ``images.csv``. Paths start from root; classes are those that are named there. Splits that are missing are drawn.

    A label whose objects are all difficult is there in training, and counts neither way in measures.

    Args:
        root: the folder with one of both, or one above ``VOC2007`` (or another year), or above ``VOCdevkit``.
        masks: "boxes"; "segmentations": the label maps of SegmentationClass, other images are not annotated.
        validation_share, test_share: of the training images, where there is no such split.

    Raises:
        DataError: one sentence about the files.
    """
    if masks not in MASKS:
        raise DataError(f"voc: masks must be one of {', '.join(MASKS)}, got {masks!r}.")
    skipped: list[str] = []
    if (root / IMAGES).is_file():
        if masks != "boxes":
            raise DataError(f"voc: {root / IMAGES} goes with boxes alone: leave the option masks out.")
        classes, parts = _from_tables(root, common.skip_broken, skipped)
        base = root
    else:
        base = _devkit(root)
        classes, parts = _from_devkit(base, masks == "segmentations", common.skip_broken, skipped)
        if "test" not in parts and "validation" in parts:
            parts["test"] = parts.pop("validation")
    shares = {"validation": validation_share, "test": test_share}
    return labelled_sets("voc", classes, parts, common, shares, base, skipped)


# ------------------------------------------------------------------------------------------ official layout


def _devkit(root: Path) -> Path:
    """The folder of the only year.

    Raises:
        DataError: none, or several.
    """
    places = [root, *sorted(root.glob("VOC20*")), *sorted(root.glob("VOCdevkit/VOC20*"))]
    found = [place for place in places if (place / "JPEGImages").is_dir()]
    if not found:
        raise DataError(
            f"voc: {root} has neither {IMAGES} nor VOCdevkit/VOC2007/JPEGImages: give the folder that VOC was unpacked "
            "in."
        )
    if len(found) > 1:
        raise DataError(f"voc: {root} has {some([str(f.relative_to(root)) for f in found])}: give one of them as root.")
    return found[0]


def _from_devkit(
    base: Path, segmentations: bool, skip_broken: bool, skipped: list[str]
) -> tuple[tuple[str, ...], dict[str, list[Photograph]]]:
    lists = base / "ImageSets" / "Main"
    if not (lists / "train.txt").is_file():
        raise DataError(f"voc: {lists / 'train.txt'} is missing: unpack ImageSets, too.")
    named: dict[str, dict[str, list[Named]]] = {}
    bad = []
    for split, part in PARTS.items():
        if (lists / f"{split}.txt").is_file():
            named[part] = {}
            for name, *_ in read_lines(lists / f"{split}.txt", 1):
                try:
                    named[part][name] = read_xml_objects(base / "Annotations" / f"{name}.xml")
                except DataError as error:
                    bad.append(str(error).removesuffix("."))
    if bad and not skip_broken:
        raise broken("voc", len(bad), f"{sum(map(len, named.values())) + len(bad)} images cannot be used", bad[0])
    skipped.extend(bad)
    classes = tuple(sorted({of.name for part in named.values() for objects in part.values() for of in objects}))
    if segmentations and (other := [name for name in classes if name not in CLASSES]):
        raise DataError(f"voc: what the classes {some(other)} are in SegmentationClass is not known: leave masks out.")

    def photograph(name: str, named: list[Named]) -> Photograph:
        objects = tuple(Object(classes.index(of.name), of.box, of.difficult) for of in named)
        labels = tuple(sorted({of.label for of in objects}))
        image, label_map = base / "JPEGImages" / f"{name}.jpg", base / "SegmentationClass" / f"{name}.png"
        if not segmentations or not label_map.is_file():
            return Photograph(image, labels, objects, bool(objects) and not segmentations)
        values = tuple(CLASSES.index(classes[label]) + 1 for label in labels)
        return Photograph(image, labels, objects, bool(objects), label_map, values)

    return classes, {part: [photograph(*of) for of in images.items()] for part, images in named.items()}


class Named(NamedTuple):
    """An object in an annotation."""

    name: str
    box: Box
    difficult: bool


def read_xml_objects(path: Path) -> list[Named]:
    """The objects of an annotation of VOC, whose pixels are counted from 1, both ends of a box included.

    Raises:
        DataError: the file is missing, is no such XML, or has an object without a name or box.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two of an encoding
        raise DataError(f"{path} cannot be read as an XML annotation.") from error
    found = []
    for of in root.iter("object"):
        name = (of.findtext("name") or "").strip()
        try:
            x1, y1, x2, y2 = (float(of.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path} has an object without four numbers in bndbox.") from error
        if not name:
            raise DataError(f"{path} has an object without a name.")
        difficult = _flag(of.findtext("difficult"))
        if difficult is None:
            raise DataError(f"{path} has an object whose difficult is neither 0 nor 1.")
        found.append(Named(name, (x1 - 1, y1 - 1, x2, y2), difficult))
    return found


# -------------------------------------------------------------------------------------------------- tables


def _from_tables(
    root: Path, skip_broken: bool, skipped: list[str]
) -> tuple[tuple[str, ...], dict[str, list[Photograph]]]:
    rows, _ = _table(root / IMAGES, ("file", "split", "classes"))
    names = [(row["classes"] or "").split() for row in rows]
    classes = tuple(sorted({name for of_row in names for name in of_row}))
    if len(classes) < 2:
        raise DataError(f"voc: {root / IMAGES} names {len(classes)} classes where at least 2 are needed.")
    split_of: dict[str, str] = {}
    labels: dict[str, set[int]] = {}
    bad = _Bad(root)
    for number, (row, of_row) in enumerate(zip(rows, names, strict=True), start=2):
        file, split = _path(row["file"]), row["split"]
        if not file:
            bad.add(IMAGES, number, file, "names no file")
        elif file in split_of:
            bad.add(IMAGES, number, file, f"names {file} for the second time")
        elif split not in PARTS:
            bad.add(IMAGES, number, file, f"has the split {split!r}, which is none of {', '.join(PARTS)}")
        split_of.setdefault(file, split)
        labels.setdefault(file, {classes.index(name) for name in of_row})
    boxes, shares = _boxes(root, classes, labels, bad) if (root / BOXES).is_file() else ({}, False)
    if bad.lines and not skip_broken:
        raise broken("voc", len(bad.lines), f"the lines of {IMAGES} and {BOXES} cannot be used", bad.lines[0])
    skipped.extend(bad.lines)
    parts: dict[str, list[Photograph]] = defaultdict(list)
    for file, split in split_of.items():
        if file not in bad.files:
            objects = tuple(boxes.get(file, ()))
            there = tuple(sorted(labels[file] | {of.label for of in objects}))
            photograph = Photograph(root / file, there, objects, bool(objects), shares=shares, upright=True)
            parts[PARTS[split]].append(photograph)
    if "train" not in parts:
        raise DataError(f"voc: {root / IMAGES} has no image of the split train.")
    return classes, dict(parts)


class _Bad:
    """Lines that cannot be used, and the images that they speak of, which are left out with them."""

    def __init__(self, root: Path):
        self.root = root
        self.lines: list[str] = []
        self.files: set[str] = set()

    def add(self, table: str, number: int, file: str, what: str) -> None:
        self.lines.append(f"line {number} of {self.root / table} {what}")
        self.files.add(file)


def _boxes(
    root: Path, classes: tuple[str, ...], labels: dict[str, set[int]], bad: _Bad
) -> tuple[dict[str, list[Object]], bool]:
    """The objects of each file, and whether their boxes are shares of the image's width and height."""
    rows, _ = _table(root / BOXES, ("file", *SIDES, "class"))
    found: dict[str, list[Object]] = defaultdict(list)
    boxes = [_box(row) for row in rows]
    shares = bool(boxes) and all(box is not None and in_unit(box) for box in boxes)
    for number, (row, box) in enumerate(zip(rows, boxes, strict=True), start=2):
        file, name, difficult = _path(row["file"]), row["class"], _flag(row.get("difficult"))
        if file not in labels:
            bad.add(BOXES, number, file, f"names {file}, which {IMAGES} does not")
        elif box is None or difficult is None:
            bad.add(BOXES, number, file, "has no four numbers, or difficult is neither 0 nor 1")
        elif not shares and in_unit(box):
            bad.add(BOXES, number, file, "has a box in 0..1 where others are in pixels")
        elif name not in classes or not (difficult or classes.index(name) in labels[file]):
            hint = ", unless the object is difficult" if name in classes else ""
            bad.add(BOXES, number, file, f"has the class {name!r}, which {IMAGES} does not give {file}{hint}")
        else:
            found[file].append(Object(classes.index(name), box, difficult))
    return found, shares


def _path(text: str | None) -> str:
    """As it is written on any system."""
    return PurePosixPath((text or "").replace("\\", "/")).as_posix() if text else ""


def _flag(text: str | None) -> bool | None:
    """0 or nothing, 1; None: neither."""
    return {"": False, "0": False, "1": True, "false": False, "true": True}.get((text or "").strip().casefold())


def _box(row: dict[str, str]) -> Box | None:
    try:
        return tuple(float(row[side]) for side in SIDES)
    except (TypeError, ValueError):
        return None


def _table(path: Path, columns: tuple[str, ...]) -> tuple[list[dict[str, str]], list[str]]:
    rows, present = read_table(path)
    if missing := [column for column in columns if column not in present]:
        raise DataError(f"{path} has no column {some(missing)}: its first line must have {','.join(columns)}.")
    return rows, present
