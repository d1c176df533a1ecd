"""Classifiers by name, made differentiable twice, and the layer of each that class-activation maps look at.

The S-IB loss takes the derivative of a derivative. What stands in its way is put right by :func:`build_network`:

- fused attention kernels have no second derivative: the whole forward runs with the math version;
- nor has ``nn.Hardsigmoid``: it is replaced by the same function made of ``relu6`` (``nn.Hardswish`` has one);
- in-place activations overwrite what a hook has kept: ``inplace`` is switched off, and DenseNet's last, functional
  ReLU is a module, whose output Grad-CAM wants.

The names in a model's state dict stay what they are. What cannot be put right from outside: a second derivative that
a custom op does not have, and in-place additions inside a block (ResNet's ``out += identity``), so that hooks belong
on a block or a stage (``layer4``), not on the last BatchNorm in it.
"""

import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sib_ext.layers import find_feature_map

NETWORKS = ("small_cnn", "gap_cnn", "small_resnet", "resnet18", "resnet50", "densenet121", "vit_b_32")
ALSO = "module:function of your own, or timm:<name> where timm is installed"
LEAST_SIZE = 32  #: px: below, the deeper networks have no feature map left


class NetworkError(Exception):
    """A network that cannot be built; the message is one sentence for the user."""


# ------------------------------------------------------------------------------------------- the demo's network


def block(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; ``stride`` divides the resolution."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=(kernel - 1) // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class SmallCNN(nn.Module):
    """Four BatchNorm blocks, global pooling and a linear layer; images [B,3,H,W] -> logits [B,classes].

    ``pooling``: ``"max"`` (what stands anywhere decides), or ``"mean"`` as ResNets have it (every place has its part).
    """

    def __init__(self, classes: int = 10, widths: tuple[int, int, int, int] = (24, 48, 64, 96), pooling: str = "max"):
        super().__init__()
        self.pooling = pooling
        self.block1 = block(3, widths[0], kernel=6, stride=2)
        self.block2 = block(widths[0], widths[1])
        self.pool = nn.AvgPool2d(2)
        self.block3 = block(widths[1], widths[2])
        self.block4 = block(widths[2], widths[3])
        self.head = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.block4(self.block3(self.pool(self.block2(self.block1(x)))))
        return self.head(features.amax((2, 3)) if self.pooling == "max" else features.mean((2, 3)))


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut (He et al. 2016); ``stride`` divides the resolution."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.first = block(channels_in, channels_out, stride=stride)
        self.second = nn.Sequential(
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)
        )
        self.shortcut = nn.Sequential()
        if channels_in != channels_out or stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A narrow residual network of output stride 8 whose last positions each see the whole of a 64 px image.

    Images [B,3,H,W] -> logits [B,classes].
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = block(3, 16, stride=2)
        plan = [(16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 2), (48, 48, 1), (48, 64, 1), (64, 64, 1)]
        self.blocks = nn.Sequential(*(Residual(*of_block) for of_block in plan))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


# ------------------------------------------------------------------------------------------------ by name


def build_network(name: str, classes: int, size: int, weights: Path | str | None = None) -> nn.Module:
    """A classifier of images [B,3,size,size] (normalised to [-1,1]) -> logits [B,classes] that the S-IB loss can train.

    Args:
        name: one of :data:`NETWORKS`; ``module:function``, called as ``function(classes=classes, size=size)`` with
            those of the two arguments that it takes; or ``timm:<name>``.
        classes: of the new classifier head.
        size: side of the images, px; kept as ``model.image_size``. A multiple of 32 for vit_b_32.
        weights: a file with a state dict (torch.save; or a dict that holds one under "model" or "state_dict").
            The head is left as it was initialised where the file's has another number of classes, and a torchvision
            ViT's position embedding is interpolated where its size differs. None: random weights.

    Raises:
        NetworkError: one sentence: unknown name, impossible size, or weights that do not fit.
    """
    if size < LEAST_SIZE:
        raise NetworkError(f"Networks need images of at least {LEAST_SIZE} px, got size {size}.")
    if classes < 2:
        raise NetworkError(f"A classifier needs at least 2 classes, got {classes}.")
    if name in _BUILDERS:
        model = _BUILDERS[name](classes, size)
    elif name.startswith("timm:"):
        model = _timm(name.removeprefix("timm:"), classes, size)
    elif ":" in name:
        model = _imported(name, classes, size)
    else:
        raise NetworkError(f"There is no network {name!r}: choose one of {', '.join(NETWORKS)}, {ALSO}.")
    if name not in _BUILDERS:
        _check_logits(name, model, classes, size)
    if weights is not None:
        load_weights(model, Path(weights), size)
    model.image_size = size
    return make_twice_differentiable(model)


def _densenet121(classes: int, size: int) -> nn.Module:
    from torchvision.models import DenseNet

    class DenseNet121(DenseNet):
        """torchvision's, whose last ReLU is a module (it has no state) and does not overwrite the feature map."""

        def __init__(self):
            super().__init__(32, (6, 12, 24, 16), 64, num_classes=classes)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.relu(self.features(x)).mean((2, 3)))

    return DenseNet121()


def _vit_b_32(classes: int, size: int) -> nn.Module:
    from torchvision.models import vit_b_32

    if size % 32:
        raise NetworkError(f"vit_b_32 cuts images into patches of 32 px: size must be a multiple of 32, got {size}.")
    return vit_b_32(image_size=size, num_classes=classes)


def _resnet(name: str) -> Callable[[int, int], nn.Module]:
    def build(classes: int, size: int) -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None, num_classes=classes)

    return build


_BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "small_cnn": lambda classes, size: SmallCNN(classes),
    "gap_cnn": lambda classes, size: SmallCNN(classes, (16, 32, 48, 64), "mean"),
    "small_resnet": lambda classes, size: SmallResNet(classes),
    "resnet18": _resnet("resnet18"),
    "resnet50": _resnet("resnet50"),
    "densenet121": _densenet121,
    "vit_b_32": _vit_b_32,
}


def _timm(name: str, classes: int, size: int) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise NetworkError(f"timm:{name} needs timm, which is not installed: pip install timm.") from error
    if name not in timm.list_models():
        near = get_close_matches(name, timm.list_models(), n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise NetworkError(f"timm {timm.__version__} has no model {name!r}{hint}: see timm.list_models().")
    try:
        return timm.create_model(name, num_classes=classes, img_size=size)
    except TypeError:  # most convolutional networks have no img_size to set
        return timm.create_model(name, num_classes=classes)
    except (AssertionError, ValueError) as error:
        raise NetworkError(f"timm:{name} cannot be built for images of {size} px: {_first_line(error)}.") from error


def _imported(name: str, classes: int, size: int) -> nn.Module:
    """Calls ``module:function``; the working directory is looked in, too."""
    module_name, _, function_name = name.partition(":")
    with _importing_from(os.getcwd()):
        try:
            function = getattr(import_module(module_name), function_name)
        except ImportError as error:
            raise NetworkError(f"{name}: cannot import {module_name!r}: {_first_line(error)}.") from error
        except AttributeError as error:
            raise NetworkError(f"{name}: the module {module_name} has no {function_name!r}.") from error
        if not callable(function):
            raise NetworkError(f"{name}: {function_name} is not a function that makes a network.")
        parameters = inspect.signature(function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        given = {"classes": classes, "size": size}
        model = function(**{key: value for key, value in given.items() if takes_all or key in parameters})
    if not isinstance(model, nn.Module):
        raise NetworkError(f"{name} must return an nn.Module, got {type(model).__name__}.")
    return model


@contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _check_logits(name: str, model: nn.Module, classes: int, size: int) -> None:
    """A network from elsewhere gives [B,classes] for images of this size.

    Raises:
        NetworkError: it does not.
    """
    try:
        with evaluating(model), torch.no_grad():
            logits = model(_probe(model, size))
    except Exception as error:  # whatever a network from elsewhere raises
        raise NetworkError(f"{name} fails on images [2,3,{size},{size}]: {_first_line(error)}.") from error
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise NetworkError(f"{name} must give logits [2,{classes}] for images [2,3,{size},{size}], got {got}.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")


def _probe(model: nn.Module, size: int) -> Tensor:
    like = next(model.parameters(), torch.zeros(()))
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(like)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# ------------------------------------------------------------------------------------------------ weights


def load_weights(model: nn.Module, path: Path, size: int) -> None:
    """Loads a state dict from a file into a network; see :func:`build_network`.

    Raises:
        NetworkError: no file, no state dict in it, or one of another network.
    """
    state = _read_state(path)
    own = model.state_dict()
    if "encoder.pos_embedding" in own and "encoder.pos_embedding" in state:
        state = _fit_positions(state, size, path)
    head = _head_names(model)
    other_head = any(k in state and state[k].shape != own[k].shape for k in head)
    if other_head or not any(key in state for key in head):
        state = {key: value for key, value in state.items() if key not in head}
    counters = "num_batches_tracked"  # older files have none, and nothing depends on them
    missing = [key for key in own if key not in state and key not in head and not key.endswith(counters)]
    unknown = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    for keys, what in ((missing, "lacks"), (unknown, "has the unknown"), (shapes, "has another shape for")):
        if keys:
            raise NetworkError(
                f"The weights {path} are those of another network: the file {what} {keys[0]}"
                f"{f' and {len(keys) - 1} more' if keys[1:] else ''}."
            )
    model.load_state_dict(own | state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NetworkError(f"There is no file of weights at {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on other files
        raise NetworkError(f"{path} cannot be read as weights: give a state dict written by torch.save.") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise NetworkError(f"{path} holds no state dict: a dict of names and tensors is expected.")
    # DataParallel and torch.compile put a word before every name.
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {_present_name(key): value for key, value in state.items()}


def _present_name(key: str) -> str:
    """torchvision's weight files keep the names that parts of DenseNet and ViT had when they were trained."""
    key = re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
    return key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _fit_positions(state: dict[str, Tensor], size: int, path: Path) -> dict[str, Tensor]:
    """A torchvision ViT's position embedding, interpolated to another image size."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    patch = state["conv_proj.weight"].shape[-1] if "conv_proj.weight" in state else 32
    try:
        return dict(interpolate_embeddings(size, patch, state))
    except ValueError as error:
        raise NetworkError(
            f"The weights {path} have a position embedding that cannot be brought to images of {size} px: "
            f"{_first_line(error)}."
        ) from error


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """The state-dict names of the classifier head: the last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return (f"{linear[-1]}.weight", f"{linear[-1]}.bias") if linear else ()


# ------------------------------------------------------------------------------------------ second derivatives


class Hardsigmoid(nn.Module):
    """relu6(x + 3)/6, as nn.Hardsigmoid, with a second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


class MathAttention:
    """Mixed into a network's class: its forward computes attention with the math kernel, which has a second derivative.

    Without gradients the fast kernels stay.
    """

    def forward(self, *arguments, **options):
        if not torch.is_grad_enabled():
            return super().forward(*arguments, **options)
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(*arguments, **options)


def make_twice_differentiable(model: nn.Module) -> nn.Module:
    """The same network, changed in place as the head of this module says; state-dict names stay."""
    for module in list(model.modules()):
        if getattr(module, "inplace", None) is True:
            module.inplace = False
        for name, child in module.named_children():
            if type(child) in _REPLACEMENTS:
                setattr(module, name, _REPLACEMENTS[type(child)]())
    if not isinstance(model, MathAttention):
        cls = type(model)
        model.__class__ = type(
            cls.__name__, (MathAttention, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__}
        )
    return model


_REPLACEMENTS = {nn.Hardsigmoid: Hardsigmoid}

# ---------------------------------------------------------------------------------------------- feature maps


def cam_layer(model: nn.Module, size: int | None = None) -> str:
    """Name of the module whose output class-activation maps look at (:func:`sib_ext.layers.find_feature_map`).

    That of a vision transformer gives tokens [B,N,D] (see :func:`token_grid`), any other a feature map [B,C,h,w].

    Args:
        size: side of the images that the network is tried on; default ``model.image_size`` or 224.

    Raises:
        NetworkError: there is no such module, or the network fails on such images.
    """
    size = size or getattr(model, "image_size", None) or 224
    size = size[0] if isinstance(size, tuple) else size
    try:
        with evaluating(model):
            name = find_feature_map(model, _probe(model, size), functions=False)
    except Exception as error:  # whatever a user's network raises
        raise NetworkError(
            f"{type(model).__name__} fails on images [2,3,{size},{size}]: {_first_line(error)}."
        ) from error
    if name is None:
        raise NetworkError(
            f"{type(model).__name__} has no module with a feature map [B,C,h,w] for class-activation maps on images of "
            f"{size} px: name a layer yourself."
        )
    return name


def token_grid(tokens: Tensor, prefix: int | None = None) -> Tensor:
    """Tokens [B,prefix+h*w,D] of a vision transformer on square images -> their grid [B,D,h,w], row by row.

    Args:
        tokens: e.g. the output (or its gradient) of the layer that :func:`cam_layer` names.
        prefix: tokens before the grid that are no patches (class token, registers); None: the first of 1, 0, 2, 5
            that leaves a square number.

    Raises:
        ValueError: not [B,N,D], or no square number of tokens is left.
    """
    if tokens.dim() != 3:
        raise ValueError(f"tokens must be [B,N,D], got {list(tokens.shape)}")
    count = tokens.shape[1]
    for skipped in (1, 0, 2, 5) if prefix is None else (prefix,):
        side = math.isqrt(max(count - skipped, 0))
        if side > 0 and side * side == count - skipped:
            return tokens[:, skipped:].transpose(1, 2).unflatten(2, (side, side))
    raise ValueError(f"{count} tokens are no square grid after {'1, 0, 2 or 5' if prefix is None else prefix} others")
