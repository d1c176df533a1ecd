"""Custom autograd Functions: what is said of a backward is true of it."""

import pytest
import torch
from torch import nn
from torch.autograd import Function, gradgradcheck
from torch.autograd.function import once_differentiable

from sib_ext import check_double_backward

from .networks import Cube, CubeDetached, Do, Head, Network, blamed, matches

BACKWARDS = {
    "times its slope": lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    "detached slope": lambda ctx, g: 3 * ctx.saved_tensors[0].detach() ** 2 * g,
    "detached gradient": lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g.detach(),
    "without gradients": torch.no_grad()(lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g),
    "in numpy": lambda ctx, g: torch.from_numpy(3 * ctx.saved_tensors[0].detach().numpy() ** 2 * g.detach().numpy()),
    "attribute of ctx": lambda ctx, g: ctx.slope * g,
    "result of the forward": lambda ctx, g: ctx.saved_tensors[1] * g,
    "wrong slope": lambda ctx, g: 2 * ctx.saved_tensors[0] ** 2 * g,
    "wrong and detached": lambda ctx, g: 2 * ctx.saved_tensors[0].detach() ** 2 * g,
    "straight through": lambda ctx, g: g,
    "straight through, clipped": lambda ctx, g: g * (ctx.saved_tensors[0].abs() < 1),
    "reversed": lambda ctx, g: -g,
}


def function_of(values, backward, once=False) -> type:
    """x -> values(x); its ``backward`` has x, what would be the slope of a cube, and that as a constant."""

    class Custom(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.slope = 3 * x**2
            ctx.save_for_backward(x, ctx.slope)
            return values(x)

    Custom.backward = staticmethod(once_differentiable(backward) if once else backward)
    return Custom


def cube(x):
    return x**3


def copy_of(x):
    return x.clone()


UNTRUE, DROPPING = "not the derivative of its forward", "derivative of the backward .* is wrong"
# what the forward computes, the backward, and what is true of it
BROKEN = [
    (cube, "detached slope", {DROPPING}),
    (cube, "detached gradient", {DROPPING}),
    (cube, "without gradients", {DROPPING}),
    (cube, "in numpy", {DROPPING}),
    (cube, "attribute of ctx", {DROPPING}),
    (cube, "result of the forward", {DROPPING}),
    (cube, "wrong slope", {UNTRUE}),
    (cube, "wrong and detached", {UNTRUE, DROPPING}),
    (torch.round, "straight through", {UNTRUE}),
    (torch.sign, "straight through", {UNTRUE}),
    (torch.sign, "straight through, clipped", {UNTRUE}),
    (copy_of, "reversed", {UNTRUE}),
]


@pytest.mark.parametrize("values, backward, truths", BROKEN, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_wrong_in_a_backward_is_told_apart(values, backward, truths, x):
    function = function_of(values, BACKWARDS[backward])
    found = check_double_backward(Network(Do(function.apply)), x).failures[-1]
    assert (found.module, found.status) == ("trap", "silently wrong")
    for truth in (UNTRUE, DROPPING):
        assert matches(f"Custom.*{truth}" if truth is UNTRUE else truth, found.reason) == (truth in truths), found
    assert matches("branch.*true derivative.*accept knowingly", found.fix) == (UNTRUE in truths)
    assert matches("saved_tensors.*gradgradcheck", found.fix) == (DROPPING in truths)


@pytest.mark.parametrize("values, backward", [(cube, "times its slope"), (copy_of, "straight through")])
def test_a_right_backward_passes(values, backward, x):
    assert check_double_backward(Network(Do(function_of(values, BACKWARDS[backward]).apply)), x).verified


@pytest.mark.parametrize("values, backward", [(cube, "times its slope"), (copy_of, "reversed")])
def test_a_once_differentiable_backward_raises_and_is_named(values, backward, x):
    function = function_of(values, BACKWARDS[backward], once=True)
    found = check_double_backward(Network(Do(lambda x: Cube.apply(function.apply(x)))), x).failures[-1]
    assert found.status == "fails" and matches("once_differentiable.*Custom$|Custom\\)$", found.reason)
    assert "Cube" not in found.reason


def test_a_function_that_is_right_is_not_accused_for_what_its_module_does(x):
    found = check_double_backward(Network(Do(lambda x: Cube.apply(x) * x.detach().sigmoid())), x).failures[-1]
    assert "Cube" not in found.reason and "detached" in found.reason


def test_of_several_functions_the_broken_ones_are_named(x):
    reversal = function_of(copy_of, BACKWARDS["reversed"])
    found = check_double_backward(Network(Do(lambda x: Cube.apply(reversal.apply(x)))), x).failures[-1]
    assert "Function Custom is not" in found.reason
    found = check_double_backward(Network(Do(lambda x: CubeDetached.apply(reversal.apply(x)))), x).failures[-1]
    assert matches("Function Custom is not the derivative.*Function CubeDetached is wrong", found.reason)


def test_a_function_that_cannot_be_tried_alone_is_said_to_be_so(x):
    class Once(CubeDetached):
        """Needs what only its module prepares."""

        ready = False

        @staticmethod
        def forward(ctx, x):
            assert Once.ready
            return CubeDetached.forward(ctx, x)

    class Preparing(nn.Module):
        def forward(self, x):
            Once.ready = True
            try:
                return Once.apply(x)
            finally:
                Once.ready = False

    found = check_double_backward(Network(Preparing()), x).failures[-1]
    assert matches("gradient is right.*Once, which could not be tried alone", found.reason)


def test_a_function_with_setup_context_and_other_arguments_is_tried(x):
    class Power(Function):
        @staticmethod
        def forward(x, exponent):
            return x**exponent

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.exponent = inputs[1]

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return ctx.exponent * x.detach() ** (ctx.exponent - 1) * gradient, None

    before = Power.forward
    found = check_double_backward(Network(Do(lambda x: Power.apply(x, 3))), x).failures[-1]
    assert matches("the derivative of the backward of .* Power is wrong", found.reason)
    assert Power.forward is before and CubeDetached.forward is Cube.forward


@pytest.mark.parametrize("on_the_way", [False, True], ids=["beside the logits", "before the logits"])
def test_a_gradient_reversal_matters_where_the_logits_depend_on_it(on_the_way, x):
    """Domain-adversarial training: the logits' branch passes, that of the domain does not."""
    reversal = function_of(copy_of, BACKWARDS["reversed"])

    class WithDomain(Network):
        def __init__(self, trap):
            super().__init__(trap)
            self.reversal, self.domain = Do(reversal.apply), Head()

        def forward(self, x):
            features = self.trap(self.stem(x))
            return {"logits": self.head(self.last(features)), "domain": self.domain(self.reversal(features))}

    output = (lambda returned: returned["domain"]) if on_the_way else None
    assert blamed(check_double_backward(WithDomain(nn.Tanh()), x, output)) == (["reversal"] if on_the_way else [])
    # Another fault makes the search look at every module: one beside the path to the logits is none of its business.
    found = blamed(check_double_backward(WithDomain(nn.Hardsigmoid()), x, output))
    assert found == (["trap", "reversal"] if on_the_way else ["trap"])


@pytest.mark.parametrize("backward", ["times its slope", "detached slope", "attribute of ctx", "in numpy"])
def test_gradgradcheck_agrees(backward, x):
    """An oracle from elsewhere for what counts as silently wrong."""
    function = function_of(cube, BACKWARDS[backward])
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)
    right = gradgradcheck(function.apply, values, raise_exception=False)
    assert right == check_double_backward(Network(Do(function.apply)), x).ok == (backward == "times its slope")
