"""The data of a comparison, and the images of it that are explained."""

from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..data import DataSets, stack
from ..data.base import ItemDataset, limited
from ..data.labelled import LabelPairs
from ..training.config import TrainConfig
from ..training.runs import (
    open_config_data,
)
from .plan import Plan

GALLERY = 8  #: images in the report's gallery


class Material:
    """The data of one seed: opened once, the images to explain read once, both only when they are needed."""

    def __init__(self, plan: Plan, seed: int):
        self.plan, self.seed = plan, seed
        self.config = plan.config(next(iter(plan.configs)), seed)

    @cached_property
    def data(self) -> DataSets:
        return open_config_data(self.config)

    def training_data(self, config: TrainConfig) -> DataSets:
        """The same images, of whose masks the training may see the share, and the boxes or all, as ``config`` says."""
        train = copy(self.data.train)  # with the images that it keeps in memory
        if config.annotated != self.config.annotated:
            train.annotated = open_config_data(config).train.annotated
        train.annotation = config.annotation
        return replace(self.data, train=train)

    @property
    def test_name(self) -> str:
        """The test set that is explained."""
        return next(iter(self.data.test))

    @cached_property
    def explained(self) -> ItemDataset:
        """That test set; where an image may have several labels, its pairs of an image and a label that is there."""
        test = self.data.test[self.test_name]
        return LabelPairs(test) if self.data.multilabel else test

    @cached_property
    def rows(self) -> list[int]:
        """Which images of it are explained: those with a known object where there are any."""
        explained = self.explained
        rows = explained.annotated.nonzero()[:, 0] if explained.annotated.any() else torch.arange(len(explained))
        return rows[limited(explained.labels[rows].tolist(), self.plan.images, seed=0)].tolist()

    @cached_property
    def items(self):
        """The images of ``rows``, stacked."""
        return stack(self.explained, self.rows)

    @cached_property
    def counted(self) -> Tensor | None:
        """Pixels that count in measures on objects, bool [N,size,size] of the images of ``rows``; None: all."""
        if not self.data.multilabel:
            return None
        return ~torch.cat([self.explained.left_out(row) for row in self.rows])

    @property
    def has_masks(self) -> bool:
        """Whether the object is known in the images that are explained."""
        return bool(self.explained.annotated.any())

    @cached_property
    def gallery(self) -> Tensor:
        """Which of ``rows`` the gallery shows."""
        if self.data.multilabel:
            images = [self.explained.rows[row] for row in self.rows]
            return gallery_of_labels(self.items.label, images)
        return gallery_rows(self.items.label, self.items.group, own_groups(self.data.train))


def own_groups(train) -> dict[int, int]:
    """The background group that each class stands on most often in training; empty where there are no groups."""
    pairs = Counter(zip(train.labels.tolist(), train.groups.tolist(), strict=True))
    return {label: group for (label, group), _ in reversed(pairs.most_common()) if group >= 0}


def gallery_rows(labels: Tensor, groups: Tensor, own: dict[int, int], count: int = GALLERY) -> Tensor:
    """The first images on a background that is not their class's own, no class twice before each was there once.

    Where every image stands on its own class's background, or none has a group: the first images.
    """
    pairs = list(zip(labels.tolist(), groups.tolist(), strict=True))
    foreign = [row for row, (label, group) in enumerate(pairs) if group >= 0 and own.get(label) != group]
    seen: Counter[int] = Counter()
    turns = []
    for row in foreign or range(len(pairs)):
        label = pairs[row][0]
        turns.append((seen[label], row))
        seen[label] += 1
    return torch.tensor([row for _, row in sorted(turns)[:count]])


def gallery_of_labels(labels: Tensor, images: Sequence[int], count: int = GALLERY) -> Tensor:
    """Pairs of an image and a label, all of an image one after the other: first the images with several labels, of
    which none was there before, then the others in the same way.

    Args:
        labels, images: of each pair, the pairs of an image one after the other.
    """
    of_image: dict[int, list[int]] = {}
    for row, image in enumerate(images):
        of_image.setdefault(image, []).append(row)
    several = sorted(of_image.values(), key=lambda rows: len(rows) == 1)
    chosen: list[int] = []
    seen: set[int] = set()
    for rows in several:
        if not seen & set(labels[rows].tolist()):
            chosen += rows
            seen |= set(labels[rows].tolist())
    chosen += [row for rows in several for row in rows if row not in chosen]
    return torch.tensor(chosen[:count])
