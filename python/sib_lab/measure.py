"""How often a network is right, and how much of an explanation lies on the object."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .data.digits_on_textures import Split

OBJECT = 0.5  #: a pixel belongs to the object where the mask is above this
BATCH = 200  #: images classified at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over images with what is needed to judge it."""

    mean: float  #: NaN where nothing was defined
    half_width: float  #: of the 95 % interval of the mean over images (normal approximation); NaN for under 2 images
    undefined: int  #: images left out because their value is NaN


def estimate(values: Tensor) -> Estimate:
    """Mean and interval of values [N]; NaN is counted, never averaged in."""
    defined = values[~values.isnan()].double()
    half_width = 1.96 * defined.std().item() / math.sqrt(len(defined)) if len(defined) > 1 else math.nan
    return Estimate(defined.mean().item(), half_width, len(values) - len(defined))


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Predicted class [N] of images x [N,3,H,W], with the network in eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(images).argmax(1) for images in x.split(BATCH)])


def correct(model: nn.Module, split: Split) -> Tensor:
    """1.0 where the prediction is right, else 0.0; [N]."""
    return (predict(model, split.inputs) == split.labels).float()


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of right predictions, in [0,1]."""
    return correct(model, split).mean().item()


def energy_pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """EPG of each image, [N] in [0,1]: share of the map's sum that lies on the object (Wang et al. 2020, Score-CAM).

    Args:
        maps: explanations [N,H,W], >= 0.
        masks: soft object masks [N,1,H,W] in [0,1].

    Returns:
        NaN where the object is empty or the map is zero everywhere.
    """
    on_object = object_pixels(masks)
    total = maps.double().sum((1, 2))
    share = (maps.double() * on_object).sum((1, 2)) / total
    return share.masked_fill(~on_object.any(2).any(1) | (total == 0), math.nan)


def object_pixels(masks: Tensor) -> Tensor:
    """Soft masks [N,1,H,W] -> the object's pixels, boolean [N,H,W]."""
    return masks[:, 0] > OBJECT


def object_share(masks: Tensor) -> Tensor:
    """Share of the image that is object, [N]: the EPG of a map that is the same everywhere, so EPG's chance level."""
    return object_pixels(masks).double().mean((1, 2))
