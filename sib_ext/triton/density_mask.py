"""density_mask in Triton: the steps of csrc/cpu/density_mask.cpp, one launch each.

Forward: |mean_c R|, one selection for three quantiles, h, box average as two passes, selection on d, M.
Selection builds the bits of an order statistic from the top down, a digit a pass, by counting the values with each
digit; it is exact and ties go to the lower pixel; a support too wide to rank pairwise is sorted by torch instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .common import PARTIALS, canonical, strides, sum_of_partials, tile

WIDEST_SUPPORT = 64  # order statistics in a support that the kernels rank; wider ones are sorted
SELECT_BLOCK, SELECT_WARPS, DIGIT_BITS = 4096, 16, 8  # never fewer pixels than threads: each counts once
PLANE_BLOCK = 1024

ROWS = 4  # of the support: q05(g), q95(g), q80(g), q80(d)


# --------------------------------------------------------------------------------------- device functions


@triton.jit
def _sigmoid(v):
    return 1 / (1 + tl.exp(-v))


@triton.jit
def _distance(position, n, q):
    """|i - q(n-1)| in float64."""
    return tl.abs(position.to(tl.float64) - q * tl.cast(n - 1, tl.float64))


@triton.jit
def _weights(k, n, start, size, q, TEMPERATURE: tl.constexpr, LANES: tl.constexpr):
    """softmax_i(-|i - q(n-1)|/temperature) over the support, at its positions ``k``, in float64."""
    lanes = tl.arange(0, LANES)
    inside = lanes < size
    distance = _distance(start + lanes, n, q)
    nearest = tl.min(tl.where(inside, distance, float("inf")), 0)
    total = tl.sum(tl.where(inside, tl.exp((nearest - distance) / TEMPERATURE), 0.0), 0)
    return tl.exp((nearest - _distance(start + k, n, q)) / TEMPERATURE) / total


@triton.jit
def _pick(index, first, second, third):
    index = tl.cast(index, tl.int32)  # a loop over constants counts in Python's integers when it is interpreted
    return tl.where(index == 0, first, tl.where(index == 1, second, third))


@triton.jit
def _as_float64(value: tl.constexpr):
    return tl.full([], value, tl.float64)


@triton.jit
def _quantile_of_row(row, LOW: tl.constexpr, HIGH: tl.constexpr, LEVEL: tl.constexpr):
    return _pick(row, _as_float64(LOW), _as_float64(HIGH), _as_float64(LEVEL))


@triton.jit
def _span(position, length, radius, EXCLUDE: tl.constexpr):
    """How many positions of one axis the average counts."""
    if EXCLUDE:
        return tl.minimum(position + radius, length - 1) - tl.maximum(position - radius, 0) + 1
    else:
        return position * 0 + 2 * radius + 1


@triton.jit
def _inverse_area(pixels, height, width, radius, EXCLUDE: tl.constexpr, T: tl.constexpr):
    """1 / divisor of the box average at a pixel."""
    across = _span(pixels % width, width, radius, EXCLUDE).to(T)
    return 1 / (across * _span(pixels // width, height, radius, EXCLUDE).to(T))


@triton.jit
def _block(n, blocks, BLOCK: tl.constexpr):
    """(sample, offset of its plane, pixels, which of them exist) of this program."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    pixels = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return sample, sample * n, pixels, pixels < n


# --------------------------------------------------------------------------------------------------- mean


@triton.jit
def _mean_kernel(
    vjp,
    out,
    channels,
    n,
    blocks,
    batch_stride,
    channel_stride,
    pixel_stride,
    MAGNITUDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """mean_c R, or its magnitude."""
    T: tl.constexpr = out.dtype.element_ty
    sample, plane, pixels, inside = _block(n, blocks, PIXELS)
    source = vjp + sample * batch_stride + pixels.to(tl.int64)[None, :] * pixel_stride
    total = tl.zeros([PIXELS], T)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        exists = (channel < channels)[:, None] & inside[None, :]
        values = tl.load(source + channel.to(tl.int64)[:, None] * channel_stride, mask=exists, other=0)
        total += tl.sum(values.to(T), 0)
    mean = total / channels
    tl.store(out + plane + pixels, tl.abs(mean) if MAGNITUDE else mean, mask=inside)


# ---------------------------------------------------------------------------------------------- selection


@triton.jit
def _descend(value, below, rank, counts, shift, DIGITS: tl.constexpr):
    """(value, how many values are below it) with the next digit of the value at ``rank``.

    ``counts`` says how many values that share the digits found so far have which digit next.
    """
    digit = tl.sum((below + tl.cumsum(counts, 0) <= rank).to(tl.int32), 0)
    below += tl.sum(tl.where(tl.arange(0, DIGITS) < digit, counts, 0), 0)
    return value | (digit.to(value.dtype) << shift), below


@triton.jit
def _bits(plane, pixels, n, U: tl.constexpr, UNSIGNED: tl.constexpr):
    """Non-negative floats sort like their bits; without the sign, NaN sorts above infinity, as do absent pixels."""
    word = tl.load(plane + pixels, mask=pixels < n, other=-1).to(U, bitcast=True)
    return word & UNSIGNED


@triton.jit(do_not_specialize=["row", "start_0", "start_1", "start_2"])
def _select_kernel(
    plane,
    support,
    between,
    facts,
    n,
    size,
    row,
    start_0,
    start_1,
    start_2,
    PICKS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
):
    """The support of one quantile of one sample, but for the order of what lies strictly between its ends.

    ``plane`` holds the bits of non-negative floats as integers. Values equal to the ends are placed in pixel order;
    the pixels strictly between them, fewer than the support is long, go into a list. ``facts`` gets the place of the
    first of these, their number, and the number of values that are not finite.
    """
    WIDE: tl.constexpr = plane.dtype.element_ty == tl.int64
    U: tl.constexpr = tl.uint64 if WIDE else tl.uint32
    UNSIGNED: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    INFINITY: tl.constexpr = 0x7FF0000000000000 if WIDE else 0x7F800000
    BITS: tl.constexpr = 64 if WIDE else 32
    MASK: tl.constexpr = (1 << DIGIT_BITS) - 1

    program = tl.program_id(0).to(tl.int64)
    sample, pick = program // PICKS, program % PICKS
    start = _pick(pick, start_0, start_1, start_2)
    end = start + size - 1
    plane += sample * n
    support += (sample * ROWS + row + pick) * size
    between += program * LANES
    lanes = tl.arange(0, BLOCK)

    low, high = tl.full([], 0, U), tl.full([], 0, U)
    below_low, below_high = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    shift = tl.full([], BITS - DIGIT_BITS, U)
    for _ in range(BITS // DIGIT_BITS):
        low_counts, high_counts = tl.zeros([1 << DIGIT_BITS], tl.int32), tl.zeros([1 << DIGIT_BITS], tl.int32)
        for first in range(0, n, BLOCK):
            bits = _bits(plane, first + lanes, n, U, UNSIGNED) >> shift
            digits, found, exists = (bits & MASK).to(tl.int32), bits >> DIGIT_BITS, first + lanes < n
            low_counts += tl.histogram(digits, 1 << DIGIT_BITS, exists & (found == low >> shift >> DIGIT_BITS))
            high_counts += tl.histogram(digits, 1 << DIGIT_BITS, exists & (found == high >> shift >> DIGIT_BITS))
        low, below_low = _descend(low, below_low, start, low_counts, shift, 1 << DIGIT_BITS)
        high, below_high = _descend(high, below_high, end, high_counts, shift, 1 << DIGIT_BITS)
        shift -= DIGIT_BITS

    # The positions in the support of the next value equal to either end, and how many were seen between them.
    next_low, next_high = below_low - start, below_high - start
    seen = tl.full([], 0, tl.int32)
    not_finite = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        pixels = first + lanes
        bits = _bits(plane, pixels, n, U, UNSIGNED)
        exists = pixels < n
        not_finite += exists & (bits >= INFINITY)
        at_low = (exists & (bits == low)).to(tl.int32)
        at_high = (exists & (bits == high) & (high != low)).to(tl.int32)
        inner = (exists & (bits > low) & (bits < high)).to(tl.int32)
        if tl.sum(at_low + at_high + inner, 0) > 0:
            place = next_low + tl.cumsum(at_low, 0) - 1
            tl.store(support + place, pixels.to(tl.int64), mask=(at_low > 0) & (place >= 0) & (place < size))
            place = next_high + tl.cumsum(at_high, 0) - 1
            tl.store(support + place, pixels.to(tl.int64), mask=(at_high > 0) & (place < size))
            place = seen + tl.cumsum(inner, 0) - 1
            tl.store(between + place, pixels.to(tl.int64), mask=inner > 0)
            next_low += tl.sum(at_low, 0)
            next_high += tl.sum(at_high, 0)
            seen += tl.sum(inner, 0)
    tl.store(facts + program * 3, tl.minimum(next_low, size))
    tl.store(facts + program * 3 + 1, seen)
    tl.store(facts + program * 3 + 2, tl.sum(not_finite, 0))


@triton.jit(do_not_specialize=["row", "start_0", "start_1", "start_2"])
def _rank_kernel(
    plane,
    support,
    between,
    facts,
    quantiles,
    n,
    size,
    row,
    start_0,
    start_1,
    start_2,
    Q_0: tl.constexpr,
    Q_1: tl.constexpr,
    Q_2: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    PICKS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Completes one support with the pixels between its ends, by (value, pixel), and takes the quantile."""
    T: tl.constexpr = plane.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    sample, pick = program // PICKS, program % PICKS
    start, q = _pick(pick, start_0, start_1, start_2), _quantile_of_row(pick, Q_0, Q_1, Q_2)
    plane += sample * n
    support += (sample * ROWS + row + pick) * size
    between += program * LANES
    first, count = tl.load(facts + program * 3), tl.load(facts + program * 3 + 1)

    lanes = tl.arange(0, LANES)
    mine, other = lanes[:, None], lanes[None, :]
    pixels = tl.load(between + lanes, mask=lanes < count, other=0)
    values = tl.load(plane + pixels, mask=lanes < count, other=0)
    my_value = tl.load(plane + tl.load(between + mine, mask=mine < count, other=0), mask=mine < count, other=0)
    other_value = tl.load(plane + tl.load(between + other, mask=other < count, other=0), mask=other < count, other=0)
    # The list is in pixel order.
    before = (other_value < my_value) | ((other_value == my_value) & (other < mine))
    place = first + tl.sum((before & (other < count)).to(tl.int32), 1)
    tl.store(support + place, pixels, mask=lanes < count)

    # Relative to the lowest value: exact where all are equal.
    low, high = tl.load(plane + tl.load(support)), tl.load(plane + tl.load(support + size - 1))
    inner_weights = _weights(place, n, start, size, q, TEMPERATURE, LANES).to(T)
    weights = _weights(lanes, n, start, size, q, TEMPERATURE, LANES).to(T)
    at_high = (lanes >= first + count) & (lanes < size)
    rise = tl.where(lanes < count, inner_weights * (values - low), 0) + tl.where(at_high, weights * (high - low), 0)
    poison = tl.where(tl.load(facts + program * 3 + 2) > 0, float("nan"), 0.0).to(T)
    tl.store(quantiles + program, low + tl.sum(rise, 0) + poison)


# ------------------------------------------------------------------------------------------ forward planes


@triton.jit
def _steps_kernel(g, quantiles, out, n, blocks, SLOPE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """h = sigmoid(slope (g - q80)/(q95 - q05 + eps))."""
    sample, plane, pixels, inside = _block(n, blocks, BLOCK)
    low, high, level = (
        tl.load(quantiles + sample * 3),
        tl.load(quantiles + sample * 3 + 1),
        tl.load(quantiles + sample * 3 + 2),
    )
    scale = SLOPE / (high - low + EPS)
    values = tl.load(g + plane + pixels, mask=inside, other=0)
    tl.store(out + plane + pixels, _sigmoid((values - level) * scale), mask=inside)


@triton.jit(do_not_specialize=["radius"])
def _box_kernel(
    source,
    out,
    height,
    width,
    blocks,
    radius,
    DOWN: tl.constexpr,
    AVERAGE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over 2*radius + 1 neighbours along one axis; with AVERAGE, times the inverse of the window's area."""
    T: tl.constexpr = out.dtype.element_ty
    _, plane, pixels, inside = _block(height * width, blocks, BLOCK)
    position = pixels // width if DOWN else pixels % width
    length = height if DOWN else width
    step = width if DOWN else 1
    reach = tl.minimum(radius, length - 1)
    total = tl.zeros([BLOCK], T)
    for shift in range(-reach, reach + 1):
        exists = inside & (position + shift >= 0) & (position + shift < length)
        total += tl.load(source + plane + pixels + shift * step, mask=exists, other=0)
    if AVERAGE:
        total *= _inverse_area(pixels, height, width, radius, EXCLUDE, T)
    tl.store(out + plane + pixels, total, mask=inside)


@triton.jit
def _mask_kernel(d, quantiles, out, n, blocks, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    """M = sigmoid(slope (d - q80(d)))."""
    sample, plane, pixels, inside = _block(n, blocks, BLOCK)
    values = tl.load(d + plane + pixels, mask=inside, other=0)
    tl.store(out + plane + pixels, _sigmoid(SLOPE * (values - tl.load(quantiles + sample))), mask=inside)


# ------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=["start_0", "start_1", "start_2"])
def _quantile_kernel(
    mean,
    support,
    quantiles,
    n,
    size,
    start_0,
    start_1,
    start_2,
    Q_0: tl.constexpr,
    Q_1: tl.constexpr,
    Q_2: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One of the three quantiles of |mean| from its support."""
    T: tl.constexpr = mean.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    sample, row = program // 3, program % 3
    start, q = _pick(row, start_0, start_1, start_2), _quantile_of_row(row, Q_0, Q_1, Q_2)
    lanes = tl.arange(0, LANES)
    support += (sample * ROWS + row) * size
    low = tl.abs(tl.load(mean + sample * n + tl.load(support)))
    pixels = tl.load(support + lanes, mask=lanes < size, other=0)
    values = tl.abs(tl.load(mean + sample * n + pixels, mask=lanes < size, other=0))
    weights = _weights(lanes, n, start, size, q, TEMPERATURE, LANES).to(T)
    tl.store(quantiles + program, low + tl.sum(tl.where(lanes < size, weights * (values - low), 0), 0))


@triton.jit
def _through_mask(grad_mask, mask, at, exists, SLOPE: tl.constexpr):
    """dL/d(d - q80(d)) from dL/dM."""
    m = tl.load(mask + at, mask=exists, other=0)
    return tl.load(grad_mask + at, mask=exists, other=0) * SLOPE * m * (1 - m)


@triton.jit(do_not_specialize=["radius"])
def _average_grad_kernel(
    grad_mask,
    mask,
    out,
    partials,
    height,
    width,
    blocks,
    radius,
    SLOPE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the box average's transpose sums up, without the quantile's share; and the sum that this share needs."""
    T: tl.constexpr = out.dtype.element_ty
    _, plane, pixels, inside = _block(height * width, blocks, BLOCK)
    grad = _through_mask(grad_mask, mask, plane + pixels, inside, SLOPE)
    tl.store(partials + tl.program_id(0), tl.sum(grad, 0))
    tl.store(out + plane + pixels, grad * _inverse_area(pixels, height, width, radius, EXCLUDE, T), mask=inside)


@triton.jit(do_not_specialize=["radius", "start"])
def _average_support_kernel(
    grad_mask,
    mask,
    support,
    partials,
    out,
    height,
    width,
    blocks,
    radius,
    start,
    size,
    SLOPE: tl.constexpr,
    Q: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Writes the pixels of q80(d)'s support again, less the quantile's share."""
    T: tl.constexpr = out.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    n = height * width
    total = sum_of_partials(partials + sample * blocks, blocks, PARTIALS)
    lanes = tl.arange(0, LANES)
    inside = lanes < size
    pixels = tl.load(support + (sample * ROWS + ROWS - 1) * size + lanes, mask=inside, other=0)
    grad = _through_mask(grad_mask, mask, sample * n + pixels, inside, SLOPE)
    grad -= total * _weights(lanes, n, start, size, _as_float64(Q), TEMPERATURE, LANES).to(T)
    grad *= _inverse_area(pixels, height, width, radius, EXCLUDE, T)
    tl.store(out + sample * n + pixels, grad, mask=inside)


@triton.jit
def _through_steps(grad_average, mean, quantiles, at, exists, SLOPE: tl.constexpr, EPS: tl.constexpr):
    """(dL/d(g - q80), the part of -dL/d(q95 - q05) of each pixel, mean_c R) from dL/dh."""
    low, high, level = tl.load(quantiles), tl.load(quantiles + 1), tl.load(quantiles + 2)
    scale = 1 / (high - low + EPS)
    value = tl.load(mean + at, mask=exists, other=0)
    u = (tl.abs(value) - level) * scale
    h = _sigmoid(SLOPE * u)
    grad = tl.load(grad_average + at, mask=exists, other=0) * SLOPE * h * (1 - h) * scale
    return grad, grad * u, value


@triton.jit
def _through_magnitude(grad, value, channels):
    """dL/dR_c = dL/dg sign(mean_c R)/C, the same for every channel."""
    return grad * tl.where(value > 0, 1, tl.where(value < 0, -1, value)) / channels


@triton.jit
def _vjp_grad_kernel(
    grad_average,
    mean,
    quantiles,
    out,
    partials,
    channels,
    n,
    blocks,
    SLOPE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dL/dR_c without the shares of the three quantiles of g, and the two sums that these need."""
    sample, plane, pixels, inside = _block(n, blocks, BLOCK)
    grad, slip, value = _through_steps(grad_average, mean, quantiles + sample * 3, plane + pixels, inside, SLOPE, EPS)
    block = tl.program_id(0) % blocks
    tl.store(partials + sample * 2 * blocks + block, tl.sum(tl.where(inside, grad, 0), 0))
    tl.store(partials + (sample * 2 + 1) * blocks + block, tl.sum(tl.where(inside, slip, 0), 0))
    tl.store(out + plane + pixels, _through_magnitude(grad, value, channels), mask=inside)


@triton.jit(do_not_specialize=["start_0", "start_1", "start_2"])
def _vjp_support_kernel(
    grad_average,
    mean,
    quantiles,
    support,
    partials,
    out,
    channels,
    n,
    blocks,
    size,
    start_0,
    start_1,
    start_2,
    Q_0: tl.constexpr,
    Q_1: tl.constexpr,
    Q_2: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SLOPE: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Writes the pixels of one support again, less the shares of all three quantiles.

    A pixel may lie in several supports; then several programs write it, the same value each.
    """
    T: tl.constexpr = mean.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    sample, row = program // 3, program % 3
    support += sample * ROWS * size
    level = sum_of_partials(partials + sample * 2 * blocks, blocks, PARTIALS)
    slip = sum_of_partials(partials + (sample * 2 + 1) * blocks, blocks, PARTIALS)
    lanes = tl.arange(0, LANES)
    inside = lanes < size
    pixels = tl.load(support + row * size + lanes, mask=inside, other=0)

    share = tl.zeros([LANES], T)
    for other in range(3):
        start, q = _pick(other, start_0, start_1, start_2), _quantile_of_row(other, Q_0, Q_1, Q_2)
        weights = _weights(lanes, n, start, size, q, TEMPERATURE, LANES).to(T)
        shares = tl.where(inside, _pick(other, -slip, slip, level) * weights, 0)
        other_pixels = tl.load(support + other * size + lanes, mask=inside, other=-1)
        share += tl.sum(tl.where(pixels[:, None] == other_pixels[None, :], shares[None, :], 0), 1)

    at = sample * n + pixels
    grad, _, value = _through_steps(grad_average, mean, quantiles + sample * 3, at, inside, SLOPE, EPS)
    tl.store(out + at, _through_magnitude(grad - share, value, channels), mask=inside)


# ---------------------------------------------------------------------------------------------- the launches


class _Problem:
    """The sizes, options and launches of one call."""

    def __init__(self, vjp: Tensor, window, temperature, slope, eps, padding, area):
        self.vjp = canonical(vjp)
        self.batch, self.channels, self.height, self.width = vjp.shape
        self.n = self.height * self.width
        self.radius, self.exclude = window // 2, padding == "exclude"
        self.temperature, self.slope, self.eps = float(temperature), float(slope), float(eps)
        self.size = reference.support_size(self.n, temperature)
        self.lanes = triton.next_power_of_2(self.size)
        self.quantiles = (reference.LOW, reference.HIGH, 1 - area)
        self.starts = [reference.support_start(self.n, q, temperature, self.size) for q in self.quantiles]
        self.block = min(PLANE_BLOCK, triton.next_power_of_2(self.n))
        self.blocks = triton.cdiv(self.n, self.block)
        self.dtype = reference.accumulation_dtype(vjp.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.vjp.device)

    def plane(self) -> Tensor:
        return self.empty(self.batch, self.n)

    def mean(self, magnitude: bool) -> Tensor:
        out, (channels, pixels) = self.plane(), tile(self.channels, self.n)
        blocks = triton.cdiv(self.n, pixels)
        _mean_kernel[(self.batch * blocks,)](
            self.vjp, out, self.channels, self.n, blocks, *strides(self.vjp), magnitude, channels, pixels
        )
        return out

    def quantiles_of(self, plane: Tensor, rows: range, support: Tensor) -> Tensor:
        """The quantiles of a non-negative plane [B,len(rows)]; writes the rows of the support."""
        if self.size > WIDEST_SUPPORT:
            return self._quantiles_by_sorting(plane, rows, support)
        # The kernels take three picks; a single one is given three times.
        picks = [2 if row == ROWS - 1 else row for row in rows] * (3 // len(rows))
        starts = [self.starts[i] for i in picks]
        programs = self.batch * len(rows)
        between = self.empty(programs, self.lanes, dtype=torch.int64)
        facts = self.empty(programs, 3, dtype=torch.int32)
        quantiles = self.empty(self.batch, len(rows))
        bits = plane.view(torch.int64 if self.dtype == torch.float64 else torch.int32)
        common = (between, facts)
        sizes = (self.n, self.size, rows.start, *starts)
        _select_kernel[(programs,)](
            bits,
            support,
            *common,
            *sizes,
            len(rows),
            ROWS,
            self.lanes,
            SELECT_BLOCK,
            DIGIT_BITS,
            num_warps=SELECT_WARPS,
        )
        _rank_kernel[(programs,)](
            plane,
            support,
            *common,
            quantiles,
            *sizes,
            *(self.quantiles[i] for i in picks),
            self.temperature,
            len(rows),
            ROWS,
            self.lanes,
        )
        return quantiles

    def _quantiles_by_sorting(self, plane: Tensor, rows: range, support: Tensor) -> Tensor:
        values, order = plane.sort(dim=-1, stable=True)
        poison = (plane * 0).sum(1)
        quantiles = []
        for row in rows:
            i = min(row, 2)
            chosen = slice(self.starts[i], self.starts[i] + self.size)
            support[:, row] = order[:, chosen]
            weights = reference.support_weights(self.n, self.quantiles[i], self.temperature, self.size, plane)
            low = values[:, chosen][:, :1]
            rise = ((values[:, chosen] - low) * weights).sum(1)
            quantiles.append(low[:, 0] + rise + poison)
        return torch.stack(quantiles, 1)

    def box(self, plane: Tensor, average: bool) -> Tensor:
        """Window sums of every pixel, or their averages."""
        for down in (False, True):
            source, plane = plane, self.plane()
            _box_kernel[(self.batch * self.blocks,)](
                source,
                plane,
                self.height,
                self.width,
                self.blocks,
                self.radius,
                down,
                average and down,
                self.exclude,
                self.block,
            )
        return plane


def forward(vjp: Tensor, window, temperature, slope, eps, padding, area) -> tuple[Tensor, Tensor]:
    """(M, support) of the op density_mask."""
    with torch.cuda.device_of(vjp):
        p = _Problem(vjp, window, temperature, slope, eps, padding, area)
        mask = p.empty(p.batch, 1, p.height, p.width)
        support = p.empty(p.batch, ROWS, p.size, dtype=torch.int64)
        if p.batch == 0:
            return mask, support
        grid = (p.batch * p.blocks,)
        g = p.mean(magnitude=True)
        quantiles = p.quantiles_of(g, range(3), support)
        steps = p.plane()
        _steps_kernel[grid](g, quantiles, steps, p.n, p.blocks, p.slope, p.eps, p.block)
        d = p.box(steps, average=True)
        quantiles = p.quantiles_of(d, range(3, 4), support)
        _mask_kernel[grid](d, quantiles, mask, p.n, p.blocks, p.slope, p.block)
        return mask, support


def backward(
    grad_mask: Tensor, vjp: Tensor, mask: Tensor, support: Tensor, window, temperature, slope, eps, padding, area
) -> Tensor:
    """dL/dR_c of the op density_mask."""
    with torch.cuda.device_of(vjp):
        p = _Problem(vjp, window, temperature, slope, eps, padding, area)
        out = p.empty(p.batch, 1, p.height, p.width, dtype=vjp.dtype)
        if p.batch == 0:
            return out
        if p.size > WIDEST_SUPPORT:
            options = (window, temperature, slope, eps, padding, area)
            return out.copy_(reference.density_mask_backward(grad_mask, reference.widen(vjp), mask, support, *options))
        grad_mask, mask, support = (t.contiguous() for t in (grad_mask.to(p.dtype), mask, support))
        grad_average = p.box(_grad_of_average(p, grad_mask, mask, support), average=False)
        _write_grad(p, grad_average, support, out)
        return out


def _grad_of_average(p: _Problem, grad_mask: Tensor, mask: Tensor, support: Tensor) -> Tensor:
    """dL/dd, divided as the box average divides."""
    out, partials = p.plane(), p.empty(p.batch, p.blocks)
    sizes = (p.height, p.width, p.blocks, p.radius)
    _average_grad_kernel[(p.batch * p.blocks,)](grad_mask, mask, out, partials, *sizes, p.slope, p.exclude, p.block)
    _average_support_kernel[(p.batch,)](
        grad_mask,
        mask,
        support,
        partials,
        out,
        *sizes,
        p.starts[2],
        p.size,
        p.slope,
        p.quantiles[2],
        p.temperature,
        p.exclude,
        ROWS,
        p.lanes,
        PARTIALS,
    )
    return out


def _write_grad(p: _Problem, grad_average: Tensor, support: Tensor, out: Tensor) -> None:
    mean, quantiles, partials = p.mean(magnitude=False), p.empty(p.batch, 3), p.empty(p.batch, 2, p.blocks)
    _quantile_kernel[(p.batch * 3,)](
        mean, support, quantiles, p.n, p.size, *p.starts, *p.quantiles, p.temperature, ROWS, p.lanes
    )
    _vjp_grad_kernel[(p.batch * p.blocks,)](
        grad_average,
        mean,
        quantiles,
        out,
        partials,
        p.channels,
        p.n,
        p.blocks,
        p.slope,
        p.eps,
        p.block,
    )
    _vjp_support_kernel[(p.batch * 3,)](
        grad_average,
        mean,
        quantiles,
        support,
        partials,
        out,
        p.channels,
        p.n,
        p.blocks,
        p.size,
        *p.starts,
        *p.quantiles,
        p.temperature,
        p.slope,
        p.eps,
        ROWS,
        p.lanes,
        PARTIALS,
    )
