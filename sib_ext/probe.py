"""One module, differentiated twice, and compared with central differences."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .ops.dispatch import without_autocast
from .twin import reseed

OK, FAILS, WRONG, UNVERIFIED = "ok", "fails", "silently wrong", "unverified"

# Central differences in float64, relative to each tensor's size. The first step is so small that hardly any ReLU of a
# large network changes sides within it, and still 1e4 times coarser than rounding; the others tell noise from error.
STEPS = (1e-8, 1e-7, 1e-9, 1e-6)
DIRECTIONS = 3  # and two, if they agree
AGREE = 1e-4  # relative: double backward equals the difference quotient
SETTLED = 1e-3  # relative: the difference quotients of two steps equal each other
FLOOR = 1e-3  # directional derivatives below this share of |R| are compared absolutely
NARROW = (torch.float32, torch.float16, torch.bfloat16)
JITTER = 0.05  # parameters move by this share, away from special points such as zero biases and zero gains


class NoPath(Exception):
    """The output does not depend on the input in a differentiable way."""


class NotFinite(Exception):
    """A derivative is NaN or infinite."""


def _random_like(tensor: Tensor, seed: int) -> Tensor:
    """Standard normal, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device, tensor.dtype)


def _size(parameter: Tensor) -> float:
    """Root mean square; 0.1 for zeros, to leave them."""
    return _norm([parameter]) / max(parameter.numel(), 1) ** 0.5 or 0.1


def _norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) for t in tensors))


@torch.no_grad()
def to_general_position(model: nn.Module) -> None:
    """Away from zero biases and gains; and power iterations (spectral_norm) stop, constants for every derivative."""
    for module in model.modules():
        for holder in (module, *module._forward_pre_hooks.values()):
            if hasattr(holder, "n_power_iterations"):
                holder.n_power_iterations = 0
    for i, parameter in enumerate(model.parameters()):
        if parameter.is_floating_point() and parameter.numel():
            parameter.add_(_random_like(parameter, i), alpha=JITTER * _size(parameter))


class Probe:
    """A module with its inputs, and phi = <u, R> where R is the VJP of a scalar of its outputs to those inputs."""

    def __init__(self, module: nn.Module, inputs: tuple, whole: bool):
        """``inputs`` is (args, kwargs); its tensors that require grad are those that R is taken to."""
        values, self.spec = tree_flatten(inputs)
        self.module, self.whole = module, whole
        self.values = [
            v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in values
        ]
        self.leaves = [v for v in self.values if isinstance(v, Tensor) and v.requires_grad]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.buffers = [(b, b.detach().clone()) for b in module.buffers()]
        self.cotangents: list[Tensor] = []
        self.functions: list[type] = []

    def _outputs(self) -> list[Tensor]:
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        reseed(self.leaves[0].device)
        # The whole model gets x itself, as in training; a module inside gets a result, which may be overwritten.
        values = self.values if self.whole else [v.clone() if isinstance(v, Tensor) else v for v in self.values]
        args, kwargs = tree_unflatten(values, self.spec)
        outputs = tree_leaves(self.module(*args, **kwargs))
        return [z for z in outputs if isinstance(z, Tensor) and z.is_floating_point() and z.requires_grad]

    def projected_vjp(self, create_graph: bool) -> tuple[Tensor, float]:
        """phi and |R|. The scalar has a quadratic part, so that cotangents depend on the parameters, too."""
        outputs = self._outputs()
        if create_graph:
            self.functions = _custom_functions(outputs)
        wide = [z.float() if z.dtype in (torch.half, torch.bfloat16) else z for z in outputs]
        if not wide:
            raise NoPath
        if not self.cotangents:
            self.cotangents = [_random_like(z, 100 + i).requires_grad_(not self.whole) for i, z in enumerate(wide)]
        terms = [(c * z + 0.5 * z.square()).sum() for c, z in zip(self.cotangents, wide, strict=True)]
        found = torch.autograd.grad(sum(terms), self.leaves, create_graph=create_graph, allow_unused=True)
        vjps = [r for r in found if r is not None]
        norm = _norm(vjps)
        if norm == 0:
            raise NoPath
        return sum((_random_like(r, 200 + i) * r).sum() for i, r in enumerate(vjps)), norm

    @property
    def variables(self) -> list[Tensor]:
        """What phi is differentiated by: the parameters; inside a model also inputs and cotangents, made by others'."""
        return self.parameters if self.whole else self.parameters + self.leaves + self.cotangents

    def differentiate(self) -> float:
        """Double backward into the variables' ``grad``; returns |R|.

        Through ``backward``, as in training: it raises where ``torch.autograd.grad`` passes a mark silently.
        """
        for variable in self.variables:
            variable.grad = None
        phi, norm = self.projected_vjp(create_graph=True)
        if phi.requires_grad:
            phi.backward()
        size = _norm([v.grad for v in self.variables if v.grad is not None])
        half = any(v.dtype in (torch.half, torch.bfloat16) for v in self.variables)
        if not math.isfinite(norm + size) and not half:  # half types overflow without a GradScaler
            raise NotFinite
        return norm

    def _direction(self, k: int) -> list[Tensor]:
        # Inputs and cotangents move by factors: what is tied at zero (after a ReLU, before a maximum) stays tied.
        noise = [_random_like(v, 1000 * (k + 1) + i) for i, v in enumerate(self.variables)]
        count = len(self.parameters)
        of_parameters = [n.mul_(_size(v)) for n, v in zip(noise[:count], self.parameters, strict=True)]
        return of_parameters + [n.mul_(v.detach()) for n, v in zip(noise[count:], self.variables[count:], strict=True)]

    @torch.no_grad()
    def _move(self, to: list[Tensor], direction: list[Tensor] | None = None, step: float = 0.0) -> None:
        for i, (variable, at) in enumerate(zip(self.variables, to, strict=True)):
            variable.copy_(at)
            if direction is not None:
                variable.add_(direction[i], alpha=step)

    def compare(self) -> tuple[str, float]:
        """Status and relative error of double backward against central differences, over the random directions."""
        norm = self.differentiate()
        here = [v.detach().clone() for v in self.variables]
        verdicts = []
        for k in range(DIRECTIONS):
            direction = self._direction(k)

            def quotient(step: float, direction: list[Tensor] = direction) -> float:
                values = []
                for sign in (1, -1):
                    self._move(here, direction, sign * step)
                    values.append(float(self.projected_vjp(create_graph=False)[0]))
                return (values[0] - values[1]) / (2 * step)

            pairs = zip(self.variables, direction, strict=True)
            found = sum(float(torch.dot(v.grad.flatten(), d.flatten())) for v, d in pairs if v.grad is not None)
            verdicts.append(_verdict(found, quotient, FLOOR * norm))
            self._move(here)
            if [status for status, _ in verdicts] == [OK, OK]:
                break
        wrong = [error for status, error in verdicts if status == WRONG]
        right = [error for status, error in verdicts if status == OK]
        if len(wrong) > DIRECTIONS / 2:
            return WRONG, max(wrong)
        return (OK, max(right)) if right and not wrong else (UNVERIFIED, math.nan)


def _verdict(found: float, quotient: Callable[[float], float], floor: float) -> tuple[str, float]:
    """Compare a directional derivative with difference quotients, which are noise where a kink lies inside the step.

    Agreement with any one step is no accident. Disagreement only counts where two steps agree with each other: the
    jump J at a kink adds J / 2h, which differs tenfold between steps.
    """

    def difference(a: float, b: float) -> float:
        return abs(a - b) / max(abs(a), abs(b), floor)

    quotients: list[float] = []
    for step in STEPS:
        value = quotient(step)
        error = difference(found, value)
        if error < AGREE:
            return OK, error
        spread = min((difference(value, other) for other in quotients), default=math.inf)
        if spread < SETTLED and error > 10 * spread:
            return WRONG, error
        quotients.append(value)
    return UNVERIFIED, math.nan


def _custom_functions(outputs: list[Tensor]) -> list[type]:
    """Classes of the torch.autograd.Functions, other than torch's own, in the outputs' graph."""
    waiting, seen, found = [z.grad_fn for z in outputs], set(), {}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
        function = getattr(node, "_forward_cls", None)
        if function is not None and not function.__module__.startswith("torch."):
            found[function] = None
    return list(found)


class _NoNarrowing(TorchDispatchMode):
    """Casts to a narrower type inside a model give float64 instead: difference quotients need every digit."""

    def __init__(self):
        super().__init__()
        self.narrowed = False  #: something was narrowed all the same

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") in NARROW:
            kwargs = {**kwargs, "dtype": torch.float64}
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype in NARROW:
            self.narrowed |= any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        return result


@contextmanager
def in_float64(device_type: str) -> Iterator[_NoNarrowing]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with without_autocast(device_type), _NoNarrowing() as mode:
            yield mode
    finally:
        torch.set_default_dtype(before)


def to_float64(inputs: tuple) -> tuple:
    values, spec = tree_flatten(inputs)
    return tree_unflatten([_double(v) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values], spec)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
