"""One pass over a model: feature maps captured, noise replayed, running statistics left alone, activations recomputed.

Every context here puts the model back as it was, also after an exception.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif is_compiled(module) and isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod
        else:
            return module


def is_compiled(module: nn.Module) -> bool:
    """torch.compile(module), or module.compile() called on it."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def without_ddp(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel; compiled if it was."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


@contextlib.contextmanager
def captured(
    model: nn.Module, layers: Sequence[str], shifts: Sequence[Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward pass fills the dictionary with the named modules' outputs, to which ``shifts`` are added.

    Raises:
        ValueError: an output that is no tensor, or a module that runs twice.
    """
    found: dict[str, Tensor] = {}

    def hook(name: str, shift: Tensor | None) -> Callable:
        def note(module, inputs, output):
            if not isinstance(output, Tensor):
                raise ValueError(f"layers: the output of {name!r} is {type(output).__name__}, not a tensor")
            if name in found:
                raise ValueError(
                    f"layers: {name!r} runs more than once in a forward pass: name a module that runs once"
                )
            found[name] = output if shift is None else output + shift
            return found[name]

        return note

    modules = dict(model.named_modules())
    handles = []
    try:
        for number, name in enumerate(layers):
            handles.append(modules[name].register_forward_hook(hook(name, shifts[number] if shifts else None)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalisation in train mode neither reads nor updates its running statistics, so that a pass counts once."""
    tracking = [
        module
        for module in model.modules()
        if module.training and getattr(module, "track_running_stats", False) is True
    ]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


class Noise:
    """The state of the random generators, so that a pass can be repeated with the same dropout."""

    def __init__(self, device: torch.device):
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(d) for d in self.devices]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draws inside are those that followed when the object was made; draws after it go on as if nothing was."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class _Again:
    """Around a recomputation, of which a pass whose VJP is taken has two: a context that can be entered repeatedly."""

    def __init__(self, model: nn.Module, context: Callable):
        self.model, self.context = model, context

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(frozen_statistics(self.model))
        self.stack.enter_context(self.context())

    def __exit__(self, *error):
        self.stack.close()


@contextlib.contextmanager
def recomputed(model: nn.Module, names: Sequence[str], context: Callable) -> Iterator[None]:
    """The named modules keep no activations; ``context()`` is entered again around their recomputation."""
    modules = dict(model.named_modules())
    contexts = contextlib.nullcontext(), _Again(model, context)
    try:
        for name in names:
            modules[name].forward = functools.partial(
                checkpoint, modules[name].forward, use_reentrant=False, context_fn=lambda: contexts
            )
        yield
    finally:
        for name in names:
            vars(modules[name]).pop("forward", None)
