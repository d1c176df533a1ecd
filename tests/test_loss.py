"""SpatialIBLoss: the published formula, its options, its masks, its dtypes."""

import copy
import pickle
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sib_ext import SpatialIBLoss, density_mask, estimators
from sib_ext import functional as sib
from sib_ext.loss import PRESETS

from .compare import GRADIENTS, VALUES, assert_near, gradients
from .samples import FIXED, tiny_problem

PAPER_WINDOW = 3


def published_loss(logits, y, x):
    """METHOD.md section 2 word for word, on purpose without anything of sib_ext."""
    batch = x.shape[0]
    p = logits.softmax(1)
    (R,) = torch.autograd.grad(0.5 * (p**2).sum(), x, create_graph=True)

    def soft_quantile(v, q):
        n = v.shape[1]
        weights = torch.softmax(-(torch.arange(n, dtype=v.dtype) - q * (n - 1)).abs() / 0.1, 0)
        return (torch.sort(v, dim=1).values * weights).sum(1, keepdim=True)

    g = R.mean(1).abs().flatten(1)
    q05, q95 = soft_quantile(g, 0.05), soft_quantile(g, 0.95)
    n = (g - q05) / (q95 - q05 + 1e-8)
    h = torch.sigmoid(10 * (n - soft_quantile(n, 0.8))).view(batch, 1, *x.shape[2:])
    box = torch.full((1, 1, PAPER_WINDOW, PAPER_WINDOW), 1 / PAPER_WINDOW**2, dtype=x.dtype)
    d = F.conv2d(h, box, padding=PAPER_WINDOW // 2).flatten(1)
    M = torch.sigmoid(10 * (d - soft_quantile(d, 0.8))).view_as(h)

    a, b = F.normalize((R * M).flatten(1)), F.normalize((x * M).flatten(1))
    H = torch.eye(batch, dtype=x.dtype) - 1 / batch
    hsic = ((H @ (a @ a.T) @ H) * (H @ (b @ b.T) @ H)).sum() / (batch - 1) ** 2
    background = torch.stack([c.var() for c in R * (1 - M)]).mean()
    loss = F.cross_entropy(logits, y) + 1000 * torch.exp(background) + 0.01 * torch.exp(-hsic)
    return {"loss": loss, "background": background, "foreground": hsic, "mask": M, "vjp": R}


def loss_of(problem, *mask, **options):
    """By default of FIXED options; those of a preset where one is named."""
    fixed = {} if "preset" in options else FIXED
    criterion = SpatialIBLoss(window=PAPER_WINDOW, **fixed | options)
    return criterion.terms(problem.logits(), problem.y, problem.x, *mask)


def flat_term(terms, name):
    """A term of the input as the published loss names it."""
    value = terms[name] if isinstance(terms, dict) else getattr(terms, name)
    return value["input"] if isinstance(value, Mapping) else value


def assert_same_terms(terms, expected, tolerance=VALUES):
    for name in ("loss", "cross_entropy", "background", "foreground", "mask", "vjp"):
        assert_near(flat_term(terms, name), flat_term(expected, name), tolerance)


@pytest.fixture
def problem():
    return tiny_problem()


# ----------------------------------------------------------------------------------------------- the formula


def test_the_paper_preset_is_the_published_formula(problem, implementation):
    terms = loss_of(problem, preset="paper", impl=implementation)
    expected = published_loss(problem.logits(), problem.y, problem.x)
    for name, value in expected.items():
        assert_near(flat_term(terms, name), value, VALUES)


@pytest.mark.parametrize("term", ["loss", "background", "foreground"])
def test_the_gradient_of_each_published_term_is_that_of_its_formula(term, problem, implementation):
    """Term by term: 1000 exp(1e-7) would hide everything else in the sum."""
    terms = loss_of(problem, preset="paper", impl=implementation)
    expected = published_loss(problem.logits(), problem.y, problem.x)
    found = gradients(flat_term(terms, term), problem.parameters)
    truth = gradients(expected[term], problem.parameters)
    for value, true in zip(found, truth, strict=True):
        torch.testing.assert_close(
            value, true, rtol=1e-7, atol=1e-9 * float(torch.cat([t.flatten() for t in truth]).norm())
        )


@pytest.mark.parametrize("transform, f", [("identity", lambda v: v), ("exp", torch.exp), ("expm1", torch.expm1)])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_is_the_stated_sum(preset, transform, f, problem):
    torch.manual_seed(0)
    terms = loss_of(problem, preset=preset, transform=transform, input_background=3.0, input_foreground=0.7)
    assert_near(
        terms.loss, terms.cross_entropy + 3 * f(terms.background["input"]) + 0.7 * f(-terms.foreground["input"]), 1e-12
    )
    assert_near(terms.cross_entropy, F.cross_entropy(problem.logits(), problem.y), 1e-12)


def test_expm1_has_the_gradient_of_exp_and_no_offset(problem):
    with_offset = loss_of(problem, preset="paper").loss
    without = loss_of(problem, preset="paper", transform="expm1").loss
    assert_near(with_offset - without, torch.tensor(1000.01, dtype=torch.float64), 1e-12)
    for one, other in zip(
        gradients(with_offset, problem.parameters), gradients(without, problem.parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_forward_returns_the_loss_of_terms(problem):
    criterion = SpatialIBLoss(**FIXED)
    logits = problem.logits()
    loss = criterion(logits, problem.y, problem.x)
    assert loss.dim() == 0 and torch.equal(loss, criterion.terms(logits, problem.y, problem.x).loss)


def test_the_terms_have_names_and_shapes(problem):
    terms = SpatialIBLoss(**FIXED).terms(problem.logits(), problem.y, problem.x)
    assert terms._fields == ("loss", "cross_entropy", "background", "foreground", "empty", "mask", "vjp")
    assert all(list(by_place) == ["input"] and by_place["input"].dim() == 0 for by_place in terms[2:5])
    assert terms.loss.dim() == terms.cross_entropy.dim() == 0
    assert terms.mask.shape == (5, 1, 9, 11) and terms.vjp.shape == problem.x.shape


def test_the_default_is_the_balanced_preset(problem):
    default, balanced = SpatialIBLoss(), SpatialIBLoss("balanced")
    assert repr(default) == repr(balanced)
    assert (default.seed, default.background, default.mask_source) == ("random_logit", "magnitude_ratio", "activation")


def test_the_fine_tuning_preset_is_the_balanced_one_but_for_its_weights():
    balanced, fine_tuning = (vars(SpatialIBLoss(preset)) for preset in ("balanced", "fine_tuning"))
    assert {k for k, value in balanced.items() if fine_tuning[k] != value and k != "guard"} == {
        "preset",
        "input_background",
    }
    assert fine_tuning["input_background"] == PRESETS["fine_tuning"]["input_background"] == 3


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("off", ["background", "foreground"])
def test_a_weight_of_zero_leaves_its_term_out(off, problem):
    terms = loss_of(problem, **{f"input_{off}": 0.0})
    other = "foreground" if off == "background" else "background"
    assert not getattr(terms, off) and list(getattr(terms, other)) == ["input"]
    sign, weight = (-1, 0.1) if other == "foreground" else (1, 1.0)
    assert_near(terms.loss, terms.cross_entropy + sign * weight * getattr(terms, other)["input"], 1e-12)


def test_two_weights_of_zero_leave_the_plain_cross_entropy_even_without_gradients(problem):
    criterion = SpatialIBLoss(input_background=0, input_foreground=0, feature_background=0, feature_foreground=0)
    with torch.no_grad():
        terms = criterion.terms(problem.logits(), problem.y, problem.x.detach())
    assert terms[2:] == ({}, {}, {}, None, None)
    assert_near(terms.loss, F.cross_entropy(problem.logits(), problem.y), 1e-12)


@pytest.mark.parametrize("foreground", estimators.FOREGROUND)
@pytest.mark.parametrize("background", estimators.BACKGROUND)
def test_every_pair_of_estimators_gives_what_the_functional_forms_give(background, foreground, problem):
    terms = loss_of(problem, background=background, foreground=foreground, kappa=0.4)
    R, M = terms.vjp, terms.mask
    statistics = sib.masked_statistics(R, problem.x, M)
    count = R[0].numel()
    noise = (sib.relative_noise(R, 0.4),) if background == "gaussian" else ()
    per_sample = getattr(sib, f"background_{background}")(statistics.moments, count, *noise)
    assert_near(terms.background["input"], per_sample.mean(), 1e-12)
    if foreground in estimators.OF_GRAMS:
        inputs = statistics[1:]
    elif foreground in estimators.OF_INPUT:
        inputs = (statistics.moments, count)
    else:
        inputs = (sib.magnitude(R), M, None, 0.4)
    assert_near(terms.foreground["input"], getattr(sib, f"foreground_{foreground}")(*inputs).mean(), 1e-12)


@pytest.mark.parametrize(
    "mask, made",
    [
        ("density", lambda R: density_mask(R, window=PAPER_WINDOW, area=0.3, slope=8.0)),
        ("hard_density", lambda R: sib.hard_density_mask(R, window=PAPER_WINDOW, area=0.3, slope=8.0)),
        ("top_p", lambda R: sib.top_p_mask(R, area=0.3, slope=8.0)),
        ("mean_sigmoid", lambda R: sib.mean_sigmoid_mask(R, slope=8.0)),
    ],
)
def test_every_self_made_mask_is_its_functional_form(mask, made, problem):
    area = {} if mask == "mean_sigmoid" else {"area": 0.3}
    terms = loss_of(problem, mask=mask, slope=8.0, **area)
    assert_near(terms.mask, made(terms.vjp), 1e-12)


def test_a_top_p_mask_has_its_own_defaults(problem):
    terms = loss_of(problem, mask="top_p")
    assert_near(terms.mask, sib.top_p_mask(terms.vjp, area=0.1, slope=30.0), 1e-12)


@pytest.mark.parametrize("changes", [{"temperature": 2.0}, {"padding": "exclude"}, {"eps": 0.5}], ids=str)
def test_options_of_the_density_mask_reach_it(changes, problem, implementation):
    terms = loss_of(problem, impl=implementation, **changes)
    assert_near(terms.mask, density_mask(terms.vjp, window=PAPER_WINDOW, impl="reference", **changes), VALUES)


@pytest.mark.parametrize("seed", ["probability_energy", "target_logit", "target_log_prob", "logit_sum"])
def test_the_seed_is_the_one_that_was_asked_for(seed, problem):
    logits = problem.logits()
    terms = SpatialIBLoss(seed=seed).terms(logits, problem.y, problem.x)
    assert_near(terms.vjp, sib.vjp(logits, problem.x, problem.y, seed), 1e-14)


@pytest.mark.parametrize("options", [FIXED, {"preset": "paper"}], ids=["fixed", "paper"])
def test_a_detached_mask_is_a_constant_for_the_gradient(options, problem):
    detached = loss_of(problem, **options, detach_mask=True)
    assert not detached.mask.requires_grad
    given = loss_of(problem, detached.mask.detach(), **options)
    attached = loss_of(problem, **options, detach_mask=False)
    assert attached.mask.requires_grad
    for term in ("background", "foreground"):
        grads = [gradients(flat_term(terms, term), problem.parameters) for terms in (detached, given, attached)]
        assert all(torch.equal(one, other) for one, other in zip(grads[0], grads[1], strict=True))
        assert any(
            not torch.allclose(one, other, rtol=1e-3, atol=0) for one, other in zip(grads[0], grads[2], strict=True)
        )


# ------------------------------------------------------------------------------------------- cross-entropy

SOFT_TARGETS = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(1)
CLASS_WEIGHT = torch.tensor([1.0, 0.2, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"weight": CLASS_WEIGHT}], ids=lambda o: str([*o]))
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_the_cross_entropy_is_that_of_the_torch_loss(options, soft, problem):
    target = SOFT_TARGETS if soft else problem.y
    criterion, torch_loss = SpatialIBLoss(**options), nn.CrossEntropyLoss(**options)
    expected = torch_loss(problem.logits(), target)
    assert_near(criterion.cross_entropy(problem.logits(), target), expected, 1e-14)
    assert_near(criterion.terms(problem.logits(), target, problem.x).cross_entropy, expected, 1e-14)


def test_it_is_a_torch_cross_entropy_loss_with_one_more_argument():
    assert issubclass(SpatialIBLoss, nn.CrossEntropyLoss)


def test_one_hot_probabilities_and_labels_give_the_same_loss(problem):
    one_hot = F.one_hot(problem.y, 3).double()
    criterion = SpatialIBLoss(**FIXED)
    by_label, by_probability = (criterion.terms(problem.logits(), t, problem.x) for t in (problem.y, one_hot))
    assert_same_terms(by_probability, by_label, 1e-12)


def test_cross_entropy_alone_works_without_gradients(problem):
    with torch.no_grad():
        value = SpatialIBLoss().cross_entropy(problem.logits(), problem.y)
    assert_near(value, F.cross_entropy(problem.logits(), problem.y), 1e-14)


# ----------------------------------------------------------------------------------------------- given masks

SOFT = torch.rand(5, 1, 9, 11, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
BOXES = torch.tensor(
    [[0, 0, 4, 5], [2, 3, 9, 8], [0.5, 0.25, 7.75, 9], [1, 1, 2, 2], [3, 0, 11, 4]], dtype=torch.float64
)
OF_BOXES = sib.boxes_to_mask(BOXES, 9, 11)
GIVEN = {
    "soft [B,H,W]": (SOFT[:, 0], SOFT),
    "float32": (SOFT.float(), SOFT.float().double()),
    "boolean": (SOFT > 0.5, (SOFT > 0.5).double()),
    "boxes": (BOXES, OF_BOXES),
    "sequence of masks": (list(SOFT[:, 0]), SOFT),
    "sequence of boxes": (tuple(BOXES), OF_BOXES),
}


@pytest.mark.parametrize("given, equivalent", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("options", [FIXED, {"preset": "paper"}], ids=["fixed", "paper"])
def test_every_form_of_a_given_mask_gives_the_loss_of_its_equivalent(options, given, equivalent, problem):
    terms = loss_of(problem, given, **options)
    assert_same_terms(terms, loss_of(problem, equivalent, **options), 1e-12)
    assert_near(terms.mask, equivalent, 1e-12)


def test_samples_without_annotation_get_the_self_made_mask(problem):
    made = loss_of(problem).mask
    mixed = torch.cat([SOFT[:1], made[1:2], OF_BOXES[2:3], made[3:]])
    by_sequence = loss_of(problem, [SOFT[0], None, BOXES[2], None, None])
    assert_near(by_sequence.mask, mixed, 1e-12)
    known = torch.tensor([True, False, True, False, False])
    filled = torch.where(known[:, None, None, None], torch.cat([SOFT[:1], OF_BOXES[1:]]), 0)
    assert_same_terms(loss_of(problem, filled, known), by_sequence, 1e-12)


def test_annotated_and_none_in_a_sequence_both_count(problem):
    known = torch.tensor([True, True, False, True, True])
    both = loss_of(problem, [SOFT[0], None, SOFT[2], SOFT[3], SOFT[4]], known)
    assert_same_terms(both, loss_of(problem, [SOFT[0], None, None, SOFT[3], SOFT[4]]), 1e-12)


def test_a_batch_without_any_annotation_is_a_batch_without_mask(problem):
    made = loss_of(problem)
    assert_same_terms(loss_of(problem, [None] * 5), made, 1e-12)
    assert_same_terms(loss_of(problem, SOFT, torch.zeros(5, dtype=torch.bool)), made, 1e-12)


def test_the_annotation_of_one_sample_lets_no_gradient_through_a_mask_that_is_given(problem):
    attached = loss_of(problem, SOFT, torch.ones(5, dtype=torch.bool), detach_mask=False)
    given = loss_of(problem, SOFT)
    for one, other in zip(
        gradients(attached.loss, problem.parameters), gradients(given.loss, problem.parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------- feature maps


def through_features(problem, x):
    """The feature map and the logits computed from it."""
    features = problem.model.features(x)
    return features, problem.model.head(features.mean((2, 3)))


def test_a_feature_map_adds_the_background_share_of_its_class_activation(problem):
    criterion = SpatialIBLoss(
        **FIXED | {"background": "magnitude_ratio", "input_foreground": 0}, feature_background=0.7
    )
    features, logits = through_features(problem, problem.x)
    terms = criterion.terms(logits, problem.y, problem.x, SOFT, features=features)
    R, R_A = torch.autograd.grad(logits.gather(1, problem.y[:, None]).sum(), (problem.x, features), create_graph=True)
    field = (features * R_A.mean((2, 3), keepdim=True)).abs().sum(1, keepdim=True)
    shares = [((1 - SOFT) * of).sum((1, 2, 3)) / of.sum((1, 2, 3)) for of in (R.abs().sum(1, keepdim=True), field)]
    assert_near(terms.background["input"], shares[0].mean(), 1e-12)
    assert_near(terms.background["features"], shares[1].mean(), 1e-12)
    expected = F.cross_entropy(logits, problem.y) + shares[0].mean() + 0.7 * shares[1].mean()
    assert_near(terms.loss, expected, 1e-12)
    for found, truth in zip(
        gradients(terms.loss, problem.parameters), gradients(expected, problem.parameters), strict=True
    ):
        assert_near(found, truth, 1e-10)


def alone(problem, x=None, mask=SOFT, **options):
    """Terms of a feature map without any of the input."""
    without = {"input_background": 0, "input_foreground": 0, "feature_background": 0.7, "feature_foreground": 0.3}
    x = problem.x.detach() if x is None else x
    features, logits = through_features(problem, x)
    criterion = SpatialIBLoss(**FIXED | {"mask_source": "activation"} | without | options)
    return features, logits, criterion.terms(logits, problem.y, x, mask, features=features)


def test_terms_of_a_feature_map_alone_need_no_gradient_of_the_images(problem):
    features, logits, terms = alone(problem, background="magnitude_ratio", kappa=0.5)
    (R_A,) = torch.autograd.grad(logits.gather(1, problem.y[:, None]).sum(), features, create_graph=True)
    field = sib.class_activation(features, R_A)
    share = ((1 - SOFT) * field).sum((1, 2, 3)) / field.sum((1, 2, 3))
    capacity = sib.foreground_log_capacity(field, SOFT, kappa=0.5)
    expected = F.cross_entropy(logits, problem.y) + 0.7 * share.mean() - 0.3 * capacity.mean()
    assert terms.vjp is None and list(terms.background) == list(terms.foreground) == ["features"]
    assert_near(terms.loss, expected, 1e-12)
    found, truth = (gradients(loss, problem.parameters) for loss in (terms.loss, expected))
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_mask_can_be_made_of_the_feature_map_alone(problem):
    features, logits, terms = alone(problem, mask=None, window=PAPER_WINDOW)
    (R_A,) = torch.autograd.grad(logits.gather(1, problem.y[:, None]).sum(), features)
    field = sib.class_activation(features, R_A)
    relative = field / field.mean((1, 2, 3), keepdim=True)
    assert_near(terms.mask, density_mask(relative, window=PAPER_WINDOW), 1e-9)


def test_the_empty_maps_are_counted(problem):
    """A ReLU'd map of which two samples have nothing."""
    features, _ = through_features(problem, problem.x)
    kept = torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64).view(-1, 1, 1, 1)
    features = features * kept
    logits = problem.model.head(features.mean((2, 3)))
    terms = SpatialIBLoss(**FIXED, window=3).terms(logits, problem.y, problem.x, SOFT, features=features)
    assert {name: int(count) for name, count in terms.empty.items()} == {"input": 0, "features": 2}  # BatchNorm mixes
    terms.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in problem.parameters)


def test_without_features_a_loss_of_features_alone_says_what_is_missing(problem):
    criterion = SpatialIBLoss(input_background=0)
    with pytest.raises(ValueError, match="features are missing.*features=.*SIBStep"):
        criterion(problem.logits(), problem.y, problem.x)


def test_features_that_do_not_require_grad_are_named(problem):
    features, _ = through_features(problem, problem.x)
    features = features.detach()
    logits = problem.model.head(features.mean((2, 3)))
    with pytest.raises(RuntimeError, match="features: 'features' does not require grad"):
        SpatialIBLoss(input_background=0)(logits, problem.y, problem.x.detach(), features=features)


def test_the_inputs_place_is_no_name_for_a_feature_map(problem):
    features, logits = through_features(problem, problem.x)
    for named, words in (({"input": features}, "named 'input'.*another name in features="), ({}, "got none")):
        with pytest.raises(ValueError, match=words):
            SpatialIBLoss()(logits, problem.y, problem.x, features=named)


def test_masks_of_the_inputs_vjp_are_refused_where_it_is_not_formed():
    with pytest.raises(ValueError, match="mask_source='vjp' makes masks of the input's VJP, which is not formed"):
        SpatialIBLoss(input_background=0, mask_source="vjp")


def test_named_features_keep_their_names(problem):
    features, logits = through_features(problem, problem.x)
    terms = SpatialIBLoss(**FIXED).terms(logits, problem.y, problem.x, SOFT, features={"block": features})
    assert set(terms.background) == {"input", "block"} and 0 < terms.background["block"] < 1


@pytest.mark.parametrize("with_features", [False, True])
def test_a_mask_of_the_activation_is_the_density_mask_of_what_the_last_feature_map_shows(with_features, problem):
    criterion = SpatialIBLoss(**FIXED | {"mask_source": "activation", "window": PAPER_WINDOW})
    features, logits = through_features(problem, problem.x)
    terms = criterion.terms(logits, problem.y, problem.x, features=features if with_features else None)
    field = terms.vjp.abs().sum(1, keepdim=True)
    if with_features:
        field = sib.class_activation(
            features, torch.autograd.grad(logits.gather(1, problem.y[:, None]).sum(), features)[0]
        )
    relative = field / field.mean((1, 2, 3), keepdim=True)
    assert_near(terms.mask, density_mask(relative, window=PAPER_WINDOW), 1e-9)


def test_features_that_the_logits_do_not_come_from_are_refused(problem):
    features, logits = through_features(problem, problem.x)
    other = features.detach().requires_grad_()
    with pytest.raises(ValueError, match="logits were not computed from 'features'"):
        SpatialIBLoss(**FIXED)(logits, problem.y, problem.x, features=other)


def test_features_without_a_term_are_refused(problem):
    features, logits = through_features(problem, problem.x)
    with pytest.raises(ValueError, match="features were given, but have no term.*feature_background=0"):
        SpatialIBLoss("paper")(logits, problem.y, problem.x, features=features)
    with pytest.raises(ValueError, match="features must be a tensor or a mapping"):
        SpatialIBLoss()(logits, problem.y, problem.x, features=[features])


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_balanced_terms_do_not_know_the_scale_of_the_logits(factor, problem):
    """A head that is a million times weaker or stronger has the same S-IB terms, with self-made masks, too."""
    criterion = SpatialIBLoss(window=PAPER_WINDOW)

    def shares():
        torch.manual_seed(0)
        features, logits = through_features(problem, problem.x)
        terms = criterion.terms(logits, problem.y, problem.x, features=features)
        return terms.background["input"], terms.background["features"], terms.mask

    before = shares()
    with torch.no_grad():
        for parameter in problem.model.head.parameters():
            parameter.mul_(factor)
    for found, expected in zip(shares(), before, strict=True):
        assert_near(found, expected, 1e-6)


# ------------------------------------------------------------------------------------------- annotated or not


def shares_of(terms, problem):
    moments = sib.masked_statistics(terms.vjp, problem.x, terms.mask).moments
    return sib.background_energy_ratio(moments, terms.vjp[0].numel())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_samples_without_an_annotation_have_their_share_of_the_terms(share, problem):
    known = torch.tensor([True, False, True, False, False])
    terms = loss_of(problem, SOFT, known, self_made_share=share, input_foreground=0.0)
    values = shares_of(terms, problem)
    assert_near(terms.background["input"], (1 - share) * values[known].mean() + share * values[~known].mean(), 1e-12)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize(
    "mask", [(), (SOFT,), (SOFT, torch.ones(5, dtype=torch.bool))], ids=["none", "all", "all flagged"]
)
def test_samples_of_one_kind_have_all_of_the_terms(mask, share, problem):
    terms = loss_of(problem, *mask, self_made_share=share, input_foreground=0.0)
    assert_near(terms.background["input"], shares_of(terms, problem).mean(), 1e-12)


def test_a_share_of_zero_leaves_samples_without_an_annotation_out(problem):
    nobody = loss_of(problem, self_made_share=0.0, input_foreground=0.0)
    assert nobody.background["input"] == 0 and nobody.loss == nobody.cross_entropy
    known = torch.tensor([True, False, True, False, False])
    terms = loss_of(problem, SOFT, known, self_made_share=0.0, input_foreground=0.0)
    assert_near(terms.background["input"], shares_of(terms, problem)[known].mean(), 1e-12)


# --------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_under_autocast_gives_nearly_the_float32_loss(preset, implementation):
    problem = tiny_problem(dtype=torch.float32, batch=6)
    seed = {"seed": "target_logit"} if preset == "balanced" else {}
    criterion = SpatialIBLoss(preset, transform="identity", window=3, impl=implementation, **seed)
    expected = criterion(problem.logits(), problem.y, problem.x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = problem.logits()
        inside = criterion.terms(logits, problem.y, problem.x)
    assert logits.dtype == torch.bfloat16
    outside = criterion(logits, problem.y, problem.x)
    for loss in (inside.loss, outside):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=0.03, atol=0.03)
    inside.loss.backward()
    assert all(p.grad.isfinite().all() for p in problem.parameters)


def test_a_bfloat16_model_gives_a_finite_loss_near_the_float64_one(implementation):
    problem = tiny_problem(dtype=torch.bfloat16, norm="group")
    terms = SpatialIBLoss(window=3, impl=implementation, **FIXED).terms(problem.logits(), problem.y, problem.x)
    assert (terms.vjp.dtype, terms.mask.dtype, terms.loss.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = tiny_problem(norm="group")
    expected = SpatialIBLoss(window=3, **FIXED).terms(exact.logits(), exact.y, exact.x)
    torch.testing.assert_close(terms.loss.double(), expected.loss, rtol=0.03, atol=0.03)
    terms.loss.backward()
    assert all(p.grad.isfinite().all() for p in problem.parameters)


def test_float32_and_float64_losses_agree(implementation):
    narrow, wide = tiny_problem(dtype=torch.float32), tiny_problem()
    loss = SpatialIBLoss(window=3, impl=implementation, **FIXED)(narrow.logits(), narrow.y, narrow.x)
    expected = SpatialIBLoss(window=3, **FIXED)(wide.logits(), wide.y, wide.x)
    assert loss.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_dead_network_gives_a_finite_loss_and_gradient(implementation):
    """All-zero weights at the head: R is zero everywhere."""
    problem = tiny_problem(dtype=torch.float32)
    nn.init.zeros_(problem.model.head.weight)
    for preset in PRESETS:
        loss = SpatialIBLoss(preset, window=3, detach_mask=False, impl=implementation)(
            problem.logits(), problem.y, problem.x
        )
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients(loss, problem.parameters))


# ------------------------------------------------------------------------------------------------ the module


def test_inputs_stay_as_they_are(problem):
    before = problem.x.detach().clone()
    mask = SOFT.clone()
    loss_of(problem, mask).loss.backward()
    assert torch.equal(problem.x, before) and torch.equal(mask, SOFT)


def test_two_backwards_with_retained_graph_add_the_same_gradient_twice(problem, implementation):
    loss = loss_of(problem, preset="paper", impl=implementation).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in problem.parameters]
    loss.backward()
    for p, gradient in zip(problem.parameters, once, strict=True):
        assert torch.equal(p.grad, 2 * gradient)


def test_the_repr_says_what_is_computed():
    text = repr(SpatialIBLoss("paper", background="energy", input_foreground=0.5))
    for part in (
        "SpatialIBLoss(",
        "preset='paper'",
        "'energy' (1000 input",
        "'hsic' (0.5 input",
        "'exp'",
        "'probability_energy'",
    ):
        assert part in text


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_criterion_gives_the_same_loss(copied, problem):
    criterion = SpatialIBLoss("paper", window=3, weight=CLASS_WEIGHT, label_smoothing=0.1)
    other = copied(criterion)
    logits = problem.logits()
    assert other is not criterion
    assert torch.equal(other(logits, problem.y, problem.x), criterion(logits, problem.y, problem.x))


def test_the_state_dict_holds_the_class_weight_as_in_torch():
    criterion, fresh = SpatialIBLoss(weight=CLASS_WEIGHT), SpatialIBLoss(weight=torch.ones(3, dtype=torch.float64))
    assert criterion.state_dict().keys() == nn.CrossEntropyLoss(weight=CLASS_WEIGHT).state_dict().keys()
    fresh.load_state_dict(criterion.state_dict())
    assert torch.equal(fresh.weight, CLASS_WEIGHT)
    assert SpatialIBLoss().state_dict() == {}


def test_a_training_step_lowers_the_loss():
    problem = tiny_problem(dtype=torch.float32)
    criterion = SpatialIBLoss(window=3)
    optimizer = torch.optim.Adam(problem.parameters, lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(problem.logits(), problem.y, problem.x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_gradients_of_published_terms_are_compared_at_a_tolerance_that_notices(problem):
    """The guard of the guards: a formula that is off by a thousandth must not pass."""
    expected = published_loss(problem.logits(), problem.y, problem.x)
    with pytest.raises(AssertionError):
        assert_near(1.001 * expected["foreground"], expected["foreground"], GRADIENTS)
