"""Which feature map the logits are computed from: found by one pass of a few images and one VJP.

Class-activation maps look at the last feature map on the way to the logits. "Last" alone is not enough: branches beside
the head, attention matrices and the inside of an attention pooling run late, too. So the search looks at the autograd
graph for *bottlenecks*, tensors that all of x goes through on its way to the logits, and starts from the last of them.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..outputs import logits_of
from ..twin import undisturbed
from .graph import bottlenecks
from .layout import Layout, layout_of
from .places import first_tensor, functions_seen, hooked

IMAGES = 3  # of two, a BatchNorm over the batch alone lets no gradient through
LARGE = 1024.0  # keeps the VJP of a float16 pass from underflowing
SMALL = 0.02  # parameters that are zero, which hide what is behind them, become as large

NOTHING_FOUND = (
    "layers: no feature map was found on the way to the logits ([B,C,h,w], [B,h,w,C] or tokens [B,T,C], at a place "
    "that runs once in a forward pass and has a row for each image), so no layer gets a background term, the main one "
    'of the balanced preset. Name places yourself, layers=["block4"] (a module) or layers=["block4.relu()"] (a '
    "function that it calls), or give layers=() to do without."
)


def last_feature_map(model: nn.Module, x: Tensor, output: Callable | None = None) -> str | None:
    """As :func:`find_feature_map`, with a warning where there is none."""
    name = find_feature_map(model, x, output)
    if name is None:
        warnings.warn(NOTHING_FOUND, stacklevel=4)  # of step(x, y)
    return name


def find_feature_map(model: nn.Module, x: Tensor, output: Callable | None = None, functions: bool = True) -> str | None:
    """The place (see :func:`captured`) of the last feature map on the way to the logits; None where there is none.

    Where the logits are computed from the class token of the last tokens it is the last normalisation whose other
    tokens reach the logits: the input of the last attention.

    The model runs once, in the mode that it is in. It, its statistics, its gradients and the random generators are
    left as they are, except for what its forward keeps in plain attributes.

    Args:
        model: x -> logits [B,K], not wrapped in DDP or ``torch.compile``.
        x: images [B,C,H,W], of which the first three are used, or all if the model fails on those; left as it is.
        output: as in :func:`sib_ext.outputs.logits_of`.
        functions: False leaves out the outputs of functions, which have no module.
    """
    search = _Search(model, output, functions)
    try:
        return _searched(search, x[:IMAGES])
    except Exception:
        if len(x) <= IMAGES:
            raise
    return _searched(search, x)  # a model may take batches of certain sizes alone


def _searched(search: "_Search", x: Tensor) -> str | None:
    with undisturbed(x):
        image = x.detach().clone().requires_grad_()
        if _runs_as_it_is(search):
            return _with_buffers_put_back(search, image)
        parameters = {name: _visible(p.detach(), seed) for seed, (name, p) in enumerate(search.named_parameters())}
        buffers = {name: buffer.clone() for name, buffer in search.named_buffers()}
        return torch.func.functional_call(search, (parameters, buffers), (image,))


def _runs_as_it_is(model: nn.Module) -> bool:
    """FSDP2 gathers its own parameters, lazy ones do not exist yet: neither can be replaced for a pass."""
    sharded = any(hasattr(module, "set_reshard_after_backward") for module in model.modules())
    return sharded or any(is_lazy(t) for t in (*model.parameters(), *model.buffers()))


def _with_buffers_put_back(search: "_Search", image: Tensor) -> str | None:
    kept = [(buffer, buffer.clone()) for buffer in search.buffers() if not is_lazy(buffer)]
    try:
        return search(image)
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        for module in search.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def _visible(parameter: Tensor, seed: int) -> Tensor:
    """Small random numbers for a parameter of zeros: a head, a LayerScale or a gain that training has yet to move."""
    if not parameter.is_floating_point() or parameter.any():
        return parameter
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(parameter.shape).normal_(0, SMALL, generator=generator).to(parameter)


class _Search(nn.Module):
    """A pass and its VJP as one forward, so that checkpoints, too, are recomputed with the replaced parameters."""

    def __init__(self, model: nn.Module, output: Callable | None, functions: bool):
        super().__init__()
        self.model, self.output, self.functions = model, output, functions

    def forward(self, image: Tensor) -> str | None:
        x = image.clone()  # no leaf, so that the model may overwrite it
        log, start = _Log(x), x.grad_fn
        with log.recording(self.model):
            result = self.model(x)
        logits = logits_of(result, self.output)
        maps = [m for m in log.maps() if m.tensor.requires_grad]
        if not maps or not logits.requires_grad:
            return None
        generator = torch.Generator().manual_seed(0)
        projection = LARGE * torch.randn(logits.shape, generator=generator).to(logits)
        s = (projection * logits).sum()
        necks = bottlenecks(s.grad_fn, start)
        gradients = torch.autograd.grad(s, [m.tensor for m in maps], allow_unused=True)
        found = []
        for m, gradient in zip(maps, gradients, strict=True):
            neck = necks.get(m.tensor.grad_fn) == {m.tensor.output_nr}
            name = log.name_of(m, neck, self.functions)
            if name is not None and gradient is not None:
                found.append(_Candidate(name, m, neck, *_reached(gradient, m.layout)))
        return _chosen(found)


def _reached(gradient: Tensor, layout: Layout) -> tuple[bool, bool]:
    """Whether the gradient is not zero at several positions, and anywhere."""
    nonzero = gradient != 0
    positions = layout.planes(nonzero).any(1).any(0)
    return int(positions.sum()) > 1, bool(nonzero.any())


# ------------------------------------------------------------------------------------------------- the log


@dataclass
class _Map:
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


class _Log:
    """What modules and functions return in a pass."""

    def __init__(self, x: Tensor):
        self.image = x.shape
        self.seen: dict[int, _Map] = {}  # by id, in the order of their last change
        self.runs: Counter[str] = Counter()
        self.last: dict[str, Tensor] = {}  # of each function

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(functions_seen(model, self._of_function))
            for name, module in hooked(model):
                stack.callback(module.register_forward_hook(self._of_module(name)).remove)
            yield

    def maps(self) -> list[_Map]:
        return [m for m in self.seen.values() if m.modules or m.functions]

    def name_of(self, found: _Map, neck: bool, functions: bool) -> str | None:
        """The outermost module that runs once, else a function whose last output it is.

        One that returns several maps is named only for a bottleneck: the others led to it then.
        """
        modules = [name for name in found.modules if self.runs[name] == 1]
        places = [p for p in found.functions if self.last[p] is found.tensor and (neck or self.runs[p] == 1)]
        return (modules or (places if functions else []) or [None])[-1]

    def _of_function(self, place: str, tensor: Tensor) -> Tensor:
        self.runs[place] += 1
        self.last[place] = tensor
        if found := self._noted(tensor):
            found.functions.append(place)
            found.normalised |= "norm" in place.rpartition(".")[2]
        return tensor

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

    def _noted(self, tensor: Tensor) -> _Map | None:
        """The map that it is, now the last of all; None where it is none."""
        found = self.seen.pop(id(tensor), None)
        if found is None:
            if not tensor.is_floating_point() or len(tensor) != self.image[0] or tensor.shape == self.image:
                return None
            layout = layout_of(tensor.shape, self.image[2:])
            if layout is None or layout.positions < 2:
                return None
            found = _Map(tensor, layout)
        self.seen[id(tensor)] = found
        return found


def _passes_through(module: nn.Module, tensor: Tensor) -> bool:
    """Identities, and what only permutes or flattens."""
    return isinstance(module, nn.Identity) or (tensor._is_view() and next(module.parameters(), None) is None)


# ---------------------------------------------------------------------------------------------- the choice


@dataclass
class _Candidate:
    name: str
    map: _Map
    neck: bool  #: all of x goes through it on its way to the logits
    reaches: bool  #: the logits depend on several of its positions
    counts: bool  #: the logits depend on something in it

    @property
    def only_prefix(self) -> bool:
        """Of these tokens, a head looks at the class token alone."""
        return self.counts and not self.reaches and self.map.layout.prefix > 0


def _chosen(candidates: Sequence[_Candidate]) -> str | None:
    """The last bottleneck, or the last map after it that is deeper still, or that stands in front of a class token."""
    candidates = [c for c in candidates if not (c.map.projected and c.map.layout.channels_last)]
    neck = _last_neck(candidates)
    if neck is None:
        later, deeper = candidates, [c for c in candidates if c.reaches]
    else:
        later = candidates[neck + 1 :]
        deeper = [c for c in later if c.reaches and _no_branch(c.map, candidates[neck].map)]
    if any(c.only_prefix for c in later):
        deeper = [c for c in deeper if c.map.normalised] or (deeper if neck is None else [])
    elif neck is not None:
        # What has as many positions is a part of a layer, such as queries, keys and gates; heads of several scales and
        # of two streams go on at a lower resolution.
        deeper = [c for c in deeper if c.map.layout.positions < candidates[neck].map.layout.positions]
    if deeper:
        return deeper[-1].name
    return None if neck is None else candidates[neck].name


def _last_neck(candidates: Sequence[_Candidate]) -> int | None:
    """Of the bottlenecks of the least resolution the last that has several positions.

    Maps without the proportions of the images may be what they seem, or windows or heads of attention, which do not
    count against the maps that follow them.
    """
    last, fewest = None, None
    for number, candidate in enumerate(candidates):
        if not candidate.neck:
            continue
        layout = candidate.map.layout
        if layout.proportional:
            if fewest is not None and layout.positions > fewest:
                continue
            fewest = layout.positions
        elif last is not None and not _no_branch(candidate.map, candidates[last].map):
            continue
        if candidate.reaches:
            last = number
    return last


def _no_branch(later: _Map, earlier: _Map) -> bool:
    """Of no fewer channels and no more positions, other than attention matrices, single heads and decoders."""
    return later.channels >= earlier.channels and later.layout.positions <= earlier.layout.positions
