"""Checkpoints that hold for the derivative of a derivative.

A non-reentrant checkpoint keeps no activations of its function; but a VJP that is to be differentiated again keeps
them all, with all cotangents beside them. Inside :func:`units` a module with children that runs directly in such a
checkpoint is a unit: of its forward only inputs and outputs are kept, of its VJP only the cotangents that enter it.
Both are run again where their derivatives are taken.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint
from torch.utils._pytree import tree_flatten, tree_unflatten

from .fused_layers import fused_double_backward, input_gradients, is_input_only
from .outputs import tensors_of
from .passes import Autocast, Noise, with_state


@contextlib.contextmanager
def units(model: nn.Module, places: Sequence[str]) -> Iterator[None]:
    """Around a forward pass, and around what a checkpoint recomputes of it.

    ``places``: of feature maps that are captured; modules around them are no units, as their insides have no graph.
    """
    patched = []
    try:
        for name, module in model.named_modules():
            around = any(place == name or place.startswith(f"{name}.") for place in places)
            if name and not around and next(module.children(), None) is not None:
                patched.append((module, vars(module).get("forward")))
                module.forward = _Called(module, module.forward)
        yield
    finally:
        for module, own in patched:
            vars(module).pop("forward")
            if own is not None:
                module.forward = own


_GIVEN = object()  # where a tensor stands that comes in or goes out


class _Called:
    """A module's forward, that makes it a unit where it may be one."""

    def __init__(self, module: nn.Module, forward: Callable):
        self.module, self.forward = module, forward

    def __call__(self, *args, **kwargs):
        values, spec = tree_flatten((args, kwargs))
        inputs = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
        checkpointed = torch.is_grad_enabled() and inputs and _checkpoint()
        if not checkpointed:
            return self.forward(*args, **kwargs)
        unit = _Unit(self.module, self.forward, values, spec)
        if not unit.tried(counts=checkpointed != "recomputing"):
            return self.forward(*args, **kwargs)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        # Past the checkpoint, which so has nothing to recompute.
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            outputs = iter(_Run.apply(unit, *inputs, *parameters))
        return tree_unflatten([next(outputs) if t is _GIVEN else t for t in unit.leaves], unit.spec_of_output)


def _checkpoint() -> str:
    """Whether a checkpoint's function runs, for the first time or again; empty if none does."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or getattr(hooks[0], "__module__", "") != checkpoint.__name__:
        return ""
    again = hooks[0].__qualname__.startswith(checkpoint._recomputation_hook.__name__)
    return "recomputing" if again else "first"


class _Unit:
    """What is needed to run a module again as it ran."""

    def __init__(self, module: nn.Module, forward: Callable, values: list, spec):
        self.module, self.forward, self.spec = module, forward, spec
        self.values = [_GIVEN if isinstance(v, Tensor) and v.requires_grad else v for v in values]
        self.inputs = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
        device = self.inputs[0].device
        self.noise, self.autocast = Noise(device), Autocast(device.type)
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def tried(self, counts: bool) -> bool:
        """Runs the module without a graph; False, and nothing has happened, where a graph would have shown outside.

        ``counts``: running statistics move.
        """
        stored, versions = self._stored(), [t._version for t in self.inputs]
        state = {} if counts else {name: buffer.clone() for name, buffer in self.buffers.items()}
        with torch.no_grad():
            output = with_state(self.module, state, lambda: self._call(self.inputs))
        leaves, self.spec_of_output = tree_flatten(output)
        hidden = any(not isinstance(v, Tensor) and any(True for _ in tensors_of(v)) for v in leaves)
        if hidden or self._stored() != stored:
            self._undo()
            return False
        if [t._version for t in self.inputs] != versions:
            raise RuntimeError(
                f"{type(self.module).__name__} writes into its input inside a checkpoint, which cannot be recomputed: "
                "make it out of place (inplace=False)"
            )
        self.outputs = [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]
        self.leaves = [_GIVEN if isinstance(v, Tensor) and v.is_floating_point() else v for v in leaves]
        self.inputs = []
        return True

    def _stored(self) -> list[int]:
        """Tensors that modules hold beside parameters and buffers: an auxiliary loss needs its graph."""
        own = ("_parameters", "_buffers", "_modules")
        return [
            id(tensor)
            for module in self.module.modules()
            for tensor in tensors_of([v for k, v in vars(module).items() if k not in own])
        ]

    def _undo(self) -> None:
        self.noise.rewind()
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(self.buffers[name])

    def _call(self, inputs: Sequence[Tensor]):
        given = iter(inputs)
        args, kwargs = tree_unflatten([next(given) if v is _GIVEN else v for v in self.values], self.spec)
        return self.forward(*args, **kwargs)

    def again(self, leaves: Sequence[Tensor], use: Callable[[list[Tensor]], object], counts: bool = False):
        """``use(outputs)``, with a graph of these leaves, inputs and parameters.

        ``counts``: as with any checkpoint, running statistics move once more.
        """
        own = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        inputs, parameters = leaves[: len(leaves) - len(own)], leaves[len(leaves) - len(own) :]
        for leaf, parameter in zip(parameters, own.values(), strict=True):
            leaf.__dict__.update(parameter.__dict__)  # what users have attached
        kept = _running_statistics(self.module) if counts else ()
        state = {name: buffer.clone() for name, buffer in self.buffers.items() if name not in kept}
        state |= dict(zip(own, parameters, strict=True))
        return with_state(self.module, state, lambda: use(self._outputs(inputs)))

    def _outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad(), self.noise.again(), self.autocast.again(), fused_double_backward():
            output = self._call(inputs)
        return [v for v in tree_flatten(output)[0] if isinstance(v, Tensor) and v.is_floating_point()]


def _running_statistics(module: nn.Module) -> set[str]:
    return {
        f"{name}.{key}" if name else key
        for name, part in module.named_modules()
        if part.training and getattr(part, "track_running_stats", False) is True
        for key, _ in part.named_buffers(recurse=False)
    }


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


class _Run(Function):
    """(inputs, parameters) -> outputs."""

    @staticmethod
    def forward(ctx, unit, *tensors):
        ctx.unit = unit
        ctx.save_for_backward(*tensors)
        outputs, unit.outputs = tuple(unit.outputs), []
        return outputs

    @staticmethod
    def backward(ctx, *cotangents):
        tensors, count = ctx.saved_tensors, sum(v is _GIVEN for v in ctx.unit.values)
        if is_input_only(cotangents[0]):
            found = _VJP.apply(ctx.unit, len(cotangents), count, *cotangents, *tensors)
            return None, *found, *[None] * (len(tensors) - count)
        if torch.is_grad_enabled():
            raise RuntimeError("a checkpointed module of a step was differentiated again: only its VJP can be")
        leaves = _leaves(tensors)
        ctx.unit.again(leaves, lambda outputs: _backward(outputs, cotangents), counts=True)
        return None, *(leaf.grad for leaf in leaves)


class _VJP(Function):
    """(cotangents, inputs, parameters) -> cotangents of the inputs."""

    @staticmethod
    def forward(ctx, unit, of_outputs, of_inputs, *tensors):
        ctx.unit, ctx.of_outputs, ctx.of_inputs = unit, of_outputs, of_inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        cotangents, leaves = tensors[:of_outputs], _leaves(tensors[of_outputs:])
        return unit.again(leaves, lambda outputs: _vjp(outputs, cotangents, leaves[:of_inputs], create_graph=False))

    @staticmethod
    def backward(ctx, *directions):
        if torch.is_grad_enabled():
            raise RuntimeError("the VJP of a checkpointed module was differentiated twice: only once is possible")
        of_all = _leaves(ctx.saved_tensors)
        cotangents, leaves = of_all[: ctx.of_outputs], of_all[ctx.of_outputs :]

        def derivatives(outputs):
            with torch.enable_grad():
                found = _vjp(outputs, cotangents, leaves[: ctx.of_inputs], create_graph=True)
            _backward(found, directions)

        ctx.unit.again(leaves, derivatives)
        return None, None, None, *(leaf.grad for leaf in of_all)


def _vjp(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], create_graph: bool):
    pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
    found = input_gradients(*zip(*pairs, strict=True), inputs, create_graph)
    return tuple(torch.zeros_like(x) if r is None else r for r, x in zip(found, inputs, strict=True))


def _backward(outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> None:
    pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if g is not None and y.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
