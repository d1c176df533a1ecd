"""Where the channels and the positions of a feature map are: planes, channels last, or tokens."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..checks import describe
from ..estimators import class_activation

MOST_PREFIX_TOKENS = 8  # class and distillation tokens and registers


class Layout(NamedTuple):
    """How a tensor of shape [B,C,h,w], [B,h,w,C] or [B,prefix+h*w,C] is read."""

    dims: int
    channels_last: bool
    prefix: int  #: tokens before those of the grid
    height: int
    width: int
    proportional: bool = True  #: h:w = H:W, to within a row or a column

    @property
    def positions(self) -> int:
        return self.height * self.width

    def planes(self, tensor: Tensor) -> Tensor:
        """[B,C,h,w], without the prefix."""
        if self.dims == 3:
            return tensor[:, self.prefix :].transpose(1, 2).unflatten(2, (self.height, self.width))
        return tensor.permute(0, 3, 1, 2) if self.channels_last else tensor


def layout_of(shape: Sequence[int], size: Sequence[int]) -> Layout | None:
    """The layout of a feature map of that shape, None where it cannot be one.

    Four dimensions are planes [B,C,h,w], unless those have other proportions than the images and [B,h,w,C] has
    theirs, exactly or as a patch size would cut them. Three are tokens, row by row, of such a grid after the least
    possible number of others.

    Args:
        size: (H, W) of the images.
    """
    grids = _grids(*size)
    if len(shape) == 4:
        (height, width), (H, W) = shape[2:], size
        exact = grids.get(height * width) == (height, width)
        if not exact and grids.get(shape[1] * shape[2]) == tuple(shape[1:3]):
            return Layout(4, True, 0, shape[1], shape[2])
        return Layout(4, False, 0, height, width, exact or abs(height * W - width * H) <= max(H, W))
    if len(shape) == 3:
        for prefix in range(MOST_PREFIX_TOKENS + 1):
            if shape[1] - prefix in grids:
                return Layout(3, True, prefix, *grids[shape[1] - prefix])
    return None


def _grids(height: int, width: int) -> dict[int, tuple[int, int]]:
    """Number of positions -> (h, w): exact proportions, and those of every patch size, with or without a rest."""
    common = math.gcd(height, width)
    grids = [(height // common * i, width // common * i) for i in range(1, common + 1)]
    for patch in range(1, min(height, width) + 1):
        grids += (height // patch, width // patch), (-(-height // patch), -(-width // patch))
    return {h * w: (h, w) for h, w in reversed(grids)}


def class_activation_of(name: str, features: Tensor, vjp: Tensor | None, size: Sequence[int]) -> Tensor:
    """:func:`sib_ext.functional.class_activation` [B,1,h,w] of a feature map or of tokens, named for errors.

    Args:
        features, vjp: A and R_A, [B,C,h,w], [B,h,w,C] or tokens [B,T,C], see :func:`layout_of`.
        size: (H, W) of the images.

    Raises:
        ValueError: no such shape, or nothing that the logits depend on.
    """
    if vjp is None:
        raise ValueError(
            f"features: the logits were not computed from {name!r}: pass what the model's forward pass went through"
        )
    layout = layout_of(features.shape, size)
    if layout is None:
        raise ValueError(
            f"layers: the output of {name!r} must be a feature map [B,C,h,w] or [B,h,w,C], or tokens [B,T,C] of a grid "
            f"with the proportions of the images, {size[0]}:{size[1]}, after at most {MOST_PREFIX_TOKENS} others, got "
            f"{describe(features)}: name another layer"
        )
    return class_activation(layout.planes(features), layout.planes(vjp))
