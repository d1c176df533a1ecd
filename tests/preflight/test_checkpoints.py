"""Activation checkpoints: non-reentrant ones pass, in one's own modules and as the libraries set them."""

import pytest
import torch
from torch import nn

from sib_ext import check_double_backward, fused_double_backward

from .networks import WIDTH, Checkpointed, Network, blamed


def densenet():
    models = pytest.importorskip("torchvision.models")
    return models.DenseNet(8, (2, 2), 16, num_classes=4, memory_efficient=True)


def timm_vit():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=32, depth=2, embed_dim=24, num_heads=2, pretrained=False
    )
    model.set_grad_checkpointing()
    return model


def transformers_vit(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        num_labels=4,
    )
    model = transformers.ViTForImageClassification(config).train()
    model.gradient_checkpointing_enable(**options)
    return model


@pytest.mark.parametrize("make", [densenet, timm_vit, transformers_vit])
def test_checkpoints_of_libraries_pass_as_sibstep_runs_them(make):
    with fused_double_backward():
        assert check_double_backward(make(), torch.randn(2, 3, 32, 32)).verified


def test_attention_inside_checkpoints_is_blamed_alone():
    failures = check_double_backward(timm_vit(), torch.randn(2, 3, 32, 32)).failures
    assert [f.module for f in failures] == ["", "blocks.0.attn", "blocks.1.attn"]
    assert "fused attention" in failures[-1].reason


def test_checkpoints_pass_with_dropout_and_batch_norm_inside(x):
    inner = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.Dropout(), nn.Tanh())
    assert check_double_backward(Network(Checkpointed(use_reentrant=False, inner=inner)), x).verified


def test_a_fault_inside_a_checkpoint_is_found(x):
    inner = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.Hardsigmoid())
    assert blamed(check_double_backward(Network(Checkpointed(False, inner)), x)) == ["trap.inner.1"]


def test_reentrant_checkpoints_fail_with_their_fix():
    model = transformers_vit(gradient_checkpointing_kwargs={"use_reentrant": True})
    with fused_double_backward():
        failures = check_double_backward(model, torch.randn(2, 3, 32, 32)).failures
    assert [f.type for f in failures[1:]] == ["ViTLayer", "ViTLayer"]
    assert "reentrant" in failures[-1].reason and "use_reentrant=False" in failures[-1].fix
