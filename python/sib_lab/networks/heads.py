"""The classifier head: of a trained network, asked for the classes of other data; a new one's first bias."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .build import IMAGENET, IMAGENET_CLASSES
from .errors import NetworkError
from .imagenet_classes import imagenet_names, wordnet_ids
from .weights import read_weights

#: Torchvision's names of two classes that ImageNet calls as it calls another.
TWICE = {"crane bird": "crane", "maillot tank suit": "maillot"}


def restrict_head(model: nn.Module, rows: Sequence[int]) -> nn.Module:
    """The same network, changed in place so that its last linear layer has these rows alone, in this order: of the
    classes that it knows it chooses among them.

    Raises:
        NetworkError: its classifier head is no linear layer.
    """
    known: Any = model.class_count
    if list(rows) == list(range(known)):
        return model
    head, chosen = linear_head(model), torch.as_tensor(rows)
    if head is None:
        raise NetworkError(f"{type(model).__name__} has no linear classifier head to be asked for other classes.")
    with torch.no_grad():
        head.weight = nn.Parameter(head.weight[chosen].clone(), head.weight.requires_grad)
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias[chosen].clone(), head.bias.requires_grad)
    head.out_features = model.class_count = len(rows)  # type: ignore[assignment]
    return model


def linear_head(model: nn.Module) -> nn.Linear | None:
    """The last linear layer, if it has a row a class."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear and linear[-1].out_features == model.class_count else None


def start_at(model: nn.Module, log_odds: Tensor) -> None:
    """Sets the bias of a new linear head, where it has one: [K], the log-odds of each label.

    A bias moves by no more than the rate a step. From 0 it is the weights that learn how rare labels are, on whatever
    feature is never 0, and class activations are below 0 almost everywhere.
    """
    head = linear_head(model)
    if model.has_new_head and head is not None and head.bias is not None:
        with torch.no_grad():
            head.bias.copy_(log_odds)


def rows_of(classes: Sequence[str], ids: Sequence[str], known: int, weights: Path) -> tuple[list[int], str]:
    """Which of the ``known`` classes of a file of weights are the data's, and what people must know of that.

    By name, where the file is a checkpoint of this program; of 1000 classes by WordNet id or ImageNet's name; otherwise
    in their order, if there are as many.

    Args:
        classes, ids: names of the data's classes, and their WordNet ids ("": unknown; or none at all).

    Raises:
        NetworkError: a class that the weights do not tell.
    """
    names = None if str(weights) == IMAGENET else read_weights(weights).classes
    if names is not None:
        by_name = {name: [row] for row, name in enumerate(names)}
        return _distinct([_row(name, by_name, weights) for name in classes], classes), ""
    if known == len(classes):
        note = f"It names no classes: they are taken to be {', '.join(classes)}, in this order."
        return list(range(known)), note
    if known != IMAGENET_CLASSES:
        raise NetworkError(
            f"The weights {weights} tell {known} classes and the data has {len(classes)}: with 0 epochs they must be "
            "the same; train at least one, for a new classifier head."
        )
    by_name = {}
    for row, name in enumerate(imagenet_names()):
        for known_as in {_plain(name), TWICE.get(name, _plain(name))}:
            by_name.setdefault(known_as, []).append(row)
    by_id = {name: [row] for row, name in enumerate(wordnet_ids())} if any(ids) or any(map(_is_id, classes)) else {}
    rows = [
        _row(wordnet or name, by_id if wordnet or _is_id(name) else by_name, weights)
        for name, wordnet in zip(classes, ids or [""] * len(classes), strict=True)
    ]
    return _distinct(rows, classes), ""


def _distinct(rows: list[int], classes: Sequence[str]) -> list[int]:
    for place, row in enumerate(rows):
        if row in rows[:place]:
            raise NetworkError(
                f"{classes[rows.index(row)]} and {classes[place]} are the same class of the weights: join their "
                "folders, or train at least one epoch."
            )
    return rows


def _row(name: str, rows: dict[str, list[int]], weights: Path) -> int:
    found = rows.get(name) or rows.get(_plain(name)) or []
    if len(found) != 1:
        why = "is that of several classes" if found else "is no class"
        raise NetworkError(
            f"{name} {why} of the weights {weights}: name the class folders as theirs are, or give their WordNet ids "
            "in a file classes.csv (folder,wordnet_id) beside them; or train at least one epoch."
        )
    return found[0]


def _plain(name: str) -> str:
    return name.replace("_", " ").lower()


def _is_id(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()
