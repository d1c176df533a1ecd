"""The training loop: optimiser steps, epochs, signals; what it notes is in history.py, what is kept in keeper.py."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..data import DataSets, Item
from ..data.base import ItemDataset
from .average import average_of
from .batches import Batches
from .config import TrainConfig
from .evaluation import evaluate
from .history import History
from .losses import Forward
from .making import check_data, make_loss, make_network, make_optimizer
from .processes import stopping
from .runs import file_hash
from .schedule import learning_rate
from .step import agreed, backward, check_finite, on_device, seed_step

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Keeping(Protocol):
    """What keeps a training: :class:`sib_lab.training.keeper.Keeper`, which knows the trainer."""

    def checkpoint(self, trainer: "Trainer") -> None: ...

    def best(self, trainer: "Trainer") -> None: ...

    def is_due(self, step: int) -> bool: ...


class Trainer:
    """One network on its way through training, in one process.

    Raises:
        TrainingError, DataError, NetworkError: options that this data set or network cannot meet.
    """

    def __init__(self, config: TrainConfig, data: DataSets, fabric: "Fabric"):
        check_data(config, data)
        self.config, self.data, self.fabric = config, data, fabric
        self.batches = Batches(
            data.train, config, fabric.global_rank, fabric.world_size, pin_memory=fabric.device.type == "cuda"
        )
        self.steps = self.batches.steps_per_epoch * config.epochs
        self.step = 0  #: done so far
        self.weights_sha256 = file_hash(config.weights)
        self.network: Any = fabric.to_device(make_network(config, data))
        self.criterion: Any = fabric.to_device(make_loss(config, data, self.network))
        self.average = None if config.ema is None else average_of(self.network, config.ema)
        self.model = Forward(fabric.strategy.setup_module(self.network), fabric.autocast)
        self.optimizer = make_optimizer(config, self.network)
        self.history = History(self.steps, self.batches.steps_per_epoch)
        self.best = -1.0  #: of ``selected_by``

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.batches.steps_per_epoch if self.step else 0

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept: with the averaged weights, where there are any."""
        return self.network if self.average is None else self.average.module

    @property
    def selected_by(self) -> str:
        """The measure that decides about the best network."""
        return f"{self.data.quality}_{next(iter(self.data.validation))}"

    @property
    def is_done(self) -> bool:
        """Whether the last step is done, or ``patience`` is at its end."""
        patience = self.config.patience
        stalled = patience is not None and self.history.epochs_without_better(self.selected_by) >= patience
        return stalled or self.step >= self.steps

    def run(self, stop_signal: Callable[[], int | None], keep: Keeping, show: Callable[["Trainer"], None]) -> None:
        """Trains from where it stands to the last epoch.

        Args:
            stop_signal: the number of a signal that came, or None.
            keep: writes checkpoints and curves.
            show: called after every step.

        Raises:
            KeyboardInterrupt, SystemExit: a signal came; the step was finished and a checkpoint written.
        """
        if not self.steps and not self.history.epochs:  # nothing to train: the network is kept as it is
            self._end_epoch(keep)
        while not self.is_done:
            for item in self.batches.from_batch(*divmod(self.step, self.batches.steps_per_epoch)):
                stopped, due = self.train_step(item, stop_signal, keep.is_due)
                if self.step % self.batches.steps_per_epoch == 0:
                    self._end_epoch(keep)
                elif due or stopped:
                    keep.checkpoint(self)
                show(self)
                if stopped:
                    raise stopping(stopped)

    def train_step(
        self,
        item: Item,
        stop_signal: Callable[[], int | None] = lambda: None,
        is_due: Callable[[int], bool] = lambda step: False,
    ) -> tuple[int, bool]:
        """One optimiser step; the answers of both functions, agreed on by all processes (0 for no signal).

        Raises:
            TrainingError: the loss or its gradient is not finite; the weights are those before the step.
        """
        images = on_device(item, self.fabric)
        seed_step(self.config.seed, self.step, self.fabric)
        start = time.perf_counter()
        rate = learning_rate(self.config, self.step, self.steps, self.batches.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.criterion.advance(self.step / self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        parts = backward(self.criterion, self.model, images, self.config.accumulate, self.fabric)
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        flags = (float(stop_signal() or 0), float(is_due(self.step + 1)))
        values, (stopped, due) = agreed(parts | {"gradient_norm": norm}, flags, self.fabric)
        check_finite(values, self.config, f"step {self.step + 1} of {self.steps} (learning rate {rate:.3g})")
        if self.config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)
        self.step += 1
        self.history.add(self.step, values, time.perf_counter() - start)
        return int(stopped), due > 0

    def _end_epoch(self, keep: Keeping) -> None:
        """Validates, adds the epoch's line to the history and saves."""
        count = self.batches.steps_per_epoch
        rate = learning_rate(self.config, self.step - 1, self.steps, count) if self.step else 0.0
        measured = {}
        for name, split in self.data.validation.items():
            measured[f"{self.data.quality}_{name}"], measured[f"cross_entropy_{name}"] = self.evaluate(split)
        self.history.end_epoch({"epoch": self.epoch, "step": self.step, "learning_rate": rate}, measured)
        if measured[self.selected_by] >= self.best:  # of equals the one that trained longer
            self.best = measured[self.selected_by]
            keep.best(self)
        keep.checkpoint(self)

    def evaluate(self, split: ItemDataset) -> tuple[float, float]:
        """As :func:`sib_lab.training.evaluation.evaluate`."""
        return evaluate(self.evaluated, split, self.fabric, self.config.workers)
