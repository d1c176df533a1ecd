"""Several labels an image, masks a class, ignored labels and classification losses of one's own."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from sib_ext import SIBStep, SpatialIBLoss, labels
from sib_ext import functional as sib
from sib_ext.classification import guessing_labels

from .compare import assert_near, gradients
from .samples import FIXED, tiny_problem
from .test_end_to_end import directions_of, finite_difference

#: The third image has no label, the fourth all.
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1]])
OF_INPUT = {"input_background": 1.0, "foreground": "log_capacity", "input_foreground": 0.5, "feature_foreground": 0.0}
MASKS = torch.rand(5, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def of_labels(**options):
    return SpatialIBLoss(task="multilabel", window=3, **OF_INPUT | options)


@pytest.fixture
def problem():
    return tiny_problem(norm="group")


def masks_of(look, masks=MASKS):
    """Sample by sample."""
    rows = []
    for i in range(len(masks)):
        chosen = torch.nonzero(look.present[i])[:, 0].tolist() if look.of_all[i] else [int(look.label[i])]
        rows.append(torch.stack([masks[i, k] for k in chosen] or [torch.zeros_like(masks[i, 0])]).amax(0))
    return torch.stack(rows)[:, None]


# --------------------------------------------------------------------------------------------------- draws


def test_each_image_looks_at_one_of_its_labels_all_alike_often():
    looks = [labels.drawn(LABELS, "target_logit") for _ in range(900)]
    seen = sum(look.target for look in looks) / 900
    truth = torch.tensor(
        [[1 / 2, 0, 1 / 2], [0, 1, 0], [1 / 3, 1 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 2, 1 / 2]]
    )
    torch.testing.assert_close(seen, truth, rtol=0, atol=0.07)
    for look in looks[:50]:
        assert torch.equal(look.target.sum(1), torch.ones(5))
        assert look.counts.tolist() == [True, True, False, True, True]
        assert look.of_all.tolist() == [False, False, True, False, False]
        known = look.counts
        assert torch.equal(look.target.argmax(1)[known], look.label[known])


def test_half_of_the_time_a_random_logit_is_of_a_class_that_is_not_there():
    looks = [labels.drawn(LABELS, "random_logit") for _ in range(900)]
    seen = sum(look.target for look in looks) / 900
    truth = torch.tensor(
        [[1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 3] * 3, [1 / 3] * 3, [1 / 2, 1 / 4, 1 / 4]]
    )
    torch.testing.assert_close(seen, truth, rtol=0, atol=0.07)
    for look in looks[:50]:
        there = (look.target * LABELS).sum(1) > 0
        assert torch.equal(look.of_all, ~there)  # all masks count together where the logit is of another class
        assert bool((LABELS.gather(1, look.label[:, None])[:, 0] > 0)[look.counts].all())


def test_a_soft_label_is_there_from_one_half_on():
    look = labels.drawn(torch.tensor([[0.49, 0.5], [0.3, 0.2]]), "target_logit")
    assert look.label[0] == 1 and look.counts.tolist() == [True, False]


def test_what_a_mixed_image_has_little_of_is_neither_looked_at_nor_absent():
    target = torch.tensor([[0.7, 0.3, 0.0]])
    looks = [labels.drawn(target, "random_logit") for _ in range(60)]
    assert {look.target.argmax().item() for look in looks} == {0, 2}
    assert all(look.present.tolist() == [[True, True, False]] for look in looks)  # both objects are foreground


def test_draws_are_repeated_with_the_generator(problem):
    criterion = of_labels(seed="random_logit")
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(criterion(problem.logits(), LABELS, problem.x))
    assert losses[0] == losses[1] != losses[2]


# ------------------------------------------------------------------------------------- the loss by its formula


def elementary(problem, target, look, M, known, kappa=1.0, share=0.5):
    """BCE + (b + 0.5 (-I_f)) / K, each a weighted mean over the samples that count, by sums over pixels alone."""
    z, x = problem.logits(), problem.x
    y = target.double()
    bce = -(y * torch.log(torch.sigmoid(z)) + (1 - y) * torch.log(1 - torch.sigmoid(z))).mean()
    (R,) = torch.autograd.grad((z * look.target).sum(), x, create_graph=True)
    weights = torch.zeros(len(x), dtype=torch.float64)
    counted = look.counts
    groups = [counted & known, counted & ~known]
    for group, of_group in zip(groups, (1 - share, share), strict=True):
        if group.any():
            weights[group] = (of_group if all(g.any() for g in groups) else 1.0) / group.sum()
    background = (R.abs() * (1 - M)).sum((1, 2, 3)) / R.abs().sum((1, 2, 3))
    strength = sib.magnitude(R)
    foreground = sib.foreground_log_capacity(strength, M, strength[counted].mean(), kappa)
    return bce + ((weights * background).sum() - 0.5 * (weights * foreground).sum()) / target.shape[1]


@pytest.mark.parametrize("seed", labels.MULTILABEL_SEEDS)
def test_the_loss_is_the_stated_sum_and_so_is_its_gradient(seed, problem, implementation):
    torch.manual_seed(3)
    look = labels.drawn(LABELS, seed)
    assert seed == "target_logit" or look.of_all.sum() > 1
    torch.manual_seed(3)
    loss = of_labels(seed=seed, impl=implementation)(problem.logits(), LABELS, problem.x, MASKS)
    truth = elementary(problem, LABELS, look, masks_of(look), torch.ones(5, dtype=torch.bool))
    assert_near(loss, truth, 1e-10)
    for found, expected in zip(*(gradients(value, problem.parameters) for value in (loss, truth)), strict=True):
        assert_near(found, expected, 1e-8)


@pytest.mark.parametrize("seed", labels.MULTILABEL_SEEDS)
def test_gradients_equal_finite_differences(seed, problem, implementation):
    """Some masks are self-made, and move."""
    some = [{0: MASKS[0, 0]}, {1: MASKS[1, 1]}, None, {0: MASKS[3, 0], 2: MASKS[3, 2]}, MASKS[4, 0]]
    criterion = of_labels(seed=seed, impl=implementation, detach_mask=False, mask_source="vjp")

    def loss():
        torch.manual_seed(4)
        return criterion(problem.logits(), LABELS, problem.x, some)

    for parameter, gradient in zip(problem.parameters, gradients(loss(), problem.parameters), strict=True):
        pairs = [((gradient * d).sum().item(), finite_difference(loss, parameter, d)) for d in directions_of(parameter)]
        found, expected = torch.tensor(pairs, dtype=torch.float64).T
        assert_near(found, expected, 1e-6)


def test_images_without_labels_have_no_terms(problem):
    one_each, kept = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]), torch.tensor([0, 1, 3, 4])
    whole = of_labels(seed="target_logit").terms(problem.logits(), one_each, problem.x, MASKS)
    others = problem._replace(x=problem.x.detach()[kept].requires_grad_())
    part = of_labels(seed="target_logit").terms(others.logits(), one_each[kept], others.x, MASKS[kept])
    for name in ("background", "foreground"):
        assert_near(getattr(whole, name)["input"], getattr(part, name)["input"], 1e-12)


def test_a_batch_without_any_label_is_classified_alone(problem):
    none = torch.zeros(5, 3)
    terms = of_labels().terms(problem.logits(), none, problem.x, MASKS)
    assert_near(terms.loss, F.binary_cross_entropy_with_logits(problem.logits(), none.double()), 1e-12)
    assert all(g.isfinite().all() for g in gradients(terms.loss, problem.parameters))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.float64])
def test_labels_of_every_type_give_the_same_loss(dtype, problem):
    torch.manual_seed(1)
    truth = of_labels()(problem.logits(), LABELS.double(), problem.x)
    torch.manual_seed(1)
    assert_near(of_labels()(problem.logits(), LABELS.to(dtype), problem.x), truth, 1e-12)


def test_the_weights_of_classes_are_those_of_the_binary_cross_entropy(problem):
    weights = {"weight": torch.tensor([0.5, 1.0, 2.0]), "pos_weight": torch.tensor([3.0, 1.0, 0.2])}
    criterion = of_labels(**weights).double()
    truth = F.binary_cross_entropy_with_logits(
        problem.logits(), LABELS.double(), **{n: w.double() for n, w in weights.items()}
    )
    assert_near(criterion.terms(problem.logits(), LABELS, problem.x).cross_entropy, truth, 1e-12)
    assert_near(criterion.cross_entropy(problem.logits(), LABELS), truth, 1e-12)
    assert criterion.pos_weight.dtype == torch.float64  # it moves with the module


def test_one_image_and_one_class_will_do(problem):
    single = tiny_problem(batch=1, norm="group", classes=1)
    loss = of_labels()(single.logits(), torch.ones(1, 1), single.x, MASKS[:1, :1])
    assert loss.isfinite() and any(g.any() for g in gradients(loss, single.parameters))


# ------------------------------------------------------------------------------------------- masks a class


def chosen(mask, look, annotated=None, x=None):
    x = torch.zeros(5, 3, 9, 11, dtype=torch.float64) if x is None else x
    return SpatialIBLoss(task="multilabel").given(mask, x, annotated, look)


def look_at(label, of_all=(False,) * 5, present=LABELS > 0):
    return labels.Look(torch.zeros(5, 3), torch.tensor(label), present, torch.tensor(of_all), present.any(1))


BOX = torch.tensor([1.0, 2.0, 5.0, 7.0])
AS_BOX = sib.boxes_to_mask(BOX[None], 9, 11)[0, 0].double()


def test_the_mask_is_that_of_the_label():
    items = [{0: MASKS[0, 0], 2: MASKS[0, 2]}, {1: BOX}, None, {0: MASKS[3, 0]}, MASKS[4, 0]]
    found, known = chosen(items, look_at([2, 1, 0, 1, 2]))
    assert known.tolist() == [True, True, False, False, True]
    assert torch.equal(found[0, 0], MASKS[0, 2]) and torch.equal(found[1, 0], AS_BOX)
    assert torch.equal(found[4, 0], MASKS[4, 0])  # of the whole sample, for every label


def test_masks_of_all_labels_are_united_and_known_if_all_are():
    items = [{0: MASKS[0, 0], 2: MASKS[0, 2], 1: torch.ones(9, 11)}, {1: BOX}, None, {0: MASKS[3, 0]}, MASKS[4, 0]]
    found, known = chosen(items, look_at([2, 1, 0, 1, 2], (True,) * 5))
    assert known.tolist() == [True, True, False, False, True]
    assert torch.equal(found[0, 0], torch.maximum(MASKS[0, 0], MASKS[0, 2]))  # what is not there does not count
    assert torch.equal(found[4, 0], MASKS[4, 0])


def test_a_tensor_of_masks_a_class_is_the_same_as_mappings():
    for of_all in ((False,) * 5, (True,) * 5, (True, False, True, False, True)):
        look = look_at([0, 1, 0, 2, 1], of_all)
        items = [{k: MASKS[i, k] for k in range(3)} for i in range(5)]
        (one, known), (other, also) = chosen(MASKS, look), chosen(items, look)
        assert torch.equal(one, other) and torch.equal(one, masks_of(look)) and torch.equal(known, also)
        assert known.tolist() == [True, True, not of_all[2], True, True]  # the third has no label


def test_flags_of_classes_and_of_samples_say_what_is_known():
    flags = torch.tensor([[True, True, False], [True] * 3, [True] * 3, [True, True, False], [False] * 3])
    wild = torch.where(flags[:, :, None, None], MASKS, torch.nan)  # what is not known is not looked at
    of_one, of_all = look_at([0, 1, 0, 2, 1]), look_at([0, 1, 0, 2, 1], (True,) * 5)
    assert chosen(wild, of_one, flags)[1].tolist() == [True, True, True, False, False]
    found, known = chosen(wild, of_all, flags)
    assert known.tolist() == [False, True, False, False, False] and found[known].isfinite().all()
    samples = torch.tensor([True, False, True, True, True])
    assert torch.equal(chosen(MASKS, of_one, samples)[1], samples)
    assert torch.equal(chosen([{0: BOX}] * 5, look_at([0] * 5), samples)[1], samples)


def test_a_mask_of_the_sample_stands_for_all_its_labels():
    found, annotated = chosen(MASKS[:, :1], look_at([0, 1, 0, 2, 1]))
    assert torch.equal(found, MASKS[:, :1]) and annotated is None


def test_with_one_label_an_image_the_mask_is_that_of_its_class(problem):
    items = [{int(k): MASKS[i, 0], int(k + 1) % 3: MASKS[i, 1]} for i, k in enumerate(problem.y)]
    items[1] = {int(problem.y[1] + 1) % 3: MASKS[1, 0]}  # of another class alone
    plain = [MASKS[0, 0], None, *MASKS[2:, 0]]
    of_classes, of_samples = (
        SpatialIBLoss(**FIXED, window=3).terms(problem.logits(), problem.y, problem.x, mask) for mask in (items, plain)
    )
    assert torch.equal(of_classes.loss, of_samples.loss) and torch.equal(of_classes.mask, of_samples.mask)


def test_torchvision_boxes_of_a_class_are_read_in_their_format():
    tv = pytest.importorskip("torchvision.tv_tensors", reason="torchvision is not installed")
    boxes = tv.BoundingBoxes(torch.tensor([[3.0, 4.5, 4.0, 5.0]] * 2), format="CXCYWH", canvas_size=(9, 11))
    found, known = chosen([{1: boxes}] * 5, look_at([1] * 5))
    assert known.all() and torch.equal(found[0, 0], AS_BOX)


REFUSED = [
    (r"sample 1 names the class 3: name class indices from 0 to 2", [None, {3: BOX}, None, None, None]),
    (r"sample 0 names the class 'cat'", [{"cat": BOX}, None, None, None, None]),
    (r"sample 0 names the class -1", [{-1: BOX}, None, None, None, None]),
    (r"sample 0 names the class True", [{True: BOX}, None, None, None, None]),
    (r"mask has 2 items for a batch of 5", [{0: BOX}, None]),
    (r"mask must be a tensor or None", [{0: "all"}, None, None, None, None]),
    (r"box 0 is .*\(sample 3, class 2\)", [None, None, None, {0: BOX, 2: 9 * BOX}, None]),
    (r"box 0 is .*\(sample 1\)", [{0: BOX}, 9 * BOX, None, None, None]),
    (r"mask must be \[5,3,9,11\] on cpu, one a class, got .*\[5, 4, 9, 11\]", torch.zeros(5, 4, 9, 11)),
    (r"mask must be \[5,3,9,11\]", torch.zeros(5, 3, 9, 9)),
    (r"mask must lie in \[0,1\]", 2 * MASKS + 1),
]


@pytest.mark.parametrize("words, mask", REFUSED)
def test_bad_masks_a_class_are_refused(words, mask):
    with pytest.raises(ValueError, match=words):
        chosen(mask, look_at([0] * 5))


@pytest.mark.parametrize("annotated", [torch.ones(5, 2, dtype=torch.bool), torch.ones(5, 3), [True] * 5])
def test_bad_flags_are_refused(annotated):
    with pytest.raises(ValueError, match=r"annotated must be a boolean tensor \[5\] or \[5, 3\]"):
        chosen(MASKS, look_at([0] * 5), annotated)
    with pytest.raises(ValueError, match=r"annotated must be a boolean tensor"):
        chosen([{0: BOX}] * 5, look_at([0] * 5), annotated)


def test_masks_a_class_need_a_label(problem):
    soft = torch.full((5, 3), 1 / 3)
    with pytest.raises(ValueError, match="target has class probabilities, which name none"):
        SpatialIBLoss()(problem.logits(), soft, problem.x, [{0: BOX}] * 5)


def test_a_class_that_no_logit_is_of_is_refused_with_one_label_an_image_too(problem):
    masks = [{7: BOX}] * 5
    for call in (
        lambda c: c(problem.logits(), problem.y, problem.x, masks),
        lambda c: SIBStep(problem.model, c, ())(problem.x, problem.y, masks),
    ):
        with pytest.raises(ValueError, match="sample 0 names the class 7: name class indices from 0 to 2"):
            call(SpatialIBLoss(**OF_INPUT))


def test_masks_a_class_as_a_tensor_are_refused_with_one_label_an_image(problem):
    with pytest.raises(ValueError, match=r"for task='multilabel'; with one label an image give mappings"):
        SpatialIBLoss(**OF_INPUT)(problem.logits(), problem.y, problem.x, MASKS)


def test_images_of_torchvision_are_no_masks_a_class():
    tv = pytest.importorskip("torchvision.tv_tensors", reason="torchvision is not installed")
    with pytest.raises(ValueError, match="mask must be a mask or boxes, got a torchvision Image"):
        chosen(tv.Image(MASKS), look_at([0] * 5))
    assert torch.equal(chosen(tv.Mask(MASKS), look_at([0] * 5))[0], MASKS[:, :1])


# ------------------------------------------------------------------------------------ options that do not fit

OPTIONS = [
    ("task is 'several'; choose one of", {"task": "several"}),
    ("seed='probability_energy' has no meaning for task='multilabel'", {"task": "multilabel", "preset": "paper"}),
    ("label_smoothing has no meaning for task='multilabel'", {"task": "multilabel", "label_smoothing": 0.1}),
    ("ignore_index has no meaning for task='multilabel'", {"task": "multilabel", "ignore_index": 255}),
    ("pos_weight has no meaning for task='multiclass'", {"pos_weight": torch.ones(3)}),
    ("weight has no meaning with a base loss", {"base": F.cross_entropy, "weight": torch.ones(3)}),
    ("ignore_index has no meaning with a base loss", {"base": F.cross_entropy, "ignore_index": -1}),
    ("base must be None or a function", {"base": "focal"}),
    ("base must be None or a function .* such as a module", {"base": torch.nn.CrossEntropyLoss}),
    ("weight must be finite numbers >= 0", {"weight": torch.tensor([1.0, -1.0])}),
    ("pos_weight must be finite numbers >= 0", {"task": "multilabel", "pos_weight": torch.tensor([1.0, math.inf])}),
    ("weight must be a tensor", {"weight": [1.0, 2.0]}),
    ("label_smoothing must be a number from 0 to 1", {"label_smoothing": 1.5}),
    ("ignore_index must be None or an integer", {"ignore_index": 1.0}),
    ("foreground='hsic' compares all samples", {"task": "multilabel", "foreground": "hsic", "input_foreground": 1.0}),
    ("foreground='cka' compares all samples", {"ignore_index": -1, "foreground": "cka", "input_foreground": 1.0}),
]


@pytest.mark.parametrize("words, options", OPTIONS)
def test_options_that_do_not_fit_are_refused(words, options):
    with pytest.raises(ValueError, match=words):
        SpatialIBLoss(**options)


TARGETS = [
    (r"target must be labels \[5,.\] in \[0,1\] for", torch.zeros(5, dtype=torch.int64)),
    (r"target must be labels \[5,.\] in \[0,1\] for", torch.zeros(4, 3)),
    (r"target must lie in \[0,1\] for task='multilabel', got 0 to 2", 2 * LABELS),
    (r"target must lie in \[0,1\]", torch.full((5, 3), math.nan)),
    (r"target must be labels \[5,3\] in \[0,1\] .*got .*\[5, 4\]", torch.zeros(5, 4)),
    (r"target must be a tensor", [[0, 1, 0]] * 5),
]


def test_weights_that_change_in_a_training_are_checked_again(problem):
    criterion = of_labels(foreground="hsic", input_foreground=0.0)
    criterion.input_foreground = 1.0
    with pytest.raises(ValueError, match="foreground='hsic' compares all samples"):
        criterion(problem.logits(), LABELS, problem.x)


def test_labels_are_checked_in_the_validation_loss_too(problem):
    with torch.no_grad(), pytest.raises(ValueError, match=r"target must lie in \[0,1\]"):
        of_labels().cross_entropy(problem.logits(), 255 * LABELS)


def test_labels_for_a_loss_of_one_are_refused_with_what_to_do(problem):
    for call in (
        lambda c: c(problem.logits(), LABELS, problem.x),
        lambda c: SIBStep(problem.model, c, ())(problem.x, LABELS, [{0: BOX}] * 5),
    ):
        with pytest.raises(ValueError, match="target must be class indices.*give the loss task='multilabel'"):
            call(SpatialIBLoss())


@pytest.mark.parametrize("words, target", TARGETS)
def test_bad_labels_are_refused(words, target, problem):
    with pytest.raises(ValueError, match=words):
        of_labels()(problem.logits(), target, problem.x)
    with pytest.raises(ValueError, match=words):
        SIBStep(problem.model, of_labels(), ())(problem.x, target)


def test_weights_of_another_number_of_classes_are_refused(problem):
    for name, options in (("weight", {}), ("pos_weight", {"task": "multilabel"})):
        criterion = SpatialIBLoss(**{name: torch.ones(4), **OF_INPUT, **options})
        target = LABELS if options else problem.y
        with pytest.raises(ValueError, match=f"{name} has 4 values for 3 logits"):
            criterion(problem.logits(), target, problem.x)


# ----------------------------------------------------------------------------------------------- ignore_index

IGNORED = -7


@pytest.mark.parametrize("background", ["magnitude_ratio", "gaussian"])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)])
def test_ignored_samples_are_left_out_of_the_loss_and_of_the_terms(weight, background, problem):
    known = torch.tensor([True, False, True, True, False])
    y = torch.where(known, problem.y, IGNORED)
    options = {"seed": "target_logit", "weight": weight, "label_smoothing": 0.1, **OF_INPUT}
    options["background"] = background
    terms = SpatialIBLoss(ignore_index=IGNORED, **options).terms(problem.logits(), y, problem.x, MASKS[:, :1])
    part = problem._replace(x=problem.x.detach()[known].requires_grad_(), y=problem.y[known])
    truth = SpatialIBLoss(**options).terms(part.logits(), part.y, part.x, MASKS[known, :1])
    for found, expected in ((terms.cross_entropy, truth.cross_entropy), (terms.loss, truth.loss)):
        assert_near(found, expected, 1e-10)
    pairs = zip(gradients(terms.loss, problem.parameters), gradients(truth.loss, problem.parameters), strict=True)
    for found, expected in pairs:
        assert_near(found, expected, 1e-9)


def test_a_seed_without_a_label_keeps_the_terms_of_ignored_samples(problem):
    y = problem.y.clone()
    y[0] = IGNORED
    terms, all_known = (
        SpatialIBLoss("paper", ignore_index=IGNORED).terms(problem.logits(), target, problem.x)
        for target in (y, problem.y)
    )
    assert_near(terms.background["input"], all_known.background["input"], 1e-12)
    assert_near(terms.cross_entropy, F.cross_entropy(problem.logits()[1:], y[1:]), 1e-12)


def test_of_ignored_samples_no_mask_a_class_is_taken(problem):
    """Whatever the seed: the terms of those that need no label stay, with self-made masks."""
    y = torch.tensor([0, IGNORED, 2, 1, 1])
    options = {"seed": "logit_sum", "ignore_index": IGNORED, "mask_source": "vjp", **OF_INPUT}
    of_first, of_none = (
        SpatialIBLoss(**options)(problem.logits(), y, problem.x, [{0: MASKS[0, 0]}, item, None, None, None])
        for item in ({0: BOX, 1: BOX, 2: BOX}, None)
    )
    assert torch.equal(of_first, of_none)


def test_probabilities_know_no_ignored_label(problem):
    soft = torch.rand(5, 3).double().softmax(1)
    for ignored in (IGNORED, 255):
        criterion = SpatialIBLoss(ignore_index=ignored, seed="target_logit", **OF_INPUT)
        plain = SpatialIBLoss(seed="target_logit", **OF_INPUT)
        found, truth = (c(problem.logits(), soft, problem.x, MASKS[:, :1]) for c in (criterion, plain))
        assert_near(found, truth, 1e-12)


def test_a_step_leaves_ignored_samples_out_too(problem):
    y = torch.tensor([0, IGNORED, 2, 1, IGNORED])
    criterion = SpatialIBLoss(ignore_index=IGNORED, seed="target_logit", **OF_INPUT)
    found = SIBStep(problem.model, criterion, (), every=1, jitter=0).terms(problem.x, y, MASKS[:, :1])
    truth = criterion.terms(problem.logits(), y, problem.x, MASKS[:, :1])
    assert_near(found.loss, truth.loss, 1e-12)


def test_a_batch_of_ignored_samples_alone_is_refused(problem):
    y = torch.full((5,), IGNORED)
    for call in (
        lambda c: c(problem.logits(), y, problem.x),
        lambda c: SIBStep(problem.model, c, ())(problem.x, y),
    ):
        with pytest.raises(ValueError, match="target is ignore_index=-7 for every sample"):
            call(SpatialIBLoss(ignore_index=IGNORED))


def test_other_labels_out_of_range_are_refused_still(problem):
    y = torch.tensor([0, IGNORED, 2, 3, IGNORED])
    with pytest.raises(ValueError, match=r"target must lie in \[0,2\] for 3 logits, got 0 to 3"):
        SpatialIBLoss(ignore_index=IGNORED)(problem.logits(), y, problem.x)
    with pytest.raises(ValueError, match=r"target must lie in \[0,2\] for 3 logits, got -100 to"):
        SpatialIBLoss()(problem.logits(), torch.where(y == IGNORED, -100, 0), problem.x)


def test_without_an_ignored_label_the_cross_entropy_ignores_none():
    with pytest.raises(IndexError):  # torch's own default would leave -100 out of a loss, without a word
        SpatialIBLoss().cross_entropy(torch.zeros(2, 3), torch.tensor([0, -100]))


# -------------------------------------------------------------------------------------- losses of one's own


def focal(logits, target):
    """Lin et al. 2017, gamma 2: one value a sample."""
    each = F.cross_entropy(logits, target, reduction="none")
    return (1 - torch.exp(-each)) ** 2 * each


@pytest.mark.parametrize("of_batch", [False, True], ids=["[B]", "scalar"])
def test_a_loss_of_ones_own_stands_in_the_place_of_the_cross_entropy(of_batch, problem):
    base = (lambda z, y: focal(z, y).mean()) if of_batch else focal
    criterion = SpatialIBLoss(base=base, seed="target_logit", **OF_INPUT)
    terms = criterion.terms(problem.logits(), problem.y, problem.x)
    plain = SpatialIBLoss(seed="target_logit", **OF_INPUT).terms(problem.logits(), problem.y, problem.x)
    expected = focal(problem.logits(), problem.y).mean()
    assert_near(terms.cross_entropy, expected, 1e-12)
    assert_near(terms.loss, plain.loss - plain.cross_entropy + expected, 1e-12)
    assert_near(criterion.cross_entropy(problem.logits(), problem.y), expected, 1e-12)
    step = SIBStep(problem.model, criterion, (), every=1, jitter=0)
    assert_near(step(problem.x, problem.y), terms.loss, 1e-12)


def test_a_loss_of_ones_own_takes_several_labels_too(problem):
    for base in (torch.nn.MultiLabelSoftMarginLoss(), torch.nn.BCEWithLogitsLoss()):
        for target in (LABELS, LABELS > 0, LABELS.double()):
            terms = of_labels(base=base).terms(problem.logits(), target, problem.x, MASKS)
            assert_near(terms.cross_entropy, base(problem.logits(), LABELS.double()), 1e-12)


def test_a_loss_of_timms_own_will_do(problem):
    loss = pytest.importorskip("timm.loss", reason="timm is not installed")
    for base, target in (
        (loss.BinaryCrossEntropy(smoothing=0.1), problem.y),
        (loss.SoftTargetCrossEntropy(), torch.rand(5, 3).softmax(1)),
        (loss.LabelSmoothingCrossEntropy(), problem.y),
    ):
        terms = SpatialIBLoss(base=base, **OF_INPUT).terms(problem.logits(), target, problem.x)
        assert_near(terms.cross_entropy, base(problem.logits(), target), 1e-12)


@pytest.mark.parametrize(
    "returned, words",
    [
        (lambda z, y: focal(z.detach(), y), "it must not detach"),
        (lambda z, y: z, r"scalar or \[5\], .* got .*\[5, 3\]"),
        (lambda z, y: 1.0, "got float"),
        (lambda z, y: y, "int64"),
    ],
)
def test_a_loss_of_ones_own_that_returns_something_else_is_refused(returned, words, problem):
    with pytest.raises(ValueError, match=f"base .*{words}"):
        SpatialIBLoss(base=returned)(problem.logits(), problem.y, problem.x)


# --------------------------------------------------------------------------------------------------- the guard


def test_what_guessing_costs_is_the_least_of_the_binary_cross_entropies():
    frequency = torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64)
    for weights in ({}, {"pos_weight": torch.tensor([3.0, 0.5, 2.0])}, {"weight": torch.tensor([1.0, 2.0, 3.0])}):
        z = torch.linspace(-12, 12, 4801, dtype=torch.float64)
        each = []
        for k, p in enumerate(frequency.tolist()):
            w, w_pos = (float(weights[n][k]) if n in weights else 1.0 for n in ("weight", "pos_weight"))
            each.append(w * (-p * w_pos * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z)).min())
        found = guessing_labels(frequency, weights.get("weight"), weights.get("pos_weight"))
        assert found == pytest.approx(float(sum(each)) / 3, abs=1e-4)


def test_the_guard_counts_labels_and_knows_no_guess_of_a_loss_of_ones_own(problem):
    criterion = of_labels()
    for _ in range(3):
        criterion(problem.logits(), LABELS, problem.x)
    torch.testing.assert_close(criterion.guard.frequency, LABELS.float().mean(0))
    assert criterion.guessing(criterion.guard.frequency) == guessing_labels(LABELS.float().mean(0), None, None)
    assert math.isnan(SpatialIBLoss(base=focal).guessing())
    assert copy.deepcopy(criterion).guard.steps == 3
    of_two = tiny_problem(norm="group", classes=2)
    criterion(of_two.logits(), LABELS[:, :2], of_two.x)  # another network starts anew
    torch.testing.assert_close(criterion.guard.frequency, LABELS[:, :2].float().mean(0))


def test_maps_of_images_without_terms_do_not_count_as_empty(problem):
    logits = problem.logits()
    counts = torch.tensor([True, False, False, True, True])
    y = torch.where(counts, problem.y, IGNORED)
    logits = logits * counts[:, None]  # of ignored images no VJP is left
    terms = SpatialIBLoss(ignore_index=IGNORED, seed="target_logit", **OF_INPUT).terms(logits, y, problem.x)
    assert int(terms.empty["input"]) == 0


# ------------------------------------------------------------------------------------------------------- mixed


def halves(x, target):
    """The left half of each image is that of the image before it."""
    left = torch.arange(x.shape[3]) < x.shape[3] // 2
    soft = F.one_hot(target, 3).double()
    return torch.where(left, x.roll(1, 0), x), 0.5 * (soft + soft.roll(1, 0))


def test_masks_are_pasted_as_their_images_are(problem):
    x = problem.x.detach()
    annotated = torch.tensor([True, True, False, True, True])
    mixed_x, target, mask, known = sib.mixed(halves, x, problem.y, MASKS[:, 0], annotated)
    truth, soft = halves(x, problem.y)
    assert torch.equal(mixed_x, truth) and torch.equal(target, soft)
    assert known.tolist() == [True, True, False, False, True]  # the third, and the one that has its half
    torch.testing.assert_close(mask[known], halves(MASKS[:, :1], problem.y)[0][known])
    x = mixed_x.requires_grad_()
    assert SpatialIBLoss()(problem.model(x), target, x, mask, known).isfinite()


def test_masks_of_classes_and_batches_without_masks_can_be_mixed(problem):
    x = problem.x.detach()
    *_, mask, known = sib.mixed(halves, x, problem.y, MASKS)
    assert torch.equal(mask, halves(MASKS, problem.y)[0]) and known.all()
    for none in (None, [None] * 5):
        mixed_x, _, mask, known = sib.mixed(halves, x, problem.y, none)
        assert torch.equal(mixed_x, halves(x, problem.y)[0]) and mask is None and known is None


def test_masks_by_class_are_mixed_as_those_of_the_target(problem):
    x, items = problem.x.detach(), [{int(k): MASKS[i, 0], (int(k) + 1) % 3: BOX} for i, k in enumerate(problem.y)]
    items[3] = {(int(problem.y[3]) + 1) % 3: BOX}
    *_, mask, known = sib.mixed(halves, x, problem.y, items)
    assert known.tolist() == [True, True, True, False, False]
    torch.testing.assert_close(mask[known], halves(MASKS[:, :1], problem.y)[0][known])


def halves_of_labels(x, target):
    return halves(x, target.argmax(1))[0], torch.maximum(target, target.roll(1, 0))


def test_masks_by_class_of_several_labels_become_masks_a_class(problem):
    x = problem.x.detach()
    items = [{k: MASKS[i, k] for k in range(3) if (i, k) != (3, 2)} for i in range(4)] + [MASKS[4, 0]]
    _, target, mask, known = sib.mixed(halves_of_labels, x, LABELS, items)
    whole = torch.cat([MASKS[:4], MASKS[4:, :1].expand(-1, 3, -1, -1)])
    truth, _ = halves_of_labels(whole, LABELS)
    expected = torch.ones(5, 3, dtype=torch.bool)
    expected[3, 2] = expected[4, 2] = False
    assert torch.equal(known, expected)
    torch.testing.assert_close(mask[known], truth[known])
    x = x.requires_grad_()
    assert of_labels()(problem.model(x), target, x, mask, known).isfinite()


@pytest.mark.parametrize("of_classes", [False, True], ids=["[B]", "[B,K]"])
def test_flags_are_mixed_too(of_classes, problem):
    flags = torch.tensor([True, True, False, True, True])
    flags = flags[:, None] & torch.tensor([True, False, True]) if of_classes else flags
    wild = torch.where(flags.reshape(5, -1, 1, 1), MASKS, torch.nan)
    *_, mask, known = sib.mixed(halves, problem.x.detach(), problem.y, wild, flags)
    assert torch.equal(known, flags & flags.roll(1, 0)) and mask.isfinite().all()


def test_mixed_images_keep_their_layout(problem):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = problem.x.detach().contiguous(memory_format=layout)
        mixed_x, *_ = sib.mixed(halves, x, problem.y, MASKS[:, 0])
        assert mixed_x.is_contiguous(memory_format=layout) and mixed_x.stride() == x.stride()


NOT_MIXED = [
    ("x must be floating point", lambda x: (x.to(torch.uint8), MASKS[:, 0], None)),
    ("annotated must be a boolean tensor", lambda x: (x, MASKS, torch.arange(5))),
    ("annotated must be a boolean tensor", lambda x: (x, MASKS, torch.ones(4, dtype=torch.bool))),
    (r"mask must be \[5,3,9,11\]", lambda x: (x, MASKS[..., :9], None)),
    (r"mask must lie in \[0,1\]", lambda x: (x, 2 * MASKS, None)),
]


@pytest.mark.parametrize("words, arguments", NOT_MIXED)
def test_what_cannot_be_mixed_is_refused(words, arguments, problem):
    x, *masks = arguments(problem.x.detach())
    with pytest.raises(ValueError, match=words):
        sib.mixed(halves, x, problem.y, *masks)


def test_a_mix_that_changes_the_shape_is_refused(problem):
    x = problem.x.detach()
    with pytest.raises(
        ValueError, match=r"mix must return images of the shape .*\[5, 5, 9, 11\], got .*\[5, 3, 9, 11\]"
    ):
        sib.mixed(lambda images, target: (images[:, :3], target), x, problem.y, MASKS[:, 0])
    with pytest.raises(ValueError, match="a target for each of the 5 images, got .*timm's Mixup takes class indices"):
        sib.mixed(lambda images, target: (images, target.repeat(3)), x, problem.y, MASKS[:, 0])
    with pytest.raises(ValueError, match="got list"):
        sib.mixed(lambda images, target: ([images], target), x, problem.y, MASKS[:, 0])


@pytest.mark.parametrize("name", ["CutMix", "MixUp"])
def test_torchvisions_transforms_mix_masks(name):
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")
    x, y = torch.rand(6, 3, 12, 10), torch.arange(6) % 3
    mask = (x.mean(1, keepdim=True) > 0.5).float()
    mix = getattr(v2, name)(num_classes=3)
    mixed_x, target, mixed_mask, known = sib.mixed(mix, x, y, mask)
    assert known.all() and target.shape == (6, 3) and not torch.equal(mixed_x, x)
    if name == "CutMix":
        torch.testing.assert_close(mixed_mask, (mixed_x.mean(1, keepdim=True) > 0.5).float())
        return
    share = (mixed_x[0] - x[-1]).norm() / (x[0] - x[-1]).norm()  # of each image itself; the rest is of the one before
    torch.testing.assert_close(mixed_mask, share * mask + (1 - share) * mask.roll(1, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "alphas", [{"mixup_alpha": 0.0, "cutmix_alpha": 1.0}, {"mixup_alpha": 1.0}], ids=["cut", "mix"]
)
def test_timms_mixup_mixes_masks(alphas):
    data = pytest.importorskip("timm.data", reason="timm is not installed")
    x, y = torch.rand(6, 3, 12, 10), torch.arange(6) % 3
    kept, mask = x.clone(), (x.mean(1, keepdim=True) > 0.5).float()
    mixed_x, target, mixed_mask, known = sib.mixed(data.Mixup(num_classes=3, **alphas), x, y, mask)
    assert torch.equal(x, kept) and known.all() and target.shape == (6, 3)  # timm writes into what it is given
    if "cutmix_alpha" in alphas:
        torch.testing.assert_close(mixed_mask, (mixed_x.mean(1, keepdim=True) > 0.5).float())
        return
    share = (mixed_x[0] - x[-1]).norm() / (x[0] - x[-1]).norm()
    torch.testing.assert_close(mixed_mask, share * mask + (1 - share) * mask.flip(0), rtol=1e-4, atol=1e-4)
