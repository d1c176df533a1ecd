"""What a comparison was asked for, with what and where: comparison.json and the gallery's images."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ..data import DataSets
from ..explaining import methods as explain
from ..reporting import results
from ..reporting.page import IMAGES
from ..reporting.results import COMPARISON
from ..training.config import METHODS, TrainConfig
from ..training.keeper import processor, surroundings
from ..training.making import NEED_MASKS
from ..training.runs import (
    write_text,
    write_whole,
)
from .material import Material
from .plan import Plan

USE_MASKS = ("sib", *NEED_MASKS)  #: training methods that take given masks where there are any


def write_comparison(plan: Plan, material: Material, folder: Path) -> None:
    """comparison.json and images.npz."""
    data, items, rows = material.data, material.items, material.gallery
    explanations = dict(explain.METHODS)
    comparison = {
        "methods": {method: results.NAMES.get(method, method) for method in plan.configs},
        "losses": {m: loss_sentence(plan, m, material.training_data(config)) for m, config in plan.configs.items()},
        "seeds": list(plan.seeds),
        "explanations": explanations,
        "six": list(explain.SIX),
        "measures": list(plan.measures),
        "data": {
            "name": Path(material.config.root).resolve().name if data.name == "folder" else data.name,
            "classes": list(data.classes),
            "quality": data.quality,
            "groups": list(data.groups),
            "tests": {name: len(dataset) for name, dataset in data.test.items()},
            "explained": material.test_name,
            "images": len(material.rows),
            "unannotated": int((~material.explained.annotated).sum()) if material.has_masks else 0,
            "skipped": list(data.skipped),
        },
        "config": shared_options(list(plan.configs.values())),
        "machine": machine(),
        **{name: surroundings(torch.device("cpu"))[name] for name in ("versions", "git_commit")},
    }
    write_text(folder / COMPARISON, json.dumps(comparison, indent=2) + "\n")
    arrays = {
        "images": items.image[rows].numpy(),
        "masks": items.mask[rows, 0].numpy().astype(np.float16),
        "labels": items.label[rows].numpy(),
        "groups": items.group[rows].numpy(),
        "annotated": items.annotated[rows].numpy(),
    }
    write_whole(folder / IMAGES, lambda file: np.savez_compressed(file, **arrays))


def loss_sentence(plan: Plan, method: str, data: DataSets) -> str:
    """What a training method is, and what it was told about the objects."""
    config = plan.configs[method]
    if config.epochs == 0:
        return "the network as its weights are; nothing was trained"
    share = data.train.annotated.double().mean().item()
    boxes = config.annotation == "boxes" or (data.multilabel and config.data_options.get("masks", "boxes") == "boxes")
    shown = "boxes around the objects" if boxes else "the objects"
    told = f"was shown {shown} in {100 * share:.0f} % of the training images" if share else "found no masks to use"
    uses = config.method in USE_MASKS or (config.method == "sib-paper" and config.masks == "given")
    if config.method == "sib" and config.masks == "self-made":
        uses, told = True, "made its own masks from the network's gradient"
    strength = "" if config.strength is None else f"; strength {config.strength:g}"
    if plan.is_matched(method):
        strength = "; it keeps the VJP's variance at that of the S-IB run of the same seed"
    options = "".join(f"; {name} = {value}" for name, value in config.loss_options.items())
    return METHODS[config.method] + (f"; {told}" if uses else "") + strength + options


def shared_options(configs: Sequence[TrainConfig]) -> dict:
    """The options that all methods have in common; the seed is another for every run."""
    options = [asdict(config) for config in configs]
    return {
        name: value
        for name, value in options[0].items()
        if name != "seed" and all(other[name] == value for other in options)
    }


def machine() -> dict:
    """Where the numbers come from."""
    found = {"system": platform.platform(), "processor": processor(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found
