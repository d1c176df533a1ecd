"""The usual image classifiers: checked, trained with the S-IB loss for two steps, and their gradient verified."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sib_ext import SpatialIBLoss, check_double_backward

from .engines.step_check import check_step

models = pytest.importorskip("torchvision.models")

CLASSES = 4


def vgg():
    """VGG-11 with a classifier of 64 instead of 4096."""
    model = models.vgg11(num_classes=CLASSES, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, CLASSES))
    return model


class Hardsigmoid(nn.Module):
    """The fix that the check names."""

    def forward(self, x):
        return F.relu6(x + 3) / 6


def mobilenet():
    model = models.mobilenet_v3_small(num_classes=CLASSES)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Hardsigmoid):
            model.set_submodule(name, Hardsigmoid())
    return model


def vision_transformer():
    """ViT-B/32 with two narrow layers. Its head starts with zeros, and with it the VJP: here it does not."""
    model = models.VisionTransformer(64, 32, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


slow = pytest.mark.slow
# How to make it, and the side of its images.
ZOO = {
    "resnet18": (lambda: models.resnet18(num_classes=CLASSES), 32),
    "densenet121": (lambda: models.densenet121(num_classes=CLASSES), 64),
    "vgg11": (vgg, 32),
    "mobilenet_v3_small": (mobilenet, 64),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=CLASSES), 64),
    "convnext_tiny": (lambda: models.convnext_tiny(num_classes=CLASSES), 32),
    "vit": (vision_transformer, 64),
    "swin_t": (lambda: models.swin_t(num_classes=CLASSES), 64),
    "densenet with checkpoints": (
        lambda: models.DenseNet(8, (2, 2), 8, memory_efficient=True, num_classes=CLASSES),
        32,
    ),
}
STEADY = {"resnet18", "densenet121", "vit", "densenet with checkpoints"}  # no dropout, no stochastic depth
FAST = {"resnet18", "mobilenet_v3_small", "vit", "densenet with checkpoints"}
NAMES = [name if name in FAST else pytest.param(name, marks=slow) for name in ZOO]


def attention_for(name):
    return sdpa_kernel(SDPBackend.MATH) if name == "vit" else contextlib.nullcontext()


class Task:
    """A network of the zoo in train mode, four images with boxes, and labels."""

    def __init__(self, name, dtype=torch.float32):
        make, side = ZOO[name]
        self.model = make().to(dtype)
        self.x = torch.randn(4, 3, side, side, dtype=dtype).requires_grad_()
        self.y = torch.arange(4) % CLASSES
        self.boxes = torch.tensor([[4, 6, 20, 25]], dtype=dtype).expand(4, 4)
        self.criterion = SpatialIBLoss()

    def terms(self):
        torch.manual_seed(1)  # the same dropout every time
        return self.criterion.terms(self.model(self.x), self.y, self.x, self.boxes)


@pytest.mark.parametrize("name", NAMES)
def test_the_check_passes_and_two_steps_train(name):
    task = Task(name)
    with attention_for(name):
        report = check_double_backward(task.model, task.x)
        assert report.verified, report
        before = [p.detach().clone() for p in task.model.parameters()]
        optimizer = torch.optim.SGD(task.model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            loss = task.terms().loss
            loss.backward()
            assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in task.model.parameters())
            optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(task.model.parameters(), before, strict=True)]
    assert sum(changed) > 0.9 * len(changed)  # biases before a BatchNorm, and what dropped blocks hold, may stay


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_the_information_terms_is_their_finite_difference(name):
    """In float64, along a random direction, for the part of the loss that needs the derivative of a derivative."""
    task = Task(name, torch.float64)
    parameters = list(task.model.parameters())
    direction = [torch.randn_like(p) * (p.detach().norm() / p.numel() ** 0.5 + 1e-3) for p in parameters]

    def information():
        terms = task.terms()
        return terms.loss - terms.cross_entropy

    def moved(step):
        with torch.no_grad():
            for p, at, d in zip(parameters, here, direction, strict=True):
                p.copy_(at + step * d)
        return float(information().detach())

    with attention_for(name):
        gradients = torch.autograd.grad(information(), parameters, materialize_grads=True, allow_unused=True)
        found = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        here = [p.detach().clone() for p in parameters]
        # Two steps, as a kink inside one of them spoils it.
        quotients = [(moved(h) - moved(-h)) / (2 * h) for h in (1e-7, 1e-8)]
    assert abs(found) > 1e-4
    assert min(abs(found - q) for q in quotients) < 1e-5 * abs(found), (found, quotients)


@pytest.mark.parametrize("options", [{}, pytest.param({"microbatch": 2}, marks=slow)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_right_and_a_good_guest(name, options, threads):
    """With its last feature map, as found; the transformers without any context of the user's."""
    threads(1)
    make, side = ZOO[name]
    mask = torch.zeros(4, 1, side, side)
    mask[:, :, 6:25, 4:20] = 1
    x = torch.randn(4, 3, side, side)
    step = check_step(make, x, torch.arange(4) % CLASSES, mask, "auto", noisy=name not in STEADY, **options)
    assert step.layers


def test_mobilenet_and_the_transformer_as_they_come_are_caught_with_their_fixes():
    report = check_double_backward(models.mobilenet_v3_small(num_classes=CLASSES), torch.randn(2, 3, 32, 32))
    failures = [f for f in report.failures if f.module]
    assert len(failures) == 9 and {f.type for f in failures} == {"Hardsigmoid"}
    assert "relu6" in failures[0].fix
    report = check_double_backward(vision_transformer(), torch.randn(2, 3, 64, 64))
    assert [f.module for f in report.failures if f.module] == [
        f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)
    ]
    assert "SDPBackend.MATH" in report.failures[-1].fix


@pytest.mark.slow
def test_resnet50_is_checked():
    assert check_double_backward(models.resnet50(num_classes=CLASSES), torch.randn(2, 3, 64, 64)).verified
