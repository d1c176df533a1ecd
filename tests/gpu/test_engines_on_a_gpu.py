"""SIBStep and the fused layers on a GPU, against the CPU in float64."""

import copy

import pytest
import torch
from torch import nn

from .. import test_norm_double_backward as norm
from ..compare import assert_near, overload, relative_error
from ..test_engines import Network, error, gradients, loss_of, per_sample, plainly, step_of


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


@pytest.mark.parametrize(
    "options",
    [{}, {"microbatch": 3}, {"recompute": ("stem",)}, {"layers": ("body",)}, {"engine": "compiled"}],
    ids=str,
)
def test_an_exact_engine_gives_the_gradients_of_the_cpu(options, batch):
    model, criterion = Network(nn.SiLU, norm=per_sample), loss_of()
    loss, truths = plainly(model, criterion, batch, options.get("layers", ()))
    model.cuda()
    found = step_of(model, criterion, **options)(*on_gpu(batch))
    assert_near(found.cpu(), loss, 1e-4)
    assert error([g.cpu() for g in gradients(model, found)], truths) < 1e-3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batch_normalisation_in_train_mode(memory_format, batch):
    model, criterion = Network(nn.ReLU).double(), loss_of()
    _, truths = plainly(model, criterion, batch)
    model.cuda().to(memory_format=memory_format)
    x, y, mask = on_gpu(batch)
    found = step_of(model, criterion)(x.double().to(memory_format=memory_format), y, mask)
    assert error([g.cpu() for g in gradients(model, found)], truths) < 1e-9


def test_finite_differences_are_near(batch):
    model, criterion = Network(norm=per_sample), loss_of()
    _, truths = plainly(model, criterion, batch)
    model.cuda()
    found = step_of(model, criterion, engine="finite_difference")(*on_gpu(batch))
    assert error([g.cpu() for g in gradients(model, found)], truths) < 1e-2


@pytest.mark.parametrize("options", [{"microbatch": 4}, {"engine": "finite_difference"}], ids=str)
def test_two_phases_drop_out_the_same_units(options, batch):
    model = Network(dropout=0.5, norm=per_sample).cuda()
    step = step_of(model, loss_of(), **options)
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(step(*on_gpu(batch)).detach())
    assert torch.equal(*losses)


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


def test_a_step_waits_for_nothing(batch):
    """Neither forward nor backward of the exact engine synchronises with the host."""
    model = Network(nn.ReLU).cuda()
    step = step_of(model, loss_of(), ("body",))
    x, y, mask = on_gpu(batch)
    step(x, y, mask).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y, mask).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_model_on_the_gpu_is_left_as_it_was(batch):
    model = Network(nn.ReLU).cuda()
    before = copy.deepcopy(model.state_dict())
    step = step_of(model, loss_of(), engine="finite_difference", force=True)
    step(*on_gpu(batch)).backward()
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if "running" not in k and "tracked" not in k)
