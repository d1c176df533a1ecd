"""Which feature map the logits are computed from: found by one pass of a few images and one VJP.

Class-activation maps look at the last feature map on the way to the logits. "Last" alone is not enough: branches beside
the head, attention matrices and the inside of an attention pooling run late, too. So the search looks at the autograd
graph for *bottlenecks*, tensors that all of x goes through on its way to the logits, and starts from the last of them.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import levels_to_the_caller
from ..graph import has_reentrant_checkpoint
from ..outputs import logits_of
from ..passes import Noise, kept, stand_in, with_state
from .choice import Candidate, chosen
from .graph import bottlenecks
from .layout import Layout
from .record import Log

IMAGES = 3  # of two, a BatchNorm over the batch alone lets no gradient through
LARGE = 1024.0  # keeps the VJP of a float16 pass from underflowing
SMALL = 0.02  # parameters that are zero, which hide what is behind them, become as large

NOTHING_FOUND = (
    "layers: no feature map was found on the way to the logits ([B,C,h,w], [B,h,w,C] or tokens [B,T,C], at a place "
    "that runs once in a forward pass and has a row for each image), so no feature map gets a term, the main one "
    'of the balanced preset. Name places yourself, layers=["block4"] (a module) or layers=["block4.relu()"] (a '
    "function that it calls), or give layers=() to do without."
)


def last_feature_map(model: nn.Module, x: Tensor, output: Callable | None = None) -> str | None:
    """As :func:`find_feature_map`, with a warning where there is none."""
    name = find_feature_map(model, x, output)
    if name is None:
        warnings.warn(NOTHING_FOUND, stacklevel=levels_to_the_caller())
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
    try:
        return _searched(model, x[:IMAGES], output, functions)
    except Exception:
        if len(x) <= IMAGES:
            raise
    return _searched(model, x, output, functions)  # a model may take batches of certain sizes alone


def _searched(model: nn.Module, x: Tensor, output: Callable | None, functions: bool) -> str | None:
    with Noise(x.device).again(), torch.inference_mode(False), torch.enable_grad():
        image = x.detach().clone()
        if _runs_as_it_is(model):
            with _put_back(model):
                return _found(model, image, output, functions)
        state: dict[str, Tensor] = {
            n: stand_in(p, _visible(p.detach(), seed)) for seed, (n, p) in enumerate(model.named_parameters())
        }
        state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        return with_state(model, state, lambda: _found(model, image, output, functions))


def _runs_as_it_is(model: nn.Module) -> bool:
    """FSDP2 gathers its own parameters, lazy ones do not exist yet: neither can be replaced for a pass."""
    sharded = any(hasattr(module, "set_reshard_after_backward") for module in model.modules())
    return sharded or any(is_lazy(t) for t in (*model.parameters(), *model.buffers()))


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    try:
        with kept([buffer for buffer in model.buffers() if not is_lazy(buffer)]):
            yield
    finally:
        for module in model.modules():
            if (reshard := getattr(module, "reshard", None)) is not None:
                reshard()


def _visible(parameter: Tensor, seed: int) -> Tensor:
    """Small random numbers for a parameter of zeros: a head, a LayerScale or a gain that training has yet to move."""
    if not parameter.is_floating_point() or parameter.any():
        return parameter
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(parameter.shape).normal_(0, SMALL, generator=generator).to(parameter)


def _found(model: nn.Module, image: Tensor, output: Callable | None, functions: bool) -> str | None:
    """By a pass and its VJP, in which checkpoints run again."""
    x = image.requires_grad_().clone()  # no leaf, so that the model may overwrite it
    log, start = Log(x), x.grad_fn
    with log.recording(model):
        result = model(x)
    logits = logits_of(result, output)
    maps = [m for m in log.maps() if m.tensor.requires_grad]
    if not maps or not logits.requires_grad:
        return None
    generator = torch.Generator().manual_seed(0)
    projection = LARGE * torch.randn(logits.shape, generator=generator).to(logits)
    s = (projection * logits).sum()
    necks = bottlenecks(s.grad_fn, start)
    gradients = _gradients(model, s, [m.tensor for m in maps])
    found = []
    for m, gradient in zip(maps, gradients, strict=True):
        neck = necks.get(m.tensor.grad_fn) == {m.tensor.output_nr}
        name = log.name_of(m, neck, functions)
        if name is not None and gradient is not None:
            found.append(Candidate(name, m, neck, *_reached(gradient, m.layout)))
    return chosen(found)


def _gradients(model: nn.Module, s: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """ds/d(tensor), None where s does not depend on it."""
    if not has_reentrant_checkpoint(s):
        return torch.autograd.grad(s, tensors, allow_unused=True)
    # Such a checkpoint only takes part in a backward pass that reaches for every leaf.
    found: dict[int, Tensor] = {}
    handles = [t.register_hook(functools.partial(found.__setitem__, i)) for i, t in enumerate(tensors)]
    before = [(p, p.grad) for p in model.parameters()]
    try:
        s.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in before:
            parameter.grad = gradient
    return [found.get(i) for i in range(len(tensors))]


def _reached(gradient: Tensor, layout: Layout) -> tuple[bool, bool]:
    """Whether the gradient is not zero at several positions, and anywhere."""
    nonzero = gradient != 0
    positions = layout.planes(nonzero).any(1).any(0)
    return int(positions.sum()) > 1, bool(nonzero.any())
