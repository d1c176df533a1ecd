"""Every training loss of the workbench behind one call, so that they can be compared.

``criterion(model, x, y, mask, annotated)`` returns a dict of scalars: ``loss`` to descend, and the named parts of it.
Notation: z = model(x) [B,K]; R = ds/dx [B,C,H,W] the vector-Jacobian product (VJP) of a seed s(z) (sib_ext.seeds); the
foreground M [B,1,H,W] in [0,1]. A sample without an annotation adds nothing to a term that needs one, and every term
is a mean over all B samples, so that an annotated sample weighs the same in every batch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sib_ext import SIBStep, SpatialIBLoss, fused_double_backward
from sib_ext.checks import check_choice
from sib_ext.information import INPUT
from sib_ext.loss import PRESETS, WEIGHTS
from sib_ext.seeds import SEEDS, vjp

from ..networks.feature_maps import token_grid
from .config import TrainConfig

#: Weight of each method's main term where none is given.
STRENGTH = {
    "gradient-penalty": None,
    "rrr": 1.0,
    "energy-loss": 1.0,
    "l1-loss": 1.0,
    "rrr-loss": 1.0,
    "ppce-loss": 1.0,
}
SELF_MADE_AREA = 0.2  #: share of the image that S-IB's self-made mask covers, so centre-mask's without given masks
#: Methods for images of one label alone.
OF_ONE_LABEL = ("gradient-penalty", "centre-mask", "rrr")
#: Loss options that are not SpatialIBLoss's but SIBStep's.
STEP_OPTIONS = ("layers", "engine", "every", "jitter", "microbatch")
TINY = 1e-20  # keeps 0/0 at 0
LEAST_LOG = -100.0  #: torch's binary cross-entropy clamps its logarithms there
LEAST_SHOWN = 1e-12  #: the logarithm has no gradient below: 1e12, its slope here, is the bound of torch's, too


class TrainingLoss(nn.Module, ABC):
    """The interface: a module, because a loss may have a state that belongs into checkpoints.

    Attributes:
        takes_whole_steps: it is given all images of an optimiser step at once, and takes them in parts itself; else
            one batch at a time.
        smoothed: the cross-entropy of every loss, with class weights and label smoothing; for ``task`` "multilabel"
            the binary one of every label, whose positive part has the weights.
    """

    takes_whole_steps = False

    def __init__(self, weight: Tensor | None = None, label_smoothing: float = 0.0, task: str = "multiclass"):
        super().__init__()
        self.task = task
        self.smoothed: nn.Module
        if task == "multilabel":
            self.smoothed = nn.BCEWithLogitsLoss(pos_weight=weight)
        else:
            self.smoothed = nn.CrossEntropyLoss(weight=weight, label_smoothing=label_smoothing)

    @abstractmethod
    def forward(
        self, model: nn.Module, x: Tensor, y: Tensor, mask: Tensor | None = None, annotated: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss and its parts.

        Args:
            model: images -> logits [B,K].
            x: images [B,C,H,W].
            y: class indices [B]; of several labels [B,K] in [0,1].
            mask: foreground [B,1,H,W] in [0,1], of several labels that of each, [B,K,H,W]; None: no sample has one.
            annotated: bool [B], which samples' mask counts, of several labels [B,K]; None: all.

        Returns:
            scalars: ``loss`` (differentiable), ``cross_entropy`` and the method's own parts (detached).
        """

    def advance(self, progress: float) -> None:
        """Called before every step with the share of the training that is done, in [0,1)."""

    def _without_annotation(
        self, model: nn.Module, x: Tensor, y: Tensor, part: str = "background"
    ) -> dict[str, Tensor]:
        cross_entropy = self.smoothed(model(x), y)
        return _result(cross_entropy, cross_entropy=cross_entropy, **{part: torch.zeros_like(cross_entropy)})


def make_criterion(
    config: TrainConfig,
    layer: str | None = None,
    area: float | None = None,
    weight: Tensor | None = None,
    multilabel: bool = False,
) -> TrainingLoss:
    """The loss that a config asks for.

    Args:
        layer: name of the module whose feature map Grad-CAM looks at (LOCALISATIONS only).
        area: mean share of the image that is object, from the training masks (centre-mask only); None: not known.
        weight: of the classes in the cross-entropy, [K]; None: all alike.
        multilabel: an image may have several labels.

    Raises:
        ValueError: a loss option that the method does not have, or one out of range.
    """
    options = dict(config.loss_options)
    for name in ("weight", "label_smoothing"):
        if name in options:
            every = "class_weights" if name == "weight" else name
            raise ValueError(f"{name} is no option of one method: give {every}, which every method takes")
    common: dict[str, Any] = {"weight": weight, "label_smoothing": config.label_smoothing}
    if multilabel:
        _check_multilabel(config)
        common["task"] = "multilabel"
    try:
        if config.method == "ce":
            return CrossEntropy(**common, **options)
        if config.method in ("sib", "sib-paper", "centre-mask"):
            return _spatial_ib(config, common | options, area)
        strength = STRENGTH[config.method] if config.strength is None else config.strength
        if config.method == "gradient-penalty":
            return GradientPenalty(strength, match=config.match, **common, **options)
        if config.method == "rrr":
            return RightForTheRightReasons(strength, **common, **options)
        return LocalisationLoss(config.method, strength, **common, **({"layer": layer} | options))
    except TypeError as error:  # an argument that the loss does not have
        raise ValueError(f"the method {config.method} cannot take the options {options}: {error}") from error


def _check_multilabel(config: TrainConfig) -> None:
    if config.method in OF_ONE_LABEL:
        raise ValueError(f"the method {config.method} knows one label an image alone, and these have several")
    if config.label_smoothing:
        raise ValueError("label_smoothing has no meaning for images of several labels")


def preset_constants(config: TrainConfig) -> dict[str, Any]:
    """The constants behind the name of a method's preset, which another version may have otherwise; empty without."""
    named = {"sib-paper": "paper", "sib": "balanced", "centre-mask": "balanced"}.get(config.method)
    return dict(PRESETS[config.loss_options.get("preset", named)]) if named else {}


def _spatial_ib(config: TrainConfig, options: dict[str, Any], area: float | None) -> TrainingLoss:
    of_step = {name: options.pop(name) for name in STEP_OPTIONS if name in options}
    if config.accumulate > 1:
        of_step.setdefault("microbatch", config.batch_size // config.devices)
    paper = config.method == "sib-paper"
    preset = "paper" if paper else options.pop("preset", "balanced")
    check_choice("preset", preset, tuple(PRESETS))
    if config.strength is not None:
        weights = {name: options.get(name, PRESETS[preset][name]) for name in WEIGHTS}
        options |= {name: config.strength * weight for name, weight in weights.items()}
    if config.method == "centre-mask":
        area = options.pop("centre_area", area)
        return CentreMask(SpatialIBLoss(preset, **options), SELF_MADE_AREA if area is None else area, **of_step)
    if options.get("task") == "multilabel":
        options["pos_weight"] = options.pop("weight")
    given = config.masks == "given" or (config.masks == "auto" and not paper)
    return SpatialIB(SpatialIBLoss(preset, **options), given, **of_step)


# ------------------------------------------------------------------------------------------ the losses


class CrossEntropy(TrainingLoss):
    """-mean_b log p_b,y. No VJP is taken."""

    def forward(self, model, x, y, mask=None, annotated=None):
        loss = self.smoothed(model(x), y)
        return {"loss": loss, "cross_entropy": loss.detach()}


class SpatialIB(TrainingLoss):
    """:class:`sib_ext.SpatialIBLoss`, through :class:`sib_ext.SIBStep`.

    Parts by place, ``input`` or a layer: ``background_<place>``, ``foreground_<place>`` (I values, unweighted) and
    ``empty_<place>``, the share of the batch's maps that are zero everywhere; ``vjp_variance`` where there is a VJP of
    the input.

    Args:
        criterion: with all its constants.
        given: use the given masks where there are any (self-made ones elsewhere); False: self-made ones always.
        layers: names of modules of the network that get terms of their own; ``auto``, as SIBStep has it.
        options: of :class:`sib_ext.SIBStep`: engine, every, jitter, microbatch.
    """

    takes_whole_steps = True

    def __init__(self, criterion: SpatialIBLoss, given: bool = True, layers: Sequence[str] | str = "auto", **options):
        weight = criterion.pos_weight if criterion.is_multilabel else criterion.weight
        super().__init__(weight, criterion.label_smoothing, criterion.task)
        self.criterion, self.given = criterion, given
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self.options = options
        self._step: SIBStep | None = None
        self._restored: dict = {}

    def forward(self, model, x, y, mask=None, annotated=None):
        if not self.given:
            mask = annotated = None
        terms = self._step_of(model).terms(x, y, mask, annotated)
        parts = {"cross_entropy": terms.cross_entropy}
        for name in ("background", "foreground"):
            parts |= {f"{name}_{own_name(model, place)}": value for place, value in getattr(terms, name).items()}
        parts |= {f"empty_{own_name(model, place)}": count / len(x) for place, count in terms.empty.items()}
        if terms.vjp is not None:
            parts["vjp_variance"] = vjp_variance(terms.vjp)
        return _result(terms.loss, **parts)

    def _step_of(self, model: nn.Module) -> SIBStep:
        """Made with the first batch: the model is not there before."""
        if self._step is None or self._step.model is not model:
            auto = self.layers == ("auto",)
            names = "auto" if auto else [wrapped_name(model, layer) for layer in self.layers]
            self._step = SIBStep(model, self.criterion, names, **self.options)
            if self._restored:
                self._step.load_state_dict(self._restored)
        return self._step

    @property
    def lacks_feature_map(self) -> bool:
        """After a step: whether there are terms for feature maps, but the network has none."""
        return self.criterion.has_feature_terms and self._step is not None and not self._step.layers

    def get_extra_state(self) -> dict:
        return self._restored if self._step is None else self._step.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self._step, self._restored = None, state


class CentreMask(SpatialIB):
    """Control: S-IB whose mask is the same rectangle in the middle of every image, with ``area`` of its pixels.

    What it achieves, the mere prior that objects stand in the middle achieves.
    """

    def __init__(self, criterion: SpatialIBLoss, area: float, **of_step):
        super().__init__(criterion, **of_step)
        if not 0 < area < 1:
            raise ValueError(f"the centre mask's area must lie in (0, 1), got {area}")
        self.area = area

    def forward(self, model, x, y, mask=None, annotated=None):
        height, width = x.shape[2:]
        centre = centre_mask(height, width, self.area).to(x.device).expand(len(x), 1, height, width)
        return super().forward(model, x, y, centre)


class GradientPenalty(TrainingLoss):
    """Control: CE + strength * mean_b |R_b|^2, without any mask (double backpropagation, Drucker & LeCun 1992).

    |R_b|^2 is the sum over C,H,W: C*H*W times the library's ``energy`` with an empty foreground.

    With ``match`` the term is strength * huber(log(v / target)) instead, v = mean_b Var(R_b), huber(t) = t^2/2 up to 1
    and |t| - 1/2 beyond: v follows the target from either side (a scale-free loss may well strengthen R). So R
    becomes as strong as the other loss makes it, but wherever it likes. The targets are the values of ``match``, evenly
    over training (``vjp_variance`` of every epoch in the metrics.csv of the run to be matched).

    Part ``penalty``: the term, unweighted.

    Args:
        strength: >= 0; None: 0.1, and with ``match`` 3, at which v kept within 3 % of the target on digits,
            the first two of six epochs left out.
        seed: of R; by default the balanced preset's, as that of the run to be matched must be the same.
        match: VJP variances > 0.
    """

    def __init__(
        self,
        strength: float | None = None,
        seed: str = PRESETS["balanced"]["seed"],
        match: Sequence[float] = (),
        **of_cross_entropy,
    ):
        super().__init__(**of_cross_entropy)
        if seed not in SEEDS:
            raise ValueError(f"seed must be one of {', '.join(SEEDS)}, got {seed!r}")
        if not all(value > 0 and math.isfinite(value) for value in match):
            raise ValueError(f"match must have finite VJP variances above 0, got {', '.join(map(str, match))}")
        self.strength = strength if strength is not None else 3.0 if match else 0.1
        self.seed, self.match, self.progress = seed, tuple(match), 0.0

    def advance(self, progress):
        self.progress = progress

    def forward(self, model, x, y, mask=None, annotated=None):
        x = _watched(x)
        with fused_double_backward():
            logits = model(x)
        R = vjp(logits, x, y, self.seed)
        cross_entropy = self.smoothed(logits, y)
        penalty = self._mismatch(R) if self.match else _energy(R).mean()
        parts = {"cross_entropy": cross_entropy, "penalty": penalty, "vjp_variance": vjp_variance(R)}
        return _result(cross_entropy + self.strength * penalty, **parts)

    def _mismatch(self, R: Tensor) -> Tensor:
        variance = _wide(R).flatten(1).var(1).mean()
        deviation = torch.log((variance + TINY) / interpolated(self.match, self.progress))
        return F.smooth_l1_loss(deviation, torch.zeros_like(deviation))


class RightForTheRightReasons(TrainingLoss):
    """CE + strength * mean_b |(1 - M_b) R_b|^2, R the VJP of the label's log-probability.

    Annotated samples only. After Ross, Hughes & Doshi-Velez 2017, whose VJP is that of the sum over all classes'
    log-probabilities; the label's is what explanations of the label show. Part ``background``: the squared norm,
    unweighted.
    """

    def __init__(self, strength: float, **of_cross_entropy):
        super().__init__(**of_cross_entropy)
        self.strength = strength

    def forward(self, model, x, y, mask=None, annotated=None):
        if mask is None:
            return self._without_annotation(model, x, y)
        x = _watched(x)
        with fused_double_backward():
            logits = model(x)
        cross_entropy = self.smoothed(logits, y)
        R = vjp(logits, x, y, "target_log_prob")
        background = _annotated_mean(_energy((1 - mask.to(_wide(R).dtype)) * _wide(R)), annotated)
        return _result(cross_entropy + self.strength * background, cross_entropy=cross_entropy, background=background)


class LocalisationLoss(TrainingLoss):
    """CE + strength * mean_b of what parts the label's explanation from the given mask, by ``kind``:

    - ``energy-loss``: 1 - EPG_b, the share of the explanation outside the mask, in [0,1]; part ``background``.
    - ``l1-loss``: mean over pixels of |E - M|, in [0,1]; part ``distance``. After GRADIA (Gao et al. 2022).
    - ``rrr-loss``: mean over all pixels of ((1 - M) E)^2, in [0,1]; part ``background``. Ross et al. 2017 on normalised
      explanations, RRR* there. The published loss is the sum over pixels, H*W times ours; with the mean a strength says
      the same at every size. Not method ``rrr``: that one takes the VJP of the log-probability, unnormalised.
    - ``ppce-loss``: -sum M log E / sum M, in [0,100]; part ``foreground_cross_entropy``. After HAICS (Shen et al.
      2021). It looks inside the mask alone; an image with an empty mask has no term.

    The four that Rao et al. 2023 (Studying How to Efficiently and Effectively Guide Models with Explanations) compare,
    with this workbench's explanations: ``gradcam``: relu(sum_k alpha_k A_k), alpha_k the mean over the plane of
    dz_y/dA_k; ``input_x_gradient``: sum_c |x * dz_y/dx| (there with its sign). E is the explanation divided by its
    maximum, which has a gradient, too, then upsampled bilinearly, as theirs. Annotated samples only, and of them only
    those whose explanation is not 0 everywhere. Of several labels y is one with an annotation, drawn for each image
    anew every step, and the term is divided by K, as those of :class:`sib_ext.SpatialIBLoss`. The part is unweighted.

    Args:
        kind: a key of LOCALISATIONS.
        strength: >= 0.
        attribution: ``gradcam`` or ``input_x_gradient``.
        layer: name of the module whose output is A, for ``gradcam``.
    """

    ATTRIBUTIONS = ("gradcam", "input_x_gradient")

    def __init__(
        self, kind: str, strength: float, attribution: str = "gradcam", layer: str | None = None, **of_cross_entropy
    ):
        super().__init__(**of_cross_entropy)
        if kind not in LOCALISATIONS:
            raise ValueError(f"kind must be one of {', '.join(LOCALISATIONS)}, got {kind!r}")
        if attribution not in self.ATTRIBUTIONS:
            raise ValueError(f"attribution must be one of {', '.join(self.ATTRIBUTIONS)}, got {attribution!r}")
        if attribution == "gradcam" and layer is None:
            raise ValueError("attribution='gradcam' needs the name of a layer: give layer=..., or 'input_x_gradient'")
        self.kind, self.strength, self.attribution, self.layer = kind, strength, attribution, layer

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.attribution}"

    def forward(self, model, x, y, mask=None, annotated=None):
        part, per_sample, normalises = LOCALISATIONS[self.kind]
        if mask is None:
            return self._without_annotation(model, x, y, part)
        label = y
        if self.task == "multilabel":
            label, mask, annotated = drawn_label(y, mask, annotated)
        logits, maps = (self._gradcam if self.attribution == "gradcam" else self._input_x_gradient)(model, x, label)
        cross_entropy = self.smoothed(logits, y)
        shows = maps.flatten(1).amax(1) > least(maps)
        if normalises:
            maps = normalised(maps)
        if maps.shape[2:] != mask.shape[2:]:
            maps = F.interpolate(maps, size=mask.shape[2:], mode="bilinear", align_corners=False)
        term = _annotated_mean(torch.where(shows, per_sample(maps, mask.to(maps.dtype)), 0), annotated)
        strength = self.strength / y.shape[1] if self.task == "multilabel" else self.strength
        return _result(cross_entropy + strength * term, cross_entropy=cross_entropy, **{part: term})

    def _gradcam(self, model, x, y):
        with captured(model, self.layer) as outputs:
            logits = model(x)
        (features,) = outputs
        (gradient,) = torch.autograd.grad(_label_logits(logits, y), features, create_graph=True)
        A, R = (feature_map(_wide(t)) for t in (features, gradient))
        return logits, F.relu((R.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True))

    def _input_x_gradient(self, model, x, y):
        x = _watched(x)
        with fused_double_backward():
            logits = model(x)
        return logits, (_wide(x) * _wide(vjp(logits, x, y, "target_logit"))).abs().sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------------- pieces


def centre_mask(height: int, width: int, area: float) -> Tensor:
    """[height,width] in [0,1]: a rectangle of the image's shape in its middle, with a mean of exactly ``area``.

    Pixels on its edge count by the share of them that lies inside.
    """

    def inside(side: int) -> Tensor:
        half = math.sqrt(area) * side / 2
        left = torch.arange(side, dtype=torch.float64) - side / 2
        return (left + 1).clamp(max=half) - left.clamp(min=-half)

    return (inside(height).clamp(min=0)[:, None] * inside(width).clamp(min=0)).float()


def drawn_label(y: Tensor, mask: Tensor, annotated: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One annotated label of each image, drawn: class indices [B], its mask [B,1,H,W], and whether there is one [B].

    Args:
        y: labels [B,K] in [0,1]; those from one half on are there.
        mask: [B,K,H,W].
        annotated: bool [B,K]; None: all.
    """
    known = y >= 0.5 if annotated is None else (y >= 0.5) & annotated
    keys = torch.rand(y.shape, device=y.device).masked_fill(~known, -1)
    label = keys.argmax(1)
    return label, mask[torch.arange(len(y), device=y.device), label][:, None], known.any(1)


def background_share(maps: Tensor, mask: Tensor) -> Tensor:
    """sum(map * (1 - M)) / sum(map) of maps [B,1,H,W] >= 0, per sample [B]; 0, without gradient, for a map of zeros."""
    total = maps.flatten(1).sum(1)
    outside = (maps * (1 - mask)).flatten(1).sum(1)
    there = total > least(maps)
    return torch.where(there, outside / torch.where(there, total, 1), 0)


def least(maps: Tensor) -> float:
    """Maps that are nowhere above it count as zeros: one over its square is still a number, as gradients need."""
    return torch.finfo(maps.dtype).tiny ** 0.5


def normalised(maps: Tensor) -> Tensor:
    """Maps [B,1,H,W] >= 0, each divided by its maximum, which is not detached: in [0,1]; zeros stay zeros."""
    peak = maps.amax((1, 2, 3), keepdim=True)
    return maps / torch.where(peak > least(maps), peak, 1)


def mask_distance(maps: Tensor, mask: Tensor) -> Tensor:
    """mean_p |E - M| of maps E [B,1,H,W] in [0,1], per sample [B]."""
    return (maps - mask).abs().flatten(1).mean(1)


def background_square(maps: Tensor, mask: Tensor) -> Tensor:
    """mean_p ((1 - M) E)^2 over all pixels of maps E [B,1,H,W] in [0,1], per sample [B]."""
    return ((1 - mask) * maps).square().flatten(1).mean(1)


def foreground_cross_entropy(maps: Tensor, mask: Tensor) -> Tensor:
    """-sum_p M log E / sum_p M of maps E [B,1,H,W] in [0,1], per sample [B]; 0 for an empty mask.

    log E is -100 at least, and has no gradient where E <= 1e-12.
    """
    shown = maps > LEAST_SHOWN
    unshown = maps.detach().log().clamp(min=LEAST_LOG)
    log = torch.where(shown, torch.where(shown, maps, 1).log(), unshown)
    area = mask.flatten(1).sum(1)
    lack = -(mask * log).flatten(1).sum(1)
    return torch.where(area > 0, lack / torch.where(area > 0, area, 1), 0)


class Localisation(NamedTuple):
    """How a kind of :class:`LocalisationLoss` compares explanations with masks."""

    part: str  #: the term's name in logs
    per_sample: Callable[[Tensor, Tensor], Tensor]  #: maps, masks, both [B,1,H,W] -> [B]
    normalises: bool = True  #: maps come with a maximum of 1 (before they are upsampled)


#: Training methods that pull the label's explanation towards the given mask.
LOCALISATIONS = {
    "energy-loss": Localisation("background", background_share, normalises=False),
    "l1-loss": Localisation("distance", mask_distance),
    "rrr-loss": Localisation("background", background_square),
    "ppce-loss": Localisation("foreground_cross_entropy", foreground_cross_entropy),
}


def vjp_variance(R: Tensor) -> Tensor:
    """mean_b Var_{c,h,w}(R_b), unbiased, detached: how strong the VJP is, the same for every method."""
    return _wide(R.detach()).flatten(1).var(1).mean()


def interpolated(values: Sequence[float], progress: float) -> float:
    """The value at ``progress`` in [0,1) of a curve whose i-th of n values is the mean over [i/n, (i+1)/n)."""
    place = min(max(progress * len(values) - 0.5, 0), len(values) - 1)
    left = min(int(place), len(values) - 2) if len(values) > 1 else 0
    right = min(left + 1, len(values) - 1)
    return values[left] + (place - left) * (values[right] - values[left])


@contextmanager
def captured(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """Collects the outputs of a module of the network while it runs; the hook is removed whatever happens.

    Raises:
        ValueError: the network has no module of that name.
    """
    outputs: list[Tensor] = []
    module = submodule(unwrapped(model), layer)
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def submodule(network: nn.Module, layer: str) -> nn.Module:
    """A module of the network by name.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        return network.get_submodule(layer)
    except AttributeError as error:
        raise ValueError(f"the network {type(network).__name__} has no layer {layer!r}") from error


def own_name(model: nn.Module, place: str) -> str:
    """What a place (a module, or a function in its forward) of the wrapped model is called in the network."""
    return _renamed(place, model, unwrapped(model))


def wrapped_name(model: nn.Module, place: str) -> str:
    """The inverse of :func:`own_name`."""
    return _renamed(place, unwrapped(model), model)


def _renamed(place: str, source: nn.Module, target: nn.Module) -> str:
    if place == INPUT:
        return place
    name, _, function = place.rpartition(".") if place.endswith("()") else (place, "", "")
    module = submodule(source, name)
    found = next(name for name, other in target.named_modules() if other is module)
    return ".".join(filter(None, (found, function)))


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of distributed training and mixed precision."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, Forward)):
        model = model.module
    return model


class Forward(nn.Module):
    """A network under a precision: the forward pass runs in it, the logits come out in float32.

    Args:
        module: the network, perhaps wrapped for distributed training.
        precision: makes a context, e.g. ``fabric.autocast``.
    """

    def __init__(self, module: nn.Module, precision):
        super().__init__()
        self.module, self.precision = module, precision

    def forward(self, x: Tensor) -> Tensor:
        with self.precision():
            logits = self.module(x)
        return _wide(logits)


def feature_map(values: Tensor) -> Tensor:
    """[B,C,h,w] as it is; the tokens [B,N,C] of a vision transformer as the grid that they stand for."""
    return values if values.dim() == 4 else token_grid(values)


def _result(loss: Tensor, **parts: Tensor | None) -> dict[str, Tensor]:
    return {"loss": loss} | {name: value.detach() for name, value in parts.items() if value is not None}


def _watched(x: Tensor) -> Tensor:
    """x as a leaf that gradients can be taken to."""
    return x.detach().requires_grad_()


def _wide(values: Tensor) -> Tensor:
    """At least float32: statistics of half-precision tensors are taken wider."""
    return values.float() if values.dtype in (torch.half, torch.bfloat16) else values


def _energy(R: Tensor) -> Tensor:
    """|R_b|^2 per sample [B]."""
    return _wide(R).square().flatten(1).sum(1)


def _label_logits(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).sum()


def _annotated_mean(values: Tensor, annotated: Tensor | None) -> Tensor:
    """Mean over all samples of values [B] that count only where annotated."""
    return values.mean() if annotated is None else torch.where(annotated, values, 0).mean()
