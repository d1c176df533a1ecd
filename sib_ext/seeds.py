"""Seeds: the scalar s(z) whose gradient with respect to the input is the vector-Jacobian product (VJP) R = ds/dx.

Every seed takes logits z [B,K] and the target (class indices [B], or class probabilities [B,K]) and returns s, summed
over the batch, so that one ``autograd.grad`` gives every sample's own VJP (as long as samples do not mix; BatchNorm
in train mode mixes them slightly, as in the published code).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_choice
from .fused_layers import input_gradients
from .ops.dispatch import without_autocast


def _of_target(values: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point():
        return (values * target).sum()
    return values.gather(1, target[:, None]).sum()


def probability_energy(logits: Tensor, target: Tensor) -> Tensor:
    """s = 1/2 sum_bk p_bk^2, so R = (dp/dx)^T p: the published seed. No label; vanishes for uniform and saturated p."""
    return 0.5 * F.softmax(logits, dim=1).square().sum()


def target_logit(logits: Tensor, target: Tensor) -> Tensor:
    """s = sum_b z_b,y: the evidence for the labelled class; does not saturate."""
    return _of_target(logits, target)


def target_log_prob(logits: Tensor, target: Tensor) -> Tensor:
    """s = sum_b log p_b,y: the seed of right-for-the-right-reasons; vanishes where the network is sure and right."""
    return _of_target(F.log_softmax(logits, dim=1), target)


def logit_sum(logits: Tensor, target: Tensor) -> Tensor:
    """s = sum_bk z_bk: no label, all classes alike."""
    return logits.sum()


def random_logit(logits: Tensor, target: Tensor) -> Tensor:
    """s = sum_b z_b,k, where k is the labelled class or any class, half of the time each, drawn anew every call.

    A term on the label's logit alone leaves evidence against the other classes a way in through the background. Draws
    come from torch's generator of the logits' device.
    """
    # Not one_hot, which torch.compile cannot trace here.
    classes = torch.arange(logits.shape[1], device=logits.device)
    of_target = target if target.is_floating_point() else target[:, None] == classes
    of_any = torch.randint(logits.shape[1], (len(logits), 1), device=logits.device) == classes
    labelled = torch.rand(logits.shape[:1], device=logits.device) < 0.5
    return (logits * torch.where(labelled[:, None], of_target.to(logits), of_any.to(logits))).sum()


#: Seeds that look at the label.
OF_LABELS = ("target_logit", "target_log_prob", "random_logit")
SEEDS = {f.__name__: f for f in (probability_energy, target_logit, target_log_prob, logit_sum, random_logit)}


def vjp(logits: Tensor, x: Tensor, target: Tensor, seed: str = "target_logit", create_graph: bool = True) -> Tensor:
    """R = ds/dx [B,C,H,W]; with ``create_graph`` it can be differentiated again with respect to the parameters.

    Raises:
        ValueError: an unknown ``seed``.
        RuntimeError: ``x`` does not require grad, or ``logits`` were not computed from it.
    """
    check_graph(logits, x, {})
    (R,) = vjps(scalar(logits, target, seed), (x,), create_graph)
    check_vjp(R)
    return R


def check_vjp(R: Tensor | None) -> None:
    """What :func:`vjps` returned for x is one."""
    if R is None:
        raise RuntimeError(
            "logits were not computed from x: pass the very tensor that went into the model, logits = model(x), "
            "not a copy, a cast or a .detach() of it"
        )


def scalar(logits: Tensor, target: Tensor, seed: str) -> Tensor:
    """s(z), in float32 or wider."""
    check_choice("seed", seed, tuple(SEEDS))
    with without_autocast(logits.device.type):
        return SEEDS[seed](logits.float() if logits.dtype in (torch.half, torch.bfloat16) else logits, target)


def vjps(s: Tensor, inputs: Sequence[Tensor], create_graph: bool = True) -> tuple[Tensor | None, ...]:
    """ds/d(input) for each of the inputs (images or feature maps, not parameters); None where s does not depend."""
    return input_gradients((s,), (torch.ones_like(s),), inputs, create_graph)


def check_graph(logits: Tensor, x: Tensor | None, features: Mapping[str, Tensor]) -> None:
    """The logits hang in one graph with x (None: not asked for) and the features, as far as that shows without work."""
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "the S-IB loss needs gradients, but they are switched off here (torch.no_grad or inference_mode): "
            "for a validation loss use criterion.cross_entropy(logits, y), or switch them on"
        )
    if x is not None and not x.requires_grad:
        raise RuntimeError(
            "x does not require grad: call x.requires_grad_() before logits = model(x), or leave the input's terms out "
            "(input_background=0, input_foreground=0)"
        )
    for name, feature_map in features.items():
        if not feature_map.requires_grad:
            raise RuntimeError(
                f"features: {name!r} does not require grad: pass what the logits were computed from, with gradients "
                "on; of a frozen network call .requires_grad_() on it before the rest of the model runs"
            )
    if not logits.requires_grad:
        raise RuntimeError(
            "logits do not require grad: compute them with gradients on, after x.requires_grad_() where the input has "
            "terms"
        )
