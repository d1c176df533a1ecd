"""Notices when the S-IB terms take over a training, and says so."""

import math
import warnings

import torch
from torch import Tensor

SMOOTHING = 0.98  #: of the running means, a step
LOOK = 100  #: steps between two looks, each of which waits for a GPU
PATIENCE = 500  #: steps before a network counts as one that does not learn
STUCK = 0.9  #: of log K, the cross-entropy of guessing among K classes: above it nothing has been learned
LOST = 0.25  #: of log K: a rise of the cross-entropy above its lowest by so much is a loss
FALL = 0.1  #: the share by which the terms must have fallen: else it is not they that are being learned instead


class CollapseWarning(UserWarning):
    """The S-IB terms fall at the expense of the classification."""


class CollapseGuard:
    """Watches running means of the cross-entropy and of the weighted S-IB terms, and warns once.

    It warns where the terms have fallen by a tenth while, over 500 steps and more, the network has not learned to
    classify (cross-entropy above 90 % of guessing), or has forgotten it (cross-entropy a quarter of guessing's above
    its lowest).
    """

    def __init__(self):
        self.steps = 0
        self.means: Tensor | None = None  #: cross-entropy and terms
        self.first_terms = self.lowest = self.terms_at_lowest = math.inf
        self.warned = False

    def watch(self, cross_entropy: Tensor, terms: Tensor, classes: int) -> None:
        """Once a training step; detached scalars."""
        if self.warned or torch.compiler.is_compiling():
            return
        now = torch.stack([cross_entropy.detach().float(), terms.detach().float()])
        before = torch.full_like(now, math.nan) if self.means is None else self.means.to(now.device)
        # A step that is not finite (a GradScaler that looks for its scale) does not count.
        known = torch.where(before.isfinite().all(), torch.lerp(now, before, SMOOTHING), now)
        self.means = torch.where(now.isfinite().all(), known, before)
        self.steps += 1
        capturing = now.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.steps % LOOK == 0 and not capturing:
            self._look(*self.means.tolist(), math.log(max(classes, 2)))

    def _look(self, cross_entropy: float, terms: float, guessing: float) -> None:
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
            f"{cross_entropy:.2f} (guessing: {guessing:.2f}) while they fell to {terms:.2f}: lower background_weight "
            "and foreground_weight, or train with cross-entropy alone first",
            CollapseWarning,
            stacklevel=4,
        )
