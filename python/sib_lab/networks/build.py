"""Classifiers by name, made differentiable twice."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import NetworkError, first_line
from .feature_maps import evaluating, probe
from .own import SmallCNN, SmallResNet
from .twice import make_twice_differentiable
from .weights import load_weights

NETWORKS = ("small_cnn", "gap_cnn", "small_resnet", "resnet18", "resnet50", "densenet121", "vit_b_32")
ALSO = "module:function of your own, or timm:<name> where timm is installed"
LEAST_SIZE = 32  #: px: below, the deeper networks have no feature map left


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
        raise NetworkError(f"timm:{name} cannot be built for images of {size} px: {first_line(error)}.") from error


def _imported(name: str, classes: int, size: int) -> nn.Module:
    """Calls ``module:function``; the working directory is looked in, too."""
    module_name, _, function_name = name.partition(":")
    with _importing_from(os.getcwd()):
        try:
            function = getattr(import_module(module_name), function_name)
        except ImportError as error:
            raise NetworkError(f"{name}: cannot import {module_name!r}: {first_line(error)}.") from error
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
            logits = model(probe(model, size))
    except Exception as error:  # whatever a network from elsewhere raises
        raise NetworkError(f"{name} fails on images [2,3,{size},{size}]: {first_line(error)}.") from error
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise NetworkError(f"{name} must give logits [2,{classes}] for images [2,3,{size},{size}], got {got}.")
