"""Every op in plain PyTorch, formula by formula: the fallback, the oracle and the benchmarks' baseline.

Notation (arXiv 2511.09239): ``vjp`` is R = ds/dx [B,C,H,W], ``x`` the input it belongs to, ``mask`` M [B,1,H,W].
The forward formulas are written as published (full sorts, pooling, whole temporaries) and are differentiable any
number of times by autograd. The ``*_backward`` formulas are what the fused backward kernels compute; they are
differentiable too and so serve as the second derivative of every implementation.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Published normalisation of the density: the 5 % and 95 % soft quantiles of g = |mean_c R|.
LOW, HIGH = 0.05, 0.95
# exp(-40) = 4e-18: a position further than 40 temperatures from the nearest one weighs nothing, even in float64.
SUPPORT_RADIUS = 40.0
# A position on the very edge of the support is inside, whatever the rounding: every implementation picks the same.
EDGE = 1e-9

MOMENTS = ("sum_a", "sum_b", "sum_aa", "sum_bb", "sum_ab", "sum_c", "sum_cc", "sum_abs_a", "sum_abs_c")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(field: Tensor) -> Tensor:
    return field.to(accumulation_dtype(field.dtype))


# ---------------------------------------------------------------------------------------------- quantiles


def soft_quantile(values: Tensor, q: float, temperature: float) -> Tensor:
    """Q_tau(v; q) = sum_i softmax_i(-|i - q(n-1)|/tau) v_(i) over the sorted last dimension: [B,n] -> [B,1]."""
    n = values.shape[-1]
    positions = torch.arange(n, dtype=torch.float64, device=values.device)
    weights = torch.softmax(-(positions - q * (n - 1)).abs() / temperature, dim=0).to(values.dtype)
    return (values.sort(dim=-1, stable=True).values * weights).sum(-1, keepdim=True)


def linear_quantile(values: Tensor, q: float) -> Tensor:
    """The ordinary quantile, linear between two order statistics, NaN where a value is: torch.quantile for any size.

    [B,n] -> [B,1].
    """
    position = q * (values.shape[-1] - 1)
    below = math.floor(position)
    above = min(below + 1, values.shape[-1] - 1)
    ordered = values.sort(dim=-1, stable=True).values
    quantile = torch.lerp(ordered[:, below : below + 1], ordered[:, above : above + 1], position - below)
    return torch.where(values.isnan().any(-1, keepdim=True), math.nan, quantile)


def support_size(n: int, temperature: float) -> int:
    """How many order statistics carry weight in a soft quantile of n values; n when the temperature is wide."""
    return min(n, math.floor(2 * (SUPPORT_RADIUS * temperature + 0.5) + EDGE) + 1)


def support_start(n: int, q: float, temperature: float, size: int) -> int:
    """The first sorted position of the support: the positions within its radius of q(n-1), kept inside [0, n)."""
    first = math.ceil(q * (n - 1) - (SUPPORT_RADIUS * temperature + 0.5) - EDGE)
    return max(0, min(first, n - size))


def support_weights(n: int, q: float, temperature: float, size: int, like: Tensor) -> Tensor:
    """softmax_i(-|i - q(n-1)|/tau) on the support: [size]."""
    start = support_start(n, q, temperature, size)
    positions = torch.arange(start, start + size, dtype=torch.float64, device=like.device)
    return torch.softmax(-(positions - q * (n - 1)).abs() / temperature, dim=0).to(like.dtype)


def _support_indices(values: Tensor, q: float, temperature: float) -> Tensor:
    n = values.shape[-1]
    size = support_size(n, temperature)
    start = support_start(n, q, temperature, size)
    return values.argsort(dim=-1, stable=True)[:, start : start + size]


# ------------------------------------------------------------------------------------------- density mask


def box_average(plane: Tensor, window: int, padding: str) -> Tensor:
    """window x window average, stride 1; ``"zeros"`` counts the padding in the divisor, ``"exclude"`` does not."""
    return F.avg_pool2d(plane, window, stride=1, padding=window // 2, count_include_pad=padding == "zeros")


def density(vjp: Tensor) -> Tensor:
    """g = |mean_c R|: [B,C,H,W] -> [B,H*W]."""
    return vjp.mean(1).abs().flatten(1)


def _average_density(vjp, quantile, window, slope, eps, padding, area):
    g = density(vjp)
    low, high = quantile(g, LOW), quantile(g, HIGH)
    n = (g - low) / (high - low + eps)
    h = torch.sigmoid(slope * (n - quantile(n, 1 - area)))
    plane = h.view(vjp.shape[0], 1, vjp.shape[2], vjp.shape[3])
    return box_average(plane, window, padding).flatten(1)


def _density_mask(vjp, quantile, window, slope, eps, padding, area):
    d = _average_density(vjp, quantile, window, slope, eps, padding, area)
    mask = torch.sigmoid(slope * (d - quantile(d, 1 - area)))
    return mask.view(vjp.shape[0], 1, vjp.shape[2], vjp.shape[3])


def density_mask(
    vjp: Tensor, window: int, temperature: float, slope: float, eps: float, padding: str, area: float
) -> Tensor:
    """The published soft mask of R, [B,C,H,W] -> [B,1,H,W] in (0, 1):

    g = |mean_c R|, n = (g - q05)/(q95 - q05 + eps), h = sigmoid(slope (n - q80(n))),
    d = box average of h, M = sigmoid(slope (d - q80(d))), with q80 the 1 - ``area`` quantile.
    """
    quantile = functools.partial(soft_quantile, temperature=temperature)
    return _density_mask(vjp, quantile, window, slope, eps, padding, area)


def hard_density_mask(vjp: Tensor, window: int, slope: float, eps: float, padding: str, area: float) -> Tensor:
    """:func:`density_mask` with ordinary quantiles."""
    return _density_mask(vjp, linear_quantile, window, slope, eps, padding, area)


def density_mask_support(vjp, window, temperature, slope, eps, padding, area) -> Tensor:
    """Which pixels the four soft quantiles rest on: [B,4,K] int64, rows q05(g), q95(g), q80(g), q80(d)."""
    g = density(vjp)
    quantile = functools.partial(soft_quantile, temperature=temperature)
    d = _average_density(vjp, quantile, window, slope, eps, padding, area)
    picks = ((g, LOW), (g, HIGH), (g, 1 - area), (d, 1 - area))
    return torch.stack([_support_indices(v, q, temperature) for v, q in picks], dim=1)


def density_mask_backward(
    grad_mask: Tensor,
    vjp: Tensor,
    mask: Tensor,
    support: Tensor,
    window: int,
    temperature: float,
    slope: float,
    eps: float,
    padding: str,
    area: float,
) -> Tensor:
    """dL/dR_c [B,1,H,W] of :func:`density_mask`, the same for every channel c, from dL/dM [B,1,H,W].

    A soft quantile's gradient touches its support only.
    """
    batch, _, height, width = vjp.shape
    n, size = height * width, support.shape[-1]
    weights = {q: support_weights(n, q, temperature, size, mask) for q in (LOW, HIGH, 1 - area)}

    def scatter(row: int, q: float, total: Tensor) -> Tensor:
        return torch.zeros_like(grad).scatter(1, support[:, row], total * weights[q])

    mask = mask.flatten(1)
    grad = grad_mask.to(mask.dtype).flatten(1) * slope * mask * (1 - mask)
    grad = grad - scatter(3, 1 - area, grad.sum(1, keepdim=True))
    # The box average is symmetric, so its transpose is itself (after the division when the divisor varies).
    plane = grad.view(batch, 1, height, width)
    if padding == "exclude":
        share = box_average(torch.ones_like(plane[:1]), window, "zeros")
        grad = box_average(plane / share, window, "zeros").flatten(1)
    else:
        grad = box_average(plane, window, padding).flatten(1)

    mean = vjp.mean(1).flatten(1)
    g = mean.abs()

    def quantile(row: int, q: float) -> Tensor:
        return (g.gather(1, support[:, row]) * weights[q]).sum(1, keepdim=True)

    low, high, level = quantile(0, LOW), quantile(1, HIGH), quantile(2, 1 - area)
    scale = 1 / (high - low + eps)
    u = (g - level) * scale
    h = torch.sigmoid(slope * u)
    grad = grad * slope * h * (1 - h)
    slip = (grad * u).sum(1, keepdim=True) * scale
    grad = grad * scale
    grad = grad - scatter(2, 1 - area, grad.sum(1, keepdim=True)) - scatter(1, HIGH, slip) + scatter(0, LOW, slip)
    return (grad * mean.sign() / vjp.shape[1]).view(batch, 1, height, width)


# -------------------------------------------------------------------------------------- masked statistics


def masked_fields(vjp: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a = R*M, b = x*M, c = R*(1-M), a row a sample."""
    return (vjp * mask).flatten(1), (x * mask).flatten(1), (vjp * (1 - mask)).flatten(1)


def published_moments(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The first seven of :data:`MOMENTS` [B,7]: all that the published loss and its kin look at."""
    return torch.stack([t.sum(1) for t in (a, b, a * a, b * b, a * b, c, c * c)], dim=1)


def masked_statistics(
    vjp: Tensor, x: Tensor, mask: Tensor, gram_vjp: bool = True, gram_input: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Moments [B,9] (:data:`MOMENTS`) and Grams a a^T, b b^T [B,B] of a = R*M, b = x*M, c = R*(1-M).

    Magnitudes are those of R, abs_a = |R|*M and abs_c = |R|*(1-M): for M in [0,1] the same, but smooth in M.
    """
    a, b, c = masked_fields(vjp, x, mask)
    size = vjp.abs()
    magnitudes = torch.stack([(size * mask).flatten(1).sum(1), (size * (1 - mask)).flatten(1).sum(1)], dim=1)
    moments = torch.cat([published_moments(a, b, c), magnitudes], dim=1)
    return moments, a @ a.T if gram_vjp else None, b @ b.T if gram_input else None


def masked_statistics_backward(
    grad_moments: Tensor,
    grad_gram_vjp: Tensor | None,
    grad_gram_input: Tensor | None,
    vjp: Tensor,
    x: Tensor,
    mask: Tensor,
    need_x: bool = True,
    need_mask: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dL/dR, dL/dx, dL/dM) of :func:`masked_statistics` from its outputs' cotangents; what is not needed is None."""
    a, b, c = masked_fields(vjp, x, mask)
    sum_a, sum_b, sum_aa, sum_bb, sum_ab, sum_c, sum_cc, sum_abs_a, sum_abs_c = grad_moments.split(1, dim=1)
    sign = vjp.sign().flatten(1)
    grad_a = sum_a + 2 * sum_aa * a + sum_ab * b + sum_abs_a * sign
    grad_c = (sum_c + 2 * sum_cc * c + sum_abs_c * sign).view_as(vjp)
    if grad_gram_vjp is not None:
        grad_a = grad_a + (grad_gram_vjp + grad_gram_vjp.T) @ a
    grad_a = grad_a.view_as(vjp)
    grad_vjp = grad_a * mask + grad_c * (1 - mask)
    if not (need_x or need_mask):
        return grad_vjp, None, None
    grad_b = sum_b + 2 * sum_bb * b + sum_ab * a
    if grad_gram_input is not None:
        grad_b = grad_b + (grad_gram_input + grad_gram_input.T) @ b
    grad_b = grad_b.view_as(x)
    grad_x = grad_b * mask if need_x else None
    grad_mask = (grad_a * vjp + grad_b * x - grad_c * vjp).sum(1, keepdim=True) if need_mask else None
    return grad_vjp, grad_x, grad_mask


# ------------------------------------------------------------------------------------------ normalisation


def batch_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of batch normalisation in train mode with averages over a channel of the whole batch:

    d/dx = weight rstd (grad - avg grad - xhat avg(grad xhat)), d/dweight = sum grad xhat, d/dbias = sum grad
    """
    dims = (0, *range(2, x.dim()))
    mean, rstd, scale = (
        t.view(-1, *[1] * (x.dim() - 2)) for t in (mean, rstd, torch.ones_like(mean) if weight is None else weight)
    )
    xhat = (x - mean) * rstd
    centred = grad - grad.mean(dims, keepdim=True)
    grad_x = scale * rstd * (centred - xhat * (grad * xhat).mean(dims, keepdim=True))
    return grad_x, (grad * xhat).sum(dims), grad.sum(dims)


def norm_double_backward(
    grad_grad: Tensor, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of a normalisation layer's input gradient dx = rstd (h - avg h - xhat avg(h xhat)), h = weight g.

    With v the cotangent of dx and averages over what is normalised together (``mean`` [C]: a channel of the whole
    batch, ``mean`` [B,G]: a group of channels of one sample), a = avg(h xhat), b = avg(v xhat), c = avg(v h):

        d/dg = weight rstd (v - avg v - b xhat)
        d/dx = -rstd^2 (xhat (c - avg v avg h - 3 a b) + b (h - avg h) + a (v - avg v))
        d/dweight = sum g rstd (v - avg v - b xhat)
    """
    batch, channels = x.shape[:2]
    groups = mean.shape[-1]
    shape, over_batch = (batch, groups, channels // groups, x[:1, :1].numel()), mean.dim() == 1
    dims = (0, 2, 3) if over_batch else (2, 3)
    v, g, xhat = (t.reshape(shape) for t in (grad_grad, grad, x))
    mean, rstd = (t.view(1 if over_batch else batch, groups, 1, 1) for t in (mean, rstd))
    weight = x.new_ones(channels) if weight is None else weight
    weight = weight.view(1, groups, -1, 1)

    xhat = (xhat - mean) * rstd
    h = g * weight
    v_centred, h_centred = v - v.mean(dims, keepdim=True), h - h.mean(dims, keepdim=True)
    a, b = (h * xhat).mean(dims, keepdim=True), (v * xhat).mean(dims, keepdim=True)
    c_centred = (v_centred * h_centred).mean(dims, keepdim=True)
    projected = rstd * (v_centred - b * xhat)
    grad_x = -rstd.square() * (xhat * (c_centred - 3 * a * b) + b * h_centred + a * v_centred)
    return (
        (weight * projected).reshape(x.shape),
        grad_x.reshape(x.shape),
        (projected * g).sum((0, 3)).view(channels),
    )
