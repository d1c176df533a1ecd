"""The ops: schema, fake kernel, dispatch, autograd and public function, one module each."""

from .density_mask import auto_window, density_mask
from .dispatch import use_impl
from .masked_statistics import MaskedStatistics, masked_statistics
from .norm_double_backward import norm_double_backward

__all__ = ["MaskedStatistics", "auto_window", "density_mask", "masked_statistics", "norm_double_backward", "use_impl"]
