"""Terms at a feature map alone: what runs after it is judged, and of the rest that an ordinary backward runs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sib_ext import SIBStep, SpatialIBLoss, check_double_backward, fused_double_backward

from .networks import Attention, Cube, CubeDetached, Do, Network, blamed, statuses
from .test_traps import TRAPS

ADVICE = "terms at the feature map 'last' alone work: SpatialIBLoss(input_background=0)"
WITHOUT_SECOND = ["hardsigmoid", "cdist", "grid_sample", "reentrant checkpointing", "detach in the forward"]


@pytest.fixture
def criterion():
    return SpatialIBLoss(input_background=0)


def with_head(part: nn.Module) -> nn.Module:
    """The part runs after the feature map."""
    model = Network(nn.Hardsigmoid())
    model.head = nn.Sequential(part, model.head)
    return model


def trained(model: nn.Module, x) -> nn.Module:
    SIBStep(model, SpatialIBLoss(input_background=0), "last")(x, torch.tensor([0, 1])).backward()
    return model


@pytest.mark.parametrize("trap", [*WITHOUT_SECOND, "SyncBatchNorm", "kernel for float32 alone"])
def test_what_runs_before_the_feature_map_need_not_be_differentiable_twice(trap, x, criterion):
    model = Network(TRAPS[trap][0]())
    report = check_double_backward(model, x, criterion=criterion)
    assert report.verified and report.layers == ("last",) and len(report.findings) == 1
    assert str(report).startswith(
        "after 'last' alone, where the terms are: what runs before needs an ordinary backward"
    )
    whole = check_double_backward(model, x)
    assert not whole.ok and whole.findings[0].fix == ADVICE and whole.layers == ()
    assert all(p.grad.isfinite().all() for p in trained(model, x).parameters() if p.grad is not None)


@pytest.mark.parametrize("trap", ["in-place change of a saved result", "in-place ReLU after a hook"])
def test_what_has_no_ordinary_backward_is_not_advised(trap, x, criterion):
    model = Network(TRAPS[trap][0]())
    for layers in ("auto", "last"):
        report = check_double_backward(model, x, criterion=criterion, layers=layers)
        assert not report.ok and "in-place" in str(report)
    assert "alone work" not in str(check_double_backward(model, x))
    with pytest.raises(RuntimeError):
        trained(model, x)


@pytest.mark.parametrize(
    "part, status",
    [(nn.Hardsigmoid(), "fails"), (Do(CubeDetached.apply), "silently wrong")],
    ids=["hardsigmoid", "detaching Function"],
)
def test_what_runs_after_it_must_be(part, status, x, criterion):
    model = with_head(part)
    report = check_double_backward(model, x, criterion=criterion, layers="last")
    assert blamed(report) == ["head.0"] and statuses(report)["head.0"] == status
    assert report.layers == ("last",) and not {"stem", "trap", "last"} & statuses(report).keys()
    with pytest.raises(RuntimeError, match="after 'last' alone"):
        report.raise_for_failure()


def test_a_head_that_cannot_is_not_advised(x):
    model = Network(nn.Identity())
    model.last, model.head.linear = nn.Identity(), nn.Sequential(Do(lambda h: F.hardsigmoid(h)), model.head.linear)
    report = check_double_backward(model, x)
    assert not report.ok and "alone work" not in str(report)


def test_of_several_feature_maps_the_one_before_a_fault_is_named(x, criterion):
    model = with_head(Do(Cube.apply))
    assert check_double_backward(model, x, criterion=criterion, layers=["last", "head.0"]).layers == ("last", "head.0")
    report = check_double_backward(model, x, criterion=criterion, layers=["stem", "last"])
    assert report.layers == ("stem",) and blamed(report) == ["trap"]


def test_a_map_of_a_function_is_its_last(x, criterion):
    model = Network(Do(lambda h: F.silu(F.hardsigmoid(F.silu(h)))))
    assert check_double_backward(model, x, criterion=criterion, layers="trap.silu()").verified
    model = Network(Do(lambda h: F.hardsigmoid(F.silu(h))))
    report = check_double_backward(model, x, criterion=criterion, layers="trap.silu()")
    assert not report.ok and "hardsigmoid" in report.findings[0].reason


def test_a_module_around_the_feature_map_is_not_blamed_for_what_runs_before_it(x, criterion):
    model = Network(nn.Sequential(nn.Hardsigmoid(), nn.Tanh(), nn.Hardsigmoid()))
    report = check_double_backward(model, x, criterion=criterion, layers="trap.1")
    assert blamed(report) == ["trap.2"] and "trap" not in statuses(report)


def test_a_map_in_a_tuple(x, criterion):
    class First(nn.Module):
        def forward(self, pair):
            return pair[0] * pair[1].mean()

    model = Network(nn.Sequential(nn.Hardsigmoid(), Do(lambda h: (h.tanh(), h.sigmoid())), First()))
    assert check_double_backward(model, x, criterion=criterion, layers="trap.1").verified


def test_a_frozen_backbone_without_a_graph(x, criterion):
    model = Network(nn.Hardsigmoid())
    model.last, last = Do(torch.no_grad()(lambda h: model.last.extra(h))), model.last
    model.last.extra = last
    for part in (model.stem, model.last):
        part.requires_grad_(False)
    assert check_double_backward(model, x, criterion=criterion, layers="last").verified
    trained(model, x)


def test_a_frozen_backbone_without_a_graph_up_to_the_map(x, criterion):
    """The map itself is what comes out of no_grad."""
    model = Network(nn.Hardsigmoid())
    frozen = nn.Sequential(model.stem, model.last).requires_grad_(False)
    model.stem, model.last = nn.Identity(), Do(torch.no_grad()(lambda h: frozen(h)))
    model.frozen = frozen
    assert check_double_backward(model, x, criterion=criterion, layers="frozen.1").verified
    SIBStep(model, criterion, "frozen.1")(x, torch.tensor([0, 1])).backward()
    assert model.head.linear.weight.grad.abs().sum() > 0


def test_a_map_inside_a_reentrant_checkpoint_is_left_unverified(x, criterion):
    """A step takes it rightly: PyTorch's function stands where the map's own would, so nothing else can."""
    models = [Network(nn.Identity()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    last = models[1].last
    models[1].last = Do(lambda h: checkpoint(last, h, use_reentrant=True))
    models[1].last.extra = last
    report = check_double_backward(models[1], x, criterion=criterion, layers="last.extra")
    assert report.ok and not report.verified
    assert "in a reentrant checkpoint" in str(report) and "use_reentrant=False" in str(report)
    gradients = []
    for model, place in zip(models, ("last", "last.extra"), strict=True):
        torch.manual_seed(0)
        SIBStep(model, criterion, place)(x, torch.tensor([0, 1])).backward()
        gradients.append([p.grad for p in model.parameters()])
    for of_plain, of_checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(of_checkpointed, of_plain, rtol=1e-6, atol=1e-8)


def test_attention_after_it_counts_as_in_the_whole(x, criterion):
    model = with_head(Attention())
    assert blamed(check_double_backward(model, x, criterion=criterion, layers="last")) == ["head.0.attention"]
    with fused_double_backward():
        assert check_double_backward(model, x, criterion=criterion, layers="last").verified


def test_a_head_of_zeros_passes_with_a_word_about_it(x, criterion):
    model = Network(nn.Hardsigmoid())
    nn.init.zeros_(model.head.linear.weight)
    report = check_double_backward(model, x, criterion=criterion)
    assert report.verified and "VJP is zero at the present parameters" in str(report)


def test_with_terms_of_the_input_the_whole_model_is_judged(x):
    model = Network(nn.Hardsigmoid())
    report = check_double_backward(model, x, criterion=SpatialIBLoss())
    assert blamed(report) == ["trap"] and report.layers == () and report.findings[0].fix == ADVICE


@pytest.mark.parametrize(
    "options, message",
    [
        ({"criterion": nn.CrossEntropyLoss()}, "criterion must be None or a sib_ext.SpatialIBLoss, got Cross"),
        ({"criterion": SpatialIBLoss(input_background=0, feature_background=0, feature_foreground=0)}, "no terms"),
        ({"layers": ()}, "name one, or leave layers out"),
        ({"layers": "nowhere"}, "layers: the model has no module 'nowhere'"),
        ({"layers": "last.relu()"}, r"'last.relu\(\)' did not run"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_wrong_arguments_are_named(options, message, x, criterion):
    with pytest.raises(ValueError, match=message):
        check_double_backward(Network(nn.Identity()), x, **{"criterion": criterion} | options)


def test_a_model_without_a_feature_map_is_told_so(x, criterion):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
    with pytest.raises(ValueError, match="no feature map was found"):
        check_double_backward(model, x, criterion=criterion)


@pytest.mark.parametrize("criterion", [None, SpatialIBLoss()], ids=["none", "with terms of the input"])
def test_layers_are_refused_where_the_whole_model_is_checked(criterion):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    model(x := torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="layers='0' has no meaning where the whole model is checked"):
        check_double_backward(model, x, criterion=criterion, layers="0")
