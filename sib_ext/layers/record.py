"""What modules and functions return in a pass, as far as it may be a feature map."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from .layout import Layout, layout_of
from .places import first_tensor, functions_seen, hooked


@dataclass
class Map:
    """A tensor that may be a feature map, and where it came by; in-place functions count for what they overwrite."""

    tensor: Tensor
    layout: Layout
    modules: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    projected: bool = False  #: by a linear layer: queries, keys, hidden units
    normalised: bool = False

    @property
    def channels(self) -> int:
        return self.tensor.shape[-1 if self.layout.channels_last else 1]


class Log:
    """What modules and functions return in a pass."""

    def __init__(self, x: Tensor):
        self.image = x.shape
        self.seen: dict[int, Map] = {}  # by id, in the order of their last change
        self.runs: Counter[str] = Counter()
        self.last: dict[str, Tensor] = {}  # of each function

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(functions_seen(model, self._of_function))
            for name, module in hooked(model):
                stack.callback(module.register_forward_hook(self._of_module(name)).remove)
            yield

    def maps(self) -> list[Map]:
        return [m for m in self.seen.values() if m.modules or m.functions]

    def name_of(self, found: Map, neck: bool, functions: bool) -> str | None:
        """The outermost module that runs once, else a function whose last output it is.

        One that returns several maps is named only for a bottleneck: the others led to it then.
        """
        modules = [name for name in found.modules if self.runs[name] == 1]
        places = [p for p in found.functions if self.last[p] is found.tensor and (neck or self.runs[p] == 1)]
        return (modules or (places if functions else []) or [None])[-1]

    def _of_function(self, place: str, tensor: Tensor) -> None:
        self.runs[place] += 1
        self.last[place] = tensor
        if found := self._noted(tensor):
            found.functions.append(place)
            found.normalised |= "norm" in place.rpartition(".")[2]

    def _of_module(self, name: str) -> Callable:
        def hook(module, inputs, output) -> None:
            self.runs[name] += 1
            tensor = first_tensor(output)
            if tensor is None or _passes_through(module, tensor):
                return
            if found := self._noted(tensor):
                found.modules.append(name)
                found.projected |= isinstance(module, nn.Linear)
                found.normalised |= "norm" in type(module).__name__.lower()

        return hook

    def _noted(self, tensor: Tensor) -> Map | None:
        """The map that it is, now the last of all; None where it is none."""
        found = self.seen.pop(id(tensor), None)
        if found is None:
            if not tensor.is_floating_point() or len(tensor) != self.image[0] or tensor.shape == self.image:
                return None
            layout = layout_of(tensor.shape, self.image[2:])
            if layout is None or layout.positions < 2:
                return None
            found = Map(tensor, layout)
        self.seen[id(tensor)] = found
        return found


def _passes_through(module: nn.Module, tensor: Tensor) -> bool:
    """Identities, and what only permutes or flattens."""
    return isinstance(module, nn.Identity) or (tensor._is_view() and next(module.parameters(), None) is None)
