"""Explanations that average many gradients: Integrated Gradients and SmoothGrad, by captum."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor

IG_STEPS = 32  #: points between the image of zeros and the image (Gauss-Legendre)
SMOOTHGRAD_SAMPLES = 16
SMOOTHGRAD_NOISE = 0.15  #: standard deviation, as a share of the image's own range (highest less lowest value)


def integrated_gradients(forward: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, batch: int) -> Tensor:
    """sum_c of the absolute Integrated Gradients from the image of zeros."""
    attributions = IntegratedGradients(forward).attribute(
        x, baselines=0.0, target=target, n_steps=IG_STEPS, internal_batch_size=max(batch, len(x))
    )
    return attributions.detach().abs().sum(1)


def smoothgrad(
    forward: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, batch: int, seed: int, rows: Sequence[int]
) -> Tensor:
    """sum_c of the absolute mean gradient (Smilkov et al. 2017: the mean is taken with its sign)."""
    at_once = min(SMOOTHGRAD_SAMPLES, batch)
    images = batch // at_once
    parts = []
    for start in range(0, len(x), images):
        some = x[start : start + images]
        tunnel = SeededNoiseTunnel(Saliency(forward), seed, rows[start : start + images])
        gradients = tunnel.attribute(
            some,
            nt_type="smoothgrad",
            nt_samples=SMOOTHGRAD_SAMPLES,
            nt_samples_batch_size=at_once,
            stdevs=SMOOTHGRAD_NOISE,
            target=target[start : start + images],
            abs=False,
        )
        if tunnel.drawn != SMOOTHGRAD_SAMPLES:
            raise RuntimeError(
                "this captum version draws SmoothGrad's noise past SeededNoiseTunnel: use captum 0.8 or 0.9"
            )
        parts.append(gradients.detach().abs().sum(1))
    return torch.cat(parts)


class SeededNoiseTunnel(NoiseTunnel):
    """captum's NoiseTunnel, with noise that follows from a seed and the image's row alone, on every device.

    ``stdevs`` is a share of each image's own range.
    """

    def __init__(self, attribution_method: Saliency, seed: int, rows: Sequence[int]):
        super().__init__(attribution_method)
        self._generators = [np.random.default_rng([seed, row]) for row in rows]
        self.drawn = 0  #: samples an image so far

    def _add_noise_to_input(self, input: Tensor, stdev: float, nt_samples_partition: int) -> Tensor:
        self.drawn += nt_samples_partition
        shape = (nt_samples_partition, *input.shape[1:])
        noise = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in self._generators])
        pixels = input.flatten(1)
        scale = stdev * (pixels.amax(1) - pixels.amin(1))
        noise = torch.from_numpy(noise).to(input) * scale.view(-1, 1, 1, 1, 1)
        return (input[:, None] + noise).flatten(0, 1)
