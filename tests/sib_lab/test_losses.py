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
    LOCALISATIONS,
    CentreMask,
    CrossEntropy,
    Forward,
    GradientPenalty,
    LocalisationLoss,
    RightForTheRightReasons,
    SpatialIB,
    background_share,
    captured,
    centre_mask,
    foreground_cross_entropy,
    interpolated,
    make_criterion,
    normalised,
    vjp_variance,
)
from torch import nn

from sib_ext import SIBStep, SpatialIBLoss

B, C, H, W, K = 4, 2, 5, 6, 3
FIXED = {"seed": "target_logit"}  #: of the balanced preset: no draws, so that a loss can be compared with itself
PLAIN = {"every": 1, "jitter": 0}  #: of the step: every term in every step
KINDS = ("background", "foreground", "empty")
LOCALISATION_LOSSES = [
    LocalisationLoss(kind, 2.0, *explanation)
    for kind in LOCALISATIONS
    for explanation in (("input_x_gradient",), ("gradcam", "features"))
]


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


# ------------------------------------------------------------------------------------------ localisation


def upsampled_by_hand(values, shape):
    """Bilinear, of [h,w], pixel by pixel; pixels' middles correspond, and the edge goes on outside."""
    result = np.zeros(shape)
    for i, j in np.ndindex(*shape):
        for axis_weights, row in weights_by_hand(i, shape[0], values.shape[0]):
            for weight, column in weights_by_hand(j, shape[1], values.shape[1]):
                result[i, j] += axis_weights * weight * values[row, column]
    return result


def weights_by_hand(place, size, of_size):
    source = max((place + 0.5) * of_size / size - 0.5, 0)
    low = int(source)
    return [(1 - (source - low), low), (source - low, min(low + 1, of_size - 1))]


def localisation_by_hand(kind, shown, mask):
    """The term of one explanation [h,w] >= 0 and one mask [H,W], pixel by pixel."""
    if shown.max() == 0:
        return 0.0
    E = upsampled_by_hand(shown / shown.max(), mask.shape)
    above, below = 0.0, 0.0
    for e, m in zip(E.ravel(), mask.ravel(), strict=True):
        if kind == "energy-loss":
            above, below = above + (1 - m) * e, below + e
        elif kind == "l1-loss":
            above, below = above + abs(e - m), below + 1
        elif kind == "rrr-loss":
            above, below = above + ((1 - m) * e) ** 2, below + 1
        else:
            above, below = above - m * (max(math.log(e), -100) if e > 0 else -100), below + m
    return above / below if below else 0.0


def grad_cam_by_hand(net, x, label):
    """[h,w] of one image: the head is linear, so its weights are the gradient."""
    A = net.features(x[None])[0].detach().numpy()
    alpha = net.head.weight.detach().numpy()[label].reshape(A.shape).mean((1, 2))
    return np.maximum((alpha[:, None, None] * A).sum(0), 0)


@pytest.fixture
def boundary_batch(batch):
    """Every case that a localisation loss tells apart."""
    x, y, mask, _ = batch
    x, y, mask = (torch.cat([values, values]) for values in (x, y, mask))
    x[0] = 0  # nothing is shown
    mask[1] = 0
    mask[2] = 1
    mask[3] = (mask[3] > 0.5).to(mask)
    x[3:5, :, 1:4, 1:4] = 0  # nothing is shown within the mask
    mask[4, :, 1:4, 1:4] = 1
    mask[5] = 0  # not annotated
    return x, y, mask, torch.tensor([True, True, True, True, True, False, True, False])


@pytest.mark.parametrize("dtype", [torch.double, torch.half, torch.bfloat16])
@pytest.mark.parametrize("kind", LOCALISATIONS)
def test_a_localisation_loss_of_input_x_gradient_is_its_formula(kind, dtype, linear, boundary_batch):
    linear = linear.to(dtype)
    x, y, mask, annotated = (values.to(dtype) if values.is_floating_point() else values for values in boundary_batch)
    parts = LocalisationLoss(kind, 2.0, "input_x_gradient")(linear, x, y, mask, annotated)
    weight, total = linear.weight.detach().double().numpy(), 0.0
    for b in range(len(x)):
        if annotated[b]:
            shown = np.abs(x[b].double().numpy() * weight[y[b]].reshape(C, H, W)).sum(0)
            total += localisation_by_hand(kind, shown, mask[b, 0].double().numpy())
    part = parts[LOCALISATIONS[kind].part]
    assert part.dtype == (torch.double if dtype == torch.double else torch.float)  # half precision is taken wider
    assert part.item() == pytest.approx(total / len(x), rel=1e-9 if dtype == torch.double else 1e-5)
    if dtype == torch.double:
        assert parts["loss"].item() == pytest.approx(cross_entropy_by_hand(linear(x), y)[0] + 2 * total / len(x))
    parts["loss"].backward()
    assert linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", LOCALISATIONS)
def test_a_localisation_loss_of_grad_cam_is_its_formula(kind, stride, batch):
    x, y, mask, annotated = batch
    net = Net(stride).double()
    with torch.no_grad():
        net.head.weight.add_(0.05)  # so that no map is zero everywhere
    parts = LocalisationLoss(kind, 1.0, "gradcam", "features")(net, x, y, mask, annotated)
    maps = [grad_cam_by_hand(net, x[b], y[b]) for b in range(B)]
    terms = [localisation_by_hand(kind, maps[b], mask[b, 0].numpy()) for b in range(B) if annotated[b]]
    assert all(cam.any() for cam in maps)
    assert parts[LOCALISATIONS[kind].part].item() == pytest.approx(sum(terms) / B)
    assert set(parts) == {"loss", "cross_entropy", LOCALISATIONS[kind].part}


@pytest.mark.parametrize("kind", LOCALISATIONS)
def test_a_smaller_feature_map_is_upsampled_as_torchcam_shows_it(kind, batch):
    torchcam = pytest.importorskip("torchcam.methods")
    x, y, mask, _ = batch
    net = Net(stride=2).double().eval()
    parts = LocalisationLoss(kind, 1.0, "gradcam", "features")(net, x, y, mask)
    with torchcam.GradCAM(net, "features") as extractor:
        (cams,) = extractor(y.tolist(), net(x), normalized=False)
    terms = [localisation_by_hand(kind, cams[b].detach().numpy(), mask[b, 0].numpy()) for b in range(B)]
    assert parts[LOCALISATIONS[kind].part].item() == pytest.approx(sum(terms) / B)


@pytest.mark.parametrize("kind", LOCALISATIONS)
def test_a_localisation_loss_knows_neither_the_explanations_scale_nor_the_images_size(kind, linear, batch):
    x, y, mask, annotated = batch
    part = LOCALISATIONS[kind].part
    criterion = LocalisationLoss(kind, 1.0, "input_x_gradient")
    expected = criterion(linear, x, y, mask, annotated)[part].item()
    with torch.no_grad():
        linear.weight.mul_(1e3)
    assert criterion(linear, x, y, mask, annotated)[part].item() == pytest.approx(expected)
    larger = Linear()
    twice = linear.weight.detach().view(K, C, H, W).repeat_interleave(2, 2).repeat_interleave(2, 3)
    larger.weight = nn.Parameter(twice.flatten(1))
    x, mask = (values.repeat_interleave(2, 2).repeat_interleave(2, 3) for values in (x, mask))
    assert criterion(larger, x, y, mask, annotated)[part].item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", LOCALISATIONS)
def test_descending_a_localisation_loss_brings_the_explanation_to_the_mask(kind, batch):
    x, y, *_ = batch
    mask = torch.zeros(B, 1, H, W, dtype=torch.float64)
    mask[:, :, 1:4, 1:4] = 1
    torch.manual_seed(5)
    net, part = Net().double(), LOCALISATIONS[kind].part
    measure = LocalisationLoss("energy-loss", 1.0, "gradcam", "features")
    criterion = LocalisationLoss(kind, 5.0, "gradcam", "features")
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    seen = []
    for _ in range(80):
        parts = criterion(net, x, y, mask)
        seen.append((parts[part].item(), 1 - measure(net, x, y, mask)["background"].item()))
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
    (term, epg), (last_term, last_epg) = seen[0], seen[-1]
    assert all(grad_cam_by_hand(net, x[b], y[b]).any() for b in range(B))  # by emptying no map
    assert last_term < 0.8 * term
    if kind in ("energy-loss", "rrr-loss"):
        assert last_epg > epg + 0.1


def test_an_explanation_of_zeros_has_no_term_and_no_gradient(linear, batch):
    x, y, mask, _ = batch
    for kind, (part, *_) in LOCALISATIONS.items():
        parts = LocalisationLoss(kind, 3.0, "input_x_gradient")(linear, torch.zeros_like(x), y, mask)
        assert parts[part] == 0 and parts["loss"] == parts["cross_entropy"]
        (gradient,) = torch.autograd.grad(parts["loss"], linear.weight)
        assert (gradient == 0).all()  # the cross-entropy's, too


def test_an_explanation_of_zeros_has_no_share_and_no_gradient():
    maps = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    maps[0, 0, 1, 1] = 2.0
    maps.requires_grad_()
    share = background_share(maps, torch.zeros(2, 1, 3, 3, dtype=torch.float64))
    assert share.tolist() == [1.0, 0.0]
    share.sum().backward()
    assert maps.grad.isfinite().all() and (maps.grad[1] == 0).all()


def test_normalising_has_the_gradient_of_the_maximum_too():
    maps = torch.tensor([[1.0, 4.0], [2.0, 3.0]], dtype=torch.float64).view(1, 1, 2, 2).requires_grad_()
    assert normalised(maps).flatten().tolist() == [0.25, 1, 0.5, 0.75]
    normalised(maps)[0, 0, 0, 0].backward()
    assert maps.grad.flatten().tolist() == [0.25, -1 / 16, 0, 0]
    assert torch.autograd.gradcheck(normalised, torch.rand(3, 1, 4, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_the_logarithm_of_an_explanation_is_bounded_as_is_its_slope(dtype):
    shown = [0.0, 1e-44, 1e-42, 1e-13, 1e-11, 0.5, 1.0]
    maps = torch.tensor(shown, dtype=dtype).view(7, 1, 1, 1).requires_grad_()
    values = foreground_cross_entropy(maps, torch.full_like(maps, 0.3))
    expected = [-max(math.log(e), -100) if e else 100 for e in maps.detach().double().flatten().tolist()]
    assert values.tolist() == pytest.approx(expected, rel=1e-5)
    values.sum().backward()
    assert maps.grad.flatten().tolist() == pytest.approx([0, 0, 0, 0, -1e11, -2, -1], rel=1e-5)


def test_an_empty_mask_has_no_cross_entropy_of_the_foreground():
    maps = torch.rand(2, 1, 3, 3, requires_grad=True)
    mask = torch.zeros(2, 1, 3, 3)
    mask[0, 0, 0, 0] = 1
    values = foreground_cross_entropy(maps, mask)
    assert values[0].item() == pytest.approx(-math.log(maps[0, 0, 0, 0].item())) and values[1] == 0
    values.sum().backward()
    assert maps.grad.isfinite().all() and maps.grad.count_nonzero() == 1


# -------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "criterion",
    [
        GradientPenalty(0.7, **FIXED),
        GradientPenalty(0.7, seed="probability_energy"),
        GradientPenalty(0.7, match=(1e-6,), **FIXED),
        RightForTheRightReasons(2.0),
        *LOCALISATION_LOSSES,
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


@pytest.mark.parametrize("kind", LOCALISATIONS)
def test_the_gradient_through_the_upsampling_is_the_difference_quotient(kind, batch):
    criterion = LocalisationLoss(kind, 2.0, "gradcam", "features")
    assert_gradient_is_the_difference_quotient(criterion, Net(stride=2).double(), *batch)


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


@pytest.mark.parametrize("criterion", [RightForTheRightReasons(2.0), *LOCALISATION_LOSSES], ids=repr)
def test_a_loss_that_needs_masks_is_cross_entropy_where_there_are_none(criterion, net, batch):
    x, y, mask, _ = batch
    expected = F.cross_entropy(net(x), y)
    nobody = torch.zeros(B, dtype=torch.bool)
    part = LOCALISATIONS[criterion.kind].part if isinstance(criterion, LocalisationLoss) else "background"
    for arguments in ((None, None), (mask, nobody)):
        parts = criterion(net, x, y, *arguments)
        assert parts["loss"].item() == pytest.approx(expected.item()) and parts[part] == 0
        parts["loss"].backward()


def test_what_a_mask_says_does_not_matter_where_it_is_no_annotation(net, batch):
    x, y, mask, annotated = batch
    other = torch.where(annotated[:, None, None, None], mask, 1 - mask)
    for criterion in (
        RightForTheRightReasons(2.0),
        *LOCALISATION_LOSSES,
        SpatialIB(SpatialIBLoss(**FIXED), **PLAIN),
    ):
        losses = [criterion(net, x, y, m, annotated)["loss"] for m in (mask, other)]
        assert torch.equal(*losses)


# ------------------------------------------------------------------------------------------------ hooks


def test_the_hook_on_a_layer_is_removed_even_when_the_network_fails(net, batch):
    x, y, mask, _ = batch
    criterion = LocalisationLoss("l1-loss", 1.0, "gradcam", "features")
    criterion(net, x, y, mask)
    with pytest.raises(RuntimeError):
        criterion(net, x[:, :1], y, mask)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_is_found_inside_the_wrappers(net, batch):
    from contextlib import nullcontext

    x, y, mask, _ = batch
    criterion = LocalisationLoss("energy-loss", 1.0, "gradcam", "features")
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
    parts = LocalisationLoss("energy-loss", 1.0, "gradcam", "tokens")(model, x, y, mask)
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


@pytest.mark.parametrize("method", ["sib", "centre-mask", "gradient-penalty", "rrr", *LOCALISATIONS])
def test_the_strength_multiplies_the_main_term(method, net, batch):
    extra = FIXED if method in ("sib", "centre-mask", "gradient-penalty") else {}
    extra = extra | PLAIN if method in ("sib", "centre-mask") else extra
    distances = []
    for strength in (0.0, 1.0, 3.0):
        parts = criterion_of(method, strength=strength, loss_options=extra)(net, *batch)
        distances.append((parts["loss"] - parts["cross_entropy"]).item())
    assert distances[0] == 0 and distances[2] == pytest.approx(3 * distances[1]) and distances[1] > 0


def test_a_preset_of_s_ib_that_is_none_is_named():
    with pytest.raises(ValueError, match="preset is 'fast'; choose one of 'paper', 'balanced', 'fine_tuning'"):
        criterion_of("sib", loss_options={"preset": "fast"})
    with pytest.raises(ValueError, match="preset"):
        criterion_of("sib-paper", loss_options={"preset": "balanced"})


def test_methods_get_their_own_constants():
    assert criterion_of("sib-paper").criterion.input_background == 1000
    assert criterion_of("sib-paper").given is False and criterion_of("sib-paper", masks="given").given is True
    assert criterion_of("sib").given is True and criterion_of("sib", masks="self-made").given is False
    assert criterion_of("sib", loss_options={"input_foreground": 0.3}).criterion.input_foreground == 0.3
    step = {"loss_options": {"preset": "fine_tuning"}}
    assert criterion_of("sib", **step).criterion.input_background == 3
    assert criterion_of("sib", strength=0.5, **step).criterion.input_background == 1.5
    assert criterion_of("centre-mask", **step).criterion.preset == "fine_tuning"
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
        ("ppce-loss", {"attribution": "lime"}, "attribution must be one of gradcam, input_x_gradient"),
        ("l1-loss", {"kind": "rrr-loss"}, "the method l1-loss cannot take the options {'kind': 'rrr-loss'}"),
        ("centre-mask", {"centre_area": 1.5}, r"area must lie in \(0, 1\), got 1.5"),
    ],
)
def test_a_loss_option_that_cannot_be_is_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        criterion_of(method, loss_options=options)


@pytest.mark.parametrize("kind", LOCALISATIONS)
def test_grad_cam_without_a_layer_says_so(kind):
    with pytest.raises(ValueError, match="needs the name of a layer"):
        make_criterion(TrainConfig(method=kind))
    explanation = {"attribution": "input_x_gradient"}
    criterion = make_criterion(TrainConfig(method=kind, loss_options=explanation))
    assert criterion.kind == kind and criterion.layer is None


def test_a_localisation_loss_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="kind must be one of energy-loss, l1-loss, rrr-loss, ppce-loss, got 'rrr'"):
        LocalisationLoss("rrr", 1.0, "input_x_gradient")


def test_right_for_the_right_reasons_is_another_loss_on_the_gradient_than_on_explanations(net, batch):
    assert isinstance(criterion_of("rrr"), RightForTheRightReasons)
    assert isinstance(criterion_of("rrr-loss"), LocalisationLoss)
    assert criterion_of("rrr")(net, *batch)["background"] != criterion_of("rrr-loss")(net, *batch)["background"]


def test_the_vjp_variance_of_half_precision_is_taken_in_single():
    R = torch.randn(3, 2, 50, 50) * 1e-4
    assert vjp_variance(R.bfloat16()).item() == pytest.approx(R.flatten(1).var(1).mean().item(), rel=1e-2)
