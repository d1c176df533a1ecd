"""``sib-lab demo``: data, two trainings, measures, report."""

import csv
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import sib_ext

from . import report
from .config import CHECKPOINT, Config
from .data.digits_on_textures import Split, build
from .explain import explain
from .measure import Estimate, correct, energy_pointing_game, estimate, object_share
from .train import NETWORKS, Learner, fit, load_checkpoint, make_learners, save_checkpoint

GALLERY = 8  #: images shown in the report
PACKAGES = ("torch", "captum", "scikit-learn", "scikit-image", "matplotlib")


def run_demo(config: Config, folder: Path, resume: bool, console: Console | None = None) -> dict:
    """Trains, measures, prints the table and writes everything into ``folder``; returns the content of results.json.

    Raises:
        CheckpointError: ``resume``, but ``folder`` has no checkpoint that fits ``config``.
        KeyboardInterrupt: Ctrl-C; the checkpoint in ``folder`` is up to date.
    """
    console = console or Console()
    torch.set_num_threads(config.threads)
    checkpoint = folder / CHECKPOINT
    learners = make_learners(config)
    if resume:
        load_checkpoint(checkpoint, config, learners)
    else:
        if checkpoint.exists():
            console.print(f"Starting anew over the checkpoint in {folder} (--resume would have gone on from it).")
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(checkpoint, config, learners)

    splits = build(config.seed, config.train_digits, config.validation_digits, config.test_digits, copies=config.copies)
    _train(config, learners, splits, checkpoint, console)
    with console.status("Explaining the test images"):
        test = splits["test_uncorrelated"]
        maps = {name: explain(learner.model, test.inputs) for name, learner in learners.items()}
        results = collect(config, learners, splits, maps)
    write_results(results, folder)
    rows = gallery_rows(test)
    report.write(
        folder,
        results,
        test,
        rows,
        {name: {method: values[rows] for method, values in of_network.items()} for name, of_network in maps.items()},
        {name: learner.model for name, learner in learners.items()},
    )
    console.print(results_table(results))
    console.print(f"Report: {folder / 'report.html'}")
    return results


def _train(
    config: Config,
    learners: Mapping[str, Learner],
    splits: Mapping[str, Split],
    checkpoint: Path,
    console: Console,
) -> None:
    """Trains both networks under one progress bar each."""
    progress = Progress(
        TextColumn("{task.description:<13}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("cross-entropy {task.fields[value]}"),
        console=console,
    )
    tasks = {
        learner: progress.add_task(
            NETWORKS[name], start=False, total=learner.steps, completed=learner.steps_done, value="-"
        )
        for name, learner in learners.items()
    }

    def show(learner: Learner) -> None:
        progress.start_task(tasks[learner])
        recent = learner.history["cross_entropy"][-20:]
        progress.update(tasks[learner], completed=learner.steps_done, value=f"{sum(recent) / len(recent):.3f}")

    with progress:
        fit(list(learners.values()), splits, lambda: save_checkpoint(checkpoint, config, learners), show)


def gallery_rows(split: Split) -> Tensor:
    """The first images on another label's background, no label twice before each was there once."""
    seen = Counter()
    turns = []
    for row in (split.backgrounds != split.labels).nonzero()[:, 0].tolist():
        label = int(split.labels[row])
        turns.append((seen[label], row))
        seen[label] += 1
    return torch.tensor([row for _, row in sorted(turns)[:GALLERY]])


# ----------------------------------------------------------------------------------------------- results


def collect(
    config: Config,
    learners: Mapping[str, Learner],
    splits: Mapping[str, Split],
    maps: Mapping[str, Mapping[str, Tensor]],
) -> dict:
    """Everything that results.json holds; ``maps`` are those of the test images on uncorrelated backgrounds."""
    test = splits["test_uncorrelated"]
    networks = {}
    for name, learner in learners.items():
        networks[name] = {
            "accuracy_matched": estimate(correct(learner.model, splits["test_matched"])),
            "accuracy_uncorrelated": estimate(correct(learner.model, test)),
            "epg": {m: estimate(energy_pointing_game(values, test.masks)) for m, values in maps[name].items()},
        }
    return {
        "images": len(test),
        "epg_by_chance": object_share(test.masks).mean().item(),
        "networks": networks,
        "curves": {name: curves(learner) for name, learner in learners.items()},
        "seconds_per_step": {name: median(learner.history["seconds"]) for name, learner in learners.items()},
        "config": asdict(config),
        "versions": {"python": platform.python_version(), "sib_ext": sib_ext.__version__}
        | {package: version(package) for package in PACKAGES},
    }


def curves(learner: Learner) -> dict[str, list[float]]:
    """Per epoch: mean training cross-entropy, and accuracy on both validation splits."""
    steps = torch.tensor(learner.history["cross_entropy"], dtype=torch.float64)
    return {
        "cross_entropy": steps.view(-1, learner.steps_per_epoch).mean(1).tolist(),
        "validation_matched": learner.history["validation_matched"],
        "validation_uncorrelated": learner.history["validation_uncorrelated"],
    }


def write_results(results: dict, folder: Path) -> None:
    """results.json with everything, and metrics.csv with the compared numbers alone, which one seed repeats exactly."""

    def plain(value):
        if isinstance(value, Estimate):
            return plain(asdict(value))
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    (folder / "results.json").write_text(json.dumps(plain(results), indent=2, allow_nan=False) + "\n")
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "measure", "mean", "half_width_95", "undefined_images"])
        for name, network in results["networks"].items():
            for measure, value in report.measures(network).items():
                writer.writerow([name, measure, value.mean, value.half_width, value.undefined])


def results_table(results: dict) -> Table:
    """The table for the terminal."""
    table = Table(caption=f"{results['images']} test images; ± is the 95 % interval over images")
    table.add_column("")
    for name in results["networks"]:
        table.add_column(NETWORKS[name], justify="right")
    columns = [report.measures(network) for network in results["networks"].values()]
    for measure in columns[0]:
        table.add_row(measure, *(report.number(column[measure]) for column in columns))
    table.add_row("EPG by chance (share of object)", *[f"{results['epg_by_chance']:.3f}"] * len(columns))
    table.add_section()
    table.add_row("Seconds per step (median)", *(f"{results['seconds_per_step'][n]:.3f}" for n in results["networks"]))
    return table
