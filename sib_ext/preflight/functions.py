"""Custom autograd Functions tried alone: what of their backward is not what it should be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx

from .finding import OK, UNVERIFIED, WRONG
from .probe import Probe
from .twin import kept, signature


class Rule(NamedTuple):
    """How a Function's backward did: two statuses."""

    function: type[Function]
    gradient: str  #: as the derivative of the forward
    derivative: str  #: of double backward, as the backward's own derivative


def rules(run: Callable[[], object], functions: list[type[Function]]) -> list[Rule]:
    """The Functions, which ``run`` calls, tried alone with the arguments that they get there."""
    with _recorded(functions) as recorded:
        run()
    calls = {function: list(recorded[function].values()) for function in functions}
    return [Rule(f, _worst(Probe.compare_gradient, f, calls[f]), _worst(Probe.compare, f, calls[f])) for f in functions]


def _worst(compare: Callable, function: type, calls: list[tuple]) -> str:
    found = {_status(compare, function, arguments) for arguments in calls}
    return next((status for status in (WRONG, UNVERIFIED, OK) if status in found), UNVERIFIED)


class _Applied(nn.Module):
    def __init__(self, function: type):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function.apply(*arguments)


def _status(compare: Callable, function: type, arguments: tuple) -> str:
    # Linear in the outputs: then the derivative of the VJP does not pass through the backward a second time.
    try:
        return compare(Probe(_Applied(function), (arguments, {}), curved=False))[0]
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return UNVERIFIED


@contextmanager
def _recorded(functions: list[type[Function]]) -> Iterator[dict[type[Function], dict[str, tuple]]]:
    """Inside, the Functions' arguments are noted, once for each combination of shapes and types.

    Through the attribute ``forward`` of each class, because ``apply`` may have been taken hold of before.
    """
    calls: dict[type[Function], dict[str, tuple]] = {function: {} for function in functions}

    def recording(function: type[Function]) -> Callable:
        forward = function.forward

        def record(*arguments):
            given = arguments[1:] if isinstance(arguments[0], FunctionCtx) else arguments
            if any(isinstance(a, Tensor) and a.requires_grad for a in given):
                calls[function].setdefault(signature(given), kept(given))
            return forward(*arguments)

        return record

    own = {function: vars(function).get("forward") for function in functions}
    recorders = {function: recording(function) for function in functions}  # all of them before any is set: inheritance
    try:
        for function, recorder in recorders.items():
            function.forward = staticmethod(recorder)  # type: ignore[method-assign]
        yield calls
    finally:
        for function, forward in own.items():
            if forward is None:
                del function.forward
            else:
                function.forward = forward  # type: ignore[method-assign]
