"""A model computes in float64 throughout, casts in its forward notwithstanding."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.dispatch import without_autocast
from .twin import mapped

NARROW = (torch.float32, torch.float16, torch.bfloat16)


class _NoNarrowing(TorchDispatchMode):
    """Casts to a narrower type inside a model give float64 instead: difference quotients need every digit."""

    def __init__(self):
        super().__init__()
        self.narrowed = False  #: something was narrowed all the same

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") in NARROW:
            kwargs = {**kwargs, "dtype": torch.float64}
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype in NARROW:
            self.narrowed |= any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        return result


@contextmanager
def in_float64(device_type: str) -> Iterator[_NoNarrowing]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with without_autocast(device_type), _NoNarrowing() as mode:
            yield mode
    finally:
        torch.set_default_dtype(before)


def to_float64(inputs: tuple) -> tuple:
    return mapped(_double, inputs)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
