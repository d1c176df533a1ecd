"""How results are compared."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sib_ext import reference
from sib_ext.ops import dispatch

from .samples import Sample

VALUES, GRADIENTS = 1e-10, 1e-8  # relative L2 error in float64

# Moments of what a mask of ones leaves, and of what a mask of zeros leaves.
OF_FOREGROUND = ("sum_a", "sum_b", "sum_aa", "sum_bb", "sum_ab", "sum_abs_a")
OF_BACKGROUND = ("sum_c", "sum_cc", "sum_abs_c")


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Relative L2 error; absolute where the truth is zero or empty."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    size = float(truth.norm())
    return float((value - truth).norm()) / (size or 1.0)


def assert_near(value: Tensor, truth: Tensor, tolerance: float) -> None:
    error = relative_error(value, truth)
    assert error <= tolerance, f"relative L2 error {error:.3g} > {tolerance:.3g}"


def overload(name: str, implementation: str):
    return dispatch.overload(name, implementation)


def gradients(output: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], cotangents=None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, cotangents, retain_graph=True, materialize_grads=True)


def snapshot(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """A check, to be called later, that none of the tensors has changed in a single bit."""
    kept = [(t, t.detach().clone()) for t in tensors]

    def check() -> None:
        for tensor, before in kept:
            assert torch.equal(tensor, before)

    return check


def support_of(vjp: Tensor, sample: Sample) -> Tensor:
    return reference.density_mask_support(vjp.detach(), *sample.positional_options)


def on_support(support: Tensor, vjp: Tensor) -> Tensor:
    """Which pixels a support [B,4,K] names: [B,H*W]."""
    batch, _, height, width = vjp.shape
    return torch.zeros(batch, height * width, dtype=torch.bool).scatter(1, support.flatten(1), True)


def mask_gradient_errors(gradient: Tensor, truth: Tensor, vjp: Tensor, near_support: Tensor) -> tuple[float, float]:
    """Errors of a dL/dR of density_mask: of the pixels off the support, and of each sample's sum of dL/dg on it.

    A soft quantile's gradient sits on a few order statistics. Rounding can swap two neighbours in rank, which moves
    a large value from one pixel to another without being wrong; what must not change is the rest and their sum.
    """
    sign = vjp.double().mean(1, keepdim=True).sign()
    by_pixel = [(t.detach().double() * sign).sum(1).flatten(1) for t in (gradient, truth)]
    off = relative_error(*(t.masked_fill(near_support, 0) for t in by_pixel))
    on = relative_error(*(t.masked_fill(~near_support, 0).sum(1) for t in by_pixel))
    return off, on
