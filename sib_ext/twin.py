"""Copies of a model to try things on: whatever happens to them, the model and the world stay as they were."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .checks import check_field
from .passes import unwrapped


def check_module(model) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_images(x) -> None:
    check_field("x", x)
    if x.shape[0] == 0:
        raise ValueError("x must have at least one image, got an empty batch")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x has NaN or Inf: pass a batch of images as in training")


def check_forward(model: nn.Module, x: Tensor) -> None:
    try:
        with torch.no_grad():
            model(x.clone())
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


def twin(model: nn.Module) -> nn.Module:
    """A deep copy, unwrapped, without gradients."""
    model = unwrapped(model)
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise ValueError("model holds a torch.jit.ScriptModule, which takes no hooks: check it before it is scripted")
    # Modules may hold results of an earlier forward (weight_norm does, and so do lists of features), which deepcopy
    # refuses.
    held = (t for m in model.modules() for t in tree_leaves(dict(vars(m))))
    memo = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"model cannot be copied ({first_line(error)}): check it before it is wrapped, sharded or has run"
        ) from error
    for name, module in list(copied.named_modules()):
        if name and module is not unwrapped(module):
            copied.set_submodule(name, unwrapped(module))
    for parameter in copied.parameters():
        parameter.grad = None
    return copied
