"""batch_norm_backward: the first gradient of batch normalisation on a GPU, at the speed of its memory.

PyTorch's own kernels take two to three times as long there, and a step of the S-IB loss needs this gradient twice.
Elsewhere PyTorch's are used (:mod:`sib_ext.fused_layers`), and so there is no other implementation.
"""

import torch
from torch import Tensor

from . import dispatch

dispatch.LIBRARY.define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)


def _fake(grad, x, mean, rstd, weight):
    return dispatch.empty_field(x), mean.new_empty(x.shape[1]), mean.new_empty(x.shape[1])


torch.library.register_fake("sib_ext::batch_norm_backward", _fake, lib=dispatch.LIBRARY)


def traffic(x: Tensor) -> int:
    """The least bytes: g and x in twice (the sums come first), one gradient out."""
    return 5 * x.nbytes


def batch_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of batch normalisation in train mode; for tensors on a GPU, where native kernels are.

    Args:
        grad: the gradient of the layer's output [B,C,...].
        x: the layer's input, as ``grad``.
        mean, rstd: the statistics of the forward [C], in the accumulation type of x; rstd = 1/sqrt(var + eps).
        weight: the layer's scale [C] in the same type, or None for 1.

    Returns:
        (d/dx as x, d/dweight [C], d/dbias [C]), the formulas of :func:`sib_ext.reference.batch_norm_backward`; not
        differentiable.
    """
    return torch.ops.sib_ext.batch_norm_backward(grad, x, mean, rstd, weight)
