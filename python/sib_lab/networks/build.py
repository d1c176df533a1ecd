"""Classifiers by name, made differentiable twice."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import efficientnet_lite, libraries
from .errors import NetworkError, first_line
from .feature_maps import evaluating, probe
from .foreign import imported_network
from .own import SmallCNN, SmallResNet
from .preprocessing import Preprocessing, normalise_input
from .twice import make_twice_differentiable
from .weights import Weights, head_rows, load_weights, read_weights

NETWORKS = (
    "small_cnn",
    "gap_cnn",
    "small_resnet",
    "efficientnet_lite0",
    "resnet18",
    "resnet50",
    "densenet121",
    "vit_b_32",
)
ALSO = "another of torchvision's classifiers, timm:<name> where timm is installed, or module:function of your own"
LEAST_SIZE = 32  #: px: below, the deeper networks have no feature map left
IMAGENET = "imagenet"  #: in the place of a file: the weights of an installed package
IMAGENET_CLASSES = 1000

_OWN: dict[str, Callable[[int], nn.Module]] = {
    "small_cnn": SmallCNN,
    "gap_cnn": lambda classes: SmallCNN(classes, (16, 32, 48, 64), "mean"),
    "small_resnet": SmallResNet,
    "efficientnet_lite0": efficientnet_lite.EfficientNetLite0,
}


def build_network(
    name: str,
    classes: int | None,
    size: int,
    weights: Path | str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trust: bool = True,
) -> nn.Module:
    """A classifier of images [B,3,size,size] in [-1,1] -> logits [B,classes] that the S-IB loss can train.

    The network brings the images to the numbers that its weights were trained on itself, first thing in its forward:
    see :mod:`sib_lab.networks.preprocessing`.

    Args:
        name: one of :data:`NETWORKS` or of torchvision's classifiers (or ``torchvision:<name>``); ``timm:<name>``; or
            ``module:function``, called as ``function(classes=classes, size=size)`` with those of the two arguments
            that it takes.
        classes: of the classifier head; None: as many as the head in the weights has.
        size: side of the images, px; kept as ``model.image_size``. A multiple of its patches for a ViT.
        weights: a file, see :func:`sib_lab.networks.weights.read_weights`; or "imagenet", for efficientnet_lite0.
            What was taken from it is said in ``model.weights_note``. The head is left as it was initialised where the
            file's has another number of classes, and a ViT's position embedding is interpolated where its size
            differs. None: random weights.
        mean, std: of red, green and blue in 0..1, that the network normalises with; None: those of a checkpoint of
            this program or else of the network's published weights where ``weights`` are given; 0.5 (so that nothing
            is done) where they are random or nobody says. Kept in ``model.preprocessing``.
        trust: False refuses ``module:function``, which runs code that whoever wrote the name has chosen.

    Raises:
        NetworkError: one sentence: unknown name, impossible size, or weights that do not fit.
    """
    if size < LEAST_SIZE:
        raise NetworkError(f"Networks need images of at least {LEAST_SIZE} px, got size {size}.")
    if classes is not None and classes < 2:
        raise NetworkError(f"A classifier needs at least 2 classes, got {classes}.")
    if is_foreign(name) and not trust:
        raise NetworkError(
            f"The network {name} is code that would run here, and a file named it, not you: "
            "with --trust it is imported; do so only if you know where the file comes from."
        )
    loaded = None if weights is None else _read(name, weights)
    preprocessing = _preprocessing(name, loaded, mean, std)  # before anything slow
    model: Any = _built(name, classes or IMAGENET_CLASSES, size)
    if classes is None:
        rows = None if loaded is None else head_rows(model, loaded)
        if rows is None:
            if loaded is not None:
                load_weights(model, loaded, size)  # says what does not fit, if they are those of another network
            raise NetworkError(f"How many classes {name} has must be said: no weights with a classifier head do.")
        model = model if rows == IMAGENET_CLASSES else _built(name, rows, size)
    model.weights_note = "" if loaded is None else load_weights(model, loaded, size)
    model.has_new_head = loaded is None or head_rows(model, loaded) != (classes or rows)
    model.image_size, model.class_count = size, classes or rows
    return normalise_input(make_twice_differentiable(model), preprocessing)


def is_foreign(name: str) -> bool:
    """Whether the name is ``module:function``, whose module is imported."""
    return ":" in name and not name.startswith(("timm:", "torchvision:"))


def published_preprocessing(name: str) -> Preprocessing:
    """What the published weights of a network expect; the default for networks that have none.

    Raises:
        NetworkError: a name that timm or torchvision does not know, or timm is not installed.
    """
    if name.startswith("timm:"):
        return libraries.timm_preprocessing(name.removeprefix("timm:"))
    plain = name.removeprefix("torchvision:")
    if plain == "efficientnet_lite0":
        return efficientnet_lite.PREPROCESSING
    if plain not in _OWN and not is_foreign(plain) and libraries.is_torchvision(plain):
        return libraries.torchvision_preprocessing(plain)
    return Preprocessing()


def _read(name: str, weights: Path | str) -> Weights:
    if str(weights) != IMAGENET:
        return read_weights(Path(weights))
    if name != "efficientnet_lite0":
        raise NetworkError(f"The weights imagenet are those of efficientnet_lite0: give a file of weights for {name}.")
    return read_weights(efficientnet_lite.imagenet_weights())


def _preprocessing(
    name: str, weights: Weights | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Preprocessing:
    if (mean is None) != (std is None):
        raise NetworkError("The mean and std belong together: give both, or none.")
    if mean is not None:
        return Preprocessing(tuple(mean), tuple(std))
    if weights is None:
        return Preprocessing()
    return weights.preprocessing or published_preprocessing(name)


def _built(name: str, classes: int, size: int) -> nn.Module:
    """With random weights, as its makers have it."""
    if name in _OWN:
        return _OWN[name](classes)
    if name.startswith("timm:"):
        model = libraries.timm_network(name.removeprefix("timm:"), classes, size)
    elif is_foreign(name):
        model = imported_network(name, classes, size)
    elif name.startswith("torchvision:") or libraries.is_torchvision(name):
        model = libraries.torchvision_network(name.removeprefix("torchvision:"), classes, size)
    else:
        near = get_close_matches(name, [*NETWORKS, *libraries.torchvision_names()], n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise NetworkError(f"There is no network {name!r}{hint}: choose one of {', '.join(NETWORKS)}, {ALSO}.")
    if name not in NETWORKS:
        _check_logits(name, model, classes, size)
    return model


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
