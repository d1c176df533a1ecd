"""How often a network is right, how much of an explanation lies on the object, and whether the network needs it.

Every measure of maps gives one value an image. A map that is zero everywhere finds nothing and counts as 0;
:func:`empty_maps` says which these are. NaN is for what is undefined: the object is empty, or the map holds a value
that is not finite. Averages belong to :mod:`sib_lab.explaining.statistics`, which counts NaN.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OBJECT = 0.5  #: a pixel belongs to the object where the mask is above this
BATCH_CPU, BATCH_GPU = 32, 64  #: images in a forward pass at most
PIXELS_CPU = 300_000  #: of them together, on a CPU: memory for larger feature maps comes fresh from the system
CHUNK = 256  #: maps measured at a time, which bounds the memory
IOU_THRESHOLDS = tuple(round(0.15 + 0.05 * step, 2) for step in range(17))  #: 0.15, 0.20, ..., 0.95
EHR_QUANTILES = tuple(step / 10 for step in range(11))  #: 0, 0.1, ..., 1
STEPS = 32  #: of deletion and insertion
BLUR = 1 / 8  #: standard deviation of the blur that insertion starts from, as a share of the image's shorter side

#: What :func:`measure_maps` gives: key -> name for people.
MEASURES = {
    "epg": "EPG",
    "pointing_game": "Pointing game",
    "iou": "IoU",
    "iou_threshold": "IoU's threshold",
    "ehr": "EHR",
    "empty": "Empty maps",
}


# --------------------------------------------------------------------------------------------- predictions


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the whole model is in eval mode; after it every module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module, otherwise: torch.device) -> torch.device:
    """Where the model's first parameter or buffer lies; ``otherwise`` for a model without any."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return otherwise


def batch_for(model: nn.Module, images: Tensor, batch: int | None) -> int:
    """``batch``; where it is None, 64 images on a GPU, on a CPU 32, or fewer of large ones.

    Raises:
        ValueError: ``batch`` is under 1.
    """
    if batch is None:
        if device_of(model, images.device).type != "cpu":
            return BATCH_GPU
        return max(1, min(BATCH_CPU, PIXELS_CPU // max(1, math.prod(images.shape[2:]))))
    if batch < 1:
        raise ValueError(f"batch must be at least 1: got {batch}")
    return batch


def for_model(model: nn.Module, images: Tensor) -> Tensor:
    """Images on the model's device; on a CPU in channels-last order, in which convolutions are faster there."""
    images = images.to(device_of(model, images.device))
    return images.contiguous(
        memory_format=torch.channels_last if images.device.type == "cpu" else torch.contiguous_format
    )


def scores_of(model: nn.Module, images: Tensor) -> Tensor:
    """Scores [N,classes] of images [N,C,H,W] on any device, in the order of memory that suits it and the model."""
    images = for_model(model, images)
    try:
        return model(images)
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        return model(images.contiguous())  # a model that reshapes with .view is bound to this order


def predict(model: nn.Module, data: Tensor | Iterable, batch: int | None = None) -> Tensor:
    """Predicted classes [N], by the model in eval mode (its own mode is restored).

    Args:
        data: images [N,3,H,W], or batches (images, labels, ...) such as a DataLoader of ``Item`` gives.
        batch: images in a forward pass where ``data`` is a tensor; None: as :func:`batch_for`.

    Returns:
        On the images' device for a tensor, on the CPU for batches.
    """
    with in_eval_mode(model), torch.no_grad():
        if isinstance(data, Tensor):
            return _joined(
                [scores_of(model, x).argmax(1).to(data.device) for x in data.split(batch_for(model, data, batch))]
            )
        return _joined([scores_of(model, x).argmax(1).cpu() for x, *_ in data])


def scores(model: nn.Module, batches: Iterable) -> Tensor:
    """Logits [N,K] on the CPU, by the model in eval mode, of batches (images, ...)."""
    with in_eval_mode(model), torch.no_grad():
        return torch.cat([scores_of(model, x).cpu() for x, *_ in batches])


def correct(
    model: nn.Module, data: Tensor | Iterable, labels: Tensor | None = None, batch: int | None = None
) -> Tensor:
    """1.0 where the prediction is right, else 0.0; [N].

    Args:
        data: images [N,3,H,W] with ``labels`` [N], or batches (images, labels, ...) such as a DataLoader of ``Item``
            gives.

    Raises:
        ValueError: images without labels, or batches with.
    """
    if isinstance(data, Tensor) != (labels is not None):
        raise ValueError("labels: give them with a tensor of images, and leave them out with batches (images, labels)")
    if isinstance(data, Tensor):
        return (predict(model, data, batch) == labels.to(data.device)).float()
    # One pass over the batches: they may be read from a disk, or be shuffled anew each time.
    parts = [(predict(model, x, len(x)) == y.to(x.device)).float().cpu() for x, y, *_ in data]
    return _joined(parts).float()


def accuracy(
    model: nn.Module, data: Tensor | Iterable, labels: Tensor | None = None, batch: int | None = None
) -> float:
    """Share of right predictions in [0,1], NaN for no images; arguments as for :func:`correct`."""
    return correct(model, data, labels, batch).mean().item()


def worst_group(correct: Tensor, labels: Tensor, groups: Tensor) -> float:
    """Accuracy of the worst group, a group being the images of one label on one background (Sagawa et al. 2020).

    Args:
        correct: 1.0 where the prediction is right, else 0.0; [N].
        labels: [N] int.
        groups: background classes [N] int; images with -1 have none and are left out.

    Returns:
        The lowest accuracy over the groups that have images; NaN where no image has a background class.
    """
    if not len(correct) == len(labels) == len(groups):
        raise ValueError(
            f"correct, labels and groups must speak of the same images: got {len(correct)}, {len(labels)} and "
            f"{len(groups)} values"
        )
    known = groups.cpu() >= 0
    right = correct.cpu().double()[known]
    if not len(right):
        return math.nan
    pairs, group = torch.stack([labels.cpu()[known], groups.cpu()[known]], 1).unique(dim=0, return_inverse=True)
    hits = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, group, right)
    return (hits / group.bincount(minlength=len(pairs))).min().item()


def average_precision(logits: Tensor, labels: Tensor) -> Tensor:
    """Area under the precision over recall of each class, [K] float64; NaN for a class that is in no image. Their mean
    over the others is the mean average precision.

    Args:
        logits: [N,K].
        labels: [N,K] int: 1 present, 0 absent, -1 counts neither way.
    """

    def of_class(scores: Tensor, truth: Tensor) -> Tensor:
        from torchmetrics.functional.classification import binary_average_precision

        ranks = scores.unique(return_inverse=True)[1].double()  # of large logits a sigmoid would make equal ones
        return binary_average_precision(ranks / len(ranks), truth)

    return _of_each_class(of_class, logits, labels)


def f1_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Harmonic mean of precision and recall of each class where what has a probability of at least one half is told,
    [K] float64; NaN for a class that is in no image. Arguments as for :func:`average_precision`."""

    def of_class(scores: Tensor, truth: Tensor) -> Tensor:
        from torchmetrics.functional.classification import binary_f1_score

        return binary_f1_score((scores >= 0).long(), truth)

    return _of_each_class(of_class, logits, labels)


def _of_each_class(of_class: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    logits, labels = logits.cpu(), labels.cpu()
    found = torch.full(labels.shape[1:], math.nan, dtype=torch.float64)
    for label in (labels == 1).any(0).nonzero()[:, 0].tolist():
        known = labels[:, label] >= 0
        found[label] = of_class(logits[known, label], labels[known, label])
    return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) else torch.empty(0, dtype=torch.long)


# -------------------------------------------------------------------------------------- maps on the object


def object_pixels(masks: Tensor) -> Tensor:
    """Soft masks [N,1,H,W] -> the object's pixels, boolean [N,H,W]."""
    return masks[:, 0] > OBJECT


def object_share(masks: Tensor) -> Tensor:
    """Share of the image that is object, [N]: the EPG of a map that is the same everywhere, so EPG's chance level."""
    return object_pixels(masks).double().mean((1, 2))


def energy_pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """EPG of each image, [N] in [0,1]: share of the map's sum that lies on the object (Wang et al. 2020, Score-CAM).

    Args:
        maps: explanations [N,H,W], >= 0, of any floating type.
        masks: soft object masks [N,1,H,W] in [0,1]; the object is where they are above 0.5.

    Returns:
        float64; 0 where the map is zero everywhere; NaN where the object is empty or the map is not finite.

    Raises:
        ValueError: negative values in a map, or shapes that do not fit.
    """
    return _per_image(_energy_share, maps, masks)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """1.0 where the map's maximum lies on the object, else 0.0 (Zhang et al. 2018).

    Of several equal maxima the share on the object counts: the expected hit of one that is drawn.

    A map that is zero everywhere has no maximum and counts as 0.0. Arguments, NaN and errors as for
    :func:`energy_pointing_game`.
    """
    return _per_image(_maximum_on_object, maps, masks)


def intersection_over_union(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of the object with {map >= t max(map)}, for the best t of 0.15, 0.20, ..., 0.95 of each image.

    Arguments, NaN and errors as for :func:`energy_pointing_game`.

    Returns:
        IoU [N] in [0,1], 0 where the map is zero everywhere, and its t [N], the lowest where several are best; NaN
        where the IoU is NaN or the map is zero everywhere, which no t divides.
    """
    best, threshold = _per_image(_best_iou, maps, masks).unbind(1)
    return best, threshold.masked_fill(empty_maps(maps) == 1, math.nan)


def effective_heat_ratio(maps: Tensor, masks: Tensor) -> Tensor:
    """EHR, [N] in [0,1]: area under "share of the remaining heat that lies on the object" over the threshold.

    After Zhang et al. 2021 (Fine-Grained Neural Network Explanation ...): the thresholds are the map's quantiles 0,
    0.1, ..., 1 (linear interpolation); what is at or above one remains; the area is the trapezoid rule's. The scale
    of a map does not matter, so it needs no scaling to [0,1]; one that is zero everywhere counts as 0. Arguments, NaN
    and errors as for :func:`energy_pointing_game`.
    """
    return _per_image(_heat_ratio_area, maps, masks)


def measure_maps(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """All measures of maps on objects, by the keys of MEASURES: one float64 value an image [N].

    Arguments and errors as for :func:`energy_pointing_game`; NaN as for the single measures and :func:`empty_maps`.
    """
    iou, threshold = intersection_over_union(maps, masks)
    return {
        "epg": energy_pointing_game(maps, masks),
        "pointing_game": pointing_game(maps, masks),
        "iou": iou,
        "iou_threshold": threshold,
        "ehr": effective_heat_ratio(maps, masks),
        "empty": empty_maps(maps),
    }


def _per_image(measure: Callable[[Tensor, Tensor], Tensor], maps: Tensor, masks: Tensor) -> Tensor:
    """``measure`` of heat [n,HW] float64 and object [n,HW] bool, a chunk of images at a time; 0 for a map that is zero
    everywhere, NaN where undefined."""
    check_maps(maps)
    if masks.shape != (len(maps), 1, *maps.shape[1:]):
        raise ValueError(
            f"masks must be [N,1,H,W] for maps [N,H,W]: got masks {list(masks.shape)} for maps {list(maps.shape)}"
        )
    parts = []
    for some_maps, some_masks in zip(maps.split(CHUNK), masks.split(CHUNK), strict=True):
        heat = some_maps.detach().flatten(1).double()
        on_object = object_pixels(some_masks.to(maps.device)).flatten(1)
        empty = empty_maps(some_maps)
        values = measure(heat.masked_fill((empty != 0)[:, None], 1), on_object)
        of_image = (-1, *[1] * (values.dim() - 1))
        values = values.masked_fill((empty == 1).view(of_image), 0)
        parts.append(values.masked_fill((empty.isnan() | ~on_object.any(1)).view(of_image), math.nan))
    return torch.cat(parts)


def check_maps(maps: Tensor) -> None:
    """Maps are [N,H,W] with at least a pixel, floating, and nowhere negative (NaN is not negative)."""
    if maps.dim() != 3 or 0 in maps.shape[1:] or not maps.is_floating_point():
        raise ValueError(f"maps must be floating [N,H,W]: got {maps.dtype} {list(maps.shape)}")
    if (maps < 0).any():
        raise ValueError("maps must be >= 0 everywhere: pass attributions through .abs() or .clamp(min=0) first")


def empty_maps(maps: Tensor) -> Tensor:
    """Which maps [N,H,W] say nothing, [N] float64: 1.0 where a map is zero everywhere, else 0.0; NaN where it is not
    finite."""
    maps = maps.detach().flatten(1)
    return (maps == 0).all(1).double().masked_fill(~maps.isfinite().all(1), math.nan)


def _energy_share(heat: Tensor, on_object: Tensor) -> Tensor:
    return (heat * on_object).sum(1) / heat.sum(1)


def _maximum_on_object(heat: Tensor, on_object: Tensor) -> Tensor:
    highest = heat == heat.amax(1, keepdim=True)
    return (highest & on_object).sum(1).double() / highest.sum(1)


def _best_iou(heat: Tensor, on_object: Tensor) -> Tensor:
    """[n,2]: IoU and its threshold."""
    highest = heat.amax(1, keepdim=True)
    ious = []
    for threshold in IOU_THRESHOLDS:
        hot = heat >= threshold * highest
        ious.append((hot & on_object).sum(1) / (hot | on_object).sum(1).double())
    best, row = torch.stack(ious).max(0)
    return torch.stack([best, best.new_tensor(IOU_THRESHOLDS)[row]], 1)


def _heat_ratio_area(heat: Tensor, on_object: Tensor) -> Tensor:
    ascending = heat.sort(1).values
    ratios = []
    for quantile in EHR_QUANTILES:
        place = quantile * (heat.shape[1] - 1)
        below, above = ascending[:, math.floor(place)], ascending[:, math.ceil(place)]
        # min: rounding must not lift the threshold over the value that it lies below.
        threshold = torch.minimum(torch.lerp(below, above, place % 1), above)
        ratios.append(_energy_share(heat * (heat >= threshold[:, None]), on_object))
    return torch.trapezoid(torch.stack(ratios), dx=0.1, dim=0)


# ------------------------------------------------------------------------------------ deletion and insertion


def deletion(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Tensor | None = None,
    steps: int = STEPS,
    batch: int | None = None,
) -> Tensor:
    """Deletion AUC of each image, [N] in [0,1]; low where the map found what the network needs (Petsiuk et al. 2018).

    The class's probability while the k highest pixels of the map are replaced by zeros (normalised space: the mean
    colour), for k = 0, HW/steps, ..., HW (rounded), and the area under it over k/HW by the trapezoid rule.

    Args:
        x: images [N,C,H,W] as the model takes them.
        maps: explanations [N,H,W], >= 0; equal values go in reading order. So does a whole map of equal values, as
            one that is zero everywhere is: it ranks nothing, and gets what an order without knowledge gets.
        target: class indices [N]; None: the class predicted for the whole image.
        steps: points of the curve less one, both ends included.
        batch: the most images in a forward pass; None: as :func:`batch_for`. The result does not depend on it.

    Returns:
        float64 on the device of ``x``; NaN where the map is not finite.

    Raises:
        ValueError: negative values in a map, or shapes that do not fit.
    """
    return _areas(model, x, torch.zeros_like(x), x, {"": maps}, target, steps, batch)[""]


def insertion(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Tensor | None = None,
    steps: int = STEPS,
    batch: int | None = None,
    sigma: float | None = None,
) -> Tensor:
    """Insertion AUC of each image, [N] in [0,1]; high where the map found what suffices (Petsiuk et al. 2018).

    As :func:`deletion`, but the k highest pixels are revealed on a copy of the image under a Gaussian blur.

    Args:
        sigma: the blur's standard deviation in pixels; None: an eighth of the image's shorter side.
    """
    return _areas(model, blurred(x, sigma), x, x, {"": maps}, target, steps, batch)[""]


def measure_perturbation(
    model: nn.Module,
    x: Tensor,
    maps: Mapping[str, Tensor],
    target: Tensor | None = None,
    steps: int = STEPS,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Deletion and insertion of several methods' maps at once, faster than one by one: the curves' ends are shared.

    Args:
        maps: method -> maps [N,H,W].
        progress: called with the number of images finished since the last call; there are 2 N len(maps) in all.

    Returns:
        Method -> {"deletion": [N], "insertion": [N]}; values, other arguments and errors as for :func:`deletion`.
    """
    target = predict(model, x, batch) if target is None else target
    deleted = _areas(model, x, torch.zeros_like(x), x, maps, target, steps, batch, progress)
    inserted = _areas(model, blurred(x), x, x, maps, target, steps, batch, progress)
    return {method: {"deletion": deleted[method], "insertion": inserted[method]} for method in maps}


def blurred(x: Tensor, sigma: float | None = None) -> Tensor:
    """Images [N,C,H,W] under a Gaussian blur, cut at 3 sigma, the edge's pixels repeated outside.

    Args:
        sigma: standard deviation in pixels, > 0; None: BLUR times the shorter side.
    """
    sigma = BLUR * min(x.shape[2:]) if sigma is None else sigma
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0: got {sigma}")
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    planes = x.flatten(0, 1)[:, None]
    planes = F.conv2d(F.pad(planes, (reach, reach, 0, 0), mode="replicate"), weights[None, None, None])
    planes = F.conv2d(F.pad(planes, (0, 0, reach, reach), mode="replicate"), weights[None, None, :, None])
    return planes.view(x.shape)


def _areas(
    model: nn.Module,
    start: Tensor,
    end: Tensor,
    x: Tensor,
    maps: Mapping[str, Tensor],
    target: Tensor | None,
    steps: int,
    batch: int | None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Areas under the target's probability on the way from ``start`` to ``end``, each map's highest pixels first."""
    for values in maps.values():
        check_maps(values)
        if x.dim() != 4 or values.shape != (len(x), *x.shape[2:]):
            raise ValueError(
                f"maps must be [N,H,W] for x [N,C,H,W]: got maps {list(values.shape)} for x {list(x.shape)}"
            )
    if steps < 1:
        raise ValueError(f"steps must be at least 1: got {steps}")
    batch = batch_for(model, x, batch)
    target = predict(model, x, batch) if target is None else target.to(x.device)
    areas = {}
    with in_eval_mode(model), torch.no_grad():
        start, end = for_model(model, start), for_model(model, end)
        ends = [_probabilities(model, images, target, batch) for images in (start, end)]
        for method, values in maps.items():
            ranks = pixel_ranks(values.detach().to(start.device))
            between = []
            for rows in torch.arange(len(x)).split(max(1, batch // max(1, steps - 1))):
                mixed = _mixtures(start[rows], end[rows], ranks[rows], steps)
                of_target = target[rows].repeat_interleave(steps - 1)
                between.append(_probabilities(model, mixed, of_target, batch).view(len(rows), steps - 1))
                if progress:
                    progress(len(rows))
            curves = torch.cat([ends[0][:, None], torch.cat(between), ends[1][:, None]], 1)
            areas[method] = torch.trapezoid(curves, dx=1 / steps).masked_fill(
                empty_maps(values).isnan().to(curves.device), math.nan
            )
    return {method: values.to(x.device) for method, values in areas.items()}


def _mixtures(start: Tensor, end: Tensor, ranks: Tensor, steps: int) -> Tensor:
    """The steps - 1 images between each start and end [n,C,H,W], flat [n (steps - 1),C,H,W]; channels-last."""
    height, width = ranks.shape[1:]
    changed = (torch.arange(1, steps, device=ranks.device) * height * width / steps).round()
    from_end = ranks[:, None] < changed.view(1, -1, 1, 1)
    start, end = start.permute(0, 2, 3, 1), end.permute(0, 2, 3, 1)
    return torch.where(from_end[..., None], end[:, None], start[:, None]).flatten(0, 1).permute(0, 3, 1, 2)


def _probabilities(model: nn.Module, images: Tensor, target: Tensor, batch: int) -> Tensor:
    """Probability of each image's target, [N] float64 on the model's device."""
    parts = [torch.empty(0, dtype=torch.float64, device=images.device)]
    for some, classes in zip(images.split(batch), target.split(batch), strict=True):
        scores = scores_of(model, some)
        parts.append(scores.double().softmax(1).gather(1, classes.to(scores.device)[:, None])[:, 0])
    return torch.cat(parts)


def pixel_ranks(maps: Tensor) -> Tensor:
    """Place of each pixel in the descending order of its map, from 0, equal values in reading order; [N,H,W] int64."""
    order = maps.flatten(1).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(maps.shape)
