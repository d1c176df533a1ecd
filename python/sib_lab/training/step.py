"""The parts of one optimiser step."""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data import Item
from .config import TrainConfig
from .losses import Forward, TrainingLoss
from .runs import DivergedError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Image, label, mask (None where no sample has one) and annotated (None where all have).
Images = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def on_device(item: Item, fabric: "Fabric") -> Images:
    """The images of a step where they are trained on."""
    x, y = fabric.to_device((item.image, item.label))
    known = torch.as_tensor(item.annotated, dtype=torch.bool)
    if not known.any():
        return x, y, None, None
    mask = fabric.to_device(item.mask)
    return x, y, mask, None if known.all() else fabric.to_device(known)


def seed_step(seed: int, step: int, fabric: "Fabric") -> None:
    """Sets the generators that a network may draw from (dropout) for this step of this process."""
    words = np.random.SeedSequence([seed, step, fabric.global_rank])
    key = int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.default_generator.manual_seed(key)
    if fabric.device.type == "cuda":
        torch.cuda.manual_seed(key)


def backward(
    criterion: TrainingLoss, model: Forward, images: Images, accumulate: int, fabric: "Fabric"
) -> dict[str, Tensor]:
    """Adds up the gradient of a step; the parts of its loss.

    Of ``accumulate`` batches the loss is the mean of theirs; S-IB's is that of all their images together, computed in
    parts (see ``takes_whole_steps``).
    """
    batches = [images] if criterion.takes_whole_steps else list(in_batches(images, accumulate))
    found: dict[str, list[Tensor]] = {}
    for number, batch in enumerate(batches, 1):
        # Processes exchange their gradients once a step, with its last batch.
        waits = number < len(batches) and hasattr(model.module, "no_sync")
        with model.module.no_sync() if waits else nullcontext():  # type: ignore[operator]
            parts = criterion(model, *batch)
            fabric.backward(parts["loss"] / len(batches))
        for name, value in parts.items():
            found.setdefault(name, []).append(value.detach().double())
    return {name: torch.stack(values).mean() for name, values in found.items()}


def in_batches(images: Images, count: int) -> Iterator[Images]:
    """The images of a step as ``count`` batches of one size, in order."""
    parts = [(None,) * count if values is None else values.chunk(count) for values in images]
    return zip(*parts, strict=True)


def agreed(
    parts: Mapping[str, Tensor], flags: tuple[float, ...], fabric: "Fabric"
) -> tuple[dict[str, float], tuple[float, ...]]:
    """Loss parts, averaged over the processes, and flags, the highest of any process, as numbers."""
    values = torch.stack([value.detach().double() for value in parts.values()])
    if fabric.world_size > 1:
        values = fabric.all_reduce(values, reduce_op="mean")
        flags = fabric.all_reduce(torch.tensor(flags, device=values.device), reduce_op="max").tolist()
    return dict(zip(parts, values.tolist(), strict=True)), tuple(flags)


def check_finite(values: Mapping[str, float], config: TrainConfig, where: str) -> None:
    """
    Raises:
        DivergedError: the loss or its gradient is not finite; ``where`` names the step.
    """
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            lower = "a lower learning rate" if config.method == "ce" else "a lower learning rate or strength"
            precise = "" if config.precision == "32-true" else ", or precision 32-true"
            raise DivergedError(
                f"The {name.replace('_', ' ')} is {values[name]} at {where}: train anew with {lower}{precise}."
            )
