"""Masks a class: of each sample the one of the class that its terms look at."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .checks import check_tensor, describe
from .labels import Look
from .masks import check_range, given_item, plain, sample_named

ANY, NONE = -1, -2  #: in place of a class: a mask of the whole sample; no mask


def has_mappings(mask) -> TypeGuard[Sequence[Any]]:
    """Whether ``mask`` of a call is a sequence with mappings by class in it."""
    return isinstance(mask, Sequence) and any(isinstance(item, Mapping) for item in mask)


def is_of_classes(mask, look: Look) -> bool:
    """Whether ``mask`` of a call is of classes, and not one of each sample."""
    if isinstance(mask, Tensor):
        classes = 0 if look.present is None else look.present.shape[1]
        return mask.dim() == 4 and classes > 0 and (mask.shape[1] != 1 or classes == 1)
    return has_mappings(mask)


def check_classes(mask, classes: int) -> None:
    """
    Raises:
        ValueError: a mapping names a class that is none of ``classes``.
    """
    for sample, item in enumerate(mask if has_mappings(mask) else ()):
        for name in item if isinstance(item, Mapping) else ():
            whole = isinstance(name, Integral) and not isinstance(name, bool)
            if not whole or not 0 <= name < classes:
                raise ValueError(
                    f"mask: sample {sample} names the class {name!r}: name class indices from 0 to {classes - 1}, "
                    "{0: boxes}"
                )


def of_look(
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
        ValueError: an item of another kind, or a target without single labels.
    """
    if look.label is None:
        raise ValueError(
            "mask has masks of classes, but target has class probabilities, which name none: give one mask a sample "
            "(of mixed samples sib_ext.functional.mixed makes it)"
        )
    if not isinstance(mask, Tensor):
        return _of_items(mask, x, look, annotated, check_values)
    mask, known = of_tensor(mask, x, look.present.shape[1], annotated)
    known = known[:, None].expand_as(look.present) if known.dim() == 1 else known
    rows = torch.arange(len(x), device=x.device)
    present = look.present[:, :, None, None]
    together = torch.where(present, mask, torch.zeros_like(mask)).amax(1)
    found = torch.where(look.of_all[:, None, None], together, mask[rows, look.label])
    whole = (known | ~look.present).all(1) & look.present.any(1)
    return check_range(found[:, None], x, check_values), torch.where(look.of_all, whole, known[rows, look.label])


def of_tensor(
    mask: Tensor, x: Tensor, classes: int, annotated: Tensor | None, as_given: bool = True
) -> tuple[Tensor, Tensor]:
    """Masks a class [B,K,H,W], zero where they are not known, and which are, bool [B] or [B,K] as ``annotated`` is;
    ``as_given``: in their type, and their values are not looked at."""
    mask = plain("mask", mask, *x.shape[2:])
    if mask.shape != (len(x), classes, *x.shape[2:]) or mask.device != x.device or mask.is_complex():
        raise ValueError(
            f"mask must be [{len(x)},{classes},{x.shape[2]},{x.shape[3]}] on {x.device}, one a class, got "
            f"{describe(mask)}: resize it together with the images"
        )
    known = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if annotated is not None:
        known = _checked(annotated, x, (x.shape[:1], (len(x), classes)))
        flags = known.reshape(len(x), -1, 1, 1)
        mask = torch.where(flags, mask, torch.zeros_like(mask))
    return mask if as_given else check_range(mask, x, False), known


def of_every_class(mask: Sequence, x: Tensor, classes: int, annotated: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A sequence with mappings as masks a class [B,K,H,W], and which are known, bool [B,K]; a mask of a whole sample
    stands for every class."""
    check_classes(mask, classes)
    entries = _entries(mask, x, False)
    given = torch.arange(classes, device=x.device) == entries.classes[:, :, None]  # [B,N,K]
    given |= (entries.classes == ANY)[:, :, None]
    known = given.any(1)
    if annotated is not None:
        known = known & _checked(annotated, x, (x.shape[:1],))[:, None]
    return torch.einsum("bnk,bnhw->bkhw", given.to(entries.masks.dtype), entries.masks), known


def _checked(annotated: Tensor, x: Tensor, shapes: Sequence[Sequence[int]]) -> Tensor:
    expected = " or ".join(f"{list(shape)}" for shape in shapes)
    check_tensor("annotated", annotated, f"a boolean tensor {expected}")
    if (
        annotated.dtype != torch.bool
        or tuple(annotated.shape) not in map(tuple, shapes)
        or annotated.device != x.device
    ):
        raise ValueError(f"annotated must be a boolean tensor {expected} on {x.device}, got {describe(annotated)}")
    return annotated


class _Entries(NamedTuple):
    """The masks that there are, N a sample at most."""

    masks: Tensor  #: [B,N,H,W]
    classes: Tensor  #: int64 [B,N]; ANY, NONE


def _of_items(
    mask: Sequence, x: Tensor, look: Look, annotated: Tensor | None, check_values: bool
) -> tuple[Tensor, Tensor]:
    if look.present is not None:
        check_classes(mask, look.present.shape[1])
    entries = _entries(mask, x, check_values)
    anything = entries.classes == ANY
    wanted = (entries.classes == look.label[:, None]) | anything
    known = wanted.any(1)
    if look.present is not None:
        named = look.present.gather(1, entries.classes.clamp_min(0)) & (entries.classes >= 0)
        whole = anything.any(1) | ((named.sum(1) == look.present.sum(1)) & look.present.any(1))
        wanted = torch.where(look.of_all[:, None], named | anything, wanted)
        known = torch.where(look.of_all, whole, known)
    if annotated is not None:
        known = known & _checked(annotated, x, (x.shape[:1],))
    return (entries.masks * wanted[:, :, None, None]).amax(1)[:, None], known


def _entries(mask: Sequence, x: Tensor, check_values: bool) -> _Entries:
    if len(mask) != len(x):
        raise ValueError(f"mask has {len(mask)} items for a batch of {len(x)}: give one (or None) per sample")
    named = [
        list(item.items()) if isinstance(item, Mapping) else [] if item is None else [(ANY, item)] for item in mask
    ]
    most = max(1, *map(len, named))
    rows, numbers = [], []
    for sample, item in enumerate(named):
        for name, one in item + [(NONE, None)] * (most - len(item)):
            with sample_named(sample, None if name in (ANY, NONE) else name):
                rows.append(given_item(one, x[:1], check_values))
            # None in the place of a mask: that class is not known.
            numbers.append(NONE if one is None else int(name))
    masks = torch.cat(rows).unflatten(0, (len(x), most)).squeeze(2)
    return _Entries(masks, torch.tensor(numbers, device=x.device).view(len(x), most))
