"""Checkpoints that hold for the derivative of a derivative.

A non-reentrant checkpoint keeps no activations of its function; but a VJP that is to be differentiated again keeps
them all, with all cotangents beside them. Inside :func:`units` a module with children that runs directly in such a
checkpoint is a unit: of its forward only inputs and outputs are kept, of its VJP only the cotangents that enter it.
Both are run again where their derivatives are taken.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from .fused_layers import checkpoint_hook, fused_double_backward, input_gradients, is_input_only, is_recomputation
from .graph import graph_leaves
from .outputs import tensors_of
from .passes import Autocast, Noise, running_statistics, stand_in, with_state


@contextlib.contextmanager
def units(model: nn.Module, places: Sequence[str], ordinary: set[str], active: Callable[[], bool]) -> Iterator[None]:
    """Around a forward pass, and around what a checkpoint recomputes of it.

    Args:
        places: of feature maps that are captured; modules around them are no units, as their insides have no graph.
        ordinary: modules that cannot be units, by name; those that are found are added.
        active: whether what runs now may be one.
    """
    patched = []
    try:
        for name, module in _candidates(model, places):
            patched.append((module, vars(module).get("forward")))
            vars(module)["forward"] = _Called(name, module, module.forward, ordinary, active)
        yield
    finally:
        for module, own in patched:
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own


def _candidates(model: nn.Module, places: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """In one walk, as there is one in every step: the model most often has no checkpoint."""
    modules = dict(model.named_modules())
    if any(hasattr(type(module), "set_reshard_after_backward") for module in modules.values()):
        return []  # FSDP2 does not let leaves take its parameters' place
    # The step looks for SyncBatchNorm in the graph of the logits; scripted modules have no forward to replace.
    apart = (nn.SyncBatchNorm, torch.jit.ScriptModule)
    outside = {""}
    for name in (*places, *(name for name, module in modules.items() if isinstance(module, apart))):
        while name:  # and all that it is in
            outside.add(name)
            name = name.rpartition(".")[0]
    return [(name, module) for name, module in modules.items() if module._modules and name not in outside]


_GIVEN = object()  # where a tensor stands that comes in or goes out


class _Called:
    """A module's forward, that makes it a unit where it may be one."""

    def __init__(self, name: str, module: nn.Module, forward: Callable, ordinary: set[str], active: Callable[[], bool]):
        self.name, self.module, self.forward, self.ordinary, self.active = name, module, forward, ordinary, active

    def __call__(self, *args, **kwargs):
        may_be = torch.is_grad_enabled() and self.name not in self.ordinary and self.active()
        hook = checkpoint_hook() if may_be else None
        if hook is None:
            return self.forward(*args, **kwargs)
        values, spec = tree_flatten((args, kwargs))
        if not any(map(_differentiable, values)):
            return self.forward(*args, **kwargs)
        unit = _Unit(self.module, self.forward, values, spec)
        outputs = unit.tried(values, counts=not is_recomputation(hook))
        if outputs is None:
            self.ordinary.add(self.name)
            return self.forward(*args, **kwargs)
        parameters = dict(self.module.named_parameters())
        inputs = [v for v in values if isinstance(v, Tensor)]
        # Past the checkpoint, which so has nothing to recompute.
        with saved_tensors_hooks(_packed, _unpacked):
            found = iter(_Run.apply(unit, outputs, *inputs, *(parameters[name] for name in unit.names)))
        return tree_unflatten([next(found) if t is _GIVEN else t for t in unit.leaves], unit.spec_of_output)


def _packed(tensor: Tensor) -> tuple[Tensor, int]:
    """Autograd does not watch the versions of what hooks have saved."""
    return tensor, tensor._version


def _unpacked(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError("a tensor that a checkpointed module needs was modified by an inplace operation")
    return tensor


def _differentiable(value) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _Unit:
    """What is needed to run a module again as it ran."""

    def __init__(self, module: nn.Module, forward: Callable, values: list, spec):
        self.module, self.forward, self.spec = module, forward, spec
        self.values = [_GIVEN if isinstance(v, Tensor) else v for v in values]
        self.count = sum(v is _GIVEN for v in self.values)
        device = next(v.device for v in values if _differentiable(v))
        self.noise, self.autocast = Noise(device), Autocast(device.type)
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self.names: list[str] = []  #: of the parameters that the outputs are computed from

    def tried(self, values: list, counts: bool) -> list[Tensor] | None:
        """The outputs, without their graph; None, and nothing has happened, where it would have shown outside.

        ``counts``: running statistics move.

        Raises:
            RuntimeError: the module writes into its input.
        """
        stored, buffers = _Stored(self.module), dict(self.module.named_buffers())
        versions = {name: buffer._version for name, buffer in buffers.items()}
        # Copies, so that writing into them does no harm and returning them is noticed.
        leaves = [_leaf(v) for v in values if isinstance(v, Tensor)]
        inputs = [leaf.clone() for leaf in leaves]
        parameters = {name: stand_in(p) for name, p in self.module.named_parameters()}
        state = parameters if counts else parameters | {name: buffer.clone() for name, buffer in self.buffers.items()}
        given, versions_given = [id(t) for t in inputs], [t._version for t in inputs]
        # The graph says what the outputs depend on; it keeps nothing.
        with torch.enable_grad(), saved_tensors_hooks(lambda t: None, lambda t: t):
            output = with_state(self.module, state, lambda: self._call(inputs))
        if [t._version for t in inputs] != versions_given:
            raise RuntimeError(
                f"{type(self.module).__name__} writes into its input inside a checkpoint, which cannot be recomputed: "
                "make it out of place (inplace=False)"
            )
        found, self.spec_of_output = tree_flatten(output)
        outputs = [v for v in found if isinstance(v, Tensor)]
        used = set(map(id, graph_leaves(outputs)))
        known = {id(t) for t in (*leaves, *parameters.values())}
        plain = all(isinstance(v, Tensor | int | float | str | None) for v in found)
        shared = _places(outputs) & _places([*inputs, *parameters.values(), *buffers.values()])
        alone = given == [id(t) for t in inputs] and used <= known and any(t.requires_grad for t in outputs)
        if not plain or shared or not alone or stored.differs():
            stored.undo()
            self._undo()
            return None
        self.buffers = {name: self.buffers[name] for name in self._moved(buffers, versions)} if counts else self.buffers
        self.names = [name for name, p in parameters.items() if id(p) in used]
        self.leaves = [_GIVEN if isinstance(v, Tensor) else v for v in found]
        return outputs

    def _moved(self, buffers: dict[str, Tensor], versions: dict[str, int]) -> set[str]:
        now = dict(self.module.named_buffers())
        others = {n for n, buffer in buffers.items() if now[n] is not buffer or now[n]._version != versions[n]}
        return others | running_statistics(self.module).keys()  # whose versions their kernel does not count

    def _undo(self) -> None:
        self.noise.rewind()
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(self.buffers[name])

    def _call(self, inputs: Sequence[Tensor]):
        given = iter(inputs)
        args, kwargs = tree_unflatten([next(given) if v is _GIVEN else v for v in self.values], self.spec)
        return self.forward(*args, **kwargs)

    def stand_ins(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Leaves for inputs and parameters, these with what users have attached to them."""
        own, values = dict(self.module.named_parameters()), tensors[self.count :]
        parameters = [stand_in(own[name], t.detach()) for name, t in zip(self.names, values, strict=True)]
        return [*map(_leaf, tensors[: self.count]), *parameters]

    def again(self, leaves: Sequence[Tensor], use: Callable[[list[Tensor]], object], counts: bool = False):
        """``use(outputs)``, with a graph of these leaves, inputs and parameters.

        ``counts``: as with any checkpoint, running statistics move once more.
        """
        own = set(running_statistics(self.module)) if counts else set()
        result = self._run(leaves, own, use)
        if counts and (others := self.buffers.keys() - own):
            with torch.no_grad():  # they change what is computed: the run above had them as they were
                self._run(leaves, others, lambda outputs: None)
        return result

    def _run(self, leaves: Sequence[Tensor], own: Collection[str], use: Callable[[list[Tensor]], object]):
        """``own``: the buffers that are the module's; the others are copies from before it ran."""
        inputs, parameters = leaves[: self.count], leaves[self.count :]
        state = {name: buffer.clone() for name, buffer in self.buffers.items() if name not in own}
        state |= dict(zip(self.names, parameters, strict=True))
        return with_state(self.module, state, lambda: use(self._outputs(inputs)))

    def _outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        around = functools.partial(units, self.module, (), set())
        with self.noise.again(), self.autocast.again(), fused_double_backward(around) as mode, around(mode.is_active):
            output = self._call(inputs)
        return [v for v in tree_flatten(output)[0] if isinstance(v, Tensor)]


class _Stored:
    """Tensors with a graph that modules hold beside parameters and buffers: an auxiliary loss needs its graph."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.attributes = [(part, self._own(part)) for part in module.modules()]
        self.lists = [(v, list(v)) for _, own in self.attributes for v in own.values() if isinstance(v, list)]
        self.tensors = self._tensors()

    @staticmethod
    def _own(part: nn.Module) -> dict:
        return {k: v for k, v in vars(part).items() if k not in ("_parameters", "_buffers", "_modules")}

    def _tensors(self) -> list[Tensor]:
        held = (tensors_of(list(self._own(part).values())) for part in self.module.modules())
        return [tensor for tensors in held for tensor in tensors if tensor.requires_grad]

    def differs(self) -> bool:
        now = self._tensors()
        return len(now) != len(self.tensors) or any(a is not b for a, b in zip(now, self.tensors, strict=True))

    def undo(self) -> None:
        for part, own in self.attributes:
            for name in self._own(part).keys() - own.keys():
                del vars(part)[name]
            vars(part).update(own)
        for stored, before in self.lists:
            stored[:] = before


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _places(tensors: Sequence[Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


class _Run(Function):
    """(inputs, parameters) -> outputs, which have been computed."""

    @staticmethod
    def forward(ctx, unit, outputs, *tensors):
        ctx.unit = unit
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        found = tuple(t.data for t in outputs)  # detached ones would be views, which nothing may write into
        ctx.mark_non_differentiable(*(t for t, of in zip(found, outputs, strict=True) if not of.requires_grad))
        return found

    @staticmethod
    def backward(ctx, *cotangents):
        unit, tensors = ctx.unit, ctx.saved_tensors
        present = tuple(i for i, g in enumerate(cotangents) if g is not None)
        given = [cotangents[i] for i in present]
        if given and is_input_only(given[0]):
            found = _VJP.apply(unit, present, *given, *tensors)
            return None, None, *found, *[None] * len(unit.names)
        if torch.is_grad_enabled():
            raise RuntimeError("a checkpointed module of a step was differentiated again: only its VJP can be")
        leaves = unit.stand_ins(tensors)
        with torch.enable_grad():
            unit.again(leaves, lambda outputs: _backward([outputs[i] for i in present], given), counts=True)
        return None, None, *(leaf.grad for leaf in leaves)


class _VJP(Function):
    """(cotangents of the outputs that ``present`` numbers, inputs, parameters) -> cotangents of the inputs."""

    @staticmethod
    def forward(ctx, unit, present, *tensors):
        ctx.unit, ctx.present = unit, present
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        cotangents, leaves = tensors[: len(present)], unit.stand_ins(tensors[len(present) :])
        inputs = leaves[: unit.count]
        with torch.enable_grad():
            return unit.again(leaves, lambda outputs: _vjp([outputs[i] for i in present], cotangents, inputs, False))

    @staticmethod
    def backward(ctx, *directions):
        if torch.is_grad_enabled():
            raise RuntimeError("the VJP of a checkpointed module was differentiated twice: only once is possible")
        tensors, count = ctx.saved_tensors, len(ctx.present)
        cotangents, leaves = [_leaf(t) for t in tensors[:count]], ctx.unit.stand_ins(tensors[count:])

        def derivatives(outputs):
            found = _vjp([outputs[i] for i in ctx.present], cotangents, leaves[: ctx.unit.count], True)
            _backward(found, directions)

        with torch.enable_grad():
            ctx.unit.again(leaves, derivatives)
        return None, None, *(leaf.grad for leaf in (*cotangents, *leaves))


def _vjp(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], create_graph: bool):
    """Of every input, None where it has none; without a second graph the first is given up on the way."""
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(input_gradients(outputs, cotangents, wanted, create_graph, keep_graph=create_graph))
    return tuple(next(found) if x.requires_grad else None for x in inputs)


def _backward(outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]) -> None:
    """Into the leaves: torch.autograd.grad would leave out what cannot be differentiated without an error."""
    pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if g is not None and y is not None]
    pairs = [(y, g) for y, g in pairs if y.requires_grad]
    if pairs:
        values, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(values, gradients)
