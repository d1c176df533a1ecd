"""Stanford Dogs (Khosla et al. 2011): breeds with XML boxes."""

from pathlib import Path

from .base import Common, DataSets
from .errors import DataError
from .files import Sample, file_sets


def open_set(root: Path, common: Common, *, validation_share: float = 0.1) -> DataSets:
    """Stanford Dogs as DataSets; see :func:`sib_lab.data.open_data`. Validation is taken from the training list.

    Args:
        root: holds ``Images``, ``Annotation`` and the lists ``train_list.mat`` and ``test_list.mat`` (or those in
            ``lists``).

    Raises:
        DataError: one sentence about the files.
    """
    lists = root / "lists" if (root / "lists").is_dir() else root
    listed = {part: _list(lists / f"{part}_list.mat") for part in ("train", "test")}
    folder_of = {label: path.split("/")[0] for entries in listed.values() for path, _, label in entries}
    classes = [
        folder_of.get(label, f"breed {label + 1}").partition("-")[2].replace("_", " ") or folder_of[label]
        for label in range(max(folder_of, default=-1) + 1)
    ]
    parts = {
        part: [
            Sample(root / "Images" / path, label, xml=root / "Annotation" / annotation)
            for path, annotation, label in entries
        ]
        for part, entries in listed.items()
    }
    return file_sets("dogs", classes, parts, common, {"validation": validation_share}, root)


def _list(path: Path) -> list[tuple[str, str, int]]:
    """Image, annotation and label (from 0) of each entry of a list.

    Raises:
        DataError: no such file, or not a MATLAB file with file_list, annotation_list and labels.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise DataError(f"dogs: {path} is missing: give the folder that images, annotation and lists were unpacked in.")
    try:
        table = loadmat(path, squeeze_me=True, chars_as_strings=True)
        columns = [table[name].reshape(-1).tolist() for name in ("file_list", "annotation_list", "labels")]
        return [(str(file), str(annotation), int(label) - 1) for file, annotation, label in zip(*columns, strict=True)]
    except Exception as error:  # scipy's reader fails in many ways on damaged files
        raise DataError(f"{path} cannot be read as a list of Stanford Dogs: unpack lists.tar again.") from error
