"""Spatial Information Bottleneck (S-IB) training for PyTorch (arXiv 2511.09239)."""

from . import functional
from .loss import SIBTerms, SpatialIBLoss
from .ops import MaskedStatistics, density_mask, masked_statistics, use_impl

__version__ = "0.1.0"

__all__ = [
    "MaskedStatistics",
    "SIBTerms",
    "SpatialIBLoss",
    "density_mask",
    "functional",
    "masked_statistics",
    "use_impl",
]
