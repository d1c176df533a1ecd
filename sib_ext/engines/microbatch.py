"""Batches in parts: the memory of a few images, the statistics of the whole batch.

The loss needs R of every image before dL/dR of any is known. So each part runs twice: once without a graph of second
order, for its values, and once more in ``loss.backward()``, where the cotangents of those values are known, with the
exact engine: a checkpoint over the batch. A part's backward is a real one, into leaves that share the parameters'
memory; their sum then reaches the parameters once a step, like any gradient.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from ..distributed import graph_nodes
from ..passes import Autocast, Noise, with_state
from . import double_backward
from .vjps import Task, VJPs


class _Part(NamedTuple):
    """Images, and all that their pass has to be repeated with."""

    x: Tensor
    target: Tensor
    noise: Noise
    buffers: dict[str, Tensor]
    logits: Tensor  #: of the first run


class InParts:
    """The engine for parts of at most ``size`` images."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, task: Task, x: Tensor, target: Tensor) -> VJPs:
        parts, values, used = [], [], set()
        for images, labels in zip(x.split(self.size), target.split(self.size), strict=True):
            buffers = {name: buffer.clone() for name, buffer in task.model.named_buffers()}
            noise = Noise(x.device)
            found = double_backward.vjps(task, images, labels, create_graph=False)
            parts.append(_Part(images, labels, noise, buffers, found.logits.detach()))
            used |= {id(node.variable) for node in graph_nodes([found.logits.grad_fn]) if hasattr(node, "variable")}
            values.append([t.detach() for t in found.tensors()])
        # Only those that the logits were computed from: a parameter left out keeps grad None, and DDP sees it unused.
        named = {n: p for n, p in task.model.named_parameters() if p.requires_grad and id(p) in used}
        again = _Again(task, parts, tuple(named), Autocast(x.device.type))
        joined = [torch.cat(column) for column in zip(*values, strict=True)]
        return VJPs.of(_Repeated.apply(again, joined, *named.values()))


class _Repeated(Function):
    """(parameters) -> the values of all parts, whose derivatives are taken when the parts are run again."""

    @staticmethod
    def forward(ctx, again, values, *parameters):
        ctx.again = again
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters)  # their versions: a step between forward and backward is an error
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        return None, None, *ctx.again.gradients(ctx.saved_tensors, cotangents)


class _Again(NamedTuple):
    """The second run of the parts."""

    task: Task
    parts: Sequence[_Part]
    names: tuple[str, ...]
    autocast: Autocast

    def gradients(self, parameters: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """d<cotangents, values> by parameter."""
        leaves = [nn.Parameter(p.detach()) for p in parameters]
        start = 0
        for part in self.parts:
            rows = slice(start, start + len(part.x))
            start = rows.stop
            state = dict(zip(self.names, leaves, strict=True)) | {n: b.clone() for n, b in part.buffers.items()}
            with_state(self.task.model, state, functools.partial(self._add, part, cotangents, rows))
        return [leaf.grad for leaf in leaves]

    def _add(self, part: _Part, cotangents: Sequence[Tensor | None], rows: slice) -> None:
        """The part's derivatives, into the leaves that stand in for the parameters."""
        with torch.enable_grad(), self.autocast.again(), part.noise.again():
            found = double_backward.vjps(self.task, part.x, part.target)
        _check_repeated(found.logits.detach(), part.logits)
        pairs = zip(found.tensors(), cotangents, strict=True)
        pairs = [(t, g[rows].to(t.dtype)) for t, g in pairs if g is not None and t.requires_grad]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


def _check_repeated(logits: Tensor, first: Tensor) -> None:
    """Otherwise dL/dR of the first run would be taken for that of another function."""
    tolerance = max(1e-4, 32 * torch.finfo(first.dtype).eps)
    if not torch.allclose(logits, first, rtol=tolerance, atol=tolerance * float(first.abs().max()), equal_nan=True):
        raise RuntimeError(
            "microbatch: the model gave other logits when a part was run again, so something changes from pass to pass "
            "beside its buffers and the random numbers of torch, Python and numpy (a counter, a generator of its own, "
            "another thread that draws from the same generator): leave microbatch out, or take that away"
        )
