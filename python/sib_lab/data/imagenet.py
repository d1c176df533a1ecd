"""ImageNet-1k (Russakovsky et al. 2015) in its folder layout, listed by torchvision, with XML boxes where there are."""

from pathlib import Path

from .base import Common, DataSets
from .errors import DataError, some
from .files import Sample, file_sets


def open_set(root: Path, common: Common, *, validation_share: float = 0.01) -> DataSets:
    """ImageNet as DataSets; see :func:`sib_lab.data.open_data`.

    The official validation images are the test; validation is taken from the training images. Files are not checked
    on opening, only their headers with ``skip_broken`` (minutes to an hour for all of them): a broken one stops the
    run, by name, when it is read.

    Args:
        root: holds ``train/<class>/`` and ``val/<class>/`` (or those in ``Data/CLS-LOC``); optionally XML boxes in
            ``Annotations`` (``<class>/``, ``train/<class>/``, ``val/`` or ``val/<class>/``, in it or in its
            ``CLS-LOC``), and the names of the classes in torchvision's ``meta.bin``.

    Raises:
        DataError: one sentence about the files.
    """
    from torchvision.datasets import ImageFolder

    inner = root / "Data" / "CLS-LOC"
    base = inner if inner.is_dir() else root
    for part in ("train", "val"):
        if not any(p.is_dir() for p in (base / part).glob("*")):
            raise DataError(f"imagenet: {base / part} has no class folders: sort its images into one folder a class.")
    listed = {
        part: ImageFolder(str(base / split), allow_empty=True) for part, split in (("train", "train"), ("test", "val"))
    }
    wnids = listed["train"].classes
    if unknown := [name for name in listed["test"].classes if name not in listed["train"].class_to_idx]:
        raise DataError(f"imagenet: val has classes that train has not: {some(unknown)}.")
    xml = _annotations(root / "Annotations")
    parts = {
        part: [
            Sample(path, listed["train"].class_to_idx[folder.classes[label]], xml=xml.get(Path(path).stem))
            for path, label in folder.samples
        ]
        for part, folder in listed.items()
    }
    names = _names(root)
    classes = [names.get(wnid, wnid) for wnid in wnids]
    check = "header" if common.skip_broken else "none"
    return file_sets(
        "imagenet", classes, parts, common, {"validation": validation_share}, base, check=check, full=False
    )


def _annotations(folder: Path) -> dict[str, str]:
    """The annotation of each image, by the image's name without suffix, which is unique in ImageNet."""
    return {path.stem: str(path) for path in folder.rglob("*.xml")} if folder.is_dir() else {}


def _names(root: Path) -> dict[str, str]:
    """Class folder -> first name of the class, from meta.bin; empty without that file.

    Raises:
        DataError: meta.bin is there and cannot be read.
    """
    from torchvision.datasets.imagenet import load_meta_file

    if not (root / "meta.bin").is_file():
        return {}
    try:
        return {wnid: names[0] for wnid, names in load_meta_file(str(root))[0].items()}
    except Exception as error:  # torch.load fails in many ways on other files
        raise DataError(
            f"imagenet: {root / 'meta.bin'} cannot be read: remove it to name classes by folder."
        ) from error
