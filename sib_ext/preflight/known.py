"""What is known of a module by its type, and a run in one process on this device would not show."""

from dataclasses import replace

import torch
from torch import nn

from ..passes import is_compiled, unwrapped
from .causes import FIX_ATTENTION, FIX_COMPILED, FIX_CUDNN, FIX_SYNC
from .finding import FAILS, OK, Finding, because_of


def findings_by_type(model: nn.Module) -> list[Finding]:
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


def merged(findings: list[Finding], of_type: list[Finding]) -> list[Finding]:
    """The findings of a run, the model's first, completed by those that go by type."""
    known = {f.module: f for f in of_type}
    together = []
    for finding in findings:
        note = known.pop(finding.module, None)
        if note is not None and finding.status == OK:
            finding = replace(finding, status=note.status, reason=note.reason, fix=note.fix)
        together.append(finding)
    together += known.values()
    if together[0].status == OK and (at_fault := [f for f in together if f.at_fault]):
        together[0] = replace(together[0], status=FAILS, reason=because_of(at_fault))
    return together
