"""What a network expects of its images, kept with the network.

Images are in [-1,1] everywhere in this package; a network whose weights were trained on other numbers brings them there
itself, first thing in its forward. So stored images, explanations and VJPs stay in one space, whatever the network.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NetworkError
from .twice import mix_in

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How images of 0..1 are made a network's input; the default is that of this package's own networks.

    Raises:
        NetworkError: mean or std are not three finite numbers, or a std is not above 0.
    """

    mean: tuple[float, ...] = HALF  #: of red, green, blue in 0..1
    std: tuple[float, ...] = HALF
    size: int | None = None  #: side of the images that the weights were trained on, px; None: unknown
    interpolation: str = "bilinear"  #: of the resizing before: bilinear or bicubic

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or len(values) != 3 or not all(map(_is_finite, values)):
                raise NetworkError(f"{name} must be three numbers, of red, green and blue in 0..1, got {values!r}.")
            object.__setattr__(self, name, tuple(float(v) for v in values))
        if min(self.std) <= 0:
            raise NetworkError(f"std must be above 0 in every channel, got {self.std}.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def of_checkpoint(content: Mapping[str, Any]) -> Preprocessing:
    """That of the network in a checkpoint of this program.

    Raises:
        NetworkError: mean or std are not three numbers.
    """
    if not content.keys() & {"mean", "std"}:
        return Preprocessing()  # older checkpoints say nothing of it: their networks took images in [-1,1]
    return Preprocessing(content.get("mean"), content.get("std"))


class NormalisedInput:
    """Mixed into a network's class: images [B,3,H,W] in [-1,1] -> ((x + 1)/2 - mean)/std, then the network's forward.

    Affine, so the VJP arrives multiplied by 0.5/std of its channel, and second derivatives pass.
    """

    _input_scale: Tensor  #: [3,1,1]
    _input_shift: Tensor  #: [3,1,1]

    def forward(self, x: Tensor, *arguments, **options):
        scaled = x * self._input_scale + self._input_shift
        return super().forward(scaled, *arguments, **options)  # type: ignore[misc]  # the network's


def normalise_input(model: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """The same network, changed in place so that it takes images in [-1,1]; kept as ``model.preprocessing``.

    State-dict names, parameters and submodules stay. With mean and std of 0.5 nothing changes at all.
    """
    model.preprocessing = preprocessing  # type: ignore[assignment]
    if preprocessing.mean == HALF and preprocessing.std == HALF:
        return model
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    model.register_buffer("_input_scale", (0.5 / std).float(), persistent=False)
    model.register_buffer("_input_shift", ((0.5 - mean) / std).float(), persistent=False)
    return mix_in(model, NormalisedInput)
