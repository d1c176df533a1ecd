"""The question, whether a network supports the derivative of a derivative that the S-IB loss needs, and its answer.

The loss depends on the vector-Jacobian product (VJP) R = ds/dx, so its parameter gradient differentiates a backward
pass. Some operations refuse that, and some give a wrong gradient without a word. :func:`check_double_backward` takes
the gradient of a random projection of R by double backward and compares it with central differences of R in float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers import check_places, find_feature_map
from ..loss import SpatialIBLoss
from ..outputs import logits_of
from .causes import FIX_COMPILED, explain
from .errors import NoPath
from .finding import FAILS, OK, Finding
from .head import Head, ordinary_backward
from .known import findings_by_type, merged
from .probe import Probe, to_general_position
from .search import Search
from .twin import check_forward, check_images, check_module, twin, undisturbed

NO_VJP_YET = (
    "its VJP is zero at the present parameters (a last layer that starts with zeros?), "
    "so the information terms only act once training has moved them"
)


BACKBONE = "after {} alone, where the terms are: what runs before needs an ordinary backward and no more"
FEATURES_WORK = "terms at the feature map {!r} alone work: SpatialIBLoss(input_background=0)"


@dataclass(frozen=True)
class DoubleBackwardReport:
    """What :func:`check_double_backward` found; ``print`` it."""

    #: The model itself first; then, if it is not ok, the modules that were looked at, in the model's order.
    findings: tuple[Finding, ...]
    #: Feature maps: what runs after them was checked, and nothing before; empty: the whole model was.
    layers: tuple[str, ...] = ()

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
        if self.layers:
            table.insert(0, BACKBONE.format(" and ".join(map(repr, self.layers))))
        return "\n".join(table)


def check_double_backward(
    model: nn.Module,
    x: Tensor,
    output: Callable | None = None,
    *,
    criterion: SpatialIBLoss | None = None,
    layers: Sequence[str] | str = "auto",
) -> DoubleBackwardReport:
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
        criterion: what the model is to be trained with. If it has no terms of the input (``input_background=0,
            input_foreground=0``), double backward is checked from the logits to the feature map alone, and of what
            runs before it that an ordinary backward runs. None: the whole model is checked.
        layers: of such a criterion, the places of those feature maps, as in :class:`sib_ext.SIBStep`; ``"auto"``: the
            last one.

    Raises:
        ValueError: ``model`` is not a module, has no trainable parameter, cannot be copied, does not accept ``x``,
            returns no logits or has no such feature map; ``x`` is not a batch of images; ``criterion`` is none, or has
            no terms.
    """
    check_module(model)
    check_images(x)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no parameter that requires grad: there is nothing to train")
    of_features = _of_features_alone(criterion)
    if layers != "auto" and not of_features:
        raise ValueError(
            f"layers={layers!r} has no meaning where the whole model is checked: leave it out, or give a criterion "
            "with terms at feature maps alone, criterion=SpatialIBLoss(input_background=0)"
        )

    def logits(returned) -> tuple[Tensor]:
        return (logits_of(returned, output),)

    with undisturbed(x):
        of_type = findings_by_type(model)
        copied = twin(model)
        logits(check_forward(copied, x))
        if of_features:
            places: list[str] = []
            if failed := _failed(lambda: places.extend(_places(copied, x, output, layers))):
                return DoubleBackwardReport((replace(failed, type=type(copied).__name__),))
            return _heads_report(copied, x, logits, tuple(places), of_type)
        silent = _has_no_vjp(copied, x.detach().clone().requires_grad_(), logits)
        to_general_position(copied)
        findings = merged(Search(copied, x, logits).findings(), of_type)
        if findings[0].at_fault and (works := _working_place(copied, x, output, logits, of_type)):
            advice = FEATURES_WORK.format(works)
            findings[0] = replace(findings[0], fix="; or ".join(filter(None, (findings[0].fix, advice))))
    if silent and findings[0].status == OK:
        findings[0] = replace(findings[0], reason=NO_VJP_YET)
    return DoubleBackwardReport(tuple(findings))


def _of_features_alone(criterion: SpatialIBLoss | None) -> bool:
    if criterion is None:
        return False
    if not isinstance(criterion, SpatialIBLoss):
        raise ValueError(f"criterion must be None or a sib_ext.SpatialIBLoss, got {type(criterion).__name__}")
    if not criterion.has_terms:
        raise ValueError("criterion has no terms beside cross-entropy, so nothing is differentiated twice")
    return not criterion.has_input_terms


def _places(model: nn.Module, x: Tensor, output: Callable | None, layers: Sequence[str] | str) -> tuple[str, ...]:
    if layers == "auto":
        if (name := find_feature_map(model, x, output)) is None:
            raise ValueError("layers: no feature map was found on the way to the logits: name a place, layers=[...]")
        return (name,)
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    if not layers:
        raise ValueError("layers: the criterion has terms at feature maps alone: name one, or leave layers out")
    check_places(model, layers)
    return layers


def _heads_report(
    model: nn.Module, x: Tensor, logits: Callable, places: tuple[str, ...], of_type: list[Finding]
) -> DoubleBackwardReport:
    """Of the first of the places after which something is at fault, else unverified; if there is none, of the last."""
    reports = [_head_report(twin(model), x, logits, place, of_type) for place in places]
    worst = next((r for r in reports if not r.ok), None) or next((r for r in reports if not r.verified), reports[-1])
    return worst if not worst.verified else replace(worst, layers=places)


def _head_report(
    model: nn.Module, x: Tensor, logits: Callable, place: str, of_type: list[Finding]
) -> DoubleBackwardReport:
    """Of what runs after the place; an ordinary backward is tried of the whole."""
    unmoved = Head(model, x, place)
    silent = _has_no_vjp(unmoved, unmoved.feature_map().requires_grad_(), logits)
    to_general_position(model)
    search = Search(model, x, logits, place)
    findings = search.findings()
    if findings[0].status == OK and (failed := _failed(lambda: ordinary_backward(model, x, logits, place))):
        reason = f"a step with terms at the feature map alone does not run: {failed.reason}"
        findings[0] = replace(failed, type=findings[0].type, reason=reason)
    # Compiled modules are refused wherever they are; the other types count where they are differentiated twice.
    after = {"", *search.calls_before_the_logits()}
    findings = merged(findings, [f for f in of_type if f.module in after or f.fix == FIX_COMPILED])
    if silent and findings[0].status == OK:
        findings[0] = replace(findings[0], reason=NO_VJP_YET)
    return DoubleBackwardReport(tuple(findings), (place,))


def _failed(run: Callable) -> Finding | None:
    """What the exception means that it raises, if it does."""
    try:
        run()
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return Finding("", "", FAILS, *explain(error, []))
    return None


def _working_place(
    model: nn.Module, x: Tensor, output: Callable | None, logits: Callable, of_type: list[Finding]
) -> str | None:
    """The last feature map, if terms at it alone can be trained."""
    try:
        place = find_feature_map(model, x, output)
        if place is not None and _head_report(model, x, logits, place, of_type).verified:
            return place
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a finding of the search
        pass
    return None


def _has_no_vjp(model: nn.Module, leaf: Tensor, logits: Callable) -> bool:
    """R is zero at the parameters as they are."""
    try:
        Probe(model, ((leaf,), {}), logits).projected_vjp(create_graph=False)
    except NoPath:
        return True
    except Exception:  # a finding of the search
        return False
    return False
