"""The CUDA kernels without a GPU: the very source that nvcc compiles, run on the CPU by an emulation of CUDA.

What it shows: the arithmetic, the indices, the edge cases, and that every result that threads share is behind a
barrier (threads run in three orders, and nothing may change). What it cannot show: speed, and what only hardware does.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sib_ext import reference

from . import cuda_emulation, test_norm_double_backward
from .compare import (
    GRADIENTS,
    OF_BACKGROUND,
    OF_FOREGROUND,
    VALUES,
    assert_near,
    gradients,
    mask_gradient_errors,
    on_support,
    relative_error,
    snapshot,
    support_of,
)
from .samples import DTYPES, EMPTY, LARGE, PLAIN, SAMPLES, WIDE, Fields, Sample, laid_out

pytestmark = pytest.mark.skipif(cuda_emulation.problem() is not None, reason=str(cuda_emulation.problem()))

# Bytes of shared memory that a block may have: none makes the kernels for large images run on small ones.
PATHS = {"in one block": cuda_emulation.HOPPER, "in many blocks": 0}
MASK_SAMPLES = (
    *SAMPLES,
    LARGE,
    Sample("a block of 256 threads", (1, 2, 47, 46), {"window": 9}),
    Sample("as many threads as there can be", (1, 1, 129, 131), {"window": 31}),
    Sample("rows longer than the staging room", (1, 1, 2, 6500), {"window": 5}),
    Sample("a support longer than a list in shared memory", (1, 1, 53, 47), {"temperature": 30.0}),
    Sample("columns", (2, 1, 90, 1), {"window": 9, "padding": "exclude"}),
    Sample("a column longer than a tile", (2, 1, 4500, 1), {"window": 9}),
    Sample("a row longer than a tile", (2, 1, 1, 4500), {"window": 31, "padding": "exclude"}),
    Sample("several tiles, and rows that end within them", (2, 1, 67, 139), {"window": 31}),
    Sample("windows wider than what is loaded beside a tile", (1, 1, 2, 6500), {"window": 4001}),
    Sample("windows as wide as what is loaded beside a tile", (1, 1, 2, 6500), {"window": 1535, "padding": "exclude"}),
)
STATISTICS_SAMPLES = (
    *SAMPLES,
    LARGE,
    Sample("a batch larger than a tile of 32", (35, 2, 5, 6)),
    Sample("a batch larger than a tile of 64", (67, 1, 3, 5)),
    Sample("pixels in fours", (3, 3, 6, 8)),
    Sample("pixels in fours, channels last", (3, 5, 4, 8), layout="channels_last"),
    Sample("several parts and splits", (2, 2, 80, 110)),
    Sample("many channels", (3, 700, 3, 9)),
    Sample("more pixels than a tile, batch of 33", (33, 1, 10, 14)),
    Sample("as many samples as one pass takes, a tile of pixels and a part of one", (128, 2, 4, 10)),
    Sample("four tiles and several splits", (70, 2, 8, 24)),
    Sample("more samples than one pass takes", (131, 1, 4, 6)),
)

each_mask_sample = pytest.mark.parametrize("sample", MASK_SAMPLES, ids=lambda s: s.name)
each_statistics_sample = pytest.mark.parametrize("sample", STATISTICS_SAMPLES, ids=lambda s: s.name)
each_path = pytest.mark.parametrize("path", PATHS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    flags = ("-fsanitize=address,undefined", "-g") if os.environ.get("SIB_EXT_SANITIZE") == "1" else ()
    return cuda_emulation.build(tmp_path_factory.mktemp("emulation"), *flags)


@pytest.fixture
def emulated(library):
    emulation = cuda_emulation.Emulation(library)
    emulation.set_order("rising")
    return emulation


@pytest.fixture
def on_path(emulated, path):
    emulated.shared_bytes = PATHS[path]
    return emulated


def mask_and_gradient(emulation, vjp, sample, cotangent):
    mask, support = emulation.density_mask(vjp, *sample.positional_options)
    gradient = emulation.density_mask_backward(cotangent, vjp, mask, support, *sample.positional_options)
    return mask, gradient.expand_as(vjp)


def formula_and_gradient(vjp, sample, cotangent):
    leaf = vjp.detach().clone().requires_grad_()
    mask = reference.density_mask(leaf, *sample.positional_options)
    return mask.detach(), *gradients(mask, [leaf], cotangent.to(mask.dtype))


def statistics_and_gradients(emulation, fields, cotangents, need_x=True):
    outputs = emulation.masked_statistics(*fields)
    return outputs, emulation.masked_statistics_backward(*cotangents, *fields, need_x)


# ------------------------------------------------------------------------------------------- density_mask


@each_path
@each_mask_sample
def test_mask_and_gradient_equal_the_formula(sample, path, on_path):
    vjp, cotangent = sample.fields().vjp, sample.cotangent_of_mask()
    mask, gradient = mask_and_gradient(on_path, vjp, sample, cotangent)
    true_mask, truth = formula_and_gradient(vjp, sample, cotangent)
    assert_near(mask, true_mask, VALUES)
    assert float((gradient - truth).norm()) <= GRADIENTS * float(truth.norm() + cotangent.norm())


@each_path
@each_mask_sample
def test_the_support_is_the_one_of_the_formula(sample, path, on_path):
    """Rows of g pixel by pixel; the row of d rests on rounding and is compared by use."""
    vjp = sample.fields().vjp
    _, support = on_path.density_mask(vjp, *sample.positional_options)
    assert torch.equal(support[:, :3], support_of(vjp, sample)[:, :3])


@each_path
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ties_go_to_the_lower_pixel(levels, path, on_path):
    """Few different values: every support cuts through thousands of equal ones."""
    sample = Sample("ties", (3, 1, 40, 37), {"temperature": 0.4})
    vjp = torch.randint(0, levels, sample.shape, dtype=torch.float64) - 1.0
    _, support = on_path.density_mask(vjp, *sample.positional_options)
    assert torch.equal(support[:, :3], support_of(vjp, sample)[:, :3])
    assert all(len(row.unique()) == len(row) for row in support.flatten(0, 1))


def hard_to_select(name, sample):
    """Values whose bins hold more pixels than the candidates' room, or that need every digit of a key."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(sample.shape, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([1400, 7400, 2100, 1200])  # the bins of q05, none, q80 and q95
    powers = 2.0 ** torch.arange(4).repeat_interleave(sizes)[torch.randperm(12100, generator=generator)]
    values = {
        "bins that fit, lists that do not": powers.view_as(noise) * (1 + noise / 16),
        "all equal": torch.full_like(noise, 0.75),
        "two levels": 0.5 + (noise > 0.9).double() / 2,
        "one bin of the first digit": 1 + noise / 16,
        "one bin of two digits": 1 + noise / 2**14,
        "half of them equal": torch.where(noise < 0.5, 0.25, noise),
        "equal but for the last bit": 1 + (noise * 4).floor() * 2.0**-23,
        "two crowded bins": torch.where(noise < 0.8, 1 + noise / 64, 2 + noise / 64),
    }
    return values[name]


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("temperature", [0.1, 13.7])
@pytest.mark.parametrize(
    "name",
    [
        "bins that fit, lists that do not",
        "all equal",
        "two levels",
        "one bin of the first digit",
        "one bin of two digits",
        "half of them equal",
        "equal but for the last bit",
        "two crowded bins",
    ],
)
def test_candidates_that_do_not_fit_are_found_in_the_plane(name, temperature, dtype, path, on_path):
    """Planes of 12,100 pixels: the room beside one histogram takes 10,560 candidates, beside six none."""
    sample = Sample("crowded", (1, 1, 110, 110), {"temperature": temperature})
    vjp = hard_to_select(name, sample).to(dtype)
    results = []
    for order in cuda_emulation.ORDERS:
        on_path.set_order(order)
        mask, support = on_path.density_mask(vjp, *sample.positional_options)
        assert torch.equal(support[:, :3], support_of(vjp, sample)[:, :3])
        assert all(len(row.unique()) == len(row) for row in support.flatten(0, 1))
        results.append((mask, support))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_plane_with_more_pixels_than_a_candidate_can_name_takes_many_blocks(emulated):
    """No block of today has the shared memory for it; one of tomorrow may."""
    sample = Sample("large", (1, 1, 260, 257))
    vjp = sample.fields(torch.float32).vjp
    results = []
    for emulated.shared_bytes in (1 << 20, 0):
        results.append(emulated.density_mask(vjp, *sample.positional_options))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][1][:, :3], support_of(vjp, sample)[:, :3])


@each_path
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_errors_of_mask_and_gradient_are_at_most_those_of_the_formula_in_the_same_dtype(dtype, layout, path, on_path):
    vjp = laid_out(LARGE.fields(dtype).vjp, layout)
    accumulation = reference.accumulation_dtype(dtype)
    cotangent = LARGE.cotangent_of_mask().to(dtype)
    mask, gradient = mask_and_gradient(on_path, vjp, LARGE, cotangent.to(accumulation))
    true_mask, truth = formula_and_gradient(vjp.double(), LARGE, cotangent)
    eager_mask, eager = formula_and_gradient(vjp, LARGE, cotangent)
    epsilon = torch.finfo(accumulation).eps
    assert gradient.dtype == dtype
    assert relative_error(mask, true_mask) <= relative_error(eager_mask, true_mask) + 20 * epsilon
    _, support = on_path.density_mask(vjp, *LARGE.positional_options)
    near = on_support(torch.cat([support_of(vjp.double(), LARGE), support_of(vjp, LARGE), support], 2), vjp)
    eager_errors = mask_gradient_errors(eager, truth, vjp, near)
    for error, eager_error in zip(mask_gradient_errors(gradient, truth, vjp, near), eager_errors, strict=True):
        assert error <= eager_error + 100 * epsilon


@each_path
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_sample_with_a_value_that_is_not_finite_spoils_its_own_mask_and_no_other(bad, path, on_path):
    vjp = LARGE.fields(torch.float32).vjp
    clean, clean_support = on_path.density_mask(vjp, *LARGE.positional_options)
    vjp[2, 1, 3, 4] = bad
    mask, support = on_path.density_mask(vjp, *LARGE.positional_options)
    assert mask[2].isnan().all() and not support[2].any()
    others = [0, 1, 3]
    assert torch.equal(mask[others], clean[others]) and torch.equal(support[others], clean_support[others])
    gradient = on_path.density_mask_backward(torch.ones_like(mask), vjp, mask, support, *LARGE.positional_options)
    assert gradient[2].isnan().all() and gradient[others].isfinite().all()


@each_path
@pytest.mark.parametrize("value", [0.0, 1.0, -0.25])
def test_a_constant_vjp_gives_the_formula_s_mask_and_a_finite_gradient(value, path, on_path):
    vjp = torch.full(LARGE.shape, value)
    mask, gradient = mask_and_gradient(on_path, vjp, LARGE, torch.ones(LARGE.shape[0], 1, *LARGE.shape[2:]))
    truth = reference.density_mask(vjp, *LARGE.positional_options)
    torch.testing.assert_close(mask, truth, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all() and (value != 0 or not gradient.any())


@each_path
@pytest.mark.parametrize("huge", [1e30, -1e30, 3e38])
def test_a_single_huge_pixel_gives_a_finite_mask_and_gradient(huge, path, on_path):
    vjp, cotangent = LARGE.fields(torch.float32).vjp, LARGE.cotangent_of_mask(torch.float32)
    vjp[1, :, 7, 9] = huge / 3
    mask, gradient = mask_and_gradient(on_path, vjp, LARGE, cotangent)
    assert mask.isfinite().all() and gradient.isfinite().all()
    truth = reference.density_mask(vjp.double(), *LARGE.positional_options)
    torch.testing.assert_close(mask.double(), truth, rtol=1e-4, atol=1e-5)


@each_path
def test_values_of_every_size_are_ranked(path, on_path):
    """Denormals, zeros of both signs and the largest numbers, in both types."""
    for dtype, exponents in ((torch.float32, (-149, 127)), (torch.float64, (-1074, 1023))):
        sample = Sample("sizes", (2, 1, 30, 31), {"temperature": 1.0})
        generator = torch.Generator().manual_seed(3)
        power = torch.randint(*exponents, sample.shape, generator=generator).double()
        sign = torch.randint(-1, 2, sample.shape, generator=generator)
        vjp = (sign * torch.exp2(power)).to(dtype)
        _, support = on_path.density_mask(vjp, *sample.positional_options)
        assert torch.equal(support[:, :3], support_of(vjp, sample)[:, :3])


@each_path
def test_the_order_of_threads_and_blocks_changes_no_bit_of_mask_and_gradient(path, on_path):
    for sample in (LARGE, WIDE, Sample("several warps", (3, 2, 47, 46), {"padding": "exclude"})):
        vjp, cotangent = sample.fields(torch.float32).vjp, sample.cotangent_of_mask(torch.float32)
        results = []
        for order in cuda_emulation.ORDERS:
            on_path.set_order(order)
            mask, support = on_path.density_mask(vjp, *sample.positional_options)
            gradient = on_path.density_mask_backward(cotangent, vjp, mask, support, *sample.positional_options)
            results.append((mask, support, gradient))
        for other in results[1:]:
            assert all(torch.equal(value, expected) for value, expected in zip(other, results[0], strict=True))


@each_path
def test_the_company_in_the_batch_changes_no_bit(path, on_path):
    vjp, cotangent = LARGE.fields(torch.float32).vjp, LARGE.cotangent_of_mask(torch.float32)
    together = mask_and_gradient(on_path, vjp, LARGE, cotangent)
    for i in range(vjp.shape[0]):
        alone = mask_and_gradient(on_path, vjp[i : i + 1], LARGE, cotangent[i : i + 1])
        for value, expected in zip(alone, together, strict=True):
            assert torch.equal(value, expected[i : i + 1])


@each_path
def test_inputs_of_density_mask_stay_as_they_are(path, on_path):
    vjp, cotangent = PLAIN.fields().vjp, PLAIN.cotangent_of_mask()
    check = snapshot([vjp, cotangent])
    mask, support = on_path.density_mask(vjp, *PLAIN.positional_options)
    check_saved = snapshot([mask, support])
    on_path.density_mask_backward(cotangent, vjp, mask, support, *PLAIN.positional_options)
    check()
    check_saved()


# -------------------------------------------------------------------------------------- masked_statistics


def reference_statistics(fields, cotangents):
    wide = [t.double() for t in fields]
    return (
        reference.masked_statistics(*wide),
        reference.masked_statistics_backward(*(c.double() for c in cotangents), *wide),
    )


@each_statistics_sample
def test_statistics_and_gradients_equal_the_formula(sample, emulated):
    fields, cotangents = sample.fields(), sample.cotangents_of_statistics()
    outputs, grads = statistics_and_gradients(emulated, fields, cotangents)
    true_outputs, truths = reference_statistics(fields, cotangents)
    for value, truth in zip(outputs, true_outputs, strict=True):
        assert_near(value, truth, VALUES)
    for value, truth in zip(grads, truths, strict=True):
        assert_near(value, truth, GRADIENTS)


def precisions():
    """Every sample in every dtype; on tensor cores those that come to them, batches of more than 32."""
    for sample, dtype in itertools.product(STATISTICS_SAMPLES, DTYPES):
        name = f"{sample.name}-{str(dtype).removeprefix('torch.')}"
        yield pytest.param(sample, dtype, False, id=name)
        if sample.shape[0] > 32 and dtype != torch.float64:
            yield pytest.param(sample, dtype, True, id=f"{name}-tensor cores")


@pytest.mark.parametrize(("sample", "dtype", "tensor_cores"), list(precisions()))
def test_errors_of_statistics_are_at_most_those_of_the_formula_in_the_same_dtype(sample, dtype, tensor_cores, emulated):
    emulated.tensor_cores = tensor_cores
    fields = sample.fields(dtype)
    accumulation = reference.accumulation_dtype(dtype)
    fields = Fields(fields.vjp, fields.x, fields.mask.to(accumulation))
    cotangents = [c.to(accumulation) for c in sample.cotangents_of_statistics()]
    found = statistics_and_gradients(emulated, fields, cotangents)
    truth = reference_statistics(fields, cotangents)
    wide = [reference.widen(t) for t in fields]
    eager = reference.masked_statistics(*wide), reference.masked_statistics_backward(*cotangents, *wide)
    epsilon = 20 * torch.finfo(accumulation).eps
    for value, true, plain in zip((*found[0], *found[1]), (*truth[0], *truth[1]), (*eager[0], *eager[1]), strict=True):
        plain = plain.to(value.dtype)
        assert relative_error(value, true) <= relative_error(plain, true) + epsilon
    for gradient, field in zip(found[1][:2], fields, strict=False):
        assert gradient.dtype == dtype and gradient.stride() == cuda_emulation.canonical(field).stride()


@pytest.mark.parametrize(
    "layouts", [("contiguous", "channels_last"), ("channels_last", "contiguous")], ids=" and ".join
)
@pytest.mark.parametrize("shape", [(3, 4, 6, 8), (2, 3, 5, 7)], ids=str)
def test_layouts_may_differ_between_vjp_and_x(layouts, shape, emulated):
    sample = Sample("layouts", shape)
    fields, cotangents = sample.fields(), sample.cotangents_of_statistics()
    other = Fields(*map(laid_out, fields, (*layouts, "contiguous")))
    expected = statistics_and_gradients(emulated, fields, cotangents)
    found = statistics_and_gradients(emulated, other, cotangents)
    for values, truths in zip(found, expected, strict=True):
        for value, truth in zip(values, truths, strict=True):
            assert_near(value, truth, 1e-12)


@pytest.mark.parametrize("offset", [1, 2])
def test_fields_that_are_not_aligned_are_read_all_the_same(offset, emulated):
    sample = Sample("aligned", (3, 2, 4, 8))
    fields, cotangents = sample.fields(torch.float32), sample.cotangents_of_statistics(torch.float32)

    def shifted(tensor):
        storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
        storage[offset:] = tensor.flatten()
        return storage[offset:].view(tensor.shape)

    expected = statistics_and_gradients(emulated, fields, cotangents)
    found = statistics_and_gradients(emulated, Fields(*map(shifted, fields)), cotangents)
    for values, truths in zip(found, expected, strict=True):
        for value, truth in zip(values, truths, strict=True):
            assert_near(value, truth, 1e-5)


@pytest.mark.parametrize("sample", [LARGE, Sample("groups of channels", (3, 40, 3, 9))], ids=lambda s: s.name)
@pytest.mark.parametrize("grams", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("needed", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_what_is_not_wanted_is_left_out_and_the_rest_is_the_same(grams, needed, sample, emulated):
    fields, (moments, *gram_cotangents) = sample.fields(), sample.cotangents_of_statistics()
    for gram, wanted in zip(emulated.masked_statistics(*fields, *grams)[1:], grams, strict=True):
        assert (gram is not None) == wanted
    cotangents = (moments, *(c if wanted else None for c, wanted in zip(gram_cotangents, grams, strict=True)))
    found = emulated.masked_statistics_backward(*cotangents, *fields, *needed)
    truths = reference.masked_statistics_backward(*cotangents, *fields)
    assert tuple(value is not None for value in found) == (True, *needed)
    for value, truth in zip(found, truths, strict=True):
        if value is not None:
            assert_near(value, truth, GRADIENTS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 3, 40, 36), (3, 5, 7, 9), (2, 40, 3, 9)], ids=str)
def test_a_field_that_stands_for_both_is_read_once_and_gives_the_same_bits(shape, layout, emulated):
    """R as its own x: the kernels see one pointer, and must not differ from those that see two equal fields."""
    sample = Sample("one field", shape)
    vjp, _, mask = sample.fields(torch.float32)
    vjp, (cotangent, *_) = laid_out(vjp, layout), sample.cotangents_of_statistics(torch.float32)
    results = [
        (*emulated.masked_statistics(vjp, x, mask, False, False)[:1],
         *emulated.masked_statistics_backward(cotangent, None, None, vjp, x, mask))
        for x in (vjp, vjp.clone(memory_format=torch.preserve_format))
    ]  # fmt: skip
    assert all(torch.equal(value, expected) for value, expected in zip(*results, strict=True))


def test_the_order_of_threads_and_blocks_changes_no_bit_of_the_statistics(emulated):
    for sample in (LARGE, STATISTICS_SAMPLES[-2], Sample("groups of channels", (3, 40, 3, 9))):
        fields, cotangents = sample.fields(torch.float32), sample.cotangents_of_statistics(torch.float32)
        results = []
        for order in cuda_emulation.ORDERS:
            emulated.set_order(order)
            outputs, grads = statistics_and_gradients(emulated, fields, cotangents)
            results.append((*outputs, *grads))
        for other in results[1:]:
            assert all(torch.equal(value, expected) for value, expected in zip(other, results[0], strict=True))


# Batches whose moments and Grams come from one pass, on so many multiprocessors, a split each: fewer elements than a
# step, tails, channels that end within a step, a last split that is shorter, moments summed more than once.
ONE_PASS = {
    "less than a step": ((65, 1, 4, 3), 1),
    "channels of four pixels": ((128, 9, 1, 4), 1),
    "two splits": ((70, 3, 2, 10), 2),
    "a shorter last split": ((100, 2, 4, 11), 4),
    "many steps": ((97, 2, 9, 12), 1),
}
each_one_pass = pytest.mark.parametrize(("shape", "multiprocessors"), ONE_PASS.values(), ids=ONE_PASS)


@each_one_pass
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_errors_of_one_pass_are_at_most_those_of_the_formula_in_the_same_dtype(shape, multiprocessors, dtype, emulated):
    emulated.multiprocessors = multiprocessors
    vjp, x, mask = Sample("one pass", shape).fields(dtype)
    fields = Fields(vjp, x, mask.float())
    truth = reference.masked_statistics(*(t.double() for t in fields))
    eager = reference.masked_statistics(*map(reference.widen, fields))
    for value, true, plain in zip(emulated.masked_statistics(*fields), truth, eager, strict=True):
        assert relative_error(value, true) <= relative_error(plain, true) + 20 * torch.finfo(torch.float32).eps


@each_one_pass
def test_one_pass_and_several_agree(shape, multiprocessors, emulated):
    emulated.multiprocessors = multiprocessors
    fields = Sample("one pass", shape).fields(torch.float32)
    moments, gram_vjp, gram_input = emulated.masked_statistics(*fields)
    apart = emulated.masked_statistics(*fields, True, False), emulated.masked_statistics(*fields, False, True)
    for value, other in ((moments, apart[0][0]), (gram_vjp, apart[0][1]), (gram_input, apart[1][2])):
        assert relative_error(value, other.double()) < 1e-6
    assert torch.equal(gram_vjp, gram_vjp.mT) and torch.equal(gram_input, gram_input.mT)


@pytest.mark.parametrize("name", ["channels of four pixels", "a shorter last split"])
def test_the_order_of_threads_and_blocks_changes_no_bit_of_one_pass(name, emulated):
    shape, emulated.multiprocessors = ONE_PASS[name]
    fields, results = Sample("one pass", shape).fields(torch.float32), []
    for order in cuda_emulation.ORDERS:
        emulated.set_order(order)
        results.append(emulated.masked_statistics(*fields))
    for other in results[1:]:
        assert all(torch.equal(value, expected) for value, expected in zip(other, results[0], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", [0, 33, 69])
def test_in_one_pass_too_a_sample_that_is_not_finite_spoils_nothing_of_the_others(spoilt, bad, emulated):
    vjp, x, mask = Sample("one pass", (70, 1, 5, 4)).fields(torch.float32)
    clean = emulated.masked_statistics(vjp, x, mask)
    vjp[spoilt, 0, 3, 2] = bad
    moments, gram_vjp, gram_input = emulated.masked_statistics(vjp, x, mask)
    others = torch.arange(70) != spoilt
    assert torch.equal(moments[others], clean[0][others]) and torch.equal(gram_input, clean[2])
    assert torch.equal(gram_vjp[others][:, others], clean[1][others][:, others])
    assert not moments[spoilt, 0].isfinite()
    assert not gram_vjp[spoilt].isfinite().any() and not gram_vjp[:, spoilt].isfinite().any()


def test_a_sample_that_is_not_finite_spoils_its_own_moments_and_its_own_row_of_the_gram(emulated):
    vjp, x, mask = LARGE.fields(torch.float32)
    clean = emulated.masked_statistics(vjp, x, mask)
    vjp[2, 1, 3, 4] = float("nan")
    moments, gram_vjp, gram_input = emulated.masked_statistics(vjp, x, mask)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(moments[others], clean[0][others]) and torch.equal(gram_input, clean[2])
    assert torch.equal(gram_vjp[others][:, others], clean[1][others][:, others])
    assert moments[2, 0].isnan() and gram_vjp[2].isnan().all() and gram_vjp[:, 2].isnan().all()


@pytest.mark.parametrize("mask_value", [0.0, 1.0])
def test_a_mask_of_zeros_or_ones_leaves_exactly_nothing_on_one_side(mask_value, emulated):
    vjp, x, mask = LARGE.fields(torch.float32)
    moments, gram_vjp, _ = emulated.masked_statistics(vjp, x, torch.full_like(mask, mask_value))
    sums = dict(zip(reference.MOMENTS, moments.unbind(1), strict=True))
    gone = OF_BACKGROUND if mask_value else OF_FOREGROUND
    assert not any(sums[name].any() for name in gone)
    assert all(sums[name].all() for name in sums if name not in gone)
    assert bool(gram_vjp.any()) == bool(mask_value)


def test_an_empty_batch_launches_nothing(emulated):
    outputs, grads = statistics_and_gradients(emulated, EMPTY.fields(), EMPTY.cotangents_of_statistics())
    assert [t.shape for t in (*outputs, *grads)] == [(0, 9), (0, 0), (0, 0), EMPTY.shape, EMPTY.shape, (0, 1, 5, 5)]


# ------------------------------------------------------------------------------------- memory and the emulation


@pytest.mark.slow
def test_no_kernel_reads_or_writes_beyond_its_memory():
    """All tests of this file once more, compiled with the address and undefined-behaviour sanitizers."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ has no sanitizers here")
    # torch and Python themselves leak and are not instrumented: only what the kernels touch is of interest.
    options = {"ASAN_OPTIONS": "detect_leaks=0,detect_stack_use_after_return=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, **options, "SIB_EXT_SANITIZE": "1", "LD_PRELOAD": ":".join(libraries)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


PLANTED = {
    "a missing barrier": (
        "out[threadIdx.x] = memory[(threadIdx.x + 1) % blockDim.x];",
        "differs",
    ),
    "a barrier that not all threads reach": (
        "if (threadIdx.x < 40) __syncthreads(); out[threadIdx.x] = 0;",
        "a thread has left the kernel",
    ),
    "lanes that meet in different places": (
        "out[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(~0u, 1, 0) : __shfl_down_sync(~0u, 1, 1);",
        "lanes of one warp wait in different exchanges",
    ),
    "a value that is read before it is written": (
        "out[threadIdx.x] = memory[blockDim.x + threadIdx.x] != 0;",
        "garbage",
    ),
    "nothing": ("__syncthreads(); out[threadIdx.x] = memory[(threadIdx.x + 1) % blockDim.x];", "fine"),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_the_emulation_notices_a_planted_mistake(mistake, tmp_path):
    """A kernel in which each thread reads its neighbour's value out of shared memory, with a mistake in it."""
    body, outcome = PLANTED[mistake]
    (tmp_path / "planted.cpp").write_text(
        f"""
        #include "common.cuh"
        using namespace sib_ext::cuda;
        void kernel(int* out) {{
          int* memory = reinterpret_cast<int*>(block_memory());
          memory[threadIdx.x] = threadIdx.x;
          {body}
        }}
        int main() {{
          int rising[64], falling[64];
          Device device{{}};
          launch(device, kernel, 1, 64, 1024, rising);
          emulation::order = emulation::Order::kFalling;
          launch(device, kernel, 1, 64, 1024, falling);
          if (std::memcmp(rising, falling, sizeof rising)) std::puts("differs");
          else std::puts(rising[0] == 1 && rising[5] == 1 ? "garbage" : "fine");
        }}
        """
    )
    include = (f"-I{cuda_emulation.HERE}", f"-I{cuda_emulation.CSRC / 'cuda'}", "-DSIB_CUDA_EMULATION")
    program = str(tmp_path / "planted")
    subprocess.run(["g++", "-std=c++17", *include, str(tmp_path / "planted.cpp"), "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert outcome in done.stdout + done.stderr


# ------------------------------------------------------------------------------------------ norm_double_backward


@pytest.mark.parametrize("affine", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("name", test_norm_double_backward.CASES)
def test_the_second_derivative_of_a_normalisation_is_the_formula(name, affine, emulated):
    arguments = test_norm_double_backward.arguments(name, affine=affine)
    results = emulated.norm_double_backward(*arguments)
    for value, truth in zip(results, reference.norm_double_backward(*arguments[:6]), strict=True):
        assert_near(value, truth, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["batch", "group", "batch, rows in fours", "batch, channels_last, fours"])
def test_the_second_derivative_of_a_normalisation_in_narrow_types(name, dtype, emulated):
    arguments = test_norm_double_backward.arguments(name, dtype)
    exact = reference.norm_double_backward(*(None if t is None else t.double() for t in arguments[:6]))
    for value, truth in zip(emulated.norm_double_backward(*arguments), exact, strict=True):
        assert relative_error(value, truth) <= 2 * relative_error(truth.to(value.dtype), truth) + 1e-6


@pytest.mark.parametrize("name", ["batch, rows in fours", "batch, channels_last, fours"])
def test_derivatives_of_a_normalisation_do_not_depend_on_the_order_of_threads(name, emulated):
    arguments = test_norm_double_backward.arguments(name, torch.float32)
    emulated.multiprocessors = 3  # several parts
    results = []
    for order in cuda_emulation.ORDERS:
        emulated.set_order(order)
        second, first = emulated.norm_double_backward(*arguments), emulated.batch_norm_backward(*arguments[1:6])
        results.append((*second, *first))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


BATCH_NORM = [name for name, (_, groups) in test_norm_double_backward.CASES.items() if groups is None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("name", BATCH_NORM)
def test_the_gradients_of_batch_normalisation_are_the_formula(name, affine, dtype, emulated):
    arguments = test_norm_double_backward.arguments(name, dtype, affine=affine)[1:6]
    exact = reference.batch_norm_backward(*(None if t is None else t.double() for t in arguments))
    emulated.multiprocessors = 3
    for value, truth in zip(emulated.batch_norm_backward(*arguments), exact, strict=True):
        best = relative_error(truth.to(value.dtype), truth)
        assert relative_error(value, truth) <= 2 * best + (1e-12 if dtype == torch.float64 else 1e-6)
