"""One module, differentiated twice, and compared with central differences."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..outputs import tensors_of
from .differences import against_differences
from .errors import NoPath, NotFinite
from .graph import custom_functions
from .head import Head
from .twin import kept, mapped, reseed, tensors_in

JITTER = 0.05  # parameters move by this share, away from special points such as zero biases and zero gains


def _random_like(tensor: Tensor, seed: int) -> Tensor:
    """Standard normal, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device, tensor.dtype)


def _size(parameter: Tensor) -> float:
    """Root mean square; 0.1 for zeros, to leave them."""
    return _norm([parameter]) / max(parameter.numel(), 1) ** 0.5 or 0.1


def _norm(tensors: Iterable[Tensor]) -> float:
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
    """A module with its inputs, and phi = <u, R> where R is the VJP of a scalar s of its outputs to those inputs."""

    def __init__(self, module: nn.Module, inputs: tuple, logits: Callable | None = None, curved: bool = True):
        """
        Args:
            inputs: (args, kwargs); its tensors that require grad are those that R is taken to.
            logits: of a whole model, what it returns -> the tensors that s is made of. A module inside a model gets
                its inputs and cotangents from others: phi is differentiated by them, too.
            curved: s has a quadratic part, so that cotangents depend on the outputs, as in training.
        """
        self.module, self.logits, self.curved = module, logits, curved
        self.of_map = isinstance(module, Head)
        self.inputs = kept(inputs)
        self.leaves = [t for t in tensors_in(self.inputs) if t.requires_grad]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.buffers = [(b, b.detach().clone()) for b in module.buffers()]
        attributes = (a for m in module.modules() for a in vars(m).values())
        self.generators = [(a, a.get_state()) for a in attributes if isinstance(a, torch.Generator)]
        self.cotangents: list[Tensor] = []
        self.functions: list[type] = []  #: custom autograd Functions met on the way

    @property
    def whole(self) -> bool:
        return self.logits is not None

    @property
    def variables(self) -> list[Tensor]:
        """What phi is differentiated by."""
        inner = self.leaves if self.of_map else [] if self.whole else self.leaves + self.cotangents
        return self.parameters + inner

    def outputs(self) -> list[Tensor]:
        """Of a forward from the same state and random numbers every time."""
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        for generator, state in self.generators:
            generator.set_state(state)
        reseed(self.leaves[0].device)
        # The whole model gets x itself, as in training; a module inside gets a result, which may be overwritten.
        args, kwargs = self.inputs if self.whole else mapped(Tensor.clone, self.inputs)
        returned = self.module(*args, **kwargs)
        outputs = self.logits(returned) if self.whole else tensors_of(returned)
        return [z for z in outputs if z.is_floating_point() and z.requires_grad]

    def scalar(self) -> Tensor:
        outputs = self.outputs()
        wide = [z.float() if z.dtype in (torch.half, torch.bfloat16) else z for z in outputs]
        if not wide:
            raise NoPath
        if not self.cotangents:
            self.functions = custom_functions(outputs)
            self.cotangents = [_random_like(z, 100 + i).requires_grad_(not self.whole) for i, z in enumerate(wide)]
        terms = [(c * z).sum() for c, z in zip(self.cotangents, wide, strict=True)]
        linear = sum(terms[1:], start=terms[0])
        return linear + sum(0.5 * z.square().sum() for z in wide) if self.curved else linear

    def projected_vjp(self, create_graph: bool) -> tuple[Tensor, float]:
        """phi and |R|."""
        found = torch.autograd.grad(self.scalar(), self.leaves, create_graph=create_graph, allow_unused=True)
        vjps = [r for r in found if r is not None]
        norm = _norm(vjps)
        if norm == 0:
            raise NoPath
        terms = [(_random_like(r, 200 + i) * r).sum() for i, r in enumerate(vjps)]
        return sum(terms[1:], start=terms[0]), norm

    def differentiate(self) -> float:
        """Double backward into the variables' ``grad``; returns |R|.

        Through ``backward``, as in training: it raises where ``torch.autograd.grad`` passes a mark silently.
        """
        for variable in self.variables:
            variable.grad = None
        phi, norm = self.projected_vjp(create_graph=True)
        if phi.requires_grad:
            phi.backward()
        size = _norm(v.grad for v in self.variables if v.grad is not None)
        half = any(v.dtype in (torch.half, torch.bfloat16) for v in self.variables)
        if not math.isfinite(norm + size) and not half:  # half types overflow without a GradScaler
            raise NotFinite
        return norm

    def compare(self) -> tuple[str, float]:
        """Status and relative error of double backward, the gradient of phi, against central differences of phi."""
        norm = self.differentiate()
        gradients = [v.grad for v in self.variables]

        def phi() -> float:
            return float(self.projected_vjp(create_graph=False)[0].detach())

        return against_differences(phi, self.variables, gradients, norm, self._direction)

    def repeats(self) -> bool:
        """phi is the same for the same state and random numbers, but for rounding."""
        first, again = (float(self.projected_vjp(create_graph=False)[0].detach()) for _ in range(2))
        return abs(first - again) <= 1e-9 * max(abs(first), abs(again))

    def compare_gradient(self) -> tuple[str, float]:
        """The same of single backward, the gradient of s by parameters and inputs."""
        variables = self.parameters + self.leaves
        gradients = torch.autograd.grad(self.scalar(), variables, allow_unused=True)
        norm = _norm(g for g in gradients if g is not None)

        def value() -> float:
            return float(self.scalar().detach())

        return against_differences(value, variables, gradients, norm, self._direction)

    def _direction(self, variables: list[Tensor], k: int) -> list[Tensor]:
        # Inputs and cotangents move by factors: what is tied at zero (after a ReLU, before a maximum) stays tied.
        noise = [_random_like(v, 1000 * (k + 1) + i) for i, v in enumerate(variables)]
        count = len(self.parameters)
        of_parameters = [n.mul_(_size(v)) for n, v in zip(noise[:count], self.parameters, strict=True)]
        return of_parameters + [n.mul_(v.detach()) for n, v in zip(noise[count:], variables[count:], strict=True)]
