"""The question, whether a network supports the derivative of a derivative that the S-IB loss needs, and its answer.

The loss depends on the vector-Jacobian product (VJP) R = ds/dx, so its parameter gradient differentiates a backward
pass. Some operations refuse that, and some give a wrong gradient without a word. :func:`check_double_backward` takes
the gradient of a random projection of R by double backward and compares it with central differences of R in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..outputs import logits_of
from .finding import OK, Finding
from .known import findings_by_type, merged
from .probe import NoPath, Probe, to_general_position
from .search import Search
from .twin import check_forward, check_images, check_module, twin, undisturbed

NO_VJP_YET = (
    "its VJP is zero at the present parameters (a last layer that starts with zeros?), "
    "so the information terms only act once training has moved them"
)


@dataclass(frozen=True)
class DoubleBackwardReport:
    """What :func:`check_double_backward` found; ``print`` it."""

    #: The model itself first; then, if it is not ok, the modules that were looked at, in the model's order.
    findings: tuple[Finding, ...]

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
        return tuple(f for f in self.findings if f.at_fault)

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
        return "\n".join(table)


def check_double_backward(model: nn.Module, x: Tensor, output: Callable | None = None) -> DoubleBackwardReport:
    """Find out whether ``model`` can be trained with the S-IB loss, and if not, which module cannot and what to do.

    The parameter gradient of <u, R>, with R = ds/dx the VJP of a smooth scalar s of the logits and u random, is taken
    by double backward: in the model's own precision, to see whether it runs, and in float64 along random directions of
    the parameters, where it must equal central differences of R to 1e-4. If the whole model does not pass, its modules
    between x and the logits are tried one by one with the inputs that they received, down to those at fault.

    Works on a copy: the model, its gradients, mode, hooks, what they hold and the random number generators stay as
    they are. The copy's parameters move by 5 %, away from special points such as gains of zero. What is found holds for
    the device, mode, autocast and attention contexts of the call: inside ``sib_ext.fused_double_backward()`` it is what
    :class:`sib_ext.SIBStep` meets.

    Args:
        model: in the mode it will be trained in, with at least one parameter that requires grad. Wrapped models
            (DataParallel, DistributedDataParallel, torch.compile) are unwrapped.
        x: a batch of images [B,C,H,W] as in training, floating point, on the model's device; small images will do.
        output: a function of what the model returns that gives the logits. Without it they are the tensor itself, the
            first tensor of a tuple or list, or what a mapping or object holds under ``logits``.

    Raises:
        ValueError: ``model`` is not a module, has no trainable parameter, cannot be copied, does not accept ``x`` or
            returns no logits; ``x`` is not a batch of images.
    """
    check_module(model)
    check_images(x)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no parameter that requires grad: there is nothing to train")

    def logits(returned) -> tuple[Tensor]:
        return (logits_of(returned, output),)

    with undisturbed(x):
        of_type = findings_by_type(model)
        copied = twin(model)
        logits(check_forward(copied, x))
        silent = _has_no_vjp(copied, x, logits)
        to_general_position(copied)
        findings = merged(Search(copied, x, logits).findings(), of_type)
    if silent and findings[0].status == OK:
        findings[0] = replace(findings[0], reason=NO_VJP_YET)
    return DoubleBackwardReport(tuple(findings))


def _has_no_vjp(model: nn.Module, x: Tensor, logits: Callable) -> bool:
    """R is zero at the parameters as they are."""
    try:
        Probe(model, ((x.detach().clone().requires_grad_(),), {}), logits).projected_vjp(create_graph=False)
    except NoPath:
        return True
    except Exception:  # a finding of the search
        return False
    return False
