"""The op density_mask, in every implementation, against the formulas of sib_ext.reference."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from sib_ext import density_mask, reference
from sib_ext.ops import auto_window

from .compare import (
    GRADIENTS,
    VALUES,
    assert_near,
    gradients,
    mask_gradient_errors,
    on_support,
    overload,
    relative_error,
    snapshot,
    support_of,
)
from .samples import (
    CHANNELS_LAST,
    DTYPES,
    EMPTY,
    FEW_SAMPLES,
    FULL_JACOBIAN,
    LARGE,
    LAYOUTS,
    OPCHECK_SAMPLES,
    PLAIN,
    SAMPLES,
    Sample,
    laid_out,
)

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
few_samples = pytest.mark.parametrize("sample", FEW_SAMPLES, ids=lambda s: s.name)


def formula(vjp, sample):
    return reference.density_mask(vjp, *sample.positional_options)


def mask_and_gradient(vjp, sample, implementation, cotangent):
    leaf = vjp.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    mask = density_mask(leaf, **sample.options, impl=implementation)
    return mask, *gradients(mask, [leaf], cotangent)


def formula_and_gradient(vjp, sample, cotangent):
    leaf = vjp.detach().clone().requires_grad_()
    mask = formula(leaf, sample)
    return mask, *gradients(mask, [leaf], cotangent.to(mask.dtype))


# ------------------------------------------------------------------------------------- values and gradients


@each_sample
def test_the_mask_equals_the_formula(sample, implementation):
    vjp = sample.fields().vjp
    mask = density_mask(vjp, **sample.options, impl=implementation)
    assert mask.dtype == torch.float64 and mask.is_contiguous()
    assert_near(mask, formula(vjp, sample), VALUES)


@each_sample
def test_the_gradient_equals_autograd_of_the_formula(sample, implementation):
    vjp, cotangent = sample.fields().vjp, sample.cotangent_of_mask()
    _, gradient = mask_and_gradient(vjp, sample, implementation, cotangent)
    _, truth = formula_and_gradient(vjp, sample, cotangent)
    # Where the truth is zero (a window that covers everything), rounding is measured against the cotangent.
    assert float((gradient - truth).norm()) <= GRADIENTS * float(truth.norm() + cotangent.norm())


@each_sample
def test_the_explicit_backward_formula_equals_autograd_of_the_forward_formula(sample):
    vjp, cotangent = sample.fields().vjp, sample.cotangent_of_mask()
    mask, truth = formula_and_gradient(vjp, sample, cotangent)
    explicit = reference.density_mask_backward(
        cotangent, vjp, mask.detach(), support_of(vjp, sample), *sample.positional_options
    )
    assert explicit.shape == mask.shape
    assert float((explicit.expand_as(vjp) - truth).norm()) <= 1e-12 * float(truth.norm() + cotangent.norm())


@each_sample
def test_it_is_differentiable_once_and_twice(sample, implementation):
    vjp = sample.fields().vjp.requires_grad_()

    def function(vjp):
        return density_mask(vjp, **sample.options, impl=implementation)

    fast = vjp.numel() > FULL_JACOBIAN
    assert gradcheck(function, (vjp,), fast_mode=fast)
    assert gradgradcheck(function, (vjp,), sample.cotangent_of_mask().requires_grad_(), fast_mode=fast)


@few_samples
def test_the_backward_op_is_differentiable_by_itself(sample, implementation):
    """With the mask as the function of R that it is, as the backward of density_mask calls it."""

    def function(cotangent, vjp):
        mask, support = overload("density_mask", implementation)(vjp, *sample.positional_options)
        return overload("density_mask_backward", implementation)(
            cotangent, vjp, mask.detach(), support, *sample.positional_options
        )

    inputs = (sample.cotangent_of_mask().requires_grad_(), sample.fields().vjp.requires_grad_())
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@few_samples
def test_the_second_derivative_equals_autograd_of_the_formula(sample, implementation):
    cotangent = sample.cotangent_of_mask().requires_grad_()
    direction = torch.randn(sample.shape, dtype=torch.float64)

    def second(mask_of):
        vjp = sample.fields().vjp.requires_grad_()
        (gradient,) = torch.autograd.grad(mask_of(vjp), vjp, cotangent, create_graph=True)
        return gradients((gradient * direction).sum(), [vjp, cotangent])

    found = second(lambda vjp: density_mask(vjp, **sample.options, impl=implementation))
    truth = second(lambda vjp: formula(vjp, sample))
    for value, true in zip(found, truth, strict=True):
        assert_near(value, true, GRADIENTS)


@pytest.mark.parametrize("create_graph", [False, True], ids=["last derivative", "one more to come"])
@few_samples
def test_the_second_derivative_of_a_loss_that_is_not_linear_in_the_mask_is_right(sample, create_graph, implementation):
    """Then the mask's cotangent depends on R as well, and that path must count once."""
    direction = torch.randn(sample.shape, dtype=torch.float64)

    def second(mask_of):
        vjp = sample.fields().vjp.requires_grad_()
        (gradient,) = torch.autograd.grad(mask_of(vjp).square().sum(), vjp, create_graph=True)
        return torch.autograd.grad((gradient * direction).sum(), vjp, create_graph=create_graph)[0]

    found = second(lambda vjp: density_mask(vjp, **sample.options, impl=implementation))
    assert_near(found, second(lambda vjp: formula(vjp, sample)), GRADIENTS)


@pytest.mark.parametrize("sample", OPCHECK_SAMPLES, ids=lambda s: s.name)
def test_opcheck_of_the_forward_op(sample, overload_name):
    op = getattr(torch.ops.sib_ext.density_mask, overload_name)
    torch.library.opcheck(op, (sample.fields().vjp.requires_grad_(), *sample.positional_options))


@pytest.mark.parametrize("sample", OPCHECK_SAMPLES, ids=lambda s: s.name)
def test_opcheck_of_the_backward_op(sample, overload_name):
    vjp = sample.fields().vjp
    mask, support = torch.ops.sib_ext.density_mask.reference(vjp, *sample.positional_options)
    arguments = (sample.cotangent_of_mask().requires_grad_(), vjp.requires_grad_(), mask, support)
    op = getattr(torch.ops.sib_ext.density_mask_backward, overload_name)
    torch.library.opcheck(op, (*arguments, *sample.positional_options))


any_arguments = hypothesis.given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 13), st.integers(2, 13)),
    window=st.integers(0, 8).map(lambda k: 2 * k + 1),
    temperature=st.sampled_from([1e-3, 0.03, 0.1, 0.3, 1.0, 8.0]),
    area=st.floats(0.05, 0.95),
    slope=st.floats(1.0, 20.0),
    padding=st.sampled_from(["zeros", "exclude"]),
    layout=st.sampled_from(LAYOUTS),
)


def assert_equal_to_the_reference(implementation, shape, window, temperature, area, slope, padding, layout):
    changes = {"window": window, "temperature": temperature, "area": area, "slope": slope, "padding": padding}
    sample = Sample("any", shape, changes, layout)
    vjp, cotangent = sample.fields().vjp, sample.cotangent_of_mask()
    mask, gradient = mask_and_gradient(vjp, sample, implementation, cotangent)
    true_mask, true_gradient = mask_and_gradient(vjp, sample, "reference", cotangent)
    assert_near(mask, true_mask, VALUES)
    assert float((gradient - true_gradient).norm()) <= GRADIENTS * float(true_gradient.norm() + cotangent.norm())


@any_arguments
def test_native_equals_the_reference_whatever_the_arguments(native, **arguments):
    assert_equal_to_the_reference(native, **arguments)


@pytest.mark.slow
@any_arguments
def test_triton_equals_the_reference_whatever_the_arguments(triton, **arguments):
    assert_equal_to_the_reference(triton, **arguments)


# ------------------------------------------------------------------------------------------- soft quantile


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 0.7, 5.0])
@pytest.mark.parametrize("n", [1, 2, 7, 63, 400])
def test_the_support_carries_all_of_a_soft_quantile(n, temperature):
    values = torch.randn(3, n, dtype=torch.float64)
    size = reference.support_size(n, temperature)
    for q in (reference.LOW, reference.HIGH, 0.8, 0.5):
        start = reference.support_start(n, q, temperature, size)
        assert 0 <= start and start + size <= n
        weights = reference.support_weights(n, q, temperature, size, values)
        picked = (values.sort(1).values[:, start : start + size] * weights).sum(1, keepdim=True)
        torch.testing.assert_close(picked, reference.soft_quantile(values, q, temperature), rtol=1e-14, atol=1e-14)


def test_the_soft_quantile_is_the_published_softmax_over_sorted_positions():
    values = torch.tensor([[3.0, -1.0, 2.0, 0.0]], dtype=torch.float64)
    weights = torch.exp(-(torch.arange(4.0, dtype=torch.float64) - 0.8 * 3).abs() / 0.5)
    expected = (torch.tensor([-1.0, 0.0, 2.0, 3.0], dtype=torch.float64) * weights).sum() / weights.sum()
    torch.testing.assert_close(reference.soft_quantile(values, 0.8, 0.5).squeeze(), expected, rtol=1e-14, atol=0)


@each_sample
def test_the_saved_support_names_the_order_statistics_of_the_four_quantiles(sample, implementation):
    vjp = sample.fields().vjp
    _, support = overload("density_mask", implementation)(vjp, *sample.positional_options)
    n, temperature = sample.shape[2] * sample.shape[3], sample.options["temperature"]
    size = reference.support_size(n, temperature)
    assert support.shape == (sample.shape[0], 4, size) and support.dtype == torch.int64
    # By value: pixels of one value may stand for each other. The row of d needs the op's own d and is compared by use.
    g = reference.density(vjp)
    for row, q in enumerate((reference.LOW, reference.HIGH, 1 - sample.options["area"])):
        start = reference.support_start(n, q, temperature, size)
        expected = g.sort(1).values[:, start : start + size]
        assert_near(g.gather(1, support[:, row]).sort(1).values, expected, 1e-14)


# ------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_error_of_the_mask_is_at_most_that_of_the_formula_in_the_same_dtype(dtype, layout, implementation):
    vjp = laid_out(LARGE.fields(dtype).vjp, layout)
    truth = formula(vjp.double(), LARGE)
    mask = density_mask(vjp, **LARGE.options, impl=implementation)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert mask.dtype == accumulation
    epsilon = 20 * torch.finfo(accumulation).eps
    assert relative_error(mask, truth) <= relative_error(formula(vjp, LARGE), truth) + epsilon


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_error_of_the_gradient_is_at_most_that_of_the_formula_in_the_same_dtype(dtype, layout, implementation):
    vjp = laid_out(LARGE.fields(dtype).vjp, layout)
    cotangent = LARGE.cotangent_of_mask().to(dtype)
    _, truth = formula_and_gradient(vjp.double(), LARGE, cotangent)
    _, eager = formula_and_gradient(vjp, LARGE, cotangent)
    _, gradient = mask_and_gradient(vjp, LARGE, implementation, cotangent.to(torch.promote_types(dtype, torch.float32)))
    assert gradient.dtype == dtype
    _, support = overload("density_mask", implementation)(vjp, *LARGE.positional_options)
    near = on_support(torch.cat([support_of(vjp.double(), LARGE), support_of(vjp, LARGE), support], 2), vjp)
    epsilon = 100 * torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    eager_errors = mask_gradient_errors(eager, truth, vjp, near)
    for error, eager_error in zip(mask_gradient_errors(gradient, truth, vjp, near), eager_errors, strict=True):
        assert error <= eager_error + epsilon


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, implementation):
    vjp, cotangent = LARGE.fields(torch.float32).vjp, LARGE.cotangent_of_mask(torch.float32)
    outside = mask_and_gradient(vjp, LARGE, implementation, cotangent)
    with torch.autocast("cpu", dtype=dtype):
        inside = mask_and_gradient(vjp, LARGE, implementation, cotangent)
    for value, expected in zip(inside, outside, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, expected)


# ------------------------------------------------------------------------------------- layouts and callers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_input_changes_nothing(layout, implementation):
    vjp, cotangent = LARGE.fields().vjp, LARGE.cotangent_of_mask()
    expected_mask, expected_gradient = mask_and_gradient(vjp, LARGE, implementation, cotangent)
    mask, gradient = mask_and_gradient(laid_out(vjp, layout), LARGE, implementation, cotangent)
    assert_near(mask, expected_mask, 1e-13)
    assert_near(gradient, expected_gradient, 1e-11)


def test_the_gradient_takes_the_memory_of_one_channel(implementation):
    """It is the same for every channel; autograd adds it to the other terms' as it is."""
    _, gradient = mask_and_gradient(LARGE.fields().vjp, LARGE, implementation, LARGE.cotangent_of_mask())
    assert gradient.shape == LARGE.shape and gradient.stride(1) == 0


def test_expanded_inputs_and_cotangents_are_read_with_their_strides(implementation):
    one = LARGE.fields().vjp[:1, :1].clone().requires_grad_()
    mask = density_mask(one.expand(2, 3, -1, -1), **LARGE.options, impl=implementation)
    copied = density_mask(one.expand(2, 3, -1, -1).contiguous(), **LARGE.options, impl=implementation)
    assert torch.equal(mask, copied)
    cotangent = torch.tensor(1.5, dtype=torch.float64).expand(mask.shape)
    assert_near(*gradients(mask, [one], cotangent), *gradients(copied, [one], cotangent.contiguous()), GRADIENTS)
    half_expanded = LARGE.cotangent_of_mask()[:1].expand(mask.shape[0], -1, -1, -1)
    expected = gradients(copied, [one], half_expanded.contiguous())
    assert_near(*gradients(mask, [one], half_expanded), *expected, GRADIENTS)


@few_samples
def test_inputs_and_cotangents_stay_as_they_are(sample, implementation):
    vjp, cotangent = sample.fields().vjp.requires_grad_(), sample.cotangent_of_mask()
    check = snapshot([vjp, cotangent])
    mask = density_mask(vjp, **sample.options, impl=implementation)
    check_mask = snapshot([mask])
    gradients(mask, [vjp], cotangent)
    check()
    check_mask()


@pytest.mark.parametrize("sample", [PLAIN, CHANNELS_LAST], ids=lambda s: s.name)
def test_a_second_backward_gives_the_same_gradient(sample, implementation):
    vjp, cotangent = sample.fields().vjp.requires_grad_(), sample.cotangent_of_mask()
    mask = density_mask(vjp, **sample.options, impl=implementation)
    first, second = (gradients(mask, [vjp], cotangent) for _ in range(2))
    assert torch.equal(*first, *second)
    mask.backward(cotangent, retain_graph=True)
    mask.backward(cotangent)
    assert torch.equal(vjp.grad, 2 * first[0])


def test_the_number_of_threads_changes_no_bit(threads, implementation):
    vjp, cotangent = LARGE.fields(torch.float32).vjp, LARGE.cotangent_of_mask(torch.float32)
    threads(1)
    single = mask_and_gradient(vjp, LARGE, implementation, cotangent)
    threads(2)
    for value, expected in zip(mask_and_gradient(vjp, LARGE, implementation, cotangent), single, strict=True):
        assert torch.equal(value, expected)


def test_the_position_in_the_batch_changes_no_bit(implementation):
    vjp, cotangent = LARGE.fields(torch.float32).vjp, LARGE.cotangent_of_mask(torch.float32)
    together = mask_and_gradient(vjp, LARGE, implementation, cotangent)
    backwards = mask_and_gradient(vjp.flip(0), LARGE, implementation, cotangent.flip(0))
    for value, expected in zip(backwards, together, strict=True):
        assert torch.equal(value.flip(0), expected)


def test_the_company_in_the_batch_changes_no_bit(native):
    vjp, cotangent = LARGE.fields(torch.float32).vjp, LARGE.cotangent_of_mask(torch.float32)
    together = mask_and_gradient(vjp, LARGE, native, cotangent)
    for i in range(vjp.shape[0]):
        alone = mask_and_gradient(vjp[i : i + 1], LARGE, native, cotangent[i : i + 1])
        for value, expected in zip(alone, together, strict=True):
            assert torch.equal(value, expected[i : i + 1])


def test_without_grad_mode_nothing_is_recorded(implementation):
    with torch.no_grad():
        mask = density_mask(PLAIN.fields().vjp.requires_grad_(), **PLAIN.options, impl=implementation)
    assert not mask.requires_grad


# ---------------------------------------------------------------------------------------- awkward values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.25])
def test_a_constant_vjp_gives_the_formula_s_mask_and_a_finite_gradient(value, dtype, implementation):
    vjp = torch.full(LARGE.shape, value, dtype=dtype)
    mask, gradient = mask_and_gradient(vjp, LARGE, implementation, torch.ones(LARGE.shape[0], 1, *LARGE.shape[2:]))
    torch.testing.assert_close(mask, formula(reference.widen(vjp), LARGE), rtol=1e-5, atol=1e-6)
    # The gradient is of the order 1/eps = 1e8, which float16 holds as an infinity: there it only must not be NaN.
    assert not gradient.isnan().any()
    assert dtype == torch.float16 or gradient.isfinite().all()
    if value == 0:
        assert not gradient.any()


@pytest.mark.parametrize("huge", [1e30, -1e30, 3e38])
def test_a_single_huge_pixel_gives_a_finite_mask_and_gradient(huge, implementation):
    vjp = LARGE.fields(torch.float32).vjp
    vjp[1, :, 7, 9] = huge / 3
    cotangent = LARGE.cotangent_of_mask(torch.float32)
    mask, gradient = mask_and_gradient(vjp, LARGE, implementation, cotangent)
    assert mask.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(mask.double(), formula(vjp.double(), LARGE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_sample_with_a_value_that_is_not_finite_spoils_its_own_mask_and_no_other(bad, implementation):
    vjp = LARGE.fields(torch.float32).vjp
    clean = density_mask(vjp, **LARGE.options, impl=implementation)
    vjp[2, 1, 3, 4] = bad
    mask = density_mask(vjp, **LARGE.options, impl=implementation)
    assert mask[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(mask[others], clean[others])


def test_an_empty_batch_gives_an_empty_mask_and_gradient(implementation):
    mask, gradient = mask_and_gradient(EMPTY.fields().vjp, EMPTY, implementation, EMPTY.cotangent_of_mask())
    assert mask.shape == (0, 1, 5, 5) and gradient.shape == EMPTY.shape


def test_an_image_of_one_pixel_gives_one_half(implementation):
    mask = density_mask(torch.randn(2, 3, 1, 1, dtype=torch.float64), window=1, impl=implementation)
    torch.testing.assert_close(mask, torch.full_like(mask, 0.5))


@pytest.mark.parametrize("area", [0.1, 0.2, 0.6])
def test_the_mask_lies_in_0_1_and_exceeds_one_half_on_the_asked_area(area, implementation):
    mask = density_mask(LARGE.fields().vjp, window=5, area=area, impl=implementation)
    assert mask.min() > 0 and mask.max() < 1
    share = (mask > 0.5).double().mean((1, 2, 3))
    torch.testing.assert_close(share, torch.full_like(share, area), rtol=0, atol=2 / mask[0].numel())


def test_sign_and_scale_of_the_vjp_do_not_matter(implementation):
    vjp = LARGE.fields().vjp
    mask = density_mask(vjp, window=5, eps=0.0, impl=implementation)
    assert_near(density_mask(-1e-3 * vjp, window=5, eps=0.0, impl=implementation), mask, VALUES)


def test_the_default_window_is_the_published_one_scaled_with_the_image(implementation):
    assert [auto_window(224, 224), auto_window(448, 500), auto_window(32, 64), auto_window(5, 5)] == [31, 63, 5, 3]
    vjp = torch.randn(1, 3, 40, 50, dtype=torch.float64)
    by_default = density_mask(vjp, impl=implementation)
    assert torch.equal(by_default, density_mask(vjp, window=auto_window(40, 50), impl=implementation))
