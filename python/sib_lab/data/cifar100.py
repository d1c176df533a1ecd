"""CIFAR-100 (Krizhevsky 2009), read by torchvision; it has no object masks."""

from pathlib import Path

import numpy as np
import torch

from .base import ArrayItems, Common, DataSets, check_classes, limited, photo_transforms, stratified
from .errors import DataError

FOLDER = "cifar-100-python"


def open_set(root: Path, common: Common, *, validation_share: float = 0.1) -> DataSets:
    """CIFAR-100 as DataSets; see :func:`sib_lab.data.open_data`. Validation is taken from every training class.

    Args:
        root: holds ``cifar-100-python``, or is it.

    Raises:
        DataError: the files are not there or damaged (torchvision checks their sums).
    """
    from torchvision.datasets import CIFAR100

    root = root.parent if root.name == FOLDER else root
    if not (root / FOLDER).is_dir():
        raise DataError(f"cifar100: {root} has no folder {FOLDER}: unpack cifar-100-python.tar.gz there.")
    try:
        train, test = (CIFAR100(str(root), train=training) for training in (True, False))
    except Exception as error:  # a damaged pickle fails in many ways
        raise DataError(
            f"cifar100: the files in {root / FOLDER} are missing or damaged: unpack cifar-100-python.tar.gz again."
        ) from error
    rows = stratified(train.targets, train.classes, {"validation": validation_share}, common.seed)
    for_training, fixed = photo_transforms(common)

    def items(source: CIFAR100, rows, transform) -> ArrayItems:
        labels = np.asarray(source.targets)[rows]
        rows = np.asarray(rows)[chosen := limited(labels, common.limit, common.seed)]
        images = torch.from_numpy(source.data[rows]).permute(0, 3, 1, 2).contiguous()
        return ArrayItems(images, labels[chosen], transform, torch.zeros(len(rows), dtype=torch.bool))

    parts = {
        "train": items(train, rows["train"], for_training),
        "validation": items(train, rows["validation"], fixed),
        "test": items(test, range(len(test)), fixed),
    }
    check_classes(train.classes, parts["train"].labels, "cifar100")
    return DataSets(
        "cifar100",
        tuple(train.classes),
        common.size,
        parts["train"],
        {"validation": parts["validation"]},
        {"test": parts["test"]},
    )
