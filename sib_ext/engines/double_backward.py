"""The exact engine: autograd through R's own graph, with layers whose second derivative costs what it must."""

import contextlib
import functools
import math

import torch
from torch import Tensor
from torch.autograd import Function

from .. import distributed, seeds
from ..checkpoints import units
from ..fused_layers import fused_double_backward
from ..layers import captured
from ..passes import kept, running_statistics
from .vjps import Task, VJPs


def vjps(task: Task, x: Tensor, target: Tensor, create_graph: bool = True) -> VJPs:
    """Logits, feature maps and VJPs; with ``create_graph`` these can be differentiated by the parameters.

    What runs before the first layer is run as it is where the VJP of x is not wanted.

    Raises:
        RuntimeError: the logits do not depend on x, or on a layer, in a differentiable way.
    """
    leaf = x.detach().requires_grad_(task.of_input)
    around = functools.partial(units, task.model, task.layers, task.ordinary)
    fused = fused_double_backward(around, passive=0 if task.of_input else math.inf, images=leaf)
    reached = functools.partial(_reached, task, fused)
    with fused, captured(task.model, task.layers, reached) as found, around(fused.is_active):
        logits = task.logits(leaf, target)
    features = _features(task, found)
    if not logits.requires_grad:
        raise RuntimeError(f"the model's logits do not require grad: none of its layers is differentiable in x{CUT}")
    inputs = (leaf, *features) if task.of_input else features
    s = seeds.scalar(logits, target, task.criterion.scalar_seed)
    # What is recomputed on the way counted when it was computed.
    recomputing = kept(running_statistics(task.model).values()) if fused.recomputes else contextlib.nullcontext()
    with distributed.twice_differentiable(logits, inputs), recomputing:
        found = seeds.vjps(_scaled(task, s), inputs, create_graph)
    for name, vjp in zip((*["x"][: task.of_input], *task.layers), found, strict=True):
        if vjp is None:
            raise RuntimeError(f"the model's logits do not depend on {name!r} in a differentiable way{CUT}")
    of_x, of_features = (found[0], found[1:]) if task.of_input else (None, found)
    unscaled = tuple(_unscaled(task, vjp) for vjp in of_features)
    return VJPs(logits, None if of_x is None else _unscaled(task, of_x), features, unscaled)


def _reached(task: Task, fused: fused_double_backward, feature_map: Tensor) -> Tensor | None:
    fused.activate()
    if feature_map.is_inference():
        raise RuntimeError(
            "layers: a feature map was computed under torch.inference_mode, which autograd cannot use: run what is "
            "frozen under torch.no_grad"
        )
    frozen = not (task.of_input or feature_map.requires_grad)  # and all that it was computed from
    return differentiable(feature_map) if frozen else None


def differentiable(tensor: Tensor) -> Tensor:
    """The tensor, or of a view a copy, with a graph from here on; it may still be overwritten."""
    tensor = tensor.clone() if tensor._is_view() else tensor
    with torch.enable_grad():
        return _Start.apply(tensor, torch.zeros((), device=tensor.device, requires_grad=True))


class _Start(Function):
    """The tensor itself, no leaf any more."""

    @staticmethod
    def forward(ctx, tensor, anchor):
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return None, None


CUT = ": look for torch.no_grad, .detach() and .data in its forward pass"


def _features(task: Task, found: dict[str, Tensor]) -> tuple[Tensor, ...]:
    for name in task.layers:
        if name not in found:
            of_functions = "; of functions, elementwise ones and cat count" if name.endswith("()") else ""
            raise ValueError(f"layers: {name!r} did not run in the forward pass: name one that does{of_functions}")
        if not found[name].requires_grad:
            raise RuntimeError(f"layers: the output of {name!r} does not depend on x in a differentiable way{CUT}")
    return tuple(found[name] for name in task.layers)


def _scaled(task: Task, s: Tensor) -> Tensor:
    return s if task.scaler is None else task.scaler.scale(s)


def _unscaled(task: Task, gradient: Tensor) -> Tensor:
    if task.scaler is None:
        return gradient
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide / task.scaler.scale(torch.ones((), device=gradient.device))
