"""Masks a class: of each sample the one of the class that its terms look at."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import describe
from .labels import Look
from .masks import check_range, given_item

ANY, NONE = -1, -2  #: in place of a class: a mask of the whole sample; no mask


def is_of_classes(mask, look: Look) -> bool:
    """Whether ``mask`` of a call is of classes, and not one of each sample."""
    if isinstance(mask, Tensor):
        return look.present is not None and mask.dim() == 4 and mask.shape[1] != 1
    return isinstance(mask, Sequence) and any(isinstance(item, Mapping) for item in mask)


def given_mask(
    mask: Tensor | Sequence, x: Tensor, look: Look, annotated: Tensor | None = None, check_values: bool = False
) -> tuple[Tensor, Tensor]:
    """The mask [B,1,H,W] of the class that each sample looks at, and which of them are known, bool [B].

    Args:
        mask: [B,K,H,W] in [0,1]; or a sequence of B items, each a mapping of class indices to what
            :func:`sib_ext.masks.given_mask` takes of one sample, such a thing itself, which stands for all labels, or
            None. A class that is not there is not known. Where all labels of a sample count together, it is known if
            all of them are, and their masks are united.
        annotated: bool [B]; with a tensor also [B,K].

    Raises:
        ValueError: a class that there is not, an item of another kind, or a target without single labels.
    """
    if look.label is None:
        raise ValueError(
            "mask has masks of classes, but target has class probabilities, which name none: give one mask a sample "
            "(of mixed samples sib_ext.functional.mixed makes it)"
        )
    if annotated is not None:
        _check_annotated(annotated, x, look if isinstance(mask, Tensor) else None)
    if isinstance(mask, Tensor):
        found, known = _of_tensor(mask, x, look, annotated, check_values)
    else:
        found, known = _of_items(mask, x, look, check_values)
    if annotated is not None and annotated.dim() == 1:
        known = known & annotated
    return found, known


def _check_annotated(annotated: Tensor, x: Tensor, look: Look | None) -> None:
    """``look``: masks are a tensor, whose classes may have flags of their own."""
    shapes = [x.shape[:1]] if look is None else [x.shape[:1], look.present.shape]
    is_bool = isinstance(annotated, Tensor) and annotated.dtype == torch.bool
    if not is_bool or annotated.shape not in shapes or annotated.device != x.device:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"annotated must be a boolean tensor {expected} on {x.device}, got {describe(annotated)}")


def _of_tensor(
    mask: Tensor, x: Tensor, look: Look, annotated: Tensor | None, check_values: bool
) -> tuple[Tensor, Tensor]:
    batch, classes = look.present.shape
    if mask.shape != (batch, classes, *x.shape[2:]) or mask.device != x.device or mask.is_complex():
        raise ValueError(
            f"mask must be [{batch},{classes},{x.shape[2]},{x.shape[3]}] on {x.device}, one a class, got "
            f"{describe(mask)}: resize it together with the images"
        )
    known = torch.ones_like(look.present)
    if annotated is not None and annotated.dim() == 2:
        known = annotated
        mask = torch.where(known[:, :, None, None], mask, torch.zeros_like(mask))
    mask = check_range(mask, x, check_values)
    rows = torch.arange(batch, device=x.device)
    of_all = look.of_all
    together = (mask * look.present[:, :, None, None]).amax(1)
    found = torch.where(of_all[:, None, None], together, mask[rows, look.label])
    whole = (known | ~look.present).all(1) & look.present.any(1)
    return found[:, None], torch.where(of_all, whole, known[rows, look.label])


class _Entries(NamedTuple):
    """The masks that there are, N a sample at most."""

    masks: Tensor  #: [B,N,H,W]
    classes: Tensor  #: int64 [B,N]; ANY, NONE


def _of_items(mask: Sequence, x: Tensor, look: Look, check_values: bool) -> tuple[Tensor, Tensor]:
    entries = _entries(mask, x, None if look.present is None else look.present.shape[1], check_values)
    anything = entries.classes == ANY
    wanted = (entries.classes == look.label[:, None]) | anything
    known = wanted.any(1)
    if look.present is not None:
        labels = look.present.gather(1, entries.classes.clamp_min(0)) & (entries.classes >= 0)
        whole = anything.any(1) | ((labels.sum(1) == look.present.sum(1)) & look.present.any(1))
        wanted = torch.where(look.of_all[:, None], labels | anything, wanted)
        known = torch.where(look.of_all, whole, known)
    return (entries.masks * wanted[:, :, None, None]).amax(1)[:, None], known


def _entries(mask: Sequence, x: Tensor, classes: int | None, check_values: bool) -> _Entries:
    if len(mask) != len(x):
        raise ValueError(f"mask has {len(mask)} items for a batch of {len(x)}: give one (or None) per sample")
    named = [
        list(item.items()) if isinstance(item, Mapping) else [] if item is None else [(ANY, item)] for item in mask
    ]
    for sample, item in enumerate(named):
        if isinstance(mask[sample], Mapping):
            _check_classes(sample, [name for name, _ in item], classes)
    most = max(1, *map(len, named))
    rows, numbers = [], []
    for item in named:
        item = item + [(NONE, None)] * (most - len(item))
        rows += [given_item(one, x[:1], check_values) for _, one in item]
        # None in the place of a mask: that class is not known.
        numbers.append([NONE if one is None else int(name) for name, one in item])
    masks = torch.cat(rows).unflatten(0, (len(x), most)).squeeze(2)
    return _Entries(masks, torch.tensor(numbers, device=x.device))


def _check_classes(sample: int, names: Sequence, classes: int | None) -> None:
    for name in names:
        is_index = isinstance(name, Integral) and not isinstance(name, bool) and name >= 0
        if not is_index or (classes is not None and name >= classes):
            most = "" if classes is None else f" below {classes}"
            raise ValueError(f"mask: sample {sample} names the class {name!r}: name class indices{most}, {{3: boxes}}")
