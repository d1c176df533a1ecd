"""Spatial Information Bottleneck (S-IB) training for PyTorch (arXiv 2511.09239)."""

from . import functional
from .engines import SIBStep
from .fused_layers import fused_double_backward
from .guard import CollapseWarning
from .loss import SIBTerms, SpatialIBLoss
from .ops import MaskedStatistics, density_mask, masked_statistics, use_impl
from .preflight import DoubleBackwardReport, Finding, check_double_backward

__version__ = "0.2.0"

__all__ = [
    "CollapseWarning",
    "DoubleBackwardReport",
    "Finding",
    "MaskedStatistics",
    "SIBStep",
    "SIBTerms",
    "SpatialIBLoss",
    "check_double_backward",
    "density_mask",
    "functional",
    "fused_double_backward",
    "masked_statistics",
    "use_impl",
]
