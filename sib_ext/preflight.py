"""Preflight: does a network support the derivative of a derivative that the S-IB loss needs? Asked before training.

The loss depends on the vector-Jacobian product (VJP) R = ds/dx, so its parameter gradient differentiates a backward
pass. Some operations refuse that, and some give a wrong gradient without a word. :func:`check_double_backward` takes
the gradient of a random projection of R by double backward and compares it with central differences of R in float64.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .passes import is_compiled, unwrapped
from .probe import FAILS, OK, UNVERIFIED, WRONG, NoPath, NotFinite, Probe, in_float64, to_float64, to_general_position
from .twin import (
    check_forward,
    check_images,
    check_module,
    first_line,
    reseed,
    twin,
    undisturbed,
)

__all__ = ["DoubleBackwardReport", "Finding", "check_double_backward"]


class Cause(NamedTuple):
    pattern: str  #: regular expression for the error message
    reason: str
    fix: str


FIX_ATTENTION = "run the model under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
FIX_CUDNN = "run the model under torch.backends.cudnn.flags(enabled=False)"
FIX_SYNC = "use nn.BatchNorm2d (statistics of each process's own batch) or nn.GroupNorm"
FIX_COMPILED = "train with the model that was given to torch.compile, not with the compiled one"
CAUSES = (
    Cause(
        r"scaled_dot_product|flash_attention|efficient_attention|cudnn_attention",
        "a fused attention kernel has no second derivative",
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
        r"once_differentiable",
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
REWRITE = "replace it by operations that PyTorch differentiates twice"
FIX_FUNCTION = (
    "write its backward with differentiable operations on ctx.saved_tensors, of which only inputs and outputs of the "
    "Function count (no .detach(), .data or attributes of ctx), and try it with torch.autograd.gradgradcheck"
)
FIX_CUT = (
    "look in its forward and hooks for .detach(), .data, torch.no_grad and straight-through estimators "
    "on the path from x to the logits"
)
NO_PATH = "no gradient flows from its input to its output (argmax, rounding, .detach() or a constant)"
NO_VJP_YET = (
    "its VJP is zero at the present parameters (a last layer that starts with zeros?), "
    "so the information terms only act once training has moved them"
)
NOT_FINITE = "the VJP or its derivative is NaN or infinite (a norm, root, power or quotient at zero)"
FIX_NOT_FINITE = "keep it away from zero: (x.square().sum() + eps).sqrt(), a / (b + eps)"


@dataclass(frozen=True)
class Finding:
    """What was found out about one module."""

    module: str  #: its name in the model; "" is the model itself
    type: str  #: its class
    status: str  #: "ok", "fails", "silently wrong" or "unverified"
    reason: str = ""
    fix: str = ""
    error: float = math.nan  #: relative error of double backward against central differences; NaN: not compared


@dataclass(frozen=True)
class DoubleBackwardReport:
    """What :func:`check_double_backward` found; ``print`` it."""

    #: The model itself first; then, if it is not ok, the modules that were looked at, in the model's order.
    findings: tuple[Finding, ...]
    #: Names of modules with kinks (see :func:`has_kinks`).
    kinks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """No module fails or is silently wrong. (``verified`` also asks for numbers that confirm it.)"""
        return not self.failures

    @property
    def verified(self) -> bool:
        """ok, and central differences confirm the whole model's double backward."""
        return self.ok and self.findings[0].status == OK

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.status in (FAILS, WRONG))

    def raise_for_failure(self) -> "DoubleBackwardReport":
        """Raise RuntimeError with this table unless ``ok``; returns self."""
        if not self.ok:
            raise RuntimeError(str(self))
        return self

    def __str__(self) -> str:
        shown = [f for f in self.findings if f.module == "" or f.status != OK or f.reason]
        rows = [("module", "type", "status", "relative error")]
        for f in shown:
            rows.append((f.module or "(model)", f.type, f.status, "" if math.isnan(f.error) else f"{f.error:.1e}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        table = lines[:1]
        for line, finding, following in zip(lines[1:], shown, [*shown[1:], None], strict=True):
            table.append(line)
            if following is None or (finding.reason, finding.fix) != (following.reason, following.fix):
                table += [f"    {key}: {text}" for key, text in (("why", finding.reason), ("fix", finding.fix)) if text]
        if hidden := len(self.findings) - len(shown):
            table.append(f"{hidden} other modules: ok")
        if self.kinks:
            table.append(f"{len(self.kinks)} modules with kinks, for finite differences: {_listed(self.kinks)}")
        return "\n".join(table)


def check_double_backward(model: nn.Module, x: Tensor) -> DoubleBackwardReport:
    """Find out whether ``model`` can be trained with the S-IB loss, and if not, which module cannot and what to do.

    The parameter gradient of <u, R>, with R = ds/dx the VJP of a smooth scalar s of the outputs and u random, is taken
    by double backward: in the model's own precision, to see whether it runs, and in float64 along random directions of
    the parameters, where it must equal central differences of R to 1e-4. If the whole model does not pass, its modules
    are tried one by one with the inputs that they received, down to those at fault.

    Works on a copy: the model, its gradients, mode, hooks and the random number generators stay as they are (forward
    hooks run, so what they record elsewhere grows). The copy's parameters move by 5 %, away from special points such as
    gains of zero. What is found holds for the device, mode, autocast and attention contexts of the call.

    Args:
        model: in the mode it will be trained in, with at least one parameter that requires grad. Wrapped models
            (DataParallel, DistributedDataParallel, torch.compile) are unwrapped.
        x: a batch of images [B,C,H,W] as in training, floating point, on the model's device; small images will do.

    Raises:
        ValueError: ``model`` is not a module, has no trainable parameter, cannot be copied or does not accept ``x``;
            ``x`` is not a batch of images.
    """
    check_module(model)
    check_images(x)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no parameter that requires grad: there is nothing to train")
    of_type = _findings_by_type(model)
    with undisturbed(x):
        copied = twin(model)
        check_forward(copied, x)
        silent = _has_no_vjp(copied, x)
        to_general_position(copied)
        findings = _merged(_Search(copied, x).findings(), of_type)
    if silent and findings[0].status == OK:
        findings[0] = replace(findings[0], reason=NO_VJP_YET)
    return DoubleBackwardReport(tuple(findings))


def _has_no_vjp(model: nn.Module, x: Tensor) -> bool:
    """R is zero at the parameters as they are."""
    try:
        Probe(model, ((x.detach().clone().requires_grad_(),), {}), whole=True).projected_vjp(create_graph=False)
    except NoPath:
        return True
    except Exception:  # a finding of the search
        return False
    return False


# ------------------------------------------------------------------------------------------ verdicts and their causes


def _judge(name: str, own: nn.Module, double: nn.Module, inputs: tuple, whole: bool) -> Finding:
    """Does double backward run in the module's own precision, and is it right in float64?"""
    finding = Finding(name, type(own).__name__, OK)
    probe = Probe(own, inputs, whole)
    try:
        probe.differentiate()
    except Exception as error:
        return _failed(finding, error, probe.functions)
    own.zero_grad()
    try:
        with in_float64(probe.leaves[0].device.type) as mode:
            probe = Probe(double, to_float64(inputs), whole)
            status, difference = probe.compare()
    except (NotFinite, torch.OutOfMemoryError) as error:
        return _failed(finding, error, probe.functions)
    except Exception as error:
        return _unverified(finding, f"in float64 it raises {type(error).__name__}: {first_line(error)}")
    if status == WRONG and mode.narrowed:
        return _unverified(finding, "a part of it computes in less than float64 whatever it is given")
    if status == WRONG:
        reason, fix = _explain_wrong(probe.functions)
        return replace(finding, status=WRONG, reason=reason, fix=fix, error=difference)
    if status == UNVERIFIED:
        return _unverified(finding, "central differences are too noisy here", "check with more or larger images")
    return replace(finding, error=difference)


def _unverified(finding: Finding, why: str, fix: str = "") -> Finding:
    return replace(finding, status=UNVERIFIED, reason=f"runs, but could not be verified: {why}", fix=fix)


def _failed(finding: Finding, error: Exception, functions: list[type]) -> Finding:
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    reason, fix = _explain(error, functions)
    return replace(finding, status=FAILS, reason=reason, fix=fix)


def _explain(error: Exception, functions: list[type]) -> tuple[str, str]:
    """Reason and fix of an exception."""
    if isinstance(error, NoPath):
        return NO_PATH, FIX_CUT
    if isinstance(error, NotFinite):
        return NOT_FINITE, FIX_NOT_FINITE
    message = str(error)
    involved = f" (custom autograd Functions here: {', '.join(f.__name__ for f in functions)})" if functions else ""
    for cause in CAUSES:
        if re.search(cause.pattern, message, re.IGNORECASE):
            return cause.reason + involved, cause.fix
    if missing := NOT_IMPLEMENTED.search(message):
        return f"{missing[1]} has no second derivative in PyTorch" + involved, REWRITE
    return f"{type(error).__name__}: {first_line(error)}{involved}", FIX_FUNCTION if functions else REWRITE


def _explain_wrong(functions: list[type]) -> tuple[str, str]:
    if functions:
        return (
            f"the backward of the custom autograd Function {' or '.join(f.__name__ for f in functions)} drops a part "
            "of its own derivative: it is marked once_differentiable, detaches, or uses constants saved in the forward",
            FIX_FUNCTION,
        )
    return "a part of the gradient's own derivative is dropped, or the gradient is not that of the forward", FIX_CUT


# ---------------------------------------------------------------------------------------------------------- the search


def _because_of(modules: list[str]) -> str:
    return f"because of {_listed(modules)}"


def _listed(modules: Sequence[str], most: int = 4) -> str:
    names = [name or "(model)" for name in modules]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Search:
    """Down the tree of modules, from the model to those at fault."""

    def __init__(self, model: nn.Module, x: Tensor):
        self.own, self.double = model, twin(model).double()
        self.x = x.detach().clone().requires_grad_()
        self.calls: dict[str, list[tuple]] = {}
        self.no_path = False

    def findings(self) -> list[Finding]:
        whole = _judge("", self.own, self.double, ((self.x,), {}), whole=True)
        if whole.status == OK:
            return [whole]
        self.no_path = whole.reason == NO_PATH
        self.calls = _recorded_calls(self.own, self.x)
        below = self._below("", self.own)
        if at_fault := [f.module for f in below if f.status in (FAILS, WRONG)]:
            whole = replace(whole, reason=_because_of(at_fault), fix="")
        return [whole, *below]

    def _below(self, name: str, module: nn.Module) -> list[Finding]:
        """Findings on what ``module`` calls; one that does not pass gives way to those inside it that do not."""
        findings = []
        for child_name, child in self._called_by(name, module):
            finding = self._judge(child_name, child)
            if finding is None:
                continue
            inside = self._below(child_name, child) if finding.status in (FAILS, WRONG) else []
            if any(f.status in (FAILS, WRONG) for f in inside):
                findings += inside
            else:
                findings += [finding, *inside]
        return findings

    def _called_by(self, name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The nearest modules inside that were called (a ModuleList, for one, never is)."""
        for key, child in module.named_children():
            child_name = f"{name}.{key}" if name else key
            if child_name in self.calls:
                yield child_name, child
            else:
                yield from self._called_by(child_name, child)

    def _judge(self, name: str, module: nn.Module) -> Finding | None:
        """The worst of the module's different calls; None: off the path from x."""
        worst = None
        for inputs in self.calls[name]:
            finding = _judge(name, module, self.double.get_submodule(name), inputs, whole=False)
            if finding.reason == NO_PATH and not self.no_path:
                finding = replace(finding, status=OK, reason="", fix="")  # a side branch, as it should be
            if finding.status in (FAILS, WRONG):
                return finding
            worst = finding if worst is None or finding.status == UNVERIFIED else worst
        return worst


def _recorded_calls(model: nn.Module, x: Tensor) -> dict[str, list[tuple]]:
    """The inputs (args, kwargs) of every module on the path from x, once for each combination of shapes and types."""
    calls: dict[str, dict] = {}

    def hook(name: str) -> Callable:
        def record(_, args, kwargs):
            values, spec = tree_flatten((args, kwargs))
            kept = [v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in values]
            if any(isinstance(v, Tensor) and v.requires_grad for v in kept):
                signature = str([(v.shape, v.dtype, v.requires_grad) if isinstance(v, Tensor) else v for v in kept])
                calls.setdefault(name, {}).setdefault(signature, tree_unflatten(kept, spec))

        return record

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in model.named_modules() if n]
    try:
        reseed(x.device)
        model(x)
    except Exception:
        pass  # the model's own finding says so; what ran until then is recorded
    finally:
        for handle in handles:
            handle.remove()
    return {name: list(recorded.values()) for name, recorded in calls.items()}


# -------------------------------------------------------------------------------------------- known without running


def _findings_by_type(model: nn.Module) -> list[Finding]:
    """What a run in one process on this device would not show."""
    findings = []
    for name, module in {**dict(unwrapped(model).named_modules()), "": model}.items():
        finding = Finding(name.replace("._orig_mod", ""), type(module).__name__, FAILS)
        if type(module) is nn.SyncBatchNorm:
            reason = "SyncBatchNorm has no second derivative once several processes share their statistics"
            findings.append(replace(finding, reason=reason, fix=FIX_SYNC))
        elif is_compiled(module):
            reason = "compiled code is not differentiable twice; what was compiled is checked without torch.compile"
            findings.append(replace(finding, reason=reason, fix=FIX_COMPILED))
        elif isinstance(module, nn.RNNBase) and _on_cpu(module):
            reason = "on a CPU; on a GPU cuDNN's recurrent layers have no second derivative"
            findings.append(replace(finding, status=OK, reason=reason, fix=f"on a GPU, {FIX_CUDNN}"))
        elif isinstance(module, nn.MultiheadAttention) and _on_cpu(module) and _fused_attention_allowed():
            reason = "here, where no fused attention kernel was taken; elsewhere, or without dropout, one may be"
            findings.append(replace(finding, status=OK, reason=reason, fix=FIX_ATTENTION))
    return findings


def _on_cpu(module: nn.Module) -> bool:
    return all(p.device.type == "cpu" for p in module.parameters())


def _fused_attention_allowed() -> bool:
    """Not under sdpa_kernel(MATH)."""
    return torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()


def _merged(findings: list[Finding], of_type: list[Finding]) -> list[Finding]:
    known = {f.module: f for f in of_type}
    merged = []
    for finding in findings:
        note = known.pop(finding.module, None)
        if note is not None and finding.status == OK:
            finding = replace(finding, status=note.status, reason=note.reason, fix=note.fix)
        merged.append(finding)
    merged += known.values()
    if merged[0].status == OK and (at_fault := [f.module for f in merged if f.status == FAILS]):
        merged[0] = replace(merged[0], status=FAILS, reason=_because_of(at_fault))
    return merged
