"""The 1000 classes of ImageNet in their standard order, from the installed libraries."""

from .errors import NetworkError


def imagenet_names() -> tuple[str, ...]:
    """A name for people of each class, torchvision's; two are there twice (crane, maillot)."""
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
