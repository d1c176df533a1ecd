"""What ``last.pt`` and ``best.pt`` hold of a training, and a training brought back to where it stood."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .runs import plain

if TYPE_CHECKING:
    from .trainer import Trainer


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """Everything that a resumed run needs, for ``last.pt``."""
    state = best_state_of(trainer) | {
        "optimizer": trainer.optimizer.state_dict(),
        "criterion": trainer.criterion.state_dict(),
        "step": trainer.step,
        "best": trainer.best,
        "history": trainer.history.state(),
    }
    if trainer.average is not None:  # "model" is the average then
        state |= {"raw": trainer.network.state_dict(), "averaged": int(trainer.average.n_averaged)}
    return state


def best_state_of(trainer: "Trainer") -> dict[str, Any]:
    """The network that is evaluated alone, for ``best.pt``."""
    return {
        "config": plain(asdict(trainer.config)),
        "weights_sha256": trainer.weights_sha256,
        "classes": list(trainer.data.classes),
        "size": trainer.data.size,
        "epoch": trainer.epoch,
        "mean": list(trainer.network.preprocessing.mean),
        "std": list(trainer.network.preprocessing.std),
        "model": trainer.evaluated.state_dict(),
    }


def load(trainer: "Trainer", state: Mapping[str, Any]) -> None:
    """Puts a training where a checkpoint of :func:`state_of` stands.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError, AttributeError: it does not fit.
    """
    if state["classes"] != list(trainer.data.classes) or state["size"] != trainer.data.size:
        raise ValueError("the checkpoint's classes or image size are not those of the data")
    if not (isinstance(state["step"], int) and isinstance(state["best"], float)):
        raise TypeError("the checkpoint's step or best accuracy is no number")
    trainer.evaluated.load_state_dict(state["model"])
    if trainer.average is not None:
        trainer.network.load_state_dict(state["raw"])
        trainer.average.n_averaged.fill_(state["averaged"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.criterion.load_state_dict(state["criterion"])
    trainer.step, trainer.best = state["step"], state["best"]
    trainer.history.load(state["history"])
