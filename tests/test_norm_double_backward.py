"""The op norm_double_backward against PyTorch's own second derivative, in every implementation."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from sib_ext import reference
from sib_ext.ops import dispatch

from .compare import assert_near, overload, relative_error
from .samples import laid_out

EPS = 1e-3
FORMATS = list(itertools.product(("contiguous", "channels_last", "transposed"), repeat=3))
GAPS = "every second column"
# (shape, groups): None is batch normalisation.
CASES = {
    "batch": ((4, 6, 5, 7), None),
    "batch, channels_last": ((4, 6, 5, 7), None),
    "batch, channels_last, fours": ((9, 20, 6, 5), None),
    "batch, channels_last, many fours": ((3, 136, 3, 3), None),
    "batch, vectors": ((5, 3), None),
    "batch, long rows": ((2, 3, 37, 41), None),
    "batch, rows in fours": ((35, 3, 12, 12), None),
    "batch, volumes": ((2, 3, 2, 3, 4), None),
    "group": ((3, 6, 5, 7), 2),
    "group, channels_last": ((3, 6, 5, 7), 3),
    "instance": ((3, 6, 5, 7), 6),
    "layer": ((3, 6, 5, 7), 1),
}


def arguments(name, dtype=torch.float64, affine=True):
    """v, g, x, mean, rstd, weight, eps as a forward in ``dtype`` would have left them."""
    shape, groups = CASES[name]
    generator = torch.Generator().manual_seed(3)
    v, g, x = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    x = (3 * x + 1).to(dtype)
    if "channels_last" in name:
        v, g, x = (laid_out(t, "channels_last") for t in (v, g, x))
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5 if affine else None
    wide = x.to(reference.accumulation_dtype(dtype))
    if groups is None:
        variance, mean = torch.var_mean(wide, (0, *range(2, len(shape))), correction=0)
    else:
        variance, mean = torch.var_mean(wide.reshape(shape[0], groups, -1), 2, correction=0)
    return v, g, x, mean, (variance + EPS).rsqrt(), weight if weight is None else weight.to(mean.dtype), EPS


def of_pytorch(name, v, g, x, weight, dtype=torch.float64):
    """The same by autograd, twice, in ``dtype``."""
    groups = CASES[name][1]
    g, x = (t.detach().to(dtype).requires_grad_() for t in (g, x))
    weight = torch.ones(x.shape[1], dtype=dtype) if weight is None else weight.detach().to(dtype)
    weight.requires_grad_()
    if groups is None:
        y = F.batch_norm(x, None, None, weight, None, True, 0.0, EPS)
    else:
        y = F.group_norm(x, groups, weight, None, EPS)
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    return torch.autograd.grad(dx, (g, x, weight), v.to(dtype))


@pytest.mark.parametrize("affine", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_second_derivative_of_the_layer(name, affine, implementation):
    v, g, x, *statistics, weight, eps = arguments(name, affine=affine)
    results = overload("norm_double_backward", implementation)(v, g, x, *statistics, weight, eps)
    for value, truth in zip(results, of_pytorch(name, v, g, x, weight), strict=True):
        assert_near(value, truth, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["batch", "batch, long rows", "batch, channels_last, fours", "group"])
def test_it_is_no_worse_than_pytorch_in_the_same_type(name, dtype, implementation):
    v, g, x, *statistics, weight, eps = arguments(name, dtype)
    results = overload("norm_double_backward", implementation)(v, g, x, *statistics, weight, eps)
    truths = of_pytorch(name, v, g, x, weight)
    if dtype == torch.float32:
        eager = of_pytorch(name, v, g, x, weight, dtype)
    else:
        eager = [truth.to(dtype) for truth in truths]  # the best there is: one rounding of the result
    for value, of_eager, truth in zip(results, eager, truths, strict=True):
        assert relative_error(value, truth) <= 2 * relative_error(of_eager, truth) + 1e-6


def by_both(shape, layouts, native, dtype=torch.float64, affine=True):
    """x in its layout, what the native kernel gives for it, and the formula in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    v, g, x = (
        laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), layout) for layout in layouts
    )
    wide = reference.accumulation_dtype(dtype)
    mean, rstd, weight = (torch.rand(shape[1], generator=generator, dtype=torch.float64).to(wide) for _ in range(3))
    arguments = v, g, x, mean, rstd + 0.5, weight if affine else None
    found = overload("norm_double_backward", native)(*arguments, EPS)
    return x, found, reference.norm_double_backward(*(t if t is None else t.double() for t in arguments))


# Lines of one channel, of a vector's width and beside it, of more than one part and of a last line that is short.
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 33, 130])
@pytest.mark.parametrize("sizes", [(1, 5, 7), (3, 1, 1), (1, 1, 1), (2, 11, 13), (5, 40, 43)], ids=str)
def test_channels_last_fields_of_any_size(channels, sizes, native):
    batch, *sides = sizes
    for affine in (True, False):
        x, found, truth = by_both((batch, channels, *sides), ["channels_last"] * 3, native, affine=affine)
        for value, expected in zip(found, truth, strict=True):
            assert_near(value, expected, 1e-11)
        for value in found[:2]:
            assert value.is_contiguous(memory_format=dispatch.field_format(x))


@pytest.mark.parametrize("layouts", FORMATS, ids=str)
def test_fields_that_lie_differently(layouts, native):
    x, found, truth = by_both((3, 9, 6, 11), layouts, native)
    for value, expected in zip(found, truth, strict=True):
        assert_near(value, expected, 1e-11)
    for value in found[:2]:
        assert value.is_contiguous(memory_format=dispatch.field_format(x))


@pytest.mark.parametrize("layouts", [(GAPS, GAPS, GAPS), ("channels_last", GAPS, "channels_last")], ids=str)
def test_fields_with_gaps(layouts, native):
    _, found, truth = by_both((3, 9, 6, 11), layouts, native)
    for value, expected in zip(found, truth, strict=True):
        assert_near(value, expected, 1e-11)


def test_channels_last_fields_with_gaps_between_positions(native):
    v, g, x, *statistics, weight, eps = arguments("batch, channels_last, many fours")
    spread = (torch.cat((t, torch.full_like(t, float("nan"))), 1)[:, : t.shape[1]] for t in (v, g, x))
    op = overload("norm_double_backward", native)
    found, expected = op(*spread, *statistics, weight, eps), op(v, g, x, *statistics, weight, eps)
    for value, of_dense in zip(found, expected, strict=True):
        assert_near(value, of_dense, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 33, 20, 43), (2, 3, 37, 41)], ids=str)
def test_channels_last_fields_in_narrow_types_round_as_the_contiguous_ones_do(dtype, shape, native):
    _, found, truth = by_both(shape, ["channels_last"] * 3, native, dtype)
    _, contiguous, _ = by_both(shape, ["contiguous"] * 3, native, dtype)
    for value, other, expected in zip(found, contiguous, truth, strict=True):
        assert value.dtype == other.dtype
        assert relative_error(value, expected) <= 1.5 * relative_error(other, expected) + 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_an_empty_batch_gives_empty_gradients(shape, layout, implementation):
    empty = laid_out(torch.empty(shape), layout)
    statistics = torch.zeros(3), torch.ones(3)
    results = overload("norm_double_backward", implementation)(empty, empty, empty, *statistics, torch.ones(3), EPS)
    assert [tuple(t.shape) for t in results] == [shape, shape, (3,)]
    assert not results[2].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_native_kernel_gives_the_same_bits_with_any_number_of_threads(layout, native, threads):
    v, g, x, *others = arguments("batch, long rows", torch.float32)
    values = *(laid_out(t, layout) for t in (v, g, x)), *others
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(overload("norm_double_backward", native)(*values))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["batch", "group"])
def test_it_is_differentiable_with_the_statistics_following_x(name, overload_name):
    """The third derivative of the layer: what the op gives, differentiated, against autograd three times."""
    groups = CASES[name][1]
    v, g, x, *_, weight, eps = (
        t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments(name)
    )
    shape = CASES[name][0]

    def by_op(v, g, x, weight):
        wide = x.detach()
        dims = (0, 2, 3) if groups is None else 2
        wide = wide if groups is None else wide.reshape(shape[0], groups, -1)
        variance, mean = torch.var_mean(wide, dims, correction=0)
        op = getattr(torch.ops.sib_ext.norm_double_backward, overload_name)
        return op(v, g, x, mean, (variance + eps).rsqrt(), weight, eps)

    def by_autograd(v, g, x, weight):
        # Elementary operations: PyTorch's third derivative of batch_norm takes the statistics for constants.
        wide = x if groups is None else x.reshape(shape[0], groups, -1)
        dims = (0, 2, 3) if groups is None else 2
        variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
        xhat = ((wide - mean) * (variance + eps).rsqrt()).reshape(shape)
        (dx,) = torch.autograd.grad(xhat * weight.view(1, -1, 1, 1), x, g, create_graph=True)
        return torch.autograd.grad(dx, (g, x, weight), v, create_graph=True)

    inputs = (v, g, x, weight)
    cotangents = [torch.randn_like(t) for t in by_op(*inputs)]
    found = torch.autograd.grad(by_op(*inputs), inputs, cotangents)
    truth = torch.autograd.grad(by_autograd(*inputs), inputs, cotangents)
    for value, expected in zip(found, truth, strict=True):
        assert_near(value, expected, 1e-9)


@pytest.mark.parametrize("name", ["batch", "batch, channels_last, fours", "group"])
@pytest.mark.parametrize("affine", [True, False], ids=["weight", "no weight"])
def test_opcheck(name, affine, overload_name):
    v, g, x, mean, rstd, weight, eps = arguments(name, affine=affine)
    wanted = [None if t is None else t.requires_grad_() for t in (v, g, x, weight)]
    op = getattr(torch.ops.sib_ext.norm_double_backward, overload_name)
    torch.library.opcheck(op, (*wanted[:3], mean, rstd, wanted[3], eps))


def test_wrong_sizes_are_named(native):
    v, g, x, mean, rstd, weight, eps = arguments("batch")
    op = overload("norm_double_backward", native)
    with pytest.raises(RuntimeError, match="grad must have the size of x"):
        op(v, g[:2], x, mean, rstd, weight, eps)
    with pytest.raises(RuntimeError, match=r"mean must be \[C\]"):
        op(v, g, x, mean[:2], rstd[:2], weight, eps)
    with pytest.raises(RuntimeError, match="weight must be"):
        op(v, g, x, mean, rstd, weight.float(), eps)
