"""Which images make which batch, and how they are fetched."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data import Item, set_epoch, stack
from ..data.base import ItemDataset
from .config import TrainConfig

EVALUATION_BATCH = 100  #: images classified at a time


def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """Every row number once, in an order that follows from the seed and the epoch (from 0) alone."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


class Batches:
    """The images of each optimiser step of one process, ``config.accumulate`` batches together. Images of an epoch
    that fill no step are left out.

    Args:
        rank, world: of ``world`` processes this is number ``rank``; it gets every ``world``-th image of each step.
    """

    def __init__(
        self, dataset: ItemDataset, config: TrainConfig, rank: int = 0, world: int = 1, pin_memory: bool = False
    ):
        self.dataset, self.config, self.rank, self.world = dataset, config, rank, world
        self.steps_per_epoch = len(dataset) // config.images_per_step
        self._planned = _Planned()
        self._loader = None
        if config.workers:
            self._loader = DataLoader(
                dataset,
                batch_sampler=self._planned,
                num_workers=config.workers,
                persistent_workers=True,
                pin_memory=pin_memory,
            )

    def rows(self, epoch: int, number: int) -> list[int]:
        """Row numbers of step ``number`` (from 0) of an epoch, this process's share."""
        order = epoch_order(self.config.seed, epoch, len(self.dataset))
        size = self.config.images_per_step
        return order[number * size : (number + 1) * size][self.rank :: self.world].tolist()

    def from_batch(self, epoch: int, number: int) -> Iterator[Item]:
        """The images of an epoch's steps from ``number`` on."""
        set_epoch(self.dataset, epoch)
        order = epoch_order(self.config.seed, epoch, len(self.dataset))
        size, count = self.config.images_per_step, self.steps_per_epoch
        mine = order[: count * size].reshape(count, size)[number:, self.rank :: self.world].tolist()
        if self._loader is None:
            return (stack(self.dataset, rows) for rows in mine)
        self._planned.batches = mine
        return iter(self._loader)


class _Planned:
    """A batch sampler whose batches are set before each epoch, so that the loader's workers live on."""

    def __init__(self):
        self.batches: Sequence[list[int]] = ()

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def all_batches(dataset: ItemDataset, workers: int = 0, rank: int = 0, world: int = 1) -> Iterator[Item]:
    """Every image of a data set once, in order; of several processes each its share."""
    rows = range(rank, len(dataset), world)
    chunks = [list(rows[start : start + EVALUATION_BATCH]) for start in range(0, len(rows), EVALUATION_BATCH)]
    if not workers:
        return (stack(dataset, chunk) for chunk in chunks)
    return iter(DataLoader(dataset, batch_sampler=chunks, num_workers=workers))


def mean_object_area(dataset: ItemDataset, images: int = 256) -> float | None:
    """Mean object share of up to so many annotated images, evenly spread; None: none has a mask."""
    annotated = torch.as_tensor(dataset.annotated).nonzero()[:, 0].tolist()
    if not annotated:
        return None
    rows = annotated[:: -(-len(annotated) // images)]
    return float(np.mean([float(dataset[row].mask.double().mean()) for row in rows]))
