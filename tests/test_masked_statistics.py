"""The op masked_statistics, in every implementation, against the formulas of sib_ext.reference."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sib_ext import masked_statistics, reference

from .compare import (
    GRADIENTS,
    OF_BACKGROUND,
    OF_FOREGROUND,
    VALUES,
    assert_near,
    gradients,
    overload,
    relative_error,
    snapshot,
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
    Fields,
    Sample,
    laid_out,
)

# Statistics do not know the options of a mask: samples that differ in nothing else would only repeat themselves.
SHAPES = {(s.shape, s.layout): s for s in SAMPLES}.values()
each_sample = pytest.mark.parametrize("sample", SHAPES, ids=lambda s: s.name)
few_samples = pytest.mark.parametrize("sample", FEW_SAMPLES[:4], ids=lambda s: s.name)
each_choice_of_grams = pytest.mark.parametrize("grams", list(itertools.product([True, False], repeat=2)), ids=str)
SUBSETS = [("vjp",), ("x",), ("mask",), ("vjp", "mask"), ("vjp", "x"), ("x", "mask"), ("vjp", "x", "mask")]
BOTH = (True, True)
NEEDS = {"dx and dM": BOTH, "dx": (True, False), "dM": (False, True), "neither": (False, False)}
each_need = pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS.keys())


def kept(outputs):
    return [t for t in outputs if t is not None]


def statistics_and_gradients(fields, cotangents, implementation, grams=BOTH):
    leaves = Fields(*(t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in fields))
    outputs = kept(masked_statistics(*leaves, *grams, impl=implementation))
    return outputs, gradients(outputs, leaves, chosen(cotangents, grams))


def formula_and_gradients(fields, cotangents, grams=BOTH):
    leaves = fields.requiring_grad()
    outputs = kept(reference.masked_statistics(*leaves, *grams))
    return outputs, gradients(outputs, leaves, [c.to(outputs[0].dtype) for c in chosen(cotangents, grams)])


def chosen(cotangents, grams):
    return [c for c, wanted in zip(cotangents, (True, *grams), strict=True) if wanted]


# ------------------------------------------------------------------------------------- values and gradients


def test_the_formula_gives_the_named_sums():
    vjp, x, mask = LARGE.fields()
    moments, gram_vjp, gram_input = reference.masked_statistics(vjp, x, mask)
    a, b, c = (vjp * mask).flatten(1), (x * mask).flatten(1), (vjp * (1 - mask)).flatten(1)
    named = dict(zip(reference.MOMENTS, moments.unbind(1), strict=True))
    sums = {"a": a, "b": b, "aa": a**2, "bb": b**2, "ab": a * b, "c": c, "cc": c**2, "abs_a": a.abs(), "abs_c": c.abs()}
    assert {f"sum_{name}" for name in sums} == set(reference.MOMENTS)
    for name, terms in sums.items():
        assert_near(named[f"sum_{name}"], terms.sum(1), 1e-14)
    assert_near(gram_vjp, torch.einsum("in,jn->ij", a, a), 1e-14)
    assert_near(gram_input, torch.einsum("in,jn->ij", b, b), 1e-14)


@each_choice_of_grams
@each_sample
def test_values_and_gradients_equal_the_formula(sample, grams, implementation):
    fields, cotangents = sample.fields(), sample.cotangents_of_statistics()
    outputs, grads = statistics_and_gradients(fields, cotangents, implementation, grams)
    true_outputs, true_grads = formula_and_gradients(fields, cotangents, grams)
    for value, truth in zip(outputs, true_outputs, strict=True):
        assert_near(value, truth, VALUES)
    for value, truth in zip(grads, true_grads, strict=True):
        assert_near(value, truth, GRADIENTS)


@pytest.mark.parametrize("shape", [(35, 2, 3, 4), (3, 40, 2, 2)], ids=["many samples", "many channels"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_and_channels_beyond_one_tile_equal_the_formula(shape, layout, implementation):
    sample = Sample("beyond one tile", shape, layout=layout)
    fields, cotangents = sample.fields(), sample.cotangents_of_statistics()
    outputs, grads = statistics_and_gradients(fields, cotangents, implementation)
    true_outputs, true_grads = formula_and_gradients(fields, cotangents)
    for value, truth in zip((*outputs, *grads), (*true_outputs, *true_grads), strict=True):
        assert_near(value, truth, VALUES)


@each_choice_of_grams
def test_grams_that_are_not_wanted_are_none(grams, implementation):
    result = masked_statistics(*PLAIN.fields(), *grams, impl=implementation)
    assert (result.gram_vjp is not None, result.gram_input is not None) == grams
    assert result.moments.shape == (2, 9)


@each_sample
def test_the_explicit_backward_formula_equals_autograd_of_the_forward_formula(sample):
    fields, cotangents = sample.fields(), sample.cotangents_of_statistics()
    _, truth = formula_and_gradients(fields, cotangents)
    for value, true in zip(reference.masked_statistics_backward(*cotangents, *fields), truth, strict=True):
        assert_near(value, true, 1e-12)


@each_sample
def test_it_is_differentiable_once_and_twice(sample, implementation):
    fields = tuple(t.requires_grad_() for t in sample.fields())

    def function(*fields):
        return tuple(masked_statistics(*fields, impl=implementation))

    fast = fields[0].numel() > FULL_JACOBIAN
    cotangents = tuple(c.requires_grad_() for c in sample.cotangents_of_statistics())
    assert gradcheck(function, fields, fast_mode=fast)
    assert gradgradcheck(function, fields, cotangents, fast_mode=fast)


@pytest.mark.parametrize("grams", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_it_is_differentiable_in_any_of_its_arguments_with_any_grams(subset, grams, implementation):
    fields = tuple(PLAIN.fields().requiring_grad(*subset))

    def function(*fields):
        return tuple(kept(masked_statistics(*fields, *grams, impl=implementation)))

    assert gradcheck(function, fields, fast_mode=True)
    assert gradgradcheck(function, fields, fast_mode=True)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_the_gradient_of_one_argument_does_not_depend_on_which_others_need_one(subset, implementation):
    cotangents = PLAIN.cotangents_of_statistics()
    leaves = PLAIN.fields().requiring_grad(*subset)
    wanted = [getattr(leaves, name) for name in subset]
    found = gradients(masked_statistics(*leaves, impl=implementation), wanted, cotangents)
    _, everything = statistics_and_gradients(PLAIN.fields(), cotangents, implementation)
    for name, gradient in zip(subset, found, strict=True):
        assert torch.equal(gradient, getattr(Fields(*everything), name))


@each_need
@each_choice_of_grams
@pytest.mark.parametrize("sample", [PLAIN, CHANNELS_LAST, EMPTY, LARGE], ids=lambda s: s.name)
def test_what_is_not_needed_is_empty_and_changes_no_bit_of_the_rest(sample, grams, needs, implementation):
    backward = overload("masked_statistics_backward", implementation)
    moments, *gram_cotangents = sample.cotangents_of_statistics()
    given = [c if wanted else None for c, wanted in zip(gram_cotangents, grams, strict=True)]
    everything = backward(moments, *given, *sample.fields(), True, True)
    found = backward(moments, *given, *sample.fields(), *needs)
    for gradient, whole, needed in zip(found, everything, (True, *needs), strict=True):
        assert gradient.dtype == whole.dtype
        assert torch.equal(gradient, whole) if needed else gradient.shape == (0,)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_the_backward_is_asked_for_nothing_that_nobody_needs(subset, implementation):
    """A given or a detached mask, and an image that is no leaf, cost no gradient."""
    asked = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name().startswith("sib_ext::masked_statistics_backward"):
                asked.append(args[-2:])
            return function(*args, **(kwargs or {}))

    leaves = PLAIN.fields().requiring_grad(*subset)
    loss = masked_statistics(*leaves, impl=implementation).moments.sum()
    with Note():
        loss.backward()
    assert asked == [("x" in subset, "mask" in subset)]
    for name in ("x", "mask"):
        assert (getattr(leaves, name).grad is not None) == (name in subset)


@pytest.mark.parametrize("output", range(3))
def test_outputs_that_nobody_uses_send_no_gradient(output, implementation):
    leaves, truth = PLAIN.fields().requiring_grad(), PLAIN.fields().requiring_grad()
    cotangent = PLAIN.cotangents_of_statistics()[output]
    found = gradients(masked_statistics(*leaves, impl=implementation)[output], leaves, cotangent)
    expected = gradients(reference.masked_statistics(*truth)[output], truth, cotangent)
    for value, true in zip(found, expected, strict=True):
        assert_near(value, true, GRADIENTS)


@pytest.mark.parametrize("sample", OPCHECK_SAMPLES, ids=lambda s: s.name)
@each_need
@pytest.mark.parametrize("grams", [(True, True), (False, True)], ids=str)
def test_the_backward_op_is_differentiable_by_itself(sample, grams, needs, implementation):
    op = overload("masked_statistics_backward", implementation)
    moments, *gram_cotangents = sample.cotangents_of_statistics()
    # dL/dR does not look at the second: zero by construction, its derivative has no graph for gradgradcheck to follow.
    grams = (grams[0], grams[1] and any(needs))
    given = [c for c, wanted in zip(gram_cotangents, grams, strict=True) if wanted]

    def function(moments, *rest):
        rest = list(rest)
        given = [rest.pop(0) if wanted else None for wanted in grams]
        grads = op(moments, *given, *rest, *needs)
        return tuple(grad for grad, needed in zip(grads, (True, *needs), strict=True) if needed)

    inputs = tuple(t.requires_grad_() for t in (moments, *given, *sample.fields()))
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("create_graph", [False, True], ids=["last derivative", "one more to come"])
@few_samples
def test_the_second_derivative_of_a_loss_that_is_not_linear_in_the_statistics_is_right(
    sample, create_graph, implementation
):
    """Then the cotangents depend on R, x and M as well, and that path must count once."""
    directions = [torch.randn_like(t) for t in sample.fields()]

    def second(statistics_of):
        leaves = sample.fields().requiring_grad()
        loss = sum(t.square().sum() for t in statistics_of(*leaves))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        total = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        return torch.autograd.grad(total, leaves, create_graph=create_graph)

    found = second(lambda *fields: masked_statistics(*fields, impl=implementation))
    for value, truth in zip(found, second(reference.masked_statistics), strict=True):
        assert_near(value, truth, GRADIENTS)


@pytest.mark.parametrize("sample", OPCHECK_SAMPLES, ids=lambda s: s.name)
@pytest.mark.parametrize("grams", [(True, True), (False, True)], ids=str)
def test_opcheck_of_the_forward_op(sample, overload_name, grams):
    fields = tuple(t.requires_grad_() for t in sample.fields())
    torch.library.opcheck(getattr(torch.ops.sib_ext.masked_statistics, overload_name), (*fields, *grams))


@pytest.mark.parametrize("sample", OPCHECK_SAMPLES, ids=lambda s: s.name)
@each_need
def test_opcheck_of_the_backward_op(sample, overload_name, needs):
    moments, gram_vjp, gram_input = (c.requires_grad_() for c in sample.cotangents_of_statistics())
    fields = tuple(t.requires_grad_() for t in sample.fields())
    op = getattr(torch.ops.sib_ext.masked_statistics_backward, overload_name)
    torch.library.opcheck(op, (moments, gram_vjp, gram_input if any(needs) else None, *fields, *needs))


any_arguments = hypothesis.given(
    shape=st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 13), st.integers(1, 13)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    grams=st.tuples(st.booleans(), st.booleans()),
)


def assert_equal_to_the_reference(implementation, shape, layouts, grams):
    sample = Sample("any", shape)
    fields = Fields(*map(laid_out, sample.fields(), layouts))
    cotangents = sample.cotangents_of_statistics()
    outputs, grads = statistics_and_gradients(fields, cotangents, implementation, grams)
    true_outputs, true_grads = statistics_and_gradients(fields, cotangents, "reference", grams)
    for value, truth in zip(outputs, true_outputs, strict=True):
        assert_near(value, truth, VALUES)
    for value, truth in zip(grads, true_grads, strict=True):
        assert_near(value, truth, GRADIENTS)


@any_arguments
def test_native_equals_the_reference_whatever_the_arguments(native, **arguments):
    assert_equal_to_the_reference(native, **arguments)


@pytest.mark.slow
@any_arguments
def test_triton_equals_the_reference_whatever_the_arguments(triton, **arguments):
    assert_equal_to_the_reference(triton, **arguments)


# ------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_errors_are_at_most_those_of_the_formula_in_the_same_dtype(dtype, layout, implementation):
    fields = Fields(*(laid_out(t, layout) for t in LARGE.fields(dtype)))
    accumulation = reference.accumulation_dtype(dtype)
    cotangents = [c.to(dtype).to(accumulation) for c in LARGE.cotangents_of_statistics()]
    outputs, grads = statistics_and_gradients(fields, cotangents, implementation)
    assert all(t.dtype == accumulation for t in outputs)
    assert [t.dtype for t in grads] == [t.dtype for t in fields]
    eager_outputs, eager_grads = formula_and_gradients(fields, cotangents)
    true_outputs, true_grads = formula_and_gradients(Fields(*(t.double() for t in fields)), cotangents)
    epsilon = 20 * torch.finfo(accumulation).eps
    # Moment by moment: the sums differ in size, and a large one would hide the error of a small one.
    split = [[*outputs[0].unbind(1), *outputs[1:]] for outputs in (outputs, eager_outputs, true_outputs)]
    comparisons = (*zip(*split, strict=True), *zip(grads, eager_grads, true_grads, strict=True))
    for value, eager, truth in comparisons:
        assert relative_error(value, truth) <= relative_error(eager, truth) + epsilon


def test_fields_of_different_dtypes_meet_in_the_wider_one(implementation):
    vjp, x, mask = LARGE.fields()
    result = masked_statistics(vjp.bfloat16(), x.float(), mask, impl=implementation)
    expected = masked_statistics(vjp.bfloat16().float(), x.float(), mask.float(), impl=implementation)
    assert result.moments.dtype == torch.float32
    for value, truth in zip(result, expected, strict=True):
        assert torch.equal(value, truth)


def test_a_boolean_mask_counts_as_zeros_and_ones(implementation):
    vjp, x, mask = PLAIN.fields()
    expected = masked_statistics(vjp, x, (mask > 0.5).double(), impl=implementation)
    assert torch.equal(masked_statistics(vjp, x, mask > 0.5, impl=implementation).moments, expected.moments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, implementation):
    fields = LARGE.fields(torch.float32)
    cotangents = LARGE.cotangents_of_statistics(torch.float32)
    outputs, grads = statistics_and_gradients(fields, cotangents, implementation)
    with torch.autocast("cpu", dtype=dtype):
        inside_outputs, inside_grads = statistics_and_gradients(fields, cotangents, implementation)
    for value, expected in zip((*inside_outputs, *inside_grads), (*outputs, *grads), strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, expected)


# ------------------------------------------------------------------------------------- layouts and callers


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS[:3], repeat=2)), ids=" and ".join)
def test_layouts_of_the_inputs_change_nothing_but_the_layouts_of_the_gradients(layouts, implementation):
    fields, cotangents = LARGE.fields(), LARGE.cotangents_of_statistics()
    outputs, grads = statistics_and_gradients(fields, cotangents, implementation)
    other = Fields(*map(laid_out, fields, (*layouts, layouts[0])))
    other_outputs, other_grads = statistics_and_gradients(other, cotangents, implementation)
    for value, expected in zip((*other_outputs, *other_grads), (*outputs, *grads), strict=True):
        assert_near(value, expected, 1e-12)
    for gradient, layout in zip(other_grads, layouts, strict=False):
        if layout == "channels_last":
            assert gradient.is_contiguous(memory_format=torch.channels_last)
        elif layout == "contiguous":
            assert gradient.is_contiguous()


def test_expanded_inputs_and_cotangents_are_read_with_their_strides(implementation):
    vjp, x, mask = LARGE.fields()
    expanded = Fields(vjp[:1].expand(4, -1, -1, -1), x[:, :1].expand(-1, 3, -1, -1), mask[..., :1].expand(mask.shape))
    copied = Fields(*(t.contiguous() for t in expanded))
    ones = [torch.ones((), dtype=torch.float64).expand(c.shape) for c in LARGE.cotangents_of_statistics()]
    leaves = [t.requires_grad_() for t in (vjp, x, mask)]
    expanded = (leaves[0][:1].expand(4, -1, -1, -1), leaves[1][:, :1].expand(-1, 3, -1, -1))
    expanded = (*expanded, leaves[2][..., :1].expand(mask.shape))
    found = masked_statistics(*expanded, impl=implementation)
    outputs, grads = statistics_and_gradients(copied, [c.contiguous() for c in ones], implementation)
    for value, truth in zip(found, outputs, strict=True):
        assert_near(value, truth, 1e-13)
    found_grads = gradients(found, expanded, ones)
    for value, truth in zip(found_grads, grads, strict=True):
        assert_near(value, truth, GRADIENTS)


def test_a_gram_s_cotangent_need_not_be_symmetric_nor_contiguous(implementation):
    fields, cotangents = LARGE.fields(), LARGE.cotangents_of_statistics()
    _, expected = statistics_and_gradients(fields, [cotangents[0], *(c.T for c in cotangents[1:])], implementation)
    _, found = statistics_and_gradients(fields, cotangents, implementation)
    for value, truth in zip(found, expected, strict=True):
        assert_near(value, truth, 1e-12)


@few_samples
def test_inputs_and_cotangents_stay_as_they_are(sample, implementation):
    leaves, cotangents = sample.fields().requiring_grad(), sample.cotangents_of_statistics()
    check = snapshot([*leaves, *cotangents])
    outputs = masked_statistics(*leaves, impl=implementation)
    check_outputs = snapshot(outputs)
    gradients(outputs, leaves, cotangents)
    check()
    check_outputs()


@pytest.mark.parametrize("sample", [PLAIN, CHANNELS_LAST], ids=lambda s: s.name)
def test_a_second_backward_gives_the_same_gradient(sample, implementation):
    leaves, cotangents = sample.fields().requiring_grad(), sample.cotangents_of_statistics()
    outputs = masked_statistics(*leaves, impl=implementation)
    first, second = (gradients(outputs, leaves, cotangents) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_the_number_of_threads_changes_no_bit(threads, native):
    fields, cotangents = LARGE.fields(torch.float32), LARGE.cotangents_of_statistics(torch.float32)
    threads(1)
    outputs, grads = statistics_and_gradients(fields, cotangents, native)
    threads(2)
    other_outputs, other_grads = statistics_and_gradients(fields, cotangents, native)
    for value, expected in zip((*other_outputs, *other_grads), (*outputs, *grads), strict=True):
        assert torch.equal(value, expected)


# ---------------------------------------------------------------------------------------- awkward values


def test_a_magnitude_has_no_gradient_where_the_vjp_is_zero(implementation):
    """Of either sign, as torch.abs has none."""
    vjp, x, mask = LARGE.fields()
    vjp[:, :, ::2] = 0
    vjp[:, :, ::4] *= -1
    vjp.requires_grad_()
    moments = masked_statistics(vjp, x, mask, False, False, impl=implementation).moments
    (gradient,) = gradients(moments[:, 7:].sum(), [vjp])
    assert not gradient[:, :, ::2].any()
    assert_near(gradient, vjp.sign(), 1e-14)


def test_an_empty_batch_gives_empty_results(implementation):
    outputs, grads = statistics_and_gradients(EMPTY.fields(), EMPTY.cotangents_of_statistics(), implementation)
    assert [t.shape for t in outputs] == [(0, 9), (0, 0), (0, 0)]
    assert [t.shape for t in grads] == [EMPTY.shape, EMPTY.shape, (0, 1, 5, 5)]


@pytest.mark.parametrize("mask_value", [0.0, 1.0])
def test_a_mask_of_zeros_or_ones_leaves_exactly_nothing_on_one_side(mask_value, implementation):
    vjp, x, mask = LARGE.fields(torch.float32)
    moments, gram_vjp, _ = masked_statistics(vjp, x, torch.full_like(mask, mask_value), impl=implementation)
    sums = dict(zip(reference.MOMENTS, moments.unbind(1), strict=True))
    gone = OF_BACKGROUND if mask_value else OF_FOREGROUND
    assert not any(sums[name].any() for name in gone)
    assert all(sums[name].all() for name in sums if name not in gone)
    assert bool(gram_vjp.any()) == bool(mask_value)


def test_a_huge_pixel_overflows_where_the_formula_does_and_nowhere_else(implementation):
    vjp, x, mask = LARGE.fields(torch.float32)
    vjp[1, 0, 7, 9] = 1e30
    moments, gram_vjp, gram_input = masked_statistics(vjp, x, mask, impl=implementation)
    true_moments, true_gram_vjp, true_gram_input = reference.masked_statistics(vjp, x, mask)
    for value, truth in ((moments, true_moments), (gram_vjp, true_gram_vjp), (gram_input, true_gram_input)):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-2, equal_nan=True)
    assert moments[1].isinf().any() and not moments.isnan().any()


def test_a_sample_that_is_not_finite_spoils_its_own_moments_and_its_own_row_of_the_gram(implementation):
    vjp, x, mask = LARGE.fields(torch.float32)
    clean = masked_statistics(vjp, x, mask, impl=implementation)
    vjp[2, 1, 3, 4] = float("nan")
    moments, gram_vjp, gram_input = masked_statistics(vjp, x, mask, impl=implementation)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(moments[others], clean.moments[others])
    assert torch.equal(gram_input, clean.gram_input)
    assert_near(gram_vjp[others][:, others], clean.gram_vjp[others][:, others], 1e-6)
    assert moments[2, 0].isnan() and gram_vjp[2].isnan().all() and gram_vjp[:, 2].isnan().all()


def test_grams_are_symmetric_with_the_squared_sums_on_the_diagonal(implementation):
    moments, gram_vjp, gram_input = masked_statistics(*LARGE.fields(), impl=implementation)
    for gram, squares in ((gram_vjp, moments[:, 2]), (gram_input, moments[:, 3])):
        assert_near(gram, gram.T, 1e-13)
        assert_near(gram.diagonal(), squares, 1e-13)
