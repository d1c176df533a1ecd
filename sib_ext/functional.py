"""What :class:`sib_ext.SpatialIBLoss` is made of, in functional form: ops, seeds, masks and estimators."""

from .estimators import (
    background_energy,
    background_energy_ratio,
    background_gaussian,
    background_magnitude_ratio,
    background_variance,
    class_activation,
    foreground_capacity,
    foreground_cka,
    foreground_gaussian,
    foreground_hsic,
    foreground_hsic_unbiased,
    foreground_log_capacity,
    magnitude,
    normalised_gram,
    relative_noise,
)
from .masks import boxes_to_mask, hard_density_mask, mean_sigmoid_mask, top_p_mask
from .mixing import mixed
from .ops import auto_window, density_mask, masked_statistics
from .seeds import logit_sum, probability_energy, random_logit, target_log_prob, target_logit, vjp

__all__ = [
    "auto_window",
    "background_energy",
    "background_energy_ratio",
    "background_gaussian",
    "background_magnitude_ratio",
    "background_variance",
    "boxes_to_mask",
    "class_activation",
    "density_mask",
    "foreground_capacity",
    "foreground_log_capacity",
    "foreground_cka",
    "foreground_gaussian",
    "foreground_hsic",
    "foreground_hsic_unbiased",
    "hard_density_mask",
    "logit_sum",
    "magnitude",
    "masked_statistics",
    "mean_sigmoid_mask",
    "mixed",
    "normalised_gram",
    "probability_energy",
    "random_logit",
    "relative_noise",
    "target_log_prob",
    "target_logit",
    "top_p_mask",
    "vjp",
]
