"""The exact engine: precisions, layouts, the fused context alone."""

import copy

import pytest
import torch

from sib_ext import fused_double_backward, fused_layers

from ..compare import assert_near, relative_error
from .networks import Network, Swish, Tokens, per_sample
from .step_check import elementary, error
from .test_step import batch, gradient, loss_of, step_of  # noqa: F401


def truth_of(model, criterion, batch, layers=(), size=None):  # noqa: F811
    x, y, mask = batch
    model = copy.deepcopy(model).double()
    return elementary(model, criterion, layers, None, x.double(), y, mask.double(), size or len(x), 1)


def test_the_fused_context_alone_gives_the_same(batch):  # noqa: F811
    model, criterion = Network().double(), loss_of()
    _, truth = truth_of(model, criterion, batch)
    x, y, mask = batch[0].double().requires_grad_(), *batch[1:]
    with fused_double_backward():
        logits = model(x)
    assert error(gradient(model, criterion(logits, y, x, mask)), truth) < 1e-11


def test_the_fused_layers_are_used_in_a_vjp_and_in_no_other_backward(batch, monkeypatch):  # noqa: F811
    """The state that says so belongs to the VJP under way: a backward pass inside another sees its own."""
    seen = []
    monkeypatch.setattr(fused_layers, "_plain_derivatives", lambda *a: seen.append(1) or (None,) * 3)
    model = Network()
    step_of(model, loss_of())(*batch).backward()
    assert not seen  # nothing was differentiated by the long way
    with fused_double_backward():
        logits = model(batch[0].requires_grad_())
    torch.autograd.grad(logits.sum(), list(model.parameters()), create_graph=True, allow_unused=True)
    assert seen


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_a_grad_scaler_changes_nothing_but_the_scale(options, batch):  # noqa: F811
    model, criterion = Network(norm=per_sample).double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss, truth = truth_of(model, criterion, batch)
    scaled = step_of(model, criterion, scaler=scaler, **options)(x, y, mask)
    assert_near(scaled, loss, 1e-12)
    assert error(gradient(model, scaler.scale(scaled)) / 1024, truth) < 1e-11


def test_a_scaled_vjp_does_not_underflow_in_float16(batch):  # noqa: F811
    """R of 1e-9 an element is zero in float16; scaled by 2^15 it is not."""
    model = Network(norm=per_sample)
    with torch.no_grad():
        model.head.weight.mul_(1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    with torch.autocast("cpu", torch.float16):
        lost = step_of(model, loss_of()).terms(*batch).vjp
        kept = step_of(model, loss_of(), scaler=scaler).terms(*batch).vjp
    exact = step_of(model, loss_of()).terms(*batch).vjp
    assert relative_error(kept, exact) < 0.1 < relative_error(lost, exact)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_bfloat16_autocast_is_near(options, batch):  # noqa: F811
    """Also in the passes that microbatch repeats in backward, outside of the user's autocast."""
    model, criterion = Network(norm=per_sample), loss_of()
    _, truth = truth_of(model, criterion, batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = step_of(model, criterion, **options).terms(*batch)
    assert terms.vjp.dtype == terms.background["input"].dtype == torch.float32
    found = gradient(model, terms.loss)
    assert 1e-4 < error(found, truth) < 0.1  # bfloat16 it was


def test_channels_last_is_the_same(batch):  # noqa: F811
    model, criterion = Network().double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    _, truth = truth_of(model, criterion, batch)
    model.to(memory_format=torch.channels_last)
    loss = step_of(model, criterion)(x.to(memory_format=torch.channels_last), y, mask)
    assert error(gradient(model, loss), truth) < 1e-11


def test_the_tokens_of_a_transformer_are_a_layer(batch):  # noqa: F811
    """Attention in train mode has no second derivative in its fused kernels: the engine takes the math one."""
    model = Tokens()
    terms = step_of(model, loss_of(), ("blocks.0",)).terms(*batch)
    gradient(model, terms.loss)
    assert 0 < terms.background["blocks.0"] < 1
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.patches.parameters())


def test_a_custom_function_is_differentiated_by_its_own_rule(batch):  # noqa: F811
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(Swish.apply, (x,))
