"""``sib-lab compare``: trains every (method, seed), explains and measures each network, and tells them apart.

Everything is stored as it is done, in the comparison's folder::

    comparison.json   what was asked for
    images.npz        the gallery's images
    runs/<method>-seed<k>/            a run folder, as ``sib-lab train`` makes it
        measured/accuracy-<set>.json  right or wrong, an entry an image (of several labels: map-<set>.json, one value)
        measured/<explanation>.json   every measure of that method's maps, an entry an image
        measured/gallery.npz          maps of the gallery's images (first seed)
        measured/training.json        cost and curves; written last
    results.json metrics.csv report.html gallery.png

so that the same command goes on wherever it was stopped: a finished training or measurement is not done again, unless
the network that it belongs to has changed.
"""

import math
import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..console import plain_console
from ..data import checks
from ..networks.build import build_network
from ..reporting import page as report
from ..reporting import results
from ..reporting.results import RUNS, run_name
from ..training.config import TrainConfig
from ..training.losses import preset_constants
from ..training.runs import (
    CONFIG,
    Run,
    RunError,
    file_hash,
    is_finished,
    locked,
    open_run,
    other_constants,
    read_record,
)
from ..training.train import check, check_unchanged, train
from .material import Material
from .measurement import Measurement
from .plan import OF_NETWORK, Plan
from .record import write_comparison


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
    console = console or plain_console()
    with locked(folder):
        return _compare(plan, folder, fresh, console)


def _compare(plan: Plan, folder: Path, fresh: bool, console: Console) -> dict:
    first = begun(plan, folder, fresh, console)
    for number, seed in enumerate(plan.seeds):
        material = Material(plan, seed) if number else first
        for method in plan.order:
            run = trained(plan, method, seed, folder, material, console)
            Measurement(plan, material, run, gallery=number == 0).complete(console)
    return write_report(folder, console)


def begun(plan: Plan, folder: Path, fresh: bool, console: Console) -> Material:
    """What comes before the first training: what there is fits the plan, what there is not can be trained, and
    comparison.json.

    Returns:
        the material of the first seed.

    Raises:
        RunError, DataError, NetworkError: one sentence for the user.
    """
    for method in plan.configs:
        for seed in () if fresh else plan.seeds:
            check_same(plan.config(method, seed), folder / RUNS / run_name(method, seed))
            check_match(folder / RUNS / run_name(method, seed), match_of(plan, method, seed, folder))
    material = Material(plan, plan.seeds[0])
    check_all(plan, material, folder, fresh)
    if fresh and start_anew(plan, folder):
        console.print(f"Starting anew: the old runs in {folder} are removed.", markup=False)
    write_comparison(plan, material, folder)
    return material


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
        console.print(f"Not finished yet: {', '.join(found['missing'])}.", markup=False)
    console.print(f"Report: {folder / results.REPORT}", markup=False, soft_wrap=True)
    return found


def check_all(plan: Plan, material: Material, folder: Path, fresh: bool) -> None:
    """Before anything is trained, or removed for it:

    Raises:
        RunError, NetworkError, DataError: a method, with its options, that cannot be trained on this data; a network
            without a module of the layer's name.
    """
    todo = [m for m in plan.configs if fresh or not all(is_finished(f) for f in run_folders(plan, folder, m))]
    if todo:
        checks.check(material.data, least=1).stop()
    for method in todo:
        config = plan.config(method, material.seed)
        check(config, material.training_data(config))
    if material.data.multilabel and (asked := [name for name in plan.measures if name in OF_NETWORK]):
        raise RunError(f"{asked[0]} is of one label an image, and those of {material.data.name} have several.")
    if plan.layer is None:
        return
    network = build_network(material.config.network, len(material.data.classes), material.data.size)
    if plan.layer not in dict(network.named_modules()):
        names = ", ".join(name for name, _ in network.named_children())
        raise RunError(
            f"{material.config.network} has no module {plan.layer!r} to look at: its first level has {names}."
        )


# ------------------------------------------------------------------------------------------------- training


def trained(plan: Plan, method: str, seed: int, folder: Path, material: Material, console: Console) -> Run:
    """The run of (method, seed): opened where it is finished, else trained from where it stands."""
    path = folder / RUNS / run_name(method, seed)
    match = match_of(plan, method, seed, folder)
    config = replace(plan.config(method, seed), match=match)
    if not is_finished(path):
        doing = "training" if config.epochs else "its weights"
        console.print(f"{results.NAMES.get(method, method)}, seed {seed}: {doing}", style="bold", markup=False)
        train(config, path, console=console, data=material.training_data(config))
    else:
        check_unchanged(path, material.data.identity())
        check_match(path, match)
    return open_run(path, plan.best, trust=True)  # check_same: the network is that of this command


def check_same(config: TrainConfig, folder: Path) -> None:
    """
    Raises:
        RunError: the run in ``folder``, if there is one, has other options.
    """
    if not (folder / CONFIG).exists():
        return
    record = read_record(folder)
    was = config.differing(record["config"])
    if file_hash(config.weights) != record.get("weights_sha256"):
        was["weights"] = record["config"].get("weights")
    if not was:  # of other options the constants are others, too
        was = other_constants(folder, preset_constants(config))
    if other := ", ".join(f"{name} = {value}" for name, value in was.items() if name != "match"):
        raise RunError(
            f"The run {folder} was begun with {other}: compare with the same options, into another --out, or remove "
            "the run (compare: --fresh)."
        )


def match_of(plan: Plan, method: str, seed: int, folder: Path) -> tuple[float, ...] | None:
    """The VJP variances that a run follows, none of most; None: those of an S-IB run that is still to be trained."""
    if not plan.is_matched(method):
        return ()
    followed = folder / RUNS / run_name("sib", seed)
    return variances(open_run(followed, trust=True)) if is_finished(followed) else None


def check_match(folder: Path, match: tuple[float, ...] | None) -> None:
    """
    Raises:
        RunError: the run in ``folder``, if there is one, follows something else (see :func:`match_of`).
    """
    if not (folder / CONFIG).exists():
        return
    was = tuple(read_record(folder)["config"].get("match", ()))
    if was != match and not (match is None and was):
        what = "another S-IB run, or one that was trained anew" if was else "no S-IB run"
        raise RunError(
            f"The VJP's variance in the run {folder} follows {what}: remove this folder to train it again, "
            "or compare into another --out."
        )


def variances(run: Run) -> tuple[float, ...]:
    """The VJP variance of each epoch of an S-IB run, which the gradient penalty is matched to; empty where unknown.

    An epoch without one, whose few steps took no VJP or that the run's patience left out, has that of the one before.
    """
    values: list[float] = []
    for epoch in range(run.config.epochs):
        line = run.history[epoch] if epoch < len(run.history) else {}
        values.append(line.get("vjp_variance", values[-1] if values else math.nan))
    return tuple(values) if all(math.isfinite(value) and value > 0 for value in values) else ()


def run_folders(plan: Plan, folder: Path, method: str) -> list[Path]:
    """Of one training method, a folder a seed."""
    return [folder / RUNS / run_name(method, seed) for seed in plan.seeds]


def start_anew(plan: Plan, folder: Path) -> bool:
    """Removes the plan's runs from ``folder``; whether there was one."""
    there = [path for method in plan.configs for path in run_folders(plan, folder, method) if path.is_dir()]
    for path in there:
        shutil.rmtree(path)
    return bool(there)
