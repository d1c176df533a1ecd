"""Networks of torchvision and timm by name, with random weights, and what their published weights expect."""

from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from .errors import NetworkError, first_line
from .preprocessing import Preprocessing

#: Of networks with auxiliary classifiers, which only help training from scratch.
NO_AUXILIARY = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


# ------------------------------------------------------------------------------------------------ torchvision


def is_torchvision(name: str) -> bool:
    """Whether torchvision has a classifier of this name."""
    return name in torchvision_names()


def torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def torchvision_network(name: str, classes: int, size: int) -> nn.Module:
    """
    Raises:
        NetworkError: no such classifier, or one that is not made for images of this size.
    """
    from torchvision.models import get_model

    if not is_torchvision(name):
        raise NetworkError(f"torchvision has no classifier {name!r}{_near(name, torchvision_names())}.")
    options: dict[str, Any] = dict(NO_AUXILIARY.get(name, {}))
    if name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        if size % patch:
            raise NetworkError(
                f"{name} cuts images into patches of {patch} px: size must be a multiple of {patch}, got {size}."
            )
        options["image_size"] = size
    elif name.startswith("maxvit"):
        options["input_size"] = (size, size)
    try:
        model = get_model(name, weights=None, num_classes=classes, **options)
    except (AssertionError, ValueError) as error:
        raise NetworkError(f"{name} cannot be built for images of {size} px: {first_line(error)}.") from error
    return _densenet(model) if name.startswith("densenet") else model


def _densenet(model: nn.Module) -> nn.Module:
    """torchvision's, whose last ReLU is a module (it has no state) and does not overwrite the feature map."""
    from torchvision.models import DenseNet as Theirs

    class DenseNet(Theirs):
        __doc__ = _densenet.__doc__

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.relu(self.features(x)).mean((2, 3)))

    model.relu = nn.ReLU()
    model.__class__ = DenseNet
    return model


def torchvision_preprocessing(name: str) -> Preprocessing:
    """That of torchvision's newest weights of the name; of such images in other sizes it is the same."""
    from torchvision.models import get_model_weights

    theirs = get_model_weights(name).DEFAULT.transforms()
    # Their weights came from TensorFlow, and transform_input undoes ImageNet's mean and std.
    mean, std = ((0.5,) * 3, (0.5,) * 3) if name in NO_AUXILIARY else (tuple(theirs.mean), tuple(theirs.std))
    return Preprocessing(mean, std, theirs.crop_size[0], theirs.interpolation.value)


# ------------------------------------------------------------------------------------------------------- timm


def _timm(name: str):
    """The library.

    Raises:
        NetworkError: it is not installed, or has no such model.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise NetworkError(f"timm:{name} needs timm, which is not installed: pip install timm.") from error
    if not timm.is_model(name):
        near = _near(name, timm.list_models())
        raise NetworkError(f"timm {timm.__version__} has no model {name!r}{near}: see timm.list_models().")
    return timm


def timm_network(name: str, classes: int, size: int) -> nn.Module:
    """
    Raises:
        NetworkError: timm is not installed, has no such model, or none for images of this size.
    """
    timm = _timm(name)
    try:
        return timm.create_model(name, num_classes=classes, img_size=size)
    except TypeError:  # most convolutional networks have no img_size to set
        return timm.create_model(name, num_classes=classes)
    except (AssertionError, ValueError) as error:
        raise NetworkError(f"timm:{name} cannot be built for images of {size} px: {first_line(error)}.") from error


def timm_preprocessing(name: str) -> Preprocessing:
    """That of the weights which timm names first, or of those that ``name`` has after its dot."""
    theirs = _timm(name).get_pretrained_cfg(name)
    if theirs is None:
        return Preprocessing()
    interpolation = theirs.interpolation if theirs.interpolation in ("bilinear", "bicubic") else "bilinear"
    return Preprocessing(theirs.mean, theirs.std, theirs.input_size[-1], interpolation)


def _near(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
