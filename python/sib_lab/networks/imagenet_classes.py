"""The 1000 classes of ImageNet in their standard order, from the installed libraries."""

from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from .errors import NetworkError


def imagenet_names() -> tuple[str, ...]:
    """A name for people of each class, torchvision's."""
    # Its list alone where it lies in a file of its own: to import torchvision takes seconds.
    package = find_spec("torchvision")
    listed = Path(package.origin).parent / "models" / "_meta.py" if package and package.origin else Path()
    if listed.is_file():
        return tuple(run_path(str(listed))["_IMAGENET_CATEGORIES"])
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def wordnet_ids() -> tuple[str, ...]:
    """The WordNet id of each class (n01440764, ...), which names its folder in ImageNet.

    Raises:
        NetworkError: timm, which has them, is not installed.
    """
    try:
        from timm.data import ImageNetInfo
    except ModuleNotFoundError as error:
        raise NetworkError("The WordNet ids of ImageNet's classes need timm: pip install timm.") from error
    return tuple(ImageNetInfo().label_names())
