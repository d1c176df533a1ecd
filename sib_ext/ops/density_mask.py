"""density_mask: the published soft foreground mask of a vector-Jacobian product."""

import torch
from torch import Tensor

from .. import reference
from ..checks import check_choice, check_field, check_positive, check_share, check_window
from . import dispatch

PADDINGS = ("zeros", "exclude")
_OPTIONS = "int window, float temperature, float slope, float eps, str padding, float area"


def _forward(vjp, window, temperature, slope, eps, padding, area):
    wide = reference.widen(vjp)
    options = (window, temperature, slope, eps, padding, area)
    mask = reference.density_mask(wide, *options)
    return mask.contiguous(), reference.density_mask_support(wide, *options)


def _forward_fake(vjp, window, temperature, slope, eps, padding, area):
    batch, _, height, width = vjp.shape
    mask = vjp.new_empty((batch, 1, height, width), dtype=reference.accumulation_dtype(vjp.dtype))
    size = reference.support_size(height * width, temperature)
    return mask, vjp.new_empty((batch, 4, size), dtype=torch.int64)


def _backward(grad_mask, vjp, mask, support, *options):
    grad = reference.density_mask_backward(grad_mask, reference.widen(vjp), mask, support, *options)
    return grad.to(vjp.dtype).contiguous()


def _backward_fake(grad_mask, vjp, mask, support, *options):
    return torch.empty_like(mask, dtype=vjp.dtype, memory_format=torch.contiguous_format)


def _forward_save(ctx, inputs, output):
    vjp, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(vjp, *output)


def _forward_rule(overload):
    def rule(ctx, grad_mask, _):
        op = getattr(torch.ops.sib_ext.density_mask_backward, overload)
        vjp = ctx.saved_tensors[0]
        # One plane for all channels: autograd adds it to the other terms' dL/dR without a buffer of that size.
        return op(grad_mask, *ctx.saved_tensors, *ctx.options).expand_as(vjp), *(None,) * len(ctx.options)

    return rule


def _backward_save(ctx, inputs, output):
    grad_mask, vjp, _, support, *ctx.options = inputs
    ctx.save_for_backward(grad_mask, vjp, support)


def _backward_rule(overload):
    """d(dL/dR_c)/d(dL/dM, R): the differentiable reference formula, with the mask as the function of R that it is."""

    def rule(ctx, grad_output):
        grad_mask, vjp, support = ctx.saved_tensors

        def formula(grad_mask, vjp):
            wide = reference.widen(vjp)
            mask = reference.density_mask(wide, *ctx.options)
            return reference.density_mask_backward(grad_mask, wide, mask, support, *ctx.options).to(vjp.dtype)

        grads = dispatch.partial_derivatives(formula, (grad_mask, vjp), grad_output, ctx.needs_input_grad)
        return *grads, None, None, *(None,) * len(ctx.options)

    return rule


dispatch.define(
    "density_mask",
    f"(Tensor vjp, {_OPTIONS}) -> (Tensor mask, Tensor support)",
    _forward,
    dispatch.triton_kernel("density_mask", "forward"),
    _forward_fake,
    _forward_save,
    _forward_rule,
)
dispatch.define(
    "density_mask_backward",
    f"(Tensor grad_mask, Tensor vjp, Tensor mask, Tensor support, {_OPTIONS}) -> Tensor",
    _backward,
    dispatch.triton_kernel("density_mask", "backward"),
    _backward_fake,
    _backward_save,
    _backward_rule,
)


def traffic(vjp: Tensor) -> tuple[int, int]:
    """The least bytes of (forward, backward): R in, M out; then R, M and dL/dM in, one channel of dL/dR out."""
    plane = vjp[:, :1].numel() * reference.accumulation_dtype(vjp.dtype).itemsize
    return vjp.nbytes + plane, vjp.nbytes + vjp[:, :1].nbytes + 2 * plane


def auto_window(height: int, width: int) -> int:
    """The published 31 x 31 window of 224 px, scaled: the odd number nearest 31*min(H,W)/224, at least 3."""
    return max(3, 2 * (31 * min(height, width) // (2 * 224)) + 1)


def density_mask(
    vjp: Tensor,
    window: int | str = "auto",
    temperature: float = 0.1,
    slope: float = 10.0,
    eps: float = 1e-8,
    padding: str = "zeros",
    area: float = 0.2,
    impl: str | None = None,
) -> Tensor:
    """Soft foreground mask from where the VJP is dense (published S-IB mask; formula in ``sib_ext/reference.py``).

    Args:
        vjp: R = ds/dx [B,C,H,W], floating point, any layout (contiguous and channels_last without a copy).
        window: side of the box average in pixels, odd; ``"auto"`` scales the published 31 at 224 px, at least 3.
        temperature: of the soft quantiles, in sorted positions, > 0. Up to about 100 only a few order statistics
            carry weight; wider ones cost a full sort.
        slope: of both sigmoids, > 0.
        eps: added to q95 - q05, >= 0; the published 1e-8 flattens the mask once R is that small.
        padding: ``"zeros"`` counts the border's zeros in the average (published; favours the centre),
            ``"exclude"`` averages over the pixels inside the image.
        area: share of pixels with M > 0.5, in (0, 1).
        impl: ``"auto"``, ``"native"``, ``"triton"``, ``"reference"``; None takes :func:`sib_ext.use_impl`'s.

    Returns:
        M [B,1,H,W] in [0, 1], float32 (float64 for float64 input); differentiable in ``vjp`` any number of times.
        A sample with NaN or Inf in ``vjp`` gets a mask of NaN.

    Raises:
        ValueError: an argument of the wrong type, rank or range.
        RuntimeError: ``impl`` names an implementation that cannot run here.
    """
    check_field("vjp", vjp)
    height, width = vjp.shape[2:]
    window = auto_window(height, width) if window == "auto" else check_window("window", window)
    check_positive("temperature", temperature)
    check_positive("slope", slope)
    check_positive("eps", eps, zero=True)
    check_share("area", area)
    check_choice("padding", padding, PADDINGS)
    op = dispatch.overload("density_mask", dispatch.resolve(impl, vjp.device.type))
    return op(vjp, window, temperature, slope, eps, padding, area)[0]
