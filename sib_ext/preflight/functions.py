"""Custom autograd Functions tried alone: what of their backward is not what it should be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .finding import WRONG
from .probe import Probe
from .twin import kept, signature


class Rule(NamedTuple):
    """How a Function's backward did when it was tried alone."""

    function: type
    of_forward: bool  #: it is the derivative of the forward
    differentiable: bool  #: double backward gives its own derivative


def broken_rules(run: Callable[[], object], functions: list[type]) -> list[Rule]:
    """The Functions, of those that ``run`` calls, whose backward is shown to be wrong in one way or the other."""
    with _recorded(functions) as calls:
        run()
    rules = []
    for function, recorded in calls.items():
        tried = [_tried(function, arguments) for arguments in recorded.values()]
        rules.append(Rule(function, all(t.of_forward for t in tried), all(t.differentiable for t in tried)))
    return [rule for rule in rules if not (rule.of_forward and rule.differentiable)]


class _Applied(nn.Module):
    def __init__(self, function: type):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function.apply(*arguments)


def _tried(function: type, arguments: tuple) -> Rule:
    """A Function that cannot be tried is not accused."""

    def right(compare: Callable) -> bool:
        # Linear in the outputs: then the derivative of the VJP does not pass through the backward a second time.
        try:
            return compare(Probe(_Applied(function), (arguments, {}), curved=False))[0] != WRONG
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return True

    return Rule(function, right(Probe.compare_gradient), right(Probe.compare))


@contextmanager
def _recorded(functions: list[type]) -> Iterator[dict[type, dict[str, tuple]]]:
    """Inside, the Functions' arguments are noted, once for each combination of shapes and types.

    Through the attribute ``forward`` of each class, because ``apply`` may have been taken hold of before.
    """
    calls: dict[type, dict[str, tuple]] = {function: {} for function in functions}

    def recording(function: type) -> Callable:
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
            function.forward = staticmethod(recorder)
        yield calls
    finally:
        for function, forward in own.items():
            if forward is None:
                del function.forward
            else:
                function.forward = forward
