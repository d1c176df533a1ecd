"""Layers recorded by fused_double_backward: the same values and derivatives as PyTorch's, of first and second order."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sib_ext import SpatialIBLoss
from sib_ext.fused_layers import _Convolution, fused_double_backward, input_gradients

from .compare import assert_near
from .samples import FIXED


def conv(cls=nn.Conv2d, *arguments, **options):
    return lambda: cls(*arguments, **options)


LAYERS = {
    "conv": (conv(nn.Conv2d, 4, 6, 3), (2, 4, 7, 8)),
    "conv with stride, padding, dilation": (conv(nn.Conv2d, 4, 6, (3, 2), 2, (1, 2), 2), (2, 4, 9, 8)),
    "first conv": (conv(nn.Conv2d, 3, 6, 7, 2, 3), (2, 3, 13, 12)),
    "first conv of patches": (conv(nn.Conv2d, 3, 6, 4, 4), (2, 3, 12, 8)),
    "first conv that leaves a border": (conv(nn.Conv2d, 1, 6, (2, 3), 3, (0, 1)), (2, 1, 10, 12)),
    "depthwise conv": (conv(nn.Conv2d, 4, 4, 3, padding=1, groups=4, bias=False), (2, 4, 6, 6)),
    "conv with same padding": (conv(nn.Conv2d, 4, 6, 3, padding="same"), (2, 4, 6, 6)),
    "conv with reflected padding": (conv(nn.Conv2d, 4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "conv of one image": (conv(nn.Conv2d, 4, 6, 3), (4, 7, 8)),
    "conv1d": (conv(nn.Conv1d, 4, 6, 3, 2), (2, 4, 9)),
    "conv3d": (conv(nn.Conv3d, 2, 3, 2), (2, 2, 3, 4, 4)),
    "batch norm": (conv(nn.BatchNorm2d, 4), (3, 4, 5, 6)),
    "batch norm without scale": (conv(nn.BatchNorm2d, 4, affine=False), (3, 4, 5, 6)),
    "batch norm without statistics": (conv(nn.BatchNorm2d, 4, track_running_stats=False), (3, 4, 5, 6)),
    "batch norm of vectors": (conv(nn.BatchNorm1d, 4), (6, 4)),
    "batch norm with a cumulative average": (conv(nn.BatchNorm2d, 4, momentum=None), (3, 4, 5, 6)),
    "group norm": (conv(nn.GroupNorm, 2, 4), (3, 4, 5, 6)),
    "group norm without scale": (conv(nn.GroupNorm, 4, 4, affine=False), (3, 4, 5, 6)),
}


@pytest.fixture(params=LAYERS)
def layer_and_x(request):
    make, shape = LAYERS[request.param]
    layer = make().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, torch.randn(shape, dtype=torch.float64, requires_grad=True)


def derivatives(layer, x, fused):
    """Values, the first derivatives, and the derivatives of a function of the input gradient."""
    layer = copy.deepcopy(layer)  # each with running statistics of its own
    inputs = (x, *layer.parameters())
    if fused:
        with fused_double_backward():
            y = layer(x)
    else:
        y = layer(x)
    first = torch.autograd.grad(y.sin().sum(), inputs, retain_graph=True)
    (dx,) = input_gradients((y,), (y.detach().cos(),), (x,))
    second = torch.autograd.grad((dx**3).sum(), inputs, allow_unused=True, materialize_grads=True)
    return y, *first, *second, *layer.buffers()


def test_values_and_derivatives_are_those_of_pytorch(layer_and_x):
    layer, x = layer_and_x
    for value, truth in zip(derivatives(layer, x, True), derivatives(layer, x, False), strict=True):
        assert_near(value, truth, 1e-12)


def test_gradcheck_and_gradgradcheck(layer_and_x):
    """Outside of a VJP, with every input and parameter: PyTorch's own second derivative behind our first."""
    layer, x = layer_and_x
    names, values = zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else ((), ())

    def function(x, *values):
        with fused_double_backward():
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(v.detach().clone().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_images_get_no_gradient_but_their_vjp_and_the_parameters_all_of_theirs(bias):
    """Of a convolution of their copy; a second copy, through another function, gets it as ever."""
    layer = nn.Conv2d(3, 4, 3, bias=bias).double()
    images = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)

    def gradients(images, fused):
        with fused_double_backward(images=images) if fused else contextlib.nullcontext():
            y = layer(images.clone())
        (vjp,) = input_gradients((y,), (y.detach().cos(),), (images,))
        layer.zero_grad()
        (y.sin().sum() + (vjp**3).sum()).backward()
        return vjp, *(p.grad for p in layer.parameters())

    exact = images.detach().requires_grad_()
    for value, truth in zip(gradients(images, True), gradients(exact, False), strict=True):
        assert_near(value, truth, 1e-12)
    assert images.grad is None and exact.grad is not None
    with fused_double_backward(images=images):
        y = layer(images * 1.0)
    y.sum().backward()
    assert images.grad is not None


def test_a_model_may_differentiate_by_its_own_input():
    """An energy's gradient inside the forward pass, with a second path from the images: all of it."""
    layer = nn.Conv2d(3, 4, 3).double()
    images = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)

    def score(x):
        energy = layer(x).tanh().square().sum() + x.square().sum()
        (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return layer(slope).square().mean()

    def gradients(mode):
        with mode:
            s = score(images.clone())
        (vjp,) = input_gradients((s,), (torch.ones_like(s),), (images,))
        layer.zero_grad()
        (s + vjp.square().sum()).backward()
        return s.detach(), vjp.detach(), *(p.grad.clone() for p in layer.parameters())

    found = gradients(fused_double_backward(images=images))
    for value, truth in zip(found, gradients(contextlib.nullcontext()), strict=True):
        assert_near(value, truth, 1e-10)


def test_gradcheck_of_the_vjp(layer_and_x):
    """The path of the S-IB loss: an input gradient as a function of input, cotangent and parameters."""
    layer, x = layer_and_x
    names, values = zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else ((), ())
    cotangent = torch.randn_like(layer(x)).requires_grad_()

    def function(x, cotangent, *values):
        with fused_double_backward():
            y = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return input_gradients((y,), (cotangent,), (x,))[0]

    inputs = (x, cotangent, *(v.detach().clone().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(function, inputs)
    if not isinstance(layer, nn.modules.conv._ConvNd):  # a convolution's input gradient does not depend on x
        assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4)


@pytest.mark.parametrize("kind", ["conv", "batch norm", "group norm"])
def test_a_vjp_follows_weights_that_are_computed_from_x(kind):
    """Dynamic convolutions and conditional normalisation: R has a path through the weights, too."""
    F = nn.functional
    mixing = torch.randn(4, 4 * 4 * 9 if kind == "conv" else 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)

    def model():
        weight = (x.mean((0, 2, 3)) @ mixing).tanh()
        if kind == "conv":
            return F.conv2d(x, weight.view(4, 4, 3, 3))
        if kind == "batch norm":
            return F.batch_norm(x, None, None, weight, weight, True)
        return F.group_norm(x, 2, weight, weight)

    found = []
    for fused in (True, False):
        if fused:
            with fused_double_backward():
                y = model()
        else:
            y = model()
        (R,) = input_gradients((y.sin(),), (torch.ones_like(y),), (x,))
        found.append((R, *torch.autograd.grad((R**3).sum(), (x, mixing))))
    for value, truth in zip(*found, strict=True):
        assert_near(value, truth, 1e-12)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def loss_gradients(model, x, y, fused, dtype=None):
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        if fused:
            with fused_double_backward():
                logits = model(x)
        else:
            logits = model(x)
        loss = SpatialIBLoss(**FIXED)(logits, y, x)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_loss_has_the_same_parameter_gradients(memory_format):
    model = network().double().to(memory_format=memory_format)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).to(memory_format=memory_format)
    y = torch.tensor([0, 1, 2, 3])
    (loss, grads), (expected, truths) = (loss_gradients(model, x, y, fused) for fused in (True, False))
    assert_near(loss, expected, 1e-12)
    for grad, truth in zip(grads, truths, strict=True):
        assert_near(grad, truth, 1e-10)


def test_frozen_parameters_stay_frozen():
    model = network().double()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    (_, grads), (_, truths) = (loss_gradients(model, x, y, fused) for fused in (True, False))
    assert model[0].weight.grad is None
    for grad, truth in zip(grads, truths, strict=True):
        assert_near(grad, truth, 1e-10)


def test_autocast_keeps_its_types_and_its_accuracy():
    model, x, y = network(), torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    with torch.autocast("cpu", dtype=torch.bfloat16), fused_double_backward():
        assert model[0](x).dtype == torch.bfloat16
    exact = torch.cat([g.flatten() for g in loss_gradients(model.double(), x.double(), y, False)[1]])
    model.float()

    def error(fused):
        grads = loss_gradients(model, x, y, fused, torch.bfloat16)[1]
        return (torch.cat([g.flatten() for g in grads]) - exact).norm() / exact.norm()

    assert error(True) < 1.5 * error(False) + 1e-3


def test_layers_are_only_recorded_where_it_pays():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5)
    with fused_double_backward():
        assert isinstance(layer(x).grad_fn, _Convolution._backward_cls)
        with torch.no_grad():
            assert layer(x).grad_fn is None
        assert "Convolution" in type(layer(x.expand(2, 3, 5, 5)).grad_fn).__name__
        evaluated = nn.BatchNorm2d(3).eval()(x)
        assert type(evaluated.grad_fn).__name__ == "NativeBatchNormBackward0"
    assert type(layer(x).grad_fn).__name__ == "ConvolutionBackward0"


def test_errors_are_those_of_pytorch():
    x = torch.randn(1, 4, 1, 1)
    with fused_double_backward():
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            nn.BatchNorm2d(4)(x)
        with pytest.raises(RuntimeError, match="divisible"):
            torch.nn.functional.group_norm(x.expand(2, 4, 2, 2), 3)
        with pytest.raises(RuntimeError, match="channels"):
            nn.Conv2d(3, 4, 1)(x)


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
    "additive mask": {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5).double()},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
    "dropout": {"dropout_p": 0.4},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_that_of_pytorchs_math_kernel(name):
    heads = 2 if name == "grouped" else 4
    q, k, v = (torch.randn(2, h, 5, 3, dtype=torch.float64, requires_grad=True) for h in (4, heads, heads))
    found = []
    for context in (fused_double_backward(), sdpa_kernel(SDPBackend.MATH)):
        torch.manual_seed(1)
        with context:
            y = nn.functional.scaled_dot_product_attention(q, k, v, **ATTENTION[name])
        (R,) = torch.autograd.grad(y.sin().sum(), q, create_graph=True)
        found.append((y, R, *torch.autograd.grad((R**3).sum(), (q, k, v))))
    for value, truth in zip(*found, strict=True):
        assert_near(value, truth, 1e-12)


def test_attention_under_autocast_has_the_type_that_pytorch_gives_it():
    q = torch.randn(2, 4, 5, 3)
    mask = torch.randn(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        plain = nn.functional.scaled_dot_product_attention(q, q, q, mask)
        with fused_double_backward():
            ours = nn.functional.scaled_dot_product_attention(q, q, q, mask)
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert_near(ours, plain, 1e-2)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [None, "padding", "causal"])
def test_multi_head_attention_is_pytorchs(need_weights, masked):
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    options = {"need_weights": need_weights}
    if masked == "padding":
        options["key_padding_mask"] = torch.arange(5).expand(3, 5) > 3
    if masked == "causal":
        options |= {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5).double(), "is_causal": True}
    with sdpa_kernel(SDPBackend.MATH):
        y, weights = layer(x, x, x, **options)
    with fused_double_backward():
        ours, of_ours = layer(x, x, x, **options)
    assert_near(ours, y, 1e-12)
    assert (of_ours is None) == (weights is None) == (not need_weights)
    if need_weights:
        assert_near(of_ours, weights, 1e-12)
