"""Networks made differentiable twice.

The S-IB loss takes the derivative of a derivative. What stands in its way is put right:

- fused attention kernels have no second derivative: the whole forward runs with the math version;
- nor has ``nn.Hardsigmoid``: it is replaced by the same function made of ``relu6`` (``nn.Hardswish`` has one);
- in-place activations overwrite what a hook has kept: ``inplace`` is switched off.

The names in a model's state dict stay what they are. What cannot be put right from outside: a second derivative that
a custom op does not have, and in-place additions inside a block (ResNet's ``out += identity``), so that hooks belong
on a block or a stage (``layer4``), not on the last BatchNorm in it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class Hardsigmoid(nn.Module):
    """relu6(x + 3)/6, as nn.Hardsigmoid, with a second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


class MathAttention:
    """Mixed into a network's class: its forward computes attention with the math kernel, which has a second derivative.

    Without gradients the fast kernels stay.
    """

    def forward(self, *arguments, **options):
        if not torch.is_grad_enabled():
            return super().forward(*arguments, **options)
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(*arguments, **options)


def make_twice_differentiable(model: nn.Module) -> nn.Module:
    """The same network, changed in place as the head of this file says; state-dict names stay."""
    for module in list(model.modules()):
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
        for name, child in module.named_children():
            if type(child) in _REPLACEMENTS:
                setattr(module, name, _REPLACEMENTS[type(child)]())
    return model if isinstance(model, MathAttention) else mix_in(model, MathAttention)


def mix_in(model: nn.Module, mixin: type) -> nn.Module:
    """The same network, of a class of the same name whose methods are ``mixin``'s first."""
    cls = type(model)
    model.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    return model


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {nn.Hardsigmoid: Hardsigmoid}
