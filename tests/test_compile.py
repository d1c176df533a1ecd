"""torch.compile without graph breaks, for a first-order use of both ops (R is a constant or a leaf)."""

import pytest
import torch

from sib_ext import density_mask, masked_statistics
from sib_ext import functional as sib

from .compare import GRADIENTS, VALUES, assert_near
from .samples import Sample

SIZES = (Sample("first", (3, 3, 8, 9)), Sample("larger", (4, 3, 10, 7)))


def use_of_both_ops(implementation):
    def function(vjp, x):
        mask = density_mask(vjp, window=3, impl=implementation)
        moments, gram_vjp, gram_input = masked_statistics(vjp, x, mask, impl=implementation)
        background = sib.background_energy_ratio(moments, vjp.shape[1] * vjp.shape[2] * vjp.shape[3])
        return background.mean() - sib.foreground_cka(gram_vjp, gram_input)

    return function


def value_and_gradients(function, sample, layout=torch.contiguous_format):
    vjp, x, _ = sample.fields()
    leaves = [t.contiguous(memory_format=layout).requires_grad_() for t in (vjp, x)]
    value = function(*leaves)
    # Compiled backwards refuse retain_graph, so not the shared helper.
    return value, *torch.autograd.grad(value, leaves)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiled_equals_eager(implementation, backend, sizes, dynamic, **options):
    eager = use_of_both_ops(implementation)
    compiled = torch.compile(eager, fullgraph=True, backend=backend, dynamic=dynamic)
    for sample in sizes:
        found, expected = (value_and_gradients(f, sample, **options) for f in (compiled, eager))
        assert_near(found[0], expected[0], VALUES)
        for value, truth in zip(found[1:], expected[1:], strict=True):
            assert_near(value, truth, GRADIENTS)
            assert value.stride() == truth.stride()


def test_compiled_by_inductor_it_equals_eager(implementation):
    assert_compiled_equals_eager(implementation, "inductor", SIZES[:1], dynamic=None)


def test_compiled_with_dynamic_shapes_it_equals_eager_at_another_size(implementation):
    assert_compiled_equals_eager(implementation, "aot_eager", SIZES, dynamic=True)


def test_compiled_for_one_size_it_is_compiled_again_for_another(implementation):
    assert_compiled_equals_eager(implementation, "aot_eager", SIZES, dynamic=None)


def test_compiled_with_channels_last_it_equals_eager(implementation):
    options = {"layout": torch.channels_last}
    assert_compiled_equals_eager(implementation, "aot_eager", SIZES[:1], dynamic=None, **options)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_with_a_given_mask_it_equals_eager(implementation, backend):
    leaves = SIZES[0].fields().requiring_grad("vjp")

    def function(*fields):
        return masked_statistics(*fields, impl=implementation).moments.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    found, expected = (torch.autograd.grad(f(*leaves), leaves.vjp)[0] for f in (compiled, function))
    assert_near(found, expected, GRADIENTS)


def test_half_precision_compiles(implementation):
    def function(vjp, x):
        mask = density_mask(vjp, window=3, impl=implementation)
        return masked_statistics(vjp, x, mask, impl=implementation).moments

    vjp, x, _ = SIZES[0].fields(torch.bfloat16)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(vjp, x), function(vjp, x))
