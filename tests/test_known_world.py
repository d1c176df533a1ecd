"""benchmarks/known_world.py: its closed forms against draws, and what docs/theory.md says of claims and estimators."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

for needed in ("matplotlib", "rich", "scipy", "sib_lab"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
LN2 = math.log(2)


@pytest.fixture(scope="module")
def world():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import known_world
    return known_world


@pytest.fixture(scope="module")
def informations(world):
    return world.seed_information()


def drawn(world, strength, count=100_000):
    """x's logit, VJP of the published seed by autograd, label and cue, of many images."""
    generator = torch.Generator().manual_seed(3)
    x, label, cue = world.draw(count, strength, generator)
    return x.requires_grad_(), label, cue


def counted(values, label, bins=400):
    """I(values; label), nats, by counting in bins of equal mass, less the bias of counting; labels in {0,1}."""
    edges = np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1])
    places = np.digitize(values, edges)
    ones, all_of_them = (np.bincount(p, minlength=bins) for p in (places[label == 1], places))
    share = ones / np.maximum(all_of_them, 1)
    inner = -sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0) for p in (share, 1 - share))
    return LN2 - (inner * all_of_them).sum() / len(values) - (bins - 1) / (2 * len(values))


# ------------------------------------------------------------------------------------------- the quadrature


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_the_answer_is_what_draws_say(world, strength):
    x, label, cue = drawn(world, strength)
    logits = world.posterior_logits(x, strength).detach()
    loss = torch.nn.functional.cross_entropy(logits, label)
    answer = world.posterior(strength)
    # The posterior's cross-entropy is H(Y|X), and z is sufficient.
    assert world.truths(answer, strength)["label"] == pytest.approx(LN2 - float(loss), abs=6e-3)
    right = (logits.argmax(1) == label).double().mean()
    assert answer.accuracy(strength) == pytest.approx(float(right), abs=6e-3)


def test_what_the_answer_tells_of_object_and_cue_is_what_counting_says(world):
    x, label, cue = drawn(world, 0.0)
    z = world.posterior_logits(x, 0.9).diff(dim=1)[:, 0].detach().numpy()
    truth = world.truths(world.posterior(0.9), 0.9)
    label, cue = label.numpy(), cue.numpy()
    of_cue = np.mean([counted(z[label == k], cue[label == k]) for k in (0, 1)])
    of_object = np.mean([counted(z[cue == k], label[cue == k]) for k in (0, 1)])
    assert truth["cue"] == pytest.approx(of_cue, abs=8e-3)
    assert truth["object"] == pytest.approx(of_object, abs=8e-3)


def test_the_answer_of_a_network_is_that_of_its_weights(world):
    network = world.Network(torch.Generator().manual_seed(5))
    with torch.no_grad():  # as strong as a trained one
        network.direct += torch.from_numpy(world.templates()[0])
        network.filter += torch.from_numpy(world.templates()[1])
    x, label, cue = drawn(world, 0.3)
    with torch.no_grad():
        z = network(x).diff(dim=1)[:, 0]
    assert network.answer().accuracy(0.3) == pytest.approx(float(((z > 0) == (label == 1)).double().mean()), abs=6e-3)
    assert world.truths(network.answer(), 0.3)["label"] == pytest.approx(counted(z.numpy(), label.numpy()), abs=8e-3)


def test_without_a_shortcut_the_background_tells_nothing_and_with_a_whole_one_it_is_a_second_object(world):
    truth = world.truths(world.posterior(0.0), 0.0)
    assert truth["cue"] == pytest.approx(0, abs=1e-12)
    assert truth["label"] == pytest.approx(world.statistic_information(world.OBJECT_MEAN), abs=1e-12)
    together = math.hypot(world.OBJECT_MEAN, world.CUE_MEAN)
    assert world.truths(world.posterior(1.0), 1.0)["label"] == pytest.approx(
        world.statistic_information(together), abs=1e-9
    )


def test_the_more_the_shortcut_holds_the_more_the_answer_takes_of_it(world):
    truths = [world.truths(world.posterior(s), s) for s in world.STRENGTHS]
    cue, of_object = ([t[key] for t in truths] for key in ("cue", "object"))
    assert (np.diff(cue) > 0).all() and (np.diff(of_object) < 0).all()
    assert of_object[0] == pytest.approx(world.statistic_information(world.OBJECT_MEAN))


def test_a_network_of_two_softplus_units_is_the_exact_posterior(world):
    strength = 0.8
    network = world.Network(torch.Generator().manual_seed(0), hidden=2)
    of_object, of_cue = (torch.from_numpy(t) for t in world.templates())
    odds = math.log((1 + strength) / (1 - strength))
    with torch.no_grad():
        network.direct.copy_(2 * world.OBJECT_MEAN * of_object)
        network.filter.copy_(of_cue)
        network.inner.fill_(2 * world.CUE_MEAN)
        network.offset.copy_(torch.tensor([odds, -odds]))
        network.outer.copy_(torch.tensor([1.0, -1.0]))
        network.bias.fill_(-odds)
        x = world.draw(50, strength, torch.Generator().manual_seed(0))[0]
        torch.testing.assert_close(network(x), world.posterior_logits(x, strength), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------ sufficient? minimal?


def test_the_vjp_of_a_seed_is_what_its_information_was_computed_of(world):
    """Object alone: R_f is ds/dz times a fixed field, with ds/dz 0, +-1/2, h(z) or the label's sign."""
    x, label, _ = world.draw(64, 0.0, torch.Generator().manual_seed(1))
    x.requires_grad_()
    logits = world.posterior_logits(x, 0.0)
    z, sign = (logits[:, 1] - logits[:, 0]).detach(), 2.0 * label - 1
    expected = {
        "logit_sum": 0 * z,
        "target_logit": sign / 2,
        "target_log_prob": sign * torch.sigmoid(-sign * z),
        "probability_energy": torch.from_numpy(world.energy_slope(z.numpy())),
    }
    field = 2 * world.OBJECT_MEAN * torch.from_numpy(world.templates()[0])
    for seed, factor in expected.items():
        R = world.sib.vjp(logits, x, label, seed).flatten(1)
        torch.testing.assert_close(R, factor[:, None] * field, rtol=1e-9, atol=1e-12)


def test_the_label_leaks_where_the_sign_of_r_is_the_labels(informations):
    """Data processing bounds seeds without a label by I(X;Y); with a label it does not."""
    means, variances = informations["means"], informations["variances"]
    for seed in ("one_logit", "logit_sum", "predicted_logit", "probability_energy"):
        assert 0 <= means[seed] < means["x"]
        assert 0 <= variances[seed] <= variances["x"]
    assert means["target_logit"] == means["target_log_prob"] == LN2 > means["x"]
    assert variances["target_log_prob"] < variances["x"]


def test_a_part_common_to_all_logits_changes_r_and_not_the_posterior(world):
    """Logits -|x - mu_k|^2/2: R of the label's logit is minus the noise, R of all of them is x itself."""
    x, label, _ = world.draw(32, 0.0, torch.Generator().manual_seed(1))
    x.requires_grad_()
    means = torch.tensor([[-1.0], [1.0]]).double() * world.OBJECT_MEAN * torch.from_numpy(world.templates()[0])
    logits = -0.5 * (x.flatten(1)[:, None] - means).square().sum(2)
    torch.testing.assert_close(logits.softmax(1), world.posterior_logits(x, 0.0).softmax(1))
    R = world.sib.vjp(logits, x, label, "target_logit").flatten(1)
    torch.testing.assert_close(R, means[label] - x.flatten(1))
    torch.testing.assert_close(world.sib.vjp(logits, x, label, "logit_sum"), -2 * x)


def test_the_published_seeds_information_where_labels_differ_in_the_mean(world, informations):
    # The two z > 0 with one h(z), w = tanh(z/2): w^3 - w + 4h = 0.
    mean = world.OBJECT_MEAN
    z, step = np.linspace(1e-6, 60, 400_001, retstep=True)
    w = np.tanh(z / 2)
    other = 2 * np.arctanh(np.clip((-w + np.sqrt(4 - 3 * w**2)) / 2, 0, 1 - 1e-15))

    def pushed(at, sign):
        return np.exp(-((at - 2 * sign * mean**2) ** 2) / (8 * mean**2)) / abs(world.energy_curvature(at))

    odds = [pushed(z, s) + pushed(other, s) for s in (1, -1)]
    p = odds[0] / (odds[0] + odds[1])
    weight = sum(np.exp(-((z - 2 * s * mean**2) ** 2) / (8 * mean**2)) for s in (1, -1)) * step
    inner = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    expected = LN2 - (weight * inner).sum() / weight.sum()
    assert informations["means"]["probability_energy"] == pytest.approx(expected, abs=1e-4)


def test_information_where_labels_differ_in_the_variance_is_what_counting_says(world, informations):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 1_000_000)
    r = np.sqrt(rng.chisquare(world.PIXELS, len(label))) * world.RATIO ** (label - 0.5)
    z = world.radius_logit(r)
    values = {
        "x": r,
        "probability_energy": abs(world.energy_slope(z)) * r,
        "target_log_prob": np.log(r) - np.logaddexp(0, (2 * label - 1) * z),
    }
    for name, value in values.items():
        assert informations["variances"][name] == pytest.approx(counted(value, label), abs=2e-3)


def test_the_objects_vjp_knows_the_background(world):
    """R_f of the published seed is h(z) times a fixed field, and z has seen the cue."""
    x, label, _ = drawn(world, 0.9)
    z = world.posterior_logits(x, 0.9).diff(dim=1)[:, 0].detach().numpy()
    value = world.foreground_label_information(world.OBJECT_MEAN, 0.9)
    assert value == pytest.approx(counted(world.energy_slope(z), label.numpy()), abs=1e-2)
    assert value > world.statistic_information(world.OBJECT_MEAN) + 0.1
    assert value < world.truths(world.posterior(0.9), 0.9)["label"]


def test_a_linear_answer_has_a_background_vjp_without_information(world):
    assert world.resolved_cue_information(0.0) == world.resolved_cue_information(1.0) == pytest.approx(0, abs=1e-9)
    assert world.resolved_cue_information(0.9) > 0.5
    assert world.truths(world.posterior(1.0), 1.0)["cue"] > 0.5
    t = np.linspace(0.1, 3, 7)
    np.testing.assert_allclose(world.evidence_slope(t, 0.7), world.evidence_slope(-t, 0.7))
    numeric = (world.evidence(t + 1e-6, 0.7) - world.evidence(t - 1e-6, 0.7)) / 2e-6
    np.testing.assert_allclose(world.evidence_slope(t, 0.7), numeric, rtol=1e-7, atol=1e-9)


def test_a_hard_mask_made_of_r_loses_information(world):
    whole, error = world.kept_information(world.PIXELS)
    assert whole == pytest.approx(world.radius_information(), abs=4 * error)
    few = world.kept_information(3)[0]
    assert few < whole - 10 * error
    assert world.kept_information(1)[0] < few


def test_a_soft_mask_can_be_undone(world):
    """mean_sigmoid: R is had back from R M(R) by two unknowns, the largest |R| and the mean of |R| over it."""
    R = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    seen = (R * world.MASKS["mean_sigmoid"](R)).abs().flatten()

    def shares(mean):  # |R| / max |R|, each from its own monotone equation
        low, high = torch.zeros_like(seen), torch.ones_like(seen)
        target = seen / seen.max() * torch.sigmoid(10 * (1 - mean))
        for _ in range(60):
            middle = (low + high) / 2
            beyond = middle * torch.sigmoid(10 * (middle - mean)) > target
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        return low

    means = torch.linspace(0, 1, 201, dtype=torch.float64)
    gaps = torch.stack([shares(m).mean() - m for m in means])
    assert (gaps.diff() < 0).all()  # one root
    low, high = means[gaps > 0][-1], means[gaps <= 0][0]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle).mean() > middle else (low, middle)
    torch.testing.assert_close(shares(low), (R.abs() / R.abs().max()).flatten(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["density", "mean_sigmoid", "top_p"])
def test_soft_masks_made_of_r_turn_no_orientation(world, name):
    assert (world.masked_orientations(world.MASKS[name], 10, torch.Generator().manual_seed(2)) > 0).all()


# ------------------------------------------------------------------------------- estimators beside the truth


@pytest.fixture(scope="module")
def estimated(world):
    """seed -> strength -> estimates."""
    strengths = (0.0, 0.5, 0.9, 0.99, 1.0)
    return {seed: {s: world.posterior_estimates(s, seed, 512) for s in strengths} for seed in world.OF_SEED}


def test_every_background_estimator_rises_with_the_cue_in_the_answer(estimated):
    for by_strength in estimated.values():
        for name in (n for n in by_strength[0.0] if n.startswith("background")):
            values = [estimates[name] for estimates in by_strength.values()]
            assert values[0] < 1e-15 and (np.diff(values) > 0).all(), name


def test_only_capacity_falls_with_the_object_in_the_answer(estimated):
    values = {name: [e[name] for e in estimated["random_logit"].values()] for name in estimated["random_logit"][0.0]}
    assert (np.diff(values["foreground capacity"]) < 0).all()
    for name in ("hsic", "hsic_unbiased", "cka", "gaussian"):
        np.testing.assert_allclose(values[f"foreground {name}"], values[f"foreground {name}"][0], rtol=1e-6)


def test_the_share_of_the_posterior_is_that_of_quadrature(world, estimated):
    for strength, values in estimated["random_logit"].items():
        assert values["background magnitude_ratio"] == pytest.approx(world.posterior_share(strength), abs=0.015)


def test_shares_and_capacity_are_free_of_the_logits_scale(world):
    one, three = (world.posterior_estimates(0.9, "target_logit", 128, sharpness=k) for k in (1.0, 3.0))
    for name in one:
        factor = 9 if name in ("background variance", "background energy") else 1
        assert three[name] == pytest.approx(factor * one[name], rel=1e-9), name


def test_a_step_hides_the_cue_from_shares_of_single_samples(world):
    flat, steep = world.step_network(2), world.step_network(32)
    assert steep["cue"] == pytest.approx(flat["cue"], rel=0.05)
    assert steep["share"] < 0.1 * flat["share"]
    assert steep["share_of_means"] > 0.8 * flat["share_of_means"]
    assert steep["energy"] > 10 * flat["energy"]


# ------------------------------------------------------------------------------------------------- training


def test_training_moves_the_answer(world, threads):
    threads(1)
    names = ("cross-entropy", "background half", "foreground half", "both halves")
    found = {n: world.judged(world.train(world.LOSSES[n], 0.95, 0, steps=100), 0.95) for n in names}
    held = world.statistic_information(world.OBJECT_MEAN)
    assert found["cross-entropy"]["cue"] > 0.25
    assert found["background half"]["cue"] < 0.01
    assert found["background half"]["object"] > held - 0.02
    assert found["both halves"]["cue"] < 0.01
    assert found["foreground half"]["cue"] < 0.5 * found["cross-entropy"]["cue"]
    # With images without end the foreground half costs: evidence is spread where there is little of it.
    assert found["both halves"]["object"] < found["background half"]["object"] - 0.03
    assert found["both halves"]["coverage"] > found["background half"]["coverage"] + 0.01
    for measures in found.values():  # no answer tells more of the object than the object holds
        assert measures["object"] < held + 1e-9
