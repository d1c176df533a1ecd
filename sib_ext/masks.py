"""Foreground masks M [B,1,H,W]: made from the VJP, or given by the user (soft, boolean, boxes, per-sample missing)."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .checks import check_choice, check_field, check_positive, check_share, check_tensor, check_window, describe
from .estimators import TINY
from .ops import auto_window, density_mask
from .ops.density_mask import PADDINGS

# ------------------------------------------------------------------------------------------- made from R


def hard_density_mask(
    vjp: Tensor,
    window: int | str = "auto",
    slope: float = 10.0,
    eps: float = 1e-8,
    padding: str = "zeros",
    area: float = 0.2,
) -> Tensor:
    """:func:`sib_ext.density_mask` with ordinary quantiles (linear between two order statistics) for soft ones."""
    check_field("vjp", vjp)
    window = auto_window(*vjp.shape[2:]) if window == "auto" else check_window("window", window)
    check_positive("slope", slope)
    check_positive("eps", eps, zero=True)
    check_share("area", area)
    check_choice("padding", padding, PADDINGS)
    return reference.hard_density_mask(reference.widen(vjp), window, slope, eps, padding, area)


def _relative_density(vjp: Tensor) -> Tensor:
    check_field("vjp", vjp)
    g = reference.density(reference.widen(vjp))
    peak = g.amax(1, keepdim=True)
    return g / torch.where(peak > 0, peak, 1)


def _as_mask(values: Tensor, vjp: Tensor) -> Tensor:
    return values.view(vjp.shape[0], 1, *vjp.shape[2:])


def mean_sigmoid_mask(vjp: Tensor, slope: float = 10.0) -> Tensor:
    """``M = sigmoid(slope (n - mean n))``, n = g/max g, ``g = |mean_c R|``: no window, no fixed area."""
    check_positive("slope", slope)
    n = _relative_density(vjp)
    return _as_mask(torch.sigmoid(slope * (n - n.mean(1, keepdim=True))), vjp)


def top_p_mask(vjp: Tensor, area: float = 0.1, slope: float = 30.0) -> Tensor:
    """``M = sigmoid(slope (n - t))``, t such that mean M = ``area`` exactly, n = g/max g, ``g = |mean_c R|``."""
    check_share("area", area)
    check_positive("slope", slope)
    n = _relative_density(vjp)
    with torch.no_grad():
        # mean M falls in t from nearly 1 to nearly 0 over this bracket.
        reach = 40 / slope
        below = n.new_full((n.shape[0], 1), -reach)
        above = n.new_full((n.shape[0], 1), 1 + reach)
        for _ in range(60):
            middle = (below + above) / 2
            too_large = torch.sigmoid(slope * (n - middle)).mean(1, keepdim=True) > area
            below, above = torch.where(too_large, middle, below), torch.where(too_large, above, middle)
        t = (below + above) / 2
    # Two Newton steps from the root leave t in place and give it its exact first and second derivatives.
    for _ in range(2):
        m = torch.sigmoid(slope * (n - t))
        t = t + (m.mean(1, keepdim=True) - area) / (slope * m * (1 - m)).mean(1, keepdim=True)
    return _as_mask(torch.sigmoid(slope * (n - t)), vjp)


#: In units of the last place: by so much a field that is constant may differ from place to place (a sum over the
#: channels, an interpolation).
ROUNDING = 100

#: What self-made masks are made of.
SOURCES = ("vjp", "activation")


def activation_source(field: Tensor, size: Sequence[int]) -> Tensor:
    """A field [B,1,h,w] >= 0, upsampled to ``size`` = (H, W) and with mean 1 (or 0 everywhere).

    Free of scale, so that the mask's eps is, too. A field that is the same everywhere but for rounding is made so: a
    mask stretches whatever contrast there is.
    """
    if field.shape[2:] != size:
        field = F.interpolate(field, size, mode="bilinear", align_corners=False)
    relative = field / field.mean((1, 2, 3), keepdim=True).clamp_min(TINY)
    contrast = relative.amax((1, 2, 3), keepdim=True) - relative.amin((1, 2, 3), keepdim=True)
    return torch.where(contrast > ROUNDING * torch.finfo(field.dtype).eps, relative, relative.detach().round())


MASKS: dict[str, Callable[..., Tensor]] = {
    "density": density_mask,
    "hard_density": hard_density_mask,
    "mean_sigmoid": mean_sigmoid_mask,
    "top_p": top_p_mask,
}

# ------------------------------------------------------------------------------------------------ given


def boxes_to_mask(boxes: Tensor, height: int, width: int, check_values: bool = False) -> Tensor:
    """Boxes [B,4] (x1, y1, x2, y2 in pixels, x2 and y2 excluded) -> mask [B,1,H,W], 1 inside.

    A pixel cut by a box's edge gets the share of it that is covered. torchvision's ``BoundingBoxes`` are read in the
    format that they name.

    Raises:
        ValueError: not [B,4], a box outside the image, or x2 <= x1 or y2 <= y1 (checked on a GPU only
            with ``check_values``, because that waits for it); ``BoundingBoxes`` that are rotated or of another size of
            image.
    """
    boxes = plain("boxes", boxes, height, width)
    _check_box_shape(boxes)
    if check_values or boxes.device.type == "cpu":
        _check_box_values(boxes, height, width)
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))

    def coverage(start: Tensor, stop: Tensor, size: int) -> Tensor:
        pixel = torch.arange(size, dtype=boxes.dtype, device=boxes.device)
        return (torch.minimum(stop[:, None], pixel + 1) - torch.maximum(start[:, None], pixel)).clamp(0, 1)

    x1, y1, x2, y2 = boxes.unbind(1)
    return (coverage(y1, y2, height)[:, :, None] * coverage(x1, x2, width)[:, None, :]).unsqueeze(1)


def plain(name: str, mask: Tensor, height: int, width: int) -> Tensor:
    """torchvision's masks and boxes as plain tensors, boxes as corners: in a plain tensor no format is known."""
    tv = sys.modules.get("torchvision.tv_tensors")  # who has one, has imported it
    if tv is None or not isinstance(mask, tv.TVTensor):
        return mask
    values = mask.as_subclass(Tensor)
    if isinstance(mask, tv.Mask):
        return values
    if not isinstance(mask, tv.BoundingBoxes):
        raise ValueError(f"{name} must be a mask or boxes, got a torchvision {type(mask).__name__}")
    if mask.format.name not in ("XYXY", "XYWH", "CXCYWH"):
        raise ValueError(f"{name} must be upright boxes, got BoundingBoxes of the format {mask.format.name}")
    if tuple(mask.canvas_size) != (height, width):
        raise ValueError(
            f"{name} has BoundingBoxes of images of {mask.canvas_size[0]} x {mask.canvas_size[1]}, but the images are "
            f"{height} x {width}: transform boxes together with their images"
        )
    from torchvision.transforms.v2.functional import convert_bounding_box_format

    # Integers would lose half a pixel of a centre.
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return convert_bounding_box_format(wide, old_format=mask.format, new_format=tv.BoundingBoxFormat.XYXY)


def _check_box_shape(boxes: Tensor) -> None:
    check_tensor("boxes", boxes, "a tensor [B,4]")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [B,4] (x1, y1, x2, y2 in pixels), got {describe(boxes)}")


def _check_box_values(boxes: Tensor, height: int, width: int) -> None:
    x1, y1, x2, y2 = boxes.unbind(1)
    good = (x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height) & (x1 < x2) & (y1 < y2)
    if not bool(good.all()):
        bad = int((~good).nonzero()[0, 0])
        raise ValueError(
            f"mask: box {bad} is {boxes[bad].tolist()}, which does not lie inside the {height} x {width} image "
            "(x1 < x2 <= width, y1 < y2 <= height, in pixels): scale and clip boxes as the image was"
        )


def given_mask(
    mask: Tensor | Sequence[Tensor | None], x: Tensor, annotated: Tensor | None = None, check_values: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """What the user gave as ``mask`` and ``annotated`` -> (M [B,1,H,W], annotated [B] bool or None for "every sample").

    Takes a soft or boolean mask [B,H,W] or [B,1,H,W], boxes [B,4], or a sequence of B items, each a mask [H,W], a
    box [4], several masks [N,H,W] or boxes [N,4] (their union), or None where the sample has no annotation;
    torchvision's ``Mask`` and ``BoundingBoxes``, too, and these in the format that they name. What stands in rows
    without annotation is not looked at. M is None when no sample has an annotation.
    """
    if annotated is not None:
        check_tensor("annotated", annotated, "a boolean tensor [B]")
        if annotated.dtype != torch.bool or annotated.shape != x.shape[:1] or annotated.device != x.device:
            raise ValueError(
                f"annotated must be a boolean tensor [{x.shape[0]}] on {x.device}, got {describe(annotated)}"
            )
    if isinstance(mask, Tensor):
        return _given_tensor(mask, x, annotated, check_values), annotated
    if not isinstance(mask, Sequence):
        raise ValueError(f"mask must be a tensor or a sequence of tensors and None, got {type(mask).__name__}")
    if len(mask) != x.shape[0]:
        raise ValueError(f"mask has {len(mask)} items for a batch of {x.shape[0]}: give one (or None) per sample")
    if all(item is None for item in mask):
        return None, None
    rows = []
    for sample, item in enumerate(mask):
        with sample_named(sample):
            rows.append(given_item(item, x[:1], check_values))
    if any(item is None for item in mask):
        known = torch.tensor([item is not None for item in mask], device=x.device)
        annotated = known if annotated is None else annotated & known
    return torch.cat(rows), annotated


@contextmanager
def sample_named(sample: int, of_class: int | None = None) -> Iterator[None]:
    """Inside, an error says of which sample of a sequence it is."""
    try:
        yield
    except ValueError as error:
        which = f"sample {sample}" if of_class is None else f"sample {sample}, class {of_class}"
        raise ValueError(f"{error} ({which})") from None


def given_item(item: Tensor | None, x: Tensor, check_values: bool) -> Tensor:
    """One sample's mask or boxes, as in :func:`given_mask` -> [1,1,H,W]; of None zeros. ``x``: its image [1,C,H,W]."""
    if item is None:
        return x.new_zeros(1, 1, *x.shape[2:], dtype=reference.accumulation_dtype(x.dtype))
    check_tensor("mask", item, "a tensor or None for each sample")
    item = plain("mask", item, *x.shape[2:])
    are_boxes = item.dim() == 2 and item.shape[1] == 4 and item.shape != x.shape[2:]
    if not are_boxes and (item.dim() != 3 or item.shape[1:] != x.shape[2:]):
        return _given_tensor(item[None], x, None, check_values)
    if not len(item):
        raise ValueError(
            f"mask has no {'boxes' if are_boxes else 'masks'}, {list(item.shape)}: give None where it is not known "
            "what to look at"
        )
    images = x.expand(len(item), *x.shape[1:])  # united: a pixel counts as in the one that covers most of it
    return _given_tensor(item, images, None, check_values).amax(0, keepdim=True)


def _given_tensor(mask: Tensor, x: Tensor, annotated: Tensor | None, check_values: bool) -> Tensor:
    batch, _, height, width = x.shape
    mask = plain("mask", mask, height, width)
    if mask.is_complex():
        raise ValueError(f"mask must be boolean, integer or floating point, got {describe(mask)}")
    if mask.device != x.device:
        raise ValueError(
            f"mask must be on the device of x ({x.device}), got {describe(mask)}: move it with .to(x.device)"
        )
    if mask.shape == (batch, 4):
        if check_values or mask.device.type == "cpu":
            _check_no_shares(mask if annotated is None else mask[annotated], height, width)
        if annotated is not None:
            whole = mask.new_tensor([0, 0, width, height])
            mask = torch.where(annotated[:, None], mask, whole)
        return boxes_to_mask(mask, height, width, check_values).to(reference.accumulation_dtype(x.dtype))
    if mask.shape not in ((batch, height, width), (batch, 1, height, width)):
        raise ValueError(
            f"mask must be [{batch},1,{height},{width}], [{batch},{height},{width}] or boxes [{batch},4] to fit x, "
            f"got {describe(mask)}: {_advice(mask, x)}"
        )
    mask = mask.reshape(batch, 1, height, width)
    if annotated is not None:
        mask = torch.where(annotated[:, None, None, None], mask, torch.zeros_like(mask))
    return check_range(mask, x, check_values)


def _check_no_shares(boxes: Tensor, height: int, width: int) -> None:
    """Of all boxes that a call gives none reaches out of the first pixel: they are meant as shares of the image."""
    x2, y2 = boxes[:, 2], boxes[:, 3]
    if len(boxes) and bool(((x2 <= 1) & (y2 <= 1) & ((x2 < 1) | (y2 < 1))).all()):
        raise ValueError(
            f"mask: box 0 is {boxes[0].tolist()}, inside the first pixel: give pixels, not shares of the {height} x "
            f"{width} image"
        )


def _advice(mask: Tensor, x: Tensor) -> str:
    if mask.dim() == 4 and mask.shape[1] > 1 and mask.shape[2:] == x.shape[2:]:
        return (
            "masks a class as a tensor are for task='multilabel'; with one label an image give mappings, {class: mask}"
        )
    return "resize it together with the images"


def check_range(mask: Tensor, x: Tensor, check_values: bool) -> Tensor:
    """The mask as wide as the statistics of ``x``; its values are checked on a CPU, else only with ``check_values``."""
    if (check_values or mask.device.type == "cpu") and mask.dtype != torch.bool:
        least, most = (float(v) for v in mask.detach().aminmax())
        if not (least >= 0 and most <= 1):
            raise ValueError(
                f"mask must lie in [0,1], got values from {least:g} to {most:g}: divide by 255, or compare"
            )
    return mask.to(reference.accumulation_dtype(x.dtype))
