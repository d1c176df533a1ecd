"""Fused attention: a fault for the loss alone, none for SIBStep."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sib_ext import SIBStep, SpatialIBLoss, check_double_backward, fused_double_backward

from .networks import Attention, Network, blamed, matches


def test_fused_attention_fails_and_the_math_kernel_is_the_fix(x):
    model = Network(Attention())
    report = check_double_backward(model, x)
    assert blamed(report) == ["trap.attention"]
    assert "fused attention" in report.failures[-1].reason and "SDPBackend.MATH" in report.failures[-1].fix
    with sdpa_kernel(SDPBackend.MATH):
        assert check_double_backward(model, x).verified


def test_attention_that_only_dropout_saves_passes_with_a_word_about_it(x):
    report = check_double_backward(Network(Attention(dropout=0.1)), x)
    assert report.verified and report.findings[-1].module == "trap.attention"
    assert "MATH" in report.findings[-1].fix


@pytest.mark.parametrize(
    "context", [fused_double_backward, lambda: sdpa_kernel(SDPBackend.MATH)], ids=["SIBStep", "math"]
)
def test_inside_the_contexts_that_the_fix_names_it_passes_without_a_word(context, x):
    for dropout in (0.0, 0.1):
        with context():
            report = check_double_backward(Network(Attention(dropout)), x)
        assert report.verified and [f.reason for f in report.findings] == [""], report


def test_what_the_report_says_of_sibstep_and_of_the_loss_is_so(x):
    model, labels = Network(Attention()), torch.tensor([0, 1])
    found = check_double_backward(model, x).failures[-1]
    assert matches("SIBStep takes PyTorch's math kernel instead by itself, the loss alone does not", found.reason)
    SIBStep(model, SpatialIBLoss(), layers=())(x, labels).backward()
    images = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="attention"):
        SpatialIBLoss()(model(images), labels, images).backward()
