"""Batches in parts: the memory of a few images, the statistics of the whole batch.

The loss needs R of every image before dL/dR of any is known. So each part runs twice: once without a graph of second
order, for its values, and once more in ``loss.backward()``, where the cotangents of those values are known, with the
exact engine: a checkpoint over the batch. A part's backward is a real one, into leaves that share the parameters'
memory; their sum then reaches the parameters once a step, like any gradient.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..graph import graph_leaves, has_reentrant_checkpoint
from ..passes import Autocast, Noise, stand_in, with_state
from . import double_backward
from .vjps import Task, VJPs

# Of logits and VJPs, relative: a second run differs by what a GPU's sums in another order make of it.
REPEATED = 1e-2

Values = Callable[[Task, Tensor, Tensor, bool], Sequence[Tensor]]


def _logits(task: Task, x: Tensor, target: Tensor, create_graph: bool) -> Sequence[Tensor]:
    return (task.logits(x, target),)


def _logits_and_vjps(task: Task, x: Tensor, target: Tensor, create_graph: bool) -> Sequence[Tensor]:
    return double_backward.vjps(task, x, target, create_graph).tensors()


class _Part(NamedTuple):
    """Images, and all that their pass has to be repeated with."""

    x: Tensor
    target: Tensor
    noise: Noise
    buffers: dict[str, Tensor]


class InParts:
    """The engine for parts of at most ``size`` images."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, task: Task, x: Tensor, target: Tensor) -> VJPs:
        return VJPs.of(self._run(_logits_and_vjps, task, x, target))

    def logits(self, task: Task, x: Tensor, target: Tensor) -> Tensor:
        """Of a step without terms."""
        return self._run(_logits, task, x, target)[0]

    def _run(self, values_of: Values, task: Task, x: Tensor, target: Tensor) -> Sequence[Tensor]:
        if target.requires_grad:
            raise ValueError("microbatch: target requires grad, but gets none in parts: detach it")
        parts, values, used = [], [], set()
        for images, labels in zip(x.split(self.size), target.split(self.size), strict=True):
            buffers = {name: buffer.clone() for name, buffer in task.model.named_buffers()}
            parts.append(_Part(images, labels, Noise(x.device), buffers))
            with _WithoutGraph() as hidden:
                found = values_of(task, images, labels, False)
            used |= {id(leaf) for leaf in graph_leaves(found[:1])}
            if has_reentrant_checkpoint(found[0]):  # whose parameters the graph does not show
                used |= hidden.parameters
            values.append([t.detach() for t in found])
        # Only those that the logits were computed from: a parameter left out keeps grad None, and DDP sees it unused.
        named = {n: p for n, p in task.model.named_parameters() if p.requires_grad and id(p) in used}
        joined = [torch.cat(column) for column in zip(*values, strict=True)]
        again = _Again(values_of, task, parts, joined, tuple(named), Autocast(x.device.type))
        return _Repeated.apply(again, *named.values())


class _WithoutGraph(TorchFunctionMode):
    """Notes the parameters that functions take while gradients are off."""

    def __init__(self):
        super().__init__()
        self.parameters: set[int] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            self.parameters |= {id(p) for p in tree_leaves((args, kwargs)) if isinstance(p, nn.Parameter)}
        return function(*args, **kwargs)


class _Repeated(Function):
    """(parameters) -> the values of all parts, whose derivatives are taken when the parts are run again."""

    @staticmethod
    def forward(ctx, again, *parameters):
        ctx.again = again
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters)  # their versions: a step between forward and backward is an error
        return tuple(t.view_as(t) for t in again.values)

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        return None, *ctx.again.gradients(ctx.saved_tensors, cotangents)


class _Again(NamedTuple):
    """The second run of the parts."""

    values_of: Values
    task: Task
    parts: Sequence[_Part]
    values: Sequence[Tensor]  #: of the first run, of all parts
    names: tuple[str, ...]
    autocast: Autocast

    def gradients(self, parameters: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """d<cotangents, values> by parameter."""
        leaves, start = list(map(stand_in, parameters)), 0
        for part in self.parts:
            rows = slice(start, start + len(part.x))
            start = rows.stop
            state = dict(zip(self.names, leaves, strict=True)) | {n: b.clone() for n, b in part.buffers.items()}
            with_state(self.task.model, state, functools.partial(self._add, part, cotangents, rows, leaves))
        return [leaf.grad for leaf in leaves]

    def _add(self, part: _Part, cotangents: Sequence[Tensor | None], rows: slice, leaves: Sequence[Tensor]) -> None:
        """The part's derivatives, into the leaves that stand in for the parameters."""
        with torch.enable_grad(), self.autocast.again(), part.noise.again():
            found = self.values_of(self.task, part.x, part.target, True)
        _check_repeated(found, [value[rows] for value in self.values])
        own = set(map(id, leaves))
        if any(isinstance(leaf, nn.Parameter) and id(leaf) not in own for leaf in graph_leaves(found[:1])):
            raise RuntimeError(
                "microbatch: the model reaches a parameter past its modules (through a list, say): take it from the "
                "module that has it, or leave microbatch out"
            )
        pairs = zip(found, cotangents, strict=True)
        pairs = [(t, g[rows].to(t.dtype)) for t, g in pairs if g is not None and t.requires_grad]
        if pairs:
            values, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(values, gradients)


def _check_repeated(again: Sequence[Tensor], first: Sequence[Tensor]) -> None:
    """Otherwise dL/dR of the first run would be taken for that of another function."""
    for value, before in zip(again, first, strict=True):
        value, before = value.detach().float(), before.float()
        size = torch.linalg.vector_norm(before)
        # A loss that is not finite is a GradScaler's affair.
        if (torch.linalg.vector_norm(value - before) > REPEATED * size) & size.isfinite():
            raise RuntimeError(
                "microbatch: the model gave other logits, or another VJP, when a part was run again, so something "
                "changes from pass to pass beside its mode, its buffers and the random numbers of torch, Python and "
                "numpy (a counter, a generator of its own, another thread that draws from the same generator): leave "
                "microbatch out, or take that away"
            )
