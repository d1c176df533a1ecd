"""The report, what is said without a failure, and wrong arguments."""

import pytest
import torch
from torch import nn

from sib_ext import SIBStep, SpatialIBLoss, check_double_backward

from .networks import Network, Recurrent, blamed


def test_a_head_of_zeros_passes_with_a_word_about_it(x):
    model = Network(nn.Tanh())
    nn.init.zeros_(model.head.linear.weight)
    report = check_double_backward(model, x)
    assert report.verified and "VJP is zero at the present parameters" in str(report)


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


WRAPS = {
    "torch.compile": torch.compile,
    "compile()": lambda m: m.compile() or m,
    "DataParallel": lambda m: nn.DataParallel(torch.compile(m)),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_compiled_model_fails_as_such_and_is_checked_underneath(wrap, x):
    report = check_double_backward(wrap(Network(nn.Identity())), x)
    assert [f.module for f in report.failures] == [""] and "compiled" in report.failures[0].reason
    report = check_double_backward(wrap(Network(nn.Hardsigmoid())), x)
    assert "trap" in blamed(report)


def test_of_a_compiled_model_sibstep_is_named_as_a_way_out_where_it_is_one(x):
    model = torch.compile(Network(nn.Identity()))
    assert "SIBStep, which takes it as it is" in check_double_backward(model, x).failures[0].fix
    SIBStep(model, SpatialIBLoss())
    model = Network(nn.Identity())
    model.compile()
    assert "SIBStep" not in check_double_backward(model, x).failures[0].fix
    with pytest.raises(ValueError, match=r"model.compile\(\) was called"):
        SIBStep(model, SpatialIBLoss())


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
        (Network(Uncopyable()), IMAGES, "model cannot be copied for the check: .*not me"),
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
    assert lines[3].startswith("    fix: terms at the feature map 'last' alone work")
    assert [line.split() for line in lines[4:6]] == [[f"trap.{i}", "Hardsigmoid", "fails"] for i in (0, 1)]
    assert lines[6].startswith("    why: ") and lines[7].startswith("    fix: ")
    assert lines[8:] == ["3 other modules: ok"]
    assert "why" not in str(check_double_backward(Network(nn.Identity()), x))
