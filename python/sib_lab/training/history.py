"""What a training notes of itself: the lines of ``metrics.csv``, the curves of ``steps.csv`` and seconds a step."""

import math
from collections.abc import Mapping
from typing import Any

from .runs import step_times

CURVE_POINTS = 1000  #: about so many points has a curve of steps.csv
KEPT_SECONDS = 20_000  #: step times kept, the latest


class History:
    """Of one training.

    Args:
        steps: of the whole training, as planned.
        steps_per_epoch: of an epoch.
    """

    def __init__(self, steps: int, steps_per_epoch: int):
        self.window = max(1, steps // CURVE_POINTS)  #: steps in a point of the curves
        self.steps_per_epoch = steps_per_epoch
        self.epochs: list[dict[str, float]] = []  #: the lines of metrics.csv
        self.curves: dict[str, list[float]] = {}  #: the columns of steps.csv
        self.seconds: list[float] = []  #: of the latest steps
        #: of loss parts since the epoch and the window of the curves began: sum and number of steps
        self.sums: dict[str, dict[str, tuple[float, int]]] = {"epoch": {}, "window": {}}

    def add(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Notes the loss parts of step ``step`` (from 1) in the sums and, at the end of a window, in the curves."""
        for sums in self.sums.values():
            for name, value in values.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + value, count + 1)
        if step % self.window == 0:
            self._add_point(step)
        self.seconds = [*self.seconds, seconds][-max(KEPT_SECONDS, self.steps_per_epoch) :]

    def _add_point(self, step: int) -> None:
        points = len(self.curves.setdefault("step", []))
        self.curves["step"].append(step)
        means = _means(self.sums["window"])
        for name in means | self.curves:
            if name != "step":  # a part that not every step has is NaN where a window has none
                curve = self.curves.setdefault(name, [math.nan] * points)
                curve.append(means.get(name, math.nan))
        self.sums["window"] = {}

    def end_epoch(self, line: Mapping[str, float], measured: Mapping[str, float]) -> None:
        """Adds a line: ``line``, the means of the epoch's loss parts, what was ``measured``, and seconds a step."""
        seconds = {
            f"seconds_{name}": value for name, value in step_times(self.seconds[-self.steps_per_epoch :]).items()
        }
        self.epochs.append({**line, **_means(self.sums["epoch"]), **measured, **seconds})
        self.sums["epoch"] = {}

    def epochs_without_better(self, measure: str) -> int:
        """Epochs since ``measure`` was last above all that it had been before; 0 without any epoch."""
        values = [line[measure] for line in self.epochs]
        return len(values) - 1 - values.index(max(values)) if values else 0

    def state(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "curves": self.curves, "seconds": self.seconds, "sums": self.sums}

    def load(self, state: Mapping[str, Any]) -> None:
        self.epochs, self.curves = state["epochs"], state["curves"]
        self.seconds, self.sums = state["seconds"], state["sums"]


def _means(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items()}
