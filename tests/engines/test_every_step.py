"""Every engine and option of a step, over every kind of network: one check, step_check.py."""

import functools

import pytest
import torch

from sib_ext import SpatialIBLoss

from .networks import CLASSES, IMAGES, NETWORKS, SIDE, Network, per_sample
from .step_check import check_step, fixed, of_features

#: Draws from generators of the process, which two threads would take from each other.
NOISY = {"dropout", "depth by random", "depth by numpy", "checkpoints"}
OPTIONS = {
    "double_backward": {},
    "parts of two": {"microbatch": 2},
    "unequal parts": {"microbatch": 4},
    "every second step": {"every": 2},
}


def batch():
    x = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(IMAGES, 1, SIDE, SIDE)
    mask[:, :, 3:8, 4:10] = 1
    return x, torch.arange(IMAGES) % CLASSES, mask


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_is_right_and_a_good_guest(network, options, threads):
    threads(1)
    check_step(NETWORKS[network], *batch(), noisy=network in NOISY, **OPTIONS[options])


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"microbatch": IMAGES}], ids=str)
@pytest.mark.parametrize("layers", [("body",), ("stem", "body"), "auto"], ids=str)
def test_with_terms_for_feature_maps(layers, options, threads):
    threads(1)
    step = check_step(functools.partial(Network, norm=per_sample), *batch(), layers, **options)
    assert step.layers == (("body",) if layers == "auto" else layers)


@pytest.mark.parametrize(
    "network",
    [
        "checkpoints",
        "checkpointed transformer",
        "spectral norm",
        "frozen stem",
        "a module under two names",
        "weight norm",
    ],
)
@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_the_last_feature_map_of_others_models(network, options, threads):
    threads(1)
    assert check_step(NETWORKS[network], *batch(), "auto", noisy=network in NOISY, **options).layers


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_with_terms_for_the_last_feature_map_alone(network, options, threads):
    threads(1)
    check_step(NETWORKS[network], *batch(), "auto", of_features(), noisy=network in NOISY, **options)


@pytest.mark.parametrize("options", [{}, {"microbatch": 4}], ids=str)
@pytest.mark.parametrize(
    "criterion",
    [
        fixed("paper", input_background=1e5, input_foreground=1.0, transform="expm1"),
        fixed(foreground="hsic_unbiased", input_foreground=1.0, background="gaussian"),
        fixed(foreground="gaussian", input_foreground=0.1, background="energy_ratio", mask_source="vjp"),
        fixed(foreground="log_capacity", input_foreground=1.0, kappa=0.3),
    ],
    ids=["paper", "unbiased HSIC", "gaussian", "log capacity"],
)
def test_with_other_objectives(criterion, options, threads):
    threads(1)
    check_step(functools.partial(Network, norm=per_sample), *batch(), criterion=criterion, **options)


def batch_of_labels(by_class=True):
    """One image has no label; masks of every class, or of the whole sample."""
    x, y, mask = batch()
    generator = torch.Generator().manual_seed(6)
    labels = torch.rand(IMAGES, CLASSES, generator=generator) < 0.5
    labels[torch.arange(IMAGES), y] = True
    labels[2] = False
    each = torch.zeros(IMAGES, CLASSES, SIDE, SIDE)
    for k in range(CLASSES):
        each[:, k, k : k + 5, 2 + k : 8 + k] = 1
    return x, labels, each if by_class else mask


def of_labels(seed, **options):
    terms = {"input_background": 5.0, "input_foreground": 1.0, "foreground": "log_capacity"}
    return SpatialIBLoss(task="multilabel", seed=seed, **terms | options)


@pytest.mark.parametrize("by_class", [True, False], ids=["masks a class", "a mask a sample"])
@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"every": 2}], ids=str)
@pytest.mark.parametrize("seed", ["target_logit", "random_logit"])
def test_with_several_labels_an_image(seed, options, by_class, threads):
    threads(1)
    network = functools.partial(Network, norm=per_sample)
    # Its draws are of the process's generator.
    check_step(network, *batch_of_labels(by_class), "auto", of_labels(seed), noisy=True, **options)


@pytest.mark.parametrize("options", [{}, {"microbatch": 4}], ids=str)
@pytest.mark.parametrize("network", ["BatchNorm", "transformer", "dropout", "checkpoints"])
def test_with_several_labels_an_image_in_other_networks(network, options, threads):
    threads(1)
    weights = {"input_background": 0.0, "input_foreground": 0.0, "feature_background": 5.0}
    of_input = check_step(NETWORKS[network], *batch_of_labels(), (), of_labels("random_logit"), noisy=True, **options)
    assert not of_input.layers
    check_step(
        NETWORKS[network], *batch_of_labels(), "auto", of_labels("random_logit", **weights), noisy=True, **options
    )


@pytest.mark.parametrize("network", ["BatchNorm", "transformer", "checkpoints", "weight norm"])
@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_in_float32(network, options, threads):
    threads(1)
    check_step(NETWORKS[network], *batch(), dtype=torch.float32, noisy=network in NOISY, **options)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_with_a_grad_scaler(options, threads):
    """The loss is not scaled here: what the scaler does to the VJP must not show."""
    threads(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    check_step(functools.partial(Network, norm=per_sample), *batch(), scaler=scaler, **options)


def test_with_logits_taken_out_by_a_function(threads):
    threads(1)
    network = functools.partial(NETWORKS["mapping"])
    check_step(network, *batch(), output=logits_under_their_name)


def logits_under_their_name(output):
    return output["logits"]


# A gradient that must not pass: the check itself has to fail where it should.


class HalfTheTerms(SpatialIBLoss):
    def information(self, R, *arguments, **options):
        halved = R.detach() if self.impl != "reference" else R
        return super().information(halved, *arguments, **options)


def test_the_check_finds_a_derivative_that_is_left_out(threads):
    threads(1)
    criterion = HalfTheTerms(seed="target_logit", input_background=5.0)
    with pytest.raises((AssertionError, RuntimeError), match="gradients are off"):
        check_step(NETWORKS["GroupNorm"], *batch(), criterion=criterion)


def test_the_check_finds_a_hook_left_behind(threads, monkeypatch):
    from sib_ext.engines import step as module

    def leave(model, *_):
        model.register_forward_hook(lambda *_: None)
        return model

    threads(1)
    monkeypatch.setattr(module, "unwrapped", leave)
    with pytest.raises(AssertionError, match="hooks of the model have changed"):
        check_step(NETWORKS["GroupNorm"], *batch())
