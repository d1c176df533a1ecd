"""What the terms of a step look at in each image: the class whose logit is the seed, and whose mask counts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: A label of a multi-label target is present from here on.
PRESENT = 0.5

#: The seeds that choose a logit of an image of several labels.
SEEDS = ("target_logit", "random_logit")


class Look(NamedTuple):
    """A step's, one row a sample; None where the target alone says it."""

    target: Tensor  #: what the seed takes: class indices [B], or each logit's weight [B,K]
    label: Tensor | None = None  #: int64 [B]: the class whose mask counts; None: no single one
    present: Tensor | None = None  #: bool [B,K]: the labels; None: one an image
    of_all: Tensor | None = None  #: bool [B]: the masks of all labels count together, as the logit is of another class
    counts: Tensor | None = None  #: bool [B]: which samples have terms; None: all


def of_one_label(target: Tensor) -> Look:
    """Of class indices [B], or class probabilities [B,K]."""
    return Look(target, None if target.is_floating_point() else target)


def without_ignored(target: Tensor, ignore_index: int, needs_label: bool) -> Look:
    """Of class indices [B]. A seed that ``needs_label`` has no terms for samples of ``ignore_index``."""
    known = target != ignore_index
    target = torch.where(known, target, 0)
    return Look(target, target, counts=known if needs_label else None)


def drawn(target: Tensor, seed: str) -> Look:
    """Of several labels an image, [B,K] in [0,1] (present from PRESENT on): each image looks at one of them, drawn
    anew every call.

    ``"target_logit"``: at its logit. ``"random_logit"``: half of the time at its logit, else at that of a class that is
    not there, whose evidence should lie on the objects, too: the masks of all labels count. An image without labels has
    no object, and no terms.
    """
    present = target >= PRESENT
    keys = torch.rand(target.shape, device=target.device)
    label = keys.masked_fill(~present, -1).argmax(1)
    other = keys.masked_fill(present, -1).argmax(1)
    has, lacks = present.any(1), ~present.all(1)
    of_other = ~has
    if seed == "random_logit":
        of_other = of_other | (lacks & (torch.rand(len(target), device=target.device) < 0.5))
    weights = F.one_hot(torch.where(of_other, other, label), target.shape[1]).to(torch.get_default_dtype())
    return Look(weights, label, present, of_other, has)
