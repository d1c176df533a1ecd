"""The verdict on one module, with reason and fix."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from .causes import FIX_CUT, FIX_FUNCTION, explain, named
from .errors import NotFinite, Unseen
from .finding import FAILS, OK, UNVERIFIED, WRONG, Finding
from .functions import rules
from .precision import in_float64, to_float64
from .probe import Probe
from .twin import first_line

NOISY = "central differences are too noisy here", "check with more or larger images"
CHANGING = (
    "it gives another result every time, with the same buffers and random numbers",
    "keep what it counts in a buffer, and draw from the generators of torch, numpy or Python",
)
FIX_REENTRANT = "a step takes it as it is; with use_reentrant=False it can be checked, and lets go of more memory"
FIX_RULE = (
    "put it on a branch that the logits do not depend on, or replace it by a function with its true derivative; or "
    "accept knowingly that the information terms reach the layers before it by that rule"
)
GRADIENT_WRONG = "its gradient is not the derivative of its forward: something in it is detached or rounded"
DERIVATIVE_WRONG = "its gradient is right, but a part of the gradient's own derivative is dropped"
FIX_DROPPED = "look for tensor hooks (Tensor.register_hook) that detach, and for operations from outside of PyTorch"


def judge(name: str, own: nn.Module, double: nn.Module, inputs: tuple, logits: Callable | None = None) -> Finding:
    """Does double backward run in the module's own precision, and is it right in float64?

    Args:
        double: the same module in float64.
        inputs, logits: as in :class:`Probe`.
    """
    finding = Finding(name, type(own).__name__, OK)
    probe = Probe(own, inputs, logits)
    try:
        probe.differentiate()
    except Unseen as error:
        return _unverified(finding, str(error), FIX_REENTRANT)
    except Exception as error:
        return _failed(finding, error, probe.functions)
    own.zero_grad()
    try:
        with in_float64(probe.leaves[0].device.type) as mode:
            probe = Probe(double, to_float64(inputs), logits)
            status, difference = probe.compare()
            if status != OK and mode.narrowed:
                return _unverified(finding, "a part of it computes in less than float64 whatever it is given")
            if status == WRONG:
                reason, fix = _explain_wrong(probe)
                return replace(finding, status=WRONG, reason=reason, fix=fix, error=difference)
            if status == UNVERIFIED:
                return _unverified(finding, *(NOISY if probe.repeats() else CHANGING))
    except (NotFinite, torch.OutOfMemoryError) as error:
        return _failed(finding, error, probe.functions)
    except Exception as error:
        return _unverified(finding, f"in float64 it raises {type(error).__name__}: {first_line(error)}")
    return replace(finding, error=difference)


def _unverified(finding: Finding, why: str, fix: str = "") -> Finding:
    return replace(finding, status=UNVERIFIED, reason=f"runs, but could not be verified: {why}", fix=fix)


def _failed(finding: Finding, error: Exception, functions: list[type]) -> Finding:
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    reason, fix = explain(error, functions)
    return replace(finding, status=FAILS, reason=reason, fix=fix)


def _explain_wrong(probe: Probe) -> tuple[str, str]:
    """Which custom Function is to blame, and of what; without one, whether the gradient itself is wrong."""
    tried = rules(probe.outputs, probe.functions)
    reasons, fixes = [], []
    if untrue := [rule.function for rule in tried if rule.gradient == WRONG]:
        reasons.append(
            f"the backward of {named(untrue)} is not the derivative of its forward (a gradient reversal, a "
            "straight-through estimator, a mistake), and the derivative of the VJP passes through it where that of the "
            "forward belongs"
        )
        fixes.append(FIX_RULE)
    if dropping := [rule.function for rule in tried if rule.derivative == WRONG]:
        reasons.append(
            f"the derivative of the backward of {named(dropping)} is wrong: it detaches, leaves torch, or uses "
            "results of the forward that are kept on ctx"
        )
        fixes.append(FIX_FUNCTION)
    if reasons:
        return "; ".join(reasons), "; ".join(fixes)
    unclear = [rule.function for rule in tried if UNVERIFIED in rule]
    or_that = f", or that is done by {named(unclear)}, which could not be tried alone" if unclear else ""
    if probe.compare_gradient()[0] == WRONG:
        return GRADIENT_WRONG + or_that, FIX_CUT
    return DERIVATIVE_WRONG + or_that, FIX_DROPPED
