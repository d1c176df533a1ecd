"""From an error message to what it means and what to do."""

import re
from typing import NamedTuple

from .errors import NoPath, NotFinite
from .graph import is_once_differentiable
from .twin import first_line


class Cause(NamedTuple):
    pattern: str  #: regular expression for the error message
    reason: str
    fix: str


FIX_ATTENTION = (
    "train with sib_ext.SIBStep (and check inside sib_ext.fused_double_backward()); for the loss alone run the model "
    "under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
)
FIX_CUDNN = "run the model under torch.backends.cudnn.flags(enabled=False)"
FIX_SYNC = "use nn.BatchNorm2d (statistics of each process's own batch) or nn.GroupNorm"
FIX_COMPILED = "train with the model that was given to torch.compile, not with the compiled one"
FIX_NOT_FINITE = "keep it away from zero: (x.square().sum() + eps).sqrt(), a / (b + eps)"
FIX_UNKNOWN = "replace it by operations that PyTorch differentiates twice"
FIX_CUT = (
    "look in its forward and hooks for .detach(), .data, torch.no_grad and straight-through estimators "
    "on the path from x to the logits"
)
FIX_FUNCTION = (
    "write its backward with differentiable operations on ctx.saved_tensors, of which only inputs and outputs of the "
    "Function count (no .detach(), .data or attributes of ctx), and try it with torch.autograd.gradgradcheck"
)
NO_PATH = "no gradient flows from its input to its output (argmax, rounding, .detach() or a constant)"
NOT_FINITE = "the VJP or its derivative is NaN or infinite (a norm, root, power or quotient at zero)"
ONCE = "once_differentiable"
CAUSES = (
    Cause(
        r"scaled_dot_product|flash_attention|efficient_attention|cudnn_attention",
        "a fused attention kernel has no second derivative: SIBStep takes PyTorch's math kernel instead by itself, the "
        "loss alone does not",
        FIX_ATTENTION,
    ),
    Cause(
        r"hardsigmoid_backward",
        "hardsigmoid has no second derivative in PyTorch",
        "replace it by torch.nn.functional.relu6(x + 3) / 6, the same function",
    ),
    Cause(
        r"_cdist_backward|_pdist_backward",
        "cdist and pdist have no second derivative",
        "take (a.unsqueeze(-2) - b.unsqueeze(-3)).norm(dim=-1), or for p = 2 "
        "torch.cdist(..., compute_mode='use_mm_for_euclid_dist')",
    ),
    Cause(
        r"grid_sampler",
        "grid_sample has no second derivative",
        "sample with indexing and bilinear weights, or keep it off the path from x to the logits",
    ),
    Cause(
        ONCE,
        "the backward of a custom autograd Function is marked once_differentiable: it raises under loss.backward() "
        "and is silently wrong under torch.autograd.grad(loss, parameters)",
        "write that backward with differentiable operations and take the mark away",
    ),
    Cause(
        r"use_reentrant=True|Checkpointing is not compatible with \.grad\(\)",
        "reentrant activation checkpointing does not work with torch.autograd.grad",
        "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    ),
    Cause(
        r"cudnn_rnn|CuDNN RNN|cudnn RNN",
        "cuDNN's recurrent layers have no second derivative",
        FIX_CUDNN,
    ),
    Cause(
        r"batch_norm_backward_(elemt|reduce)",
        "SyncBatchNorm has no second derivative",
        FIX_SYNC,
    ),
    Cause(
        r"does not currently support double backward",
        "compiled code is not differentiable twice",
        FIX_COMPILED,
    ),
    Cause(
        r"modified (by an )?in-?place|used in an in-place operation|modifies? .* in-?place",
        "an in-place operation overwrites a tensor that the derivatives, or a hook, still need",
        "make it out of place: inplace=False, y = y + a instead of y += a",
    ),
    Cause(
        r"Inference tensors",
        "a tensor made under torch.inference_mode takes part in the forward",
        "make it outside inference_mode, or clone it",
    ),
)
NOT_IMPLEMENTED = re.compile(r"derivative for '?(?:aten::)?([\w.]+?)(?:_backward)?'? is not implemented")


def explain(error: Exception, functions: list[type]) -> tuple[str, str]:
    """Reason and fix of an exception; ``functions`` are the custom autograd Functions that ran."""
    if isinstance(error, NoPath):
        return NO_PATH, FIX_CUT
    if isinstance(error, NotFinite):
        return NOT_FINITE, FIX_NOT_FINITE
    message = str(error)
    for cause in CAUSES:
        if re.search(cause.pattern, message, re.IGNORECASE):
            marked = [f for f in functions if is_once_differentiable(f)] if cause.pattern == ONCE else []
            return cause.reason + _here(marked), cause.fix
    if missing := NOT_IMPLEMENTED.search(message):
        return f"{missing[1]} has no second derivative in PyTorch", FIX_UNKNOWN
    return f"{type(error).__name__}: {first_line(error)}{_here(functions)}", FIX_FUNCTION if functions else FIX_UNKNOWN


def _here(functions: list[type]) -> str:
    return f" (here: {named(functions)})" if functions else ""


def named(functions: list[type]) -> str:
    plural = "s" if len(functions) > 1 else ""
    return f"the custom autograd Function{plural} {' and '.join(f.__name__ for f in functions)}"
