"""CUB-200-2011 (Wah et al. 2011): birds with segmentations and boxes."""

from pathlib import Path

from .base import Common, DataSets
from .errors import DataError
from .files import Box, Sample, file_sets, read_lines
from .masks import read_grey_mask

FOLDER = "CUB_200_2011"
MASKS = ("auto", "segmentations", "boxes")


def open_set(root: Path, common: Common, *, masks: str = "auto", validation_share: float = 0.1) -> DataSets:
    """CUB-200-2011 as DataSets; see :func:`sib_lab.data.open_data`. Validation is taken from the training images.

    A segmentation's grey values, the share of annotators who saw the bird, stay as a soft mask.

    Args:
        root: holds ``CUB_200_2011``, or is it; ``segmentations/`` in either place.
        masks: "segmentations", "boxes", or "auto": segmentations where the folder is there.

    Raises:
        DataError: one sentence about the files.
    """
    base = root / FOLDER if (root / FOLDER).is_dir() else root
    if not (base / "images.txt").is_file():
        raise DataError(f"cub200: {base} has no images.txt: give the folder that CUB_200_2011.tgz was unpacked in.")
    if masks not in MASKS:
        raise DataError(f"cub200: masks must be one of {', '.join(MASKS)}, got {masks!r}.")
    segmentations = next((p for p in (base / "segmentations", base.parent / "segmentations") if p.is_dir()), None)
    if masks == "segmentations" and segmentations is None:
        raise DataError(f"cub200: there is no folder segmentations in {base} or beside it: unpack segmentations.tgz.")
    if masks == "boxes":
        segmentations = None
    paths = _table(base / "images.txt")
    labels = _table(base / "image_class_labels.txt", paths)
    training = _table(base / "train_test_split.txt", paths)
    boxes = {} if segmentations else {key: _box(text, base) for key, text in _table(_boxes(base), paths).items()}
    names = _table(base / "classes.txt") if (base / "classes.txt").is_file() else _names(paths, labels)
    number = {key: place for place, key in enumerate(names)}
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    for key, path in paths.items():
        if labels[key] not in number:
            raise DataError(f"cub200: image {path} has the class {labels[key]}, which classes.txt does not list.")
        mask = (segmentations / path).with_suffix(".png") if segmentations else None
        box = (boxes[key],) if boxes else ()
        part = "train" if training[key] == "1" else "test"
        parts[part].append(Sample(base / "images" / path, number[labels[key]], mask, box))
    classes = [name.partition(".")[2].replace("_", " ") or name for name in names.values()]
    return file_sets("cub200", classes, parts, common, {"validation": validation_share}, base, read_grey_mask)


def _boxes(base: Path) -> Path:
    return base / "bounding_boxes.txt"


def _table(path: Path, expected: dict[str, str] | None = None) -> dict[str, str]:
    """A file of lines "key value", in order.

    Raises:
        DataError: no such file, or none for an expected key.
    """
    table = {line[0]: line[1].strip() for line in read_lines(path, 2)}
    if missing := [key for key in expected or () if key not in table]:
        raise DataError(f"{path} has no line for {len(missing)} of the images (the first: {expected[missing[0]]}).")
    return table


def _box(text: str, base: Path) -> Box:
    """ "x y width height" in pixels -> x1, y1, x2, y2."""
    try:
        x, y, width, height = (float(value) for value in text.split())
    except ValueError as error:
        raise DataError(f"{_boxes(base)}: {text!r} is no box of x, y, width and height.") from error
    return x, y, x + width, y + height


def _names(paths: dict[str, str], labels: dict[str, str]) -> dict[str, str]:
    """The classes by the folders of their images, where classes.txt is missing."""
    found = {labels[key]: path.split("/")[0] for key, path in paths.items()}
    return {key: found[key] for key in sorted(found, key=lambda key: (len(key), key))}
