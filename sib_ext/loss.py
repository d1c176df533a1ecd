"""SpatialIBLoss: cross-entropy plus the two spatial information terms, as a drop-in for nn.CrossEntropyLoss."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from . import class_masks, distributed, estimators, labels, masks, seeds
from .checks import check_choice, check_finite, check_positive, check_share, check_tensor, check_window, describe
from .classification import Classification
from .guard import CollapseGuard
from .information import TRANSFORMS, Information, information
from .layers import class_activation_of
from .ops.density_mask import PADDINGS

PRESETS: dict[str, dict[str, Any]] = {
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


WEIGHTS = ("input_background", "input_foreground", "feature_background", "feature_foreground")


class SIBTerms(NamedTuple):
    """What :meth:`SpatialIBLoss.terms` returns; ``loss`` is differentiable, the rest is for logging and pictures.

    Terms are named by place: ``"input"``, the input's VJP, and the feature maps by their names; those that a step does
    not have are not there.
    """

    #: scalar: cross_entropy + the sum over places of weight * f(background) + weight * f(-foreground), of K labels / K
    loss: Tensor
    cross_entropy: Tensor  #: scalar; of several labels the binary one; or what ``base`` gives
    background: Mapping[str, Tensor] = MappingProxyType({})  #: place -> I_background, scalar
    foreground: Mapping[str, Tensor] = MappingProxyType({})  #: place -> I_foreground, scalar
    #: place -> how many samples of this process's batch have a map that is zero everywhere: |R|, or a class activation
    empty: Mapping[str, Tensor] = MappingProxyType({})
    mask: Tensor | None = None  #: M [B,1,H,W]
    vjp: Tensor | None = None  #: R [B,C,H,W]


class SpatialIBLoss(Classification):
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
            looks at one label of each image, drawn anew, and at its mask (``sib_ext/labels.py``), images without
            a label have no terms, and all terms are divided by K, as the loss of one label is in the mean over K. It
            takes the seeds ``"target_logit"`` and ``"random_logit"``.
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
        super().__init__(task, base, weight, pos_weight, label_smoothing, ignore_index, check_values)
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
        self.impl = impl
        self.process_group, self.projection = process_group, projection
        self.guard = CollapseGuard()
        self._check_options(area)
        self._check_labels_needed()
        distributed.check_process_group(process_group, projection)

    def _check_labels_needed(self) -> None:
        """Before every step again: the weights may change in a training."""
        if self.is_multilabel and self.seed not in labels.MULTILABEL_SEEDS:
            raise ValueError(
                f"seed={self.seed!r} has no meaning for task='multilabel', whose images look at one label each: take "
                "seed='random_logit' or 'target_logit'"
            )
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

    def forward(  # type: ignore[override]  # a loss of the images, too
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
        """The parts of a training step's loss; ``every`` multiplies the terms of the input.

        Of K labels an image the terms look at one, and have that label's share in the mean over labels: 1/K.
        """
        if self.training:
            if self.is_multilabel:
                self.guard.count(target)
            self.guard.watch(cross_entropy, found, lambda: self.guessing(self.guard.frequency))
        loss = cross_entropy
        share = 1 / target.shape[1] if self.is_multilabel else 1
        if found.input is not None:
            loss = loss.to(found.input.dtype) + every * share * found.input
        if found.features is not None:
            loss = loss.to(found.features.dtype) + share * found.features
        return SIBTerms(loss, cross_entropy, *found[2:])

    @property
    def scalar_seed(self) -> str:
        """The seed as engines take it, of :attr:`sib_ext.labels.Look.target`: what is drawn is drawn already."""
        return "target_logit" if self.is_multilabel else self.seed

    def look(self, target: Tensor, x: Tensor) -> labels.Look:
        """What the terms of a step look at in each image; drawn anew every call where an image has several labels."""
        self.check_shape(target, len(x))
        if self.is_multilabel:
            self.check_labels(target)
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
        self._check_labels_needed()
        joined = distributed.JoinedBatch(x, self.process_group, self.projection)
        if self.input_foreground > 0:
            estimators.check_batch(self.foreground, joined.size)
        return joined

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
        self.check_target(target, logits)
        if self.check_values:
            check_finite("x", x)
            check_finite("logits", logits)
