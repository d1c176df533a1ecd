"""SpatialIBLoss: cross-entropy plus the two spatial information terms, as a drop-in for nn.CrossEntropyLoss."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import class_masks, distributed, estimators, labels, masks, seeds
from .checks import check_choice, check_finite, check_positive, check_share, check_tensor, check_window, describe
from .guard import CollapseGuard, guessing_labels
from .information import TRANSFORMS, Information, information
from .layers import class_activation_of
from .ops.density_mask import PADDINGS
from .reference import accumulation_dtype

PRESETS = {
    # arXiv 2511.09239 with every constant of the authors' scripts.
    "paper": {
        "seed": "probability_energy",
        "mask": "density",
        "mask_source": "vjp",
        "background": "variance",
        "foreground": "hsic",
        "input_background": 1000.0,
        "input_foreground": 0.01,
        "feature_background": 0.0,
        "feature_foreground": 0.0,
        "self_made_share": 0.5,
        "transform": "exp",
        "detach_mask": False,
        "padding": "zeros",
        "every": 1,
        "jitter": 0.0,
    },
    # Free of scale, both halves at the last feature map, and lazily the input's background: docs/objective.md has the
    # search for it.
    "balanced": {
        "seed": "random_logit",
        "mask": "density",
        "mask_source": "activation",
        "background": "magnitude_ratio",
        "foreground": "log_capacity",
        "input_background": 0.75,
        "input_foreground": 0.0,
        "feature_background": 1.5,
        "feature_foreground": 0.4,
        "self_made_share": 0.5,
        "transform": "identity",
        "detach_mask": True,
        "padding": "exclude",
        "every": 4,
        "jitter": 0.25,
    },
}
# Balanced, for a network that starts from trained weights: docs/photographs.md has the search. In few steps noise costs
# accuracy, and the input's maps need more weight to move.
PRESETS["fine_tuning"] = PRESETS["balanced"] | {"input_background": 3.0, "jitter": 0.0}


TASKS = ("multiclass", "multilabel")
NEVER = torch.iinfo(torch.int64).min  #: a label that there is not, in the place of an ignore_index
WEIGHTS = ("input_background", "input_foreground", "feature_background", "feature_foreground")


class SIBTerms(NamedTuple):
    """What :meth:`SpatialIBLoss.terms` returns; ``loss`` is differentiable, the rest is for logging and pictures.

    Terms are named by place: ``"input"``, the input's VJP, and the feature maps by their names; those that a step does
    not have are not there.
    """

    loss: Tensor  #: scalar: cross_entropy + the sum over places of weight * f(background) + weight * f(-foreground)
    cross_entropy: Tensor  #: scalar; of several labels the binary one; or what ``base`` gives
    background: Mapping[str, Tensor] = MappingProxyType({})  #: place -> I_background, scalar
    foreground: Mapping[str, Tensor] = MappingProxyType({})  #: place -> I_foreground, scalar
    #: place -> how many samples of this process's batch have a map that is zero everywhere: |R|, or a class activation
    empty: Mapping[str, Tensor] = MappingProxyType({})
    mask: Tensor | None = None  #: M [B,1,H,W]
    vjp: Tensor | None = None  #: R [B,C,H,W]


class SpatialIBLoss(nn.CrossEntropyLoss):
    """Cross-entropy that also moves the network's vector-Jacobian product (VJP) onto the foreground.

    ``loss = CE + input_background * f(I_background) + input_foreground * f(-I_foreground)`` (arXiv 2511.09239), with
    R = ds/dx the VJP of a seed s of the logits, and a foreground mask M that is made or given; and the same two terms,
    with weights of their own, for each feature map.

    Args:
        preset: ``"balanced"`` (scale-free, bounded terms), ``"fine_tuning"`` (the same with the weights for a network
            that starts from trained weights) or ``"paper"`` (the published loss with its constants). Every argument
            below that is None takes the preset's value.
        weight, label_smoothing: as in ``nn.CrossEntropyLoss``; they weigh the cross-entropy, and no term.
        ignore_index: None, or the label of samples that are left out of the cross-entropy, and of the terms where the
            seed is of the label. None: such a label is an error, as any that is out of range.
        task: ``"multiclass"``: one label an image. ``"multilabel"``: several, with binary cross-entropy; each call
            looks at one label of each image, drawn anew, and at its mask (:func:`sib_ext.labels.drawn`), and images
            without a label have no terms. It takes the seeds ``"target_logit"`` and ``"random_logit"``.
        pos_weight: [K], of ``"multilabel"``, as in ``nn.BCEWithLogitsLoss``; as is ``weight`` [K] then.
        base: None, or a classification loss in the place of the cross-entropy, (logits [B,K], target) -> a scalar, the
            mean over the batch, or [B]; several labels come to it in the logits' type. With a ``process_group`` ranks'
            scalars are weighted by their batches' sizes. A module's parameters are this loss's, not the model's.
        seed: s(z): ``"probability_energy"`` (published), ``"target_logit"``, ``"target_log_prob"``, ``"logit_sum"``,
            ``"random_logit"``.
        mask: how M is made when none is given: ``"density"`` (published), ``"hard_density"``, ``"mean_sigmoid"``,
            ``"top_p"``.
        mask_source: of what: ``"vjp"``, R (published), or ``"activation"``, the class activation of the feature map
            that is named last, and where there are none the magnitude of R; each relative to its mean.
        background: ``"variance"`` (published), ``"energy"``, ``"energy_ratio"``, ``"magnitude_ratio"``, ``"gaussian"``.
        foreground: of the input: ``"hsic"`` (published, B >= 2), ``"hsic_unbiased"`` (B >= 4), ``"cka"`` (B >= 2),
            ``"gaussian"``, which compare R with x, or ``"log_capacity"``. Feature maps have ``"log_capacity"`` always.
        input_background, input_foreground: weights of the terms of the input's VJP, >= 0. Both 0: R is not formed, and
            x need not require grad.
        feature_background, feature_foreground: weights of the terms of each feature map, on its class activation
            (:func:`sib_ext.functional.class_activation`), >= 0.
        self_made_share: of samples without an annotation in the terms of a batch that has both kinds, in [0,1): terms
            are (1 - share) times the mean over the annotated samples plus share times the mean over the others.
            Where all are of one kind, the mean; 0: samples without an annotation never have terms. HSIC and CKA
            compare all samples of the batch and know no share.
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
        kappa: noise of ``"gaussian"`` (background) and ``"log_capacity"``, > 0, relative to the batch's mean signal.
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
        ignore_index: int | None = None,
        task: str = "multiclass",
        pos_weight: Tensor | None = None,
        base: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: str | None = None,
        mask: str | None = None,
        mask_source: str | None = None,
        background: str | None = None,
        foreground: str | None = None,
        input_background: float | None = None,
        input_foreground: float | None = None,
        feature_background: float | None = None,
        feature_foreground: float | None = None,
        self_made_share: float | None = None,
        transform: str | None = None,
        detach_mask: bool | None = None,
        window: int | str = "auto",
        temperature: float = 0.1,
        slope: float | None = None,
        area: float | None = None,
        eps: float = 1e-8,
        padding: str | None = None,
        kappa: float = 1.0,
        impl: str | None = None,
        check_values: bool = False,
        process_group=None,
        projection: int | None = None,
    ):
        for name, value in (("weight", weight), ("pos_weight", pos_weight)):
            if value is not None:
                check_tensor(name, value, "a tensor [K]")
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
        self.foreground = chosen("foreground", foreground)
        self.input_background = chosen("input_background", input_background)
        self.input_foreground = chosen("input_foreground", input_foreground)
        self.feature_background = chosen("feature_background", feature_background)
        self.feature_foreground = chosen("feature_foreground", feature_foreground)
        self.self_made_share = chosen("self_made_share", self_made_share)
        self.transform = chosen("transform", transform)
        self.detach_mask = chosen("detach_mask", detach_mask)
        self.padding = chosen("padding", padding)
        self.window, self.temperature, self.eps = window, temperature, eps
        self.slope = slope if slope is not None else 30.0 if self.mask == "top_p" else 10.0
        self.area = area if area is not None else 0.1 if self.mask == "top_p" else 0.2
        self.kappa = kappa
        self.impl, self.check_values = impl, check_values
        self.process_group, self.projection = process_group, projection
        self.ignore_index, self.task, self.base = ignore_index, task, base
        self.register_buffer("pos_weight", pos_weight)
        self.guard, self._classes = CollapseGuard(), 0
        self._check_classification()
        self._check_options(area)
        distributed.check_process_group(process_group, projection)

    def _check_classification(self) -> None:
        check_choice("task", self.task, TASKS)
        if self.base is not None and (not callable(self.base) or isinstance(self.base, type)):
            raise ValueError(
                f"base must be None or a function of logits and target, such as a module, got {self.base!r}"
            )
        for name in ("weight", "pos_weight"):
            value = getattr(self, name)
            if value is not None and (value.dim() != 1 or not bool((value.isfinite() & (value >= 0)).all())):
                raise ValueError(f"{name} must be finite numbers >= 0, one a class [K], got {describe(value)}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be a number from 0 to 1, got {self.label_smoothing!r}")
        if self.ignore_index is not None and type(self.ignore_index) is not int:
            raise ValueError(f"ignore_index must be None or an integer, got {self.ignore_index!r}")
        unused = {
            "weight": self.base is not None and self.weight is not None,
            "pos_weight": (self.base is not None or not self.is_multilabel) and self.pos_weight is not None,
            "label_smoothing": (self.base is not None or self.is_multilabel) and self.label_smoothing != 0,
            "ignore_index": (self.base is not None or self.is_multilabel) and self.ignore_index is not None,
        }
        for name in (name for name, given in unused.items() if given):
            where = "with a base loss" if self.base is not None else f"for task={self.task!r}"
            raise ValueError(f"{name} has no meaning {where}: leave it out")
        if self.is_multilabel and self.seed not in labels.MULTILABEL_SEEDS:
            raise ValueError(
                f"seed={self.seed!r} has no meaning for task='multilabel', whose images look at one label each: take "
                "seed='random_logit' or 'target_logit'"
            )
        self._check_grams()

    def _check_grams(self) -> None:
        """Before every step again: the weights may change in a training."""
        leaves_out = self.is_multilabel or (self.ignore_index is not None and self.seed in seeds.OF_LABELS)
        if leaves_out and self.input_foreground > 0 and self.foreground in estimators.OF_GRAMS:
            raise ValueError(
                f"foreground={self.foreground!r} compares all samples of a batch, and some have no label: take "
                "foreground='log_capacity' or 'gaussian', or input_foreground=0"
            )

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
        for name in (*WEIGHTS, "eps"):
            check_positive(name, getattr(self, name), zero=True)
        for name in ("temperature", "slope", "kappa"):
            check_positive(name, getattr(self, name))
        if self.self_made_share != 0:
            check_share("self_made_share", self.self_made_share)
        if self.mask_source == "vjp" and self.has_feature_terms and not self.has_input_terms:
            raise ValueError(
                "mask_source='vjp' makes masks of the input's VJP, which is not formed where the input has no terms: "
                "take mask_source='activation', or give input_background or input_foreground"
            )
        if self.window != "auto":
            check_window("window", self.window)
        check_share("area", self.area)
        if area is not None and self.mask == "mean_sigmoid":
            raise ValueError(f"area={area} has no meaning for mask='mean_sigmoid', whose area is free: leave it out")

    def extra_repr(self) -> str:
        return (
            f"preset={self.preset!r}, task={self.task!r}, base={self.base!r}, ignore_index={self.ignore_index!r}, "
            f"seed={self.seed!r}, mask={self.mask!r} of {self.mask_source!r}, "
            f"background={self.background!r} ({self.input_background:g} input, {self.feature_background:g} features), "
            f"foreground={self.foreground!r} ({self.input_foreground:g} input, {self.feature_foreground:g} features), "
            f"transform={self.transform!r}"
        )

    @property
    def is_multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.task == "multilabel"

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy part alone (the ``base`` loss where there is one), a scalar, e.g. for a validation loss
        under ``torch.no_grad``."""
        if self.base is not None or self.is_multilabel:
            return self._of_samples(logits, target).mean()
        return F.cross_entropy(logits, target, **self._of_classes(target))

    def _of_classes(self, target: Tensor) -> dict:
        ignores = self.ignore_index is not None and not target.is_floating_point()
        of_classes = {"weight": self.weight, "label_smoothing": self.label_smoothing}
        return of_classes | {"ignore_index": self.ignore_index if ignores else NEVER}

    def _of_samples(self, logits: Tensor, target: Tensor) -> Tensor:
        """[B], or the mean over the batch, of a loss that is a mean over samples."""
        if self.is_multilabel:
            self._check_labels(target)
            target = target.to(logits.dtype)
        if self.base is None:
            weights = {"weight": self.weight, "pos_weight": self.pos_weight}
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none", **weights).mean(1)
        value = self.base(logits, target)
        if not isinstance(value, Tensor) or value.shape not in ((), logits.shape[:1]) or not value.is_floating_point():
            got = describe(value) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"base must return a floating-point scalar or [{len(logits)}], got {got}")
        if torch.is_grad_enabled() and logits.requires_grad and not value.requires_grad:
            raise ValueError("base returned a value without a gradient: it must not detach the logits")
        return value

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        x: Tensor,
        mask: Tensor | Sequence | None = None,
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
        mask: Tensor | Sequence | None = None,
        annotated: Tensor | None = None,
        features: Tensor | Mapping[str, Tensor] | None = None,
    ) -> SIBTerms:
        """The loss and its parts, named.

        Args:
            logits: z [B,K], computed from ``x`` with gradients on.
            target: class indices [B] in [0, K), or class probabilities [B,K]; for ``task="multilabel"`` labels [B,K] in
                [0,1] (boolean, integers or floating point), present from 0.5 on.
            x: the images [B,C,H,W] that went into the model, floating point; where the input has terms,
                ``x.requires_grad_()`` called before.
            mask: the foreground, if known: soft in [0,1] or boolean, [B,1,H,W] or [B,H,W]; or boxes [B,4]
                (x1, y1, x2, y2 in pixels); or a sequence of B items [H,W], [1,H,W], [4] or [N,4] (several boxes: their
                union), None where unknown. torchvision's ``Mask`` and ``BoundingBoxes``, too, which say their format;
                a stack of them (``default_collate``) is a plain tensor that does not. Items of a sequence may also be
                mappings of class indices to such things: the mask of the class that the sample's terms look at counts,
                and where it has none it is unknown. With several labels also a tensor [B,K,H,W]; a mask of a whole
                sample stands for all of its labels.
            annotated: bool [B], with a mask [B,K,H,W] also [B,K]: whose ``mask`` counts; the others get the self-made
                mask.
            features: what the logits were computed from on the way from ``x`` and gets terms of its own: a feature map
                [B,C,h,w] or [B,h,w,C] or tokens [B,T,D] of a grid, or several of them by name. Best the one that
                class-activation maps look at (:class:`sib_ext.SIBStep` finds it). None: the input's terms alone.

        Raises:
            ValueError: an argument of the wrong type, rank, size, range or device; no features where only they have
                terms.
            RuntimeError: ``x``, where the input has terms, or a feature map does not require grad, or ``logits`` do not
                depend on it.
        """
        self.check_inputs(logits, target, x)
        features = self._named(features)
        inputs = (x, *features.values()) if self.has_input_terms else tuple(features.values())
        if self.has_terms:
            seeds.check_graph(logits, x if self.has_input_terms else None, features)
        look = self.look(target, x)
        self.check_classes_of(mask)
        given, annotated = self.given(mask, x, annotated, look)
        joined = self.joined(x)
        cross_entropy = self.joined_cross_entropy(logits, target, joined)
        if not self.has_terms:
            return SIBTerms(cross_entropy, cross_entropy)
        with distributed.twice_differentiable(logits, inputs):
            found = seeds.vjps(seeds.scalar(logits, look.target, self.scalar_seed), inputs)
        R = None
        if self.has_input_terms:
            R, *found = found
            seeds.check_vjp(R)
        fields = {
            name: class_activation_of(name, A, R_A, x.shape[2:])
            for (name, A), R_A in zip(features.items(), found, strict=True)
        }
        return self.together(self.information(R, x, given, annotated, look, joined, fields), cross_entropy, target)

    def _named(self, features: Tensor | Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """``features`` of a call by name, as far as they have a term; checked."""
        if features is None:
            if self.has_terms and not self.has_input_terms:
                raise ValueError(
                    "features are missing: the input has no terms (input_background=0, input_foreground=0), so pass "
                    "the feature map that the logits were computed from, features=..., or use sib_ext.SIBStep, which "
                    "finds it"
                )
            return {}
        features = {"features": features} if isinstance(features, Tensor) else features
        if not isinstance(features, Mapping) or not all(isinstance(A, Tensor) for A in features.values()):
            raise ValueError(
                f"features must be a tensor or a mapping of names to tensors, got {type(features).__name__}"
            )
        if not self.has_feature_terms:
            raise ValueError(
                "features were given, but have no term (feature_background=0, feature_foreground=0): give one of these "
                "weights, or no features"
            )
        if not features:
            raise ValueError("features must name one map or more, got none: leave them out for the input's terms alone")
        return features

    # ------------------------------------------------------------- the parts, as sib_ext.engines composes them

    @property
    def has_input_terms(self) -> bool:
        """Whether the input's VJP has terms."""
        return self.input_background > 0 or self.input_foreground > 0

    @property
    def has_feature_terms(self) -> bool:
        """Whether feature maps have terms."""
        return self.feature_background > 0 or self.feature_foreground > 0

    @property
    def has_terms(self) -> bool:
        """Whether there is anything but cross-entropy."""
        return self.has_input_terms or self.has_feature_terms

    def together(self, found: Information, cross_entropy: Tensor, target: Tensor, every: int = 1) -> SIBTerms:
        """The parts of a training step's loss; ``every`` multiplies the terms of the input."""
        if self.training:
            if self.is_multilabel:
                self.guard.count(target)
            self.guard.watch(cross_entropy, found, self._guessing)
        loss = cross_entropy
        if found.input is not None:
            loss = loss.to(found.input.dtype) + every * found.input
        if found.features is not None:
            loss = loss.to(found.features.dtype) + found.features
        return SIBTerms(loss, cross_entropy, *found[2:])

    def _guessing(self) -> float:
        """The loss of a network that guesses by how often there is what; NaN: of a ``base`` loss it is not known."""
        if self.base is not None:
            return math.nan
        if self.is_multilabel:
            return guessing_labels(self.guard.frequency, self.weight, self.pos_weight)
        return math.log(max(self._classes, 2))

    @property
    def scalar_seed(self) -> str:
        """The seed as engines take it, of :attr:`sib_ext.labels.Look.target`: what is drawn is drawn already."""
        return "target_logit" if self.is_multilabel else self.seed

    def look(self, target: Tensor, x: Tensor) -> labels.Look:
        """What the terms of a step look at in each image; drawn anew every call where an image has several labels."""
        self._check_shape(target, len(x))
        if self.is_multilabel:
            self._check_labels(target)
            return labels.drawn(target, self.seed)
        if self.ignore_index is None:
            return labels.of_one_label(target)
        looks = self.check_values or target.device.type == "cpu"
        if looks and self.process_group is None and bool((target == self.ignore_index).all()):
            raise ValueError(
                f"target is ignore_index={self.ignore_index} for every sample, and there is no loss of none: leave "
                "the batch out"
            )
        return labels.without_ignored(target, self.ignore_index, self.seed in seeds.OF_LABELS)

    def given(
        self, mask: Tensor | Sequence | None, x: Tensor, annotated: Tensor | None, look: labels.Look
    ) -> tuple[Tensor | None, Tensor | None]:
        """``mask`` and ``annotated`` of a call, checked: :func:`sib_ext.masks.given_mask`, or that of
        :mod:`sib_ext.class_masks`."""
        if mask is not None and class_masks.is_of_classes(mask, look):
            return class_masks.of_look(mask, x, look, annotated, self.check_values)
        if mask is not None:
            return masks.given_mask(mask, x, annotated, self.check_values)
        if annotated is not None:
            raise ValueError("annotated was given without mask: pass mask=... too")
        return None, None

    def check_classes_of(self, mask) -> None:
        """Masks a class name classes that there are, once the logits have told how many."""
        class_masks.check_classes(mask, self._classes)

    def joined(self, x: Tensor) -> distributed.JoinedBatch:
        """The batch whose statistics count: that of the process group, or x alone; large enough for the foreground."""
        self._check_grams()
        joined = distributed.JoinedBatch(x, self.process_group, self.projection)
        if self.input_foreground > 0:
            estimators.check_batch(self.foreground, joined.size)
        return joined

    def joined_cross_entropy(self, logits: Tensor, target: Tensor, joined: distributed.JoinedBatch) -> Tensor:
        """The cross-entropy of the joined batch."""
        if joined.group is None:
            return self.cross_entropy(logits, target)
        if self.base is not None or self.is_multilabel:
            values = self._of_samples(logits, target)
            return joined.mean(values.to(accumulation_dtype(values.dtype)))
        return joined.cross_entropy(logits, target, **self._of_classes(target))

    def information(
        self,
        R: Tensor | None,
        x: Tensor,
        given: Tensor | None,
        annotated: Tensor | None,
        look: labels.Look,
        joined: distributed.JoinedBatch,
        features: Mapping[str, Tensor],
    ) -> Information:
        """:func:`sib_ext.information.information` with this loss's options."""
        return information(self, R, x, given, annotated, look.counts, joined, features)

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
        for name in ("weight", "pos_weight"):
            if (value := getattr(self, name)) is not None and len(value) != classes:
                raise ValueError(f"{name} has {len(value)} values for {classes} logits: give one a class")
        self._check_shape(target, batch, classes)
        if self.is_multilabel:
            self._check_labels(target)
        elif not target.is_floating_point() and (self.check_values or target.device.type == "cpu"):
            self._check_indices(target, classes)

    def _check_shape(self, target: Tensor, batch: int, classes: int | None = None) -> None:
        """``classes``: once the logits have told."""
        check_tensor("target", target, "a tensor")
        size = "K" if classes is None else classes
        matrix = target.dim() == 2 and len(target) == batch and classes in (None, target.shape[1])
        if self.is_multilabel:
            if not matrix or target.is_complex():
                raise ValueError(
                    f"target must be labels [{batch},{size}] in [0,1] for task='multilabel', got {describe(target)}"
                )
        elif target.is_floating_point():
            if not matrix:
                raise ValueError(
                    f"target has class probabilities, so it must be [{batch},{size}], got {describe(target)}"
                )
        elif target.dtype != torch.int64 or target.shape != (batch,):
            several = "; of several labels an image give the loss task='multilabel'" if matrix else ""
            raise ValueError(
                f"target must be class indices, int64 [{batch}], or class probabilities [{batch},{size}], "
                f"got {describe(target)}{several}"
            )

    def _check_indices(self, target: Tensor, classes: int) -> None:
        if self.ignore_index is not None:
            target = target[target != self.ignore_index]
            if not len(target):
                return
        least, most = (int(v) for v in target.aminmax())
        if least < 0 or most >= classes:
            raise ValueError(f"target must lie in [0,{classes - 1}] for {classes} logits, got {least} to {most}")

    def _check_labels(self, target: Tensor) -> None:
        """Of several labels an image."""
        if (self.check_values or target.device.type == "cpu") and target.numel() and target.dtype != torch.bool:
            least, most = (float(v) for v in target.detach().aminmax())
            if not (least >= 0 and most <= 1):
                raise ValueError(f"target must lie in [0,1] for task='multilabel', got {least:g} to {most:g}")
