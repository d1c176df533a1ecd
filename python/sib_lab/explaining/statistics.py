"""Means with what is needed to judge them: 95 % intervals over images or over seeds, and paired differences.

A value that is undefined (NaN) is counted and left out, never averaged in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

NORMAL = 1.959963984540054  #: 97.5 % quantile of the normal distribution
LEVEL = 0.975  #: quantile that leaves 5 % outside on both sides together

Values = Tensor | Sequence[float]


@dataclass(frozen=True)
class Estimate:
    """A mean and the half width of its 95 % interval."""

    mean: float  #: NaN where nothing was defined
    half_width: float  #: of the 95 % interval of the mean; NaN for under 2 values
    count: int  #: values averaged
    undefined: int  #: values left out because they are NaN


@dataclass(frozen=True)
class Difference(Estimate):
    """The mean of paired differences b - a; ``count`` and ``undefined`` count pairs."""

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval excludes zero; never for under 2 pairs, whose interval is not known."""
        return abs(self.mean) > self.half_width


def estimate(values: Values) -> Estimate:
    """Mean of values [N] over images, with the normal approximation's interval (for tens of images and more)."""
    defined, undefined = _defined(values)
    return Estimate(*_mean_and_half_width(defined, NORMAL), len(defined), undefined)


def over_seeds(values: Values) -> Estimate:
    """Mean of values [N] over training seeds, with Student's t interval (exact for normally distributed values)."""
    defined, undefined = _defined(values)
    return Estimate(*_mean_and_half_width(defined, _quantile(len(defined))), len(defined), undefined)


def paired_difference(a: Values, b: Values) -> Difference:
    """Mean of b - a over seeds, pair by pair, with Student's t interval.

    Pairing takes out what a seed does to both (data, initial weights, order of batches), so it sees differences that
    two separate intervals hide.

    Args:
        a, b: values [N] of the same seeds in the same order; a pair with a NaN is left out and counted.

    Raises:
        ValueError: ``a`` and ``b`` have different lengths.
    """
    a, b = _vector(a), _vector(b)
    if len(a) != len(b):
        raise ValueError(f"a and b must hold the same seeds in the same order: got {len(a)} and {len(b)} values")
    defined, undefined = _defined(b - a)
    return Difference(*_mean_and_half_width(defined, _quantile(len(defined))), len(defined), undefined)


def _vector(values: Values) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if values.dim() != 1:
        raise ValueError(f"values must be one number an image or a seed [N]: got shape {list(values.shape)}")
    return values


def _defined(values: Values) -> tuple[Tensor, int]:
    """The values that are not NaN, and how many are."""
    values = _vector(values)
    defined = values[~values.isnan()]
    return defined, len(values) - len(defined)


def _quantile(count: int) -> float:
    """Student's t at LEVEL for the mean of ``count`` values."""
    return float(stdtrit(count - 1, LEVEL)) if count > 1 else math.nan


def _mean_and_half_width(values: Tensor, quantile: float) -> tuple[float, float]:
    half_width = quantile * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), half_width
