"""SpatialIBLoss: cross-entropy plus the two spatial information terms, as a drop-in for nn.CrossEntropyLoss."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import distributed, estimators, masks, seeds
from .checks import check_choice, check_finite, check_positive, check_share, check_tensor, check_window, describe
from .guard import CollapseGuard
from .layers import class_activation_of
from .ops import masked_statistics
from .ops.density_mask import PADDINGS
from .ops.dispatch import without_autocast
from .reference import accumulation_dtype

# How an information value enters the loss: background as f(v), foreground as f(-v).
TRANSFORMS = {"identity": lambda value: value, "exp": torch.exp, "expm1": torch.expm1}

PRESETS = {
    # arXiv 2511.09239 with every constant of the authors' scripts.
    "paper": {
        "seed": "probability_energy",
        "mask": "density",
        "mask_source": "vjp",
        "background": "variance",
        "background_weight": 1000.0,
        "layer_weight": 0.0,
        "self_made_share": 0.5,
        "foreground": "hsic",
        "foreground_weight": 0.01,
        "transform": "exp",
        "detach_mask": False,
        "padding": "zeros",
    },
    # Shares in [0,1], free of scale, of the input's VJP and of a feature map: docs/objective.md has the search for it.
    "balanced": {
        "seed": "random_logit",
        "mask": "density",
        "mask_source": "activation",
        "background": "magnitude_ratio",
        "background_weight": 1.0,
        "layer_weight": 1.5,
        "self_made_share": 0.5,
        "foreground": "cka",
        "foreground_weight": 0.0,
        "transform": "identity",
        "detach_mask": True,
        "padding": "exclude",
    },
}


class SIBTerms(NamedTuple):
    """What :meth:`SpatialIBLoss.terms` returns; ``loss`` is differentiable, the rest is for logging and pictures."""

    loss: Tensor  #: scalar: cross_entropy + background_weight * f(background) + foreground_weight * f(-foreground)
    cross_entropy: Tensor  #: scalar
    background: Tensor | None  #: scalar, of the input's VJP; None where its weight is 0
    foreground: Tensor | None  #: scalar; None where its weight is 0
    mask: Tensor | None  #: M [B,1,H,W]; None where both weights are 0
    vjp: Tensor | None  #: R [B,C,H,W]; None where both weights are 0
    layers: Mapping[str, Tensor] = MappingProxyType({})  #: name -> background of a feature map, scalar


class Information(NamedTuple):
    """The S-IB terms of one batch, weighted and summed in ``loss``; the other fields are those of :class:`SIBTerms`."""

    loss: Tensor
    background: Tensor | None
    foreground: Tensor | None
    mask: Tensor
    vjp: Tensor
    layers: Mapping[str, Tensor]


class SpatialIBLoss(nn.CrossEntropyLoss):
    """Cross-entropy that also moves the network's vector-Jacobian product (VJP) onto the foreground.

    ``loss = CE + background_weight * f(I_background) + foreground_weight * f(-I_foreground)`` (arXiv 2511.09239),
    with R = ds/dx the VJP of a seed s of the logits, and a foreground mask M that is made from R or given.

    Args:
        preset: ``"balanced"`` (scale-free, bounded terms) or ``"paper"`` (the published loss with its constants).
            Every argument below that is None takes the preset's value.
        weight, label_smoothing: as in ``nn.CrossEntropyLoss``.
        seed: s(z): ``"probability_energy"`` (published), ``"target_logit"``, ``"target_log_prob"``, ``"logit_sum"``,
            ``"random_logit"``.
        mask: how M is made when none is given: ``"density"`` (published), ``"hard_density"``, ``"mean_sigmoid"``,
            ``"top_p"``.
        mask_source: of what: ``"vjp"``, R (published), or ``"activation"``, the class activation of the last of the
            feature maps, and where there are none the magnitude of R; each relative to its mean.
        background: ``"variance"`` (published), ``"energy"``, ``"energy_ratio"``, ``"magnitude_ratio"``, ``"gaussian"``.
        background_weight: >= 0; 0 leaves all background terms out.
        layer_weight: of each feature map's background term, times ``background_weight``; >= 0, 0 for no such terms.
        self_made_share: of samples without an annotation in the terms of a batch that has both kinds, in [0,1): terms
            are (1 - share) times the mean over the annotated samples plus share times the mean over the others.
            Where all are of one kind, the mean; 0: samples without an annotation never have terms.
        foreground: ``"hsic"`` (published, B >= 2), ``"hsic_unbiased"`` (B >= 4), ``"cka"`` (B >= 2), ``"gaussian"``.
        foreground_weight: >= 0; 0 leaves the term out.
        transform: f: ``"exp"`` (published), ``"expm1"`` (the same gradient, no offset), ``"identity"``.
        detach_mask: True keeps the gradient from flowing through a self-made mask (published: False).
        window: side of the mask's box average in pixels, odd, or ``"auto"`` = 31 scaled from 224 px (density masks).
        temperature: of the mask's soft quantiles, in sorted positions, > 0 (``"density"``).
        slope: of the mask's sigmoids, > 0; None: 10, and 30 for ``"top_p"``.
        area: foreground share of a self-made mask, in (0, 1); None: 0.2, and 0.1 for ``"top_p"``
            (``"mean_sigmoid"`` has no fixed area).
        eps: added to q95 - q05 in density masks, >= 0.
        padding: border of the box average, ``"zeros"`` (published; favours the centre) or ``"exclude"``
            (density masks).
        noise: sigma^2 > 0 of ``background="gaussian"``; None: kappa times the batch's mean VJP variance (scale-free).
        kappa: > 0, see ``noise``.
        impl: implementation of the ops, see :func:`sib_ext.density_mask`.
        check_values: also look for NaN and Inf in x and logits, and check the values of labels, masks and boxes
            that live on a GPU (on the CPU those are always checked). Waits for the GPU each call.
        process_group: None, ``"world"`` or a torch.distributed group, whose ranks' batches then count as one: the
            gradients, averaged over the ranks (DDP, FSDP2), are those of the joined batch (see docs/distributed.md).
        projection: None, or P >= 1: for the Grams, ranks exchange random projections of their rows R*M and x*M to P
            values, drawn anew each call from the generator that ``torch.manual_seed`` seeds on the group's first rank.

    Raises:
        ValueError: an argument that is unknown or out of range.
    """

    def __init__(
        self,
        preset: str = "balanced",
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        seed: str | None = None,
        mask: str | None = None,
        mask_source: str | None = None,
        background: str | None = None,
        background_weight: float | None = None,
        layer_weight: float | None = None,
        self_made_share: float | None = None,
        foreground: str | None = None,
        foreground_weight: float | None = None,
        transform: str | None = None,
        detach_mask: bool | None = None,
        window: int | str = "auto",
        temperature: float = 0.1,
        slope: float | None = None,
        area: float | None = None,
        eps: float = 1e-8,
        padding: str | None = None,
        noise: float | None = None,
        kappa: float = 1.0,
        impl: str | None = None,
        check_values: bool = False,
        process_group=None,
        projection: int | None = None,
    ):
        super().__init__(weight=weight, label_smoothing=label_smoothing)
        check_choice("preset", preset, tuple(PRESETS))
        constants = PRESETS[preset]

        def chosen(name, value):
            return constants[name] if value is None else value

        self.preset = preset
        self.seed = chosen("seed", seed)
        self.mask = chosen("mask", mask)
        self.mask_source = chosen("mask_source", mask_source)
        self.background = chosen("background", background)
        self.background_weight = chosen("background_weight", background_weight)
        self.layer_weight = chosen("layer_weight", layer_weight)
        self.self_made_share = chosen("self_made_share", self_made_share)
        self.foreground = chosen("foreground", foreground)
        self.foreground_weight = chosen("foreground_weight", foreground_weight)
        self.transform = chosen("transform", transform)
        self.detach_mask = chosen("detach_mask", detach_mask)
        self.padding = chosen("padding", padding)
        self.window, self.temperature, self.eps = window, temperature, eps
        self.slope = slope if slope is not None else 30.0 if self.mask == "top_p" else 10.0
        self.area = area if area is not None else 0.1 if self.mask == "top_p" else 0.2
        self.noise, self.kappa = noise, kappa
        self.impl, self.check_values = impl, check_values
        self.process_group, self.projection = process_group, projection
        self.guard, self._classes = CollapseGuard(), 0
        self._check_options(area)
        distributed.check_process_group(process_group, projection)

    def _check_options(self, area: float | None) -> None:
        for name, choices in (
            ("seed", seeds.SEEDS),
            ("mask", masks.MASKS),
            ("mask_source", masks.SOURCES),
            ("background", estimators.BACKGROUND),
            ("foreground", estimators.FOREGROUND),
            ("transform", TRANSFORMS),
            ("padding", PADDINGS),
        ):
            check_choice(name, getattr(self, name), tuple(choices))
        for name in ("background_weight", "layer_weight", "foreground_weight", "eps"):
            check_positive(name, getattr(self, name), zero=True)
        for name in ("temperature", "slope", "kappa"):
            check_positive(name, getattr(self, name))
        if self.self_made_share != 0:
            check_share("self_made_share", self.self_made_share)
        if self.noise is not None:
            check_positive("noise", self.noise)
        if self.window != "auto":
            check_window("window", self.window)
        check_share("area", self.area)
        if area is not None and self.mask == "mean_sigmoid":
            raise ValueError(f"area={area} has no meaning for mask='mean_sigmoid', whose area is free: leave it out")

    def extra_repr(self) -> str:
        return (
            f"preset={self.preset!r}, seed={self.seed!r}, mask={self.mask!r} of {self.mask_source!r}, "
            f"background={self.background_weight:g} * {self.background!r}, layers {self.layer_weight:g} times that, "
            f"foreground={self.foreground_weight:g} * {self.foreground!r}, transform={self.transform!r}"
        )

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy part alone, e.g. for a validation loss under ``torch.no_grad``."""
        return F.cross_entropy(logits, target, weight=self.weight, label_smoothing=self.label_smoothing)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        x: Tensor,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        annotated: Tensor | None = None,
        features: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss, a scalar (the joined batch's, where there is a ``process_group``); all else as in :meth:`terms`."""
        return self.terms(logits, target, x, mask, annotated, features).loss

    def terms(
        self,
        logits: Tensor,
        target: Tensor,
        x: Tensor,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        annotated: Tensor | None = None,
        features: Tensor | Mapping[str, Tensor] | None = None,
    ) -> SIBTerms:
        """The loss and its parts, named.

        Args:
            logits: z [B,K], computed from ``x`` with gradients on.
            target: class indices [B] in [0, K), or class probabilities [B,K].
            x: the images [B,C,H,W] that went into the model, floating point, ``x.requires_grad_()`` called before.
            mask: the foreground, if known: soft in [0,1] or boolean, [B,1,H,W] or [B,H,W]; or boxes [B,4]
                (x1, y1, x2, y2 in pixels); or a sequence of B items [H,W], [1,H,W] or [4], None where unknown.
            annotated: bool [B]: which samples' ``mask`` counts; the others get the self-made mask.
            features: what the logits were computed from on the way from ``x`` and gets a background term of its own:
                a feature map [B,C,h,w] or [B,h,w,C] or tokens [B,T,D] of a grid, or several of them by name. Best the
                one that class-activation maps look at (:class:`sib_ext.SIBStep` finds it).

        Raises:
            ValueError: an argument of the wrong type, rank, size, range or device.
            RuntimeError: ``x`` does not require grad, or ``logits`` do not depend on it.
        """
        self.check_inputs(logits, target, x)
        if self.has_terms:
            seeds.check_graph(logits, x)
        given, annotated = self.given(mask, x, annotated)
        joined = self.joined(x)
        cross_entropy = self.joined_cross_entropy(logits, target, joined)
        if not self.has_terms:
            return SIBTerms(cross_entropy, cross_entropy, None, None, None, None)
        features = self._named(features)
        with distributed.twice_differentiable(logits):
            R, *of_features = seeds.vjps(seeds.scalar(logits, target, self.seed), (x, *features.values()))
        seeds.check_vjp(R)
        fields = {
            name: class_activation_of(name, A, R_A, x.shape[2:])
            for (name, A), R_A in zip(features.items(), of_features, strict=True)
        }
        return self.together(self.information(R, x, given, annotated, joined, fields), cross_entropy)

    def _named(self, features: Tensor | Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """``features`` of a call by name, as far as they have a term; checked."""
        if features is None:
            return {}
        features = {"features": features} if isinstance(features, Tensor) else features
        if not isinstance(features, Mapping) or not all(isinstance(A, Tensor) for A in features.values()):
            raise ValueError(
                f"features must be a tensor or a mapping of names to tensors, got {type(features).__name__}"
            )
        if not self.has_layer_terms:
            weights = f"background_weight={self.background_weight:g}, layer_weight={self.layer_weight:g}"
            raise ValueError(f"features were given, but have no term ({weights}): give both weights, or no features")
        return features

    # ------------------------------------------------------------- the parts, as sib_ext.engines composes them

    @property
    def has_terms(self) -> bool:
        """Whether there is anything but cross-entropy."""
        return self.background_weight > 0 or self.foreground_weight > 0

    @property
    def has_layer_terms(self) -> bool:
        """Whether feature maps have background terms."""
        return self.background_weight > 0 and self.layer_weight > 0

    def together(self, information: Information, cross_entropy: Tensor, scale: float = 1.0) -> SIBTerms:
        """The parts of a training step's loss; ``scale`` multiplies the S-IB terms."""
        if self.training:
            self.guard.watch(cross_entropy, information.loss, self._classes)
        loss = cross_entropy.to(information.loss.dtype) + scale * information.loss
        return SIBTerms(loss, cross_entropy, *information[1:])

    def given(
        self, mask: Tensor | Sequence[Tensor | None] | None, x: Tensor, annotated: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """``mask`` and ``annotated`` of a call, checked: :func:`sib_ext.masks.given_mask`."""
        if mask is not None:
            return masks.given_mask(mask, x, annotated, self.check_values)
        if annotated is not None:
            raise ValueError("annotated was given without mask: pass mask=... too")
        return None, None

    def joined(self, x: Tensor) -> distributed.JoinedBatch:
        """The batch whose statistics count: that of the process group, or x alone; large enough for the foreground."""
        joined = distributed.JoinedBatch(x, self.process_group, self.projection)
        if self.foreground_weight > 0:
            estimators.check_batch(self.foreground, joined.size)
        return joined

    def joined_cross_entropy(self, logits: Tensor, target: Tensor, joined: distributed.JoinedBatch) -> Tensor:
        """The cross-entropy of the joined batch."""
        if joined.group is None:
            return self.cross_entropy(logits, target)
        return joined.cross_entropy(logits, target, self.weight, self.label_smoothing)

    def information(
        self,
        R: Tensor,
        x: Tensor,
        given: Tensor | None,
        annotated: Tensor | None,
        joined: distributed.JoinedBatch,
        layers: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Information:
        """Everything but cross-entropy, as a function of the VJP R of x.

        ``layers``: name -> class activation [B,1,h,w] of a feature map (:func:`sib_ext.functional.class_activation`);
        each adds ``layer_weight * background_weight * f(I_background)`` in the mask brought to its size.
        """
        with without_autocast(x.device.type):
            M = self._mask(R, layers, given, annotated)
            weights = self._sample_weights(R, given, annotated, joined)
            grams = self.foreground_weight > 0 and self.foreground != "gaussian"
            local = grams and joined.group is None
            # Only the foreground looks at x; else R stands in, which is being read anyway.
            other = x if self.foreground_weight > 0 else R.detach()
            moments, gram_vjp, gram_input = masked_statistics(R, other, M, local, local, impl=self.impl)
            if grams and not local:
                gram_vjp, gram_input = joined.grams(R, x, M, moments)
            parts = []
            background = foreground = None
            f = TRANSFORMS[self.transform]
            if self.background_weight > 0:
                background = self._background(R, moments, weights, joined)
                parts.append(self.background_weight * f(background))
            if self.foreground_weight > 0:
                statistics = (gram_vjp, gram_input) if grams else (moments, R[0].numel())
                foreground = estimators.FOREGROUND[self.foreground](*statistics)
                if not grams:  # one value a sample
                    foreground = joined.sum((weights * foreground).sum())
                parts.append(self.foreground_weight * f(-foreground))
            of_layers = {}
            for name, field in layers.items():
                mask = F.adaptive_avg_pool2d(M, field.shape[2:])
                of_field = masked_statistics(field, field.detach(), mask, False, False, impl=self.impl).moments
                of_layers[name] = self._background(field, of_field, weights, joined)
                parts.append(self.layer_weight * self.background_weight * f(of_layers[name]))
        return Information(sum(parts[1:], start=parts[0]), background, foreground, M, R, of_layers)

    def _background(self, field: Tensor, moments: Tensor, weights: Tensor, joined: distributed.JoinedBatch) -> Tensor:
        noise = {}
        if self.background == "gaussian":
            relative = self.noise is None
            noise["noise"] = joined.mean(estimators.relative_noise(field, self.kappa)) if relative else self.noise
        values = estimators.BACKGROUND[self.background](moments, field[0].numel(), **noise)
        return joined.sum((weights * values).sum())

    def _sample_weights(
        self, R: Tensor, given: Tensor | None, annotated: Tensor | None, joined: distributed.JoinedBatch
    ) -> Tensor:
        """[B], with a sum of 1 over the joined batch: samples without an annotation share self_made_share of it."""
        dtype = accumulation_dtype(R.dtype)
        known = R.new_full((len(R),), float(given is not None), dtype=dtype)
        if annotated is not None:
            known = known * annotated.to(dtype)
        counts = joined.sum(torch.stack([known.sum(), (1 - known).sum()]))
        of_known, of_others = (counts > 0).to(dtype).unbind()
        of_known, of_others = (1 - self.self_made_share) * of_known, self.self_made_share * of_others
        # Of one kind alone: all of it, unless samples without an annotation are to have none.
        total = of_known + of_others if self.self_made_share > 0 else 1
        each = torch.stack([of_known, of_others]) / (total * counts.clamp_min(1))
        return known * each[0] + (1 - known) * each[1]

    def _mask(self, R: Tensor, layers: Mapping[str, Tensor], given: Tensor | None, annotated: Tensor | None) -> Tensor:
        if given is not None and annotated is None:
            return given
        options = {
            "density": {
                "window": self.window,
                "temperature": self.temperature,
                "slope": self.slope,
                "eps": self.eps,
                "padding": self.padding,
                "area": self.area,
                "impl": self.impl,
            },
            "hard_density": {
                "window": self.window,
                "slope": self.slope,
                "eps": self.eps,
                "padding": self.padding,
                "area": self.area,
            },
            "mean_sigmoid": {"slope": self.slope},
            "top_p": {"area": self.area, "slope": self.slope},
        }[self.mask]
        source = R if self.mask_source == "vjp" else masks.activation_source(R, list(layers.values()))
        made = masks.MASKS[self.mask](source.detach() if self.detach_mask else source, **options)
        return made if given is None else torch.where(annotated[:, None, None, None], given, made)

    def check_inputs(self, logits: Tensor, target: Tensor, x: Tensor) -> None:
        for name, value in (("logits", logits), ("target", target), ("x", x)):
            check_tensor(name, value, "a tensor")
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"x must be a non-empty batch of images [B,C,H,W], got {describe(x)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {describe(x)}: convert images, e.g. x.float() / 255")
        batch = x.shape[0]
        if logits.dim() != 2 or logits.shape[0] != batch or not logits.is_floating_point():
            raise ValueError(
                f"logits must be floating point [{batch},K] for x with {batch} images, got {describe(logits)}"
            )
        if logits.device != x.device or target.device != x.device:
            raise ValueError(
                f"logits, target and x must be on one device, got {logits.device}, {target.device} and {x.device}"
            )
        self._check_target(target, logits)
        if self.check_values:
            check_finite("x", x)
            check_finite("logits", logits)

    def _check_target(self, target: Tensor, logits: Tensor) -> None:
        batch, classes = logits.shape
        self._classes = classes
        if target.is_floating_point():
            if target.shape != logits.shape:
                raise ValueError(
                    f"target has class probabilities, so it must be [{batch},{classes}], got {describe(target)}"
                )
            return
        if target.dtype != torch.int64 or target.shape != (batch,):
            raise ValueError(
                f"target must be class indices, int64 [{batch}], or class probabilities [{batch},{classes}], "
                f"got {describe(target)}"
            )
        if self.check_values or target.device.type == "cpu":
            least, most = (int(v) for v in target.aminmax())
            if least < 0 or most >= classes:
                raise ValueError(f"target must lie in [0,{classes - 1}] for {classes} logits, got {least} to {most}")
