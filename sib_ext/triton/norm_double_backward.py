"""norm_double_backward in Triton: sums over each row (the plane of one channel of one sample), then both gradients.

What lies between the two launches is algebra on [B,C] in PyTorch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.dispatch import field_format
from .common import TILE

SUMS = 5  # of v, g, v*xhat, g*xhat, v*g


@triton.jit
def _sums_kernel(v, g, x, mean, rstd, sums, length, SIZE: tl.constexpr):
    """The five sums of one row."""
    T: tl.constexpr = sums.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    center, scale = tl.load(mean + row), tl.load(rstd + row)
    none = tl.zeros([SIZE], T)
    sum_v, sum_g, sum_vx, sum_gx, sum_vg = none, none, none, none, none
    for first in range(0, length, SIZE):
        at = first + tl.arange(0, SIZE)
        inside = at < length
        vi = tl.load(v + row * length + at, mask=inside, other=0).to(T)
        gi = tl.load(g + row * length + at, mask=inside, other=0).to(T)
        xi = (tl.load(x + row * length + at, mask=inside, other=0).to(T) - center) * scale
        sum_v += vi
        sum_g += gi
        sum_vx += vi * xi
        sum_gx += gi * xi
        sum_vg += vi * gi
    out = sums + row * 5
    tl.store(out, tl.sum(sum_v, 0))
    tl.store(out + 1, tl.sum(sum_g, 0))
    tl.store(out + 2, tl.sum(sum_vx, 0))
    tl.store(out + 3, tl.sum(sum_gx, 0))
    tl.store(out + 4, tl.sum(sum_vg, 0))


@triton.jit
def _write_kernel(v, g, x, mean, rstd, coefficients, grad_g, grad_x, length, tiles, SIZE: tl.constexpr):
    """grad_g = p_v v + p_x xhat + p_1 and grad_x = q_x xhat + q_g g + q_v v + q_1 over a tile of one row."""
    T: tl.constexpr = mean.dtype.element_ty
    row = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles) * SIZE + tl.arange(0, SIZE)
    inside = at < length
    k = coefficients + row * 7
    at = row * length + at
    vi = tl.load(v + at, mask=inside, other=0).to(T)
    gi = tl.load(g + at, mask=inside, other=0).to(T)
    xi = (tl.load(x + at, mask=inside, other=0).to(T) - tl.load(mean + row)) * tl.load(rstd + row)
    for_g = tl.load(k) * vi + tl.load(k + 1) * xi + tl.load(k + 2)
    for_x = tl.load(k + 3) * xi + tl.load(k + 4) * gi + tl.load(k + 5) * vi + tl.load(k + 6)
    tl.store(grad_g + at, for_g.to(grad_g.dtype.element_ty), mask=inside)
    tl.store(grad_x + at, for_x.to(grad_x.dtype.element_ty), mask=inside)


def _coefficients(sums: Tensor, rstd: Tensor, weight: Tensor, mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[B,C,7] of :func:`_write_kernel`, and d/dweight [C]; the averages are over what is normalised together."""
    batch, channels = rstd.shape
    shape = (batch, mean.shape[-1], -1)
    dims = (0, 2) if mean.dim() == 1 else (2,)

    def average(rows: Tensor) -> Tensor:
        whole = rows.reshape(shape).sum(dims, keepdim=True) / count
        return whole.expand(batch, -1, channels // shape[1]).reshape(batch, channels)

    sum_v, sum_g, sum_vx, sum_gx, sum_vg = sums.unbind(-1)
    v0, h0, a = average(sum_v), average(weight * sum_g), average(weight * sum_gx)
    b, c = average(sum_vx), average(weight * sum_vg)
    square = rstd.square()
    rows = [
        weight * rstd,
        -weight * rstd * b,
        -weight * rstd * v0,
        -square * (c - v0 * h0 - 3 * a * b),
        -square * b * weight,
        -square * a,
        square * (b * h0 + a * v0),
    ]
    return torch.stack(rows, -1), (rstd * (sum_vg - v0 * sum_g - b * sum_gx)).sum(0)


def forward(grad_grad, grad, x, mean, rstd, weight, eps):
    """See :func:`sib_ext.ops.norm_double_backward`."""
    like_x = field_format(x)
    v, g, x = (t.contiguous() for t in (grad_grad, grad, x))
    batch, channels = x.shape[:2]
    grad_g, grad_x = torch.empty_like(x), torch.empty_like(x)
    if x.numel() == 0:
        return grad_g, grad_x, mean.new_zeros(channels)
    length = x[0, 0].numel()
    groups = mean.shape[-1]
    count = length * (batch if mean.dim() == 1 else channels // groups)
    rows = [t.view(-1, groups, 1).expand(batch, -1, channels // groups) for t in (mean, rstd)]
    row_mean, row_rstd = (t.reshape(batch, channels).contiguous() for t in rows)
    weight = mean.new_ones(channels) if weight is None else weight
    sums = mean.new_empty((batch, channels, SUMS))
    size = min(TILE, triton.next_power_of_2(length))
    _sums_kernel[(batch * channels,)](v, g, x, row_mean, row_rstd, sums, length, size)
    coefficients, grad_weight = _coefficients(sums, row_rstd, weight, mean, count)
    tiles = triton.cdiv(length, size)
    _write_kernel[(batch * channels * tiles,)](
        v, g, x, row_mean, row_rstd, coefficients.contiguous(), grad_g, grad_x, length, tiles, size
    )
    return grad_g.contiguous(memory_format=like_x), grad_x.contiguous(memory_format=like_x), grad_weight
