"""A user's own images: class folders, whole or split, with masks in parallel folders or boxes in a CSV."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from .base import Common, DataSets
from .errors import DataError, some
from .files import Sample, broken, file_sets, files_under, image_files, in_unit, is_hidden, read_table, walk
from .images import CURES, SUFFIXES
from .masks import mask_values as parsed_values
from .masks import read_mask

#: The names that the folder of a split may have, in any case.
PARTS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
PART_OF = {name: part for part, names in PARTS.items() for name in names}
IMAGES = ("images",)
MASKS = ("masks", "segmentations")  #: folders of masks, wherever they lie
MASK_ENDS = tuple(mark + word for mark in "_-" for word in ("mask", "segmentation", "seg", "gt"))  #: of names of masks
WRITTEN = {"comparison.json", "run.yaml"}  #: one of them is in a folder that sib-lab compare or train wrote
BOXES = "boxes.csv"
CLASSES = "classes.csv"  #: folder,wordnet_id: which of ImageNet's classes the folders are
MASKS_READ = 100  #: masks that are read in full when the set is opened


def open_set(
    root: Path,
    common: Common,
    *,
    masks: Path | None = None,
    boxes: Path | None = None,
    mask_values: str | None = None,
    invert_masks: bool = False,
    validation_share: float = 0.15,
    test_share: float = 0.2,
) -> DataSets:
    """A plain folder as DataSets; see :func:`sib_lab.data.open_data`.

    Classes are the folders in ``root`` (or in ``root/images`` where that is there), or those in its ``train``, ``val``
    and ``test``; a split that is missing is drawn from the training images of every class, each by its path.

    Photographs are turned as their EXIF orientation says, as viewers and annotation tools show them; so is a mask that
    fits only the photograph as it is stored.

    Args:
        masks: a folder with the paths of the images in it, whatever their suffix; default: every folder ``masks`` or
            ``segmentations``, in ``root`` or with the paths below it in the folder of a split or class. An image
            without a mask takes its boxes, and without these is not annotated.
        boxes: a CSV with the columns file (path of the image under ``root``), x1, y1, x2, y2 in pixels, or all in 0..1
            as shares of the image's width and height; several rows for one file are one object; default every
            ``boxes.csv`` in ``root`` or the folder of a split.
        mask_values: what marks the object in masks where :func:`sib_lab.data.masks.read_mask` cannot be certain: values
            or colours with commas between them, "nonzero", "grey" (opacities) or "alpha".
        invert_masks: the masks mark the background.
        validation_share, test_share: share of every class, where the split has no folder.

    Raises:
        DataError: one sentence about the files.
    """
    base = next(iter(_inner(root, IMAGES)), root)
    found = _mask_folders(root, base)
    mask_folders = found if masks is None else {Path(masks): base}
    own = {folder.resolve() for folder in (*mask_folders, *found)} | _outputs(root)
    folders = _part_folders(base, own)
    class_folders = [f for folder in folders.values() for f in _class_folders(folder, own)]
    classes = sorted({f.name for f in class_folders})
    if len(classes) < 2:
        raise DataError(
            f"{base} has {len(classes)} class folders with images where at least 2 are needed: one folder a class, or "
            "train, val and test with such folders in each."
        )
    _check_names(classes)
    _check_links(class_folders)
    files = {
        part: [(path, label) for label, c in enumerate(classes) for path in _images(folder / c, own)]
        for part, folder in folders.items()
    }
    everything = [path for listed in files.values() for path, _ in listed]
    _check_no_masks(everything)
    skipped = _left_out(folders.values(), own, set(everything), common.skip_broken)
    mask_of = _masks(mask_folders, everything, common.skip_broken, skipped)
    starts: tuple[Path, ...] = (base, root)
    tables = _tables(root, base, folders.values()) if boxes is None else {Path(boxes): starts}
    boxes_of = _boxes(tables, everything, common.skip_broken, skipped)

    def sample(path: Path, label: int) -> Sample:
        if path in mask_of:
            return Sample(path, label, mask_of[path], upright=True)
        return replace(boxes_of.get(path, Sample(path, label)), label=label, upright=True)

    parts = {part: [sample(path, label) for path, label in listed] for part, listed in files.items()}
    data = file_sets(
        "folder",
        classes,
        parts,
        common,
        {"validation": validation_share, "test": test_share},
        base,
        partial(read_mask, values=None if mask_values is None else parsed_values(mask_values), invert=invert_masks),
        skipped=skipped,
        by_name=True,
        masks_read=MASKS_READ,
    )
    return replace(data, wordnet_ids=_wordnet_ids(root / CLASSES, classes))


def _wordnet_ids(path: Path, classes: list[str]) -> tuple[str, ...]:
    """The id of each class that the table names, "" of others; nothing where there is no such table.

    Raises:
        DataError: a table with other columns.
    """
    if not path.is_file():
        return ()
    rows = _rows(path, ("folder", "wordnet_id"))
    ids = {_folded(row["folder"] or ""): (row["wordnet_id"] or "").strip() for row in rows}
    return tuple(ids.get(_folded(name), "") for name in classes)


# ----------------------------------------------------------------------------------------------- folders


def _inner(folder: Path, names: Iterable[str]) -> list[Path]:
    """The folders in a folder that have one of these names, in any case."""
    return [f for f in sorted(folder.iterdir()) if f.is_dir() and f.name.casefold() in names]


def _mask_folders(root: Path, base: Path) -> dict[Path, Path]:
    """The folders of masks, outermost only, each with the folder whose paths it mirrors."""
    found: dict[Path, Path] = {}
    for top, inner, _ in walk(root):
        named = [name for name in inner if name.casefold() in MASKS]
        found |= {top / name: base if top == root else top for name in named}
        inner[:] = [name for name in inner if name not in named]
    return found


def _outputs(root: Path) -> set[Path]:
    """The folders under ``root`` that this program wrote, and those that hold nothing else."""
    found: set[Path] = set()
    for top, inner, names in walk(root):
        if top != root and not WRITTEN.isdisjoint(names):
            found.add(top.resolve())
            inner.clear()
            above = top.parent
            while above != root and all(f.resolve() in found for f in above.iterdir() if not is_hidden(f.name)):
                found.add(above.resolve())
                above = above.parent
    return found


def _part_folders(base: Path, own: set[Path]) -> dict[str, Path]:
    """The folder of each split; without a training folder, ``base`` is that of training and the splits are drawn.

    Raises:
        DataError: two folders for one split, splits without one for training, or class folders beside them.
    """
    folders = [f for f in sorted(base.iterdir()) if f.is_dir() and not is_hidden(f.name) and f.resolve() not in own]
    named = [f for f in folders if f.name.casefold() in PART_OF]
    loose = [f for f in folders if f not in named and image_files(f)]
    if not named or (loose and len(named) == 1 and not any(f.is_dir() for f in named[0].iterdir())):
        return {"train": base}  # one folder of pictures among others is a class, whatever its name
    found: dict[str, Path] = {}
    for folder in named:
        part = PART_OF[folder.name.casefold()]
        if part in found:
            raise DataError(
                f"{base} has {found[part].name} and {folder.name}, two folders for one split: put their images in one."
            )
        found[part] = folder
    if "train" not in found:
        raise DataError(f"{base} has {some([f.name for f in found.values()])} but no train: add it, or remove them.")
    if loose:
        raise DataError(
            f"{base} has {some([f.name for f in loose])} beside {some([f.name for f in named])}, in no split: move the "
            "images into the folders of the splits, or elsewhere; a folder of masks is named with the option masks."
        )
    return found


def _class_folders(folder: Path, own: set[Path]) -> list[Path]:
    """The folders of classes, each with an image in it."""
    found = [f for f in sorted(folder.iterdir()) if f.is_dir() and not is_hidden(f.name) and f.resolve() not in own]
    for empty in (f for f in found if not _images(f, own)):
        others = _kinds(path for path in files_under(empty, own) if path.suffix.lower() in CURES)
        what = f"holds no images that can be read here ({others})" if others else "holds no images"
        raise DataError(f"The class folder {empty} {what}: add some, or remove it.")
    return found


def _check_links(folders: Iterable[Path]) -> None:
    """
    Raises:
        DataError: two class folders are one, through a link.
    """
    places: dict[Path, Path] = {}
    for folder in folders:
        other = places.setdefault(folder.resolve(), folder)
        if other != folder:
            raise DataError(f"{folder} and {other} are one folder, through a link: remove one of them.")


def _check_names(classes: Iterable[str]) -> None:
    """Every class has a name that can be written, and no two have what people read as one name and some systems store
    in one folder.

    Raises:
        DataError: a name that is not UTF-8, or two that differ in case or in how their accents are composed.
    """
    seen: dict[str, str] = {}
    for name in classes:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):  # Cs: a byte of another encoding
            raise DataError(
                f"The class folder {name!r} has letters that cannot be printed, as those stored in another encoding "
                "than UTF-8 are: give it another name."
            )
        other = seen.setdefault(_folded(name), name)
        if other != name:
            raise DataError(
                f"The class folders {other} and {name} differ only in upper and lower case or in how their accents are "
                "stored: give them one name, or two different ones."
            )


def _check_no_masks(images: Iterable[Path]) -> None:
    """No image lies beside another whose mask it is by its name.

    Raises:
        DataError: there are some.
    """
    places = {path.with_suffix("") for path in images}
    names = [(path, path.stem.casefold()) for path in images]
    ends = [(path, next((end for end in MASK_ENDS if stem.endswith(end)), "")) for path, stem in names]
    if found := [path for path, end in ends if end and path.with_name(path.stem[: -len(end)]) in places]:
        raise DataError(
            f"{found[0]} lies beside an image whose mask it is by its name ({len(found)} such): move masks into a "
            "folder masks with the folders and names of their images, or give images other names."
        )


def _folded(name: str) -> str:
    """A name regardless of case and of how the system composes its accents."""
    return unicodedata.normalize("NFC", name).casefold()


def _images(folder: Path, own: set[Path]) -> list[Path]:
    """The images of a class but masks, none where it has no folder."""
    return [path for path in files_under(folder, own) if path.suffix.lower() in SUFFIXES] if folder.is_dir() else []


def _left_out(folders: Iterable[Path], own: set[Path], images: set[Path], skip_broken: bool) -> list[str]:
    """What lies in the folders and is no image of the set, one sentence a kind.

    Raises:
        DataError: pictures that cannot be read here (without ``skip_broken``).
    """
    others = [
        path for folder in folders for path in files_under(folder, own) if path not in images and path.name != BOXES
    ]
    unread = [path for path in others if path.suffix.lower() in CURES]
    if unread and not skip_broken:
        raise broken("folder", len(unread), f"{len(unread) + len(images)} pictures cannot be read here", _kinds(unread))
    loose = [path for path in others if path.suffix.lower() in SUFFIXES]
    rest = [path for path in others if path not in set(unread) | set(loose)]
    found = ((unread, "cannot be read here"), (loose, "lie in no class folder"), (rest, "are no pictures"))
    return [f"{_kinds(paths)} {why} (the first: {paths[0]})" for paths, why in found if paths]


def _kinds(paths: Iterable[Path]) -> str:
    """Files counted by suffix, with what to do: "12 .heic: pip install pillow-heif"."""
    counts = Counter(path.suffix.lower() or "without suffix" for path in paths)
    return ", ".join(f"{n} {kind}" + (f": {CURES[kind]}" if kind in CURES else "") for kind, n in counts.most_common())


# ------------------------------------------------------------------------------------------- annotations


def _masks(folders: dict[Path, Path], images: list[Path], skip_broken: bool, skipped: list[str]) -> dict[Path, Path]:
    """The mask of each image that has one: of its path whatever the suffix, and, where that leaves one, whatever the
    case and the composition of accents.

    Raises:
        DataError: no folder, or masks that belong to no image or to one that has another (without ``skip_broken``).
    """
    found: dict[Path, Path] = {}
    strays, count = [], 0
    for folder, base in folders.items():
        if not folder.is_dir():
            raise DataError(f"masks is not a folder: {folder}.")
        of_key = defaultdict(list)
        for image in images:
            if image.is_relative_to(base):
                for key in _keys(image, base):
                    of_key[key].append(image)
        masks = image_files(folder)
        matched = 0
        for mask in masks:
            exact, folded = (of_key.get(key, []) for key in _keys(mask, folder))
            belonging = exact or (folded if len(folded) == 1 else [])
            matched += bool(belonging)
            if not belonging:
                strays.append(f"{mask} belongs to no image")
            elif belonging[0] in found:
                strays.append(f"{mask} is the second mask of {belonging[0]}")
            found |= {image: mask for image in belonging if image not in found}
        count += len(masks)
        if not matched and (skip_broken or not masks):
            raise DataError(
                f"{folder} has no mask with the path of an image under {base}: mirror its folders and names."
            )
    _report_strays(strays, count, "masks", skip_broken, skipped)
    return found


def _keys(path: Path, base: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What an image and its mask have in common: the path without suffix, and the same regardless of case and accents'
    composition with a split by its first name."""
    exact = path.relative_to(base).with_suffix("").parts
    folded = tuple(map(_folded, exact))
    # It starts with "", so that it never equals an exact one.
    return exact, ("", PART_OF.get(folded[0], folded[0]) if len(folded) > 1 else folded[0], *folded[1:])


def _tables(root: Path, base: Path, folders: Iterable[Path]) -> dict[Path, tuple[Path, ...]]:
    """The CSVs of boxes that are there, each with the folders that its paths may start from."""
    places = dict.fromkeys((root, base, *folders))
    return {
        path: tuple(dict.fromkeys((place, base, root)))
        for place in places
        for path in place.iterdir()
        if path.name.casefold() == BOXES
    }


def _boxes(
    tables: dict[Path, tuple[Path, ...]], images: list[Path], skip_broken: bool, skipped: list[str]
) -> dict[Path, Sample]:
    """Each image that has boxes, as a sample with them and without its label.

    Raises:
        DataError: no such file, other columns, a row without four numbers or in other units than the rest, or rows for
            images that are not there (the last three without ``skip_broken``).
    """
    found: dict[Path, Sample] = {}
    known = {_folded(str(path)): path for path in images} | {str(path): path for path in images}
    for path, bases in tables.items():
        rows, bad, boxes = _rows(path), [], []
        for number, row in enumerate(rows, start=2):
            name = (row["file"] or "").replace("\\", "/")
            places = [str(base / name) for base in bases]
            image = next((known[key] for key in (*places, *map(_folded, places)) if key in known), None)
            try:
                box = tuple(float(row[side]) for side in SIDES)
            except (TypeError, ValueError):
                bad.append(f"line {number} of {path} has no four numbers")
                continue
            if image is None:
                bad.append(f"line {number} of {path} names {name}, which is no image of the set")
                continue
            boxes.append((number, image, box))
        shares = bool(boxes) and all(in_unit(box) for _, _, box in boxes)
        for number, image, box in boxes:
            if not shares and in_unit(box):
                bad.append(f"line {number} of {path} has a box in 0..1 where others are in pixels")
                continue
            before = found.get(image, Sample(image, 0, shares=shares))
            found[image] = replace(before, boxes=(*before.boxes, box))
        _report_strays(bad, len(rows), "rows of boxes", skip_broken, skipped)
    return found


SIDES = ("x1", "y1", "x2", "y2")


def _rows(path: Path, columns: tuple[str, ...] = ("file", *SIDES)) -> list[dict[str, str]]:
    """The rows of a CSV, of boxes or of other columns.

    Raises:
        DataError: no such file, or other columns.
    """
    try:
        rows, present = read_table(path)
    except FileNotFoundError as error:
        raise DataError(f"boxes is not a file: {path}.") from error
    if missing := [column for column in columns if column not in present]:
        raise DataError(f"{path} has no column {some(missing)}: its first line must be {','.join(columns)}.")
    return rows


def _report_strays(problems: list[str], count: int, what: str, skip_broken: bool, skipped: list[str]) -> None:
    if problems and not skip_broken:
        raise broken("folder", len(problems), f"{count} {what} cannot be used", problems[0])
    skipped.extend(problems)
