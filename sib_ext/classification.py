"""The classification loss that S-IB's terms are added to: cross-entropy, binary cross-entropy, or one of the user's."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_choice, check_tensor, describe
from .distributed import JoinedBatch
from .reference import accumulation_dtype

TASKS = ("multiclass", "multilabel")
NEVER = torch.iinfo(torch.int64).min  #: a label that there is not, in the place of an ignore_index


class Classification(nn.CrossEntropyLoss):
    """What :class:`sib_ext.SpatialIBLoss` knows of logits and targets; its arguments are described there."""

    pos_weight: Tensor | None

    def __init__(
        self,
        task: str,
        base: Callable[[Tensor, Tensor], Tensor] | None,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        label_smoothing: float,
        ignore_index: int | None,
        check_values: bool,
    ):
        for name, value in (("weight", weight), ("pos_weight", pos_weight)):
            if value is not None:
                check_tensor(name, value, "a tensor [K]")
        super().__init__(weight=weight, label_smoothing=label_smoothing)
        self.task, self.base, self.ignore_index, self.check_values = task, base, ignore_index, check_values
        self.register_buffer("pos_weight", pos_weight)
        self._classes = 0  #: of the latest logits
        self._check_classification()

    def _check_classification(self) -> None:
        check_choice("task", self.task, TASKS)
        if self.base is not None and (not callable(self.base) or isinstance(self.base, type)):
            raise ValueError(
                f"base must be None or a function of logits and target, such as a module, got {self.base!r}"
            )
        for name in ("weight", "pos_weight"):
            value = getattr(self, name)
            if value is not None and (value.dim() != 1 or not bool((value.isfinite() & (value >= 0)).all())):
                raise ValueError(f"{name} must be finite numbers >= 0, one a class [K], got {describe(value)}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be a number from 0 to 1, got {self.label_smoothing!r}")
        if self.ignore_index is not None and type(self.ignore_index) is not int:
            raise ValueError(f"ignore_index must be None or an integer, got {self.ignore_index!r}")
        unused = {
            "weight": self.base is not None and self.weight is not None,
            "pos_weight": (self.base is not None or not self.is_multilabel) and self.pos_weight is not None,
            "label_smoothing": (self.base is not None or self.is_multilabel) and self.label_smoothing != 0,
            "ignore_index": (self.base is not None or self.is_multilabel) and self.ignore_index is not None,
        }
        for name in (name for name, given in unused.items() if given):
            where = "with a base loss" if self.base is not None else f"for task={self.task!r}"
            raise ValueError(f"{name} has no meaning {where}: leave it out")

    @property
    def is_multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.task == "multilabel"

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy part alone (the ``base`` loss where there is one), a scalar, e.g. for a validation loss
        under ``torch.no_grad``."""
        if self.base is not None or self.is_multilabel:
            return self._of_samples(logits, target).mean()
        return F.cross_entropy(logits, target, **self._of_classes(target))

    def _of_classes(self, target: Tensor) -> dict:
        ignores = self.ignore_index is not None and not target.is_floating_point()
        of_classes = {"weight": self.weight, "label_smoothing": self.label_smoothing}
        return of_classes | {"ignore_index": self.ignore_index if ignores else NEVER}

    def _of_samples(self, logits: Tensor, target: Tensor) -> Tensor:
        """[B], or the mean over the batch, of a loss that is a mean over samples."""
        if self.is_multilabel:
            self.check_labels(target)
            target = target.to(logits.dtype)
        if self.base is None:
            return F.binary_cross_entropy_with_logits(
                logits, target, self.weight, reduction="none", pos_weight=self.pos_weight
            ).mean(1)
        value = self.base(logits, target)
        if not isinstance(value, Tensor) or value.shape not in ((), logits.shape[:1]) or not value.is_floating_point():
            got = describe(value) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"base must return a floating-point scalar or [{len(logits)}], the mean over classes of each sample, "
                f"got {got}"
            )
        if torch.is_grad_enabled() and logits.requires_grad and not value.requires_grad:
            raise ValueError("base returned a value without a gradient: it must not detach the logits")
        return value

    def joined_cross_entropy(self, logits: Tensor, target: Tensor, joined: JoinedBatch) -> Tensor:
        """The cross-entropy of the joined batch."""
        if joined.group is None:
            return self.cross_entropy(logits, target)
        if self.base is not None or self.is_multilabel:
            values = self._of_samples(logits, target)
            return joined.mean(values.to(accumulation_dtype(values.dtype)))
        return joined.cross_entropy(logits, target, **self._of_classes(target))

    def guessing(self, frequency: Tensor | None = None) -> float:
        """The loss of a network that guesses by how often there is what; NaN: of a ``base`` loss it is not known.

        Args:
            frequency: of each label [K], where an image has several.
        """
        if self.base is not None:
            return math.nan
        if self.is_multilabel:
            return guessing_labels(frequency, self.weight, self.pos_weight)
        return math.log(max(self._classes, 2))

    def check_target(self, target: Tensor, logits: Tensor) -> None:
        """
        Raises:
            ValueError: a target that does not fit the logits [B,K], or weights of other classes.
        """
        batch, classes = logits.shape
        self._classes = classes
        for name in ("weight", "pos_weight"):
            if (value := getattr(self, name)) is not None and len(value) != classes:
                raise ValueError(f"{name} has {len(value)} values for {classes} logits: give one a class")
        self.check_shape(target, batch, classes)
        of_indices = not self.is_multilabel and not target.is_floating_point()
        if of_indices and (self.check_values or target.device.type == "cpu"):
            self._check_indices(target, classes)

    def check_shape(self, target: Tensor, batch: int, classes: int | None = None) -> None:
        """``classes``: once the logits have told.

        Raises:
            ValueError: a target of another kind.
        """
        check_tensor("target", target, "a tensor")
        size = "K" if classes is None else classes
        matrix = target.dim() == 2 and len(target) == batch and classes in (None, target.shape[1])
        if self.is_multilabel:
            if not matrix or target.is_complex():
                raise ValueError(
                    f"target must be labels [{batch},{size}] in [0,1] for task='multilabel', got {describe(target)}"
                )
        elif target.is_floating_point():
            if not matrix:
                raise ValueError(
                    f"target has class probabilities, so it must be [{batch},{size}], got {describe(target)}"
                )
        elif target.dtype != torch.int64 or target.shape != (batch,):
            several = "; of several labels an image give the loss task='multilabel'" if matrix else ""
            raise ValueError(
                f"target must be class indices, int64 [{batch}], or class probabilities [{batch},{size}], "
                f"got {describe(target)}{several}"
            )

    def _check_indices(self, target: Tensor, classes: int) -> None:
        if self.ignore_index is not None:
            target = target[target != self.ignore_index]
            if not len(target):
                return
        least, most = (int(v) for v in target.aminmax())
        if least < 0 or most >= classes:
            raise ValueError(f"target must lie in [0,{classes - 1}] for {classes} logits, got {least} to {most}")

    def check_labels(self, target: Tensor) -> None:
        """
        Raises:
            ValueError: several labels an image whose values are out of range.
        """
        if (self.check_values or target.device.type == "cpu") and target.numel() and target.dtype != torch.bool:
            least, most = (float(v) for v in target.detach().aminmax())
            if not (least >= 0 and most <= 1):
                raise ValueError(f"target must lie in [0,1] for task='multilabel', got {least:g} to {most:g}")


def guessing_labels(frequency: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> float:
    """The binary cross-entropy of guessing each of K labels by its frequency [K]; the weights as in
    ``nn.BCEWithLogitsLoss``."""
    positive = frequency if pos_weight is None else pos_weight * frequency
    guess = positive / (positive + 1 - frequency)  # the best there is; of a label that never occurs 0
    each = torch.special.entr(guess) + torch.special.entr(1 - guess)
    each = each * (positive + 1 - frequency)
    return float((each if weight is None else weight * each).mean())
