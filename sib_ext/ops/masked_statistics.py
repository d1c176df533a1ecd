"""masked_statistics: everything the estimators need of R, x and M, in one pass over them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..checks import check_field, check_mask_shape, check_same
from . import dispatch


class MaskedStatistics(NamedTuple):
    """What :func:`masked_statistics` returns."""

    moments: Tensor  #: [B,9]: sum a, sum b, sum a^2, sum b^2, sum ab, sum c, sum c^2, sum |R|M, sum |R|(1-M)
    gram_vjp: Tensor | None  #: [B,B]: a a^T
    gram_input: Tensor | None  #: [B,B]: b b^T


def _empty_gram(vjp, batch, wanted, dtype):
    size = batch if wanted else 0
    return vjp.new_empty((size, size), dtype=dtype)


def _forward(vjp, x, mask, gram_vjp, gram_input):
    fields = (reference.widen(t) for t in (vjp, x, mask))
    moments, *grams = reference.masked_statistics(*fields, gram_vjp, gram_input)
    return moments, *(moments.new_empty((0, 0)) if gram is None else gram for gram in grams)


def _forward_fake(vjp, x, mask, gram_vjp, gram_input):
    batch, dtype = vjp.shape[0], reference.accumulation_dtype(vjp.dtype)
    moments = vjp.new_empty((batch, len(reference.MOMENTS)), dtype=dtype)
    return moments, *(_empty_gram(vjp, batch, wanted, dtype) for wanted in (gram_vjp, gram_input))


def _backward(grad_moments, grad_gram_vjp, grad_gram_input, vjp, x, mask, need_x, need_mask):
    fields = (reference.widen(t) for t in (vjp, x, mask))
    grad_vjp, grad_x, grad_mask = reference.masked_statistics_backward(
        grad_moments, grad_gram_vjp, grad_gram_input, *fields, need_x, need_mask
    )
    return (
        dispatch.empty_field(vjp).copy_(grad_vjp),
        dispatch.empty_field(x).copy_(grad_x) if need_x else x.new_empty(0),
        grad_mask.contiguous() if need_mask else mask.new_empty(0),
    )


def _backward_fake(grad_moments, grad_gram_vjp, grad_gram_input, vjp, x, mask, need_x, need_mask):
    grad_x = dispatch.empty_field(x) if need_x else x.new_empty(0)
    like_mask = torch.empty_like(mask, memory_format=torch.contiguous_format)
    return dispatch.empty_field(vjp), grad_x, like_mask if need_mask else mask.new_empty(0)


def _forward_save(ctx, inputs, output):
    *fields, ctx.gram_vjp, ctx.gram_input = inputs
    ctx.save_for_backward(*fields)


def _forward_rule(overload):
    def rule(ctx, grad_moments, grad_gram_vjp, grad_gram_input):
        op = getattr(torch.ops.sib_ext.masked_statistics_backward, overload)
        _, need_x, need_mask, *_ = ctx.needs_input_grad
        grad_vjp, grad_x, grad_mask = op(
            grad_moments,
            grad_gram_vjp if ctx.gram_vjp else None,
            grad_gram_input if ctx.gram_input else None,
            *ctx.saved_tensors,
            need_x,
            need_mask,
        )
        return grad_vjp, grad_x if need_x else None, grad_mask if need_mask else None, None, None

    return rule


def _backward_save(ctx, inputs, output):
    *tensors, ctx.need_x, ctx.need_mask = inputs
    ctx.save_for_backward(*tensors)


def _backward_rule(overload):
    """The second derivative: the differentiable reference formula of the backward."""

    def rule(ctx, *grad_outputs):
        def formula(*tensors):
            *cotangents, vjp, x, mask = tensors
            fields = (vjp, x, mask)
            wide = map(reference.widen, fields)
            grads = reference.masked_statistics_backward(*cotangents, *wide, ctx.need_x, ctx.need_mask)
            return tuple(
                field.new_empty(0) if grad is None else grad.to(field.dtype)
                for grad, field in zip(grads, fields, strict=True)
            )

        return *dispatch.partial_derivatives(formula, ctx.saved_tensors, grad_outputs, ctx.needs_input_grad), None, None

    return rule


dispatch.define(
    "masked_statistics",
    "(Tensor vjp, Tensor x, Tensor mask, bool gram_vjp, bool gram_input)"
    " -> (Tensor moments, Tensor gram_vjp, Tensor gram_input)",
    _forward,
    dispatch.triton_kernel("masked_statistics", "forward"),
    _forward_fake,
    _forward_save,
    _forward_rule,
)
dispatch.define(
    "masked_statistics_backward",
    "(Tensor grad_moments, Tensor? grad_gram_vjp, Tensor? grad_gram_input, Tensor vjp, Tensor x, Tensor mask,"
    " bool need_x, bool need_mask) -> (Tensor grad_vjp, Tensor grad_x, Tensor grad_mask)",
    _backward,
    dispatch.triton_kernel("masked_statistics", "backward"),
    _backward_fake,
    _backward_save,
    _backward_rule,
)


def traffic(vjp: Tensor) -> tuple[int, int]:
    """The least bytes of (forward, backward without dL/dx): R, x and M in; then the same in, dL/dR and dL/dM out."""
    plane = vjp[:, :1].numel() * reference.accumulation_dtype(vjp.dtype).itemsize
    return 2 * vjp.nbytes + plane, 3 * vjp.nbytes + 2 * plane


def masked_statistics(
    vjp: Tensor,
    x: Tensor,
    mask: Tensor,
    gram_vjp: bool = True,
    gram_input: bool = True,
    impl: str | None = None,
) -> MaskedStatistics:
    """Per-sample moments and batch Grams of the masked fields a = R*M, b = x*M and c = R*(1-M).

    Args:
        vjp: R [B,C,H,W], floating point, any layout (contiguous and channels_last without a copy).
        x: the input that R belongs to, [B,C,H,W]. ``vjp.detach()`` where only the sums of R are looked at: the CUDA
            kernels then read one field.
        mask: M [B,1,H,W], 1 = foreground.
        gram_vjp, gram_input: whether a a^T and b b^T are wanted; what is not is None in the result.
        impl: see :func:`density_mask`.

    Returns:
        :class:`sib_ext.MaskedStatistics`, float32 (float64 of float64); sums are over C*H*W in float32 or wider.
        Differentiable in ``vjp``, ``x`` and ``mask`` any number of times.

    Raises:
        ValueError: an argument of the wrong type, rank, size or device.
        RuntimeError: ``impl`` names an implementation that cannot run here.
    """
    check_field("vjp", vjp)
    check_field("x", x)
    check_same("x", x, "vjp", vjp)
    check_mask_shape("mask", mask, vjp)
    dtype = torch.promote_types(vjp.dtype, x.dtype)
    vjp, x, mask = vjp.to(dtype), x.to(dtype), mask.to(reference.accumulation_dtype(dtype))
    op = dispatch.overload("masked_statistics", dispatch.resolve(impl, vjp.device.type))
    moments, *grams = op(vjp, x, mask, gram_vjp, gram_input)
    kept = (gram if wanted else None for gram, wanted in zip(grams, (gram_vjp, gram_input), strict=True))
    return MaskedStatistics(moments, *kept)
