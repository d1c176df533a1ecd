"""Batches in parts: statistics of the whole, real backward passes once a step, and the same draws again."""

import copy

import pytest
import torch
from torch import nn

from ..compare import assert_near
from .networks import CLASSES, IMAGES, Network, per_sample
from .step_check import error
from .test_double_backward import truth_of
from .test_step import batch, gradient, loss_of, step_of  # noqa: F401


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_parts_give_the_gradients_of_the_whole_batch(microbatch, batch):  # noqa: F811
    """With a network that normalises each sample by itself the cut must not show, not even in CKA."""
    model, criterion = Network(norm=per_sample).double(), loss_of(input_foreground=1.0)
    x, y, mask = batch[0].double(), *batch[1:]
    loss, truth = truth_of(model, criterion, batch, ("body",))
    terms = step_of(model, criterion, ("body",), microbatch=microbatch).terms(x, y, mask)
    assert_near(terms.loss, loss, 1e-12)
    assert error(gradient(model, terms.loss), truth) < 1e-11


def test_classes_weigh_as_in_the_whole_batch(batch):  # noqa: F811
    weight = torch.rand(CLASSES, dtype=torch.float64)
    model, criterion = Network(norm=per_sample).double(), loss_of(weight=weight)
    x, y, mask = batch[0].double(), *batch[1:]
    whole = copy.deepcopy(model)
    truth = gradient(whole, step_of(whole, criterion)(x, y, mask))
    assert error(gradient(model, step_of(model, criterion, microbatch=4)(x, y, mask)), truth) < 1e-11


def test_the_same_units_are_dropped_out_when_a_part_runs_again(batch):  # noqa: F811
    model, criterion = Network(dropout=0.5, norm=per_sample).double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    torch.manual_seed(11)
    loss = step_of(model, criterion, microbatch=2)(x, y, mask)
    found = gradient(model, loss)
    after = torch.rand(1)

    # The same draws, part by part, in one pass.
    torch.manual_seed(11)
    masks = [nn.functional.dropout(torch.ones(2, 8, dtype=x.dtype), 0.5) for _ in range(IMAGES // 2)]
    assert torch.equal(after, torch.rand(1))
    model.dropout = Fixed(torch.cat(masks))
    exact = step_of(model, criterion)(x, y, mask)
    assert_near(loss, exact, 1e-12)
    assert error(found, gradient(model, exact)) < 1e-11


class Fixed(nn.Module):
    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def forward(self, x):
        return x * self.factors


def test_a_model_that_changes_by_itself_is_refused(batch):  # noqa: F811
    """A counter, a generator of its own: dL/dR would be that of another function."""

    class Warming(Network):
        passes = 0

        def forward(self, x):
            self.passes += 1
            return super().forward(x) * (1 + 0.1 * self.passes)

    loss = step_of(Warming(), loss_of(), microbatch=2)(*batch)
    with pytest.raises(RuntimeError, match="microbatch: the model gave other logits, or another VJP, when a part"):
        loss.backward()


def test_backward_twice_is_allowed_where_the_graph_is_kept(batch):  # noqa: F811
    model = Network(norm=per_sample).double()
    loss = step_of(model, loss_of(), microbatch=2)(batch[0].double(), *batch[1:])
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for parameter, grad in zip(model.parameters(), once, strict=True):
        assert_near(parameter.grad, 2 * grad, 1e-12)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_an_optimizer_step_before_backward_is_an_error_as_with_any_loss(batch):  # noqa: F811
    model = Network()
    loss = step_of(model, loss_of(), microbatch=2)(*batch)
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_third_derivative_is_refused(batch):  # noqa: F811
    model = Network()
    loss = step_of(model, loss_of(), microbatch=2)(*batch)
    (grad,) = torch.autograd.grad(loss, model.head.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_sharded_models_are_refused_with_the_way_out(batch):  # noqa: F811
    model = Network()
    model.set_reshard_after_backward = lambda *_: None  # what an FSDP2 module has
    with pytest.raises(ValueError, match="FSDP2 does not allow"):
        step_of(model, loss_of(), microbatch=2)
