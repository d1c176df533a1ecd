"""Pascal VOC (Everingham et al. 2010), several labels a photograph: the official layout, or tables of one's own."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from .base import Common, DataSets
from .errors import DataError, some
from .files import Box, broken, read_lines, read_table
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
    ``boxes.csv`` with file, x1, y1, x2, y2 in pixels, class and, where wanted, difficult (0 or 1); the class of a
    difficult object need not be named in ``images.csv``. Paths start from root; classes are those that are named
    there. Splits that are missing are drawn.

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
        if not segmentations:
            return Photograph(image, labels, objects)
        if not label_map.is_file():
            return Photograph(image, labels)
        return Photograph(image, labels, (), label_map, tuple(CLASSES.index(classes[label]) + 1 for label in labels))

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
    except ElementTree.ParseError as error:
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
        found.append(Named(name, (x1 - 1, y1 - 1, x2, y2), (of.findtext("difficult") or "0").strip() == "1"))
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
    labels = {row["file"]: tuple(sorted({classes.index(n) for n in of})) for row, of in zip(rows, names, strict=True)}
    bad = [
        f"line {number} of {root / IMAGES} has the split {row['split']!r}, which is none of {', '.join(PARTS)}"
        for number, row in enumerate(rows, start=2)
        if row["split"] not in PARTS
    ]
    if twice := len(rows) - len(labels):
        bad.append(f"{twice} lines of {root / IMAGES} name a file for the second time")
    boxes = _boxes(root / BOXES, classes, labels, bad) if (root / BOXES).is_file() else {}
    if bad and not skip_broken:
        raise broken("voc", len(bad), f"the lines of {IMAGES} and {BOXES} cannot be used", bad[0])
    skipped.extend(bad)
    parts: dict[str, list[Photograph]] = defaultdict(list)
    for row in {row["file"]: row for row in rows if row["split"] in PARTS}.values():
        file, objects = row["file"], tuple(boxes.get(row["file"], ()))
        there = {*labels[file], *(of.label for of in objects)}
        parts[PARTS[row["split"]]].append(Photograph(root / file, tuple(sorted(there)), objects))
    if "train" not in parts:
        raise DataError(f"voc: {root / IMAGES} has no image of the split train.")
    return classes, dict(parts)


def _boxes(
    path: Path, classes: tuple[str, ...], labels: dict[str, tuple[int, ...]], bad: list[str]
) -> dict[str, list[Object]]:
    rows, _ = _table(path, ("file", *SIDES, "class"))
    found: dict[str, list[Object]] = defaultdict(list)
    for number, row in enumerate(rows, start=2):
        file, name, box = row["file"], row["class"], _box(row)
        if file not in labels:
            bad.append(f"line {number} of {path} names {file}, which {IMAGES} does not")
        elif box is None or (row.get("difficult") or "0") not in ("0", "1"):
            bad.append(f"line {number} of {path} has no four numbers, or difficult is neither 0 nor 1")
        elif name not in classes or (row.get("difficult") != "1" and classes.index(name) not in labels[file]):
            bad.append(f"line {number} of {path} has the class {name!r}, which {IMAGES} does not give {file}")
        else:
            found[file].append(Object(classes.index(name), box, row.get("difficult") == "1"))
    return found


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
