"""The compiled engine: R is computed inside torch.compile, which differentiates the whole.

The compiler drops, without a word, what it does not see: a custom autograd Function's own backward, tensor hooks. So
every graph proves itself before it is used: on the batch that it was made for, its derivatives must be those of the
exact engine.
"""

import functools
import math
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import seeds
from ..checks import levels_to_the_caller
from ..graph import graph_leaves
from ..outputs import logits_of
from ..passes import Noise, stand_in, with_state
from . import double_backward
from .vjps import Task, VJPs

# A gradient may be off by so many times what rounding does to the exact engine's, but not by more than this part of it,
# and by these shares of its own parameter's and of all parameters' gradient: what is dropped is of its order.
ROUNDINGS, MOST, OF_ITS_OWN, OF_ALL = 30, 0.2, 1e-3, 1e-4


class Refused(Exception):
    """A graph that could not be made, or whose derivatives are not those of the model; the message says why."""


class Compiled:
    """The engine. Where a graph is refused: an error if ``strict``, else the exact engine with one warning.

    Shapes beyond the number that the compiler takes go to the exact engine either way.
    """

    def __init__(self, strict: bool):
        self.strict = strict
        self._forget()

    def _forget(self) -> None:
        self._graph: Callable | None = None  #: of what _of says
        self._of: tuple = ()
        self._backend = _Backend()
        self._proven: dict[tuple, bool] = {}
        self._full = False
        self.left_to_the_exact = ""  #: why, where a batch was

    def __getstate__(self) -> dict:
        return {"strict": self.strict}

    def __setstate__(self, state: dict) -> None:
        Compiled.__init__(self, **state)

    def __call__(self, task: Task, x: Tensor, target: Tensor) -> VJPs:
        if self._of != (of := (task.model, task.criterion.scalar_seed, task.output)):
            self._forget()
            self._of, self._graph = of, _compiled(task, self._backend)
        key = _key(task.model, x, target)
        if key not in self._proven and not self._full:
            self._proven[key] = self._admitted(task, x, target)
        found = self._proven_vjps(key, task, x, target) if self._proven.get(key) else None
        return found or double_backward.vjps(task, x, target)

    def _proven_vjps(self, key: tuple, task: Task, x: Tensor, target: Tensor) -> VJPs | None:
        """None where the compiler is full, or made another graph of a batch like this, which is refused."""
        noise, graphs = Noise(x.device), self._backend.graphs
        parameters = dict(task.model.named_parameters())
        try:
            found, buffers = self._vjps(task, parameters, x, target)
            if self._backend.graphs > graphs:  # what the compiler watches and the key does not has changed
                noise.rewind()
                self._proven[key] = self._admitted(task, x, target)
                if not self._proven[key]:
                    return None
                found, buffers = self._vjps(task, parameters, x, target)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            noise.rewind()
            self._proven[key] = self._filled(x)
            return None
        with torch.no_grad():
            for name, buffer in task.model.named_buffers():
                buffer.copy_(buffers[name])
        return found

    def _vjps(self, task: Task, parameters: Mapping[str, Tensor], x: Tensor, target: Tensor) -> tuple[VJPs, dict]:
        """And the buffers after the pass; nothing changes."""
        buffers = dict(task.model.named_buffers())
        # Apart, because the compiler looks at the names in a dictionary and not at requires_grad.
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        logits, of_x, after = self._graph(trained, frozen, buffers, x, target)
        task.criterion.check_inputs(logits, target, x)
        return VJPs(logits, of_x, (), ()), after

    def _admitted(self, task: Task, x: Tensor, target: Tensor) -> bool:
        """Whether the graph for this key may be used."""
        noise = Noise(x.device)
        try:
            with noise.again():
                proof = _Proof(task, x, target)  # errors of the model, or in a call's arguments, are raised here
            try:
                with noise.again():
                    proof.compare(lambda parameters: self._vjps(task, parameters, x, target)[0])
            except Refused:
                raise
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                return self._filled(x)
            except Exception as error:
                raise Refused(f"torch.compile fails on it ({_first_line(error)})") from error
        except Refused as refusal:
            if self.strict:
                raise RuntimeError(f"engine='compiled' cannot train this model: {refusal}. {WAY_OUT}") from refusal
            return self._aside(x, str(refusal))
        return True

    def _filled(self, x: Tensor) -> bool:
        self._full = True
        return self._aside(x, "torch.compile takes no more kinds of batches (torch._dynamo.config.recompile_limit)")

    def _aside(self, x: Tensor, reason: str) -> bool:
        if not self.left_to_the_exact:
            self.left_to_the_exact = reason
            warnings.warn(
                f"the compiled engine steps aside, first for batches {list(x.shape)}: {reason}. The exact engine "
                "double_backward takes these, and all others that it leaves.",
                stacklevel=levels_to_the_caller(),
            )
        return False


WAY_OUT = "Use engine='double_backward', which is exact for any model"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _key(model: nn.Module, x: Tensor, target: Tensor) -> tuple:
    """What a compiled graph depends on, and a training may change."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    modes = tuple((m.training, *m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks) for m in model.modules())
    trained = tuple(parameter.requires_grad for parameter in model.parameters())
    return x.shape, x.dtype, x.device, target.dtype, autocast, modes, trained


class _Backend:
    """The compiler's, which counts the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        self.graphs += 1
        return _inductor(graph, inputs)


def _inductor(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    from torch._inductor.compile_fx import compile_fx

    # Random numbers as the eager model draws them, or a graph with dropout could not prove itself.
    return compile_fx(graph, inputs, config_patches={"fallback_random": True})


def _compiled(task: Task, backend: Callable) -> Callable:
    """(trained, frozen, buffers, x, target) -> (logits, R, buffers after the pass), without side effects.

    The derivative in x is inside, because what torch.compile has compiled cannot be differentiated twice.
    """
    model, output, seed = task.model, task.output, seeds.SEEDS[task.criterion.scalar_seed]

    def run(trained, frozen, buffers, x, target):
        def s(x):
            after = {name: buffer.clone() for name, buffer in buffers.items()}
            with sdpa_kernel(SDPBackend.MATH):
                found = torch.func.functional_call(model, (trained, frozen, after), (x.clone(),))
            logits = logits_of(found, output)
            wide = logits.float() if logits.dtype in (torch.half, torch.bfloat16) else logits
            return seed(wide, target), (logits, after)

        of_x, (logits, after) = torch.func.grad(s, has_aux=True)(x)
        return logits, of_x, after

    # A graph for each shape: with sizes left open the derivative of the derivative does not trace.
    return torch.compile(_of_its_own(run), fullgraph=True, dynamic=False, backend=backend)


def _of_its_own(function: Callable) -> Callable:
    """With a code object of its own: the compiler counts the graphs of each against its limit."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)


class _Proof:
    """d(<v, logits> + <u, R>) for random v and u, by the exact engine, and what rounding does to it."""

    def __init__(self, task: Task, x: Tensor, target: Tensor):
        self.task, self.x, self.target = task, x, target
        self.noise = Noise(x.device)
        self.weights: list[Tensor] = []
        self.exact = self._exact(x)
        narrow = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        self.eps = torch.finfo(narrow).eps
        moved = x + self.eps * x.abs() * (2 * torch.rand_like(x) - 1)
        self.rounding = [_size(a - b) for a, b in zip(self._exact(moved), self.exact, strict=True)]

    def _leaves(self) -> dict[str, nn.Parameter]:
        named = self.task.model.named_parameters()
        return {name: stand_in(p) for name, p in named}

    def _exact(self, x: Tensor) -> list[Tensor]:
        leaves = self._leaves()
        buffers = {name: buffer.clone() for name, buffer in self.task.model.named_buffers()}
        return with_state(self.task.model, leaves | buffers, functools.partial(self._exact_with, leaves, x))

    def _exact_with(self, leaves: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
        with self.noise.again():
            found = double_backward.vjps(self.task, x, self.target)
        if not self.weights:
            self.weights = self._weights(found, leaves)
        return self._gradients(found, leaves)

    def _weights(self, found: VJPs, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        """v and u, such that both terms have gradients of one size and none hides behind the other."""
        weights = []
        for value in (found.logits, found.of_x):
            weight = torch.randn_like(value)
            wanted = [p for p in leaves.values() if p.requires_grad]
            gradients = torch.autograd.grad(
                (value * weight).sum(), wanted, retain_graph=True, allow_unused=True, materialize_grads=True
            ) if value.requires_grad else [torch.zeros(())]  # fmt: skip
            weights.append(weight / (math.hypot(*map(_size, gradients)) or 1.0))
        return weights

    def _gradients(self, found: VJPs, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        of_logits, of_x = ((t * w).sum() for t, w in zip((found.logits, found.of_x), self.weights, strict=True))
        _no_others(found.logits, leaves)
        (of_logits + of_x).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves.values()]

    def _allowed(self, size: float, rounding: float, everything: float) -> float:
        return min(ROUNDINGS * rounding, MOST * size) + OF_ITS_OWN * size + max(OF_ALL, self.eps) * everything

    def compare(self, vjps: Callable[[Mapping[str, Tensor]], VJPs]) -> None:
        """
        Raises:
            Refused: names the parameters whose gradients are wrong.
        """
        leaves = self._leaves()
        with self.noise.again():
            found = vjps(leaves)
        gradients = self._gradients(found, leaves)
        everything = math.hypot(*map(_size, self.exact))
        wrong = {
            name: error / (_size(exact) or everything)
            for name, found, exact, rounding in zip(leaves, gradients, self.exact, self.rounding, strict=True)
            if (error := _size(found - exact)) > self._allowed(_size(exact), rounding, everything) or math.isnan(error)
        }
        if wrong:
            raise Refused(_named(self.task.model, wrong))


def _no_others(logits: Tensor, leaves: Mapping[str, Tensor]) -> None:
    """
    Raises:
        Refused: the model reaches parameters past its modules; a trial must not write into their gradients.
    """
    own = set(map(id, leaves.values()))
    if any(isinstance(leaf, nn.Parameter) and id(leaf) not in own for leaf in graph_leaves([logits])):
        raise Refused("it reaches a parameter past its modules (through a list, say)")


def _size(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def _named(model: nn.Module, wrong: dict[str, float]) -> str:
    modules = list(dict.fromkeys(name.rpartition(".")[0] or "(model)" for name in wrong))
    worst = max(wrong, key=wrong.get)
    few = ", ".join(modules[:4]) + (f" and {len(modules) - 4} more" if len(modules) > 4 else "")
    return (
        f"what torch.compile made of it has wrong gradients in {few} (of {worst} by {100 * wrong[worst]:.2g} %); look "
        "there, and in what runs before, for custom autograd Functions and tensor hooks, which it drops"
    )
