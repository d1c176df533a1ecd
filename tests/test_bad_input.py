"""Bad input is refused before any work, with the argument's name, what was given and what to do."""

import pytest
import torch

from sib_ext import SpatialIBLoss, density_mask, masked_statistics, seeds
from sib_ext import functional as sib

from .samples import Problem, tiny_problem

NAN, INF = float("nan"), float("inf")


def refused(case):
    """pytest.param of (error, words that the message must hold, in order, the call)."""
    name, error, words, call = case
    return pytest.param(error, words, call, id=name)


def check(error, words, call, *arguments):
    with pytest.raises(error, match="(?s)" + ".*".join(words)):
        call(*arguments)


# ------------------------------------------------------------------------------------------------ the ops

R = torch.randn(2, 3, 5, 6)
X = torch.randn(2, 3, 5, 6)
M = torch.rand(2, 1, 5, 6)
SIZE = r"\[2, 3, 5, 6\]"

FIELDS = [
    ("no tensor", ValueError, ["vjp must be a tensor", "got list", "pass a torch.Tensor"], R.tolist()),
    ("three dimensions", ValueError, ["vjp must have the four dimensions", r"\[3, 5, 6\]"], R[0]),
    ("integers", ValueError, ["vjp must be floating point", "torch.uint8", "255"], (255 * R).to(torch.uint8)),
    ("complex", ValueError, ["vjp must be floating point", "complex64"], R.to(torch.complex64)),
    ("no channel", ValueError, ["vjp must have at least one channel", r"\[2, 0, 5, 6\]"], R[:, :0]),
    ("no pixel", ValueError, ["vjp must have at least one channel and one pixel", r"\[2, 3, 0, 6\]"], R[:, :, :0]),
]
MAKERS = {
    "density_mask": density_mask,
    "hard_density_mask": sib.hard_density_mask,
    "mean_sigmoid_mask": sib.mean_sigmoid_mask,
    "top_p_mask": sib.top_p_mask,
    "masked_statistics": lambda vjp: masked_statistics(vjp, X, M),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("error, words, field", [refused(case) for case in FIELDS])
def test_a_field_that_is_no_batch_of_floating_point_images_is_refused(error, words, field, maker):
    check(error, words, maker, field)


NUMBERS = (0, -1.0, NAN, INF, "10", None, True)
OPTIONS = [
    *(("window", v, "odd number of pixels") for v in (0, 2, -3, 3.0, True, "big", None)),
    *(("temperature", v, "finite number > 0") for v in NUMBERS),
    *(("slope", v, "finite number > 0") for v in NUMBERS),
    *(("eps", v, "finite number >= 0") for v in (-1e-9, NAN, INF, "0")),
    *(("area", v, "share between 0 and 1") for v in (0, 1, 1.5, -0.1, NAN, "half", True)),
    *(("padding", v, "'zeros', 'exclude'") for v in ("reflect", None, 1)),
]


@pytest.mark.parametrize("name, value, meaning", OPTIONS)
def test_an_option_of_the_density_mask_out_of_range_is_refused(name, value, meaning):
    with pytest.raises(ValueError, match=f"{name} .*") as caught:
        density_mask(R, **{name: value})
    assert meaning in str(caught.value) and repr(value) in str(caught.value)


@pytest.mark.parametrize("name, value, meaning", [o for o in OPTIONS if o[1] is not None])
def test_an_option_of_the_loss_out_of_range_is_refused_when_it_is_made(name, value, meaning):
    with pytest.raises(ValueError, match=f"{name} .*") as caught:
        SpatialIBLoss(**{name: value})
    assert meaning in str(caught.value) and repr(value) in str(caught.value)


@pytest.mark.parametrize("make", [sib.hard_density_mask, sib.mean_sigmoid_mask, sib.top_p_mask])
def test_a_slope_that_is_not_positive_is_refused_by_every_mask(make):
    check(ValueError, ["slope must be a finite number > 0", "got 0"], lambda: make(R, slope=0))


STATISTICS = [
    ("x of another size", ValueError, ["x must have the size", SIZE, r"got .*\[2, 3, 5, 5\]"], (R, X[..., :5], M)),
    ("x of another batch", ValueError, ["x must have the size", r"\[1, 3, 5, 6\]"], (R, X[:1], M)),
    ("x elsewhere", ValueError, ["x must have the size and device of vjp", "on meta"], (R, X.to("meta"), M)),
    ("integer x", ValueError, ["x must be floating point", "torch.int64"], (R, X.long(), M)),
    ("no x", ValueError, ["x must be a tensor", "NoneType"], (R, None, M)),
    (
        "mask with channels",
        ValueError,
        [r"mask must be \[2,1,5,6\]", r"\[2, 3, 5, 6\]", "resize"],
        (R, X, M.expand(R.shape)),
    ),
    ("mask without channel", ValueError, [r"mask must be \[2,1,5,6\]", r"\[2, 5, 6\]"], (R, X, M[:, 0])),
    ("mask elsewhere", ValueError, ["mask must be", "on cpu", "on meta"], (R, X, M.to("meta"))),
    ("no mask", ValueError, ["mask must be a tensor", "NoneType"], (R, X, None)),
]


@pytest.mark.parametrize("error, words, fields", [refused(case) for case in STATISTICS])
def test_statistics_of_fields_that_do_not_fit_are_refused(error, words, fields):
    check(error, words, masked_statistics, *fields)


BOXES = [
    ("outside", ["box 1 is", r"9\.0", "5 x 6 image", "scale and clip"], [[0, 0, 2, 2], [0, 0, 9, 2]]),
    ("negative", ["box 0 is", "does not lie inside"], [[-1, 0, 2, 2], [0, 0, 1, 1]]),
    ("turned round", ["box 1 is", "x1 < x2"], [[0, 0, 2, 2], [4, 0, 2, 2]]),
    ("empty", ["box 0 is", "x1 < x2"], [[2, 0, 2, 2], [0, 0, 2, 2]]),
    ("NaN", ["box 0 is", "nan"], [[NAN, 0, 2, 2], [0, 0, 2, 2]]),
    ("three numbers", [r"boxes must be \[B,4\]", "x1, y1, x2, y2"], [[0, 0, 2], [0, 0, 2]]),
]


@pytest.mark.parametrize("words, boxes", [pytest.param(*case[1:], id=case[0]) for case in BOXES])
def test_boxes_that_are_none_inside_the_image_are_refused(words, boxes):
    check(ValueError, words, sib.boxes_to_mask, torch.tensor(boxes, dtype=torch.float32), 5, 6)


@pytest.mark.parametrize("boxes", [None, [[0, 0, 1, 1]]])
def test_boxes_that_are_no_tensor_are_refused(boxes):
    check(ValueError, ["boxes must be a tensor"], sib.boxes_to_mask, boxes, 5, 6)


@pytest.mark.parametrize("noise", [0, 0.0, -1.0])
def test_the_functional_gaussian_background_refuses_noise_that_is_not_positive(noise):
    moments = masked_statistics(R, X, M).moments
    check(ValueError, ["noise", "> 0"], sib.background_gaussian, moments, 90, noise)


# ---------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize("name", ["preset", "seed", "mask", "mask_source", "background", "foreground", "transform"])
def test_an_unknown_name_is_refused_with_the_choices(name):
    check(ValueError, [f"{name} is 'best'; choose one of '"], lambda: SpatialIBLoss(**{name: "best"}))


@pytest.mark.parametrize("name", ["input_background", "input_foreground", "feature_background", "feature_foreground"])
@pytest.mark.parametrize("value", [-0.1, NAN, INF, "1"])
def test_a_weight_that_is_negative_or_no_number_is_refused(name, value):
    check(ValueError, [f"{name} must be a finite number >= 0"], lambda: SpatialIBLoss(**{name: value}))


@pytest.mark.parametrize("value", [-0.1, 1, NAN, "half"])
def test_a_share_of_the_self_made_masks_out_of_range_is_refused(value):
    check(ValueError, ["self_made_share must be a share"], lambda: SpatialIBLoss(self_made_share=value))


@pytest.mark.parametrize("value", [0, -1.0, NAN])
def test_noise_that_is_not_positive_is_refused(value):
    check(ValueError, ["kappa must be a finite number > 0"], lambda: SpatialIBLoss(kappa=value))


def test_an_area_for_a_mask_without_one_is_refused():
    check(
        ValueError,
        ["area=0.3 has no meaning for mask='mean_sigmoid'"],
        lambda: SpatialIBLoss(mask="mean_sigmoid", area=0.3),
    )


# ----------------------------------------------------------------------------------------------- the tensors


@pytest.fixture
def problem(monkeypatch) -> Problem:
    """A problem whose loss must not begin to work: the first step of it fails."""

    def worked(*_, **__):
        raise AssertionError("the loss began to work before it had checked its arguments")

    monkeypatch.setattr(seeds, "vjp", worked)
    return tiny_problem(batch=4)


def loss(problem, criterion=None, *, logits=None, y=None, x=None, **mask):
    logits = problem.logits() if logits is None else logits
    criterion = criterion or SpatialIBLoss()
    return criterion(logits, problem.y if y is None else y, problem.x if x is None else x, **mask)


X_CASES = [
    (
        "without gradient",
        RuntimeError,
        ["x does not require grad", r"call x.requires_grad_\(\) before"],
        lambda x: x.detach(),
    ),
    ("integers", ValueError, ["x must be floating point", "torch.uint8", "255"], lambda x: x.to(torch.uint8)),
    ("three dimensions", ValueError, ["x must be a non-empty batch of images", r"\[3, 9, 11\]"], lambda x: x[0]),
    ("empty batch", ValueError, ["x must be a non-empty batch", r"\[0, 3, 9, 11\]"], lambda x: x[:0]),
    ("no pixels", ValueError, ["x must be a non-empty batch", r"\[4, 3, 0, 11\]"], lambda x: x[:, :, :0]),
    ("another batch", ValueError, [r"logits must be floating point \[3,K\]", r"\[4, 3\]"], lambda x: x[:3]),
    ("another device", ValueError, ["on one device", "cpu", "meta"], lambda x: x.to("meta")),
    ("an array", ValueError, ["x must be a tensor", "ndarray"], lambda x: x.detach().numpy()),
]


@pytest.mark.parametrize("error, words, change", [refused(case) for case in X_CASES])
def test_bad_images_are_refused(error, words, change, problem):
    check(error, words, lambda: loss(problem, x=change(problem.x)))


LOGITS_CASES = [
    ("without gradient", RuntimeError, ["logits do not require grad", "after x.requires_grad_"], lambda z: z.detach()),
    ("one dimension", ValueError, [r"logits must be floating point \[4,K\]", r"\[4\]"], lambda z: z[:, 0]),
    ("a map", ValueError, [r"logits must be floating point \[4,K\]", r"\[4, 3, 1, 1\]"], lambda z: z[..., None, None]),
    ("integers", ValueError, ["logits must be floating point", "torch.int64"], lambda z: z.long()),
    ("another batch", ValueError, ["logits must be", r"\[2, 3\]"], lambda z: z[:2]),
    ("no tensor", ValueError, ["logits must be a tensor", "list"], lambda z: z.tolist()),
]


@pytest.mark.parametrize("error, words, change", [refused(case) for case in LOGITS_CASES])
def test_bad_logits_are_refused(error, words, change, problem):
    check(error, words, lambda: loss(problem, logits=change(problem.logits())))


def test_logits_that_were_not_computed_from_x_are_refused():
    problem = tiny_problem()
    copied = problem.x.detach().clone().requires_grad_()
    check(RuntimeError, ["logits were not computed from x", "pass the very tensor"], lambda: loss(problem, x=copied))


def test_switched_off_gradients_are_refused(problem):
    logits = problem.logits()
    with torch.no_grad():
        check(
            RuntimeError,
            ["switched off", r"criterion.cross_entropy\(logits, y\)"],
            lambda: loss(problem, logits=logits),
        )
    with torch.inference_mode():
        check(RuntimeError, ["switched off"], lambda: loss(problem, logits=logits))


TARGETS = [
    ("too large", [r"target must lie in \[0,2\] for 3 logits", "got 0 to 3"], torch.tensor([0, 1, 2, 3])),
    ("negative", [r"target must lie in \[0,2\]", "got -100 to 2"], torch.tensor([0, 1, 2, -100])),
    ("too many", [r"target must be class indices, int64 \[4\]", r"\[5\]"], torch.zeros(5, dtype=torch.int64)),
    ("a column", ["target must be class indices", r"\[4, 1\]"], torch.zeros(4, 1, dtype=torch.int64)),
    ("int32", ["target must be class indices, int64", "torch.int32"], torch.zeros(4, dtype=torch.int32)),
    ("boolean", ["target must be class indices, int64", "torch.bool"], torch.zeros(4, dtype=torch.bool)),
    ("probabilities of other classes", [r"so it must be \[4,3\]", r"\[4, 5\]"], torch.rand(4, 5)),
    ("floating labels", [r"so it must be \[4,3\]", r"\[4\]"], torch.zeros(4)),
    ("a list", ["target must be a tensor", "list"], [0, 1, 2, 0]),
    ("elsewhere", ["on one device", "meta"], torch.zeros(4, dtype=torch.int64, device="meta")),
]


@pytest.mark.parametrize("words, target", [pytest.param(*case[1:], id=case[0]) for case in TARGETS])
def test_bad_targets_are_refused(words, target, problem):
    check(ValueError, words, lambda: loss(problem, y=target))


GOOD = torch.rand(4, 1, 9, 11)
MASKS = [
    ("above 1", [r"mask must lie in \[0,1\]", "to 255", "divide by 255"], 255 * (GOOD > 0.5)),
    ("below 0", [r"mask must lie in \[0,1\]", "from -"], GOOD - 0.5),
    ("NaN", [r"mask must lie in \[0,1\]", "nan"], torch.where(GOOD > 0.9, NAN, GOOD)),
    ("another size", [r"mask must be \[4,1,9,11\]", r"\[4, 1, 9, 9\]", "resize"], GOOD[..., :9]),
    ("another batch", [r"mask must be \[4,1,9,11\]", r"\[3, 1, 9, 11\]"], GOOD[:3]),
    ("three channels", [r"mask must be \[4,1,9,11\]", r"\[4, 3, 9, 11\]"], GOOD.expand(4, 3, 9, 11)),
    ("one for all", ["mask", r"boxes \[4,4\]", r"\[9, 11\]"], GOOD[0, 0]),
    ("another device", ["mask must be on the device of x", "meta", r"\.to\(x.device\)"], GOOD.to("meta")),
    ("complex", ["mask must be boolean, integer or floating point"], GOOD.to(torch.complex64)),
    (
        "boxes outside",
        ["box 2 is", "9 x 11 image"],
        torch.tensor([[0, 0, 2, 2], [0, 0, 11, 9], [0, 0, 12, 9], [0, 0, 1, 1]]),
    ),
    (
        "boxes as shares",
        ["box 0 is", "inside the first pixel: give pixels, not shares"],
        torch.tensor([[0, 0, 0.5, 1], [0.25, 0.5, 1, 0.75], [0, 0, 1, 0.5], [0.1, 0.1, 0.2, 0.2]]),
    ),
    ("a box as shares", ["inside the first pixel", "sample 2"], [None, None, torch.tensor([0.1, 0.1, 0.5, 0.6]), None]),
    ("too few boxes", ["mask", r"boxes \[4,4\]", r"\[3, 4\]"], torch.tensor([[0, 0, 2, 2]] * 3)),
    ("too short a list", ["mask has 2 items for a batch of 4", "one .or None. per sample"], [GOOD[0], None]),
    ("a bad item", ["mask must be a tensor or None", "str"], [GOOD[0], None, "all", None]),
    ("a bad value in an item", [r"mask must lie in \[0,1\]"], [None, None, 2 * GOOD[2] + 1, None]),
    ("a bad size in an item", ["mask must be", r"\[1, 1, 9, 9\]"], [None, GOOD[0][..., :9], None, None]),
    ("no boxes in an item", [r"no boxes, \[0, 4\]", "give None", "sample 1"], [None, torch.zeros(0, 4), None, None]),
    ("no masks in an item", [r"no masks, \[0, 9, 11\]", "give None"], [None, torch.zeros(0, 9, 11), None, None]),
    ("a number", ["mask must be"], 0.5),
]


def _torchvision_box(tv, name="XYXY", canvas=(9, 11), numbers=(0, 0, 2, 2)):
    return tv.BoundingBoxes(torch.tensor([numbers]), format=name, canvas_size=canvas)


TV_TENSORS = [
    (["BoundingBoxes of images of 9 x 10", "9 x 11", "together"], lambda tv: _torchvision_box(tv, canvas=(9, 10))),
    (["upright boxes", "XYWHR"], lambda tv: _torchvision_box(tv, "XYWHR", numbers=(0.0, 0.0, 2.0, 2.0, 30.0))),
    (["a mask or boxes", "torchvision Image"], lambda tv: tv.Image(GOOD[0])),
    (["box 0 is", "9 x 11 image"], lambda tv: _torchvision_box(tv, "XYWH", numbers=(9, 0, 3, 2))),
]


@pytest.mark.parametrize("words, make", TV_TENSORS, ids=["canvas", "rotated", "image", "outside"])
def test_torchvision_tensors_that_do_not_fit_are_refused(words, make, problem):
    tv = pytest.importorskip("torchvision.tv_tensors", reason="torchvision is not installed")
    check(ValueError, words, lambda: loss(problem, mask=[None, make(tv), None, None]))
    if "torchvision Image" not in words[-1]:
        check(ValueError, words, sib.boxes_to_mask, make(tv), 9, 11)


@pytest.mark.parametrize("words, mask", [pytest.param(*case[1:], id=case[0]) for case in MASKS])
def test_bad_given_masks_are_refused(words, mask, problem):
    check(ValueError, words, lambda: loss(problem, mask=mask))


ANNOTATED = [
    ("wrong length", ["annotated must be a boolean tensor .4.", r"\[3\]"], torch.ones(3, dtype=torch.bool)),
    ("integers", ["annotated must be a boolean tensor", "int64"], torch.ones(4, dtype=torch.int64)),
    ("a list", ["annotated must be a boolean tensor", "list"], [True] * 4),
    ("elsewhere", ["annotated must be", "on cpu", "on meta"], torch.ones(4, dtype=torch.bool, device="meta")),
]


@pytest.mark.parametrize("words, annotated", [pytest.param(*case[1:], id=case[0]) for case in ANNOTATED])
def test_bad_annotation_flags_are_refused(words, annotated, problem):
    check(ValueError, words, lambda: loss(problem, mask=GOOD, annotated=annotated))


def test_annotation_flags_without_a_mask_are_refused(problem):
    flags = torch.ones(4, dtype=torch.bool)
    check(ValueError, ["annotated was given without mask", "pass mask"], lambda: loss(problem, annotated=flags))


@pytest.mark.parametrize("foreground, least", [("hsic", 2), ("hsic_unbiased", 4), ("cka", 2)])
def test_a_batch_too_small_for_the_foreground_is_refused(foreground, least, problem):
    small = Problem(problem.model, problem.x[: least - 1], problem.y[: least - 1])
    words = [f"foreground='{foreground}'", f"at least {least}, got {least - 1}", "larger batches"]
    check(ValueError, words, lambda: loss(small, SpatialIBLoss(foreground=foreground, input_foreground=0.1)))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["x", "logits"])
def test_values_that_are_not_finite_are_refused_where_that_check_is_asked_for(which, bad, problem):
    value = {"x": problem.x, "logits": problem.logits()}[which]
    spoilt = torch.where(torch.arange(value.numel()).view_as(value) == 5, bad, value)
    words = [f"{which} has 1 NaN or Inf among its {value.numel()} values", "look for"]
    check(ValueError, words, lambda: loss(problem, SpatialIBLoss(check_values=True), **{which: spoilt}))


def test_the_check_of_values_is_not_made_unasked(monkeypatch):
    problem = tiny_problem()
    monkeypatch.setattr("sib_ext.loss.check_finite", None)
    assert loss(problem).isfinite()
    assert torch.equal(loss(problem), loss(problem))


def test_good_input_passes_the_strictest_checks():
    problem = tiny_problem(batch=4)
    criterion = SpatialIBLoss(check_values=True, foreground="hsic_unbiased", input_foreground=0.1)
    assert loss(problem, criterion, mask=[GOOD[0], None, GOOD[2] > 0.5, torch.tensor([0, 0, 3, 4])]).isfinite()
