"""One pass over a model: what it is wrapped in, what it draws, what it changes; how to repeat it.

Every context here puts the model back as it was, also after an exception.
"""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize


def unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, nn.DataParallel | DistributedDataParallel):
            module = module.module
        elif is_compiled(module) and isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def is_compiled(module: nn.Module) -> bool:
    """torch.compile(module), or module.compile() called on it."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def in_place_of(model: nn.Module, function: Callable, *arguments):
    """``function(*arguments)``; in a DistributedDataParallel as its forward pass, which sees one pass a step so."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if inner is None:
            return function(*arguments)
        model = inner
    module = model.module
    model.module = _Module(function, module)
    try:
        return model(*arguments)
    finally:
        model.module = module


def with_state(model: nn.Module, state: Mapping[str, Tensor], function: Callable):
    """``function()`` while the parameters and buffers of the model that ``state`` names are those of ``state``.

    Also in backward passes inside, which may recompute activations. A tensor is replaced wherever the model's modules
    hold it, under however many names. (torch.func.functional_call swaps a module with two names twice, and puts back
    what it had put in.)
    """
    held: list[dict[str, Any]] = [own for module in model.modules() for own in (module._parameters, module._buffers)]
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    instead = {id(named[name]): tensor for name, tensor in state.items()}
    slots = [(own, key, t) for own in held for key, t in own.items() if id(t) in instead]
    cached, cache = parametrize._cache_enabled, parametrize._cache  # by users: weights computed from the others
    if cached:
        parametrize._cache = {}
    try:
        for own, key, tensor in slots:
            own[key] = instead[id(tensor)]
        return function()
    finally:
        if cached:
            parametrize._cache = cache
        for own, key, tensor in slots:
            own[key] = tensor


def stand_in(parameter: Tensor, values: Tensor | None = None) -> nn.Parameter:
    """A leaf in a parameter's memory, or of other values, with what users have attached to the parameter."""
    values = parameter.detach() if values is None else values
    leaf = nn.Parameter(values, requires_grad=parameter.requires_grad)
    leaf.__dict__.update(parameter.__dict__)
    return leaf


class _Module(nn.Module):
    """A function as a module, with the buffers of another, which DistributedDataParallel makes alike on all ranks."""

    def __init__(self, function: Callable, module: nn.Module):
        super().__init__()
        self.forward = function
        self.named_buffers = module.named_buffers  # type: ignore[method-assign]


@contextlib.contextmanager
def kept(buffers: Iterable[Tensor]) -> Iterator[None]:
    """The buffers have the values afterwards that they had before."""
    pairs = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in pairs:
                buffer.copy_(before)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """By name, those that a normalisation in train mode moves."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, module in model.named_modules()
        if module.training and getattr(module, "track_running_stats", False) is True
        for key, buffer in module.named_buffers(recurse=False)
    }


class Noise:
    """The state of the random generators (torch's, Python's, numpy's), so that a pass can draw the same again."""

    def __init__(self, device: torch.device):
        self.devices = [device] if device.type == "cuda" else []
        self.state = self._now()

    def _now(self) -> tuple:
        cuda = [torch.cuda.get_rng_state(d) for d in self.devices]
        return torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state()

    def _set(self, state: tuple) -> None:
        cpu, cuda, of_python, of_numpy = state
        torch.set_rng_state(cpu)
        for device, of_device in zip(self.devices, cuda, strict=True):
            torch.cuda.set_rng_state(of_device, device)
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)

    def rewind(self) -> None:
        """What follows draws what followed when the object was made."""
        self._set(self.state)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draws inside are those that followed when the object was made; draws after it go on as if nothing was."""
        after = self._now()
        self._set(self.state)
        try:
            yield
        finally:
            self._set(after)


class Autocast:
    """The autocast of a pass, for its repetition in a backward pass, which autocast does not reach."""

    def __init__(self, device: str):
        self.options: dict[str, Any] = {"device_type": device, "enabled": False}
        if torch.amp.is_autocast_available(device):
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            self.options |= {"enabled": enabled, "dtype": dtype, "cache_enabled": torch.is_autocast_cache_enabled()}

    def again(self) -> contextlib.AbstractContextManager:
        return torch.autocast(**self.options)
