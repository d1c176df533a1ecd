"""A gradient compared with central differences, along random directions."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .finding import OK, UNVERIFIED, WRONG

# Central differences in float64, relative to each tensor's size. The first step is so small that hardly any ReLU of a
# large network changes sides within it, and still 1e4 times coarser than rounding; the others tell noise from error.
STEPS = (1e-8, 1e-7, 1e-9, 1e-6)
DIRECTIONS = 3  # and two, if they agree
AGREE = 1e-4  # relative: the directional derivative equals the difference quotient
SETTLED = 1e-3  # relative: the difference quotients of two steps equal each other
FLOOR = 1e-3  # directional derivatives below this share of ``norm`` are compared absolutely


def against_differences(
    value: Callable[[], float],
    variables: list[Tensor],
    gradients: Iterable[Tensor | None],
    norm: float,
    direction: Callable[[list[Tensor], int], list[Tensor]],
) -> tuple[str, float]:
    """Status and relative error of the ``gradients`` of ``value()``, which depends on the ``variables``.

    Args:
        norm: the size of what is differentiated, which says what is small.
        direction: (variables, k) -> the k-th random direction.
    """
    here = [v.detach().clone() for v in variables]
    verdicts = []
    for k in range(DIRECTIONS):
        along = direction(variables, k)

        def quotient(step: float, along: list[Tensor] = along) -> float:
            values = []
            for sign in (1, -1):
                _move(variables, here, along, sign * step)
                values.append(value())
            return (values[0] - values[1]) / (2 * step)

        pairs = zip(gradients, along, strict=True)
        found = sum(float(torch.dot(g.flatten(), d.flatten())) for g, d in pairs if g is not None)
        verdicts.append(_verdict(found, quotient, FLOOR * norm))
        _move(variables, here)
        if [status for status, _ in verdicts] == [OK, OK]:
            break
    wrong = [error for status, error in verdicts if status == WRONG]
    right = [error for status, error in verdicts if status == OK]
    if len(wrong) > DIRECTIONS / 2:
        return WRONG, max(wrong)
    return (OK, max(right)) if right and not wrong else (UNVERIFIED, math.nan)


@torch.no_grad()
def _move(variables: list[Tensor], to: list[Tensor], direction: list[Tensor] | None = None, step: float = 0.0) -> None:
    for i, (variable, at) in enumerate(zip(variables, to, strict=True)):
        variable.copy_(at)
        if direction is not None:
            variable.add_(direction[i], alpha=step)


def _verdict(found: float, quotient: Callable[[float], float], floor: float) -> tuple[str, float]:
    """Compare a directional derivative with difference quotients, which are noise where a kink lies inside the step.

    Agreement with any one step is no accident. Disagreement only counts where two steps agree with each other: the
    jump J at a kink adds J / 2h, which differs tenfold between steps.
    """

    def difference(a: float, b: float) -> float:
        return abs(a - b) / max(abs(a), abs(b), floor)

    quotients: list[float] = []
    for step in STEPS:
        value = quotient(step)
        error = difference(found, value)
        if error < AGREE:
            return OK, error
        spread = min((difference(value, other) for other in quotients), default=math.inf)
        if spread < SETTLED and error > 10 * spread:
            return WRONG, error
        quotients.append(value)
    return UNVERIFIED, math.nan
