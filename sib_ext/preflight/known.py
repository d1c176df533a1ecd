"""What is known of a module by its type, and a run in one process on this device would not show."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from ..passes import is_compiled, unwrapped
from .causes import FIX_ATTENTION, FIX_COMPILED, FIX_CUDNN, FIX_SYNC
from .finding import FAILS, OK, Finding, because_of

ATTENTION_ELSEWHERE = (
    "here, where no fused attention kernel was taken; elsewhere, or without dropout, one may be, unless SIBStep runs it"
)


def findings_by_type(model: nn.Module) -> list[Finding]:
    findings, fused = [], _fused_attention_taken()
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    for name, module in {**dict(unwrapped(model).named_modules()), "": model}.items():
        finding = Finding(name.replace("._orig_mod", ""), type(module).__name__, FAILS)
        if type(module) is nn.SyncBatchNorm:
            reason = "SyncBatchNorm has no second derivative once several processes share their statistics"
            findings.append(replace(finding, reason=reason, fix=FIX_SYNC))
        elif is_compiled(module):
            reason = "compiled code is not differentiable twice; what was compiled is checked without torch.compile"
            by_sibstep = module is model and unwrapped(model) is not model
            fix = f"train with sib_ext.SIBStep, which takes it as it is; for the loss alone {FIX_COMPILED}"
            findings.append(replace(finding, reason=reason, fix=fix if by_sibstep else FIX_COMPILED))
        elif isinstance(module, nn.RNNBase) and _on_cpu(module):
            reason = "on a CPU; on a GPU cuDNN's recurrent layers have no second derivative"
            findings.append(replace(finding, status=OK, reason=reason, fix=f"on a GPU, {FIX_CUDNN}"))
        elif isinstance(module, nn.MultiheadAttention) and _on_cpu(module) and fused:
            findings.append(replace(finding, status=OK, reason=ATTENTION_ELSEWHERE, fix=FIX_ATTENTION))
    return findings


def _on_cpu(module: nn.Module) -> bool:
    return all(p.device.type == "cpu" for p in module.parameters())


def _fused_attention_taken() -> bool:
    """Not under sdpa_kernel(MATH), nor where SIBStep's rules hold."""
    query = torch.zeros(1, 1, 1, 8, requires_grad=True)
    return "Attention" in F.scaled_dot_product_attention(query, query, query).grad_fn.name()


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
