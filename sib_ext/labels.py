"""What the terms of a step look at in each image: the class whose logit is the seed, and whose mask counts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: A label of several is looked at from PRESENT on, and not there below ABSENT; between them (of a mixed image, say) it
#: is there, and not looked at.
PRESENT, ABSENT = 0.5, 0.1
IGNORED = -3  #: in the place of a class: none is known

#: The seeds that choose a logit of an image of several labels.
MULTILABEL_SEEDS = ("target_logit", "random_logit")


class Look(NamedTuple):
    """A step's, one row a sample; None where the target alone says it."""

    target: Tensor  #: what the seed takes: class indices [B], or each logit's weight [B,K]
    label: Tensor | None = None  #: int64 [B]: the class whose mask counts; None: no single one
    present: Tensor | None = None  #: bool [B,K]: what is there; None: one label an image
    of_all: Tensor | None = None  #: bool [B]: the masks of all labels count together, as the logit is of another class
    counts: Tensor | None = None  #: bool [B]: which samples have terms; None: all


def of_one_label(target: Tensor) -> Look:
    """Of class indices [B], or class probabilities [B,K]."""
    return Look(target, None if target.is_floating_point() else target)


def without_ignored(target: Tensor, ignore_index: int, needs_label: bool) -> Look:
    """Of class indices [B], or probabilities [B,K]. Samples of ``ignore_index`` have no terms of a seed that
    ``needs_label``."""
    if target.is_floating_point():  # which knows no ignored label, and exchanges as much with other ranks
        return Look(target, counts=target.new_ones(len(target), dtype=torch.bool) if needs_label else None)
    known = target != ignore_index
    seen = torch.where(known, target, 0)
    return Look(seen, torch.where(known, target, IGNORED), counts=known if needs_label else None)


def drawn(target: Tensor, seed: str) -> Look:
    """Of several labels an image, [B,K] in [0,1]: each image looks at one of them, from PRESENT on, drawn anew every
    call.

    ``"target_logit"``: at its logit. ``"random_logit"``: half of the time at its logit, else at that of a class that is
    not there, whose evidence should lie on the objects, too: the masks of all labels count. An image without labels has
    no object, and no terms.
    """
    sure, present = target >= PRESENT, target >= ABSENT
    keys = torch.rand(target.shape, device=target.device)
    label = keys.masked_fill(~sure, -1).argmax(1)
    other = keys.masked_fill(present, -1).argmax(1)
    has, lacks = sure.any(1), ~present.all(1)
    of_other = ~has
    if seed == "random_logit":
        of_other = of_other | (lacks & (torch.rand(len(target), device=target.device) < 0.5))
    weights = F.one_hot(torch.where(of_other, other, label), target.shape[1]).to(torch.get_default_dtype())
    return Look(weights, label, present, of_other, has)
