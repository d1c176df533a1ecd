"""The other self-made masks, and masks given by the user."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from sib_ext import functional as sib
from sib_ext.masks import activation_source, given_mask

from .compare import assert_near, gradients
from .samples import DTYPES, EMPTY, LARGE, PLAIN, Sample

SMALL = Sample("small", (2, 3, 4, 4))
MAKERS = {
    "hard_density": lambda vjp: sib.hard_density_mask(vjp, window=3),
    "mean_sigmoid": sib.mean_sigmoid_mask,
    "top_p": sib.top_p_mask,
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


# ------------------------------------------------------------------------------------------------- self-made


def relative_density(vjp):
    g = vjp.mean(1, keepdim=True).abs()
    return g / g.amax((2, 3), keepdim=True)


@pytest.mark.parametrize("padding", ["zeros", "exclude"])
def test_the_hard_density_mask_is_the_published_one_with_torch_quantile(padding):
    vjp = LARGE.fields().vjp

    def quantile(plane, q):
        return torch.quantile(plane.flatten(1), q, dim=1)[:, None, None, None]

    g = vjp.mean(1, keepdim=True).abs()
    low, high = quantile(g, 0.05), quantile(g, 0.95)
    n = (g - low) / (high - low + 1e-8)
    h = torch.sigmoid(10 * (n - quantile(n, 0.8)))
    ones = torch.ones(1, 1, 5, 5, dtype=vjp.dtype)
    d = torch.nn.functional.conv2d(h, ones, padding=2)
    d = d / (25 if padding == "zeros" else torch.nn.functional.conv2d(torch.ones_like(h), ones, padding=2))
    expected = torch.sigmoid(10 * (d - quantile(d, 0.8)))
    assert_near(sib.hard_density_mask(vjp, window=5, padding=padding), expected, 1e-12)


def test_the_mean_sigmoid_mask_is_its_formula():
    n = relative_density(LARGE.fields().vjp)
    expected = torch.sigmoid(7 * (n - n.mean((2, 3), keepdim=True)))
    assert_near(sib.mean_sigmoid_mask(LARGE.fields().vjp, slope=7.0), expected, 1e-12)


@pytest.mark.parametrize("area", [0.01, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("slope", [2.0, 30.0, 300.0])
def test_the_mean_of_a_top_p_mask_is_the_asked_area(area, slope):
    mask = sib.top_p_mask(LARGE.fields().vjp, area, slope)
    means = mask.mean((1, 2, 3))
    torch.testing.assert_close(means, torch.full_like(means, area), rtol=0, atol=1e-9)


def test_a_top_p_mask_is_a_sigmoid_of_the_relative_density():
    mask = sib.top_p_mask(LARGE.fields().vjp, 0.1, 30.0)
    threshold = relative_density(LARGE.fields().vjp) - torch.logit(mask) / 30
    assert float(threshold.flatten(1).std(1).max()) < 1e-9


@each_maker
def test_self_made_masks_are_differentiable_once_and_twice(make):
    vjp = SMALL.fields().vjp.requires_grad_()
    assert gradcheck(make, (vjp,))
    assert gradgradcheck(make, (vjp,), fast_mode=True)


@each_maker
def test_the_mean_of_a_top_p_mask_has_no_gradient_and_others_have_one(make):
    vjp = LARGE.fields().vjp.requires_grad_()
    (of_mean,) = gradients(make(vjp).mean(), [vjp])
    (of_square,) = gradients(make(vjp).square().mean(), [vjp])
    assert of_square.norm() > 1e-6
    if make is MAKERS["top_p"]:
        assert of_mean.norm() < 1e-10 * of_square.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@each_maker
def test_self_made_masks_come_in_float32_or_wider_and_lie_in_0_1(make, dtype):
    mask = make(LARGE.fields(dtype).vjp)
    assert mask.dtype == torch.promote_types(dtype, torch.float32) and mask.shape == (4, 1, 40, 37)
    assert mask.min() >= 0 and mask.max() <= 1
    assert_near(mask, make(LARGE.fields(dtype).vjp.double()), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [0.0, 2.0, 1e-30])
@each_maker
def test_a_constant_vjp_gives_a_finite_mask_and_gradient(make, value, dtype):
    vjp = torch.full(LARGE.shape, value, dtype=dtype, requires_grad=True)
    mask = make(vjp)
    cotangent = 10 * LARGE.cotangent_of_mask(dtype)
    (gradient,) = gradients(mask, [vjp], cotangent)
    assert mask.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("make", [*MAKERS.values(), sib.density_mask], ids=[*MAKERS, "density"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 5)], ids=["one position", "constant"])
def test_a_mask_of_a_constant_activation_is_not_made_of_rounding(make, shape):
    """Sums over channels and interpolation differ in their last places, and masks stretch what contrast there is."""
    torch.manual_seed(0)
    constant = torch.rand(6, 1, 1, 1).expand(6, 1, *shape)
    noisy = constant * (1 + torch.randint(-9, 10, (6, 1, *shape)) * 2**-23)
    mask = make(activation_source(noisy, (37, 37)))
    torch.testing.assert_close(mask, make(torch.ones(6, 1, 37, 37)), rtol=0, atol=0)


def test_a_faint_activation_makes_a_mask():
    faint = 1 + 1e-4 * torch.rand(2, 1, 7, 7, dtype=torch.float32)
    mask = sib.hard_density_mask(activation_source(faint, (14, 14)), window=3)
    assert (mask.amax((1, 2, 3)) > 0.8).all() and (mask.amin((1, 2, 3)) < 0.1).all()


def test_the_source_keeps_its_gradient_and_zero_stays_zero():
    field = LARGE.fields().mask.clone().requires_grad_()
    source = activation_source(field, (9, 9))
    torch.testing.assert_close(source.mean((1, 2, 3)), torch.ones(len(field), dtype=field.dtype))
    (gradient,) = torch.autograd.grad(source[:, :, 0].sum(), field)
    assert gradient.abs().sum() > 0
    assert not activation_source(torch.zeros(2, 1, 3, 3), (6, 6)).any()


@each_maker
def test_a_vjp_with_nan_spoils_its_own_mask_and_no_other(make):
    vjp = LARGE.fields().vjp
    clean = make(vjp)
    vjp[1, 2, 3, 4] = float("nan")
    mask = make(vjp)
    assert mask[1].isnan().all()
    assert torch.equal(mask[[0, 2, 3]], clean[[0, 2, 3]])


@each_maker
def test_an_empty_batch_gives_an_empty_mask(make):
    assert make(EMPTY.fields().vjp).shape == (0, 1, 5, 5)


@each_maker
def test_the_vjp_stays_as_it_is(make):
    vjp = PLAIN.fields().vjp
    make(vjp)
    assert torch.equal(vjp, PLAIN.fields().vjp)


# ----------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_whole_pixel_boxes_are_ones_inside_and_zeros_outside(dtype):
    boxes = torch.tensor([[1, 0, 4, 2], [0, 0, 6, 5]], dtype=dtype)
    expected = torch.zeros(2, 1, 5, 6)
    expected[0, 0, 0:2, 1:4] = 1
    expected[1] = 1
    assert torch.equal(sib.boxes_to_mask(boxes, 5, 6).float(), expected)


def test_a_pixel_cut_by_a_box_gets_its_covered_share():
    mask = sib.boxes_to_mask(torch.tensor([[0.25, 1.5, 2.5, 1.75]], dtype=torch.float64), 3, 4)
    expected = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    expected[0, 0, 1] = 0.25 * torch.tensor([0.75, 1.0, 0.5, 0.0])
    torch.testing.assert_close(mask, expected, rtol=1e-15, atol=0)


def test_the_sum_of_a_box_mask_is_the_area_of_the_box():
    corner = torch.rand(20, 2, dtype=torch.float64) * torch.tensor([5.0, 4.0])
    boxes = torch.cat([corner, corner + 0.01 + 3 * torch.rand(20, 2, dtype=torch.float64)], 1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert_near(sib.boxes_to_mask(boxes, 8, 9).sum((1, 2, 3)), areas, 1e-12)


# ----------------------------------------------------------------------------------------------------- given

IMAGES = torch.zeros(3, 3, 5, 6)
SOFT = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(1))
HARD = SOFT > 0.5
BOXES = torch.tensor([[0.0, 0.0, 3.0, 2.0], [1.5, 1.0, 6.0, 5.0], [2.0, 2.0, 3.0, 4.5]])
OF_BOXES = sib.boxes_to_mask(BOXES, 5, 6)
FORMS = {
    "soft [B,1,H,W]": (SOFT, SOFT),
    "soft [B,H,W]": (SOFT[:, 0], SOFT),
    "float64": (SOFT.double(), SOFT),
    "boolean": (HARD, HARD.float()),
    "boolean [B,H,W]": (HARD[:, 0], HARD.float()),
    "integers": (HARD.int(), HARD.float()),
    "boxes": (BOXES, OF_BOXES),
    "integer boxes": (torch.tensor([[0, 0, 3, 2], [1, 1, 6, 5], [2, 2, 3, 4]]), None),
    "a list of [H,W]": (list(SOFT[:, 0]), SOFT),
    "a tuple of [1,H,W]": (tuple(SOFT), SOFT),
    "a list of boxes": (list(BOXES), OF_BOXES),
    "a mixed list": ([SOFT[0], HARD[1, 0], BOXES[2]], torch.stack([SOFT[0], HARD[1].float(), OF_BOXES[2]])),
}


@pytest.mark.parametrize("given, expected", FORMS.values(), ids=FORMS)
def test_every_form_of_a_given_mask_becomes_the_same_b1hw(given, expected):
    mask, annotated = given_mask(given, IMAGES)
    assert annotated is None and mask.dtype == torch.float32 and mask.shape == (3, 1, 5, 6)
    expected = sib.boxes_to_mask(given.float(), 5, 6) if expected is None else expected
    torch.testing.assert_close(mask, expected, rtol=1e-6, atol=1e-6)


def test_several_boxes_of_a_sample_are_their_union():
    boxes = torch.tensor([[0.0, 0.0, 2.5, 2.0], [1.0, 1.0, 4.0, 3.0]])
    mask, annotated = given_mask([boxes, None, boxes[:1]], IMAGES)
    covered = torch.zeros(5, 6)
    covered[:2, :2], covered[:2, 2] = 1, 0.5
    assert torch.equal(mask[2, 0], covered)
    covered[1:3, 1:4] = 1
    assert torch.equal(mask[0, 0], covered) and annotated.tolist() == [True, False, True]


def test_a_small_box_in_the_corner_is_one_beside_others():
    corner = torch.tensor([[0.0, 0.0, 0.5, 0.5], [1.0, 1.0, 4.0, 3.0], [2.0, 2.0, 3.0, 4.5]])
    assert torch.equal(given_mask(corner, IMAGES)[0], sib.boxes_to_mask(corner, 5, 6))
    assert float(sib.boxes_to_mask(corner[:1], 5, 6).sum()) == 0.25
    none = torch.zeros(3, dtype=torch.bool)  # what stands in rows without annotation is not looked at
    assert given_mask(torch.zeros(3, 4), IMAGES, none)[1] is none


def test_several_masks_of_a_sample_are_their_union():
    mask, _ = given_mask([SOFT[:, 0], HARD[:2, 0], SOFT[2]], IMAGES)
    assert torch.equal(mask[0, 0], SOFT[:, 0].amax(0)) and torch.equal(mask[2], SOFT[2])
    assert torch.equal(mask[1, 0], (HARD[0, 0] | HARD[1, 0]).float())


def test_an_image_as_wide_as_a_box_has_numbers_takes_a_mask():
    mask, _ = given_mask([torch.eye(4)], torch.zeros(1, 3, 4, 4))
    assert torch.equal(mask[0, 0], torch.eye(4))


CENTRES = torch.tensor([[1.5, 1.0, 3.0, 2.0], [3.75, 3.0, 4.5, 4.0], [2.5, 3.25, 1.0, 2.5]])  # of BOXES


@pytest.mark.parametrize("wrapped", ["batch", "list", "alone"])
@pytest.mark.parametrize("name", ["XYXY", "XYWH", "CXCYWH"])
def test_torchvision_boxes_are_read_in_their_format(name, wrapped):
    tv = pytest.importorskip("torchvision.tv_tensors", reason="torchvision is not installed")
    numbers = {"XYXY": BOXES, "XYWH": torch.cat([BOXES[:, :2], CENTRES[:, 2:]], 1), "CXCYWH": CENTRES}[name]
    boxes = tv.BoundingBoxes(numbers, format=name, canvas_size=(5, 6))
    if wrapped == "alone":
        assert torch.equal(sib.boxes_to_mask(boxes, 5, 6), OF_BOXES)
        return
    given = boxes if wrapped == "batch" else [tv.wrap(row[None], like=boxes) for row in numbers]
    mask, annotated = given_mask(given, IMAGES)
    assert torch.equal(mask, OF_BOXES) and annotated is None and type(mask) is torch.Tensor
    known = torch.tensor([True, False, True])
    mask, annotated = given_mask(given, IMAGES, known)
    assert torch.equal(mask[known], OF_BOXES[known]) and torch.equal(annotated, known)


def test_torchvision_boxes_of_integers_keep_the_half_pixels_of_their_centres():
    tv = pytest.importorskip("torchvision.tv_tensors", reason="torchvision is not installed")
    boxes = tv.BoundingBoxes(torch.tensor([[3, 3, 3, 3]]), format="CXCYWH", canvas_size=(5, 6))
    assert torch.equal(sib.boxes_to_mask(boxes, 5, 6), sib.boxes_to_mask(torch.tensor([[1.5, 1.5, 4.5, 4.5]]), 5, 6))


def test_torchvision_masks_are_masks():
    tv = pytest.importorskip("torchvision.tv_tensors", reason="torchvision is not installed")
    for given in (tv.Mask(SOFT), tv.Mask(SOFT[:, 0]), [tv.Mask(row) for row in SOFT]):
        mask, _ = given_mask(given, IMAGES)
        assert torch.equal(mask, SOFT) and type(mask) is torch.Tensor


def test_none_in_a_list_marks_a_sample_without_annotation():
    mask, annotated = given_mask([None, SOFT[1], None], IMAGES)
    assert annotated.tolist() == [False, True, False]
    assert torch.equal(mask[1], SOFT[1])


def test_a_list_of_none_is_no_mask_at_all():
    assert given_mask([None, None, None], IMAGES) == (None, None)


def test_a_given_mask_is_as_wide_as_the_statistics_of_the_images():
    assert given_mask(SOFT, IMAGES.double())[0].dtype == torch.float64
    assert given_mask(SOFT, IMAGES.bfloat16())[0].dtype == torch.float32
    assert given_mask(BOXES, IMAGES.double())[0].dtype == torch.float64
