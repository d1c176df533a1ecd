"""Argument checks: each error names the argument, what was given and what to do."""

import sys
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor


def levels_to_the_caller() -> int:
    """The ``stacklevel`` of the first line outside sib_ext and torch, for a warning of the function that calls this."""
    frame, level = sys._getframe(1), 1
    inside = (f"{__package__}.", "torch.")
    while frame.f_back and f"{frame.f_globals.get('__name__', '')}.".startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def describe(value) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor {list(value.shape)} on {value.device}"
    return repr(value)


def check_tensor(name: str, value, meaning: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be {meaning}, got {type(value).__name__}: pass a torch.Tensor")


def check_field(name: str, field) -> None:
    """A floating-point [B,C,H,W] with pixels and channels (the batch may be empty)."""
    check_tensor(name, field, "a tensor [B,C,H,W]")
    if field.dim() != 4:
        raise ValueError(f"{name} must have the four dimensions [B,C,H,W], got {describe(field)}")
    if not field.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {describe(field)}: convert it, e.g. {name}.float() / 255")
    if 0 in field.shape[1:]:
        raise ValueError(f"{name} must have at least one channel and one pixel, got {describe(field)}")


def check_same(name: str, field: Tensor, other_name: str, other: Tensor) -> None:
    if field.shape != other.shape or field.device != other.device:
        raise ValueError(
            f"{name} must have the size and device of {other_name} ({describe(other)}), got {describe(field)}"
        )


def check_mask_shape(name: str, mask, field: Tensor) -> None:
    check_tensor(name, mask, "a tensor [B,1,H,W]")
    batch, _, height, width = field.shape
    if mask.shape != (batch, 1, height, width) or mask.device != field.device:
        raise ValueError(
            f"{name} must be [{batch},1,{height},{width}] on {field.device} to fit the images, got {describe(mask)}: "
            "resize it together with the images"
        )


def check_window(name: str, window) -> int:
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"{name} must be an odd number of pixels (1, 3, 5, ...) or 'auto', got {window!r}")
    return window


def check_positive(name: str, value, zero: bool = False) -> None:
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not (0 <= value < float("inf")) or (value == 0 and not zero):
        raise ValueError(f"{name} must be a finite number {'>= 0' if zero else '> 0'}, got {value!r}")


def check_share(name: str, value) -> None:
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not 0 < value < 1:
        raise ValueError(f"{name} must be a share between 0 and 1 (both excluded), got {value!r}")


def check_choice(name: str, value, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")


def check_finite(name: str, value: Tensor) -> None:
    """Costs a synchronisation on a GPU."""
    bad = value.numel() - int(torch.isfinite(value).sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} NaN or Inf among its {value.numel()} values: look for the step that made them"
        )
