"""SIBStep: S-IB in any training loop. It chooses an engine, checks what it is given, and schedules the terms."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import distributed
from ..checks import check_choice, check_positive, describe
from ..labels import Look
from ..layers import check_places, class_activation_of, last_feature_map
from ..loss import PRESETS, SIBTerms, SpatialIBLoss
from ..passes import in_place_of, is_compiled, unwrapped
from . import double_backward
from .compiled import Compiled
from .microbatch import InParts
from .vjps import Task, VJPs

ENGINES = ("auto", "double_backward", "compiled")


class SIBStep:
    """The S-IB loss of a batch, computed by the engine that suits the model: ``step(x, y).backward()``.

    Args:
        model: images [B,C,H,W] -> logits [B,K], or an output that holds them (see ``output``); may be wrapped in DDP,
            FSDP2 or ``torch.compile``.
        criterion: a :class:`sib_ext.SpatialIBLoss`.
        layers: names (or one) of modules (``model.named_modules()``), or of functions in their forwards
            (``"block3.relu()"``, ``"relu()"``), whose output, a feature map [B,C,h,w] or [B,h,w,C] or tokens [B,T,D] of
            a grid, gets terms of its own, on its class activation (:func:`sib_ext.functional.class_activation`), in
            every step. ``"auto"``: the last feature map, found in the first step, if the criterion has terms for
            feature maps, else none.
        engine: ``"auto"``, ``"double_backward"`` or ``"compiled"``, see docs/engines.md.
        every: the terms of the input in every k-th step only, k times as strong (lazy regularisation; the first step
            has them). None: 1 for the criterion's preset ``"paper"``, else 4.
        jitter: >= 0; in steps with terms of the input the images get Gaussian noise, of a standard deviation drawn from
            0 to so many times each image's own range (as SmoothGrad's, which it is for). None: 0.25 for
            the preset ``"balanced"``, else 0.
        microbatch: None, or at most how many images a pass takes at once: the memory of a small batch, statistics
            (HSIC, CKA, noise) of the whole one. BatchNorm sees the parts.
        scaler: the ``torch.amp.GradScaler`` of a float16 training: VJPs are taken of the scaled seed, so that they do
            not underflow, and unscaled. Scale the loss as usual: ``scaler.scale(step(x, y)).backward()``.
        output: None, or a function that takes what the model returns and gives the logits. None: a tensor itself, a
            tuple's or list's first tensor, or ``logits`` of a mapping or an object.

    Attributes:
        engine, info: which engine runs, and why.
        layers: the names; those of ``"auto"`` are known after the first step.

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
        every: int | None = None,
        jitter: float | None = None,
        microbatch: int | None = None,
        scaler: "torch.amp.GradScaler | None" = None,
        output: Callable | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(criterion, SpatialIBLoss):
            raise ValueError(f"criterion must be a sib_ext.SpatialIBLoss, got {type(criterion).__name__}")
        self.model, self.criterion = model, criterion
        self.layers = () if layers == "auto" else _names(layers)
        self._finds_layers = layers == "auto"  # once there are terms for one
        self.every = PRESETS[criterion.preset]["every"] if every is None else every
        self.jitter = PRESETS[criterion.preset]["jitter"] if jitter is None else jitter
        self.microbatch, self.scaler, self.output = microbatch, scaler, output
        self._check_options(engine)
        self.engine, self._why = self._chosen(engine)
        self._check_combinations()
        self._vjps = self._vjps_of(strict=engine == "compiled")
        self._ordinary: set[str] = set()
        self.steps = 0

    def _check_options(self, engine: str) -> None:
        check_choice("engine", engine, ENGINES)
        for name, value in (("every", self.every), ("microbatch", self.microbatch)):
            if (name, value) != ("microbatch", None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        check_positive("jitter", self.jitter, zero=True)
        if self.scaler is not None and not hasattr(self.scaler, "scale"):
            raise ValueError(f"scaler must be None or a torch.amp.GradScaler, got {self.scaler!r}")
        if self.output is not None and not callable(self.output):
            raise ValueError(
                f"output must be None or a function of the model's output that returns logits, got {self.output!r}"
            )
        if self.layers and not self.criterion.has_feature_terms:
            raise ValueError(
                "layers were given, but the criterion has no term for them (feature_background=0, "
                "feature_foreground=0): give one of these weights, or leave layers out"
            )
        check_places(unwrapped(self.model), self.layers)

    def _chosen(self, engine: str) -> tuple[str, str]:
        if engine != "auto":
            return engine, "as asked for"
        if not is_compiled(self.model):
            return "double_backward", "exact, for any model that is differentiable twice"
        if self._knobs():
            return "double_backward", f"on the model inside torch.compile, because {self._knobs()} needs it"
        return "compiled", "because the model is wrapped in torch.compile"

    @property
    def _looks_for_layers(self) -> bool:
        return self._finds_layers and self.criterion.has_feature_terms

    def _knobs(self) -> str:
        """The argument in use that ``compiled`` cannot serve."""
        if self._looks_for_layers:
            return "layers"
        return next((n for n in ("layers", "microbatch", "scaler") if getattr(self, n)), "")

    def _check_layers(self) -> None:
        """Before every step again: the criterion's weights may change in a training."""
        if self.criterion.mask_source == "vjp" and (self.layers or self._looks_for_layers) and self.every > 1:
            raise ValueError(
                f"mask_source='vjp' makes masks of the input's VJP, which feature maps' terms do without in most steps "
                f"(every={self.every}): take mask_source='activation' or every=1"
            )
        if self.engine == "compiled" and self._knobs():
            without = " (give layers=() for none)" if self._looks_for_layers else ""
            raise ValueError(f"engine='compiled' takes no {self._knobs()}{without}: use engine='double_backward'")

    def _check_combinations(self) -> None:
        self._check_layers()
        eager = unwrapped(self.model)
        if self.microbatch and any(hasattr(m, "set_reshard_after_backward") for m in eager.modules()):
            raise ValueError(
                "microbatch runs the model with leaves in place of its parameters, which FSDP2 does not allow: leave "
                "microbatch out, or use DDP"
            )
        inside = [name for name, module in eager.named_modules() if is_compiled(module)]
        if self.engine == "double_backward" and inside:
            place = f"its module {inside[0]!r}" if inside[0] else "the model"
            raise ValueError(
                f"model.compile() was called on {place}, which has no second derivative then: give SIBStep "
                "torch.compile(model) of a model that was not compiled in place, or the model itself"
            )

    def _vjps_of(self, strict: bool) -> Callable[[Task, Tensor, Tensor], VJPs]:
        if self.microbatch:
            return InParts(self.microbatch)
        return Compiled(strict) if self.engine == "compiled" else double_backward.vjps

    @property
    def info(self) -> str:
        """Why this engine runs; and where it does not, why."""
        left = getattr(self._vjps, "left_to_the_exact", "")
        return self._why + (f"; some batches are left to double_backward: {left}" if left else "")

    def __repr__(self) -> str:
        return f"SIBStep(engine={self.engine!r} ({self.info}), layers={self.layers}, every={self.every})"

    def state_dict(self) -> dict:
        """What a resumed training needs beside the model's: the place in the cycle of ``every``, the layers found."""
        return {"steps": self.steps, "layers": self.layers, "finds_layers": self._finds_layers}

    def load_state_dict(self, state: Mapping) -> None:
        expected = {"steps", "layers", "finds_layers"}
        if set(state) != expected:
            raise ValueError(f"state must be what state_dict() of a step returned, got the keys {sorted(state)}")
        self.steps = state["steps"]
        if self._finds_layers and state["layers"]:  # layers that were named stay; who found none looks itself
            check_places(unwrapped(self.model), state["layers"])
            self.layers, self._finds_layers = tuple(state["layers"]), state["finds_layers"]

    def __call__(self, x: Tensor, target: Tensor, mask=None, annotated: Tensor | None = None) -> Tensor:
        """The loss, a scalar; all else as in :meth:`terms`."""
        return self.terms(x, target, mask, annotated).loss

    def terms(self, x: Tensor, target: Tensor, mask=None, annotated: Tensor | None = None) -> SIBTerms:
        """The loss and its parts, named; a step without terms of the input (``every``) has no place ``"input"``.

        In place of a call of the step: it counts as one, and ``terms.loss`` is what goes backward.

        Args:
            x: images [B,C,H,W], floating point; it is left as it is and gets no gradient.
            target, mask, annotated: as in :meth:`sib_ext.SpatialIBLoss.terms`.

        Raises:
            ValueError: an argument of the wrong type, size, range or device; a layer without a feature map; an output
                of the model without logits.
            RuntimeError: gradients are switched off, or the logits do not depend on x.
        """
        if not isinstance(x, Tensor) or x.dim() != 4 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(f"x must be a non-empty floating-point batch of images [B,C,H,W], got {describe(x)}")
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "SIBStep needs gradients, but they are switched off here (torch.no_grad or inference_mode): "
                "for a validation loss use criterion.cross_entropy(model(x), target)"
            )
        look = self.criterion.look(target, x)
        given, annotated = self.criterion.given(mask, x, annotated, look)
        x = x.detach()
        of_input = self.criterion.has_input_terms and self.steps % self.every == 0
        terms = self._terms(x, target, look, given, annotated, of_input)
        self.criterion.check_classes_of(mask)  # the logits tell how many there are
        self.steps += 1  # a step that failed, and was caught, is still due
        return terms

    def _terms(
        self,
        x: Tensor,
        target: Tensor,
        look: Look,
        given: Tensor | None,
        annotated: Tensor | None,
        of_input: bool,
    ) -> SIBTerms:
        if of_input and self.jitter:
            x = _jittered(x, self.jitter)
        task = self._task(x, of_input)
        if not of_input and not task.layers:
            cross_entropy = self._cross_entropy(self._plain_logits(task, x, look.target), target, x)
            return SIBTerms(cross_entropy, cross_entropy)
        joined = self.criterion.joined(x)
        found = in_place_of(self.model, lambda x: self._vjps(task, x, look.target), x)
        features = {
            name: class_activation_of(name, A, R_A, x.shape[2:])
            for name, A, R_A in zip(task.layers, found.features, found.of_features, strict=True)
        }
        terms = self.criterion.information(found.of_x, x, given, annotated, look, joined, features)
        return self.criterion.together(terms, self._cross_entropy(found.logits, target, x), target, self.every)

    def _plain_logits(self, task: Task, x: Tensor, target: Tensor) -> Tensor:
        if not self.microbatch:
            return task._replace(model=self.model).logits(x, target)
        return in_place_of(self.model, lambda x: self._vjps.logits(task, x, target), x)  # type: ignore[attr-defined]  # of parts

    def _task(self, x: Tensor, of_input: bool) -> Task:
        eager = unwrapped(self.model)
        if self.criterion.has_feature_terms:
            self._check_layers()
        if self._looks_for_layers:
            name = last_feature_map(eager, x, self.output)
            self.layers, self._finds_layers = (name,) if name else (), False
        layers = self.layers if self.criterion.has_feature_terms else ()
        if self.criterion.has_terms and not (layers or self.criterion.has_input_terms):
            raise ValueError(
                "layers: nothing is left of the S-IB loss, as there is no feature map and the input has no terms: "
                "name a place, layers=[...], or give the criterion input_background"
            )
        return Task(eager, self.criterion, layers, self.output, self.scaler, of_input, self._ordinary)

    def _cross_entropy(self, logits: Tensor, target: Tensor, x: Tensor) -> Tensor:
        joined = distributed.JoinedBatch(x, self.criterion.process_group)
        return self.criterion.joined_cross_entropy(logits, target, joined)


def _names(layers) -> tuple[str, ...]:
    names = (layers,) if isinstance(layers, str) else layers
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"layers must be 'auto', the name of a module or a sequence of names, got {layers!r}")
    return tuple(names)


def _jittered(x: Tensor, most: float) -> Tensor:
    """With noise of a standard deviation drawn from 0 to ``most`` times each image's range."""
    span = x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)
    deviation = most * torch.rand_like(span) * span
    # Drawn contiguous: the same for every memory format, and a CPU is slow at drawing for channels_last.
    return x + deviation * torch.randn_like(x, memory_format=torch.contiguous_format)
