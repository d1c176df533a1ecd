"""SIBStep: S-IB in any training loop, and the engines that take the derivative of the VJP.

The parameter gradient of the loss needs d/dtheta L(R), R = ds/dx. Three ways to it:

``double_backward``    autograd through R's own graph; exact.
``compiled``           R computed inside ``torch.compile``, which differentiates the whole; exact.
``finite_difference``  with u = dL/dR held fixed, d/dtheta <u,R> = d/dh d/dtheta s(x + h u): ordinary passes alone, no
                       graph of second order; approximate, for smooth networks.

Finite differences, and batches cut into ``microbatch``, take two phases: R of the whole batch without a graph of
second order; then, u being known, the parameter gradients part by part, each part's memory freed before the next. The
loss that comes back holds those gradients and hands them out in its ``backward``.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import distributed, seeds
from .checks import check_choice, describe
from .fused_layers import fused_double_backward
from .kinks import has_kinks
from .layers import class_activation_of, last_feature_map
from .loss import Information, SIBTerms, SpatialIBLoss
from .passes import Noise, captured, frozen_statistics, is_compiled, recomputed, unwrapped, without_ddp

ENGINES = ("auto", "double_backward", "compiled", "finite_difference")
# Steps of a finite difference, as the root mean square of h u over that of x: those that show its rounding, those that
# show its bending, and the limits of what is chosen between them.
ROUNDING_STEPS, BENDING_STEPS = (1e-5, 2e-5, 4e-5), (1e-2, 3e-2)
LEAST_STEP, LARGEST_STEP = 1e-5, 0.1
CALIBRATED = 100  # differences between two calibrations, each of which takes a dozen forward passes
# A finite difference that is off by more than this is called inaccurate.
TOLERATED = 0.05
TINY = 1e-30


class SIBStep:
    """The S-IB loss of a batch, computed by the engine that suits the model: ``step(x, y).backward()``.

    Args:
        model: images [B,C,H,W] -> logits [B,K]; may be wrapped in DDP, FSDP2 or ``torch.compile``.
        criterion: a :class:`sib_ext.SpatialIBLoss`.
        layers: names (or one) of modules (``model.named_modules()``) whose output, a feature map [B,C,h,w] or tokens
            [B,T,D] of a square grid (with or without a class token), gets a background term of its own, on its class
            activation (:func:`sib_ext.functional.class_activation`). ``"auto"``: the last feature map, found in the
            first step, if the criterion has terms for layers (``layer_weight``), else none.
        engine: ``"auto"``, ``"double_backward"``, ``"compiled"`` or ``"finite_difference"``, see docs/engines.md.
        every: S-IB terms in every k-th step only, k times as strong (lazy regularisation; the first step has them).
        share: the part of each batch, drawn at random, that gets S-IB terms, in (0,1]; the rest is a plain forward
            pass of its own, so BatchNorm sees two smaller batches.
        microbatch: None, or at most how many images a pass takes at once: the memory of a small batch, HSIC and CKA of
            the whole one. BatchNorm sees the parts.
        recompute: names of modules whose activations are recomputed instead of kept (non-reentrant checkpoints).
        scaler: the ``torch.amp.GradScaler`` of a float16 training: VJPs are taken of the scaled seed, so that they do
            not underflow, and unscaled. Scale the loss as usual: ``scaler.scale(step(x, y)).backward()``.
        force: let ``"finite_difference"`` run on a network with kinks (ReLU, max pooling), where it is wrong.

    Attributes:
        engine, info: which engine runs, and why.
        layers: the names; those of ``"auto"`` are known after the first step.
        error: of ``"finite_difference"``, NaN before its first step: by how much a difference of s misses a
            derivative of s that is known, at the step h in use.

    Raises:
        ValueError: an argument that is unknown, out of range or does not fit the others.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: SpatialIBLoss,
        layers: Sequence[str] | str = "auto",
        *,
        engine: str = "auto",
        every: int = 1,
        share: float = 1.0,
        microbatch: int | None = None,
        recompute: Sequence[str] = (),
        scaler: "torch.amp.GradScaler | None" = None,
        force: bool = False,
    ):
        self.model, self.criterion = model, criterion
        self.layers = () if layers == "auto" else (layers,) if isinstance(layers, str) else tuple(layers)
        self._finds_layers = layers == "auto" and getattr(criterion, "has_layer_terms", False)
        self.every, self.share, self.microbatch = every, share, microbatch
        self.recompute, self.scaler, self.force = tuple(recompute), scaler, force
        self._check_options(engine)
        self.engine, self.info = self._chosen(engine)
        self._check_combinations()
        self.steps = 0
        self.error = math.nan
        self._relative_step, self._differences = math.nan, 0
        self._compiled: Callable | None = None

    def _check_options(self, engine: str) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if not isinstance(self.criterion, SpatialIBLoss):
            raise ValueError(f"criterion must be a sib_ext.SpatialIBLoss, got {type(self.criterion).__name__}")
        check_choice("engine", engine, ENGINES)
        for name, value in (("every", self.every), ("microbatch", self.microbatch)):
            if (name, value) != ("microbatch", None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ValueError(f"share must be a number in (0,1], got {self.share!r}")
        if self.layers and not self.criterion.has_layer_terms:
            raise ValueError(
                "layers were given, but the criterion has no term for them (background_weight="
                f"{self.criterion.background_weight:g}, layer_weight={self.criterion.layer_weight:g}): "
                "give both weights, or leave layers out"
            )
        names = [name for name, _ in unwrapped(self.model).named_modules() if name]
        for argument in ("layers", "recompute"):
            for name in getattr(self, argument):
                if name not in names:
                    few = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
                    raise ValueError(f"{argument}: the model has no module {name!r}; it has {few or 'none'}")

    def _chosen(self, engine: str) -> tuple[str, str]:
        if engine != "auto":
            return engine, "as asked for"
        if not is_compiled(self.model):
            return "double_backward", "exact, for any model that is differentiable twice"
        if self._knobs():
            return "double_backward", f"on the model inside torch.compile, because {self._knobs()} needs it"
        return "compiled", "because the model is wrapped in torch.compile"

    def _knobs(self) -> str:
        """The argument in use that ``compiled`` cannot serve."""
        if self._finds_layers:
            return "layers"
        return next((n for n in ("layers", "microbatch", "recompute", "scaler") if getattr(self, n)), "")

    def _check_combinations(self) -> None:
        if self.microbatch and self.criterion.process_group is not None:
            raise ValueError("microbatch does not go together with the criterion's process_group: leave one out")
        if self.engine == "compiled" and self._knobs():
            without = " (give layers=() for none)" if self._finds_layers else ""
            raise ValueError(f"engine='compiled' takes no {self._knobs()}{without}: use engine='double_backward'")
        if self._two_phases and any(hasattr(m, "set_reshard_after_backward") for m in self.model.modules()):
            raise ValueError(
                "engine='finite_difference' and microbatch take parameter gradients by autograd.grad, which FSDP2 does "
                "not reduce: use engine='double_backward' without microbatch, or DDP"
            )
        plain = without_ddp(self.model)
        if self.engine == "double_backward" and is_compiled(plain):
            if plain is not self.model:
                raise ValueError("a compiled model inside DDP has no second derivative: wrap the model itself in DDP")
            if plain is unwrapped(plain):
                raise ValueError(
                    "model.compile() was called on the model, which has no second derivative then: give SIBStep "
                    "torch.compile(model), or take engine='compiled'"
                )
        if self.engine != "finite_difference":
            return
        if is_compiled(plain) and (self.layers or self._finds_layers):
            raise ValueError("layers are found by hooks, which a compiled model does not run: pass the model itself")
        self._refuse_kinks()

    def _refuse_kinks(self, x: Tensor | None = None) -> None:
        """By the types of the modules, and with x by what runs in a pass, too."""
        kinks = [] if self.force else has_kinks(unwrapped(self.model), x)
        if kinks:
            raise ValueError(
                f"engine='finite_difference' is wrong on networks with kinks, and this one has {len(kinks)}, first "
                f"{kinks[0]!r}: use engine='double_backward', or smooth activations (SiLU, GELU); force=True overrides"
            )

    @property
    def _two_phases(self) -> bool:
        return self.engine == "finite_difference" or self.microbatch is not None

    def __repr__(self) -> str:
        return f"SIBStep(engine={self.engine!r} ({self.info}), layers={self.layers}, every={self.every})"

    def state_dict(self) -> dict:
        """What a resumed training needs beside the model's."""
        return {"steps": self.steps, "relative_step": self._relative_step, "differences": self._differences}

    def load_state_dict(self, state: Mapping) -> None:
        self.steps, self._relative_step = state["steps"], state["relative_step"]
        self._differences = state["differences"]

    # ------------------------------------------------------------------------------------------- a step

    def __call__(self, x: Tensor, target: Tensor, mask=None, annotated: Tensor | None = None) -> Tensor:
        """The loss, a scalar to call ``.backward()`` on; arguments as in :meth:`terms`."""
        return self.terms(x, target, mask, annotated).loss

    def terms(self, x: Tensor, target: Tensor, mask=None, annotated: Tensor | None = None) -> SIBTerms:
        """The loss and its parts, named; S-IB parts are None in a step without them (``every``).

        Args:
            x: images [B,C,H,W], floating point; it is left as it is and gets no gradient.
            target, mask, annotated: as in :meth:`sib_ext.SpatialIBLoss.terms`.

        Raises:
            ValueError: an argument of the wrong type, size, range or device; a layer without a feature map.
            RuntimeError: gradients are switched off, or the logits do not depend on x.
        """
        if not isinstance(x, Tensor) or x.dim() != 4 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(f"x must be a non-empty floating-point batch of images [B,C,H,W], got {describe(x)}")
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "SIBStep needs gradients, but they are switched off here (torch.no_grad or inference_mode): "
                "for a validation loss use criterion.cross_entropy(model(x), target)"
            )
        given, annotated = self.criterion.given(mask, x, annotated)
        batch, rest = Batch(x.detach(), target, given, annotated), None
        due = self.criterion.has_terms and self.steps % self.every == 0
        self.steps += 1
        if due and self._finds_layers:
            name = last_feature_map(unwrapped(self.model), batch.x)
            self.layers, self._finds_layers = (name,) if name else (), False
        if not due:
            cross_entropy = self._cross_entropy(self._logits(batch), batch)
            return SIBTerms(cross_entropy, cross_entropy, None, None, None, None)
        if self.share < 1:
            batch, rest = batch.drawn(self.share)
        return self._in_two_phases(batch, rest) if self._two_phases else self._in_one_phase(batch, rest)

    def _logits(self, batch: "Batch") -> Tensor:
        """A plain forward pass."""
        logits = self.model(batch.x)
        self.criterion.check_inputs(logits, batch.target, batch.x)
        return logits

    def _cross_entropy(self, logits: Tensor, batch: "Batch") -> Tensor:
        joined = distributed.JoinedBatch(batch.x, self.criterion.process_group)
        return self.criterion.joined_cross_entropy(logits, batch.target, joined)

    # ---------------------------------------------------------------------------------- exact, in one phase

    def _in_one_phase(self, batch: "Batch", rest: "Batch | None") -> SIBTerms:
        joined = self.criterion.joined(batch.x)
        found = self._compiled_vjps(batch) if self.engine == "compiled" else self._vjps(batch, create_graph=True)
        information = self._information(found, batch, joined)
        logits = found.logits
        if rest is not None:
            logits, batch = torch.cat([logits, self._logits(rest)]), batch.with_images_of(rest)
        return self.criterion.together(information, self._cross_entropy(logits, batch), self.every)

    def _information(self, found: "VJPs", batch: "Batch", joined: distributed.JoinedBatch) -> Information:
        fields = map(class_activation_of, self.layers, found.features, found.of_features)
        layers = dict(zip(self.layers, fields, strict=True))
        return self.criterion.information(found.of_x, batch.x, batch.given, batch.annotated, joined, layers)

    def _forward(self, batch: "Batch", x: Tensor, shifts=None, twice: bool = False, inner: bool = False):
        """Logits and feature maps; ``twice``: to be differentiated twice; ``inner``: not through DDP's own forward."""
        eager, plain = unwrapped(self.model), without_ddp(self.model)
        # What torch.compile has compiled cannot be differentiated twice.
        model = eager if twice and plain is not eager else plain if inner else self.model
        context = fused_double_backward if twice else torch.enable_grad
        with recomputed(eager, self.recompute, context), captured(eager, self.layers, shifts) as features, context():
            logits = model(x)
        missing = [name for name in self.layers if name not in features]
        if missing:
            raise ValueError(f"layers: {missing[0]!r} did not run in the forward pass: leave it out")
        self.criterion.check_inputs(logits, batch.target, x)
        return logits, tuple(features[name] for name in self.layers)

    def _vjps(self, batch: "Batch", create_graph: bool, inner: bool = False) -> "VJPs":
        """R of the images and of the layers; with ``create_graph`` they can be differentiated again."""
        x = batch.x.detach().requires_grad_()
        logits, features = self._forward(batch, x, twice=create_graph, inner=inner)
        if not logits.requires_grad:
            raise RuntimeError("the model's logits do not require grad: none of its layers is differentiable in x")
        s = self._scaled(seeds.scalar(logits, batch.target, self.criterion.seed))
        with distributed.twice_differentiable(logits):
            found = seeds.vjps(s, (x, *features), create_graph)
        for name, vjp in zip(("x", *self.layers), found, strict=True):
            if vjp is None:
                raise RuntimeError(f"the model's logits do not depend on {name!r} in a differentiable way")
        of_x, *of_features = map(self._unscaled, found)
        return VJPs(logits, of_x, features, tuple(of_features))

    def _scaled(self, scalar: Tensor) -> Tensor:
        return scalar if self.scaler is None else self.scaler.scale(scalar)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        if self.scaler is None:
            return gradient
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return wide / self.scaler.scale(torch.ones((), device=gradient.device))

    # ------------------------------------------------------------------------------------------- compiled

    def _compiled_vjps(self, batch: "Batch") -> "VJPs":
        model = unwrapped(self.model)
        if self._compiled is None:
            # A graph for each shape: with sizes left open the derivative of the derivative does not trace.
            self._compiled = torch.compile(_functional_vjps(model, self.criterion.seed), fullgraph=True, dynamic=False)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        logits, of_x, new_buffers = self._compiled(parameters, buffers, batch.x, batch.target)
        self.criterion.check_inputs(logits, batch.target, batch.x)
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(new_buffers[name])
        return VJPs(logits, of_x, (), ())

    # ------------------------------------------------------------------------------------------- two phases

    def _in_two_phases(self, batch: "Batch", rest: "Batch | None") -> SIBTerms:
        joined = self.criterion.joined(batch.x)
        parts = batch.parts(self.microbatch)
        noises, first = [], []
        for part in parts:
            noises.append(Noise(batch.x.device))
            with frozen_statistics(self.model):
                first.append(self._vjps(part, create_graph=False, inner=True).detached())
        leaves = VJPs.joined(first).as_leaves()
        information = self._information(leaves, batch, joined)
        cotangents = leaves.cotangents(self.every * information.loss)

        gradients = _Gradients(self)
        total = information.loss.new_zeros(())
        norm = joined.over_ranks(sum(self._norm(b) for b in (batch, rest) if b is not None))
        start = 0
        for number, (part, noise, vjps) in enumerate(zip(parts, noises, first, strict=True)):
            u = cotangents.rows(start, start + len(part.x))
            start += len(part.x)
            total += self._add_part(gradients, part, noise, u, self._norm(part) / norm, inner=number > 0)
            if self.engine == "finite_difference":
                self._add_difference(gradients, part, noise, u, vjps)
        if rest is not None:
            cross_entropy = self.criterion.cross_entropy(self._logits(rest), rest.target)
            cross_entropy = cross_entropy * (self._norm(rest) / norm).to(cross_entropy)
            gradients.add(cross_entropy)
            total += cross_entropy.detach()
        terms = self.criterion.together(information, joined.over_ranks(total), self.every)
        terms = SIBTerms(*(t.detach() if isinstance(t, Tensor) else t for t in terms[:-1]), terms.layers)
        return terms._replace(loss=gradients.attached_to(terms.loss))

    def _norm(self, batch: "Batch") -> Tensor:
        """What the mean in a batch's cross-entropy divides by."""
        weight = self.criterion.weight
        if weight is None or batch.target.is_floating_point():
            return batch.x.new_tensor(len(batch.x), dtype=torch.float64)
        return weight[batch.target].sum()

    def _add_part(self, gradients, part: "Batch", noise: Noise, u: "VJPs", weight, inner: bool) -> Tensor:
        """Cross-entropy, what u says of the feature maps' values and, if exact, of the VJPs; returns the first."""
        with noise.again():
            if self.engine == "finite_difference":
                logits, features = self._forward(part, part.x, inner=inner)
                products = []
            else:
                logits, _, features, _ = found = self._vjps(part, create_graph=True, inner=inner)
                products = u.paired(found)
        products += zip(u.features, features, strict=True)
        cross_entropy = self.criterion.cross_entropy(logits, part.target)
        cross_entropy = cross_entropy * weight.to(cross_entropy)
        gradients.add(cross_entropy + sum((a * b).sum() for a, b in products))
        return cross_entropy.detach()

    def _add_difference(self, gradients, part: "Batch", noise: Noise, u: "VJPs", vjps: "VJPs") -> None:
        """[grad s(x + h u) - grad s(x - h u)] / 2h, with the feature maps shifted along, for one h."""
        values = (part.x, *vjps.features)

        def s(h: Tensor, directions: Sequence[Tensor]) -> Tensor:
            shifts = [(h * d).to(v.dtype) for d, v in zip(directions, values, strict=True)]
            with noise.again(), frozen_statistics(self.model):
                logits, _ = self._forward(part, part.x + shifts[0], shifts[1:], inner=True)
                return seeds.scalar(logits, part.target, self.criterion.seed)

        directions = (u.of_x, *u.of_features)
        h = _unit(directions, values)
        if self._differences == 0:
            self._refuse_kinks(part.x)
        if self._differences % CALIBRATED == 0:
            self._calibrate(s, h, directions, vjps, values)
        self._differences += 1
        h = h * self._relative_step
        for sign in (1, -1):
            gradients.add(s(sign * h, directions), sign / (2 * h))

    def _calibrate(
        self, s: Callable, unit: Tensor, u: Sequence[Tensor], vjps: "VJPs", values: Sequence[Tensor]
    ) -> None:
        """Finds the relative step with the least error, modelled as rounding / h + bending * h^2.

        Both are seen on the derivative of s along u and R together, which is known. (Along u alone it says nothing
        where the loss does not depend on the scale of R: <u,R> is zero then.)
        """
        R = (vjps.of_x, *vjps.of_features)
        own = _unit(R, values)
        directions = [unit * a + own * b for a, b in zip(u, R, strict=True)]
        expected = sum((d.double() * b.double()).sum() for d, b in zip(directions, R, strict=True))

        def error(step: float) -> float:
            difference = (s(step, directions) - s(-step, directions)).double() / (2 * step)
            return float((difference - expected).abs() / (expected.abs() + TINY))

        with torch.no_grad():
            rounding = max(error(step) * step for step in ROUNDING_STEPS)
            bending = max(error(step) / step**2 for step in BENDING_STEPS)
            best = (rounding / (bending + TINY)) ** (1 / 3) if math.isfinite(rounding * bending) else 0.0
            self._relative_step = min(max(best, LEAST_STEP), LARGEST_STEP)
            self.error = error(self._relative_step)
        if not self.error <= TOLERATED:
            warnings.warn(
                f"finite differences are inaccurate on this model: even the best step misses the VJP's own derivative "
                f"by {100 * self.error:.2g} %. engine='double_backward' is exact.",
                stacklevel=2,
            )


def _unit(directions: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The h at which h times the directions is as large as the values, in the root mean square."""
    squares = [[t.float().square().mean() for t in pair] for pair in zip(directions, values, strict=True)]
    return 1 / (sum(direction / (value + TINY) for direction, value in squares).sqrt() + TINY)


def _functional_vjps(model: nn.Module, seed: str) -> Callable:
    """(parameters, buffers, x, target) -> (logits, R, buffers after the pass), without side effects.

    The derivative in x is inside, because what torch.compile has compiled cannot be differentiated twice.
    """

    def run(parameters, buffers, x, target):
        def s(x):
            after = {name: buffer.clone() for name, buffer in buffers.items()}
            logits = torch.func.functional_call(model, (parameters, after), (x,))
            wide = logits.float() if logits.dtype in (torch.half, torch.bfloat16) else logits
            return seeds.SEEDS[seed](wide, target), (logits, after)

        of_x, (logits, after) = torch.func.grad(s, has_aux=True)(x)
        return logits, of_x, after

    return run


class Batch(NamedTuple):
    """Images with what belongs to them; rows go together."""

    x: Tensor
    target: Tensor
    given: Tensor | None
    annotated: Tensor | None

    def rows(self, index) -> "Batch":
        return Batch(*(t if t is None else t[index] for t in self))

    def drawn(self, share: float) -> tuple["Batch", "Batch | None"]:
        """A random share of the rows, at least one, and the rest if there is any."""
        order = torch.randperm(len(self.x)).to(self.x.device)
        count = max(1, round(share * len(self.x)))
        return self.rows(order[:count]), self.rows(order[count:]) if count < len(self.x) else None

    def parts(self, size: int | None) -> list["Batch"]:
        size = size or len(self.x)
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.x), size)]

    def with_images_of(self, other: "Batch") -> "Batch":
        return Batch(torch.cat([self.x, other.x]), torch.cat([self.target, other.target]), None, None)


class VJPs(NamedTuple):
    """Logits, R of the images, and of each layer its feature map and R; or the cotangents of those."""

    logits: Tensor | None
    of_x: Tensor
    features: tuple[Tensor, ...]
    of_features: tuple[Tensor, ...]

    def _map(self, function: Callable) -> "VJPs":
        return VJPs(
            None, function(self.of_x), tuple(map(function, self.features)), tuple(map(function, self.of_features))
        )

    def detached(self) -> "VJPs":
        return self._map(Tensor.detach)

    def as_leaves(self) -> "VJPs":
        return self._map(lambda t: t.detach().requires_grad_())

    def rows(self, start: int, stop: int) -> "VJPs":
        return self._map(lambda t: t[start:stop])

    @staticmethod
    def joined(parts: Sequence["VJPs"]) -> "VJPs":
        if len(parts) == 1:
            return parts[0]
        columns = [
            tuple(map(torch.cat, zip(*column, strict=True)))
            for column in zip(*((p.features, p.of_features) for p in parts), strict=True)
        ]
        return VJPs(None, torch.cat([p.of_x for p in parts]), *columns)

    def cotangents(self, loss: Tensor) -> "VJPs":
        """dloss of leaves, in their order."""
        leaves = (self.of_x, *self.features, *self.of_features)
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
        count = len(self.features)
        return VJPs(None, grads[0], grads[1 : 1 + count], grads[1 + count :])

    def paired(self, other: "VJPs") -> list[tuple[Tensor, Tensor]]:
        """The VJPs of the one with those of the other."""
        return [(self.of_x, other.of_x), *zip(self.of_features, other.of_features, strict=True)]


class _Gradients:
    """Parameter gradients that add up part by part, and the loss that hands them out."""

    def __init__(self, step: SIBStep):
        self.step = step
        self.parameters = [p for p in step.model.parameters() if p.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def add(self, scalar: Tensor, weight: Tensor | float = 1.0) -> None:
        """Adds ``weight`` times the gradient of ``scalar`` and frees its graph.

        Each gradient is added as it comes, so that there is never a second set of all of them.
        """

        def hook(i: int) -> Callable:
            def take(grad: Tensor) -> Tensor:
                part = self.step._unscaled(grad) * weight
                self.sums[i] = part if self.sums[i] is None else self.sums[i].add_(part)
                return grad.new_zeros(()).expand_as(grad)

            return take

        handles = [parameter.register_hook(hook(i)) for i, parameter in enumerate(self.parameters)]
        try:
            torch.autograd.grad(self.step._scaled(scalar), self.parameters, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()

    def attached_to(self, loss: Tensor) -> Tensor:
        """``loss`` with these gradients behind it."""
        return _Attached.apply(loss, self.sums, *self.parameters)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, gradients, *parameters):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError(
                "backward was called twice on a loss of SIBStep, whose gradients are gone: call it again"
            )
        # In place and given away, so that they become the parameters' without a copy.
        gradients, ctx.gradients = [g if g is None else g.mul_(grad) for g in ctx.gradients], None
        return None, None, *gradients
