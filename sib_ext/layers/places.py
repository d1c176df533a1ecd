"""Places: the outputs of modules, by name, and of functions such as ``F.relu``, by name and the module that calls them.

``"block3.relu()"`` is the last feature map that ``relu`` returns to the forward of the module ``block3`` itself;
``"relu()"``, to that of the model.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_JOINING = {"cat", "concat", "concatenate"}
_FUNCTION = re.compile(r"(?:(?P<module>.+)\.)?(?P<function>\w+)\(\)")
See = Callable[[str, Tensor], Tensor | None]  # what it returns, if anything, takes the place of the map


def place_of(module: str, function: str) -> str:
    return f"{module}.{function}()" if module else f"{function}()"


def check_places(model: nn.Module, names: Sequence[str], argument: str = "layers") -> None:
    """Raises a ValueError for a name that is neither a module's nor one of a function in a module."""
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        function = _FUNCTION.fullmatch(name)
        module = name if function is None else function["module"]
        if module is not None and module not in modules:
            few = ", ".join(modules[:12]) + (", ..." if len(modules) > 12 else "")
            raise ValueError(f"{argument}: the model has no module {module!r}; it has {few or 'none'}")


@contextmanager
def captured(
    model: nn.Module, names: Sequence[str], reached: Callable[[Tensor], Tensor | None] = lambda tensor: None
) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward pass fills the dictionary with the tensors at the named places.

    Of a tuple or list it is the first tensor. Close it before the backward pass, in which checkpoints run again.

    Args:
        reached: called with each tensor as it is there; what it returns, if anything, takes the tensor's place in the
            dictionary and in the model.

    Raises:
        ValueError: an output that is no tensor, or a module that runs twice.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    functions = {name for name in names if _FUNCTION.fullmatch(name)}

    def keep(place: str, tensor: Tensor) -> Tensor:
        instead = reached(tensor)
        found[place] = tensor if instead is None else instead
        return found[place]

    with ExitStack() as stack:
        for name in names:
            if name not in functions:
                stack.callback(modules[name].register_forward_hook(_of_module(name, found, keep)).remove)
        if functions:
            stack.enter_context(functions_seen(model, lambda place, t: keep(place, t) if place in functions else None))
        yield found


def _of_module(name: str, found: dict[str, Tensor], keep: See) -> Callable:
    def hook(module, inputs, output):
        tensor = first_tensor(output)
        if tensor is None:
            raise ValueError(
                f"layers: the output of {name!r} is {type(output).__name__}, not a tensor: name a module inside it"
            )
        if name in found:
            raise ValueError(f"layers: {name!r} runs more than once in a forward pass: name a module that runs once")
        instead = keep(name, tensor)
        return output if instead is tensor else tree_map(lambda part: instead if part is tensor else part, output)

    return hook


def first_tensor(output) -> Tensor | None:
    if isinstance(output, (tuple, list)):
        return next((part for part in output if isinstance(part, Tensor)), None)
    return output if isinstance(output, Tensor) else None


def hooked(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules inside the model that take hooks; scripted ones do not."""
    return [(name, m) for name, m in model.named_modules() if name and not isinstance(m, torch.jit.ScriptModule)]


@contextmanager
def functions_seen(model: nn.Module, see: See) -> Iterator[None]:
    """``see(place, map)`` for every feature map that a function returns inside."""
    running = [""]  # the modules whose forwards run, the innermost last
    with ExitStack() as stack:
        for name, module in hooked(model):
            stack.callback(module.register_forward_pre_hook(_entering(running, name)).remove)
            stack.callback(module.register_forward_hook(lambda *_: _leave(running), always_call=True).remove)
        stack.enter_context(_Functions(running, see))
        yield


def _entering(running: list[str], name: str) -> Callable:
    def enter(module, inputs) -> None:
        running.append(name)

    return enter


def _leave(running: list[str]) -> None:
    running.pop()


class _Functions(TorchFunctionMode):
    def __init__(self, running: list[str], see: See):
        super().__init__()
        self.running, self.see = running, see

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if is_lazy(first):
            return function(*args, **kwargs)
        version = _version(first)
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "").strip("_")
        untouched = result is first and _version(result) == version  # by .contiguous(), .to()
        if not _may_be_map(result) or untouched or name == "get":  # an attribute
            return result
        elementwise = first is not None and result.shape == first.shape and not result._is_view()
        if elementwise or name in _JOINING:
            instead = self.see(place_of(self.running[-1], name), result)
            return result if instead is None else instead
        return result


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def _may_be_map(result) -> bool:
    """Planes or tokens of more than one value a channel; not what follows the pooling."""
    return (
        isinstance(result, Tensor)
        and result.is_floating_point()
        and result.dim() in (3, 4)
        and result[:1].numel() > result.shape[1]
    )
