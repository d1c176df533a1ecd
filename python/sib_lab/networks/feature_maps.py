"""The layer of a network that class-activation maps look at."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sib_ext.layers import find_feature_map

from .errors import NetworkError, first_line


def cam_layer(model: nn.Module, size: int | None = None) -> str:
    """Name of the module whose output class-activation maps look at (:func:`sib_ext.layers.find_feature_map`).

    That of a vision transformer gives tokens [B,N,D] (see :func:`token_grid`), any other a feature map [B,C,h,w].

    Args:
        size: side of the images that the network is tried on; default ``model.image_size`` or 224.

    Raises:
        NetworkError: there is no such module, or the network fails on such images.
    """
    size = size or getattr(model, "image_size", None) or 224
    size = size[0] if isinstance(size, tuple) else size
    try:
        with evaluating(model):
            name = find_feature_map(model, probe(model, size), functions=False)
    except Exception as error:  # whatever a user's network raises
        raise NetworkError(
            f"{type(model).__name__} fails on images [2,3,{size},{size}]: {first_line(error)}."
        ) from error
    if name is None:
        raise NetworkError(
            f"{type(model).__name__} has no module with a feature map [B,C,h,w] for class-activation maps on images of "
            f"{size} px: name a layer yourself."
        )
    return name


def token_grid(tokens: Tensor, prefix: int | None = None) -> Tensor:
    """Tokens [B,prefix+h*w,D] of a vision transformer on square images -> their grid [B,D,h,w], row by row.

    Args:
        tokens: e.g. the output (or its gradient) of the layer that :func:`cam_layer` names.
        prefix: tokens before the grid that are no patches (class token, registers); None: the first of 1, 0, 2, 5
            that leaves a square number.

    Raises:
        ValueError: not [B,N,D], or no square number of tokens is left.
    """
    if tokens.dim() != 3:
        raise ValueError(f"tokens must be [B,N,D], got {list(tokens.shape)}")
    count = tokens.shape[1]
    for skipped in (1, 0, 2, 5) if prefix is None else (prefix,):
        side = math.isqrt(max(count - skipped, 0))
        if side > 0 and side * side == count - skipped:
            return tokens[:, skipped:].transpose(1, 2).unflatten(2, (side, side))
    raise ValueError(f"{count} tokens are no square grid after {'1, 0, 2 or 5' if prefix is None else prefix} others")


def probe(model: nn.Module, size: int) -> Tensor:
    like = next(model.parameters(), torch.zeros(()))
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(like)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
