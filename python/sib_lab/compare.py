"""``sib-lab compare``: trains every (method, seed), explains and measures each network, and tells them apart.

Everything is stored as it is done, in the comparison's folder::

    comparison.json   what was asked for
    images.npz        the gallery's images
    runs/<method>-seed<k>/            a run folder, as ``sib-lab train`` makes it
        measured/accuracy-<set>.json  right or wrong, an entry an image
        measured/<explanation>.json   every measure of that method's maps, an entry an image
        measured/gallery.npz          maps of the gallery's images (first seed)
        measured/training.json        cost and curves; written last
    results.json metrics.csv report.html gallery.png

so that the same command goes on wherever it was stopped: a finished training or measurement is not done again, unless
the network that it belongs to has changed.
"""

import hashlib
import json
import math
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from . import explain, measure, report, results
from .config import METHODS, TrainConfig
from .data import DataSets, stack
from .data.base import limited
from .keeper import surroundings
from .networks import build_network
from .report import IMAGES, MAPS
from .results import COMPARISON, EMPTY, MEASURED, RUNS, run_name
from .runs import CONFIG, FINISHED, Run, RunError, open_config_data, open_run, read_record, write_text, write_whole
from .train import train

OF_MASKS = ("epg", "pointing_game", "iou", "ehr")  #: measures that need to know the object
OF_NETWORK = ("deletion", "insertion")  #: measures that ask the network: STEPS forward passes an image
GALLERY = 8  #: images in the report's gallery
GALLERY_SIDE = 160  #: the largest side at which their maps are kept, px
BATCH = 64  #: images classified or explained at a time
DEFINITIONS = 2  #: counted up when a measure's definition changes, so that stored values are made anew
USE_MASKS = ("sib", "rrr", "energy-loss")  #: training methods that take given masks where there are any
#: Options that decide the machine alone: a run that was trained with others is taken as it is.
MACHINE = {"device", "devices", "deterministic", "threads", "precision", "match"}


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Raises:
        ValueError: nothing to compare, something twice, or an unknown measure.
    """

    configs: dict[str, TrainConfig]  #: training method -> its options; the seed is replaced
    seeds: tuple[int, ...]
    measures: tuple[str, ...] = OF_MASKS
    images: int = 500  #: of the first test set, that are explained and measured
    layer: str | None = None  #: that class-activation maps look at; None: found
    best: bool = True  #: measure the weights that were best on the first validation split; False: the last

    def __post_init__(self):
        if not self.configs or not self.seeds:
            raise ValueError("there is nothing to compare: give at least one method and one seed")
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        unknown = set(self.measures) - set(OF_MASKS + OF_NETWORK)
        if unknown or not self.measures:
            raise ValueError(
                f"measures must be some of {', '.join(OF_MASKS + OF_NETWORK)}, "
                f"got {', '.join(sorted(unknown)) or 'none'}"
            )

    def config(self, method: str, seed: int) -> TrainConfig:
        """The options of one run."""
        return replace(self.configs[method], seed=seed)

    def is_matched(self, method: str) -> bool:
        """Whether a method is a penalty that follows the VJP variance of S-IB's run of the same seed."""
        return method == "gradient-penalty" and "sib" in self.configs and self.configs[method].strength is None

    @property
    def order(self) -> list[str]:
        """The methods in the order of training: those that another one is matched to come first."""
        return sorted(self.configs, key=lambda method: method == "gradient-penalty")


def compare(plan: Plan, folder: Path, fresh: bool = False, console: Console | None = None) -> dict:
    """Does what is not done yet of ``plan`` in ``folder``, prints the table and writes the report.

    Args:
        fresh: start anew: what the folder holds of the plan's runs is removed.

    Returns:
        the content of results.json.

    Raises:
        RunError, DataError, NetworkError: one sentence for the user.
        KeyboardInterrupt: Ctrl-C; the same plan goes on.
    """
    console = console or Console()
    if fresh and start_anew(plan, folder):
        console.print(f"Starting anew: the old runs in {folder} are removed.")
    for method in plan.configs:
        for seed in plan.seeds:
            check_same(plan.config(method, seed), folder / RUNS / run_name(method, seed))
    for number, seed in enumerate(plan.seeds):
        material = Material(plan, seed)
        if number == 0:
            check_layer(plan, material)
            write_comparison(plan, material, folder)
        for method in plan.order:
            run = trained(plan, method, seed, folder, material, console)
            Measurement(plan, material, run, gallery=number == 0).complete(console)
    return write_report(folder, console)


def write_report(folder: Path, console: Console) -> dict:
    """Table, results.json, metrics.csv, report.html and gallery.png from what is stored in ``folder``.

    Raises:
        ReportError: nothing is stored there.
    """
    found = results.collect(folder)
    results.write(found, folder)
    report.write(found, folder)
    for table in results.tables(found, console.width):
        console.print(table)
    if found["missing"]:
        console.print(f"Not finished yet: {', '.join(found['missing'])}.")
    console.print(f"Report: {folder / results.REPORT}")
    return found


# ------------------------------------------------------------------------------------------------- material


class Material:
    """The data of one seed: opened once, the images to explain read once, both only when they are needed."""

    def __init__(self, plan: Plan, seed: int):
        self.plan, self.seed = plan, seed
        self.config = plan.config(next(iter(plan.configs)), seed)

    @cached_property
    def data(self) -> DataSets:
        return open_config_data(self.config)

    def training_data(self, config: TrainConfig) -> DataSets:
        """The same images, of whose masks the training may see the share, and the boxes or all, as ``config`` says."""
        train = copy(self.data.train)  # with the images that it keeps in memory
        if config.annotated != self.config.annotated:
            train.annotated = open_config_data(config).train.annotated
        train.annotation = config.annotation
        return replace(self.data, train=train)

    @property
    def test_name(self) -> str:
        """The test set that is explained."""
        return next(iter(self.data.test))

    @cached_property
    def rows(self) -> list[int]:
        """Which images of the first test set are explained: those with a known object where there are any."""
        test = self.data.test[self.test_name]
        rows = test.annotated.nonzero()[:, 0] if test.annotated.any() else torch.arange(len(test))
        return rows[limited(test.labels[rows].tolist(), self.plan.images, seed=0)].tolist()

    @cached_property
    def items(self):
        """The images of ``rows``, stacked."""
        return stack(self.data.test[self.test_name], self.rows)

    @property
    def has_masks(self) -> bool:
        """Whether the object is known in the images that are explained."""
        return bool(self.data.test[self.test_name].annotated.any())

    @cached_property
    def gallery(self) -> Tensor:
        """Which of ``rows`` the gallery shows."""
        return gallery_rows(self.items.label, self.items.group, own_groups(self.data.train))


def own_groups(train) -> dict[int, int]:
    """The background group that each class stands on most often in training; empty where there are no groups."""
    pairs = Counter(zip(train.labels.tolist(), train.groups.tolist(), strict=True))
    return {label: group for (label, group), _ in reversed(pairs.most_common()) if group >= 0}


def gallery_rows(labels: Tensor, groups: Tensor, own: dict[int, int], count: int = GALLERY) -> Tensor:
    """The first images on a background that is not their class's own, no class twice before each was there once.

    Where every image stands on its own class's background, or none has a group: the first images.
    """
    pairs = list(zip(labels.tolist(), groups.tolist(), strict=True))
    foreign = [row for row, (label, group) in enumerate(pairs) if group >= 0 and own.get(label) != group]
    seen: Counter[int] = Counter()
    turns = []
    for row in foreign or range(len(pairs)):
        label = pairs[row][0]
        turns.append((seen[label], row))
        seen[label] += 1
    return torch.tensor([row for _, row in sorted(turns)[:count]])


def write_comparison(plan: Plan, material: Material, folder: Path) -> None:
    """comparison.json and images.npz."""
    data, items, rows = material.data, material.items, material.gallery
    explanations = dict(explain.METHODS)
    test = data.test[material.test_name]
    comparison = {
        "methods": {method: results.NAMES.get(method, method) for method in plan.configs},
        "losses": {m: loss_sentence(plan, m, material.training_data(config)) for m, config in plan.configs.items()},
        "seeds": list(plan.seeds),
        "explanations": explanations,
        "six": list(explain.SIX),
        "measures": list(plan.measures),
        "data": {
            "name": Path(material.config.root).name if data.name == "folder" else data.name,
            "classes": list(data.classes),
            "groups": list(data.groups),
            "tests": {name: len(dataset) for name, dataset in data.test.items()},
            "explained": material.test_name,
            "images": len(material.rows),
            "unannotated": int((~test.annotated).sum()) if material.has_masks else 0,
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
    share = data.train.annotated.double().mean().item()
    shown = "boxes around the objects" if config.annotation == "boxes" else "the objects"
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
    """The options that decide numbers and that all methods have in common; the seed is another for every run."""
    options = [asdict(config) for config in configs]
    names = [f.name for f in fields(TrainConfig) if f.name != "seed" and not f.metadata.get("moves_no_number")]
    return {name: options[0][name] for name in names if all(o[name] == options[0][name] for o in options)}


def check_layer(plan: Plan, material: Material) -> None:
    """Before anything is trained:

    Raises:
        RunError: the network has no module of the layer's name.
    """
    if plan.layer is None:
        return
    network = build_network(material.config.network, len(material.data.classes), material.data.size)
    if plan.layer not in dict(network.named_modules()):
        names = ", ".join(name for name, _ in network.named_children())
        raise RunError(
            f"{material.config.network} has no module {plan.layer!r} to look at: its first level has {names}."
        )


def machine() -> dict:
    """Where the numbers come from."""
    found = {"system": platform.platform(), "processor": processor(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------- training


def trained(plan: Plan, method: str, seed: int, folder: Path, material: Material, console: Console) -> Run:
    """The run of (method, seed): opened where it is finished, else trained from where it stands."""
    path = folder / RUNS / run_name(method, seed)
    config = plan.config(method, seed)
    if plan.is_matched(method):
        config = replace(config, match=variances(open_run(folder / RUNS / run_name("sib", seed))))
    if not (path / FINISHED).exists():
        console.print(f"{results.NAMES.get(method, method)}, seed {seed}: training", style="bold")
        train(config, path, console=console, data=material.training_data(config))
    return open_run(path, plan.best)


def check_same(config: TrainConfig, folder: Path) -> None:
    """
    Raises:
        RunError: the run in ``folder``, if there is one, has other options.
    """
    if not (folder / CONFIG).exists():
        return
    was = config.differing(read_record(folder)["config"])
    if other := ", ".join(f"{name} = {value}" for name, value in was.items() if name not in MACHINE):
        raise RunError(
            f"The run {folder} was begun with {other}: compare with the same options, into another --out, or --fresh."
        )


def variances(run: Run) -> tuple[float, ...]:
    """The VJP variance of each epoch of an S-IB run, which the gradient penalty is matched to; empty where unknown."""
    values = [line.get("vjp_variance", math.nan) for line in run.history]
    return tuple(values) if all(math.isfinite(value) and value > 0 for value in values) else ()


# ------------------------------------------------------------------------------------------------ measuring


class Measurement:
    """Everything that is measured on one run, each part stored in a file of its own."""

    def __init__(self, plan: Plan, material: Material, run: Run, gallery: bool):
        """``gallery``: keep the maps of the gallery's images, too."""
        self.plan, self.material, self.run = plan, material, run
        self.folder = run.folder / MEASURED
        self.wants_gallery = gallery
        weights = hashlib.sha256()
        for tensor in run.model.state_dict().values():
            weights.update(tensor.contiguous().numpy())
        self.identity = {"definitions": DEFINITIONS, "weights": weights.hexdigest()}

    def complete(self, console: Console) -> None:
        """Measures what is missing."""
        todo = self.missing()
        if not todo:
            return
        self.run.model.to(device(self.run.config))
        console.print(f"Measuring {self.run.folder.name}")
        self.progress = Progress(
            TextColumn("{task.description:<36}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        with self.progress:
            self.task = self.progress.add_task("", total=sum(images for _, images, _, _ in todo))
            for name, images, do, arguments in todo:
                self.progress.update(self.task, description=f"Measuring {self.run.folder.name}: {name}")
                done = self.progress.tasks[0].completed
                do(*arguments)
                self.progress.update(self.task, completed=done + images)

    def missing(self) -> list[tuple]:
        """What is not stored yet: (name, images, function, its arguments)."""
        todo = []
        for name, dataset in self.material.data.test.items():
            if not self._values(f"accuracy-{name}"):
                todo.append((name, len(dataset), self.accuracy, (name,)))
        for explanation, name in explain.METHODS.items():
            stored = self._values(explanation).keys()
            if not stored >= {f"{measure}/{explanation}" for measure in self._measures()}:
                todo.append((name, len(self.material.rows), self.maps, (explanation,)))
        if self.wants_gallery and not self._gallery_fits():
            todo.append(("gallery", len(self.material.gallery), self.gallery, ()))
        if todo or not self._values("training"):
            todo.append(("training", 0, self.training, ()))
        return todo

    def _measures(self) -> list[str]:
        """What is measured of maps; with anything, how many are empty."""
        known = self.material.has_masks
        found = [name for name in self.plan.measures if known or name not in OF_MASKS]
        return [*found, EMPTY] if found else []

    def _key(self, name: str) -> dict:
        """What a stored part depends on."""
        if name in explain.METHODS or name == "gallery":
            layer = self.plan.layer
            return self.identity | {"rows": len(self.material.rows), "images": self.plan.images, "layer": layer}
        return self.identity

    def _values(self, name: str) -> dict:
        """What is stored under a name; empty where nothing is, or where it is of another network or of other images."""
        path = self.folder / f"{name}.json"
        try:
            stored = json.loads(path.read_text())
            return stored["values"] if stored["key"] == self._key(name) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # missing or damaged: measured anew

    def _store(self, name: str, values: dict[str, list], **more) -> None:
        content = {"key": self._key(name), "values": {key: plain(of_key) for key, of_key in values.items()}} | more
        write_text(self.folder / f"{name}.json", json.dumps(content, allow_nan=False))

    @cached_property
    def probabilities(self) -> Tensor:
        """Of each class, for the explained images; [N,K]."""
        model = self.run.model
        with measure.in_eval_mode(model), torch.no_grad():
            batches = self.material.items.image.split(BATCH)
            return torch.cat([F.softmax(measure.scores_of(model, x), 1).cpu() for x in batches])

    def accuracy(self, name: str) -> None:
        """Right or wrong for every image of a test set, and the accuracy of its worst group."""
        dataset = self.material.data.test[name]
        loader = DataLoader(dataset, BATCH, num_workers=self.run.config.workers)
        right = measure.correct(self.run.model, loader)
        values = {f"accuracy/{name}": right.tolist()}
        worst = measure.worst_group(right, dataset.labels, dataset.groups)
        if math.isfinite(worst):
            values[f"worst_group/{name}"] = [worst]
        self._store(f"accuracy-{name}", values)

    def maps(self, explanation: str) -> None:
        """Every measure of one explanation method's maps; those that are stored stay."""
        images, target = self.material.items.image, self.probabilities.argmax(1)
        maps = self._explained((explanation,), progress=self._advance)[explanation]
        stored = self._values(explanation)
        wanted = [name for name in self._measures() if f"{name}/{explanation}" not in stored]
        found = {EMPTY: measure.empty_maps(maps)}
        if set(wanted) & set(OF_MASKS):
            found |= measure.measure_maps(maps, self.material.items.mask)
        if "deletion" in wanted:
            found["deletion"] = measure.deletion(self.run.model, images, maps, target)
        if "insertion" in wanted:
            found["insertion"] = measure.insertion(self.run.model, images, maps, target)
        values = {f"{name}/{explanation}": of.tolist() for name, of in found.items()}
        self._store(explanation, stored | values)

    def _explained(
        self,
        explanations: Sequence[str],
        rows: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Tensor]:
        """Maps of the explained images, or of some of them, for the predicted classes.

        Raises:
            RunError: the layer that was named has no feature map.
        """
        images, target = self.material.items.image, self.probabilities.argmax(1)
        if rows is not None:
            images, target = images[rows], target[rows]
        model, layer = self.run.model, self.plan.layer
        try:
            return explain.explain(model, images, target, explanations, layer, progress=progress, rows=rows)
        except ValueError as error:
            if layer is None:
                raise
            raise RunError(f"{error}.") from error

    def gallery(self) -> None:
        """The gallery's maps, with the predicted classes and each map's EPG."""
        rows = self.material.gallery
        probability, predicted = self.probabilities[rows].max(1)
        maps = self._explained(tuple(explain.METHODS), rows)
        arrays = {
            "predicted": predicted.numpy(),
            "probability": probability.numpy(),
            "key": json.dumps(self._key("gallery")),
        }
        for name, values in maps.items():
            values = values.cpu()
            arrays[name] = shrunk(values).numpy().astype(np.float32)
            undefined = torch.full((len(rows),), math.nan)
            masks = self.material.items.mask[rows]
            epg = measure.energy_pointing_game(values, masks) if self.material.has_masks else undefined
            arrays[f"epg_{name}"] = epg.numpy()
        write_whole(self.folder / MAPS, lambda file: np.savez_compressed(file, **arrays))

    def _advance(self, images: int) -> None:
        self.progress.advance(self.task, images)

    def _gallery_fits(self) -> bool:
        try:
            with np.load(self.folder / MAPS, allow_pickle=False) as stored:
                return json.loads(str(stored["key"])) == self._key("gallery")
        except (OSError, ValueError, KeyError):
            return False

    def training(self) -> None:
        """What the training cost, and its curves."""
        run = self.run
        seconds = run.seconds_per_step["median"]
        about = {
            "chance": measure.object_share(self.material.items.mask).mean().item() if self.material.has_masks else None,
            "epochs": len(run.history),
            "measured_epoch": run.epoch,
            "config": asdict(run.config),
            "record": {name: value for name, value in run.record.items() if name != "config"},
            "curves": curves(run),
        }
        self._store("training", {"seconds_per_step": [seconds]}, run=about)


def device(config: TrainConfig) -> torch.device:
    """Where the network is measured: as where it was trained."""
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def shrunk(maps: Tensor) -> Tensor:
    """Maps [N,H,W] at most GALLERY_SIDE px wide and high, by averaging."""
    times = math.ceil(max(maps.shape[1:]) / GALLERY_SIDE)
    return F.avg_pool2d(maps[:, None], times, ceil_mode=True, count_include_pad=False)[:, 0] if times > 1 else maps


def plain(values: list) -> list:
    """None for what JSON cannot hold; six digits are enough for a value of one image."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def curves(run: Run) -> dict[str, list[float]]:
    """A run's history by quantity, named for people: the training's cross-entropy and every validation accuracy."""
    named = {}
    for column in run.history[0] if run.history else ():
        values = [line[column] for line in run.history]
        if column == "cross_entropy":
            named["Cross-entropy in training"] = values
        elif column.startswith("accuracy_"):
            of = column.removeprefix("accuracy_").replace("_", " ")
            named["Validation accuracy" + (f", {of}" if of != "validation" else "")] = values
    return named


def start_anew(plan: Plan, folder: Path) -> bool:
    """Removes the plan's runs from ``folder``; whether there was one."""
    paths = [folder / RUNS / run_name(method, seed) for method in plan.configs for seed in plan.seeds]
    there = [path for path in paths if path.is_dir()]
    for path in there:
        shutil.rmtree(path)
    return bool(there)
