"""The S-IB terms of a batch, as a function of its VJPs: what :class:`sib_ext.SpatialIBLoss` adds to cross-entropy."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import estimators, masks
from .distributed import JoinedBatch
from .ops import masked_statistics
from .ops.dispatch import without_autocast
from .reference import accumulation_dtype

if TYPE_CHECKING:
    from .loss import SpatialIBLoss

# How an information value enters the loss: background as f(v), foreground as f(-v).
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda value: value,
    "exp": torch.exp,
    "expm1": torch.expm1,
}

INPUT = "input"  #: the place of the input's VJP; the others have the names of feature maps


class Information(NamedTuple):
    """The terms of one batch; by place: ``"input"`` and the names of the feature maps."""

    input: Tensor | None  #: the weighted terms of the input's VJP, summed; None where it has none
    features: Tensor | None  #: those of the feature maps
    background: Mapping[str, Tensor]  #: place -> I_background, scalar
    foreground: Mapping[str, Tensor]  #: place -> I_foreground, scalar
    empty: Mapping[str, Tensor]  #: place -> how many of this process's samples have a map that is zero everywhere
    mask: Tensor  #: M [B,1,H,W]
    vjp: Tensor | None  #: R [B,C,H,W]


def information(
    loss: "SpatialIBLoss",
    R: Tensor | None,
    x: Tensor,
    given: Tensor | None,
    annotated: Tensor | None,
    counts: Tensor | None,
    joined: JoinedBatch,
    features: Mapping[str, Tensor],
) -> Information:
    """Everything but cross-entropy.

    Args:
        loss: for its options.
        R: the VJP of x [B,C,H,W]; None: the input has no terms.
        given, annotated: as :func:`sib_ext.masks.given_mask` returns them.
        counts: bool [B]: which samples have terms; None: all.
        features: name -> class activation [B,1,h,w] of a feature map (:func:`sib_ext.functional.class_activation`),
            at least one where R is None; its terms are those in the mask brought to its size.

    Raises:
        ValueError: a feature map of the input's name, whose terms could not be told apart.
    """
    if INPUT in features:
        raise ValueError(
            f"a feature map is named {INPUT!r}, as the terms of the input are: give it another name in features=; for "
            "SIBStep name another place, layers=[...], or wrap the model, nn.Sequential(model), which renames places"
        )
    with without_autocast(x.device.type):
        M = _mask(loss, R, x, features, given, annotated)
        weights = _sample_weights(loss, x, given, annotated, counts, joined)
        places = {}
        if R is not None:
            of_both = loss.input_background, loss.input_foreground
            places[INPUT] = _at(loss, R, x, M, weights, counts, joined, *of_both, loss.foreground)
        for name, field in features.items():
            height, width = field.shape[2:]
            mask = F.adaptive_avg_pool2d(M, (height, width))
            of_both = loss.feature_background, loss.feature_foreground
            places[name] = _at(loss, field, field.detach(), mask, weights, counts, joined, *of_both, "log_capacity")
    of_features = [place.loss for name, place in places.items() if name != INPUT]
    return Information(
        places[INPUT].loss if INPUT in places else None,
        sum(of_features[1:], start=of_features[0]) if of_features else None,
        {name: place.background for name, place in places.items() if place.background is not None},
        {name: place.foreground for name, place in places.items() if place.foreground is not None},
        {name: place.empty for name, place in places.items()},
        M,
        R,
    )


class _Place(NamedTuple):
    background: Tensor | None
    foreground: Tensor | None
    empty: Tensor
    loss: Tensor


def _at(
    loss: "SpatialIBLoss",
    field: Tensor,
    x: Tensor,
    mask: Tensor,
    weights: Tensor,
    counts: Tensor | None,
    joined: JoinedBatch,
    of_background: float,
    of_foreground: float,
    estimator: str,
) -> _Place:
    """The terms of one field [B,C,h,w] in a mask [B,1,h,w], with their weights; ``estimator`` of the foreground."""
    grams = of_foreground > 0 and estimator in estimators.OF_GRAMS
    local = grams and joined.group is None
    # Only some foregrounds look at x; else the field stands in, which is being read anyway.
    other = x if of_foreground > 0 and estimator in estimators.OF_INPUT else field.detach()
    moments, gram_vjp, gram_input = masked_statistics(field, other, mask, local, local, impl=loss.impl)
    background = foreground = None
    parts = []
    f = TRANSFORMS[loss.transform]
    if of_background > 0:
        values = _background(loss, field, moments, counts, joined)
        background = joined.sum((weights * values).sum())
        parts.append(of_background * f(background))
    if of_foreground > 0:
        if grams:
            both = (gram_vjp, gram_input) if local else joined.grams(field, x, mask, moments)
            foreground = estimators.FOREGROUND[estimator](*both)
        else:
            values = _foreground(loss, estimator, field, mask, moments, counts, joined)
            foreground = joined.sum((weights * values).sum())
        parts.append(of_foreground * f(-foreground))
    empty = moments[:, 7:9].detach().sum(1) == 0  # of |field|
    empty = (empty if counts is None else empty & counts).sum()
    return _Place(background, foreground, empty, sum(parts[1:], start=parts[0]))


def _background(
    loss: "SpatialIBLoss", field: Tensor, moments: Tensor, counts: Tensor | None, joined: JoinedBatch
) -> Tensor:
    """[B]"""
    noise = {}
    if loss.background == "gaussian":
        mean = joined.mean(estimators.variances(field.detach()), counts)
        noise["noise"] = estimators.relative_noise(field, loss.kappa, mean)
    return estimators.BACKGROUND[loss.background](moments, field[0].numel(), **noise)


def _foreground(
    loss: "SpatialIBLoss",
    estimator: str,
    field: Tensor,
    mask: Tensor,
    moments: Tensor,
    counts: Tensor | None,
    joined: JoinedBatch,
) -> Tensor:
    """[B]"""
    of = estimators.FOREGROUND[estimator]
    if estimator in estimators.OF_INPUT:
        return of(moments, field[0].numel())
    strength = estimators.magnitude(field)
    return of(strength, mask, joined.mean(strength, counts), loss.kappa)


def _sample_weights(
    loss: "SpatialIBLoss",
    x: Tensor,
    given: Tensor | None,
    annotated: Tensor | None,
    counted: Tensor | None,
    joined: JoinedBatch,
) -> Tensor:
    """[B], with a sum of 1 over the joined batch: samples without an annotation share self_made_share of it; those that
    are not counted have 0, and where none is, all."""
    dtype = accumulation_dtype(x.dtype)
    known = x.new_full((len(x),), float(given is not None), dtype=dtype)
    if annotated is not None:
        known = known * annotated.to(dtype)
    others = 1 - known
    if counted is not None:
        known, others = known * counted.to(dtype), others * counted.to(dtype)
    counts = joined.sum(torch.stack([known.sum(), others.sum()]))
    of_known, of_others = (counts > 0).to(dtype).unbind()
    of_known, of_others = (1 - loss.self_made_share) * of_known, loss.self_made_share * of_others
    # Of one kind alone: all of it, unless samples without an annotation are to have none.
    total = of_known + of_others if loss.self_made_share > 0 else torch.ones_like(of_known)
    total = torch.where(total > 0, total, 1)
    each = torch.stack([of_known, of_others]) / (total * counts.clamp_min(1))
    return known * each[0] + others * each[1]


def _mask(
    loss: "SpatialIBLoss",
    R: Tensor | None,
    x: Tensor,
    features: Mapping[str, Tensor],
    given: Tensor | None,
    annotated: Tensor | None,
) -> Tensor:
    if given is not None and annotated is None:
        return given
    options = {
        "density": ("window", "temperature", "slope", "eps", "padding", "area", "impl"),
        "hard_density": ("window", "slope", "eps", "padding", "area"),
        "mean_sigmoid": ("slope",),
        "top_p": ("area", "slope"),
    }[loss.mask]
    if loss.mask_source == "vjp":
        source = R
    else:
        field = list(features.values())[-1] if features else estimators.magnitude(R)
        source = masks.activation_source(field, x.shape[2:])
    if loss.detach_mask:
        source = source.detach()
    made = masks.MASKS[loss.mask](source, **{name: getattr(loss, name) for name in options})
    return made if given is None else torch.where(annotated[:, None, None, None], given, made)
