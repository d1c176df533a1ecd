"""Healthy networks pass, and the numbers confirm it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sib_ext import check_double_backward

from .networks import WIDTH, Checkpointed, Cube, Do, Network, PythonDropout, Recurrent


def zero_gain():
    block = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 1))
    nn.init.zeros_(block[0].weight)
    return block


class Counting(nn.Module):
    """Its output depends on how often it ran."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x * self.count


def run_once(block):
    block(torch.randn(2, WIDTH, 8, 8))
    return block


HEALTHY = {
    "nothing": nn.Identity,
    "ReLU and maximum": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU()),
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "hardswish": nn.Hardswish,
    "GroupNorm": lambda: nn.GroupNorm(2, WIDTH),
    "dropout": lambda: nn.Dropout(0.5),
    "dropout of channels": lambda: nn.Dropout2d(0.5),
    "Python's and numpy's random numbers": PythonDropout,
    "custom Function with a differentiable backward": lambda: Do(Cube.apply),
    "checkpointing without reentry": lambda: Checkpointed(use_reentrant=False),
    "GRU": lambda: Recurrent(nn.GRU),
    "attention with weights": lambda: Do(lambda x: torch.softmax(x @ x.mT, -1) @ x),
    "casts to float32": lambda: Do(lambda x: (x.float() * torch.ones(1) + torch.zeros(1)).to(x.dtype)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "weight_norm by hooks, after a forward": lambda: run_once(nn.utils.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1))),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "spectral_norm by hooks": lambda: nn.utils.spectral_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "buffer that changes": Counting,
    "zero gain": zero_gain,
    "frozen layer": lambda: nn.Conv2d(WIDTH, WIDTH, 1).requires_grad_(False),
    "argmax on a side branch": lambda: Do(lambda x: x + F.one_hot(x.argmax(1), WIDTH).movedim(-1, 1)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("trap", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_network_passes(trap, x):
    report = check_double_backward(Network(trap()), x)
    assert report.ok and report.verified and report.failures == (), report
    assert report.findings[0].error < 1e-5
    assert report.raise_for_failure() is report


# One of each kind in torch.nn that keeps [B,4,8,8] images images.
LAYERS = [
    *(nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.RReLU(), nn.ELU(0.5), nn.SELU(), nn.CELU(), nn.GELU(), nn.Mish()),
    *(nn.GELU("tanh"), nn.Hardtanh(), nn.Hardshrink(0.1), nn.Softshrink(0.1), nn.Threshold(0.1, 0.2), nn.Softplus()),
    *(nn.Softsign(), nn.Tanh(), nn.Tanhshrink(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softmax(1), nn.LogSoftmax(1)),
    *(nn.Softmin(1), nn.Softmax2d(), nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(), nn.InstanceNorm2d(4)),
    *(nn.LayerNorm(8), nn.RMSNorm(8), nn.LocalResponseNorm(2), nn.Conv2d(4, 4, 3, groups=2, dilation=2)),
    *(nn.ConvTranspose2d(4, 4, 3), nn.Linear(8, 8), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(5)),
    *(nn.AdaptiveAvgPool2d(5), nn.LPPool2d(2, 2), nn.FractionalMaxPool2d(2, 5), nn.ZeroPad2d(1), nn.ReflectionPad2d(1)),
    *(nn.ReplicationPad2d(1), nn.CircularPad2d(1), nn.Upsample(scale_factor=2), nn.ChannelShuffle(2)),
    *(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=2, mode="bicubic")),
    *(nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)), nn.Sequential(nn.Unfold(3), nn.Fold(8, 3))),
    *(nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Sequential(nn.Conv2d(4, 8, 1), nn.GLU(1)), Recurrent(nn.RNN)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_the_layers_of_torch_nn_are_differentiable_twice(layer, x):
    report = check_double_backward(Network(layer), x)
    assert report.verified, report


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_precision_and_mode_can_be_checked(mode, dtype, x):
    model = getattr(Network(nn.Dropout()), mode)().to(dtype)
    assert check_double_backward(model, x.to(dtype)).verified


def test_autocast_is_respected_and_does_not_disturb_the_comparison(x):
    seen = []

    class Noting(nn.Module):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return x

    model = Network(Noting())
    with torch.autocast("cpu", torch.bfloat16):
        assert check_double_backward(model, x).verified
    assert set(seen) == {True, False}
