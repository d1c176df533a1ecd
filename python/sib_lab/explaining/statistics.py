"""Means with what is needed to judge them: 95 % intervals over images or over seeds, and paired differences.

Shares of images (accuracy, hits) have intervals of their own, which stay within [0,1] and do not shrink to nothing
where all of few images agree.

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
    """A mean and its 95 % interval."""

    mean: float  #: NaN where nothing was defined
    low: float  #: of the 95 % interval of the mean; NaN where there is none
    high: float
    count: int  #: values averaged
    undefined: int  #: values left out because they are NaN

    @property
    def half_width(self) -> float:
        """Half of the interval's width; NaN where there is none."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference(Estimate):
    """The mean of paired differences b - a; ``count`` and ``undefined`` count pairs."""

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval excludes zero; never for under 2 pairs, whose interval is not known."""
        return self.low > 0 or self.high < 0


def estimate(values: Values) -> Estimate:
    """Mean of values [N] over images, with the normal approximation's interval (for tens of images and more)."""
    defined, undefined = _defined(values)
    return Estimate(*_mean_and_interval(defined, NORMAL), len(defined), undefined)


def share(values: Values) -> Estimate:
    """Mean of hits [N] in [0,1] over images, with Wilson's score interval (Wilson 1927).

    Parts of a hit, of which a tie has an expected one, vary less than whole ones: their interval errs on the wide side.
    """
    defined, undefined = _defined(values)
    count, z2 = len(defined), NORMAL**2
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0, undefined)
    mean = defined.mean().item()
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (mean * (1 - mean) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return Estimate(mean, max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean)), count, undefined)


def over_seeds(values: Values) -> Estimate:
    """Mean of values [N] over training seeds, with Student's t interval (exact for normally distributed values)."""
    defined, undefined = _defined(values)
    return Estimate(*_mean_and_interval(defined, _quantile(len(defined))), len(defined), undefined)


def paired_difference(a: Values, b: Values) -> Difference:
    """Mean of b - a over seeds, pair by pair, with Student's t interval.

    Pairing takes out what a seed does to both (data, initial weights, order of batches), so it sees differences that
    two separate intervals hide.

    Args:
        a, b: values [N] of the same seeds in the same order; a pair with a NaN is left out and counted.

    Raises:
        ValueError: ``a`` and ``b`` have different lengths.
    """
    defined, undefined = _pairs(a, b)
    return Difference(*_mean_and_interval(defined, _quantile(len(defined))), len(defined), undefined)


def paired_difference_of_shares(a: Values, b: Values) -> Difference:
    """Mean of b - a over images that both hit or miss, in [0,1], with the interval of Agresti & Min (2005).

    It is the normal one after half an image has been added to each of the four outcomes (hit by both, one, the other,
    none). Arguments and errors as for :func:`paired_difference`.
    """
    defined, undefined = _pairs(a, b)
    count = len(defined)
    if not count:
        return Difference(math.nan, math.nan, math.nan, 0, undefined)
    gained, lost = (defined.clamp_min(0).sum().item() + 0.5, (-defined).clamp_min(0).sum().item() + 0.5)
    padded = count + 2
    centre = (gained - lost) / padded
    half = NORMAL * math.sqrt(gained + lost - (gained - lost) ** 2 / padded) / padded
    mean = defined.mean().item()
    return Difference(mean, max(-1.0, min(centre - half, mean)), min(1.0, max(centre + half, mean)), count, undefined)


def _pairs(a: Values, b: Values) -> tuple[Tensor, int]:
    """b - a where both are defined, and how many are not."""
    a, b = _vector(a), _vector(b)
    if len(a) != len(b):
        raise ValueError(f"a and b must hold the same seeds in the same order: got {len(a)} and {len(b)} values")
    return _defined(b - a)


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


def _mean_and_interval(values: Tensor, quantile: float) -> tuple[float, float, float]:
    half_width = quantile * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    mean = values.mean().item()
    return mean, mean - half_width, mean + half_width
