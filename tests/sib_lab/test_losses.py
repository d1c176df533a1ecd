"""Every training loss against values written out by hand and against difference quotients, in float64."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sib_lab.training.config import METHODS, TrainConfig
from sib_lab.training.losses import (
    CentreMask,
    CrossEntropy,
    EnergyLoss,
    Forward,
    GradientPenalty,
    RightForTheRightReasons,
    SpatialIB,
    background_share,
    captured,
    centre_mask,
    interpolated,
    make_criterion,
    vjp_variance,
)
from torch import nn

from sib_ext import SIBStep, SpatialIBLoss

B, C, H, W, K = 4, 2, 5, 6, 3
FIXED = {"seed": "target_logit"}  #: of the balanced preset: no draws, so that a loss can be compared with itself
PLAIN = {"every": 1, "jitter": 0}  #: of the step: every term in every step
KINDS = ("background", "foreground", "empty")


class Linear(nn.Module):
    """z = W x: every VJP is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, C * H * W) * 0.3)

    def forward(self, x):
        return x.flatten(1) @ self.weight.t()


class Net(nn.Module):
    """A feature map of the image's size and a linear head on all of it, smooth everywhere."""

    def __init__(self, stride=1):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(C, 3, 3, stride, padding=1), nn.Tanh())
        self.head = nn.Linear(3 * math.ceil(H / stride) * math.ceil(W / stride), K)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


@pytest.fixture
def batch():
    torch.manual_seed(3)
    x = torch.randn(B, C, H, W, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 2])
    mask = torch.rand(B, 1, H, W, dtype=torch.float64)
    annotated = torch.tensor([True, False, True, True])
    return x, y, mask, annotated


@pytest.fixture
def linear():
    return Linear().double()


@pytest.fixture
def net():
    return Net().double()


def cross_entropy_by_hand(logits, y):
    logits = logits.detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return float(-np.log(p[np.arange(len(y)), y.numpy()]).mean()), p


def assert_gradient_is_the_difference_quotient(criterion, model, *batch, step=1e-6):
    """Of ``loss`` in a random direction of all parameters."""
    criterion(model, *batch)["loss"].backward()
    parameters = list(model.parameters())
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True)).item()

    def at(distance):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += distance * d
        value = criterion(model, *batch)["loss"].item()
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p -= distance * d
        return value

    assert slope == pytest.approx((at(step) - at(-step)) / (2 * step), rel=2e-5)
    assert abs(slope) > 1e-6


def test_cross_entropy_is_minus_the_mean_log_probability(linear, batch):
    x, y, mask, annotated = batch
    parts = CrossEntropy()(linear, x, y, mask, annotated)
    assert parts["loss"].item() == pytest.approx(cross_entropy_by_hand(linear(x), y)[0])
    assert set(parts) == {"loss", "cross_entropy"} and not x.requires_grad


def test_the_penalty_of_a_linear_network_is_the_squared_norm_of_its_weights(linear, batch):
    x, y, mask, annotated = batch
    parts = GradientPenalty(0.7, **FIXED)(linear, x, y, mask, annotated)
    rows = linear.weight.detach().numpy()[y]
    energy = float((rows**2).sum(1).mean())
    assert parts["penalty"].item() == pytest.approx(energy)
    assert parts["loss"].item() == pytest.approx(cross_entropy_by_hand(linear(x), y)[0] + 0.7 * energy)
    assert parts["vjp_variance"].item() == pytest.approx(rows.var(1, ddof=1).mean())


def test_the_penaltys_gradient_of_a_linear_network_is_known(linear, batch):
    x, y, *_ = batch
    parts = GradientPenalty(0.7, **FIXED)(linear, x, y)
    (parts["loss"] - F.cross_entropy(linear(x), y)).backward()
    counts = torch.tensor([1, 1, 2])[:, None] / B
    torch.testing.assert_close(linear.weight.grad, 0.7 * 2 * counts * linear.weight.detach())


def test_right_for_the_right_reasons_of_a_linear_network_by_hand(linear, batch):
    x, y, mask, annotated = batch
    parts = RightForTheRightReasons(2.0)(linear, x, y, mask, annotated)
    cross_entropy, p = cross_entropy_by_hand(linear(x), y)
    weight = linear.weight.detach().numpy()
    total = 0.0
    for b in range(B):
        if annotated[b]:
            R = (weight[y[b]] - p[b] @ weight).reshape(C, H, W)  # d log p_y / dx
            total += (((1 - mask[b].numpy()) * R) ** 2).sum()
    assert parts["background"].item() == pytest.approx(total / B)
    assert parts["loss"].item() == pytest.approx(cross_entropy + 2 * total / B)


def test_input_x_gradient_outside_the_mask_of_a_linear_network_by_hand(linear, batch):
    x, y, mask, annotated = batch
    parts = EnergyLoss(2.0, "input_x_gradient")(linear, x, y, mask, annotated)
    weight, total = linear.weight.detach().numpy(), 0.0
    for b in range(B):
        if annotated[b]:
            shown = np.abs(x[b].numpy() * weight[y[b]].reshape(C, H, W)).sum(0)
            total += (shown * (1 - mask[b, 0].numpy())).sum() / shown.sum()
    assert parts["background"].item() == pytest.approx(total / B)
    assert parts["loss"].item() == pytest.approx(cross_entropy_by_hand(linear(x), y)[0] + 2 * total / B)


def test_grad_cam_outside_the_mask_by_hand(net, batch):
    x, y, mask, annotated = batch
    with torch.no_grad():
        net.head.weight.add_(0.05)  # so that no map is zero everywhere
    parts = EnergyLoss(1.0, "gradcam", "features")(net, x, y, mask, annotated)
    A = net.features(x).detach().numpy()
    head, total, maps = net.head.weight.detach().numpy().reshape(K, 3, H, W), 0.0, 0
    for b in range(B):
        alpha = head[y[b]].mean((1, 2))
        cam = np.maximum((alpha[:, None, None] * A[b]).sum(0), 0)
        maps += bool(cam.any())
        if annotated[b]:
            total += (cam * (1 - mask[b, 0].numpy())).sum() / cam.sum()
    assert maps == B
    assert parts["background"].item() == pytest.approx(total / B)


def test_a_smaller_feature_map_is_upsampled_as_torchcam_shows_it(batch):
    torchcam = pytest.importorskip("torchcam.methods")
    x, y, mask, _ = batch
    net = Net(stride=2).double().eval()
    parts = EnergyLoss(1.0, "gradcam", "features")(net, x, y, mask)
    with torchcam.GradCAM(net, "features") as extractor:
        (cam,) = extractor(y.tolist(), net(x), normalized=False)
    cam = F.interpolate(cam[:, None], size=(H, W), mode="bilinear", align_corners=False)
    shares = (cam * (1 - mask)).sum((1, 2, 3)) / cam.sum((1, 2, 3))
    assert parts["background"].item() == pytest.approx(shares.nan_to_num().mean().item())


@pytest.mark.parametrize(
    "criterion",
    [
        GradientPenalty(0.7, **FIXED),
        GradientPenalty(0.7, seed="probability_energy"),
        GradientPenalty(0.7, match=(1e-6,), **FIXED),
        RightForTheRightReasons(2.0),
        EnergyLoss(2.0, "input_x_gradient"),
        EnergyLoss(2.0, "gradcam", "features"),
        SpatialIB(SpatialIBLoss(**FIXED), **PLAIN),
        CentreMask(SpatialIBLoss(**FIXED), 0.3, **PLAIN),
    ],
    ids=repr,
)
def test_the_gradient_of_every_loss_is_the_difference_quotient(criterion, net, batch):
    x, y, mask, annotated = batch
    if isinstance(criterion, SpatialIB):
        annotated = None  # a self-made mask is detached: its difference quotient is another
    assert_gradient_is_the_difference_quotient(criterion, net, x, y, mask, annotated)


@pytest.mark.parametrize("options", [FIXED, {"preset": "paper"}], ids=["balanced", "paper"])
def test_s_ib_is_the_librarys_step(net, batch, options):
    x, y, mask, annotated = batch
    criterion = SpatialIBLoss(**options)
    expected = SIBStep(net, criterion, **PLAIN).terms(x, y, mask, annotated)
    parts = SpatialIB(criterion, **PLAIN)(net, x, y, mask, annotated)
    assert torch.equal(parts["loss"], expected.loss) and torch.equal(parts["cross_entropy"], expected.cross_entropy)
    by_place = {f"{kind}_{n}": v for kind in ("background", "foreground") for n, v in getattr(expected, kind).items()}
    by_place |= {f"empty_{name}": count / B for name, count in expected.empty.items()}
    assert by_place == {name: value for name, value in parts.items() if name.split("_")[0] in KINDS}
    assert ("background_features" in parts) == ("preset" not in options) and "background_input" in parts
    assert parts["vjp_variance"] == pytest.approx(expected.vjp.flatten(1).var(1).mean().item())

    without = SIBStep(net, criterion, **PLAIN).terms(x, y)
    assert torch.equal(SpatialIB(criterion, given=False, **PLAIN)(net, x, y, mask, annotated)["loss"], without.loss)
    assert without.loss != expected.loss


class Functional(nn.Module):
    """Its last feature map is no module's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("layers", ["auto", "relu()"])
def test_a_feature_map_that_a_function_makes_has_its_name_in_the_network(layers):
    model = Forward(Functional(), contextlib.nullcontext)
    parts = SpatialIB(SpatialIBLoss(**FIXED), layers=layers, **PLAIN)(model, torch.randn(4, 3, 16, 16), torch.arange(4))
    assert "background_relu()" in parts


def test_the_centre_mask_stands_in_for_every_given_one(net, batch):
    x, y, mask, annotated = batch
    centre = centre_mask(H, W, 0.3).expand(B, 1, H, W)
    criterion = SpatialIBLoss(**FIXED)
    expected = SIBStep(net, criterion, **PLAIN).terms(x, y, centre)
    assert torch.equal(CentreMask(criterion, 0.3, **PLAIN)(net, x, y, mask, annotated)["loss"], expected.loss)


@pytest.mark.parametrize("area", [0.01, 0.1, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("size", [(5, 5), (6, 9), (40, 40)])
def test_a_centre_mask_has_its_area_and_is_symmetric(size, area):
    mask = centre_mask(*size, area)
    assert mask.mean().item() == pytest.approx(area, rel=1e-5) and mask.min() >= 0 and mask.max() <= 1
    torch.testing.assert_close(mask, mask.flip(0, 1), atol=1e-6, rtol=0)


def test_a_centre_mask_of_a_quarter_is_the_middle_square():
    expected = torch.zeros(8, 8)
    expected[2:6, 2:6] = 1
    torch.testing.assert_close(centre_mask(8, 8, 0.25), expected)


# ----------------------------------------------------------------------------------------- annotations


@pytest.mark.parametrize("criterion", [RightForTheRightReasons(2.0), EnergyLoss(2.0, "gradcam", "features")], ids=repr)
def test_a_loss_that_needs_masks_is_cross_entropy_where_there_are_none(criterion, net, batch):
    x, y, mask, _ = batch
    expected = F.cross_entropy(net(x), y)
    nobody = torch.zeros(B, dtype=torch.bool)
    for arguments in ((None, None), (mask, nobody)):
        parts = criterion(net, x, y, *arguments)
        assert parts["loss"].item() == pytest.approx(expected.item()) and parts["background"] == 0
        parts["loss"].backward()


def test_what_a_mask_says_does_not_matter_where_it_is_no_annotation(net, batch):
    x, y, mask, annotated = batch
    other = torch.where(annotated[:, None, None, None], mask, 1 - mask)
    for criterion in (
        RightForTheRightReasons(2.0),
        EnergyLoss(2.0, "gradcam", "features"),
        EnergyLoss(2.0, "input_x_gradient"),
        SpatialIB(SpatialIBLoss(**FIXED), **PLAIN),
    ):
        losses = [criterion(net, x, y, m, annotated)["loss"] for m in (mask, other)]
        assert torch.equal(*losses)


def test_an_explanation_of_zeros_has_no_share_and_no_gradient():
    maps = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    maps[0, 0, 1, 1] = 2.0
    maps.requires_grad_()
    share = background_share(maps, torch.zeros(2, 1, 3, 3, dtype=torch.float64))
    assert share.tolist() == [1.0, 0.0]
    share.sum().backward()
    assert maps.grad.isfinite().all() and (maps.grad[1] == 0).all()


# ------------------------------------------------------------------------------------------------ hooks


def test_the_hook_on_a_layer_is_removed_even_when_the_network_fails(net, batch):
    x, y, mask, _ = batch
    EnergyLoss(1.0, "gradcam", "features")(net, x, y, mask)
    with pytest.raises(RuntimeError):
        EnergyLoss(1.0, "gradcam", "features")(net, x[:, :1], y, mask)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_is_found_inside_the_wrappers(net, batch):
    from contextlib import nullcontext

    x, y, mask, _ = batch
    criterion = EnergyLoss(1.0, "gradcam", "features")
    assert torch.equal(criterion(Forward(net, nullcontext), x, y, mask)["loss"], criterion(net, x, y, mask)["loss"])


def test_a_layer_that_is_not_there_is_named(net):
    with pytest.raises(ValueError, match="Net has no layer 'layer9'"), captured(net, "layer9"):
        pass


def test_tokens_of_a_vision_transformer_are_a_grid(batch):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Identity(), nn.Linear(C * 17, K)

        def forward(self, x):
            patches = x[:, :, :4, :4].flatten(2).transpose(1, 2)  # 16 patches
            return self.head(self.tokens(torch.cat([patches[:, :1], patches], 1)).flatten(1))

    x, y, _, _ = batch
    model = Tokens().double()
    mask = torch.rand(B, 1, 4, 4, dtype=torch.float64)
    x = x.requires_grad_()
    parts = EnergyLoss(1.0, "gradcam", "tokens")(model, x, y, mask)
    weight, total = model.head.weight.detach().numpy().reshape(K, 17, C), 0.0
    for b in range(B):
        alpha = weight[y[b], 1:].mean(0)
        cam = np.maximum(np.tensordot(alpha, x[b, :, :4, :4].detach().numpy(), 1), 0)
        total += (cam * (1 - mask[b, 0].numpy())).sum() / cam.sum() if cam.any() else 0
    assert parts["background"].item() == pytest.approx(total / B)


# ------------------------------------------------------------------------------------- matched strength


def test_a_curve_is_read_between_the_middles_of_its_parts():
    values = (1.0, 3.0, 2.0)
    assert [interpolated(values, p) for p in (0, 1 / 6, 2 / 6, 0.5, 5 / 6, 0.99)] == pytest.approx([1, 1, 2, 3, 2, 2])
    assert interpolated((7.0,), 0.0) == interpolated((7.0,), 0.9) == 7.0


def test_a_matched_penalty_grows_with_the_logarithm_of_the_mismatch(linear, batch):
    x, y, *_ = batch
    variance = linear.weight.detach()[y].var(1).mean().item()
    square, straight = math.log(2) ** 2 / 2, math.log(7) - 0.5
    for factor, penalty in ((1, 0), (2, square), (1 / 2, square), (7, straight), (1 / 7, straight)):
        target = variance * factor
        parts = GradientPenalty(5.0, match=(target,), **FIXED)(linear, x, y)
        assert parts["penalty"].item() == pytest.approx(penalty)
        assert (parts["loss"] - parts["cross_entropy"]).item() == pytest.approx(5 * penalty)


def test_the_target_is_that_of_the_time(linear, batch):
    x, y, *_ = batch
    variance = linear.weight.detach()[y].var(1).mean().item()
    criterion = GradientPenalty(match=(variance, variance / 4), **FIXED)
    for progress, penalty in ((0.0, 0), (0.5, math.log(1.6) ** 2 / 2), (0.9, math.log(4) - 0.5)):
        criterion.advance(progress)
        assert criterion(linear, x, y)["penalty"].item() == pytest.approx(penalty, abs=1e-9)


def test_a_matched_penalty_brings_the_variance_to_its_target(batch):
    x, y, *_ = batch
    torch.manual_seed(1)
    start = Linear().double()

    def trained(criterion):
        model = Linear().double()
        model.load_state_dict(start.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(800):
            criterion.advance(step / 800)
            optimizer.zero_grad()
            parts = criterion(model, x, y)
            parts["loss"].backward()
            optimizer.step()
        return parts["vjp_variance"].item()

    free = trained(GradientPenalty(0.0, **FIXED))
    for share in (0.2, 0.5, 4):
        assert trained(GradientPenalty(match=(free * share,), **FIXED)) == pytest.approx(free * share, rel=0.06)


# -------------------------------------------------------------------------------------------- by config


def criterion_of(method, **options):
    return make_criterion(replace(TrainConfig(), method=method, **options), layer="features", area=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_named_scalars_of_which_only_the_loss_has_a_gradient(method, net, batch):
    parts = criterion_of(method)(net, *batch)
    assert {"loss", "cross_entropy"} <= set(parts)
    for name, value in parts.items():
        assert value.shape == () and value.isfinite() and value.requires_grad == (name == "loss")


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"ce"}))
def test_no_method_is_cross_entropy_by_another_name(method, net, batch):
    parts = criterion_of(method)(net, *batch)
    assert abs(parts["loss"] - parts["cross_entropy"]) > 1e-6


@pytest.mark.parametrize("method", ["sib", "centre-mask", "gradient-penalty", "rrr", "energy-loss"])
def test_the_strength_multiplies_the_main_term(method, net, batch):
    extra = FIXED if method in ("sib", "centre-mask", "gradient-penalty") else {}
    extra = extra | PLAIN if method in ("sib", "centre-mask") else extra
    distances = []
    for strength in (0.0, 1.0, 3.0):
        parts = criterion_of(method, strength=strength, loss_options=extra)(net, *batch)
        distances.append((parts["loss"] - parts["cross_entropy"]).item())
    assert distances[0] == 0 and distances[2] == pytest.approx(3 * distances[1]) and distances[1] > 0


def test_methods_get_their_own_constants():
    assert criterion_of("sib-paper").criterion.input_background == 1000
    assert criterion_of("sib-paper").given is False and criterion_of("sib-paper", masks="given").given is True
    assert criterion_of("sib").given is True and criterion_of("sib", masks="self-made").given is False
    assert criterion_of("sib", loss_options={"input_foreground": 0.3}).criterion.input_foreground == 0.3
    assert criterion_of("centre-mask").area == 0.15
    assert make_criterion(TrainConfig(method="centre-mask")).area == 0.2
    assert criterion_of("centre-mask", loss_options={"centre_area": 0.4}).area == 0.4


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rrr", {"speed": 3}, "the method rrr cannot take the options {'speed': 3}"),
        ("sib", {"backgroundweight": 3}, "the method sib cannot take the options"),
        ("sib", {"background": "noise"}, "background"),
        ("gradient-penalty", {"match": [-1.0]}, "cannot take the options"),
        ("gradient-penalty", {"seed": "all"}, "seed must be one of probability_energy"),
        ("energy-loss", {"attribution": "lime"}, "attribution must be one of gradcam, input_x_gradient"),
        ("centre-mask", {"centre_area": 1.5}, r"area must lie in \(0, 1\), got 1.5"),
    ],
)
def test_a_loss_option_that_cannot_be_is_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        criterion_of(method, loss_options=options)


def test_energy_loss_without_a_layer_says_so():
    with pytest.raises(ValueError, match="needs the name of a layer"):
        make_criterion(TrainConfig(method="energy-loss"))


def test_the_vjp_variance_of_half_precision_is_taken_in_single():
    R = torch.randn(3, 2, 50, 50) * 1e-4
    assert vjp_variance(R.bfloat16()).item() == pytest.approx(R.flatten(1).var(1).mean().item(), rel=1e-2)
