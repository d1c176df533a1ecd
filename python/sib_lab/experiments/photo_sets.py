"""The sets of photographs that ``sib-lab evidence-photos`` knows: how each is trained on, and where its files are."""

import csv
import io
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console

from ..data import DataError
from ..data.files import read_table
from ..training.runs import file_hash, write_text

DATA, BOXES = "data", "boxes.csv"  #: the folder of unpacked sets; a set's table of boxes


@dataclass(frozen=True)
class PhotoSet:
    """One set of photographs, and how long it is trained on."""

    name: str
    file: str  #: in the folder of the data: a folder of this name, or a .zip
    epochs: int
    data: str = "folder"  #: a key of :data:`sib_lab.data.SETS`
    annotation: str = "masks"  #: what the losses see of the objects
    tests_have_masks: bool = True  #: its tests are measured on masks alone; boxes of test images are left out
    is_shifted: bool = False  #: its tests are not of the kind that it is trained on
    variants: tuple[str, ...] = ("sib-none", "sib-few", "sib-features")
    size: int = 128  #: of the images, px
    has_other_peers: bool = True  #: whether the energy loss is not its only peer


SETS = {
    of.name: of
    for of in (
        PhotoSet("duts30", "duts30", 4),
        PhotoSet("cub20", "cub20", 8, annotation="boxes"),
        PhotoSet("pets3", "pets3", 8),
        PhotoSet(
            "waterbirds",
            "waterbirds2k",
            4,
            data="waterbirds",
            annotation="boxes",
            tests_have_masks=False,
            is_shifted=True,
            variants=("sib-none", "sib-alone", "sib-features"),
        ),
        PhotoSet(
            "voc2200",
            "voc2200",
            8,
            data="voc",
            tests_have_masks=False,
            variants=("sib-few", "sib-one"),
            size=160,
            has_other_peers=False,
        ),
    )
}


def find(root: Path, sets: Sequence[PhotoSet]) -> dict[str, Path]:
    """The folder or .zip of each set in ``root``.

    Raises:
        DataError: one is not there.
    """
    found = {}
    for of in sets:
        places = (root / of.file, root / f"{of.file}.zip")
        there = [path for path in places if path.exists()]
        if not there:
            raise DataError(
                f"The set {of.name} needs {places[1]}, or the folder {places[0]}, which is not there: name the folder "
                "that holds the sets, or others with --sets, see docs/photographs.md."
            )
        found[of.name] = there[0]
    return found


def unpacked(found: dict[str, Path], folder: Path, console: Console) -> dict[str, Path]:
    """The folder of each set: its own, or the one below ``folder`` that its .zip is unpacked into; once,
    as long as the .zip is the same.

    Raises:
        DataError: a damaged .zip.
    """
    roots = {}
    for name, path in found.items():
        roots[name] = path if path.is_dir() else folder / DATA / name
        if path.is_dir():
            continue
        of_archive = folder / DATA / f"{name}.sha256"
        content = file_hash(path)
        if not roots[name].exists() or not of_archive.exists() or of_archive.read_text().strip() != content:
            console.print(f"Unpacking {path}.", markup=False)
            _unpack(path, roots[name])
            write_text(of_archive, content + "\n")
    return roots


def _unpack(archive: Path, target: Path) -> None:
    partly = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partly, ignore_errors=True)  # of a command that was stopped
    partly.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as content:
            content.extractall(partly)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive} is damaged: it cannot be unpacked.") from error
    shutil.rmtree(target, ignore_errors=True)  # of another .zip
    os.replace(partly, target)


def leave_out_boxes_of_tests(of: PhotoSet, root: Path, folder: Path) -> None:
    """Writes the boxes of a set's training images alone into ``folder``, where it has both boxes and masks of tests.

    A test image without a mask would else be measured on its box, and the others on their masks.
    """
    path, without = root / BOXES, folder / DATA / f"{of.name}-{BOXES}"
    if of.data != "folder" or not of.tests_have_masks or not path.exists():
        without.unlink(missing_ok=True)
        return
    rows, columns = read_table(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in rows if _split_of(row["file"]) != "test")
    write_text(without, text.getvalue())


def _split_of(file: str) -> str:
    """The first folder of a path in a table, as it is written on any system."""
    return next(iter(PurePosixPath(file.replace("\\", "/")).parts), "").lower()
