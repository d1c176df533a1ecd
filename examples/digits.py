"""What the examples share: handwritten digits on textures that give the label away, and where a network sees evidence.

Nothing is downloaded. Your own images, masks and network take the place of these.
"""

import argparse
from collections.abc import Sequence

import torch
from sib_lab.data import ItemDataset, open_data
from sib_lab.explaining.measures import accuracy, energy_pointing_game
from sib_lab.explaining.methods import explain
from torch import nn
from torch.utils.data import DataLoader

CLASSES, SIZE = 10, 40


def arguments(description: str, given: Sequence[str] | None = None, **more: dict) -> argparse.Namespace:
    """``--images``, ``--epochs`` and ``more`` of an example's own, name -> keywords of ``add_argument``."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="how many to train on (2000)")
    parser.add_argument("--epochs", type=int, default=5, help="how often each is seen (5)")
    for name, keywords in more.items():
        parser.add_argument(f"--{name}", **keywords)
    return parser.parse_args(given)


def data(images: int, size: int = SIZE) -> tuple[ItemDataset, ItemDataset]:
    """Training and test digits: items (image [3,size,size] in [-1,1], label, mask [1,size,size], annotated, group).

    In training the background agrees with the label in 95 % of the images, in the test it says nothing.
    """
    digits = open_data("digits", size=size, limit=images)
    return digits.train, digits.test["uncorrelated"]


def loader(items: ItemDataset, batch: int = 32) -> DataLoader:
    """Shuffled batches (x, y, mask)."""
    return DataLoader(items, batch, shuffle=True, drop_last=True, collate_fn=collate)


def collate(items: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y, mask, *_ = torch.utils.data.default_collate(items)
    return x, y, mask


def shown(model: nn.Module, test: ItemDataset) -> dict[str, float]:
    """Prints how well the network classifies, and how much of Grad-CAM lies on the digits."""
    x, y, mask, *_ = torch.utils.data.default_collate(list(test))
    epg = energy_pointing_game(explain(model, x, y, ("gradcam",))["gradcam"], mask)
    found = {"accuracy": accuracy(model, x, y), "epg": epg.mean().item(), "chance": (mask > 0.5).double().mean().item()}
    print("accuracy {accuracy:.3f}, {epg:.0%} of Grad-CAM on the digits ({chance:.0%} by chance)".format(**found))
    return found
