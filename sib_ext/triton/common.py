"""What the Triton kernels of both ops share.

Rules that every kernel keeps: no atomics, and no program loads what its own launch stores (what depends on a result
is the next launch); sums go into partials that the next launch adds in a fixed order, so results are the same bit
for bit every time. Offsets into a batch are 64 bits wide. Nothing waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import dispatch

# None of the sizes here is tuned on a GPU.
TILE = 1024  # values that one program holds of a field: channels x pixels
PARTIALS = 512  # partial sums that a program adds at a time

# Under TRITON_INTERPRET=1 a program costs milliseconds and its width nothing.
INTERPRETED = triton.knobs.runtime.interpret

if INTERPRETED:
    from .interpreter import repair

    repair()


def is_channels_last(field: Tensor) -> bool:
    return dispatch.field_format(field) == torch.channels_last


def canonical(field: Tensor) -> Tensor:
    """Contiguous or channels_last without a copy; any other layout is copied."""
    return field.contiguous(memory_format=dispatch.field_format(field))


def strides(field: Tensor) -> tuple[int, int, int]:
    """(batch, channel, pixel) of a canonical field; sizes of one make a tensor's own strides unreliable."""
    channels, pixels = field.shape[1], field.shape[2] * field.shape[3]
    inner = (1, channels) if is_channels_last(field) else (pixels, 1)
    return channels * pixels, *inner


def tile(channels: int, pixels: int) -> tuple[int, int]:
    """(channels, pixels) that one program loads at once, powers of two: a small plane takes several channels."""
    wide = min(TILE, triton.next_power_of_2(pixels))
    return min(TILE // wide, triton.next_power_of_2(channels)), wide


@triton.jit
def sum_of_partials(partials, count, SIZE: tl.constexpr):
    """The sum of ``count`` neighbouring values, always in the same order."""
    lanes = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], partials.dtype.element_ty)
    for first in range(0, count, SIZE):
        total += tl.load(partials + first + lanes, mask=first + lanes < count, other=0)
    return tl.sum(total, 0)
