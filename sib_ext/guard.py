"""Notices when the S-IB terms take over a training, or switch its maps off, and says so."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import levels_to_the_caller
from .information import Information

SMOOTHING = 0.98  #: of the running means, a step
LOOK = 100  #: steps between two looks, each of which waits for a GPU
PATIENCE = 500  #: steps before a network counts as one that does not learn
STUCK = 0.9  #: of guessing's loss (of K classes log K): above it nothing has been learned
LOST = 0.25  #: of guessing's loss: a rise of the cross-entropy above its lowest by so much is a loss
EMPTY = 0.05  #: of the samples: above it maps that are zero everywhere are no accident
FALL = 0.1  #: the share by which the terms must have fallen: else it is not they that are being learned instead


class CollapseWarning(UserWarning):
    """The S-IB terms fall at the expense of the classification, or of maps that are zero everywhere."""


class CollapseGuard:
    """Watches running means of the cross-entropy, of the weighted S-IB terms and of empty maps, and warns once of each.

    It warns where the terms have fallen by a tenth while, over 500 steps and more, the network has not learned to
    classify (cross-entropy above 90 % of guessing), or has forgotten it (cross-entropy a quarter of guessing's above
    its lowest); and where one in twenty samples has a map that is zero everywhere.
    """

    def __init__(self):
        self.steps = 0
        self.means: Tensor | None = None  #: cross-entropy, terms of the input and of the features, share of empty maps
        self.frequency: Tensor | None = None  #: of each label, where an image has several
        self.first_terms = self.lowest = self.terms_at_lowest = math.inf
        self.warned = self.warned_of_empty = False

    def count(self, labels: Tensor) -> None:
        """The labels [B,K] of a training step."""
        if not torch.compiler.is_compiling():
            now = labels.detach().float().mean(0)
            before = self.frequency
            others = before is None or before.shape != now.shape
            self.frequency = now if others else torch.lerp(now, before.to(now), SMOOTHING)

    def watch(self, cross_entropy: Tensor, found: Information, guessing: Callable[[], float]) -> None:
        """Once a training step that has terms; ``guessing``: what its loss would be of guessing, NaN: not known."""
        if (self.warned and self.warned_of_empty) or torch.compiler.is_compiling():
            return
        empty = torch.stack(list(found.empty.values())).amax() / len(found.mask)
        parts = [
            part if part is None else part.detach().float() for part in (cross_entropy, found.input, found.features)
        ]
        parts.append(empty)
        absent = torch.full_like(empty, math.nan)
        now = torch.stack([absent if part is None else part for part in parts])
        before = torch.full_like(now, math.nan) if self.means is None else self.means.to(now.device)
        # A step that is not finite (a GradScaler that looks for its scale) does not count, nor does what it lacks.
        finite = torch.stack([part for part in parts if part is not None]).isfinite().all()
        known = torch.where(before.isfinite(), torch.lerp(now, before, SMOOTHING), now)
        self.means = torch.where(finite & now.isfinite(), known, before)
        self.steps += 1
        capturing = now.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.steps % LOOK == 0 and not capturing:
            cross_entropy, of_input, of_features, empty = self.means.tolist()
            terms = [value for value in (of_input, of_features) if not math.isnan(value)]
            self._look_at_terms(cross_entropy, sum(terms), guessing())
            self._look_at_maps(empty)

    def _look_at_maps(self, empty: float) -> None:
        if self.warned_of_empty or not empty > EMPTY:
            return
        self.warned_of_empty = True
        warnings.warn(
            f"maps are being switched off: {100 * empty:.0f} % of the samples have a class activation or a VJP that is "
            "zero everywhere, so no explanation of them shows anything: raise feature_foreground, or lower "
            "feature_background and input_background",
            CollapseWarning,
            stacklevel=levels_to_the_caller(),
        )

    def _look_at_terms(self, cross_entropy: float, terms: float, guessing: float) -> None:
        if self.warned or math.isnan(cross_entropy + guessing):
            return
        if math.isinf(self.first_terms):
            self.first_terms = terms
        if cross_entropy < self.lowest:
            self.lowest, self.terms_at_lowest = cross_entropy, terms
        stuck = (
            self.steps >= PATIENCE
            and cross_entropy > STUCK * guessing
            and terms < self.first_terms - FALL * abs(self.first_terms)
        )
        lost = cross_entropy > self.lowest + LOST * guessing and terms < self.terms_at_lowest - FALL * abs(
            self.terms_at_lowest
        )
        if not (stuck or lost):
            return
        self.warned = True
        happened = "is still" if stuck else f"has risen from {self.lowest:.2f} to"
        warnings.warn(
            f"the S-IB terms are taking over: after {self.steps} steps the cross-entropy {happened} "
            f"{cross_entropy:.2f} (guessing: {guessing:.2f}) while they fell to {terms:.2f}: lower the weights of the "
            "terms, or train with cross-entropy alone first",
            CollapseWarning,
            stacklevel=levels_to_the_caller(),
        )
