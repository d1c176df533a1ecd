"""Every estimator against its definition, its bounds and its degenerate inputs."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sib_ext import SpatialIBLoss, estimators, masked_statistics
from sib_ext import functional as sib

from .compare import assert_near, gradients
from .samples import LARGE, Fields, Sample

SIX = Sample("six", (6, 3, 7, 8))
COUNT = SIX.fields().vjp[0].numel()
BACKGROUND = estimators.BACKGROUND | {
    "gaussian": lambda moments, count: sib.background_gaussian(moments, count, 0.3),
}
FOREGROUND = estimators.FOREGROUND | {"capacity": sib.foreground_capacity}
GRAM_FOREGROUND = {name: FOREGROUND[name] for name in estimators.OF_GRAMS}
MOMENT_FOREGROUND = {name: FOREGROUND[name] for name in estimators.OF_INPUT if name not in estimators.OF_GRAMS}
FIELD_FOREGROUND = {name: f for name, f in FOREGROUND.items() if name not in estimators.OF_INPUT}


def masked_fields(fields):
    return fields.vjp * fields.mask, fields.x * fields.mask, fields.vjp * (1 - fields.mask)


def estimate_all(fields, count=COUNT):
    moments, gram_vjp, gram_input = masked_statistics(*fields)
    return {
        **{f"background {name}": f(moments, count) for name, f in BACKGROUND.items()},
        "background gaussian, relative noise": sib.background_gaussian(
            moments, count, sib.relative_noise(fields.vjp, 0.5)
        ),
        **{f"foreground {name}": f(gram_vjp, gram_input) for name, f in GRAM_FOREGROUND.items()},
        **{f"foreground {name}": f(moments, count) for name, f in MOMENT_FOREGROUND.items()},
        **{f"foreground {name}": f(sib.magnitude(fields.vjp), fields.mask) for name, f in FIELD_FOREGROUND.items()},
    }


NAMES = tuple(estimate_all(SIX.fields()))


def test_the_docs_and_the_loss_name_every_estimator():
    root = Path(__file__).parent.parent
    rows = (root / "docs/method.md").read_text()
    readme = (root / "README.md").read_text().splitlines()
    for part, names in (("background", estimators.BACKGROUND), ("foreground", estimators.FOREGROUND)):
        options = next(line for line in readme if line.startswith(f"| `{part}` |"))
        for name in names:
            assert f"| {part} `{name}` |" in rows and f"`{name}`" in options, name
            assert f'``"{name}"``' in SpatialIBLoss.__doc__, name


# --------------------------------------------------------------------------------------------- background


def test_background_variance_is_the_unbiased_variance_over_channels_and_pixels():
    c = masked_fields(SIX.fields())[2]
    assert_near(estimate_all(SIX.fields())["background variance"], c.flatten(1).var(1), 1e-12)


def test_background_energy_is_the_mean_square():
    c = masked_fields(SIX.fields())[2]
    assert_near(estimate_all(SIX.fields())["background energy"], c.square().mean((1, 2, 3)), 1e-12)


def test_background_energy_ratio_is_the_background_s_share_of_the_masked_energy():
    a, _, c = masked_fields(SIX.fields())
    inside, outside = a.square().sum((1, 2, 3)), c.square().sum((1, 2, 3))
    ratio = estimate_all(SIX.fields())["background energy_ratio"]
    assert_near(ratio, outside / (inside + outside), 1e-12)
    assert (ratio >= 0).all() and (ratio <= 1).all()


@pytest.mark.parametrize("mask_value, expected", [(0.0, 1.0), (1.0, 0.0)])
def test_background_energy_ratio_reaches_its_bounds(mask_value, expected):
    vjp, x, mask = SIX.fields()
    ratio = estimate_all(Fields(vjp, x, torch.full_like(mask, mask_value)))["background energy_ratio"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, expected))


def test_background_gaussian_is_the_capacity_of_a_gaussian_channel():
    c = masked_fields(SIX.fields())[2].flatten(1)
    assert_near(estimate_all(SIX.fields())["background gaussian"], 0.5 * (1 + c.var(1) / 0.3).log(), 1e-12)


def test_relative_noise_is_kappa_times_the_mean_variance_of_the_vjp_without_gradient():
    vjp = SIX.fields().vjp.requires_grad_()
    noise = sib.relative_noise(vjp, 0.5)
    assert not noise.requires_grad
    assert_near(noise, 0.5 * torch.stack([sample.var() for sample in vjp]).mean(), 1e-12)
    half = sib.relative_noise(vjp.bfloat16(), 0.5)
    assert half.dtype == torch.float32
    assert_near(half, noise, 1e-2)


# --------------------------------------------------------------------------------------------- foreground


def normalised_grams():
    a, b, _ = masked_fields(SIX.fields())
    rows = [F.normalize(t.flatten(1), dim=1) for t in (a, b)]
    return [r @ r.T for r in rows]


def test_the_normalised_gram_is_that_of_normalised_rows():
    _, gram_vjp, gram_input = masked_statistics(*SIX.fields())
    for gram, expected in zip((gram_vjp, gram_input), normalised_grams(), strict=True):
        assert_near(sib.normalised_gram(gram), expected, 1e-12)


def test_foreground_hsic_is_the_biased_estimator_with_explicit_centring():
    K, L = normalised_grams()
    batch = K.shape[0]
    H = torch.eye(batch, dtype=K.dtype) - 1 / batch
    expected = ((H @ K @ H) * (H @ L @ H)).sum() / (batch - 1) ** 2
    assert_near(estimate_all(SIX.fields())["foreground hsic"], expected, 1e-12)


def test_foreground_cka_is_hsic_over_the_norms():
    K, L = normalised_grams()
    H = torch.eye(K.shape[0], dtype=K.dtype) - 1 / K.shape[0]
    hsic = lambda P, Q: torch.trace(P @ H @ Q @ H)  # noqa: E731
    expected = hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()
    assert_near(estimate_all(SIX.fields())["foreground cka"], expected, 1e-12)


@pytest.mark.parametrize("batch", [4, 5, 6])
def test_foreground_hsic_unbiased_is_the_mean_over_tuples_of_distinct_samples(batch):
    """Song et al. 2012: E[k k'] - 2 E[k l] + E[k] E[l], each mean over distinct indices only."""
    K, L = (gram[:batch, :batch] for gram in normalised_grams())

    def mean(terms, size):
        return sum(terms) / (math.factorial(batch) / math.factorial(batch - size))

    of = lambda size: itertools.permutations(range(batch), size)  # noqa: E731
    expected = (
        mean((K[i, j] * L[i, j] for i, j in of(2)), 2)
        - 2 * mean((K[i, j] * L[i, k] for i, j, k in of(3)), 3)
        + mean((K[i, j] * L[k, m] for i, j, k, m in of(4)), 4)
    )
    assert_near(sib.foreground_hsic_unbiased(K, L), expected, 1e-10)


def test_foreground_hsic_unbiased_averages_to_zero_for_independent_data_and_the_biased_one_does_not():
    grams = []
    for _ in range(2):
        rows = F.normalize(torch.randn(2000, 5, 30, dtype=torch.float64), dim=2)
        grams.append(rows @ rows.transpose(1, 2))
    unbiased, biased = (
        torch.stack([f(K, L) for K, L in zip(*grams, strict=True)])
        for f in (sib.foreground_hsic_unbiased, sib.foreground_hsic)
    )
    assert unbiased.mean().abs() < 4 * unbiased.std() / len(unbiased) ** 0.5
    torch.testing.assert_close(biased.mean().item(), 1 / 4, rtol=0.05, atol=0)


def test_foreground_gaussian_is_the_information_of_the_correlation():
    a, b, _ = masked_fields(SIX.fields())
    rho = torch.stack(
        [torch.corrcoef(torch.stack([u.flatten(), v.flatten()]))[0, 1] for u, v in zip(a, b, strict=True)]
    )
    assert_near(estimate_all(SIX.fields())["foreground gaussian"], -0.5 * torch.log(1 - rho**2), 1e-10)


def test_foreground_gaussian_of_equal_fields_is_large_but_bounded_and_has_a_finite_gradient():
    x = SIX.fields().x.requires_grad_()
    moments = masked_statistics(x, x, torch.ones_like(x[:, :1])).moments
    information = sib.foreground_gaussian(moments, COUNT)
    torch.testing.assert_close(information, torch.full_like(information, -0.5 * math.log(1e-6)), rtol=1e-6, atol=0)
    assert gradients(information.sum(), [x])[0].isfinite().all()


def test_a_field_compared_with_itself_has_a_cka_of_one_and_never_more():
    _, gram, other = masked_statistics(*SIX.fields())
    torch.testing.assert_close(sib.foreground_cka(gram, gram).item(), 1.0)
    assert 0 <= sib.foreground_cka(gram, other) <= 1


# ---------------------------------------------------------------------------------- invariances and limits


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_samples_and_of_pixels_does_not_matter(name):
    fields = SIX.fields()
    estimate = estimate_all(fields)[name]
    order = torch.randperm(6)
    shuffled = estimate_all(Fields(*(t[order] for t in fields)))[name]
    assert_near(shuffled, estimate[order] if estimate.dim() else estimate, 1e-12)
    mirrored = estimate_all(Fields(*(t.flip(2, 3) for t in fields)))[name]
    assert_near(mirrored, estimate, 1e-12)


@pytest.mark.parametrize("scale", [1e-6, -30.0, 1e6])
@pytest.mark.parametrize(
    "name",
    [
        "background energy_ratio",
        "background magnitude_ratio",
        "background gaussian, relative noise",
        *(f"foreground {name}" for name in FOREGROUND),
    ],
)
def test_the_scale_of_the_vjp_does_not_matter_to_scale_free_estimators(name, scale):
    vjp, x, mask = SIX.fields()
    assert_near(estimate_all(Fields(scale * vjp, x, mask))[name], estimate_all(Fields(vjp, x, mask))[name], 1e-6)


@pytest.mark.parametrize("name, power", [("variance", 2), ("energy", 2)])
def test_variance_and_energy_grow_with_the_square_of_the_scale(name, power):
    vjp, x, mask = SIX.fields()
    name = f"background {name}"
    scaled = estimate_all(Fields(3 * vjp, x, mask))[name]
    assert_near(scaled, 3**power * estimate_all(Fields(vjp, x, mask))[name], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("degenerate", ["zero vjp", "zero x", "zero mask", "full mask", "equal samples", "tiny vjp"])
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_fields_give_finite_values_and_gradients(name, degenerate, dtype):
    vjp, x, mask = SIX.fields(dtype)
    fields = {
        "zero vjp": Fields(torch.zeros_like(vjp), x, mask),
        "zero x": Fields(vjp, torch.zeros_like(x), mask),
        "zero mask": Fields(vjp, x, torch.zeros_like(mask)),
        "full mask": Fields(vjp, x, torch.ones_like(mask)),
        "equal samples": Fields(*(t[:1].expand(t.shape) for t in (vjp, x, mask))),
        "tiny vjp": Fields(1e-12 * vjp, x, mask),
    }[degenerate].requiring_grad()
    estimate = estimate_all(fields)[name]
    assert estimate.isfinite().all()
    for gradient in gradients(estimate.sum(), fields):
        assert gradient.isfinite().all()


def test_a_sample_whose_foreground_is_zero_leaves_the_others_gradients_finite():
    vjp, x, mask = SIX.fields(torch.float32)
    mask[2] = 0
    fields = Fields(vjp, x, mask).requiring_grad()
    for name, estimate in estimate_all(fields).items():
        for gradient in gradients(estimate.sum(), fields):
            assert gradient.isfinite().all(), name


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_the_statistics_equal_finite_differences(name):
    fields = tuple(t.requires_grad_() for t in Sample("small", (4, 2, 3, 4)).fields())

    def function(*fields):
        return estimate_all(Fields(*fields), count=24)[name]

    if name.endswith("relative noise"):
        pytest.skip("its noise is detached on purpose, which finite differences do not know")
    assert torch.autograd.gradcheck(function, fields, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, fields, fast_mode=True)


# ------------------------------------------------------------------------------------------------- capacity


def test_capacity_is_that_of_a_gaussian_channel_at_every_position_of_the_foreground():
    """Sample by sample and position by position; the noise is relative to the mean of the batch."""
    field, mask = SIX.fields().vjp.abs().sum(1, keepdim=True), SIX.fields().mask
    mean = float(field.mean())
    for b, found in enumerate(sib.foreground_capacity(field, mask, kappa=0.4)):
        pairs = list(zip(field[b].flatten().tolist(), mask[b].flatten().tolist(), strict=True))
        nats = sum(m * 0.5 * math.log(1 + (f / mean) ** 2 / 0.4) for f, m in pairs)
        assert float(found) == pytest.approx(nats / sum(m for _, m in pairs), rel=1e-12)
    log = sib.foreground_log_capacity(field, mask, kappa=0.4)
    assert_near(log, (sib.foreground_capacity(field, mask, kappa=0.4) + 0.05).log(), 1e-12)


def test_the_mean_of_a_larger_batch_can_be_given():
    field, mask = SIX.fields().vjp.abs().sum(1, keepdim=True), SIX.fields().mask
    whole = sib.foreground_log_capacity(field, mask)
    parts = [sib.foreground_log_capacity(field[i : i + 2], mask[i : i + 2], field.mean()) for i in (0, 2, 4)]
    assert_near(torch.cat(parts), whole, 1e-12)


def test_capacity_spreads_over_the_object():
    """Concave where the field is strong: of one sum, the flat field carries the most."""
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    mask[:, :, 2:6, 2:6] = 1
    spread = mask.clone()
    peak = torch.zeros_like(mask)
    peak[:, :, 3, 3] = 16
    half = torch.zeros_like(mask)
    half[:, :, 2:6, 2:4] = 2
    values = [float(sib.foreground_capacity(field, mask)) for field in (spread, half, peak)]
    assert values[0] > values[1] > values[2] > 0


def test_log_capacity_makes_a_fading_sample_pay_though_the_others_gain():
    """Of two ways to share one strength over a batch the even one is the better; for the plain mean it is not."""
    mask = torch.ones(2, 1, 4, 4, dtype=torch.float64)
    even, uneven = mask.clone(), mask.clone()
    uneven[0] *= 0.1
    uneven[1] *= 1.9
    assert sib.foreground_log_capacity(even, mask).mean() > sib.foreground_log_capacity(uneven, mask).mean() + 0.5
    assert float(sib.foreground_log_capacity(0 * mask, mask).mean()) == pytest.approx(math.log(0.05))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_capacity_of_narrow_fields_accumulates_in_float32(dtype):
    vjp, _, mask = SIX.fields(dtype)
    found = sib.foreground_capacity(sib.magnitude(vjp), mask)
    assert found.dtype == torch.float32
    assert_near(found, sib.foreground_capacity(sib.magnitude(vjp.double()), mask.double()).float(), 1e-5)


def test_capacity_refuses_other_shapes():
    vjp, _, mask = SIX.fields()
    with pytest.raises(ValueError, match=r"field must be a map \[B,1,h,w\].*magnitude"):
        sib.foreground_capacity(vjp, mask)
    with pytest.raises(ValueError, match="mask must be"):
        sib.foreground_log_capacity(sib.magnitude(vjp), mask[:, :, :1, :1])


@pytest.mark.parametrize("kappa", [0, -1.0, math.nan])
def test_capacity_refuses_noise_that_is_not_positive(kappa):
    field, mask = SIX.fields().vjp.abs().sum(1, keepdim=True), SIX.fields().mask
    with pytest.raises(ValueError, match="kappa must be a finite number > 0"):
        sib.foreground_capacity(field, mask, kappa=kappa)


# -------------------------------------------------------------------------------------------- small batches


@pytest.mark.parametrize("name, least", [("hsic", 2), ("hsic_unbiased", 4), ("cka", 2)])
def test_estimators_that_compare_samples_refuse_too_few(name, least):
    gram = torch.eye(least, dtype=torch.float64) + 1
    assert GRAM_FOREGROUND[name](gram, gram).isfinite()
    with pytest.raises(ValueError, match=f"foreground='{name}'.*at least {least}, got {least - 1}: use larger batches"):
        GRAM_FOREGROUND[name](gram[1:, 1:], gram[1:, 1:])


def test_one_pixel_of_one_channel_has_no_variance():
    moments = masked_statistics(*Sample("pixel", (2, 1, 1, 1)).fields()).moments
    assert not sib.background_variance(moments, 1).any()
    assert sib.foreground_gaussian(moments, 1).isfinite().all()


# --------------------------------------------------------------------------------------------------- fields


def test_the_magnitude_is_the_channel_sum_of_absolute_values():
    vjp, _, _ = LARGE.fields()
    assert_near(sib.magnitude(vjp), vjp.abs().sum(1, keepdim=True), 1e-14)
    assert sib.magnitude(vjp.bfloat16()).dtype == torch.float32


def test_the_magnitude_ratio_is_one_less_the_energy_based_pointing_game():
    vjp, x, mask = LARGE.fields()
    field = sib.magnitude(vjp)
    moments = masked_statistics(vjp, x, mask).moments
    share = (field * mask).sum((1, 2, 3)) / field.sum((1, 2, 3))
    assert_near(sib.background_magnitude_ratio(moments, vjp[0].numel()), 1 - share, 1e-12)
    assert_near(sib.background_magnitude_ratio(1e-12 * moments, vjp[0].numel()), 1 - share, 1e-6)


def test_the_class_activation_weighs_each_plane_with_its_mean_vjp_and_lets_nothing_cancel():
    vjp, x, _ = LARGE.fields()
    field = sib.class_activation(x, vjp)
    assert field.shape == (4, 1, 40, 37)
    assert_near(field, torch.einsum("bc,bchw->bchw", vjp.mean((2, 3)), x).abs().sum(1, keepdim=True), 1e-14)


def test_the_class_activation_refuses_fields_that_do_not_match():
    vjp, x, _ = LARGE.fields()
    with pytest.raises(ValueError, match="features and vjp must be alike.*pass the feature map"):
        sib.class_activation(x[:, :2], vjp)
