"""What is measured on one network: accuracy, explanations, cost; each part in a file of its own.

Where an image may have several labels, what is explained and measured on is each label that is there; else it is the
class that the network predicts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from ..console import progress_bar
from ..data import QUALITIES
from ..data.labelled import PRESENT
from ..explaining import measures as measure
from ..explaining import methods as explain
from ..reporting.page import MAPS
from ..reporting.results import EMPTY
from ..training.config import TrainConfig
from ..training.runs import Run, RunError
from .material import Material
from .plan import OF_MASKS, Plan
from .stored import Stored, plain

GALLERY_SIDE = 160  #: the largest side at which their maps are kept, px
BATCH = 64  #: images classified or explained at a time


class Measurement:
    """Everything that is measured on one run, each part stored in a file of its own."""

    def __init__(self, plan: Plan, material: Material, run: Run, gallery: bool):
        """``gallery``: keep the maps of the gallery's images, too."""
        self.plan, self.material, self.run = plan, material, run
        self.stored = Stored(plan, material, run)
        self.wants_gallery = gallery

    def complete(self, console: Console) -> None:
        """Measures what is missing."""
        todo = self.missing()
        if not todo:
            return
        self.run.model.to(device(self.run.config))
        console.print(f"Measuring {self.run.folder.name}", markup=False)
        self.progress = progress_bar(console, "images")
        with self.progress:
            self.task = self.progress.add_task("", total=sum(images for _, images, _, _ in todo))
            for name, images, do, arguments in todo:
                self.progress.update(self.task, description=f"Measuring {self.run.folder.name}: {name}")
                done = self.progress.tasks[0].completed
                do(*arguments)
                self.progress.update(self.task, completed=done + images)

    def missing(self) -> list[tuple]:
        """What is not stored yet: (name, images, function, its arguments)."""
        todo: list[tuple[str, int, Callable[..., None], tuple[str, ...]]] = []
        for name, dataset in self.material.data.test.items():
            quality = self.material.data.quality
            if not self.stored.values(f"{quality}-{name}"):
                of_labels = self.average_precision if quality == "map" else self.accuracy
                todo.append((name, len(dataset), of_labels, (name,)))
        for explanation, name in explain.METHODS.items():
            stored = self.stored.values(explanation).keys()
            if not stored >= {f"{measure}/{explanation}" for measure in self._measures()}:
                todo.append((name, len(self.material.rows), self.maps, (explanation,)))
        if self.wants_gallery and not self.stored.fits(MAPS):
            todo.append(("gallery", len(self.material.gallery), self.gallery, ()))
        if todo or not self.stored.values("training"):
            todo.append(("training", 0, self.training, ()))
        return todo

    def _measures(self) -> list[str]:
        """What is measured of maps; with anything, how many are empty."""
        known = self.material.has_masks
        found = [name for name in self.plan.measures if known or name not in OF_MASKS]
        return [*found, EMPTY] if found else []

    @cached_property
    def probabilities(self) -> Tensor:
        """Of each class, for the explained images; [N,K]."""
        batches = self.material.items.image.split(BATCH)
        scores = measure.scores(self.run.model, ((x,) for x in batches))
        return scores.sigmoid() if self.material.data.multilabel else F.softmax(scores, 1)

    @property
    def target(self) -> Tensor:
        """The class that is explained of each image, [N]."""
        return self.material.items.label if self.material.data.multilabel else self.probabilities.argmax(1)

    def accuracy(self, name: str) -> None:
        """Right or wrong for every image of a test set, what was predicted, and the accuracy of the worst group."""
        dataset = self.material.data.test[name]
        predicted = measure.predict(self.run.model, DataLoader(dataset, BATCH, num_workers=self.run.config.workers))
        right = (predicted == dataset.labels).double()
        values = {f"accuracy/{name}": right.tolist()}
        worst = measure.worst_group(right, dataset.labels, dataset.groups)
        if math.isfinite(worst):
            values[f"worst_group/{name}"] = [worst]
        classes = {"labels": dataset.labels.tolist(), "predicted": predicted.tolist()}
        self.stored.write(f"accuracy-{name}", values, classes=classes)

    def average_precision(self, name: str) -> None:
        """Mean average precision and F1 over the classes of a test set, and that of each class."""
        dataset = self.material.data.test[name]
        scores = measure.scores(self.run.model, DataLoader(dataset, BATCH, num_workers=self.run.config.workers))
        precision, f1 = measure.average_precision(scores, dataset.labels), measure.f1_scores(scores, dataset.labels)
        values = {f"map/{name}": [precision.nanmean().item()], f"f1/{name}": [f1.nanmean().item()]}
        of_classes = {
            "images": (dataset.labels == PRESENT).sum(0).tolist(),
            "average_precision": plain(precision.tolist()),
        }
        self.stored.write(f"map-{name}", values, of_classes=of_classes)

    def maps(self, explanation: str) -> None:
        """Every measure of one explanation method's maps; those that are stored stay."""
        images, target = self.material.items.image, self.target
        maps = self._explained((explanation,), progress=self._advance)[explanation]
        stored = self.stored.values(explanation)
        wanted = [name for name in self._measures() if f"{name}/{explanation}" not in stored]
        found = {EMPTY: measure.empty_maps(maps)}
        if set(wanted) & set(OF_MASKS):
            found = measure.measure_maps(self._counted(maps), self.material.items.mask) | found
        if "deletion" in wanted:
            found["deletion"] = measure.deletion(self.run.model, images, maps, target)
        if "insertion" in wanted:
            found["insertion"] = measure.insertion(self.run.model, images, maps, target)
        values = {f"{name}/{explanation}": of.tolist() for name, of in found.items()}
        self.stored.write(explanation, stored | values)

    def _explained(
        self,
        explanations: Sequence[str],
        rows: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Tensor]:
        """Maps of the explained images, or of some of them, for their ``target``.

        Raises:
            RunError: the layer that was named has no feature map.
        """
        images, target = self.material.items.image, self.target
        if rows is not None:
            images, target = images[rows], target[rows]
        model, layer = self.run.model, self.plan.layer
        try:
            return explain.explain(model, images, target, explanations, layer, progress=progress, rows=rows)
        except ValueError as error:
            if layer is None:
                raise
            raise RunError(f"{error}.") from error

    def _counted(self, maps: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Maps of the explained images, or of some of them, without the pixels that count neither way."""
        counted = self.material.counted
        return maps if counted is None else maps * counted[rows].to(maps.device)

    def gallery(self) -> None:
        """The gallery's maps, with the classes that are explained, their probabilities, and each map's EPG."""
        rows = self.material.gallery
        target = self.target[rows]
        maps = self._explained(tuple(explain.METHODS), rows)
        arrays = {
            "predicted": target.numpy(),
            "probability": self.probabilities[rows, target].numpy(),
        }
        for name, values in maps.items():
            values = values.cpu()
            arrays[name] = shrunk(values).numpy().astype(np.float32)
            undefined = torch.full((len(rows),), math.nan)
            masks = self.material.items.mask[rows]
            epg = (
                measure.energy_pointing_game(self._counted(values, rows), masks)
                if self.material.has_masks
                else undefined
            )
            arrays[f"epg_{name}"] = epg.numpy()
        self.stored.write_arrays(MAPS, arrays)

    def _advance(self, images: int) -> None:
        self.progress.advance(self.task, images)

    def chance(self) -> float:
        """EPG of a map that is the same everywhere, its mean."""
        masks = self.material.items.mask
        if self.material.counted is None:
            return measure.object_share(masks).mean().item()
        return measure.energy_pointing_game(self.material.counted.double(), masks).nanmean().item()

    def training(self) -> None:
        """What the training cost, and its curves."""
        run = self.run
        about = {
            "chance": self.chance() if self.material.has_masks else None,
            "epochs": len(run.history),
            "mean_seconds_per_step": run.seconds_per_step["mean"] if run.config.epochs else None,
            "measured_epoch": run.epoch,
            "config": asdict(run.config),
            "record": {name: value for name, value in run.record.items() if name != "config"},
            "curves": curves(run),
            "labels": self.material.items.label.tolist(),
        }
        self.stored.write(
            "training", {"seconds_per_step": [run.seconds_per_step["median"]] if run.config.epochs else []}, run=about
        )


def device(config: TrainConfig) -> torch.device:
    """Where the network is measured: as where it was trained."""
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def shrunk(maps: Tensor) -> Tensor:
    """Maps [N,H,W] at most GALLERY_SIDE px wide and high, by averaging."""
    times = math.ceil(max(maps.shape[1:]) / GALLERY_SIDE)
    return F.avg_pool2d(maps[:, None], times, ceil_mode=True, count_include_pad=False)[:, 0] if times > 1 else maps


def curves(run: Run) -> dict[str, list[float]]:
    """A run's history by quantity, named for people: the training's cross-entropy and every validation accuracy."""
    named = {}
    for column in run.history[0] if run.history else ():
        if column == "cross_entropy":
            name = "Cross-entropy in training"
        elif (quality := column.partition("_")[0]) in QUALITIES:
            of = column.partition("_")[2].replace("_", " ")
            name = f"Validation {QUALITIES[quality]}" + (f", {of}" if of != "validation" else "")
        else:
            continue  # a term of the loss, which an epoch of few steps may lack
        named[name] = [line[column] for line in run.history]
    return named
