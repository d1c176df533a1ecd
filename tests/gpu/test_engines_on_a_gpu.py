"""SIBStep and the fused layers on a GPU, against the CPU in float64."""

import pytest
import torch
from torch import nn

from sib_ext import SpatialIBLoss, fused_layers, reference, use_impl
from sib_ext.ops import dispatch
from sib_ext.ops.batch_norm_backward import batch_norm_backward

from .. import test_norm_double_backward as norm
from ..compare import assert_near, overload, relative_error
from ..engines.networks import CLASSES, NETWORKS, Network, per_sample
from ..engines.step_check import check_step, error
from ..engines.test_double_backward import truth_of
from ..engines.test_step import gradient, loss_of, step_of


@pytest.fixture
def batch():
    x = torch.randn(8, 3, 32, 32)
    mask = torch.zeros(8, 1, 32, 32)
    mask[:, :, 8:20, 10:26] = 1
    return x, torch.arange(8) % 5, mask


def on_gpu(values):
    return tuple(v if v is None or isinstance(v, float) else v.cuda() for v in values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", norm.CASES)
def test_the_second_derivative_of_a_normalisation(name, dtype, implementation):
    arguments = norm.arguments(name, dtype)
    exact = norm.of_pytorch(name, *(t.double() for t in arguments[:3]), arguments[5])
    results = overload("norm_double_backward", implementation)(*on_gpu(arguments))
    for value, truth in zip(results, exact, strict=True):
        best = relative_error(truth.to(value.dtype), truth)
        assert relative_error(value.cpu(), truth) <= 2 * best + (1e-11 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("affine", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name, (_, groups) in norm.CASES.items() if groups is None])
def test_the_gradients_of_batch_normalisation(name, dtype, affine):
    """By the native kernel, wherever it is there."""
    if problem := dispatch.native_problem("cuda"):
        pytest.skip(problem)
    arguments = norm.arguments(name, dtype, affine=affine)[1:6]
    exact = reference.batch_norm_backward(*(None if t is None else t.double() for t in arguments))
    results = batch_norm_backward(*on_gpu(arguments))
    assert results[0].stride() == torch.empty_like(arguments[1]).stride()
    for value, truth in zip(results, exact, strict=True):
        best = relative_error(truth.to(value.dtype), truth)
        assert relative_error(value.cpu(), truth) <= 2 * best + (1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_batch_normalisation_in_a_step_is_pytorchs(layout, impl, batch):
    """Outputs and running statistics of the fused layer, whichever kernel PyTorch takes."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(8).cuda() for _ in range(2)]
    x = torch.randn(6, 8, 9, 10, device="cuda")
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = torch.randn(9, 8, 6, 10, device="cuda").transpose(0, 2)
    x.requires_grad_()
    with use_impl(impl), fused_layers.fused_double_backward():
        found = layers[0](x)
    truth = layers[1](x)
    assert torch.equal(found, truth)
    for of_found, of_truth in zip(layers[0].state_dict().values(), layers[1].state_dict().values(), strict=True):
        assert torch.equal(of_found, of_truth)
    cotangent = torch.randn_like(found)
    inputs = (x, layers[0].weight, layers[0].bias), (x, layers[1].weight, layers[1].bias)
    gradients = (torch.autograd.grad(y, of, cotangent) for y, of in zip((found, truth), inputs, strict=True))
    for value, expected in zip(*gradients, strict=True):
        assert_near(value, expected, 1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"microbatch": 3}, {"layers": ("body",)}, {"layers": "auto"}, {"engine": "compiled"}], ids=str
)
def test_an_engine_gives_the_gradients_of_the_cpu(options, batch):
    model, criterion = Network(nn.SiLU, norm=per_sample), loss_of()
    layers = options.get("layers", ())
    loss, truth = truth_of(model, criterion, batch, ("body",) if layers else ())
    model.cuda()
    found = step_of(model, criterion, **options)(*on_gpu(batch))
    assert_near(found.cpu(), loss, 1e-4)
    assert error(gradient(model, found).cpu(), truth) < 1e-3


@pytest.mark.parametrize("options", [{}, {"microbatch": 3}], ids=str)
@pytest.mark.parametrize("network", ["BatchNorm", "dropout", "transformer", "checkpoints", "spectral norm"])
def test_a_step_is_right_and_a_good_guest(network, options, batch):
    """In float64, where another order of the sums does not show; dropout draws in another way on a GPU, so alone."""

    def make():
        return NETWORKS[network]().cuda()

    check_step(make, *on_gpu(batch), "auto", noisy=True, **options)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batch_normalisation_in_train_mode(memory_format, batch):
    model, criterion = Network(nn.ReLU).double(), loss_of()
    _, truth = truth_of(model, criterion, batch)
    model.cuda().to(memory_format=memory_format)
    x, y, mask = on_gpu(batch)
    found = step_of(model, criterion)(x.double().to(memory_format=memory_format), y, mask)
    assert error(gradient(model, found).cpu(), truth) < 1e-9


def test_the_fused_layers_are_used_in_the_threads_of_the_backward_pass(batch, monkeypatch):
    """Autograd carries the mode that says so into them."""
    monkeypatch.setattr(fused_layers, "_plain_derivatives", None)  # the long way
    model = Network(nn.ReLU).cuda()
    step_of(model, loss_of())(*on_gpu(batch)).backward()


def test_the_same_units_are_dropped_out_when_a_part_runs_again(batch):
    """Otherwise its logits would differ, which is an error."""
    model = Network(dropout=0.5, norm=per_sample).cuda()
    step_of(model, loss_of(), microbatch=4)(*on_gpu(batch)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_float16_training_with_a_scaler_goes_down(batch):
    torch.manual_seed(0)
    model = Network(nn.ReLU).cuda()
    scaler = torch.amp.GradScaler("cuda")
    step = step_of(model, loss_of(), ("body",), scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y, mask = on_gpu(batch)
    first = last = None
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = step(x, y, mask)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if loss.isfinite():
            first, last = first or float(loss.detach()), float(loss.detach())
    assert last < first
    assert all(p.isfinite().all() for p in model.parameters())


OF_INPUT = {"foreground": "log_capacity", "input_foreground": 1.0}
CRITERIA = {
    "one label": loss_of,
    "several labels": lambda: SpatialIBLoss(task="multilabel", **OF_INPUT),
    "ignored labels": lambda: SpatialIBLoss(ignore_index=-7, **OF_INPUT),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_step_waits_for_nothing(name, batch):
    """Neither forward nor backward of the exact engine synchronises with the host."""
    model = Network(nn.ReLU).cuda()
    step = step_of(model, CRITERIA[name](), ("body",))
    x, y, mask = on_gpu(batch)
    if name == "several labels":
        y = torch.rand(len(x), CLASSES, device="cuda") < 0.5
        mask = mask.expand(-1, CLASSES, -1, -1).contiguous()
    if name == "ignored labels":
        y = y.clone()
        y[0] = -7
    step(x, y, mask).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y, mask).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
