"""Stronger augmentation of training images, by name; crops and flips are the data set's own (sib_lab/data/base.py)."""

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..data import DataSets
from ..data.base import Transform

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


class TrivialLayers(v2.TrivialAugmentWide):
    """TrivialAugment Wide (Mueller & Hutter 2021) of red, green, blue and mask, [4,H,W]: one random change of random
    strength; the mask follows where pixels move, and stays where only colours change."""

    def forward(self, layers: Tensor) -> Tensor:
        name, (strengths, signed) = self._get_random_item(self._AUGMENTATION_SPACE)
        bins, strength = strengths(self.num_magnitude_bins, *layers.shape[-2:]), 0.0
        if bins is not None:
            sign = -1 if signed and torch.rand(()) <= 0.5 else 1
            strength = sign * float(bins[int(torch.randint(self.num_magnitude_bins, ()))])
        moved = layers if name in GEOMETRIC else layers[:3]
        moved = self._apply_image_or_video_transform(
            tv_tensors.Image(moved), name, strength, interpolation=self.interpolation, fill=self._fill
        ).as_subclass(Tensor)
        return tv_tensors.Image(torch.cat([moved, layers[len(moved) :].as_subclass(Tensor)]))


def add_trivial(data: DataSets) -> None:
    """Lets :class:`TrivialLayers` follow the data's own augmentation of its training images, which it must have."""
    own = data.train.transform
    data.train.transform = Transform(own.fixed, v2.Compose([own.random, TrivialLayers()]), own.seed)
