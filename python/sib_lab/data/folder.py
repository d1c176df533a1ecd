"""A user's own images: class folders, whole or split, with masks in a parallel folder or boxes in a CSV."""

import csv
from pathlib import Path

from .base import Common, DataSets
from .errors import DataError, some
from .files import Box, Sample, broken, file_sets, image_files, is_hidden

#: The names that the folder of a split may have.
PARTS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
MASKS = "masks"
BOXES = "boxes.csv"


def open_set(
    root: Path,
    common: Common,
    *,
    masks: Path | None = None,
    boxes: Path | None = None,
    validation_share: float = 0.15,
    test_share: float = 0.2,
) -> DataSets:
    """A plain folder as DataSets; see :func:`sib_lab.data.open_data`.

    Classes are the folders in ``root`` (or in ``root/images`` where that is there), or those in its ``train``, ``val``
    and ``test``; a split that is missing is taken from the training images of every class.

    Photographs are turned as their EXIF orientation says, as viewers and annotation tools show them.

    Args:
        masks: a folder with the paths of the images in it, whatever their suffix; default ``root/masks`` where it is
            there. An image without a mask is not annotated.
        boxes: a CSV with the columns file (path of the image under ``root``), x1, y1, x2, y2 in pixels; several rows
            for one file are one object; default ``root/boxes.csv`` where it is there.
        validation_share, test_share: share of every class, where the split has no folder.

    Raises:
        DataError: one sentence about the files.
    """
    base = root / "images" if (root / "images").is_dir() else root
    if masks is None and boxes is None:
        masks = root / MASKS if (root / MASKS).is_dir() else None
        boxes = root / BOXES if masks is None and (root / BOXES).is_file() else None
    if masks is not None and boxes is not None:
        raise DataError("Give masks or boxes, not both: one annotation an image.")
    masks_folder = None if masks is None else Path(masks)
    folders = _part_folders(base)
    own = {masks_folder.resolve()} if masks_folder else set()
    classes = sorted({f.name for folder in folders.values() for f in _class_folders(folder, own)})
    if len(classes) < 2:
        raise DataError(
            f"{base} has {len(classes)} class folders with images where at least 2 are needed: one folder a class, or "
            "train, val and test with such folders in each."
        )
    files = {
        part: [(path, label) for label, c in enumerate(classes) for path in _class_images(folder / c)]
        for part, folder in folders.items()
    }
    everything = [path for listed in files.values() for path, _ in listed]
    skipped: list[str] = []
    mask_of = _masks(masks_folder, base, everything, common.skip_broken, skipped) if masks_folder else {}
    boxes_of = _boxes(Path(boxes), (base, root), everything, common.skip_broken, skipped) if boxes else {}
    parts = {
        part: [Sample(path, label, mask_of.get(path), boxes_of.get(path, ()), upright=True) for path, label in listed]
        for part, listed in files.items()
    }
    return file_sets(
        "folder", classes, parts, common, {"validation": validation_share, "test": test_share}, skipped=skipped
    )


def _part_folders(base: Path) -> dict[str, Path]:
    """The folder of each split; without a training folder, ``base`` is that of training and the splits are drawn."""
    found = {part: base / name for part, names in PARTS.items() for name in names if (base / name).is_dir()}
    if "train" in found:
        return found
    if found:
        raise DataError(f"{base} has {some([f.name for f in found.values()])} but no train: add it, or remove them.")
    return {"train": base}


def _class_folders(folder: Path, own: set[Path]) -> list[Path]:
    """The folders of classes, each with an image in it."""
    found = [f for f in sorted(folder.iterdir()) if f.is_dir() and not is_hidden(f.name) and f.resolve() not in own]
    for empty in (f for f in found if not image_files(f)):
        raise DataError(f"The class folder {empty} holds no images: add some, or remove it.")
    return found


def _class_images(folder: Path) -> list[Path]:
    return image_files(folder) if folder.is_dir() else []


def _masks(folder: Path, base: Path, images: list[Path], skip_broken: bool, skipped: list[str]) -> dict[Path, Path]:
    """The mask of each image that has one.

    Raises:
        DataError: no folder, or masks that belong to no image (without ``skip_broken``).
    """
    if not folder.is_dir():
        raise DataError(f"masks is not a folder: {folder}.")
    by_stem = {path.relative_to(base).with_suffix(""): path for path in images}
    masks = {path.relative_to(folder).with_suffix(""): path for path in image_files(folder)}
    strays = [path for stem, path in masks.items() if stem not in by_stem]
    _report_strays([f"{path} belongs to no image" for path in strays], len(masks), "masks", skip_broken, skipped)
    if not masks.keys() & by_stem.keys():
        raise DataError(f"{folder} has no mask with the path of an image under {base}: mirror its folders and names.")
    return {by_stem[stem]: path for stem, path in masks.items() if stem in by_stem}


def _boxes(
    path: Path, bases: tuple[Path, ...], images: list[Path], skip_broken: bool, skipped: list[str]
) -> dict[Path, tuple[Box, ...]]:
    """The boxes of each image that has some.

    Raises:
        DataError: no such file, other columns, a row without four numbers, or rows for images that are not there
            (the last two without ``skip_broken``).
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows, present = list(reader), reader.fieldnames or ()
    except FileNotFoundError as error:
        raise DataError(f"boxes is not a file: {path}.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV.") from error
    columns = ("file", "x1", "y1", "x2", "y2")
    if missing := [column for column in columns if column not in present]:
        raise DataError(f"{path} has no column {some(missing)}: its first line must be {','.join(columns)}.")
    known, found, bad = set(images), {}, []
    for number, row in enumerate(rows, start=2):
        image = next((base / row["file"] for base in bases if base / row["file"] in known), None)
        try:
            box = tuple(float(row[side]) for side in columns[1:])
        except (TypeError, ValueError):
            bad.append(f"line {number} of {path} has no four numbers")
            continue
        if image is None:
            bad.append(f"line {number} of {path} names {row['file']}, which is no image of the set")
            continue
        found[image] = (*found.get(image, ()), box)
    _report_strays(bad, len(rows), "rows of boxes", skip_broken, skipped)
    return found


def _report_strays(problems: list[str], count: int, what: str, skip_broken: bool, skipped: list[str]) -> None:
    if problems and not skip_broken:
        raise broken("folder", len(problems), f"{count} {what} cannot be used", problems[0])
    skipped.extend(problems)
