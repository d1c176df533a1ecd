"""What goes into an engine and what comes out of it: every engine is a function (task, x, target) -> VJPs."""

import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..loss import SpatialIBLoss
from ..outputs import logits_of


class Task(NamedTuple):
    """What the steps of a training have in common."""

    model: nn.Module  #: eager, without what it was wrapped in
    criterion: SpatialIBLoss
    layers: tuple[str, ...]
    output: Callable | None  #: the model's output -> logits
    scaler: "torch.amp.GradScaler | None"
    of_input: bool  #: whether the VJP of x is wanted; without it nothing before the layers is differentiated twice
    ordinary: set[str]  #: modules that cannot be units of :mod:`sib_ext.checkpoints`, as far as they are known

    def logits(self, x: Tensor, target: Tensor) -> Tensor:
        """Of a forward pass, checked. The model may write into its input: it gets a copy."""
        try:
            output = self.model(x.clone())
        except TypeError as error:
            self._check_signature(error)
            raise
        logits = logits_of(output, self.output)
        self.criterion.check_inputs(logits, target, x)
        return logits

    def _check_signature(self, error: TypeError) -> None:
        try:
            inspect.signature(self.model.forward).bind(None)
            misses = re.search(r"missing \d+ required", str(error))
        except TypeError:
            misses = True
        if misses:
            raise TypeError(
                f"the model cannot be called with the images alone, as SIBStep does ({error}): give SIBStep a module "
                "that calls it with all that it needs, or take the loss itself, criterion(logits, y, x)"
            ) from error


class VJPs(NamedTuple):
    """What the loss is a function of; differentiable with respect to the parameters."""

    logits: Tensor  #: [B,K]
    of_x: Tensor | None  #: R [B,C,H,W]; None where it was not wanted
    features: tuple[Tensor, ...]  #: of each layer its feature map
    of_features: tuple[Tensor, ...]  #: and ds/d(feature map)

    def tensors(self) -> tuple[Tensor, ...]:
        of_x = () if self.of_x is None else (self.of_x,)
        return (self.logits, *of_x, *self.features, *self.of_features)

    @staticmethod
    def of(tensors) -> "VJPs":
        """The inverse of :meth:`tensors`."""
        logits, *others = tensors
        of_x = others.pop(0) if len(others) % 2 else None
        count = len(others) // 2
        return VJPs(logits, of_x, tuple(others[:count]), tuple(others[count:]))
