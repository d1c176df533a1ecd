"""check_double_backward: each trap alone in a small network is found, named and given its fix; healthy ones pass."""

import itertools
import random
import re

import numpy
import pytest
import torch
from torch import nn
from torch.autograd import Function, gradgradcheck
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sib_ext import check_double_backward

from .compare import snapshot

WIDTH = 4


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


class Network(nn.Module):
    """Smooth and healthy but for ``trap``, which maps [B,4,8,8] to the same."""

    def __init__(self, trap):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.SiLU())
        self.trap = trap
        self.last = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), nn.GELU())
        self.head = Head()

    def forward(self, x):
        return self.head(self.last(self.trap(self.stem(x))))


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


def statuses(report) -> dict[str, str]:
    return {f.module: f.status for f in report.findings}


def blamed(report) -> list[str]:
    return [f.module for f in report.failures if f.module]


# ------------------------------------------------------------------------------------------------------- modules


class Cube(Function):
    """x^3 with a backward that PyTorch can differentiate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class CubeOnce(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class CubeDetached(Cube):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * gradient


class CubeWithConstant(Function):
    """What the forward computed on the way is a constant for the backward's derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return ctx.slope * gradient


class CubeInNumpy(Cube):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * gradient.detach().numpy())


class Refuse(Function):
    @staticmethod
    def forward(ctx, gradient):
        return gradient.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no second derivative in this precision")


class OnceInFloat32(Function):
    """Like a fused kernel that is not used for float64."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Refuse.apply(gradient) if gradient.dtype == torch.float32 else gradient


class RoundedFunction(Function):
    """Computes in float32 whatever it is given, in a way that a cast does not show."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.empty(x.shape, dtype=torch.float32).copy_(x) ** 3 + torch.zeros_like(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).mT
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mT.unflatten(2, x.shape[2:])


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return self.rnn(x.flatten(2).mT)[0].mT.unflatten(2, x.shape[2:])


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


class Gate(nn.Module):
    """A healthy child, and a functional call in the forward that is not."""

    def __init__(self, gate):
        super().__init__()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 1)
        self.gate = gate

    def forward(self, x):
        return x * self.gate(self.mix(x))


def in_place_after_hook():
    """The hook makes the convolution's output a view, which the ReLU then overwrites."""
    block = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(inplace=True))
    block[0].register_full_backward_hook(lambda *_: None)
    return block


def detaching_hook():
    block = nn.Conv2d(WIDTH, WIDTH, 1)
    block.register_forward_hook(lambda module, inputs, output: output * output.detach().sigmoid())
    return block


def zero_gain():
    block = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 1))
    nn.init.zeros_(block[0].weight)
    return block


class PythonDropout(nn.Module):
    def forward(self, x):
        return x * (2 if random.random() < 0.5 else 1) * numpy.random.rand()


class Counting(nn.Module):
    """Its output depends on how often it ran."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x * self.count


def run_once(block):
    block(torch.randn(2, WIDTH, 8, 8))
    return block


# --------------------------------------------------------------------------------------------- healthy networks

HEALTHY = {
    "nothing": nn.Identity,
    "ReLU and maximum": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU()),
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "hardswish": nn.Hardswish,
    "GroupNorm": lambda: nn.GroupNorm(2, WIDTH),
    "dropout": lambda: nn.Dropout(0.5),
    "dropout of channels": lambda: nn.Dropout2d(0.5),
    "Python's and numpy's random numbers": PythonDropout,
    "custom Function with a differentiable backward": lambda: Do(Cube.apply),
    "checkpointing without reentry": lambda: Checkpointed(use_reentrant=False),
    "GRU": lambda: Recurrent(nn.GRU),
    "attention with weights": lambda: Do(lambda x: torch.softmax(x @ x.mT, -1) @ x),
    "casts to float32": lambda: Do(lambda x: (x.float() * torch.ones(1) + torch.zeros(1)).to(x.dtype)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "weight_norm by hooks, after a forward": lambda: run_once(nn.utils.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1))),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "spectral_norm by hooks": lambda: nn.utils.spectral_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    "buffer that changes": Counting,
    "zero gain": zero_gain,
    "frozen layer": lambda: nn.Conv2d(WIDTH, WIDTH, 1).requires_grad_(False),
    "argmax on a side branch": lambda: Do(lambda x: x + F.one_hot(x.argmax(1), WIDTH).movedim(-1, 1)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("trap", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_network_passes(trap, x):
    report = check_double_backward(Network(trap()), x)
    assert report.ok and report.verified and report.failures == (), report
    assert report.findings[0].error < 1e-5
    assert report.raise_for_failure() is report


# One of each kind in torch.nn that keeps [B,4,8,8] images images.
LAYERS = [
    *(nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.RReLU(), nn.ELU(0.5), nn.SELU(), nn.CELU(), nn.GELU(), nn.Mish()),
    *(nn.GELU("tanh"), nn.Hardtanh(), nn.Hardshrink(0.1), nn.Softshrink(0.1), nn.Threshold(0.1, 0.2), nn.Softplus()),
    *(nn.Softsign(), nn.Tanh(), nn.Tanhshrink(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softmax(1), nn.LogSoftmax(1)),
    *(nn.Softmin(1), nn.Softmax2d(), nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(), nn.InstanceNorm2d(4)),
    *(nn.LayerNorm(8), nn.RMSNorm(8), nn.LocalResponseNorm(2), nn.Conv2d(4, 4, 3, groups=2, dilation=2)),
    *(nn.ConvTranspose2d(4, 4, 3), nn.Linear(8, 8), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(5)),
    *(nn.AdaptiveAvgPool2d(5), nn.LPPool2d(2, 2), nn.FractionalMaxPool2d(2, 5), nn.ZeroPad2d(1), nn.ReflectionPad2d(1)),
    *(nn.ReplicationPad2d(1), nn.CircularPad2d(1), nn.Upsample(scale_factor=2), nn.ChannelShuffle(2)),
    *(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=2, mode="bicubic")),
    *(nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)), nn.Sequential(nn.Unfold(3), nn.Fold(8, 3))),
    *(nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Sequential(nn.Conv2d(4, 8, 1), nn.GLU(1)), Recurrent(nn.RNN)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_the_layers_of_torch_nn_are_differentiable_twice(layer, x):
    report = check_double_backward(Network(layer), x)
    assert report.verified, report


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_precision_and_mode_can_be_checked(mode, dtype, x):
    model = getattr(Network(nn.Dropout()), mode)().to(dtype)
    assert check_double_backward(model, x.to(dtype)).verified


def test_autocast_is_respected_and_does_not_disturb_the_comparison(x):
    seen = []

    class Noting(nn.Module):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return x

    model = Network(Noting())
    with torch.autocast("cpu", torch.bfloat16):
        assert check_double_backward(model, x).verified
    assert set(seen) == {True, False}


# ---------------------------------------------------------------------------------------------------------- traps

# module, status, what the reason and the fix say
TRAPS = {
    "hardsigmoid": (nn.Hardsigmoid, "fails", "hardsigmoid", "relu6"),
    "cdist": (lambda: Do(lambda x: torch.cdist(x, x.flip(1))), "fails", "cdist", "use_mm_for_euclid_dist"),
    "pdist": (
        lambda: Do(lambda x: x * F.pdist(x.flatten(1)).mean()),
        "fails",
        "pdist",
        "norm",
    ),
    "grid_sample": (
        lambda: Do(lambda x: F.grid_sample(x, torch.full((2, 8, 8, 2), 0.1, dtype=x.dtype), align_corners=False)),
        "fails",
        "grid_sample",
        "indexing",
    ),
    "reentrant checkpointing": (lambda: Checkpointed(use_reentrant=True), "fails", "reentrant", "use_reentrant=False"),
    "once_differentiable": (lambda: Do(CubeOnce.apply), "fails", "once_differentiable.*CubeOnce", "differentiable"),
    "Function that detaches": (
        lambda: Do(CubeDetached.apply),
        "silently wrong",
        "CubeDetached.*detaches",
        "saved_tensors",
    ),
    "Function with a saved constant": (
        lambda: Do(CubeWithConstant.apply),
        "silently wrong",
        "CubeWithConstant.*kept on ctx",
        "gradgradcheck",
    ),
    "Function outside of torch": (lambda: Do(CubeInNumpy.apply), "silently wrong", "CubeInNumpy", "gradgradcheck"),
    "detach in the forward": (
        lambda: Do(lambda x: x * x.detach().sigmoid()),
        "silently wrong",
        "not the derivative of its forward.*detached",
        "detach",
    ),
    "detach in a hook": (detaching_hook, "silently wrong", "not the derivative of its forward.*detached", "hooks"),
    "straight-through rounding": (
        lambda: Do(lambda x: x + (x.round() - x).detach()),
        "silently wrong",
        "not the derivative of its forward.*rounded",
        "straight-through",
    ),
    "in-place change of a saved result": (
        lambda: Do(lambda x: x.sigmoid().add_(1)),
        "fails",
        "in-place",
        "inplace=False",
    ),
    "in-place ReLU after a hook": (in_place_after_hook, "fails", "in-place.*hook", "inplace=False"),
    "argmax": (
        lambda: Do(lambda x: F.one_hot(x.argmax(1), WIDTH).movedim(-1, 1).to(x.dtype)),
        "fails",
        "argmax",
        "detach",
    ),
    "rounding": (lambda: Do(torch.round), "fails", "rounding", "straight-through"),
    "detach of everything": (lambda: Do(torch.detach), "fails", "no gradient flows", "detach"),
    "no_grad": (lambda: Do(torch.no_grad()(torch.tanh)), "fails", "no gradient flows", "no_grad"),
    "root of zero": (lambda: Do(lambda x: x.relu().sqrt()), "fails", "NaN or infinite", "eps"),
    "kernel for float32 alone": (lambda: Do(OnceInFloat32.apply), "fails", "OnceInFloat32", "gradgradcheck"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(WIDTH), "fails", "several processes", "nn.BatchNorm2d"),
    "compiled part": (lambda: torch.compile(nn.Conv2d(WIDTH, WIDTH, 1)), "fails", "compiled", "torch.compile"),
}


def matches(pattern: str, text: str) -> bool:

    return re.search(pattern, text, re.DOTALL) is not None


@pytest.mark.parametrize("trap, status, reason, fix", TRAPS.values(), ids=TRAPS)
def test_a_trap_is_found_and_named_with_its_fix(trap, status, reason, fix, x):
    report = check_double_backward(Network(trap()), x)
    assert not report.ok and not report.verified
    assert blamed(report) == ["trap"]
    found = report.failures[-1]
    assert found.status == report.findings[0].status == status
    assert matches(reason, found.reason) and matches(fix, found.fix), found
    assert "because of trap" in report.findings[0].reason
    assert all(f.status == "ok" for f in report.findings if f.module not in ("", "trap"))
    with pytest.raises(RuntimeError, match="trap"):
        report.raise_for_failure()


@pytest.mark.parametrize("function", [Cube, CubeDetached, CubeWithConstant, CubeInNumpy])
def test_gradgradcheck_agrees_on_custom_functions(function, x):
    """An oracle from elsewhere for what counts as silently wrong."""
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)
    right = gradgradcheck(function.apply, values, raise_exception=False)
    assert right == check_double_backward(Network(Do(function.apply)), x).ok == (function is Cube)


def test_fused_attention_fails_and_the_math_kernel_is_the_fix(x):
    model = Network(Attention())
    report = check_double_backward(model, x)
    assert blamed(report) == ["trap.attention"]
    assert "fused attention" in report.failures[-1].reason and "SDPBackend.MATH" in report.failures[-1].fix
    with sdpa_kernel(SDPBackend.MATH):
        assert check_double_backward(model, x).verified


def test_attention_that_only_dropout_saves_passes_with_a_word_about_it(x):
    class WithDropout(Attention):
        def __init__(self):
            super().__init__()
            self.attention.dropout = 0.1

    report = check_double_backward(Network(WithDropout()), x)
    assert report.verified and report.findings[-1].module == "trap.attention"
    assert "MATH" in report.findings[-1].fix


def test_functional_attention_is_blamed_on_the_module_that_calls_it(x):
    gate = Gate(lambda x: F.scaled_dot_product_attention(x, x, x))
    report = check_double_backward(Network(nn.Sequential(nn.Tanh(), nn.Sequential(gate))), x)
    assert blamed(report) == ["trap.1.0"]
    assert statuses(report)["trap.1.0.mix"] == "ok" and report.failures[-1].type == "Gate"


def test_an_error_of_two_percent_is_found(x):
    weak = Do(lambda x: x**3 + 0.02 * CubeDetached.apply(x))
    report = check_double_backward(Network(weak), x)
    assert blamed(report) == ["trap"] and report.failures[-1].error < 0.1


def test_several_traps_are_all_named_and_healthy_modules_are_cleared(x):
    model = Network(nn.Sequential(nn.Tanh(), nn.Hardsigmoid(), nn.Conv2d(WIDTH, WIDTH, 1), Do(CubeDetached.apply)))
    report = check_double_backward(model, x)
    assert blamed(report) == ["trap.1", "trap.3"]
    assert [statuses(report)[n] for n in ("trap.0", "trap.1", "trap.2", "trap.3")] == ["ok", "fails", "ok"] + [
        "silently wrong"
    ]
    assert {"stem", "last", "head"} <= statuses(report).keys()


def test_a_module_used_twice_is_tried_with_each_shape_that_it_received(x):
    """cdist takes another, differentiable route above 25 rows."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.distance = Do(lambda x: torch.cdist(x, x.flip(-2)))

        def forward(self, x):
            rows = x.flatten(2).mT
            return x * self.distance(rows).mean() + self.distance(x).mean()

    assert blamed(check_double_backward(Network(Twice()), x)) == ["trap.distance"]


def test_a_silent_error_behind_a_residual_branch_of_zero_gain_is_found(x):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(()))
            self.cube = Do(CubeDetached.apply)

        def forward(self, x):
            return x + self.gain * self.cube(x)

    assert blamed(check_double_backward(Network(Branch()), x)) == ["trap.cube"]


def test_a_head_of_zeros_passes_with_a_word_about_it(x):
    model = Network(nn.Tanh())
    nn.init.zeros_(model.head.linear.weight)
    report = check_double_backward(model, x)
    assert report.verified and "VJP is zero at the present parameters" in str(report)


def test_a_first_layer_that_overwrites_x_is_blamed_on_the_model(x):
    model = nn.Sequential(nn.ReLU(inplace=True), Network(nn.Identity()))
    report = check_double_backward(model, x)
    assert [f.module for f in report.failures] == [""] and "in-place" in report.failures[0].reason


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: m.compile() or m], ids=["torch.compile", "compile()"])
def test_a_compiled_model_fails_as_such_and_is_checked_underneath(wrap, x):
    report = check_double_backward(wrap(Network(nn.Identity())), x)
    assert [f.module for f in report.failures] == [""] and "compiled" in report.failures[0].reason
    report = check_double_backward(wrap(Network(nn.Hardsigmoid())), x)
    assert "trap" in blamed(report)


def test_a_data_parallel_model_is_unwrapped(x):
    assert blamed(check_double_backward(nn.DataParallel(Network(nn.Hardsigmoid())), x)) == ["trap"]


def test_recurrent_layers_pass_here_with_a_word_about_gpus(x):
    report = check_double_backward(Network(Recurrent()), x)
    assert report.verified
    assert [(f.module, f.status) for f in report.findings] == [("", "ok"), ("trap.rnn", "ok")]
    assert "cudnn.flags(enabled=False)" in report.findings[1].fix and "GPU" in str(report)


@pytest.mark.parametrize(
    "message, fix",
    [
        ("derivative for aten::_scaled_dot_product_efficient_attention_backward is not implemented", "MATH"),
        ("the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not", "cudnn.flags"),
        ("derivative for batch_norm_backward_elemt is not implemented", "BatchNorm2d"),
        ("torch.compile with aot_autograd does not currently support double backward", "torch.compile"),
        ("derivative for aten::some_op_backward is not implemented", "differentiates twice"),
        ("anything else", "differentiates twice"),
    ],
)
def test_errors_that_only_a_gpu_or_a_compiler_raises_are_known(message, fix, x):
    def refuse(gradient):
        if gradient.grad_fn is not None:  # not while the network is merely run
            raise RuntimeError(message)

    class Hooked(nn.Module):
        def forward(self, x):
            y = x.tanh()
            if y.requires_grad:
                y.register_hook(refuse)
            return y

    found = check_double_backward(Network(Hooked()), x).failures[-1]
    assert (found.module, found.status) == ("trap", "fails") and fix in found.fix, found
    if "some_op" in message:
        assert found.reason.startswith("some_op has no second derivative")


# ----------------------------------------------------------------------------------------- what cannot be verified


def sawtooth(x):
    """Kinks 1e-9 apart: every step crosses many."""
    return ((x * 1e9) % 2 - 1).abs() / 1e9 + x


def test_kinks_denser_than_any_step_are_not_called_wrong(x):
    report = check_double_backward(Network(Do(sawtooth)).double(), x.double())
    assert report.ok and not report.verified and "could not be verified" in str(report)
    assert report.findings[0].status == "unverified"


def test_noise_that_no_seed_governs_is_not_called_wrong(x):
    count = itertools.count()
    report = check_double_backward(Network(Do(lambda x: x * (1 + 1e-3 * (next(count) % 7)))), x)
    assert report.ok and not report.verified


def test_hidden_float32_is_not_called_wrong(x):
    report = check_double_backward(Network(Do(RoundedFunction.apply)), x)
    assert report.ok and not report.verified and "less than float64" in str(report)


def test_a_model_that_only_runs_in_float32_is_checked_as_far_as_possible(x):
    def only_float32(x):
        if x.dtype == torch.float64:
            raise TypeError("float32 please")
        return x.tanh()

    report = check_double_backward(Network(Do(only_float32)), x)
    assert report.ok and not report.verified and "float32 please" in str(report)
    report = check_double_backward(Network(nn.Sequential(Do(only_float32), nn.Hardsigmoid())), x)
    assert blamed(report) == ["trap.1"]


# ---------------------------------------------------------------------------------------------- nothing is touched


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())


@pytest.mark.parametrize("trap", [nn.Dropout, nn.Hardsigmoid, PythonDropout], ids=["healthy", "trap", "Python"])
def test_the_model_and_the_world_stay_as_they_were(trap, x):
    model = Network(trap())
    model.stem.eval()
    model.last[0].weight.requires_grad_(False)
    model.head.linear.bias.grad = torch.ones(3)
    handle = model.head.register_forward_hook(lambda *_: None)
    x.requires_grad_()
    unchanged = snapshot([*model.parameters(), *model.buffers(), model.head.linear.bias.grad, x])
    modes = [m.training for m in model.modules()]
    states = random_states()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    check_double_backward(model, x)
    unchanged()
    assert random_states() == states
    assert [m.training for m in model.modules()] == modes
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.linear.bias"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["last.0.weight"]
    assert x.grad is None and x.requires_grad
    assert torch.get_default_dtype() == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    handle.remove()


def test_the_random_numbers_go_on_as_before_even_after_an_error(x):
    model = Network(nn.Linear(3, 3))
    states = random_states()
    with pytest.raises(ValueError):
        check_double_backward(model, x)
    assert random_states() == states


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(switch, x):
    model = Network(nn.Identity())
    with switch():
        assert check_double_backward(model, x.clone()).verified
        assert not torch.is_grad_enabled()


def test_the_same_answer_twice(x):
    model = Network(nn.Dropout())
    assert str(check_double_backward(model, x)) == str(check_double_backward(model, x))


# --------------------------------------------------------------------------------------------------- wrong arguments


class Keeping(nn.Module):
    """Like a network that keeps its features for a picture."""

    def forward(self, x):
        self.last, self.features = x.exp(), {"layer": [x.tanh()]}
        return self.features["layer"][0]


def test_results_of_an_earlier_forward_do_not_stop_the_copy(x):
    model = Network(Keeping())
    model(x)
    kept = model.trap.last, model.trap.features["layer"][0]
    assert check_double_backward(model, x).verified
    assert model.trap.last is kept[0] and model.trap.features["layer"][0] is kept[1]


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo):
        raise TypeError("not me")

    def forward(self, x):
        return x


IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    "model, images, message",
    [
        (torch.tanh, IMAGES, "model must be a torch.nn.Module, got builtin_function_or_method"),
        (Network(nn.Identity()), [1], "x must be a tensor .*got list"),
        (Network(nn.Identity()), IMAGES[0], "x must have the four dimensions"),
        (Network(nn.Identity()), IMAGES.long(), "x must be floating point"),
        (Network(nn.Identity()), IMAGES[:0], "x must have at least one image"),
        (Network(nn.Identity()), IMAGES.log() - IMAGES.log(), "x has NaN or Inf"),
        (Network(nn.Identity()), IMAGES[:, :2], r"model\(x\) raised RuntimeError for x \[2, 2, 8, 8\]"),
        (Network(nn.Identity()), IMAGES.double(), r"model\(x\) raised RuntimeError for x .* torch.float64"),
        (nn.Tanh(), IMAGES, "model has no parameter that requires grad"),
        (Network(nn.Identity()).requires_grad_(False), IMAGES, "model has no parameter that requires grad"),
        (Network(Uncopyable()), IMAGES, "model cannot be copied .*not me"),
        (nn.Sequential(torch.jit.trace(nn.Conv2d(3, 3, 1), IMAGES)), IMAGES, "ScriptModule.*before it is scripted"),
    ],
)
def test_wrong_arguments_are_refused_with_a_clear_sentence(model, images, message):
    with pytest.raises(ValueError, match=message) as error:
        check_double_backward(model, images)
    assert len(str(error.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------------------ the report


def test_the_table_reads_well(x):
    lines = str(check_double_backward(Network(nn.Sequential(nn.Hardsigmoid(), nn.Hardsigmoid())), x)).splitlines()
    assert lines[0].split() == ["module", "type", "status", "relative", "error"]
    assert lines[1].split() == ["(model)", "Network", "fails"]
    assert lines[2] == "    why: because of trap.0, trap.1"
    assert [line.split() for line in lines[3:5]] == [[f"trap.{i}", "Hardsigmoid", "fails"] for i in (0, 1)]
    assert lines[5].startswith("    why: ") and lines[6].startswith("    fix: ")
    assert lines[7:] == ["3 other modules: ok"]
    assert "why" not in str(check_double_backward(Network(nn.Identity()), x))


def test_an_output_of_several_tensors_is_checked_as_a_whole(x):
    class Two(Network):
        def forward(self, x):
            return {"logits": super().forward(x), "trapped": [self.trap(self.stem(x))]}

    assert check_double_backward(Two(nn.Tanh()), x).verified
    assert blamed(check_double_backward(Two(nn.Hardsigmoid()), x)) == ["trap"]
