import copy
import re
import sys

import pytest
import torch
from sib_lab.networks import build as networks
from sib_lab.networks.build import NETWORKS, NetworkError, build_network
from sib_lab.networks.feature_maps import cam_layer, token_grid
from sib_lab.networks.own import SmallCNN
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sib_ext import SpatialIBLoss

LAYERS = {
    "small_cnn": "block4",
    "gap_cnn": "block4",
    "small_resnet": "blocks",
    "resnet18": "layer4",
    "resnet50": "layer4",
    "densenet121": "relu",
    "vit_b_32": "encoder.layers.encoder_layer_11.ln_1",
}


def step(model, size, classes=3):
    """One double-backward step; returns the norm of the parameters' gradient."""
    criterion = SpatialIBLoss()
    x = torch.randn(2, 3, size, size, requires_grad=True)
    y = torch.tensor([0, classes - 1])
    mask = torch.zeros(2, 1, size, size)
    mask[..., : size // 2, :] = 1
    criterion(model(x), y, x, mask=mask).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert norm.isfinite() and norm > 0
    return norm


def state_of(name):
    """torchvision's own network of that name, three classes."""
    import torchvision.models as models

    options = {"image_size": 64} if name == "vit_b_32" else {}
    return models.get_model(name, weights=None, num_classes=3, **options)


# ------------------------------------------------------------------------------------------------ by name


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_a_double_backward_step_and_names_its_layer(name):
    model = build_network(name, 3, 64)
    assert model.image_size == 64
    step(model, 64)
    model.train()
    assert cam_layer(model) == LAYERS[name]
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith(("small", "gap"))])
def test_a_network_computes_what_torchvisions_does_under_the_same_names(name):
    theirs = state_of(name).eval()
    model = build_network(name, 3, 64).eval()
    assert list(model.state_dict()) == list(theirs.state_dict())
    model.load_state_dict(theirs.state_dict())
    if name == "vit_b_32":  # its head starts at zero
        for network in (theirs, model):
            nn.init.constant_(network.heads.head.weight[:, ::2], 0.1)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x))
    torch.testing.assert_close(model(x.requires_grad_()), theirs(x), rtol=1e-4, atol=1e-5)


def test_the_small_network_keeps_its_names_and_takes_any_size_from_32():
    names = list(build_network("small_cnn", 5, 40).state_dict())
    assert names[:2] == ["block1.0.weight", "block1.1.weight"] and names[-2:] == ["head.weight", "head.bias"]
    assert names == list(SmallCNN(5).state_dict())
    for size in (32, 33, 224):
        assert build_network("small_cnn", 5, size)(torch.zeros(2, 3, size, size)).shape == (2, 5)


def test_one_seed_gives_one_network():
    first, second = ([torch.manual_seed(3), build_network("small_cnn", 4, 40)][1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(3)
    assert torch.equal(next(SmallCNN(4).parameters()), next(first.parameters()))


def test_networks_can_be_copied():
    model = build_network("resnet18", 3, 64)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        twin.fc.bias.fill_(7)
    x = torch.randn(2, 3, 64, 64)
    assert type(twin).__name__ == "ResNet" and not torch.equal(twin(x), model.eval()(x))


@pytest.mark.parametrize(
    "name, classes, size, sentence",
    [
        ("alexnet", 3, 64, "no network 'alexnet': choose one of small_cnn, gap_cnn, small_resnet, resnet18"),
        ("resnet18", 1, 64, "at least 2 classes, got 1"),
        ("resnet18", 3, 16, "images of at least 32 px, got size 16"),
        ("vit_b_32", 3, 100, "size must be a multiple of 32, got 100"),
        ("nothing_here:make", 3, 64, "cannot import 'nothing_here'"),
        ("math:make", 3, 64, "the module math has no 'make'"),
        ("math:pi", 3, 64, "pi is not a function"),
        ("textwrap:TextWrapper", 3, 64, "must return an nn.Module, got TextWrapper"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(name, classes, size, sentence):
    with pytest.raises(NetworkError, match=sentence) as caught:
        build_network(name, classes, size)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------- module:function

MINE = """
import torch
from torch import nn

class Attention(nn.Module):
    def forward(self, x):
        x = x[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x)

def tokens(classes, size):
    head = nn.Linear(8 * (size // 8) ** 2, classes)
    return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), Attention(), nn.Flatten(), head)

def gate(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardsigmoid(), pooled(4, classes))

def in_place(classes):
    inner = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(inplace=True))
    return nn.Sequential(nn.Conv2d(3, 4, 3), inner, pooled(4, classes))

def pooled(channels, classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

def flat(**options):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * options["size"] ** 2, options["classes"]))

def ten(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
def broken(): return nn.Linear(7, 3)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module in the working directory, as a user has it."""
    (tmp_path / "my_networks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield
    assert sys.path == before
    sys.modules.pop("my_networks", None)


@pytest.mark.parametrize("function", ["tokens", "gate", "in_place", "flat"])
def test_a_network_of_ones_own_takes_a_double_backward_step(mine, function):
    step(build_network(f"my_networks:{function}", 3, 32), 32)


@pytest.mark.parametrize(
    "function, options, message",
    [
        ("tokens", {"size": 32}, "attention.* is not implemented"),
        ("gate", {}, "hardsigmoid_backward is not implemented"),
        ("in_place", {}, "modified by an inplace operation"),
    ],
)
def test_the_traps_are_real(mine, function, options, message):
    """Where this fails, PyTorch has changed and the workaround can go."""
    build_network("my_networks:flat", 3, 32)  # imports the module
    with pytest.raises(RuntimeError, match=message):
        step(getattr(sys.modules["my_networks"], function)(3, **options), 32)


def test_in_place_activations_are_switched_off_and_hardsigmoid_is_the_same_function(mine):
    model = build_network("my_networks:in_place", 3, 32)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    model = build_network("my_networks:gate", 3, 32)
    assert isinstance(model[1], networks.Hardsigmoid)
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(model[1](x), F.hardsigmoid(x))


def test_hardswish_needs_no_replacement():
    assert torch.autograd.gradgradcheck(F.hardswish, torch.randn(9, dtype=torch.float64).mul(3).requires_grad_())


@pytest.mark.parametrize(
    "function, sentence",
    [
        ("ten", r"must give logits \[2,3\] for images \[2,3,32,32\], got \[2, 10\]"),
        ("broken", r"fails on images \[2,3,32,32\]: mat1 and mat2"),
    ],
)
def test_a_network_of_ones_own_that_does_not_fit_is_one_sentence(mine, function, sentence):
    with pytest.raises(NetworkError, match=sentence) as caught:
        build_network(f"my_networks:{function}", 3, 32)
    assert "\n" not in str(caught.value)


def test_fused_attention_stays_where_no_gradient_is_wanted(monkeypatch):
    used = []

    def spy(backend):
        used.append(backend)
        return sdpa_kernel(backend)

    monkeypatch.setattr(networks, "sdpa_kernel", spy)
    model = build_network("vit_b_32", 3, 64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    assert not used
    model(x)
    assert used == [SDPBackend.MATH]


# --------------------------------------------------------------------------------------------------- timm


def test_timm_networks(monkeypatch):
    pytest.importorskip("timm")
    model = build_network("timm:resnet10t", 3, 64)
    step(model, 64)
    assert cam_layer(model) == "layer4"
    model = build_network("timm:vit_tiny_patch16_224", 3, 64)
    step(model, 64)
    layer = cam_layer(model)
    kept = []
    hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(torch.zeros(2, 3, 64, 64))
    hook.remove()
    assert layer == "blocks.11.norm1" and token_grid(kept[0]).shape == (2, 192, 4, 4)
    with pytest.raises(NetworkError, match="has no model 'resnet10' .did you mean .*resnet10t"):
        build_network("timm:resnet10", 3, 64)


def test_without_timm_the_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NetworkError, match="timm:resnet10t needs timm, which is not installed: pip install timm"):
        build_network("timm:resnet10t", 3, 64)


# ------------------------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return state_of("resnet18").state_dict()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
def test_weights_are_loaded_from_a_file(resnet, tmp_path, wrap):
    torch.save(wrap(resnet), tmp_path / "w.pt")
    model = build_network("resnet18", 3, 64, tmp_path / "w.pt")
    assert all(torch.equal(value, resnet[key]) for key, value in model.state_dict().items())


def test_weights_of_a_parallel_model_lose_their_prefix(resnet, tmp_path):
    torch.save({f"module.{key}": value for key, value in resnet.items()}, tmp_path / "w.pt")
    assert torch.equal(build_network("resnet18", 3, 64, tmp_path / "w.pt").conv1.weight, resnet["conv1.weight"])


def test_torchvisions_files_with_former_names_are_taken(tmp_path):
    """densenet121-a639ec97.pth names norm.1 what is norm1 now and counts no batches; ViT's files name mlp.linear_1."""
    state = state_of("densenet121").state_dict()
    former = {re.sub(r"(denselayer\d+\.(norm|conv))([12])", r"\1.\3", key): v for key, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in former
    torch.save({k: v for k, v in former.items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.pt")
    loaded = build_network("densenet121", 3, 64, tmp_path / "w.pt").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    key = "encoder.layers.encoder_layer_0.mlp.linear_1.weight"
    assert networks._present_name(key) == "encoder.layers.encoder_layer_0.mlp.0.weight"
    assert networks._present_name(key.replace("_1.", "_2.")) == "encoder.layers.encoder_layer_0.mlp.3.weight"


def test_a_position_embedding_that_is_no_square_is_one_sentence(tmp_path):
    state = {"encoder.pos_embedding": torch.zeros(1, 4, 768)}
    with pytest.raises(NetworkError, match="position embedding that cannot be brought to images of 96 px") as caught:
        networks._fit_positions(state, 96, tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_the_head_is_new_where_the_number_of_classes_differs(resnet, tmp_path):
    torch.save(resnet, tmp_path / "w.pt")
    model = build_network("resnet18", 7, 64, tmp_path / "w.pt")
    assert model.fc.weight.shape == (7, 512) and torch.equal(model.conv1.weight, resnet["conv1.weight"])
    headless = {key: value for key, value in resnet.items() if not key.startswith("fc.")}
    torch.save(headless, tmp_path / "w.pt")
    assert build_network("resnet18", 3, 64, tmp_path / "w.pt").fc.weight.any()


def test_a_vit_takes_weights_of_another_image_size(tmp_path):
    state = state_of("vit_b_32").state_dict()  # 64 px: 2 x 2 patches
    torch.nn.init.normal_(state["encoder.pos_embedding"])
    torch.save(state, tmp_path / "w.pt")
    position = build_network("vit_b_32", 3, 96, tmp_path / "w.pt").encoder.pos_embedding
    assert position.shape == (1, 10, 768)
    old, new = state["encoder.pos_embedding"][0], position[0].detach()
    torch.testing.assert_close(new[0], old[0])
    torch.testing.assert_close(new[[1, 3, 7, 9]], old[1:])  # the corners stay the corners
    same = build_network("vit_b_32", 5, 64, tmp_path / "w.pt")
    assert torch.equal(same.encoder.pos_embedding, state["encoder.pos_embedding"]) and same.heads.head.out_features == 5


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), "the file lacks layer1.0.conv1.weight."),
        (lambda s: s.update(extra=torch.ones(1), more=torch.ones(1)), "the file has the unknown extra and 1 more."),
        (lambda s: s.update({"conv1.weight": torch.ones(3)}), "the file has another shape for conv1.weight."),
        (lambda s: s.clear(), "holds no state dict"),
        (lambda s: s.update(epoch=3), "holds no state dict"),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence(resnet, tmp_path, change, sentence):
    state = dict(resnet)
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(NetworkError, match=sentence):
        build_network("resnet18", 3, 64, tmp_path / "w.pt")


def test_a_file_of_weights_that_is_missing_or_none_is_one_sentence(tmp_path):
    with pytest.raises(NetworkError, match="no file of weights at .*w.pt"):
        build_network("small_cnn", 3, 64, tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(b"something else")
    with pytest.raises(NetworkError, match="cannot be read as weights: give a state dict"):
        build_network("small_cnn", 3, 64, tmp_path / "w.pt")


# --------------------------------------------------------------------------------------------- feature maps


def test_a_network_without_feature_maps_is_told_and_hooks_go():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    with pytest.raises(NetworkError, match="no module with a feature map .* name a layer yourself"):
        cam_layer(model, 32)
    with pytest.raises(NetworkError, match=r"Sequential fails on images \[2,3,40,40\]"):
        cam_layer(model, 40)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_map_of_one_position_is_passed_over():
    model = build_network("resnet18", 3, 32)  # its layer4 is 1 x 1 here
    assert cam_layer(model) == "layer3" and cam_layer(model, size=64) == "layer4"


def test_running_statistics_and_modes_survive_the_search():
    model = build_network("small_cnn", 3, 40)
    model.block2.eval()
    before = copy.deepcopy(model.state_dict())
    cam_layer(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and not model.block2.training and model.block1.training


def test_tokens_become_their_grid_row_by_row():
    grid = torch.arange(2 * 5 * 9.0).view(2, 5, 3, 3)
    patches = grid.flatten(2).transpose(1, 2)
    for prefix in (0, 1, 2):
        tokens = torch.cat([torch.full((2, prefix, 5), -1.0), patches], 1)
        assert torch.equal(token_grid(tokens, prefix), grid) and torch.equal(token_grid(tokens), grid)
    assert torch.equal(token_grid(torch.cat([torch.zeros(2, 5, 5), patches], 1), prefix=5), grid)
    with pytest.raises(ValueError, match="8 tokens are no square grid"):
        token_grid(torch.zeros(2, 8, 5))
    with pytest.raises(ValueError, match=r"tokens must be \[B,N,D\], got \[2, 5, 3, 3\]"):
        token_grid(grid)


def test_the_named_tokens_of_a_vit_reach_the_logits():
    model = build_network("vit_b_32", 3, 64).eval()
    nn.init.normal_(model.heads.head.weight)
    kept = []
    hook = model.get_submodule(cam_layer(model)).register_forward_hook(lambda m, i, output: kept.append(output))
    logits = model(torch.randn(2, 3, 64, 64))
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), kept[0])
    assert token_grid(gradient).flatten(1).norm(dim=1).min() > 0
