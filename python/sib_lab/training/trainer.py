"""Training of any method on any data set and network, interrupted and resumed without a trace in the result.

Everything random follows from the seed and the number of the step: the initial weights, the order of the batches
(batches.py), augmentation (drawn for each epoch and image) and what the network itself draws (the generators are set
before each step). So weights, buffers, optimiser and the number of steps done are the whole state of a
training, and a run that is killed and resumed, at whatever step, ends with the same numbers.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import DataSets, Item
from ..data.base import check_classes
from ..networks.build import build_network
from ..networks.feature_maps import cam_layer
from .batches import Batches, all_batches, mean_object_area
from .config import STEP_EPOCHS, STEP_FACTOR, TrainConfig
from .losses import Forward, TrainingLoss, make_criterion, submodule
from .runs import TrainingError, plain, quantiles

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CURVE_POINTS = 1000  #: about so many points has a curve of steps.csv
KEPT_SECONDS = 20_000  #: step times kept, the latest
NEED_MASKS = ("rrr", "energy-loss")  #: methods that do nothing without an annotation


class Keeping(Protocol):
    """What keeps a training (:class:`sib_lab.training.keeper.Keeper`)."""

    def checkpoint(self, trainer: "Trainer") -> None: ...

    def best(self, trainer: "Trainer") -> None: ...

    def is_due(self, step: int) -> bool: ...


def learning_rate(config: TrainConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Of step ``step`` (from 0) of ``steps``.

    ``one-cycle``: linear warm-up, then half a cosine down to 0. ``step``: times 0.1 every 30 epochs. ``constant``.
    """
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "step":
        return config.learning_rate * STEP_FACTOR ** (step // steps_per_epoch // STEP_EPOCHS)
    done = (step + 1) / steps
    if done < config.warm_up:
        return config.learning_rate * done / config.warm_up
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - config.warm_up) / (1 - config.warm_up)))


class Trainer:
    """One network on its way through training, in one process.

    Raises:
        TrainingError, ValueError: options that this data set cannot meet.
    """

    def __init__(self, config: TrainConfig, data: DataSets, fabric: "Fabric"):
        check_classes(data.classes, data.train.labels, data.name)
        if config.method in NEED_MASKS and not data.train.annotated.any():
            raise TrainingError(
                f"The method {config.method} needs masks, but no training image of {data.name} has one."
            )
        self.config, self.data, self.fabric = config, data, fabric
        self.batches = Batches(
            data.train, config, fabric.global_rank, fabric.world_size, pin_memory=fabric.device.type == "cuda"
        )
        if self.batches.steps_per_epoch == 0:
            raise TrainingError(
                f"There are {len(data.train)} training images in {data.name}, too few for batches of "
                f"{config.batch_size}: take a smaller batch size."
            )
        self.steps = self.batches.steps_per_epoch * config.epochs
        self.step = 0  #: done so far

        torch.manual_seed(config.seed)
        weights = Path(config.weights) if config.weights else None
        self.network = fabric.to_device(
            build_network(config.network, len(data.classes), data.size, weights, config.mean, config.std)
        )
        self.criterion = fabric.to_device(_criterion(config, data, self.network))
        self.model = Forward(fabric.strategy.setup_module(self.network), fabric.autocast)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.network.parameters() if p.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.epochs: list[dict[str, float]] = []  #: the lines of metrics.csv
        self.curves: dict[str, list[float]] = {}  #: the columns of steps.csv
        self.seconds: list[float] = []  #: of the latest steps
        #: of loss parts since the epoch and the window of the curves began: sum and number of steps
        self.sums: dict[str, dict[str, tuple[float, int]]] = {"epoch": {}, "window": {}}
        self.best = -1.0  #: accuracy on the first validation split

    # ------------------------------------------------------------------------------------------ training

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.batches.steps_per_epoch

    @property
    def window(self) -> int:
        """Steps in a point of the curves."""
        return max(1, self.steps // CURVE_POINTS)

    def run(self, stop_signal: Callable[[], int | None], keep: Keeping, show: Callable[["Trainer"], None]) -> None:
        """Trains from where it stands to the last epoch.

        Args:
            stop_signal: the number of a signal that came, or None.
            keep: writes checkpoints and curves.
            show: called after every step.

        Raises:
            KeyboardInterrupt, SystemExit: a signal came; the step was finished and a checkpoint written.
        """
        while self.step < self.steps:
            epoch, number = divmod(self.step, self.batches.steps_per_epoch)
            for item in self.batches.from_batch(epoch, number):
                stopped, due = self.train_step(item, stop_signal, keep.is_due)
                if self.step % self.batches.steps_per_epoch == 0:
                    self._end_epoch(keep)
                elif due or stopped:
                    keep.checkpoint(self)
                show(self)
                if stopped:
                    raise KeyboardInterrupt if stopped == signal.SIGINT else SystemExit(128 + stopped)

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
        x, y, mask, annotated = self._on_device(item)
        self._seed_step()
        start = time.perf_counter()
        rate = learning_rate(self.config, self.step, self.steps, self.batches.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.criterion.advance(self.step / self.steps)
        parts = self.criterion(self.model, x, y, mask, annotated)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(parts["loss"])
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        values, (stopped, due) = self._agreed(
            parts | {"gradient_norm": norm}, (float(stop_signal() or 0), float(is_due(self.step + 1)))
        )
        self._check_finite(values, rate)
        self.optimizer.step()
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)
        self.seconds.append(time.perf_counter() - start)
        self.step += 1
        self._add(values)
        return int(stopped), due > 0

    def _on_device(self, item: Item) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Image, label, mask (None where no sample has one) and annotated (None where all have)."""
        x, y = self.fabric.to_device((item.image, item.label))
        known = torch.as_tensor(item.annotated, dtype=torch.bool)
        if not known.any():
            return x, y, None, None
        mask = self.fabric.to_device(item.mask)
        return x, y, mask, None if known.all() else self.fabric.to_device(known)

    def _seed_step(self) -> None:
        """Sets the generators that a network may draw from (dropout) for this step of this process."""
        words = np.random.SeedSequence([self.config.seed, self.step, self.fabric.global_rank])
        key = int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
        torch.default_generator.manual_seed(key)
        if self.fabric.device.type == "cuda":
            torch.cuda.manual_seed(key)

    def _agreed(
        self, parts: Mapping[str, Tensor], flags: tuple[float, ...]
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Loss parts, averaged over the processes, and flags, the highest of any process, as numbers."""
        values = torch.stack([value.detach().double() for value in parts.values()])
        if self.fabric.world_size > 1:
            values = self.fabric.all_reduce(values, reduce_op="mean")
            flags = self.fabric.all_reduce(torch.tensor(flags, device=values.device), reduce_op="max").tolist()
        return dict(zip(parts, values.tolist(), strict=True)), tuple(flags)

    def _check_finite(self, values: Mapping[str, float], rate: float) -> None:
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                lower = "a lower learning rate" if self.config.method == "ce" else "a lower learning rate or strength"
                precise = "" if self.config.precision == "32-true" else ", or precision 32-true"
                raise TrainingError(
                    f"The {name.replace('_', ' ')} is {values[name]} at step {self.step + 1} of {self.steps} "
                    f"(learning rate {rate:.3g}): train anew with {lower}{precise}."
                )

    def _add(self, values: Mapping[str, float]) -> None:
        """Notes a step's loss parts in the sums and, at the end of a window, in the curves."""
        for sums in self.sums.values():
            for name, value in values.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + value, count + 1)
        if self.step % self.window == 0:
            points = len(self.curves.setdefault("step", []))
            self.curves["step"].append(self.step)
            means = _means(self.sums["window"])
            for name in means | self.curves:
                if name != "step":  # a part that not every step has is NaN where a window has none
                    curve = self.curves.setdefault(name, [math.nan] * points)
                    curve.append(means.get(name, math.nan))
            self.sums["window"] = {}
        self.seconds = self.seconds[-max(KEPT_SECONDS, self.batches.steps_per_epoch) :]

    def _end_epoch(self, keep: Keeping) -> None:
        """Validates, adds the epoch's line to the history and saves."""
        count = self.batches.steps_per_epoch
        line = {
            "epoch": self.epoch,
            "step": self.step,
            "learning_rate": learning_rate(self.config, self.step - 1, self.steps, count),
        } | _means(self.sums["epoch"])
        self.sums["epoch"] = {}
        for name, split in self.data.validation.items():
            line[f"accuracy_{name}"], line[f"cross_entropy_{name}"] = self.evaluate(split)
        line |= {f"seconds_{name}": value for name, value in quantiles(self.seconds[-count:]).items()}
        self.epochs.append(line)
        accuracy = line[f"accuracy_{next(iter(self.data.validation))}"]
        if accuracy >= self.best:  # of equals the one that trained longer
            self.best = accuracy
            keep.best(self)
        keep.checkpoint(self)

    def evaluate(self, split: torch.utils.data.Dataset) -> tuple[float, float]:
        """Accuracy and mean cross-entropy on a split, in eval mode, over all processes."""
        self.model.eval()
        # Past the wrapper of distributed training: processes may have different numbers of batches.
        model = Forward(self.network, self.fabric.autocast)
        sums = torch.zeros(3, dtype=torch.float64, device=self.fabric.device)
        with torch.no_grad():
            for item in all_batches(split, self.config.workers, self.fabric.global_rank, self.fabric.world_size):
                x, y = self.fabric.to_device((item.image, item.label))
                logits = model(x)
                loss = F.cross_entropy(logits, y, reduction="sum")
                sums += torch.stack([(logits.argmax(1) == y).sum(), loss, torch.ones_like(y).sum()]).double()
        if self.fabric.world_size > 1:
            sums = self.fabric.all_reduce(sums, reduce_op="sum")
        right, loss, count = sums.tolist()
        return right / count, loss / count

    # ------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, for ``last.pt``."""
        return self.best_state() | {
            "optimizer": self.optimizer.state_dict(),
            "criterion": self.criterion.state_dict(),
            "step": self.step,
            "best": self.best,
            "sums": self.sums,
            "history": {"epochs": self.epochs, "curves": self.curves, "seconds": self.seconds},
        }

    def best_state(self) -> dict[str, Any]:
        """The network alone, for ``best.pt``."""
        return {
            "config": plain(asdict(self.config)),
            "classes": list(self.data.classes),
            "size": self.data.size,
            "epoch": self.epoch,
            "mean": list(self.network.preprocessing.mean),
            "std": list(self.network.preprocessing.std),
            "model": self.network.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Puts the training where a checkpoint of :meth:`state` stands."""
        if state["classes"] != list(self.data.classes) or state["size"] != self.data.size:
            raise ValueError("the checkpoint's classes or image size are not those of the data")
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.criterion.load_state_dict(state["criterion"])
        self.step, self.best, self.sums = state["step"], state["best"], state["sums"]
        history = state["history"]
        self.epochs, self.curves, self.seconds = history["epochs"], history["curves"], history["seconds"]


def _means(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items()}


def _listed(value: Any) -> list:
    """What an option for one or several names holds."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _criterion(config: TrainConfig, data: DataSets, network: nn.Module) -> TrainingLoss:
    options, layer, area = config.loss_options, None, None
    if config.method == "energy-loss" and options.get("attribution", "gradcam") == "gradcam":
        layer = None if "layer" in options else cam_layer(network)
    if config.method == "centre-mask" and "centre_area" not in options:
        area = mean_object_area(data.train)
    try:
        criterion = make_criterion(config, layer, area)
        for named in (*_listed(options.get("layer")), *_listed(options.get("layers"))):
            submodule(network, named)
        return criterion
    except ValueError as error:
        raise TrainingError(f"The loss cannot be made: {error}.") from error
