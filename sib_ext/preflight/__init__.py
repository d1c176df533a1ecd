"""Preflight: can a network be trained with the S-IB loss? Asked before training."""

from .finding import Finding
from .report import DoubleBackwardReport, check_double_backward

__all__ = ["DoubleBackwardReport", "Finding", "check_double_backward"]
