"""Training that can be interrupted at any batch and resumed without a trace in the result."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sib_ext import SpatialIBLoss

from .config import Config
from .data.digits_on_textures import Split, normalise
from .measure import accuracy
from .models import SmallCNN
from .train import CheckpointError

#: The two networks of the demo: key in checkpoints and results -> name for people.
NETWORKS = {"cross_entropy": "Cross-entropy", "spatial_ib": "S-IB"}
WARM_UP = 0.1  #: share of all steps over which the learning rate rises


class Learner:
    """One network on its way through training.

    The order of the batches follows from the seed and the epoch, and the network has no other randomness after its
    initialisation, so weights, BatchNorm buffers, optimiser and the number of steps done are the whole state.
    """

    def __init__(self, config: Config, criterion: nn.Module):
        """``criterion``: nn.CrossEntropyLoss, or SpatialIBLoss (then ``config.mask`` says which mask it gets)."""
        self.config = config
        self.criterion = criterion
        torch.manual_seed(config.seed)
        self.model = SmallCNN()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=config.weight_decay)
        self.steps_done = 0
        self.history: dict[str, list[float]] = {
            "loss": [],  # per step, like the next two
            "cross_entropy": [],
            "seconds": [],
            "validation_matched": [],  # accuracy, per epoch, like the next
            "validation_uncorrelated": [],
        }

    @property
    def steps_per_epoch(self) -> int:
        """The last, smaller batch is left out."""
        return self.config.train_digits * self.config.copies // self.config.batch_size

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    @property
    def at_epoch_end(self) -> bool:
        return self.steps_done % self.steps_per_epoch == 0

    def batch(self) -> Tensor:
        """Row numbers [batch_size] of the next batch."""
        epoch, number = divmod(self.steps_done, self.steps_per_epoch)
        rows = self.config.train_digits * self.config.copies
        order = np.random.default_rng([self.config.seed, epoch]).permutation(rows)
        return torch.from_numpy(order[number * self.config.batch_size :][: self.config.batch_size])

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to 0."""
        done = (self.steps_done + 1) / self.steps
        if done < WARM_UP:
            return self.config.learning_rate * done / WARM_UP
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))

    def step(self, split: Split) -> None:
        """One optimiser step on the next batch of ``split``."""
        rows = self.batch()
        x, labels, masks = normalise(split.images[rows]), split.labels[rows], split.masks[rows]
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.model.train()
        loss, cross_entropy = self._losses(x, labels, masks)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.history["seconds"].append(time.perf_counter() - start)
        self.history["loss"].append(loss.item())
        self.history["cross_entropy"].append(cross_entropy.item())
        self.steps_done += 1

    def _losses(self, x: Tensor, labels: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to descend and the cross-entropy in it, scalars."""
        if not isinstance(self.criterion, SpatialIBLoss):
            loss = self.criterion(self.model(x), labels)
            return loss, loss.detach()
        x.requires_grad_()
        terms = self.criterion.terms(self.model(x), labels, x, mask=masks if self.config.mask == "given" else None)
        return terms.loss, terms.cross_entropy.detach()

    def validate(self, splits: Mapping[str, Split]) -> None:
        """Adds this epoch's accuracy on both validation splits to the history."""
        for name in ("validation_matched", "validation_uncorrelated"):
            self.history[name].append(accuracy(self.model, splits[name]))

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
            "history": self.history,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]
        self.history = state["history"]


def make_learners(config: Config) -> dict[str, Learner]:
    """Both networks, from the same initial weights."""
    return {
        "cross_entropy": Learner(config, nn.CrossEntropyLoss()),
        "spatial_ib": Learner(config, SpatialIBLoss(config.preset)),
    }


def fit(
    learners: Sequence[Learner],
    splits: Mapping[str, Split],
    save: Callable[[], None],
    on_step: Callable[[Learner], None],
) -> None:
    """Trains each learner from where it stands to its last epoch; calls ``save`` at the end of every epoch.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the batch under way was finished and ``save`` called.
    """
    with deferred_interrupt() as interrupted:
        for learner in learners:
            while learner.steps_done < learner.steps:
                learner.step(splits["train"])
                if learner.at_epoch_end:
                    learner.validate(splits)
                on_step(learner)
                if learner.at_epoch_end or interrupted():
                    save()
                if interrupted():
                    raise KeyboardInterrupt


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGINT only sets a flag (yielded as a function); a second one interrupts at once."""
    pressed = False

    def on_interrupt(signum, frame):
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


# ------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, config: Config, learners: Mapping[str, Learner]) -> None:
    """Writes beside ``path`` and renames, so that ``path`` is whole at every moment."""
    state = {"config": asdict(config), "learners": {name: learner.state_dict() for name, learner in learners.items()}}
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, config: Config, learners: Mapping[str, Learner]) -> None:
    """Puts the learners where the checkpoint stands.

    Raises:
        CheckpointError: no file, not readable as a checkpoint, or written with another configuration.
    """
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint at {path}: start without --resume.")
    broken = CheckpointError(f"The checkpoint {path} cannot be read: start anew without --resume.")
    try:
        state = torch.load(path, weights_only=True)
        saved = state["config"]
    except Exception as error:  # torch.load fails in many ways on a damaged file
        raise broken from error
    differing = {name: saved.get(name) for name, value in asdict(config).items() if saved.get(name) != value}
    if differing:
        options = ", ".join(f"{name} = {value}" for name, value in differing.items())
        raise CheckpointError(
            f"The checkpoint {path} was made with {options}: "
            "resume with the same options, or start anew without --resume."
        )
    try:
        for name, learner in learners.items():
            learner.load_state_dict(state["learners"][name])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise broken from error
