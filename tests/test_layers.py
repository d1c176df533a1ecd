"""The last feature map is found where class-activation maps look, and captured there, in the usual classifiers."""

import contextlib
import random
import threading
import warnings
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from sib_ext import SIBStep, SpatialIBLoss
from sib_ext.functional import class_activation
from sib_ext.layers import captured, check_places, class_activation_of, find_feature_map, last_feature_map
from sib_ext.layers.layout import layout_of
from sib_ext.layers.places import first_tensor, functions_seen
from sib_ext.outputs import logits_of

from .compare import assert_near

CLASSES = 4


# ------------------------------------------------------------------------------------------------ a zoo of others


def torchvision(name, **options):
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)(num_classes=CLASSES, **options)


def torchvision_vit():
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return torchvision("VisionTransformer", image_size=32, patch_size=4, **sizes)


def torchvision_swin():
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": [2, 2]}
    return torchvision("SwinTransformer", patch_size=[4, 4], **sizes)


def torchvision_maxvit():
    sizes = {"stem_channels": 8, "block_channels": [8, 16], "block_layers": [1, 1], "head_dim": 4}
    return torchvision("MaxVit", input_size=(64, 64), partition_size=2, stochastic_depth_prob=0.1, **sizes)


def timm(name, **options):
    return pytest.importorskip("timm").create_model(name, num_classes=CLASSES, **options)


def timm_vit(name="vit_tiny_patch16_224", **options):
    return timm(name, **{"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 4} | options)


def timm_swin():
    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2}
    return timm("swin_tiny_patch4_window7_224", img_size=64, **sizes)


def timm_mixer():
    mixers = pytest.importorskip("timm.models.mlp_mixer")
    return mixers.MlpMixer(img_size=32, patch_size=4, embed_dim=32, num_blocks=2, num_classes=CLASSES)


SMALL_VIT = {"image_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "intermediate_size": 32,
    "patch_size": 4,
}


def huggingface(name, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


class Wrapper(nn.Module):
    """Another name for the network and a normalisation of the images, as in many training modules."""

    def __init__(self, backbone, mean=0.5):
        super().__init__()
        self.backbone, self.mean = backbone, mean

    def forward(self, x):
        return self.backbone((x - self.mean) / 0.25)


class Training(nn.Module):
    """Like a LightningModule: the network, a metric and a criterion."""

    def __init__(self, net):
        super().__init__()
        self.net, self.criterion = net, nn.CrossEntropyLoss()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen += len(x)
        return {"logits": logits_of(self.net(x)), "hidden": x.mean()}


LAST_BLOCK = "encoder.layers.encoder_layer_1.ln_1"
# What makes it, the side of its images, the place.
POOLED = {
    "resnet18": (lambda: torchvision("resnet18"), 64, "layer4"),
    "densenet121": (lambda: torchvision("densenet121"), 64, "features"),
    "mobilenet_v3_small": (lambda: torchvision("mobilenet_v3_small"), 64, "features"),
    "efficientnet_b0": (lambda: torchvision("efficientnet_b0"), 64, "features"),
    "convnext_tiny": (lambda: torchvision("convnext_tiny"), 64, "features"),
    "vgg11": (lambda: torchvision("vgg11"), 64, "features"),
    "alexnet": (lambda: torchvision("alexnet"), 96, "features"),
    "squeezenet1_1": (lambda: torchvision("squeezenet1_1"), 64, "classifier.2"),
    "googlenet": (lambda: torchvision("googlenet", init_weights=False), 64, "inception5b"),
    "inception_v3": (lambda: torchvision("inception_v3", init_weights=False), 299, "Mixed_7c"),
    "shufflenet_v2": (lambda: torchvision("shufflenet_v2_x0_5"), 64, "conv5"),
    "regnet_y": (lambda: torchvision("regnet_y_400mf"), 64, "trunk_output"),
    "mnasnet": (lambda: torchvision("mnasnet0_5"), 64, "layers"),
    "swin": (torchvision_swin, 64, "norm"),
    "maxvit": (torchvision_maxvit, 64, "blocks.1"),
    "resnet18 in a training module": (lambda: Training(torchvision("resnet18")), 64, "net.layer4"),
    "timm vit, mean": (lambda: timm_vit(global_pool="avg"), 32, "blocks"),
    "timm vit, attention": (lambda: timm_vit(global_pool="map", class_token=False), 32, "norm"),
    "timm vit, mean, registers": (lambda: timm_vit(global_pool="avg", reg_tokens=4), 32, "blocks"),
    "timm beit": (lambda: timm_vit("beit_base_patch16_224"), 32, "blocks.1"),
    "timm siglip": (lambda: timm_vit("vit_base_patch16_siglip_224"), 32, "norm"),
    "timm swin": (timm_swin, 64, "norm"),
    "timm convnext": (lambda: timm("convnext_atto"), 64, "stages"),
    "timm mixer": (timm_mixer, 32, "norm"),
    "timm resnetv2": (lambda: timm("resnetv2_50"), 64, "norm"),
    "timm clip resnet": (lambda: timm("resnet50_clip"), 64, "head.add()"),
    "timm efficientnet": (lambda: timm("efficientnet_b0"), 64, "bn2"),
    "timm coatnet": (lambda: timm("coatnet_pico_rw_224", img_size=64), 64, "norm"),
    "timm maxvit": (lambda: timm("maxvit_rmlp_pico_rw_256", img_size=64), 64, "norm"),
    "timm pvt": (lambda: timm("pvt_v2_b0"), 64, "stages"),
    "timm hrnet": (lambda: timm("hrnet_w18_small"), 64, "final_layer"),
    "timm nfnet": (lambda: timm("dm_nfnet_f0"), 64, "final_act"),
    "timm levit": (lambda: timm("levit_128s", img_size=224), 224, "stages"),
    "timm hiera": (lambda: timm("hiera_tiny_224"), 224, "blocks.11"),
    "huggingface swin": (
        lambda: huggingface("Swin", image_size=64, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2),
        64,
        "swin.layernorm",
    ),
    "huggingface convnext": (
        lambda: huggingface("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        64,
        "convnext.encoder.stages.1",
    ),
    "huggingface resnet": (
        lambda: huggingface("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        64,
        "resnet.encoder.stages.1",
    ),
    "huggingface beit": (lambda: huggingface("Beit", **SMALL_VIT), 32, "beit.layers.1"),
    "huggingface dinov2": (lambda: huggingface("Dinov2", **SMALL_VIT), 32, "dinov2.layernorm"),
}
CLASS_TOKEN = {
    "vit": (torchvision_vit, 32, LAST_BLOCK),
    "vit in a sequence": (lambda: nn.Sequential(nn.BatchNorm2d(3), torchvision_vit()), 32, f"1.{LAST_BLOCK}"),
    "vit in a wrapper": (lambda: Wrapper(torchvision_vit()), 32, f"backbone.{LAST_BLOCK}"),
    "vit in a training module": (lambda: Training(Wrapper(torchvision_vit())), 32, f"net.backbone.{LAST_BLOCK}"),
    "timm vit": (timm_vit, 32, "blocks.1.norm1"),
    "timm vit, registers": (lambda: timm_vit(reg_tokens=4), 32, "blocks.1.norm1"),
    "timm vit, LayerScale of zeros": (lambda: timm_vit(init_values=0.0), 32, "blocks.1.norm1"),
    "timm vit, normalised queries": (lambda: timm_vit(qk_norm=True), 32, "blocks.1.norm1"),
    "timm deit, distilled": (lambda: timm_vit("deit_tiny_distilled_patch16_224"), 32, "blocks.1.norm1"),
    "timm cait": (lambda: timm_vit("cait_xxs24_224"), 32, "blocks_token_only.1.norm1"),
    "huggingface vit": (lambda: huggingface("ViT", **SMALL_VIT), 32, "vit.layers.1.layernorm_before"),
    "huggingface deit": (lambda: huggingface("DeiT", **SMALL_VIT), 32, "deit.layers.1.layernorm_before"),
}
SLOW = {
    *("densenet121", "convnext_tiny", "vgg11", "alexnet", "inception_v3", "regnet_y", "efficientnet_b0"),
    *("timm coatnet", "timm maxvit", "timm nfnet", "timm hiera", "timm levit", "timm hrnet", "timm resnetv2"),
    *("timm clip resnet", "timm efficientnet", "timm pvt", "mnasnet"),
}


def table(zoo):
    return [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in zoo.items()]


def without_zeros(model):
    """Heads and scales that start at (nearly) zero hide everything behind them."""
    with torch.no_grad():
        for p in model.parameters():
            if p.abs().max() < 1e-3:
                nn.init.normal_(p, std=0.02)
    return model


class Looked:
    """A pass with the place captured: what the logits owe to it, and what to x on other ways."""

    def __init__(self, model, x, place):
        x = x.clone().requires_grad_()
        with captured(model, [place]) as found:
            torch.manual_seed(1)
            self.logits = logits_of(model(x.clone()))
        self.map = found[place]
        self.layout = layout_of(self.map.shape, x.shape[2:])
        s = (self.logits * torch.randn_like(self.logits)).sum()
        (gradient,) = torch.autograd.grad(s, self.map, retain_graph=True)
        self.share = float(self.layout.planes(gradient).ne(0).any(1).any(0).float().mean())
        self.map.register_hook(torch.zeros_like)
        self.passed_by = bool(torch.autograd.grad(s, x)[0].any())
        with emptied(model, place):
            torch.manual_seed(1)
            self.without = logits_of(model(x.clone()))


@contextlib.contextmanager
def emptied(model, place):
    """The place gives zeros inside."""

    def empty(module, inputs, output):
        first_tensor(output).data.zero_()

    if place.endswith("()"):
        with functions_seen(model, lambda seen, tensor: tensor.data.zero_() if seen == place else None):
            yield
    else:
        handle = model.get_submodule(place).register_forward_hook(empty)
        yield
        handle.remove()


@pytest.mark.parametrize(("make", "side", "place"), table(POOLED))
def test_all_of_the_logits_is_computed_from_the_map_that_is_found(make, side, place):
    model, x = make(), torch.randn(3, 3, side, side)
    assert find_feature_map(model, x) == place
    seen = Looked(without_zeros(model), x, place)
    assert not seen.passed_by
    assert seen.share > 0.9
    assert not torch.allclose(seen.without, seen.logits)


@pytest.mark.parametrize(("make", "side", "place"), table(CLASS_TOKEN))
def test_of_a_class_token_it_is_the_input_of_the_last_attention(make, side, place):
    model, x = make(), torch.randn(3, 3, side, side)
    assert find_feature_map(model, x) == place
    seen = Looked(without_zeros(model), x, place)
    assert seen.layout.positions == 64
    assert seen.share > 0.9
    assert not torch.allclose(seen.without, seen.logits)


# --------------------------------------------------------------------------------------------- networks of our own


class Network(nn.Module):
    """A body, one more convolution, and a head; ``run(network, x)`` is the forward."""

    def __init__(self, run):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
        self.norm, self.extra, self.relu = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
        self.pool, self.hidden, self.head = nn.MaxPool2d(2), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.run = run

    def pooled(self, h):
        return self.head(h.mean((2, 3)))

    def forward(self, x):
        return self.run(self, x)


def decoder_beside(net, x):
    h = net.body(x)
    net.reconstructed = net.extra(F.interpolate(h, scale_factor=2))
    return net.pooled(h)


def in_evaluation(net, x):
    h = net.body(x)
    return net.pooled(h if net.training else net.extra(h))


def lenet(net, x):
    h = net.pool(F.relu(net.body(x)))
    h = net.pool(F.relu(net.extra(h)))
    return net.head(F.relu(net.hidden(h.mean((2, 3)))))


def one_activation_module(net, x):
    return net.pooled(net.relu(net.norm(net.extra(net.relu(net.body(x))))))


def two_branches(net, x):
    h = net.body(x)
    return net.pooled(torch.cat([h[:, :3], net.extra(h)[:, 3:]], 1))


def gated(net, x):
    h = net.body(x)
    gate = net.extra(h)[:, :1].sigmoid()
    return net.head(torch.einsum("bchw,bkhw->bc", h, gate))


def two_scales(net, x):
    h = net.body(x)
    return net.pooled(h) + net.pooled(F.relu(net.extra(net.pool(h))))


def overwriting(net, x):
    return net.pooled(net.body(x.sub_(0.5).div_(0.25)))


def checkpointed(net, x):
    return net.pooled(checkpoint(lambda h: F.silu(net.norm(net.extra(h))), net.body(x), use_reentrant=False))


def tuples(net, x):
    return [(net.pooled(net.body(x)), x), x]


OWN = {
    "functional activation": (lambda net, x: net.pooled(F.relu(net.norm(net.body(x)))), "relu()"),
    "wide resnet": (lambda net, x: net.head(F.avg_pool2d(F.relu(net.norm(net.body(x))), 16).flatten(1)), "relu()"),
    "in-place functional activation": (lambda net, x: net.pooled(F.relu_(net.norm(net.body(x)))), "norm"),
    "operators": (lambda net, x: net.pooled(net.body(x) * 2 + 1), "add()"),
    "functional activations on the way and in the head": (lenet, "relu()"),
    "one module for all activations": (one_activation_module, "relu.relu()"),
    "two branches": (two_branches, "cat()"),
    "a gate": (gated, "body"),
    "a second scale": (two_scales, "relu()"),
    "decoder beside the head": (decoder_beside, "body"),
    "layer that runs in evaluation alone": (in_evaluation, "body"),
    "overwrites the images": (overwriting, "body"),
    "checkpoint": (checkpointed, "silu()"),
}


@pytest.mark.parametrize("size", [(16, 16), (16, 32)], ids=str)
@pytest.mark.parametrize("run, place", OWN.values(), ids=OWN)
def test_what_the_head_consumes_is_found_and_trained(run, place, size):
    model, x = Network(run), torch.randn(4, 3, *size)
    if run is OWN["wide resnet"][0] and size != (16, 16):
        pytest.skip("its pooling is that of square images")
    before = x.clone()
    assert find_feature_map(model, x) == place
    assert torch.equal(x, before)
    with captured(model, [place]) as found:
        logits = model(x.clone())
    assert found[place].shape[1] == 6 and found[place].requires_grad
    (gradient,) = torch.autograd.grad(logits.square().sum(), found[place])
    assert gradient.flatten(1).any(1).all()
    if run is not overwriting:
        step = SIBStep(model, SpatialIBLoss(window=3))
        terms = step.terms(x, torch.arange(4))
        terms.loss.backward()
        assert (
            step.layers == (place,) and list(terms.background) == ["input", place] and 0 < terms.background[place] < 1
        )


def test_a_layer_that_runs_in_evaluation_alone_is_found_there():
    assert find_feature_map(Network(in_evaluation).eval(), torch.randn(4, 3, 16, 16)) == "extra"


def test_modules_alone_where_functions_are_not_wanted():
    for run, place in ((OWN["functional activation"][0], "norm"), (lenet, "extra"), (one_activation_module, "norm")):
        assert find_feature_map(Network(run), torch.randn(4, 3, 16, 16), functions=False) == place


def test_the_output_is_unpacked_as_it_is_for_the_loss():
    model, x = Network(tuples), torch.randn(4, 3, 16, 16)
    assert find_feature_map(model, x, output=lambda output: output[0][0]) == "body"
    with pytest.raises(ValueError, match="give output="):
        find_feature_map(model, x, output=lambda output: output[0])


def two_views(net, x):
    return net.pooled(F.relu(net.body(x))) + net.pooled(F.relu(net.body(x.flip(3))))


def crops(net, x):
    return net.pooled(net.body(torch.cat(x.chunk(2, dim=3)))).view(2, len(x), -1).mean(0)


def flat(net, x):
    return net.head(net.hidden(x[:, :, 0, :2].flatten(1)))


@pytest.mark.parametrize("run", [two_views, crops, flat])
@pytest.mark.parametrize("normalised", [False, True])
def test_where_nothing_fits_one_warning_names_the_argument(run, normalised):
    model = Wrapper(Network(run)) if normalised else Network(run)
    step, x = SIBStep(model, SpatialIBLoss(window=3)), torch.randn(4, 3, 16, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(x, torch.arange(4))
    assert step.layers == ()
    (message,) = [str(w.message) for w in caught]
    assert caught[0].filename == __file__
    assert 'layers=["block4.relu()"]' in message and "no feature map gets a term" in message


def test_two_views_have_a_map_where_one_place_runs_once():
    def joined(net, x):
        return net.pooled(net.extra(net.body(x) + net.body(x.flip(3)).flip(3)))

    assert find_feature_map(Network(joined), torch.randn(4, 3, 16, 16)) == "extra"


def test_a_head_of_zeros_hides_nothing():
    model = Network(lambda net, x: net.pooled(F.relu(net.body(x) + net.extra(net.body(x)))))
    for layer in (model.head, model.extra):
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    assert find_feature_map(model, torch.randn(4, 3, 16, 16)) == "relu()"
    assert not model.head.weight.any()


@pytest.mark.parametrize("run", [OWN["functional activation"][0], checkpointed], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_search_leaves_no_trace(run, fails):
    def forward(net, x):
        logits = F.dropout(run(net, x)) + random.random() + numpy.random.rand()
        assert not fails
        return logits

    model, x = Network(forward), torch.randn(4, 3, 16, 16)
    parametrizations.spectral_norm(model.extra)
    model.norm.eval()
    model.head.weight.register_hook(lambda gradient: pytest.fail("a parameter's hook has run"))
    model.head.bias.grad = torch.ones(CLASSES)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = []
    for search in (False, True):
        torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
        if search and fails:
            with pytest.raises(AssertionError):
                last_feature_map(model, x)
        elif search:
            last_feature_map(model, x)
        drawn.append((torch.rand(()).item(), random.random(), numpy.random.rand()))
    assert drawn[0] == drawn[1]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and not model.norm.training and model.body.training
    gradients = [name for name, p in model.named_parameters() if p.grad is not None]
    assert gradients == ["head.bias"] and torch.equal(model.head.bias.grad, torch.ones(CLASSES))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["timm vit", "timm cait", "timm swin"])
def test_the_search_sees_through_half_types(name, dtype):
    make, side, place = (CLASS_TOKEN | POOLED)[name]
    model, x = make(), torch.randn(3, 3, side, side)
    with torch.autocast("cpu", dtype):
        assert find_feature_map(model, x) == place
    assert find_feature_map(model.to(dtype), x.to(dtype)) == place


@pytest.mark.parametrize("name", ["timm vit", "timm vit, mean", "huggingface vit"])
def test_the_search_sees_through_the_checkpoints_of_libraries(name):
    make, side, place = (CLASS_TOKEN | POOLED)[name]
    model, x = make(), torch.randn(3, 3, side, side)
    if name.startswith("timm"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()
    found = find_feature_map(model, x)
    assert found == ("blocks.1" if place == "blocks" else place)  # timm runs them one by one then
    seen = Looked(without_zeros(model), x, found)
    assert seen.share > 0.9 and not torch.allclose(seen.without, seen.logits)


@pytest.mark.parametrize(("norm_first", "place"), [(True, "2.layers.1.norm1"), (False, "2.layers.0")])
def test_transformers_that_normalise_before_or_after(norm_first, place):
    class WithToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 8))

        def forward(self, x):
            return torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).mT], 1)

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), WithToken(), encoder, nn.LayerNorm(8))
    x = torch.randn(3, 3, 16, 32)
    assert find_feature_map(model, x, output=lambda tokens: tokens[:, 0]) == place
    assert find_feature_map(model, x, output=lambda tokens: tokens.mean(1)) == "3"


@pytest.mark.parametrize("queries", [4, 6, 12, 20])
@pytest.mark.parametrize("planes", [False, True])
def test_queries_and_latents_are_no_grid(queries, planes):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 8, 4, 4)
            self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
            self.queries = nn.Parameter(torch.randn(1, queries, 8))
            self.decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            tokens = self.body(x).flatten(2).mT
            tokens = tokens if planes else self.norm(tokens)
            return self.last(self.decoder(self.queries.expand(len(x), -1, -1), tokens)).mean(2)

    assert find_feature_map(Decoder(), torch.randn(3, 3, 28, 28)) == ("body" if planes else "norm")


def test_tokens_may_be_unfolded_and_merged():
    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 8)
            self.norm, self.merge, self.last = nn.LayerNorm(8), nn.Linear(32, 16), nn.LayerNorm(16)
            self.head = nn.Linear(16, CLASSES)

        def forward(self, x):
            tokens = self.norm(self.second(F.unfold(self.first(x), 4, stride=4).mT))
            h, w = x.shape[2] // 8, x.shape[3] // 8
            tokens = tokens.view(len(x), h, 2, w, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(len(x), h * w, 32)
            return self.head(self.last(self.merge(tokens)).mean(1))

    assert find_feature_map(Merging(), torch.randn(3, 3, 32, 64)) == "last"


def test_a_model_that_takes_batches_of_one_size_gets_the_whole():
    def in_pairs(net, x):
        return net.pooled(net.body(x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)))

    model = Network(in_pairs)
    assert find_feature_map(model, torch.randn(4, 3, 16, 16)) == "body"
    with pytest.raises(RuntimeError, match="unflatten"):
        find_feature_map(model, torch.randn(5, 3, 16, 16))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_modules_that_are_lazy_or_scripted_are_searched():
    x = torch.randn(4, 3, 16, 16)
    lazy = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert find_feature_map(lazy, x) == "1" and int(lazy[1].num_batches_tracked) == 0
    model = Network(OWN["functional activation"][0])
    model.body = torch.jit.script(model.body)
    assert find_feature_map(model, x) == "relu()"


# ------------------------------------------------------------------------------------------------------ the capture


def test_a_function_is_named_with_the_module_that_calls_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return torch.sigmoid(F.relu(self.conv(torch.relu(x))))

    model, x = nn.Sequential(Block(), Block(), nn.Flatten()), torch.randn(2, 3, 8, 8)
    with captured(model, ["0.relu()", "1.relu()", "1.sigmoid()", "0.conv"]) as found:
        output = model(x)
    assert torch.equal(found["1.sigmoid()"].flatten(1), output)
    assert torch.equal(found["0.relu()"], found["0.conv"].relu())
    assert torch.equal(found["1.sigmoid()"], found["1.relu()"].sigmoid())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_checkpoint_that_runs_again_is_captured_once():
    model, x = Network(checkpointed), torch.randn(2, 3, 8, 8)
    with captured(model, ["extra", "silu()"]) as found:
        logits = model(x)
    kept = dict(found)
    torch.autograd.grad(logits.sum(), [*kept.values()])
    assert found["extra"] is kept["extra"] and found["silu()"] is kept["silu()"]
    assert torch.equal(kept["silu()"].mean((2, 3)) @ model.head.weight.T + model.head.bias, logits)


def test_wrong_places_are_named():
    model, x = Network(lambda net, x: two_views(net, x)), torch.randn(2, 3, 8, 8)
    check_places(model, ["body", "body.0", "relu()", "body.1.batch_norm()"])
    for name, wrong in (("bodi", "bodi"), ("bodi.relu()", "bodi"), ("relu(1)", "relu(1)")):
        with pytest.raises(ValueError, match="layers: the model has no module .*; it has body, body.0") as caught:
            check_places(model, ["body", name])
        assert repr(wrong) in str(caught.value)
    with pytest.raises(ValueError, match="'body' runs more than once"), captured(model, ["body"]):
        model(x)
    strings = nn.Sequential(Network(lambda net, x: {"logits": x}))
    with pytest.raises(ValueError, match="the output of '0' is dict, not a tensor: name a module inside"):
        with captured(strings, ["0"]):
            strings(x)
    assert not any(m._forward_hooks for m in [*model.modules(), *strings.modules()])


class Pair(NamedTuple):
    count: int
    map: torch.Tensor


@pytest.mark.parametrize(
    "kind", [Pair, lambda *parts: tuple(parts), lambda *parts: list(parts)], ids=["named", "tuple", "list"]
)
def test_what_takes_the_place_of_a_captured_tensor_goes_on_in_the_model(kind):
    class Returns(nn.Module):
        def forward(self, x):
            return kind(3, x)

    model = nn.Sequential(Returns())
    x = torch.ones(2, 3)
    with captured(model, ["0"], lambda tensor: 2 * tensor) as found:
        output = model(x)
    assert type(output) is type(kind(3, x)) and output[0] == 3
    assert output[1] is found["0"] and torch.equal(found["0"], 2 * x)


def test_of_a_tuple_the_first_tensor_is_captured():
    class Recurrent(nn.Module):
        def forward(self, x):
            return None, x * 2, x

    model, x = nn.Sequential(Recurrent()), torch.randn(2, 3, 8, 8)
    with captured(model, ["0"]) as found:
        output = model(x)
    assert output[1] is found["0"] and torch.equal(found["0"], x * 2)


def test_threads_do_not_see_each_others_functions():
    models = [Network(OWN["functional activation"][0]) for _ in range(2)]
    turns, kept = threading.Barrier(2), {}

    def work(number):
        x = torch.full((2, 3, 8, 8), float(number))
        with captured(models[number], ["relu()"]) as found:
            turns.wait()
            models[number](x)
            turns.wait()
        kept[number] = found["relu()"]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for number, model in enumerate(models):
        assert_near(kept[number], F.relu(model.norm(model.body(torch.full((2, 3, 8, 8), float(number))))), 1e-6)


# -------------------------------------------------------------------------------------------- layouts and activation


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((2, 5, 7, 7), (224, 224), ("planes", 0, 7, 7)),
        ((2, 7, 7, 96), (224, 224), ("last", 0, 7, 7)),
        ((2, 7, 7, 7), (224, 224), ("planes", 0, 7, 7)),
        ((2, 4, 8, 96), (128, 256), ("last", 0, 4, 8)),
        ((2, 96, 4, 8), (128, 256), ("planes", 0, 4, 8)),
        ((2, 96, 3, 10), (128, 256), ("planes", 0, 3, 10)),
        ((2, 197, 16), (224, 224), ("last", 1, 14, 14)),
        ((2, 196, 16), (224, 224), ("last", 0, 14, 14)),
        ((2, 201, 16), (224, 224), ("last", 5, 14, 14)),
        ((2, 33, 16), (32, 64), ("last", 1, 4, 8)),
        ((2, 32, 16), (64, 32), ("last", 0, 8, 4)),
        ((2, 35, 16), (224, 224), None),
        ((2, 6 * 3 + 2, 16), (100, 60), ("last", 2, 6, 3)),
        ((2, 7 * 4, 16), (100, 60), ("last", 0, 7, 4)),
        ((2, 4, 4, 5), (16, 16), ("last", 0, 4, 4)),
        ((2, 9, 14, 14), (16, 16), ("planes", 0, 14, 14)),
        ((2, 5), (32, 32), None),
    ],
    ids=str,
)
def test_layouts(shape, size, expected):
    layout = layout_of(shape, size)
    found = layout and ("last" if layout.channels_last else "planes", layout.prefix, layout.height, layout.width)
    assert found == expected


@pytest.mark.parametrize("size", [(16, 16), (16, 32)], ids=str)
def test_the_class_activation_is_the_same_in_every_layout(size):
    h, w = size[0] // 4, size[1] // 4
    A, R = torch.randn(2, 2, 5, h, w).unbind(0)
    expected = class_activation(A, R)
    assert_near(class_activation_of("map", A, R, size), expected, 1e-6)
    last = [t.permute(0, 2, 3, 1) for t in (A, R)]
    assert_near(class_activation_of("map", *last, size), expected, 1e-6)
    for prefix in (0, 1, 5):
        tokens = [torch.cat([torch.randn(2, prefix, 5), t.flatten(1, 2)], 1) for t in last]
        assert_near(class_activation_of("map", *tokens, size), expected, 1e-6)
    with pytest.raises(ValueError, match="'map' must be a feature map .* the images, .*got torch.float32 tensor"):
        class_activation_of("map", A[0, 0], R[0, 0], size)
    with pytest.raises(ValueError, match="the logits were not computed from 'map'"):
        class_activation_of("map", A, None, size)


def test_the_loss_takes_tokens_of_images_that_are_not_square():
    vit = timm_vit(img_size=(16, 32))
    x = torch.randn(3, 3, 16, 32, requires_grad=True)
    assert find_feature_map(vit, x) == "blocks.1.norm1"
    with captured(vit, ["blocks.1.norm1"]) as found:
        logits = vit(x)
    terms = SpatialIBLoss(window=3).terms(logits, torch.arange(3), x, features=found)
    assert 0 < terms.background["blocks.1.norm1"] < 1
