"""Waterbirds (Sagawa et al. 2020): birds of land or water on backgrounds that agree with them in training."""

from pathlib import Path

from .base import Common, DataSets
from .errors import DataError, some
from .files import Box, Sample, broken, file_sets, read_table

CLASSES = ("landbird", "waterbird")
GROUPS = ("land", "water")  #: backgrounds
TABLE = "metadata.csv"
PARTS = {"train": "train", "val": "validation", "test": "test", "0": "train", "1": "validation", "2": "test"}
#: Columns of the image, the bird's kind and its background: in the subset with names, and in the original release.
COLUMNS = (("file", "waterbird", "on_water"), ("img_filename", "y", "place"))
SIDES = ("x1", "y1", "x2", "y2")


def open_set(root: Path, common: Common) -> DataSets:
    """Waterbirds as DataSets, with all its own splits; see :func:`sib_lab.data.open_data`.

    ``Item.group`` is the background, so that accuracy of the worst of four groups (bird x background) can be measured.

    Args:
        root: holds ``metadata.csv`` with the columns file, split (train, val, test), waterbird, on_water (0, 1) and,
            where the bird is known, its box x1, y1, x2, y2 in pixels; or that of the original release with
            img_filename, split (0, 1, 2), y, place. Paths start from root.

    Raises:
        DataError: one sentence about the files.
    """
    table = root / TABLE
    try:
        rows, present = read_table(table)
    except FileNotFoundError as error:
        raise DataError(f"waterbirds: {table} is missing: give the folder that the set was unpacked in.") from error
    columns = next((c for c in COLUMNS if {*c, "split"} <= set(present)), None)
    if columns is None:
        wanted = " or ".join(",".join((*c, "split")) for c in COLUMNS)
        raise DataError(f"{table} has the columns {some(present, 9)}, but needs {wanted}.")
    parts: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    bad = []
    for number, row in enumerate(rows, start=2):
        image, kind, place = (row[column] for column in columns)
        part, box = PARTS.get(row["split"] or ""), _box(row)
        if not image or part is None or kind not in ("0", "1") or place not in ("0", "1") or box is None:
            bad.append(f"line {number} of {table} has another split, bird, background or box than can be read")
        else:
            parts[part].append(Sample(root / image, int(kind), boxes=box, group=int(place)))
    if bad and not common.skip_broken:
        raise broken("waterbirds", len(bad), f"{len(rows)} images cannot be used", bad[0])
    return file_sets("waterbirds", CLASSES, parts, common, {}, root, skipped=bad, groups=GROUPS)


def _box(row: dict[str, str]) -> tuple[Box, ...] | None:
    """The box of a row, if it has one; None where it cannot be read."""
    sides = [row.get(side) or "" for side in SIDES]
    if not any(sides):
        return ()
    try:
        return (tuple(float(side) for side in sides),)
    except ValueError:
        return None
