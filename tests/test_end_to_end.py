"""Every parameter of a small network gets the gradient that finite differences of the whole loss give, in float64."""

import pytest
import torch
from torch import nn

from sib_ext import SpatialIBLoss

from .compare import gradients
from .samples import FIXED, tiny_problem

STEP = 1e-6
NETWORKS = {
    "BatchNorm and GELU": {"norm": "batch", "activation": nn.GELU},
    "GroupNorm and Tanh": {"norm": "group", "activation": nn.Tanh},
    "GroupNorm and Softplus": {"norm": "group", "activation": nn.Softplus},
}
# The published weights leave CE in charge: the background's gradient is some 1e-3 of the sum's, and an error in it
# would drown. These weights bring each term's gradient to the size of CE's; expm1 spares the difference quotient the
# digits that the constant 1000 costs. Masks are not detached: finite differences see the mask move.
LOSSES = {
    "paper": {
        "preset": "paper",
        "transform": "expm1",
        "input_background": 3e4,
        "input_foreground": 30.0,
    },
    "balanced": {**FIXED, "input_foreground": 1.0, "detach_mask": False},
    "magnitudes": {"seed": "target_logit", "foreground": "gaussian", "input_foreground": 0.3, "detach_mask": False},
    "balanced, hard mask, unbiased": {
        **FIXED,
        "mask": "hard_density",
        "foreground": "hsic_unbiased",
        "input_foreground": 10.0,
        "detach_mask": False,
    },
    "log capacity": {
        **FIXED,
        "background": "magnitude_ratio",
        "foreground": "log_capacity",
        "input_foreground": 1.0,
        "kappa": 0.3,
        "detach_mask": False,
    },
    "gaussian foreground, top_p": {
        "mask": "top_p",
        "background": "energy",
        "input_background": 10.0,
        "foreground": "gaussian",
        "input_foreground": 10.0,
        "seed": "target_log_prob",
        "detach_mask": False,
    },
}
GIVEN = torch.rand(5, 1, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
SOME = [GIVEN[0], None, GIVEN[2], None, None]


def finite_difference(loss, parameter, direction):
    """Central, along one direction of one parameter."""
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.add_(direction, alpha=sign * STEP)
            with torch.enable_grad():
                values.append(float(loss().detach()))
            parameter.sub_(direction, alpha=sign * STEP)
    return (values[0] - values[1]) / (2 * STEP)


def directions_of(parameter):
    """Two random directions and two single coordinates."""
    for _ in range(2):
        direction = torch.randn_like(parameter)
        yield direction / direction.norm()
    for index in torch.randperm(parameter.numel())[:2]:
        coordinate = torch.zeros(parameter.numel(), dtype=parameter.dtype)
        coordinate[index] = 1
        yield coordinate.view_as(parameter)


def assert_gradients_are_finite_differences(problem, criterion, mask):
    def loss():
        return criterion(problem.logits(), problem.y, problem.x, mask)

    total = gradients(loss(), problem.parameters)
    plain = gradients(criterion.cross_entropy(problem.logits(), problem.y), problem.parameters)
    for (name, parameter), gradient, of_ce in zip(problem.model.named_parameters(), total, plain, strict=True):
        pairs = [((gradient * d).sum().item(), finite_difference(loss, parameter, d)) for d in directions_of(parameter)]
        found, expected = torch.tensor(pairs, dtype=torch.float64).T
        error = float((found - expected).norm() / expected.norm())
        assert error < 1e-6, f"{name}: gradient {found.tolist()}, finite differences {expected.tolist()}"
        # Teeth: a gradient that forgot the information terms would be far off. (The seeds do not see the last bias.)
        if name != "head.bias":
            assert float((gradient - of_ce).norm()) > 0.02 * float(gradient.norm()), name


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_equal_finite_differences_of_the_whole_loss(loss, network, implementation):
    criterion = SpatialIBLoss(window=3, impl=implementation, **loss)
    assert_gradients_are_finite_differences(tiny_problem(**network), criterion, None)


@pytest.mark.parametrize("mask", [GIVEN, SOME], ids=["given mask", "mask given for some"])
@pytest.mark.parametrize("preset", ["paper", "balanced"])
def test_gradients_equal_finite_differences_with_a_given_mask(preset, mask, implementation):
    criterion = SpatialIBLoss(window=3, impl=implementation, **LOSSES[preset])
    assert_gradients_are_finite_differences(tiny_problem(), criterion, mask)


@pytest.mark.parametrize("changes", [{"padding": "exclude"}, {"temperature": 3.0}, {"window": 9}], ids=str)
def test_gradients_equal_finite_differences_with_other_mask_options(changes, implementation):
    criterion = SpatialIBLoss(impl=implementation, **{"window": 3, **LOSSES["paper"], **changes})
    assert_gradients_are_finite_differences(tiny_problem(), criterion, None)
