"""``sib-lab demo``: a small, fixed comparison."""

from dataclasses import asdict
from pathlib import Path

from ..reporting.results import RUNS
from ..training.config import TrainConfig, recipe
from ..training.runs import RunError
from .plan import Plan

#: S-IB's training method for each preset of its loss, and where its foreground comes from for each ``--mask``.
METHODS = {"balanced": "sib", "paper": "sib-paper"}
MASKS = {"given": "given", "density": "self-made"}
THREADS = 2  #: of PyTorch, so that the numbers are the same on every machine of a kind


def demo_plan(seed: int = 0, epochs: int = TrainConfig.epochs, mask: str = "given", preset: str = "balanced") -> Plan:
    """Cross-entropy against S-IB: digits on textures, the small CNN, one seed.

    Args:
        mask: ``given``: the exact strokes; ``density``: made from the network's own gradient.
        preset: constants of the S-IB loss, ``balanced`` or ``paper``; the training recipe is the same for both.
    """
    base = recipe("balanced", "digits", "small_cnn", seed=seed, epochs=epochs, threads=THREADS)
    of_sib = {"method": METHODS[preset], "masks": MASKS[mask]}
    configs = [TrainConfig(**(asdict(base) | changes)) for changes in ({"method": "ce"}, of_sib)]
    return Plan({config.method: config for config in configs}, (seed,))


def check_resumable(folder: Path) -> None:
    """
    Raises:
        RunError: there is nothing in ``folder`` to go on with.
    """
    if not (folder / RUNS).is_dir():
        raise RunError(f"There is nothing to go on with in {folder}: start without --resume.")
