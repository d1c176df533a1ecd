"""Each trap alone in a small network is found and named with its fix; doubt is not called wrong."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F

from sib_ext import check_double_backward

from .networks import WIDTH, Checkpointed, CubeDetached, Do, Network, blamed, matches, statuses


class Refuse(Function):
    @staticmethod
    def forward(ctx, gradient):
        return gradient.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no second derivative in this precision")


class OnceInFloat32(Function):
    """Like a fused kernel that is not used for float64."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Refuse.apply(gradient) if gradient.dtype == torch.float32 else gradient


class RoundedFunction(Function):
    """Computes in float32 whatever it is given, in a way that a cast does not show."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.empty(x.shape, dtype=torch.float32).copy_(x) ** 3 + torch.zeros_like(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Gate(nn.Module):
    """A healthy child, and a functional call in the forward that is not."""

    def __init__(self, gate):
        super().__init__()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 1)
        self.gate = gate

    def forward(self, x):
        return x * self.gate(self.mix(x))


def in_place_after_hook():
    """The hook makes the convolution's output a view, which the ReLU then overwrites."""
    block = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(inplace=True))
    block[0].register_full_backward_hook(lambda *_: None)
    return block


def detaching_hook():
    block = nn.Conv2d(WIDTH, WIDTH, 1)
    block.register_forward_hook(lambda module, inputs, output: output * output.detach().sigmoid())
    return block


TRAPS = {
    "hardsigmoid": (nn.Hardsigmoid, "fails", "hardsigmoid", "relu6"),
    "cdist": (lambda: Do(lambda x: torch.cdist(x, x.flip(1))), "fails", "cdist", "use_mm_for_euclid_dist"),
    "pdist": (
        lambda: Do(lambda x: x * F.pdist(x.flatten(1)).mean()),
        "fails",
        "pdist",
        "norm",
    ),
    "grid_sample": (
        lambda: Do(lambda x: F.grid_sample(x, torch.full((2, 8, 8, 2), 0.1, dtype=x.dtype), align_corners=False)),
        "fails",
        "grid_sample",
        "indexing",
    ),
    "reentrant checkpointing": (lambda: Checkpointed(use_reentrant=True), "fails", "reentrant", "use_reentrant=False"),
    "detach in the forward": (
        lambda: Do(lambda x: x * x.detach().sigmoid()),
        "silently wrong",
        "not the derivative of its forward.*detached",
        "detach",
    ),
    "detach in a hook": (detaching_hook, "silently wrong", "not the derivative of its forward.*detached", "hooks"),
    "straight-through rounding": (
        lambda: Do(lambda x: x + (x.round() - x).detach()),
        "silently wrong",
        "not the derivative of its forward.*rounded",
        "straight-through",
    ),
    "in-place change of a saved result": (
        lambda: Do(lambda x: x.sigmoid().add_(1)),
        "fails",
        "in-place",
        "inplace=False",
    ),
    "in-place ReLU after a hook": (in_place_after_hook, "fails", "in-place.*hook", "inplace=False"),
    "argmax": (
        lambda: Do(lambda x: F.one_hot(x.argmax(1), WIDTH).movedim(-1, 1).to(x.dtype)),
        "fails",
        "argmax",
        "detach",
    ),
    "rounding": (lambda: Do(torch.round), "fails", "rounding", "straight-through"),
    "detach of everything": (lambda: Do(torch.detach), "fails", "no gradient flows", "detach"),
    "no_grad": (lambda: Do(torch.no_grad()(torch.tanh)), "fails", "no gradient flows", "no_grad"),
    "root of zero": (lambda: Do(lambda x: x.relu().sqrt()), "fails", "NaN or infinite", "eps"),
    "kernel for float32 alone": (lambda: Do(OnceInFloat32.apply), "fails", "OnceInFloat32", "gradgradcheck"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(WIDTH), "fails", "several processes", "nn.BatchNorm2d"),
    "compiled part": (lambda: torch.compile(nn.Conv2d(WIDTH, WIDTH, 1)), "fails", "compiled", "torch.compile"),
}


@pytest.mark.parametrize("trap, status, reason, fix", TRAPS.values(), ids=TRAPS)
def test_a_trap_is_found_and_named_with_its_fix(trap, status, reason, fix, x):
    report = check_double_backward(Network(trap()), x)
    assert not report.ok and not report.verified
    assert blamed(report) == ["trap"]
    found = report.failures[-1]
    assert found.status == report.findings[0].status == status
    assert matches(reason, found.reason) and matches(fix, found.fix), found
    assert "because of trap" in report.findings[0].reason
    assert all(f.status == "ok" for f in report.findings if f.module not in ("", "trap"))
    with pytest.raises(RuntimeError, match="trap"):
        report.raise_for_failure()


def test_functional_attention_is_blamed_on_the_module_that_calls_it(x):
    gate = Gate(lambda x: F.scaled_dot_product_attention(x, x, x))
    report = check_double_backward(Network(nn.Sequential(nn.Tanh(), nn.Sequential(gate))), x)
    assert blamed(report) == ["trap.1.0"]
    assert statuses(report)["trap.1.0.mix"] == "ok" and report.failures[-1].type == "Gate"


def test_an_error_of_two_percent_is_found(x):
    weak = Do(lambda x: x**3 + 0.02 * CubeDetached.apply(x))
    report = check_double_backward(Network(weak), x)
    assert blamed(report) == ["trap"] and report.failures[-1].error < 0.1


def test_several_traps_are_all_named_and_healthy_modules_are_cleared(x):
    model = Network(nn.Sequential(nn.Tanh(), nn.Hardsigmoid(), nn.Conv2d(WIDTH, WIDTH, 1), Do(CubeDetached.apply)))
    report = check_double_backward(model, x)
    assert blamed(report) == ["trap.1", "trap.3"]
    assert [statuses(report)[n] for n in ("trap.0", "trap.1", "trap.2", "trap.3")] == ["ok", "fails", "ok"] + [
        "silently wrong"
    ]
    assert {"stem", "last", "head"} <= statuses(report).keys()


def test_a_module_used_twice_is_tried_with_each_shape_that_it_received(x):
    """cdist takes another, differentiable route above 25 rows."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.distance = Do(lambda x: torch.cdist(x, x.flip(-2)))

        def forward(self, x):
            rows = x.flatten(2).mT
            return x * self.distance(rows).mean() + self.distance(x).mean()

    assert blamed(check_double_backward(Network(Twice()), x)) == ["trap.distance"]


def test_a_silent_error_behind_a_residual_branch_of_zero_gain_is_found(x):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(()))
            self.cube = Do(CubeDetached.apply)

        def forward(self, x):
            return x + self.gain * self.cube(x)

    assert blamed(check_double_backward(Network(Branch()), x)) == ["trap.cube"]


def test_a_first_layer_that_overwrites_x_is_blamed_on_the_model(x):
    model = nn.Sequential(nn.ReLU(inplace=True), Network(nn.Identity()))
    report = check_double_backward(model, x)
    assert [f.module for f in report.failures] == [""] and "in-place" in report.failures[0].reason


def sawtooth(x):
    """Kinks 1e-9 apart: every step crosses many."""
    return ((x * 1e9) % 2 - 1).abs() / 1e9 + x


def test_kinks_denser_than_any_step_are_not_called_wrong(x):
    report = check_double_backward(Network(Do(sawtooth)).double(), x.double())
    assert report.ok and not report.verified and "could not be verified" in str(report)
    assert report.findings[0].status == "unverified" and "too noisy" in report.findings[0].reason


def test_noise_that_no_seed_governs_is_not_called_wrong(x):
    count = itertools.count()
    report = check_double_backward(Network(Do(lambda x: x * (1 + 1e-3 * (next(count) % 7)))), x)
    assert report.ok and not report.verified and "another result every time" in report.findings[0].reason


def test_hidden_float32_is_not_called_wrong(x):
    report = check_double_backward(Network(Do(RoundedFunction.apply)), x)
    assert report.ok and not report.verified and "less than float64" in str(report)


def test_a_model_that_only_runs_in_float32_is_checked_as_far_as_possible(x):
    def only_float32(x):
        if x.dtype == torch.float64:
            raise TypeError("float32 please")
        return x.tanh()

    report = check_double_backward(Network(Do(only_float32)), x)
    assert report.ok and not report.verified and "float32 please" in str(report)
    report = check_double_backward(Network(nn.Sequential(Do(only_float32), nn.Hardsigmoid())), x)
    assert blamed(report) == ["trap.1"]
