"""norm_double_backward: the second derivative of batch and group normalisation, two passes instead of some twenty."""

import torch
from torch import Tensor

from .. import reference
from . import dispatch


def _wide(grad_grad, grad, x, mean, rstd, weight):
    dtype = reference.accumulation_dtype(x.dtype)
    return tuple(t if t is None else t.to(dtype) for t in (grad_grad, grad, x, mean, rstd, weight))


def _forward(grad_grad, grad, x, mean, rstd, weight, eps):
    grad_of_grad, grad_of_x, grad_of_weight = reference.norm_double_backward(
        *_wide(grad_grad, grad, x, mean, rstd, weight)
    )
    like_x = dispatch.field_format(x)
    gradients = (t.to(x.dtype).contiguous(memory_format=like_x) for t in (grad_of_grad, grad_of_x))
    return *gradients, grad_of_weight


def _fake(grad_grad, grad, x, mean, rstd, weight, eps):
    return dispatch.empty_field(x), dispatch.empty_field(x), mean.new_empty(x.shape[1])


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _rule(overload):
    """The third derivative: the differentiable formula with the statistics as what they are, functions of x."""

    def rule(ctx, *grad_outputs):
        mean, rstd = ctx.saved_tensors[3:5]
        dims = (0, *range(2, ctx.saved_tensors[2].dim())) if mean.dim() == 1 else (2,)

        def formula(grad_grad, grad, x, _mean, _rstd, weight):
            values = _wide(grad_grad, grad, x, None, None, weight)
            wide = values[2] if mean.dim() == 1 else values[2].reshape(*mean.shape, -1)
            variance, average = torch.var_mean(wide, dims, correction=0)
            outputs = reference.norm_double_backward(*values[:3], average, (variance + ctx.eps).rsqrt(), values[5])
            return tuple(t.to(x.dtype) for t in outputs[:2]) + outputs[2:]

        needed = [*ctx.needs_input_grad[:3], False, False, ctx.needs_input_grad[5]]
        return *dispatch.partial_derivatives(formula, ctx.saved_tensors, grad_outputs, needed), None

    return rule


dispatch.define(
    "norm_double_backward",
    "(Tensor grad_grad, Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, float eps)"
    " -> (Tensor grad_of_grad, Tensor grad_of_x, Tensor grad_of_weight)",
    _forward,
    dispatch.triton_kernel("norm_double_backward", "forward"),
    _fake,
    _save,
    _rule,
)


def traffic(x: Tensor) -> int:
    """The least bytes: v, g and x in twice (the sums come first), two gradients out."""
    return 8 * x.nbytes


def norm_double_backward(
    grad_grad: Tensor,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    eps: float,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of <grad_grad, dx> with respect to grad, x and weight; dx is the layer's input gradient.

    Args:
        grad_grad: cotangent of dx, [B,C,...] as ``x``.
        grad: the gradient that came into the layer's backward, as ``x``.
        x: the layer's input [B,C,...].
        mean, rstd: the statistics of the forward, [C] (batch normalisation) or [B,G] (group normalisation), in the
            accumulation type of x; rstd = 1/sqrt(var + eps).
        weight: the layer's scale [C] in the same type, or None for 1.
        eps: the layer's; only a third derivative needs it.
        impl: see :func:`density_mask`.

    Returns:
        (d/dgrad, d/dx, d/dweight), the formulas of :func:`sib_ext.reference.norm_double_backward`; differentiable.
    """
    op = dispatch.overload("norm_double_backward", dispatch.resolve(impl, x.device.type))
    return op(grad_grad, grad, x, mean, rstd, weight, eps)
