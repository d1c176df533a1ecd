"""CutMix and MixUp for batches with masks: the masks go with their images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import class_masks, labels, masks
from .checks import check_field, describe

#: A sample that has so much of one without annotation has none.
UNKNOWN = 2**-7


def mixed(
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    target: Tensor,
    mask: Tensor | Sequence | None,
    annotated: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A batch whose samples are mixed (CutMix, MixUp), its masks as its images.

    CutMix pastes the masks as it pastes the pixels; MixUp adds them with the weights of the images. A sample that is
    mixed with one without annotation has none.

    Args:
        mix: (images [B,N,H,W], target) -> the same mixed, every channel alike, as torchvision's ``v2.CutMix`` and
            ``v2.MixUp`` and timm's ``Mixup`` do. The masks go with the images as further channels.
        x: images [B,C,H,W], floating point.
        target: as ``mix`` takes it; class indices [B], or labels [B,K] (timm's takes indices alone).
        mask, annotated: as in :meth:`sib_ext.SpatialIBLoss.terms`, None without masks; of mappings by class that of the
            target counts, and with labels [B,K] they become masks a class.

    Returns:
        x, target, mask [B,1,H,W] or [B,K,H,W], annotated bool [B], or [B,K] where it was given so or masks were
        mappings of several labels; the last two None where no sample has a mask.

    Raises:
        ValueError: images that are no floating-point batch, masks that do not fit, or a ``mix`` that changes the
            number of images or targets, or the images' size or channels.
    """
    check_field("x", x)
    given, known = (None, None) if mask is None else _given(mask, x, target, annotated)
    if given is None:
        return *mix(x, target), None, None
    flags = known.reshape(len(x), -1, 1, 1).to(x.dtype).expand(-1, -1, *x.shape[2:])
    both = torch.cat([x, given.to(x.dtype), flags], 1)
    shape = both.shape
    both, target = mix(both, target)
    if not isinstance(both, Tensor) or both.shape != shape:
        got = describe(both) if isinstance(both, Tensor) else type(both).__name__
        raise ValueError(f"mix must return images of the shape that it is given, {list(shape)}, got {got}")
    if len(target) != len(x):
        raise ValueError(
            f"mix must return a target for each of the {len(x)} images, got {describe(target)}: timm's Mixup takes "
            "class indices alone, torchvision's v2.CutMix and v2.MixUp labels [B,K], too"
        )
    parts = both.split([x.shape[1], given.shape[1], flags.shape[1]], 1)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    known = (parts[2].amin((2, 3)) > 1 - UNKNOWN).reshape(known.shape)
    return parts[0].contiguous(memory_format=layout), target, parts[1].clamp(0, 1), known


def _given(
    mask: Tensor | Sequence, x: Tensor, target: Tensor, annotated: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Masks [B,1,H,W] or [B,K,H,W], and which are known, bool [B] or [B,K]; None where none is."""
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
        return class_masks.of_tensor(mask, x, mask.shape[1], annotated, False)
    if class_masks.has_mappings(mask):
        if target.dim() == 2:
            return class_masks.of_every_class(mask, x, target.shape[1], annotated)
        return class_masks.of_look(mask, x, labels.of_one_label(target), annotated)
    given, known = masks.given_mask(mask, x, annotated)
    if given is not None and known is None:
        known = torch.ones(len(x), dtype=torch.bool, device=x.device)
    return given, known
