"""Oxford-IIIT Pet (Parkhi et al. 2012), listed by torchvision, with its trimaps as masks."""

from pathlib import Path

from .base import Common, DataSets
from .errors import DataError
from .files import Sample, file_sets
from .masks import read_trimap

FOLDER = "oxford-iiit-pet"


def open_set(root: Path, common: Common, *, validation_share: float = 0.1) -> DataSets:
    """Oxford-IIIT Pet, 37 breeds, as DataSets; see :func:`sib_lab.data.open_data`. Validation is taken from trainval.

    A trimap's unclassified outline counts as the animal: it is part animal, and the loss should not punish it.

    Args:
        root: holds ``oxford-iiit-pet``, or is it.

    Raises:
        DataError: one sentence about the files.
    """
    from torchvision.datasets import OxfordIIITPet

    root = root.parent if root.name == FOLDER else root
    try:
        sets = {
            part: OxfordIIITPet(str(root), split=split, target_types=("category", "segmentation"))
            for part, split in (("train", "trainval"), ("test", "test"))
        }
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"pets: {root / FOLDER} has no images/ and annotations/ with trainval.txt and test.txt: unpack "
            "images.tar.gz and annotations.tar.gz there."
        ) from error
    # torchvision reads both files of every item it hands out; its lists tell what there is without reading any.
    parts = {
        part: [
            Sample(Path(image), label, Path(trimap))
            for image, label, trimap in zip(listed._images, listed._labels, listed._segs, strict=True)
        ]
        for part, listed in sets.items()
    }
    stems = {s.label: Path(str(s.image)).stem for part in parts.values() for s in part}
    names = {label: stem.rpartition("_")[0].replace("_", " ") for label, stem in stems.items()}
    classes = [names.get(label, f"breed {label + 1}") for label in range(max(names, default=0) + 1)]
    return file_sets("pets", classes, parts, common, {"validation": validation_share}, root, read_trimap)
