"""Copies of a model to try things on: whatever happens to them, the model and the world stay as they were."""

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..checks import check_field
from ..passes import unwrapped
from . import attached


def check_module(model) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_images(x) -> None:
    check_field("x", x)
    if x.shape[0] == 0:
        raise ValueError("x must have at least one image, got an empty batch")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x has NaN or Inf: pass a batch of images as in training")


def check_forward(model: nn.Module, x: Tensor):
    """What the model returns.

    Raises:
        ValueError: it does not take ``x``.
    """
    try:
        with torch.no_grad():
            return model(x.clone())
    except Exception as error:
        raise ValueError(
            f"model(x) raised {type(error).__name__} for x {list(x.shape)} of {x.dtype} on {x.device}, "
            f"before any derivative: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["(no message)"])[0]


@contextmanager
def undisturbed(x: Tensor) -> Iterator[None]:
    """Gradients on; every random number generator as before, afterwards."""
    numbers, of_numpy = random.getstate(), numpy.random.get_state()
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        random.setstate(numbers)
        numpy.random.set_state(of_numpy)


def reseed(device: torch.device) -> None:
    """The same dropout in every evaluation. Not torch.manual_seed, which would seed a GPU that is not yet in use."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def mapped(function: Callable[[Tensor], object], value):
    """``value`` with every tensor replaced, in nested tuples, lists, mappings and dataclasses."""

    def leaf(part):
        if isinstance(part, Tensor):
            return function(part)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            fields = {f.name: mapped(function, getattr(part, f.name)) for f in dataclasses.fields(part)}
            part = copy.copy(part)
            for name, changed in fields.items():
                object.__setattr__(part, name, changed)
        return part

    return tree_map(leaf, value)


def tensors_in(inputs: tuple) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(found.append, inputs)
    return found


def kept(inputs: tuple) -> tuple:
    """Copies for later: leaves that require grad where the originals do."""
    return mapped(lambda t: t.detach().clone().requires_grad_(t.requires_grad), inputs)


def signature(inputs: tuple) -> str:
    """Shapes, types and other values."""
    return str(mapped(lambda t: (t.shape, t.dtype, t.requires_grad), inputs))


def twin(model: nn.Module) -> nn.Module:
    """A deep copy, unwrapped, without gradients; its hooks have copies of what they hold.

    Raises:
        ValueError: something in it cannot be copied.
    """
    model = unwrapped(model)
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise ValueError("model holds a torch.jit.ScriptModule, which takes no hooks: check it before it is scripted")
    copied = attached.copied(model)
    for name, module in list(copied.named_modules()):
        if name and module is not unwrapped(module):
            copied.set_submodule(name, unwrapped(module))
    for parameter in copied.parameters():
        parameter.grad = None
    return copied
