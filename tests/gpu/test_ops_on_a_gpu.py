"""Both ops on a GPU, native and Triton, against the float64 formulas on the CPU."""

import gc

import pytest
import torch

from sib_ext import SpatialIBLoss, density_mask, masked_statistics, reference

from ..compare import (
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
from ..samples import (
    DTYPES,
    EMPTY,
    FIXED,
    LARGE,
    LAYOUTS,
    PLAIN,
    SAMPLES,
    Fields,
    Sample,
    laid_out,
    tiny_problem,
)

# What the CUDA kernels do in shared memory, what they do in global memory, and what has odd sizes.
PUBLISHED = Sample("published size", (6, 3, 224, 224), {"window": 31})
TOO_LARGE_FOR_SHARED_MEMORY = Sample("too large for shared memory", (2, 3, 301, 295), {"window": 41})
MASK_SAMPLES = (
    *SAMPLES,
    LARGE,
    PUBLISHED,
    TOO_LARGE_FOR_SHARED_MEMORY,
    Sample("large and wide", (1, 1, 300, 290), {"temperature": 30.0, "padding": "exclude"}),
)
STATISTICS_SAMPLES = (
    *SAMPLES,
    LARGE,
    Sample("a batch larger than a tile of 32", (35, 2, 5, 6)),
    Sample("a batch larger than a tile of 64: one pass", (67, 3, 33, 40)),
    Sample("a batch larger than one pass takes", (131, 3, 20, 24)),
    Sample("a feature map", (40, 256, 14, 14)),
    Sample("a feature map, channels last", (33, 128, 7, 7), layout="channels_last"),
    PUBLISHED,
)
WIDE_MEMORY = 60 << 30  # bytes that the test of 2^31 elements takes

each_mask_sample = pytest.mark.parametrize("sample", MASK_SAMPLES, ids=lambda s: s.name)
each_statistics_sample = pytest.mark.parametrize("sample", STATISTICS_SAMPLES, ids=lambda s: s.name)
# In float64 the eager formula is the truth itself: there only the tolerances of VALUES and GRADIENTS apply.
each_narrow_dtype = pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d).removeprefix("torch."))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def moved(tensors, device="cuda"):
    return type(tensors)(*(t.to(device) for t in tensors)) if hasattr(tensors, "_fields") else tensors.to(device)


def mask_and_gradient(vjp, sample, implementation, cotangent):
    leaf = vjp.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    mask = density_mask(leaf, **sample.options, impl=implementation)
    return mask.detach(), *gradients(mask, [leaf], cotangent)


def formula_and_gradient(vjp, sample, cotangent):
    leaf = vjp.detach().clone().requires_grad_()
    mask = reference.density_mask(leaf, *sample.positional_options)
    return mask.detach(), *gradients(mask, [leaf], cotangent.to(mask))


def statistics_and_gradients(fields, cotangents, implementation):
    leaves = Fields(*(t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in fields))
    outputs = tuple(masked_statistics(*leaves, impl=implementation))
    grads = gradients(outputs, leaves, [c.to(o) for c, o in zip(cotangents, outputs, strict=True)])
    return tuple(t.detach() for t in outputs), grads


def formula_statistics(fields, cotangents):
    wide = [reference.widen(t) for t in fields]
    cotangents = [c.to(wide[0]) for c in cotangents]
    return reference.masked_statistics(*wide), reference.masked_statistics_backward(*cotangents, *wide)


# ------------------------------------------------------------------------------------------ values, gradients


@each_mask_sample
def test_mask_and_gradient_equal_the_formula_in_float64(sample, implementation):
    vjp, cotangent = sample.fields().vjp, sample.cotangent_of_mask()
    mask, gradient = mask_and_gradient(vjp.cuda(), sample, implementation, cotangent.cuda())
    true_mask, truth = formula_and_gradient(vjp, sample, cotangent)
    assert_near(mask.cpu(), true_mask, VALUES)
    assert float((gradient.cpu() - truth).norm()) <= GRADIENTS * float(truth.norm() + cotangent.norm())


@each_narrow_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sample", [LARGE, PUBLISHED, TOO_LARGE_FOR_SHARED_MEMORY], ids=lambda s: s.name)
def test_errors_of_mask_and_gradient_are_at_most_eager_ones_in_the_same_dtype(sample, layout, dtype, implementation):
    vjp = laid_out(sample.fields(dtype).vjp, layout)
    accumulation = reference.accumulation_dtype(dtype)
    cotangent = sample.cotangent_of_mask().to(dtype)
    mask, gradient = mask_and_gradient(vjp.cuda(), sample, implementation, cotangent.cuda().to(accumulation))
    eager_mask, eager = formula_and_gradient(vjp.cuda(), sample, cotangent.cuda())
    true_mask, truth = formula_and_gradient(vjp.double(), sample, cotangent)
    epsilon = torch.finfo(accumulation).eps
    assert (
        mask.dtype == accumulation and gradient.dtype == dtype and gradient.stride(1) == 0
    )  # one plane for all channels
    assert relative_error(mask.cpu(), true_mask) <= relative_error(eager_mask.cpu(), true_mask) + 20 * epsilon
    support = overload("density_mask", implementation)(vjp.cuda(), *sample.positional_options)[1].cpu()
    near = on_support(torch.cat([support_of(vjp.double(), sample), support_of(vjp, sample), support], 2), vjp)
    eager_errors = mask_gradient_errors(eager.cpu(), truth, vjp, near)
    for error, eager_error in zip(mask_gradient_errors(gradient.cpu(), truth, vjp, near), eager_errors, strict=True):
        assert error <= eager_error + 100 * epsilon


@each_mask_sample
def test_the_support_is_the_one_of_the_formula(sample, implementation):
    vjp = sample.fields().vjp
    support = overload("density_mask", implementation)(vjp.cuda(), *sample.positional_options)[1].cpu()
    assert torch.equal(support[:, :3], support_of(vjp, sample)[:, :3])


@each_statistics_sample
def test_statistics_and_gradients_equal_the_formula_in_float64(sample, implementation):
    fields, cotangents = sample.fields(), sample.cotangents_of_statistics()
    outputs, grads = statistics_and_gradients(moved(fields), cotangents, implementation)
    true_outputs, truths = formula_statistics(fields, cotangents)
    for value, truth in zip(outputs, true_outputs, strict=True):
        assert_near(value.cpu(), truth, VALUES)
    for value, truth in zip(grads, truths, strict=True):
        assert_near(value.cpu(), truth, GRADIENTS)


@each_narrow_dtype
@each_statistics_sample
def test_errors_of_statistics_are_at_most_eager_ones_in_the_same_dtype(sample, dtype, implementation):
    fields, cotangents = sample.fields(dtype), sample.cotangents_of_statistics()
    accumulation = reference.accumulation_dtype(dtype)
    fields = Fields(fields.vjp, fields.x, fields.mask.to(accumulation))
    cotangents = [c.to(accumulation) for c in cotangents]
    found = statistics_and_gradients(moved(fields), cotangents, implementation)
    eager = formula_statistics(moved(fields), cotangents)
    truth = formula_statistics([t.double() for t in fields], cotangents)
    epsilon = 20 * torch.finfo(accumulation).eps
    for value, true, plain in zip((*found[0], *found[1]), (*truth[0], *truth[1]), (*eager[0], *eager[1]), strict=True):
        plain = plain.to(value.dtype).cpu()
        assert relative_error(value.cpu(), true) <= relative_error(plain, true) + epsilon


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_input_changes_nothing(layout, implementation):
    vjp, cotangent = LARGE.fields().vjp, LARGE.cotangent_of_mask().cuda()
    expected = mask_and_gradient(vjp.cuda(), LARGE, implementation, cotangent)
    found = mask_and_gradient(laid_out(vjp.cuda(), layout), LARGE, implementation, cotangent)
    for value, truth, tolerance in zip(found, expected, (1e-13, 1e-11), strict=True):
        assert_near(value, truth, tolerance)
    fields, cotangents = moved(LARGE.fields()), LARGE.cotangents_of_statistics()
    expected = statistics_and_gradients(fields, cotangents, implementation)
    found = statistics_and_gradients(Fields(*(laid_out(t, layout) for t in fields)), cotangents, implementation)
    for values, truths in zip(found, expected, strict=True):
        for value, truth in zip(values, truths, strict=True):
            assert_near(value, truth, 1e-12)


def test_fields_that_are_not_aligned_are_read_all_the_same(implementation):
    sample = Sample("aligned", (5, 3, 16, 24))
    fields, cotangents = sample.fields(torch.float32), sample.cotangents_of_statistics(torch.float32)

    def shifted(tensor):
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")
        storage[1:] = tensor.flatten()
        return storage[1:].view(tensor.shape)

    found = masked_statistics(*map(shifted, fields), impl=implementation)
    for value, truth in zip(found, formula_statistics(fields, cotangents)[0], strict=True):
        assert_near(value.cpu(), truth, 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sample", [LARGE, TOO_LARGE_FOR_SHARED_MEMORY], ids=lambda s: s.name)
def test_a_sample_that_is_not_finite_spoils_its_own_mask_and_no_other(sample, bad, implementation):
    vjp = sample.fields(torch.float32).vjp.cuda()
    clean = density_mask(vjp, **sample.options, impl=implementation)
    vjp[1, 1, 3, 4] = bad
    mask = density_mask(vjp, **sample.options, impl=implementation)
    assert mask[1].isnan().all() and torch.equal(mask[0], clean[0])


def test_an_empty_batch_gives_empty_results(implementation):
    fields = moved(EMPTY.fields())
    mask, gradient = mask_and_gradient(fields.vjp, EMPTY, implementation, EMPTY.cotangent_of_mask().cuda())
    outputs, grads = statistics_and_gradients(fields, EMPTY.cotangents_of_statistics(), implementation)
    shapes = [t.shape for t in (mask, gradient, *outputs, *grads)]
    assert shapes == [(0, 1, 5, 5), EMPTY.shape, (0, 9), (0, 0), (0, 0), EMPTY.shape, EMPTY.shape, (0, 1, 5, 5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, implementation):
    fields, cotangents = moved(LARGE.fields(torch.float32)), LARGE.cotangents_of_statistics(torch.float32)
    outside = statistics_and_gradients(fields, cotangents, implementation)
    with torch.autocast("cuda", dtype=dtype):
        inside = statistics_and_gradients(fields, cotangents, implementation)
    for values, expected in zip(inside, outside, strict=True):
        assert all(torch.equal(*pair) for pair in zip(values, expected, strict=True))


def test_inputs_and_cotangents_stay_as_they_are(implementation):
    fields = moved(PLAIN.fields())
    check = snapshot(fields)
    mask_and_gradient(fields.vjp, PLAIN, implementation, PLAIN.cotangent_of_mask().cuda())
    statistics_and_gradients(fields, PLAIN.cotangents_of_statistics(), implementation)
    check()


def test_opcheck_of_every_op(implementation):
    vjp, x, mask = (t.requires_grad_() for t in moved(PLAIN.fields()))
    torch.library.opcheck(overload("density_mask", implementation), (vjp, *PLAIN.positional_options))
    torch.library.opcheck(overload("masked_statistics", implementation), (vjp, x, mask, True, True))


# --------------------------------------------------------------------------------- the tail, as a step uses it


def tail(vjp, x, sample, implementation, cotangents):
    """Both ops forward, and backward to dL/dR."""
    leaf = vjp.detach().requires_grad_()
    mask = density_mask(leaf, **sample.options, impl=implementation)
    outputs = tuple(masked_statistics(leaf, x, mask, impl=implementation))
    return (mask.detach(), *(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaf, cotangents))


def tail_inputs(sample, dtype=torch.float32, device="cuda"):
    vjp, x, _ = sample.fields(dtype, device)
    cotangents = [c.to(device, reference.accumulation_dtype(dtype)) for c in sample.cotangents_of_statistics()]
    return vjp, x, cotangents


TAIL_SAMPLES = (PUBLISHED, TOO_LARGE_FOR_SHARED_MEMORY, Sample("a batch of 70", (70, 3, 56, 56), {"window": 7}))
each_tail = pytest.mark.parametrize("sample", TAIL_SAMPLES, ids=lambda s: s.name)


@each_dtype
@each_tail
def test_results_are_the_same_bit_for_bit_every_time(sample, dtype, implementation):
    vjp, x, cotangents = tail_inputs(sample, dtype)
    first = tail(vjp, x, sample, implementation, cotangents)
    for _ in range(5):
        torch.empty(1 << 22, device="cuda").normal_()  # other work moves the blocks around
        again = tail(vjp, x, sample, implementation, cotangents)
        assert all(torch.equal(*pair) for pair in zip(again, first, strict=True))


@each_tail
def test_nothing_waits_for_the_device(sample, implementation):
    vjp, x, cotangents = tail_inputs(sample)
    tail(vjp, x, sample, implementation, cotangents)  # compiles what is compiled at first use
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tail(vjp, x, sample, implementation, cotangents)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@each_tail
def test_kernels_run_on_the_current_stream(sample, implementation):
    """Inputs that arrive late on a side stream: a kernel on any other stream would read what was there before."""
    vjp, x, cotangents = tail_inputs(sample)
    expected = tail(vjp, x, sample, implementation, cotangents)
    late_vjp, late_x = torch.zeros_like(vjp), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late_vjp.copy_(vjp)
        late_x.copy_(x)
        found = tail(late_vjp, late_x, sample, implementation, cotangents)
        late_vjp.zero_()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@each_tail
def test_a_cuda_graph_captures_forward_and_backward(sample, implementation):
    vjp, x, cotangents = tail_inputs(sample)
    static_vjp, static_x = vjp.flip(0).contiguous(), x.flip(0).contiguous()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            tail(static_vjp, static_x, sample, implementation, cotangents)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tail(static_vjp, static_x, sample, implementation, cotangents)
    static_vjp.copy_(vjp)
    static_x.copy_(x)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    expected = tail(vjp, x, sample, implementation, cotangents)
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


def test_every_device_computes_what_the_first_does(implementation):
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees one GPU")
    expected = tail(*tail_inputs(PUBLISHED)[:2], PUBLISHED, implementation, tail_inputs(PUBLISHED)[2])
    for device in range(1, torch.cuda.device_count()):
        vjp, x, cotangents = tail_inputs(PUBLISHED, device=f"cuda:{device}")
        found = tail(vjp, x, PUBLISHED, implementation, cotangents)
        assert all(value.get_device() == device for value in found) and torch.cuda.current_device() == 0
        assert all(torch.equal(value.cpu(), truth.cpu()) for value, truth in zip(found, expected, strict=True))


def test_compiled_it_equals_eager(implementation):
    sample = Sample("compiled", (4, 3, 32, 30), {"window": 5})
    vjp, x, cotangents = tail_inputs(sample, torch.float64)

    def function(vjp, x):
        mask = density_mask(vjp, **sample.options, impl=implementation)
        return tuple(masked_statistics(vjp, x, mask, impl=implementation))

    compiled = torch.compile(function, fullgraph=True)
    leaves = [vjp.clone().requires_grad_() for _ in range(2)]
    for value, truth in zip(
        torch.autograd.grad(compiled(leaves[0], x), leaves[0], cotangents),
        torch.autograd.grad(function(leaves[1], x), leaves[1], cotangents),
        strict=True,
    ):
        assert_near(value, truth, GRADIENTS)
    torch.compiler.reset()


# -------------------------------------------------------------------------------------------------- large sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_of_2048_pixels_a_side(dtype, implementation):
    sample = Sample("2048", (2, 3, 2048, 2048), {"window": 63})
    vjp, x, cotangents = tail_inputs(sample, dtype)
    mask, moments, gram_vjp, gram_input, gradient = tail(vjp, x, sample, implementation, cotangents)
    wide = vjp.double()
    truth = reference.density_mask(wide, *sample.positional_options)
    assert_near(mask, truth, 1e-5 if dtype == torch.float32 else VALUES)
    truths = reference.masked_statistics(wide, x.double(), mask.double())
    for value, true in zip((moments, gram_vjp, gram_input), truths, strict=True):
        assert_near(value, true, 1e-5 if dtype == torch.float32 else VALUES)
    assert gradient.isfinite().all()


def test_more_elements_than_32_bits_can_count(implementation):
    """The last sample lies beyond 2^31 elements: it must come out as it does alone."""
    if torch.cuda.mem_get_info()[0] < WIDE_MEMORY:
        pytest.skip(f"needs {WIDE_MEMORY >> 30} GiB of free GPU memory")
    gc.collect()
    torch.cuda.empty_cache()
    sample = Sample("large", (9, 64, 2048, 2048), {"window": 31})
    generator = torch.Generator("cuda").manual_seed(0)
    vjp = torch.empty(sample.shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    x = torch.empty_like(vjp).normal_(generator=generator)
    cotangents = [c.cuda().float() for c in sample.cotangents_of_statistics()]
    cotangents[1:] = [torch.diag(c.diagonal()) for c in cotangents[1:]]  # no other sample has a part in the last one's
    mask, moments, gram_vjp, _, gradient = tail(vjp, x, sample, implementation, cotangents)
    last = slice(8, 9)
    alone = tail(
        vjp[last], x[last], sample, implementation, [cotangents[0][last], *(c[last, last] for c in cotangents[1:])]
    )
    assert torch.equal(mask[last], alone[0])
    for value, truth in ((moments[last], alone[1]), (gram_vjp[last, last], alone[2]), (gradient[last], alone[4])):
        assert_near(value.float(), truth.float(), 1e-3)


# ------------------------------------------------------------------------------------------------- a training step


@pytest.mark.parametrize(
    "options", [{"seed": "target_logit"}, FIXED, {"preset": "paper"}], ids=["balanced", "fixed", "paper"]
)
def test_a_training_step_is_the_same_on_cpu_and_gpu(options, implementation):
    results = []
    for device, impl in (("cpu", "reference"), ("cuda", implementation)):
        problem = tiny_problem(batch=6, size=16)
        model, y = problem.model.to(device), problem.y.to(device)
        x = problem.x.detach().to(device).requires_grad_()
        criterion = SpatialIBLoss(impl=impl, **options).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = criterion(model(x), y, x)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().cpu())
        results.append((torch.stack(losses), *(p.detach().cpu() for p in model.parameters())))
    for value, truth in zip(results[1], results[0], strict=True):
        assert_near(value, truth, 1e-6)
