"""Terms at a feature map alone: whatever the backbone is made of, it only needs an ordinary backward."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sib_ext import SIBStep
from sib_ext.layers import find_feature_map

from .networks import CLASSES, IMAGES, SIDE
from .step_check import check_step, elementary, error, fixed, flat, of_features, seed

WIDTH, HALF = 8, SIDE // 2


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def batch(dtype=torch.float32):
    x = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5), dtype=dtype)
    mask = torch.zeros(IMAGES, 1, SIDE, SIDE, dtype=dtype)
    mask[:, :, 3:8, 4:10] = 1
    return x, torch.arange(IMAGES) % CLASSES, mask


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


class Backbone(nn.Module):
    """Something in the middle of it that cannot be differentiated twice."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, padding=1), nn.BatchNorm2d(WIDTH), nn.SiLU())
        self.middle = middle
        self.body = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(2, WIDTH), nn.SiLU())

    def forward(self, x):
        return self.body(self.middle(self.stem(x)))


class Network(nn.Module):
    """A backbone and a head that is not linear."""

    def __init__(self, middle: Callable = nn.Identity, under: Callable = torch.enable_grad):
        super().__init__()
        self.backbone, self.under = Backbone(middle()), under
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x):
        with self.under():
            h = self.backbone(x)
        return self.head(h.mean((2, 3)))


# ---------------------------------------------------------- what PyTorch cannot differentiate twice, and in plain ops


class Once(Function):
    """SiLU."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * s * (1 + x * (1 - s))


class OutsideTorch(Function):
    """SiLU whose backward is a constant to autograd: its own derivative would be dropped silently."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach().numpy().copy()
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        x = torch.from_numpy(ctx.x)
        s = x.sigmoid()
        return g.detach() * s * (1 + x * (1 - s))


class _NoSecond(Function):
    @staticmethod
    def forward(ctx, g):
        return g.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("no second derivative")


class Refusing(Function):
    """Like a fused kernel: a forward, a backward, and no more."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return _NoSecond.apply(g * ctx.saved_tensors[0].cos())


def fused_attention(h):
    rows = h.flatten(2).mT
    return F.scaled_dot_product_attention(rows[:, None], rows[:, None], rows[:, None])[:, 0].mT.unflatten(
        2, (HALF, HALF)
    )


def plain_attention(h):
    rows = h.flatten(2).mT
    return ((rows @ rows.mT / WIDTH**0.5).softmax(2) @ rows).mT.unflatten(2, (HALF, HALF))


def sampled(h):
    shift = torch.tensor([[[0.9, 0.1, 0.05], [-0.1, 0.8, 0.1]]], dtype=h.dtype).expand(len(h), -1, -1)
    return F.grid_sample(h, F.affine_grid(shift, h.shape, align_corners=False), align_corners=False)


def sampled_by_a_matrix(h):
    """Linear in h."""
    unit = torch.eye(HALF**2, dtype=h.dtype).view(HALF**2, 1, HALF, HALF)
    return (h.flatten(2) @ sampled(unit).flatten(1)).unflatten(2, (HALF, HALF))


def plain_hardsigmoid(h):
    return F.relu6(h + 3) / 6


def distances(h):
    return torch.cdist(h, h.flip(1) + 1, p=1.0)[:, :, :, :HALF]


def plain_distances(h):
    return (h.unsqueeze(-2) - (h.flip(1) + 1).unsqueeze(-3)).abs().sum(-1)[:, :, :, :HALF]


class Layers(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(4, WIDTH), nn.Tanh())


class Reentrant(Layers):
    def forward(self, h):
        return checkpoint(super().forward, h, use_reentrant=True)


class Encoder(nn.Module):
    """PyTorch's own, whose attention is fused."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, "gelu", batch_first=True)

    def forward(self, h):
        return self.layer(h.flatten(2).mT).mT.unflatten(2, (HALF, HALF))


def of(function: Callable) -> Callable[[], nn.Module]:
    return functools.partial(Network, functools.partial(Do, function))


def frozen(make: Callable[[], nn.Module], *places: str) -> nn.Module:
    model = make()
    for place in places:
        model.get_submodule(place).requires_grad_(False)
    return model


def unused(middle: Callable) -> nn.Module:
    model = Network(middle)
    model.unused = nn.Linear(2, 2)
    return model


BROKEN, PLAIN = of(Once.apply), of(F.silu)
#: name -> (the model, the same in plain operations)
PAIRS = {
    "once_differentiable": (BROKEN, PLAIN),
    "a backward outside of torch": (of(OutsideTorch.apply), PLAIN),
    "a backward without a derivative": (of(Refusing.apply), of(torch.sin)),
    "fused attention": (of(fused_attention), of(plain_attention)),
    "an encoder layer": (functools.partial(Network, Encoder),) * 2,
    "grid_sample": (of(sampled), of(sampled_by_a_matrix)),
    "cdist": (of(distances), of(plain_distances)),
    "reentrant checkpoint": (functools.partial(Network, Reentrant), functools.partial(Network, Layers)),
    "unused after a reentrant checkpoint": (functools.partial(unused, Reentrant), functools.partial(unused, Layers)),
    "frozen early layers": tuple(functools.partial(frozen, make, "backbone.stem") for make in (BROKEN, PLAIN)),
    "frozen backbone": tuple(functools.partial(frozen, make, "backbone") for make in (BROKEN, PLAIN)),
}
OPTIONS = {"whole": {}, "parts of two": {"microbatch": 2}, "unequal parts": {"microbatch": 4}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make, plain", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("layers", ["backbone.body", "auto"])
def test_a_backbone_only_needs_an_ordinary_backward(layers, make, plain, options):
    step = check_step(make, *batch(), layers, of_features(), exact=plain, **options)
    assert step.layers == ("backbone.body" if layers != "auto" else "backbone",)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hardsigmoid_in_its_own_precision(options):
    """In float64, too, its backward has 1/6 rounded to float32."""
    make, plain = of(F.hardsigmoid), of(plain_hardsigmoid)
    check_step(make, *batch(), "auto", of_features(), dtype=torch.float32, exact=plain, **options)


class UnderNoGrad(Network):
    """A frozen backbone as a feature extractor."""

    def __init__(self, under=torch.no_grad):
        super().__init__(functools.partial(Do, F.silu), under)
        self.backbone.requires_grad_(False)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_backbone_may_run_without_a_graph(options):
    plain = functools.partial(frozen, PLAIN, "backbone")
    check_step(UnderNoGrad, *batch(), "backbone", of_features(), exact=plain, **options)


def test_without_a_graph_the_feature_map_must_be_named():
    with pytest.warns(UserWarning, match="no feature map was found"), pytest.raises(ValueError, match="name a place"):
        SIBStep(UnderNoGrad(), of_features())(*batch())


def test_a_backbone_under_inference_mode_is_told_of_no_grad():
    with pytest.raises(RuntimeError, match="inference_mode.*under torch.no_grad"):
        SIBStep(UnderNoGrad(torch.inference_mode), of_features(), "backbone")(*batch())


def test_a_head_that_cannot_is_still_an_error():
    model = Network()
    model.head[1] = Do(Once.apply)
    loss = SIBStep(model, of_features(), "backbone")(*batch())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        loss.backward()


def test_the_search_leaves_no_gradient_of_a_reentrant_checkpoint():
    model = Network(Reentrant)
    model(batch()[0]).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    assert find_feature_map(model, batch()[0]) == "backbone"
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


# ------------------------------------------------------------------------------------------------- the loss alone


@pytest.mark.parametrize("make, plain", PAIRS.values(), ids=PAIRS)
def test_the_loss_alone_takes_any_backbone(make, plain):
    x, y, mask = batch(torch.float64)
    seed(0)
    model = make().double()
    A = model.backbone(x)
    if not A.requires_grad:
        A.requires_grad_()
    criterion = of_features()
    loss = criterion(model.head(A.mean((2, 3))), y, x, mask, features=A)
    loss.backward()
    assert not x.requires_grad
    seed(0)
    truth, gradients = elementary(plain().double(), criterion, ["backbone"], None, x, y, mask, IMAGES, 1)
    assert error(loss.detach(), truth) < 1e-9 and error(flat(model), gradients) < 1e-9


# ------------------------------------------------------------------------------------------------- and beside it


def test_steps_between_those_with_terms_of_the_input_are_as_free():
    x, y, mask = batch(torch.float64)
    options = {"feature_background": 5.0, "feature_foreground": 1.0}
    found = []
    for criterion, every in ((fixed(**options), 2), (of_features(), 1)):
        seed(0)
        model = BROKEN().double()
        step = SIBStep(model, criterion, "backbone", every=every, jitter=0)
        step.steps = 1
        step(x, y, mask).backward()
        found.append(flat(model))
    assert error(found[0], found[1]) < 1e-12
    step = SIBStep(BROKEN().double(), fixed(**options), "backbone", every=2, jitter=0)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        step(x, y, mask).backward()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_with_a_grad_scaler(options):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    check_step(BROKEN, *batch(), "auto", of_features(), exact=PLAIN, scaler=scaler, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_of_several_feature_maps_what_runs_before_the_first_is_free(options):
    check_step(BROKEN, *batch(), ("backbone.body.1", "backbone"), of_features(), exact=PLAIN, **options)


def test_before_the_last_feature_map_but_after_the_first_is_not():
    loss = SIBStep(BROKEN(), of_features(), ("backbone.stem", "backbone"))(*batch())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        loss.backward()


class Overwriting(Network):
    """A map that a function overwrites, as in DenseNet."""

    def forward(self, x):
        with self.under():
            h = self.backbone(x)
        return self.head(F.relu(h, inplace=True).mean((2, 3)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layers", ["backbone", "relu()"])
@pytest.mark.parametrize("under", [torch.enable_grad, torch.no_grad])
def test_a_frozen_feature_map_may_be_overwritten(under, layers, options):
    make = functools.partial(frozen, functools.partial(Overwriting, under=under), "backbone")
    plain = functools.partial(frozen, Overwriting, "backbone")
    check_step(make, *batch(), layers, of_features(), exact=plain, **options)


class Permuted(Network):
    """A map that is a view: [B,h,w,C]."""

    def __init__(self, under=torch.enable_grad):
        super().__init__(functools.partial(Do, F.silu), under)
        self.backbone.body.append(Do(lambda h: h.permute(0, 2, 3, 1)))
        self.backbone.requires_grad_(False)

    def forward(self, x):
        with self.under():
            h = self.backbone(x)
        return self.head(h.mean((1, 2)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("under", [torch.enable_grad, torch.no_grad])
def test_a_frozen_feature_map_may_be_a_view(under, options):
    make = functools.partial(Permuted, under=under)
    check_step(make, *batch(), "backbone", of_features(), exact=Permuted, **options)


class OverwrittenView(Permuted):
    """As tokens that a position is added to in place."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x):
        h = self.backbone(x)
        h += self.position
        return self.head(F.silu(h).mean((1, 2)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_frozen_view_may_be_overwritten(options):
    check_step(OverwrittenView, *batch(), "backbone", of_features(), **options)
