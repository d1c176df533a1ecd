"""SIBStep, and the ways to take the derivative of a derivative; docs/engines.md."""

from .step import SIBStep

__all__ = ["SIBStep"]
