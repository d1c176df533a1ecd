"""masked_statistics in Triton: a = R*M, b = x*M and c = R*(1-M) exist in registers only.

Forward: moments by (sample, channels, pixels) and Grams by (tile of rows, tile of columns, split of C*H*W), both as
partial sums that a second step adds in order. Backward: one pass over tiles of (samples, pixels). Products are of
float32 (float64 for float64 fields), never TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..ops import dispatch
from .common import INTERPRETED, PARTIALS, canonical, is_channels_last, strides, sum_of_partials, tile

# None of the sizes here is tuned on a GPU. Products keep their operands in registers: deeper
# ones, larger tiles or longer pipelines of the backward spill in one type or another.
DEPTH = 512 if INTERPRETED else 16  # elements of C*H*W, or samples, that a product of tiles takes at once
BACKWARD_PIXELS = 512 if INTERPRETED else 32
BACKWARD_WARPS, BACKWARD_STAGES = 8, 2
GRAM_PROGRAMS, FEWEST_SPLITS = 512, 8
SAMPLE_PROGRAMS = 64  # programs a sample is cut into where its plane alone is cut into fewer
BACKWARD_PROGRAMS = 512
MOMENTS = len(reference.MOMENTS)


@triton.jit
def _load_channels(field, channel, pixels, exists, batch_offset, channel_stride, pixel_stride, T: tl.constexpr):
    """A tile [channels, pixels] of one sample."""
    at = channel.to(tl.int64)[:, None] * channel_stride + pixels.to(tl.int64)[None, :] * pixel_stride
    return tl.load(field + batch_offset + at, mask=exists, other=0).to(T)


@triton.jit
def _moments_kernel(
    vjp,
    x,
    mask,
    partials,
    channels,
    n,
    blocks,
    groups,
    group_channels,
    vjp_batch,
    vjp_channel,
    vjp_pixel,
    x_batch,
    x_channel,
    x_pixel,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The sums over some channels and pixels of one sample."""
    T: tl.constexpr = partials.dtype.element_ty
    parts = blocks * groups
    sample = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    pixels = (part % blocks) * PIXELS + tl.arange(0, PIXELS)
    inside = pixels < n
    m = tl.load(mask + sample * n + pixels, mask=inside, other=0).to(T)[None, :]
    first = (part // blocks) * group_channels
    last = tl.minimum(first + group_channels, channels)
    none = tl.zeros([CHANNELS, PIXELS], T)
    sum_a, sum_b, sum_aa, sum_bb, sum_ab = none, none, none, none, none
    sum_c, sum_cc, sum_abs_a, sum_abs_c = none, none, none, none
    for start in range(first, last, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        exists = (channel < last)[:, None] & inside[None, :]
        r = _load_channels(vjp, channel, pixels, exists, sample * vjp_batch, vjp_channel, vjp_pixel, T)
        b = _load_channels(x, channel, pixels, exists, sample * x_batch, x_channel, x_pixel, T) * m
        a, c = r * m, r * (1 - m)
        sum_a += a
        sum_b += b
        sum_aa += a * a
        sum_bb += b * b
        sum_ab += a * b
        sum_c += c
        sum_cc += c * c
        sum_abs_a += tl.abs(r) * m
        sum_abs_c += tl.abs(r) * (1 - m)
    out = partials + sample * 9 * parts + part
    tl.store(out, tl.sum(tl.sum(sum_a, 0), 0))
    tl.store(out + parts, tl.sum(tl.sum(sum_b, 0), 0))
    tl.store(out + 2 * parts, tl.sum(tl.sum(sum_aa, 0), 0))
    tl.store(out + 3 * parts, tl.sum(tl.sum(sum_bb, 0), 0))
    tl.store(out + 4 * parts, tl.sum(tl.sum(sum_ab, 0), 0))
    tl.store(out + 5 * parts, tl.sum(tl.sum(sum_c, 0), 0))
    tl.store(out + 6 * parts, tl.sum(tl.sum(sum_cc, 0), 0))
    tl.store(out + 7 * parts, tl.sum(tl.sum(sum_abs_a, 0), 0))
    tl.store(out + 8 * parts, tl.sum(tl.sum(sum_abs_c, 0), 0))


@triton.jit
def _sum_kernel(partials, out, count, SIZE: tl.constexpr):
    """One sum of ``count`` partials."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row, sum_of_partials(partials + row * count, count, SIZE))


@triton.jit
def _load_masked(field, mask, samples, batch, elements, pixels, size, n, T: tl.constexpr):
    """A tile [samples, elements] of field * mask; elements run in the order of memory."""
    exists = (samples < batch)[:, None] & (elements < size)[None, :]
    values = tl.load(field + samples[:, None] * size + elements[None, :], mask=exists, other=0)
    return values.to(T) * tl.load(mask + samples[:, None] * n + pixels[None, :], mask=exists, other=0).to(T)


@triton.jit
def _gram_kernel(
    field,
    mask,
    partials,
    batch,
    channels,
    n,
    tiles,
    splits,
    steps,
    split_steps,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of (field*mask)(field*mask)^T on and below the diagonal, over one split of C*H*W; and its mirror."""
    T: tl.constexpr = partials.dtype.element_ty
    split = tl.program_id(0) % splits
    row, column = tl.program_id(0) // splits // tiles, tl.program_id(0) // splits % tiles
    if column <= row:
        rows = (row * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        columns = (column * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        size = tl.cast(channels, tl.int64) * n
        gram = tl.zeros([ROWS, ROWS], T)
        for step in range(split * split_steps, tl.minimum((split + 1) * split_steps, steps)):
            elements = tl.cast(step, tl.int64) * DEPTH + tl.arange(0, DEPTH)
            pixels = elements // channels if CHANNELS_LAST else elements % n
            left = _load_masked(field, mask, rows, batch, elements, pixels, size, n, T)
            right = _load_masked(field, mask, columns, batch, elements, pixels, size, n, T)
            gram = tl.dot(left, tl.trans(right), gram, input_precision="ieee", out_dtype=T)
        out = partials + split.to(tl.int64) * batch * batch
        exists = (rows < batch)[:, None] & (columns < batch)[None, :]
        tl.store(out + rows[:, None] * batch + columns[None, :], gram, mask=exists)
        if column < row:
            tl.store(out + columns[None, :] * batch + rows[:, None], gram, mask=exists)


@triton.jit
def _add_products(total, gram, field, mask, rows, batch, pixels, n, offset, batch_stride, DEPTH: tl.constexpr):
    """total + (gram rows) @ (field*mask) for one channel: [rows, pixels]."""
    T: tl.constexpr = total.dtype
    inside = (pixels < n)[None, :]
    for first in range(0, batch, DEPTH):
        others = first + tl.arange(0, DEPTH).to(tl.int64)
        exists = (others < batch)[:, None] & inside
        values = tl.load(field + others[:, None] * batch_stride + offset[None, :], mask=exists, other=0).to(T)
        values *= tl.load(mask + others[:, None] * n + pixels[None, :], mask=exists, other=0).to(T)
        pairs = (rows < batch)[:, None] & (others < batch)[None, :]
        factors = tl.load(gram + rows[:, None] * batch + others[None, :], mask=pairs, other=0)
        total = tl.dot(factors, values, total, input_precision="ieee", out_dtype=T)
    return total


@triton.jit
def _backward_kernel(
    grad_moments,
    gram_vjp,
    gram_input,
    vjp,
    x,
    mask,
    grad_vjp,
    grad_x,
    grad_mask,
    batch,
    channels,
    n,
    blocks,
    groups,
    group_channels,
    vjp_batch,
    vjp_channel,
    vjp_pixel,
    x_batch,
    x_channel,
    x_pixel,
    GRAM_VJP: tl.constexpr,
    GRAM_INPUT: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_MASK: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """dL/dR, and if needed dL/dx and dL/dM, of a tile of samples and pixels, over one group of channels."""
    T: tl.constexpr = grad_moments.dtype.element_ty
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks % groups
    rows = ((tl.program_id(0) // blocks // groups) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    pixels = block * PIXELS + tl.arange(0, PIXELS)
    known = (rows < batch)[:, None]
    exists = known & (pixels < n)[None, :]
    moments = grad_moments + rows[:, None] * 9
    at_mask = rows[:, None] * n + pixels[None, :]

    through_mask = tl.zeros([ROWS, PIXELS], T)
    wide = pixels.to(tl.int64)
    for channel in range(group * group_channels, tl.minimum((group + 1) * group_channels, channels)):
        vjp_offset = tl.cast(channel, tl.int64) * vjp_channel + wide * vjp_pixel
        x_offset = tl.cast(channel, tl.int64) * x_channel + wide * x_pixel
        at_vjp = rows[:, None] * vjp_batch + vjp_offset[None, :]
        at_x = rows[:, None] * x_batch + x_offset[None, :]
        # R's gradient and x's one after the other, and what they look at loaded after the products: fewer registers.
        grad_a = tl.zeros([ROWS, PIXELS], T)
        if GRAM_VJP:
            grad_a = _add_products(grad_a, gram_vjp, vjp, mask, rows, batch, pixels, n, vjp_offset, vjp_batch, DEPTH)
        r = tl.load(vjp + at_vjp, mask=exists, other=0).to(T)
        v = tl.load(x + at_x, mask=exists, other=0).to(T)
        m = tl.load(mask + at_mask, mask=exists, other=0).to(T)
        sign = tl.where(r > 0, 1.0, tl.where(r < 0, -1.0, 0.0)).to(T)
        grad_a += tl.load(moments, mask=known, other=0)
        grad_a += 2 * tl.load(moments + 2, mask=known, other=0) * (r * m)
        grad_a += tl.load(moments + 4, mask=known, other=0) * (v * m)
        grad_a += tl.load(moments + 7, mask=known, other=0) * sign
        grad_c = tl.load(moments + 5, mask=known, other=0)
        grad_c += 2 * tl.load(moments + 6, mask=known, other=0) * (r * (1 - m))
        grad_c += tl.load(moments + 8, mask=known, other=0) * sign
        grad = grad_a * m + grad_c * (1 - m)
        tl.store(grad_vjp + at_vjp, grad.to(grad_vjp.dtype.element_ty), mask=exists)
        if NEED_MASK:
            through_mask += (grad_a - grad_c) * r
        if NEED_X or NEED_MASK:
            grad_b = tl.zeros([ROWS, PIXELS], T)
            if GRAM_INPUT:
                grad_b = _add_products(grad_b, gram_input, x, mask, rows, batch, pixels, n, x_offset, x_batch, DEPTH)
                r = tl.load(vjp + at_vjp, mask=exists, other=0).to(T)
                v = tl.load(x + at_x, mask=exists, other=0).to(T)
                m = tl.load(mask + at_mask, mask=exists, other=0).to(T)
            grad_b += tl.load(moments + 1, mask=known, other=0)
            grad_b += 2 * tl.load(moments + 3, mask=known, other=0) * (v * m)
            grad_b += tl.load(moments + 4, mask=known, other=0) * (r * m)
            if NEED_X:
                tl.store(grad_x + at_x, (grad_b * m).to(grad_x.dtype.element_ty), mask=exists)
            if NEED_MASK:
                through_mask += grad_b * v
    if NEED_MASK:
        tl.store(grad_mask + group.to(tl.int64) * batch * n + at_mask, through_mask, mask=exists)


# ---------------------------------------------------------------------------------------------- the launches


def _groups(channels: int, at_once: int, wanted: int) -> tuple[int, int]:
    """(groups, channels of a group) that come closest to ``wanted`` groups of whole tiles."""
    tiles = triton.cdiv(channels, at_once)
    group = triton.cdiv(tiles, min(tiles, max(1, wanted))) * at_once
    return triton.cdiv(channels, group), group


def _rows(batch: int) -> int:
    """Samples in a tile of a product, which takes 16 at least."""
    return 16 if batch <= 16 else 32


def _moments(vjp: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    batch, channels, n = vjp.shape[0], vjp.shape[1], vjp[0, 0].numel()
    at_once, pixels = tile(channels, n)
    blocks = triton.cdiv(n, pixels)
    groups, group = _groups(channels, at_once, SAMPLE_PROGRAMS // blocks)
    partials = mask.new_empty((batch, MOMENTS, groups * blocks))
    _moments_kernel[(batch * groups * blocks,)](
        vjp, x, mask, partials, channels, n, blocks, groups, group, *strides(vjp), *strides(x), at_once, pixels
    )
    moments = mask.new_empty((batch, MOMENTS))
    _sum_kernel[(batch * MOMENTS,)](partials, moments, groups * blocks, PARTIALS)
    return moments


def _gram(field: Tensor, mask: Tensor) -> Tensor:
    batch, channels, n = field.shape[0], field.shape[1], field[0, 0].numel()
    rows, steps = _rows(batch), triton.cdiv(channels * n, DEPTH)
    tiles = triton.cdiv(batch, rows)
    wanted = max(FEWEST_SPLITS, GRAM_PROGRAMS // (tiles * (tiles + 1) // 2))
    split_steps = triton.cdiv(steps, min(steps, wanted))
    splits = triton.cdiv(steps, split_steps)
    partials = mask.new_empty((splits, batch, batch))
    _gram_kernel[(tiles * tiles * splits,)](
        field,
        mask,
        partials,
        batch,
        channels,
        n,
        tiles,
        splits,
        steps,
        split_steps,
        is_channels_last(field),
        rows,
        DEPTH,
    )
    return partials.sum(0)


def forward(vjp: Tensor, x: Tensor, mask: Tensor, gram_vjp: bool, gram_input: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(moments, a a^T, b b^T) of the op masked_statistics; a Gram that is not wanted is empty."""
    with torch.cuda.device_of(vjp):
        batch, dtype = vjp.shape[0], reference.accumulation_dtype(vjp.dtype)
        vjp, x, mask = canonical(vjp), canonical(x), mask.to(dtype).contiguous()
        wanted = {"vjp": gram_vjp and batch > 0, "input": gram_input and batch > 0}
        none = mask.new_empty((0, 0))
        moments = _moments(vjp, x, mask) if batch else mask.new_empty((0, MOMENTS))
        return moments, _gram(vjp, mask) if wanted["vjp"] else none, _gram(x, mask) if wanted["input"] else none.clone()


def backward(
    grad_moments: Tensor,
    grad_gram_vjp: Tensor | None,
    grad_gram_input: Tensor | None,
    vjp: Tensor,
    x: Tensor,
    mask: Tensor,
    need_x: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dR, dL/dx, dL/dM) of the op masked_statistics; dL/dx and dL/dM are empty if they are not needed."""
    with torch.cuda.device_of(vjp):
        dtype, out_dtype = reference.accumulation_dtype(vjp.dtype), mask.dtype
        vjp, x, mask = canonical(vjp), canonical(x), mask.to(dtype).contiguous()
        grad_moments = grad_moments.to(dtype).contiguous()
        grad_vjp, grad_x = dispatch.empty_field(vjp), dispatch.empty_field(x) if need_x else x.new_empty(0)
        batch, channels, n = vjp.shape[0], vjp.shape[1], vjp.shape[2] * vjp.shape[3]
        if batch == 0:
            return grad_vjp, grad_x, mask.new_empty(mask.shape if need_mask else 0, dtype=out_dtype)
        # Products are with G + G^T, whose rows are its columns; a Gram without a cotangent takes no product.
        grams = (grad_gram_vjp, grad_gram_input if need_x or need_mask else None)
        grams = [None if g is None else (g + g.T).to(dtype).contiguous() for g in grams]
        pointers = [grad_moments if g is None else g for g in grams]
        rows, pixels = _rows(batch), min(BACKWARD_PIXELS, max(16, triton.next_power_of_2(n)))
        blocks, tiles = triton.cdiv(n, pixels), triton.cdiv(batch, rows)
        groups, group = _groups(channels, 1, BACKWARD_PROGRAMS // (blocks * tiles))
        partials = mask.new_empty((groups, *mask.shape) if need_mask else 0)
        _backward_kernel[(tiles * groups * blocks,)](
            grad_moments,
            *pointers,
            vjp,
            x,
            mask,
            grad_vjp,
            grad_x,
            partials,
            batch,
            channels,
            n,
            blocks,
            groups,
            group,
            *strides(vjp),
            *strides(x),
            grams[0] is not None,
            grams[1] is not None,
            need_x,
            need_mask,
            DEPTH,
            rows,
            pixels,
            num_warps=BACKWARD_WARPS,
            num_stages=BACKWARD_STAGES,
        )
        if need_mask:
            partials = partials[0] if groups == 1 else partials.sum(0)
        return grad_vjp, grad_x, partials.to(out_dtype)
