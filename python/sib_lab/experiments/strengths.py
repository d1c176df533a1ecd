"""How strong a training loss is made: one training a strength, measured on images that were held out of training.

No test image is looked at. A point of the curve is stored as it is done, in its run's folder, and the weights are
removed then.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import DataSets, stack
from ..data.base import drawn, limited
from ..data.files import ImageFiles, name_of
from ..data.labelled import LabelPairs, Photographs
from ..explaining import measures as measure
from ..explaining import methods as explain
from ..reporting import results
from ..training.config import TrainConfig
from ..training.runs import (
    BEST,
    LAST,
    DivergedError,
    Run,
    open_config_data,
    open_run,
    write_text,
)
from ..training.train import train
from .measurement import BATCH, device

HELD_OUT = "held_out"  #: the name of the split
SHARE = 1 / 3  #: of every class's training images
SEED = 100  #: of the trainings and of what is held out; the comparison has others
IMAGES = 200  #: held-out images whose explanations are measured, at most
POINT = "point.json"  #: in a run's folder
TOLERANCE = 0.01  #: of accuracy, that an explanation on the object may cost at most
ROUNDING = 1e-9  #: of a difference of accuracies
MEASURES = ("epg", "iou", results.EMPTY)


@dataclass(frozen=True)
class Point:
    """What one training reached on the held-out images; NaN where its loss was no number any more, or no object is
    known."""

    accuracy: float  #: in [0,1], of all of them; of several labels an image mean average precision
    epg: float = math.nan  #: in [0,1], as the others the mean of the three class-activation maps
    iou: float = math.nan
    empty: float = math.nan  #: share of the maps
    images: int = 0  #: of the accuracy; 0: not known, or mean average precision

    @property
    def error(self) -> float:
        """Standard error of the accuracy, of its images alone; NaN where their number is not known."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.images) if self.images else math.nan


def held_out(data: DataSets) -> DataSets:
    """A set of image files without its tests, with a third of every class's training images held out (of several labels
    a third of all).

    What is held out follows from each file's name; it is the only validation split, "held_out", together with the
    set's own (first) validation split. The rest is trained on, with what the training may see of its objects.

    Raises:
        DataError: a class with a single training image.
    """
    train, validation = data.train, next(iter(data.validation.values()))
    names = [name_of(sample.image, train.root) for sample in train.samples]
    labels, classes = ([0] * len(names), ["images"]) if data.multilabel else (train.labels.tolist(), data.classes)
    rows = drawn(names, labels, classes, {HELD_OUT: SHARE}, SEED)
    chosen = [train.samples[row] for row in rows["train"]]
    rest = train.of(chosen, train.transform, train.annotated[rows["train"]])
    rest.annotation = train.annotation
    held = [train.samples[row] for row in rows[HELD_OUT]] + validation.samples
    known = [sample.annotated for sample in held]
    held_files = train.of(held, validation.transform, known)
    return replace(data, train=rest, validation={HELD_OUT: held_files}, test={})


def open_held_out(config: TrainConfig) -> DataSets:
    """What a training of the curve is given.

    Raises:
        DataError: what is wrong with the data.
    """
    return held_out(open_config_data(config))


def measured_point(config: TrainConfig, folder: Path) -> str:
    """Trains and measures one point of the curve, from where it stands in ``folder``; for people, what was done.

    A training whose loss becomes infinite or NaN is a point of accuracy NaN.

    Raises:
        RunError, DataError, NetworkError: one sentence for the user.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    start = time.monotonic()
    data = open_held_out(config)
    try:
        train(config, folder, console=Console(quiet=True), quiet=True, data=data)
    except DivergedError as error:
        _write(folder, {"accuracy": None, "why": str(error)})
        return f"its training failed, which is below every accuracy: {error}"
    trained = time.monotonic()
    # The last weights: the best would be the best on these very images.
    run = open_run(folder, best=False, trust=True)
    _write(folder, measured(run, data.validation[HELD_OUT]))
    return f"trained {clock(trained - start)}, measured {clock(time.monotonic() - trained)}"


def measured(run: Run, held: ImageFiles | Photographs) -> dict:
    """Accuracy on all held-out images and, where objects are known, what POINT holds of the class-activation maps: of
    the predicted class, of several labels of each that is there."""
    model, several = run.model.to(device(run.config)), isinstance(held, Photographs)
    if several:
        scores = measure.scores(model, DataLoader(held, BATCH))
        found = {"map": measure.average_precision(scores, held.labels).nanmean().item()}
        explained = LabelPairs(held)
        known = explained.annotated.nonzero()[:, 0]
    else:
        found = {"accuracy": measure.accuracy(model, DataLoader(held, BATCH)), "held_out": len(held)}
        explained, known = held, known_alike(held)
    if not len(known):
        return found
    rows = known[limited(explained.labels[known].tolist(), IMAGES, seed=0)]
    items = stack(explained, rows)
    target = items.label if several else measure.predict(model, items.image)
    maps = explain.explain(model, items.image, target, explain.CAMS)
    counted = ~torch.cat([explained.left_out(row) for row in rows.tolist()]) if several else 1
    of_maps = {name: measure.measure_maps(of * counted, items.mask) for name, of in maps.items()}
    of_measures = {
        key: {name: results.plain(values[key].nanmean().item()) for name, values in of_maps.items()} for key in MEASURES
    }
    return found | {"explained": len(rows)} | of_measures


def known_alike(held: ImageFiles) -> Tensor:
    """The rows whose object is known by a mask, or where there is none by boxes: what differs would not compare."""
    masks = torch.tensor([sample.mask is not None for sample in held.samples], dtype=torch.bool)
    return (held.annotated & masks if masks.any() else held.annotated).nonzero()[:, 0]


def _write(folder: Path, content: dict) -> None:
    write_text(folder / POINT, json.dumps(content, indent=2, allow_nan=False) + "\n")
    for name in (LAST, BEST):  # some 60 MB a run that nobody opens again
        (folder / name).unlink(missing_ok=True)


def is_measured(folder: Path) -> bool:
    return (folder / POINT).exists()


def read_point(folder: Path) -> Point:
    """The point in a run's folder.

    Raises:
        ReportError: it is missing or damaged.
    """
    with results.reading(folder / POINT):
        content = results.read_json(folder / POINT)
        means = {key: results.tensor(list(content[key].values())).mean().item() for key in MEASURES if key in content}
        quality = content["map"] if "map" in content else content["accuracy"]
        return Point(results.tensor([quality]).item(), **means, images=content.get("held_out", 0))


def chosen_strength(points: Mapping[float, Point], baseline: Point) -> float:
    """The rule, fixed before anything was measured: of the strengths whose accuracy is at most 0.01 below
    cross-entropy's, the one with the greatest EPG; if there is none, the one of the highest accuracy.

    What is NaN is below everything else; of equals the weakest is taken.

    Raises:
        ValueError: no strengths.
    """
    if not points:
        raise ValueError("points must hold at least one strength, got none")
    strengths = sorted(points)  # max gives the first of equals
    near = [s for s in strengths if points[s].accuracy >= baseline.accuracy - TOLERANCE - ROUNDING]
    if near:
        return max(near, key=lambda strength: _or_least(points[strength].epg))
    return max(strengths, key=lambda strength: _or_least(points[strength].accuracy))


def pooled_costs(curves: Sequence[tuple[Mapping[float, Point], Point]]) -> dict[float, float]:
    """Of the strengths that all sets have, the accuracy of all held-out images together less cross-entropy's.

    Args:
        curves: of each set, strength -> point, and cross-entropy's, which is finite.

    Returns:
        strength -> difference, NaN where a training diverged; empty without curves.
    """
    shared = set.intersection(*(set(points) for points, _ in curves)) if curves else set()
    images = sum(baseline.images for _, baseline in curves)
    return {
        strength: sum((points[strength].accuracy - of.accuracy) * of.images for points, of in curves) / images
        for strength in sorted(shared)
    }


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def clock(seconds: float) -> str:
    """3:10 for 190 seconds, 1:02:03 for an hour more."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
