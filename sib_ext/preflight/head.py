"""What runs after a feature map: all that terms at that map alone differentiate twice."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..engines.double_backward import differentiable
from ..fused_layers import input_gradients
from ..layers import captured
from .errors import NotFinite, Unseen

REENTRANT = "CheckpointFunctionBackward"


class Head(nn.Module):
    """feature map -> what the model returns for x with that map in the place of its own.

    Raises:
        Unseen: the map is computed in a reentrant checkpoint, which puts its own function in the place of any other's.
    """

    def __init__(self, model: nn.Module, x: Tensor, place: str):
        super().__init__()
        self.model, self.x, self.place = model, x.detach(), place
        self.runs = 0  #: of the place in a forward pass; the last one counts

    def feature_map(self) -> Tensor:
        """The model's own.

        Raises:
            ValueError: the place does not run.
        """
        self.runs = 0

        def count(tensor: Tensor) -> None:
            self.runs += 1

        with torch.no_grad(), captured(self.model, (self.place,), count) as found:
            self.model(self.x.clone())
        if not found:
            raise ValueError(f"layers: {self.place!r} did not run in the forward pass: name one that does")
        return found[self.place].detach().clone()

    def forward(self, feature_map: Tensor):
        runs = 0

        def instead(tensor: Tensor) -> Tensor | None:
            nonlocal runs
            runs += 1
            # No leaf, so that the model may overwrite it; what runs before may be frozen under no_grad.
            with torch.set_grad_enabled(feature_map.requires_grad):
                return feature_map.clone() if runs == self.runs else None

        with captured(self.model, (self.place,), instead) as found:
            output = self.model(self.x.clone())
        if self.place in found and type(found[self.place].grad_fn).__name__ == REENTRANT:
            raise Unseen("the feature map is computed in a reentrant checkpoint")
        return output


def ordinary_backward(model: nn.Module, x: Tensor, logits: Callable, place: str) -> None:
    """The passes of a step with terms at that feature map alone.

    Raises:
        NotFinite: a gradient is NaN or infinite.
        Exception: whatever the step would raise.
    """

    def reached(tensor: Tensor) -> Tensor | None:
        return None if tensor.requires_grad else differentiable(tensor)

    with captured(model, (place,), reached) as found:
        outputs = logits(model(x.detach().clone()))
    s = sum(z.float().square().sum() for z in outputs)
    (vjp,) = input_gradients((s,), (torch.ones_like(s),), (found[place],))
    loss = s if vjp is None else s + vjp.float().square().sum()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    half = any(g.dtype in (torch.half, torch.bfloat16) for g in gradients)
    if not half and not all(bool(g.isfinite().all()) for g in gradients):
        raise NotFinite
