"""``sib-lab evidence-photos``: the fine-tuning preset on photographs, on a network that knows ImageNet, and its peers.

Two parts, in one folder::

    data/<set>/               a set that came as a .zip
    <set>/curve/<method>-<strength>/  trainings on two thirds of the training images, measured on the rest
    strengths.json curves.png what was chosen by them, and the curves
    <set>/                    a comparison as ``sib-lab compare`` makes it, with report.html and gallery.png
    evidence-photos.json evidence-photos.md   what all show together

The peers' strengths are chosen on the *curve*: a third of the training images of every class and the validation images
are held out, the tests are not looked at. Energy loss is chosen on every set; the three other peers on duts30, the set
with the most held-out images, for all sets. S-IB's strength is not chosen: it is the preset's everywhere, and its curve
shows what that costs and gives. Then the *comparison* trains every method with several seeds on all training images and
measures on the tests.

Each training is a task of its own, in as many processes as there are cores. Tasks are in such an order that whatever is
done when time runs out is balanced: all sets of a method before the next method, all methods of a seed before the next
seed. Each keeps its weights (some 60 MB); what is measured is taken up without them, too.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
from rich.console import Console

from ..console import plain_console
from ..data import QUALITIES, is_multilabel
from ..explaining import methods as explain
from ..reporting import pictures, results
from ..reporting.page import MAPS
from ..reporting.results import MEASURED, RUNS, run_name
from ..training.config import TrainConfig, recipe
from ..training.runs import LAST, RunError, is_finished, locked, write_text
from ..training.train import check, check_unchanged
from . import strengths as curve
from .compare import begun, check_all, check_same, compare, trained, write_report
from .material import Material
from .measurement import Measurement
from .photo_gains import BASELINE, GOALS, OURS, curves_figure, markdown, shown
from .photo_sets import BOXES, DATA, SETS, PhotoSet, find, leave_out_boxes_of_tests, unpacked
from .plan import Plan
from .stored import is_current
from .strengths import clock
from .tasks import Task, raise_failures, run_tasks

PEER = "energy-loss"
OTHER_PEERS = ("l1-loss", "rrr-loss", "ppce-loss")
PEERS = (PEER, *OTHER_PEERS)
#: Variants of S-IB: what is replaced in its options.
VARIANTS: dict[str, dict[str, Any]] = {
    "sib-none": {"annotated": 0.0},
    "sib-few": {"annotated": 0.1},
    "sib-one": {"annotated": 0.01},
    "sib-alone": {"loss_options": {"self_made_share": 0.0}},  # where some have no annotation
    "sib-features": {"loss_options": {"input_background": 0.0}},  # beside those of every S-IB run
}
#: Of the trainings of a seed.
ORDER = (BASELINE, OURS, PEER, "sib-alone", "sib-none", "sib-few", "sib-one", "sib-features", *OTHER_PEERS)
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)  #: of S-IB and the energy loss
FEWER_STRENGTHS = (0.1, 0.3, 1.0, 3.0)  #: of the other peers
CHOSEN, SUMMARY, TABLE, PICTURE = "strengths.json", "evidence-photos.json", "evidence-photos.md", "curves.png"
CURVE = "curve"
PRESET = "fine_tuning"  #: of the recipe and of S-IB's constants
ALWAYS = len(explain.METHODS) + 1  #: parts of a measurement beside how well each test set is classified
SHARED = "duts30"  #: the set on which the other peers' strengths are chosen


@dataclass(frozen=True)
class Scale:
    """How large the experiment is."""

    network: str
    weights: str | None
    batch_size: int
    images: int  #: of the test that are explained and measured
    size: int | None = None  #: px; None: those of the set
    epochs: int | None = None  #: None: those of the set
    limit: int | None = None  #: images per split


SCALES = {
    "small": Scale("small_cnn", None, 8, images=8, size=32, epochs=1, limit=120),
    "cpu": Scale("efficientnet_lite0", "imagenet", 32, images=64),
}


@dataclass(frozen=True)
class Asked:
    """What is asked for, with what there is to do it with."""

    sets: tuple[PhotoSet, ...]
    roots: dict[str, Path]  #: the folder of each set
    folder: Path  #: of all results
    scale: Scale
    seeds: tuple[int, ...]
    peers: bool
    epochs: int | None = None  #: of every training; None: the scale's, or the set's
    curves: bool = True  #: False: the comparison alone

    @property
    def curve_methods(self) -> dict[str, tuple[float, ...]]:
        """The methods whose curve is measured, each with its strengths."""
        of: dict[str, tuple[float, ...]] = {OURS: STRENGTHS}
        return of | {PEER: STRENGTHS} | dict.fromkeys(OTHER_PEERS, FEWER_STRENGTHS) if self.peers else of

    def base(self, of: PhotoSet) -> TrainConfig:
        """The options that all methods share on a set, of cross-entropy."""
        given = {}
        if (boxes := self.folder / DATA / f"{of.name}-{BOXES}").exists():
            given = {"boxes": str(boxes)}
        return recipe(
            PRESET,
            of.data,
            self.scale.network,
            method=BASELINE,
            root=str(self.roots[of.name]),
            weights=self.scale.weights,
            size=self.scale.size or of.size,
            epochs=self.epochs or self.scale.epochs or of.epochs,
            batch_size=self.scale.batch_size,
            limit=self.scale.limit,
            augment=True,
            threads=1,
            data_options=given,
        )


def ours(config: TrainConfig, loss_options: Mapping[str, Any] = MappingProxyType({}), **changes: Any) -> TrainConfig:
    """S-IB with the options of another method's training."""
    return replace(config, method=OURS, loss_options={"preset": PRESET} | dict(loss_options), **changes)


# ---------------------------------------------------------------------------------------------------- curve


def curve_configs(asked: Asked, of: PhotoSet) -> dict[tuple[str, float | None], TrainConfig]:
    """The trainings of a set's curve, (method, strength) -> options; cross-entropy has no strength."""
    base = replace(asked.base(of), seed=curve.SEED)
    configs: dict[tuple[str, float | None], TrainConfig] = {(BASELINE, None): base}
    for method, of_method in asked.curve_methods.items():
        if method in OTHER_PEERS and of.name != SHARED:
            continue
        for strength in of_method:
            told = replace(base, strength=strength, annotation=of.annotation, method=method)
            configs[method, strength] = ours(told) if method == OURS else told
    return configs


def curve_run(folder: Path, of: PhotoSet, method: str, strength: float | None) -> Path:
    """The run folder of a training of the curve."""
    return folder / of.name / CURVE / (method if strength is None else f"{method}-{strength:g}")


def curve_tasks(asked: Asked) -> list[Task]:
    """What is not done yet of the curves, all sets of a training before the next one.

    Raises:
        RunError, DataError, NetworkError: what is there belongs to other options or data, or cannot be trained.
    """
    of_sets = []
    for of in asked.sets:
        configs = curve_configs(asked, of)
        data = curve.open_held_out(configs[BASELINE, None])
        todo, tried = [], set()
        for (method, strength), config in configs.items():
            run = curve_run(asked.folder, of, method, strength)
            check_same(config, run)
            if curve.is_measured(run):
                check_unchanged(run, data.identity())
                continue
            if method not in tried:
                check(config, data)
                tried.add(method)
            words = results.NAMES[method] if strength is None else f"{results.NAMES[method]} x {strength:g}"
            todo.append(Task(f"{of.name} curve, {words}", curve.measured_point, (config, run)))
        of_sets.append(todo)
    return alternating(of_sets)


def alternating(lists: Sequence[list]) -> list:
    """The first of each list, the second of each, ...; those of short lists end before."""
    longest = max(map(len, lists), default=0)
    return [items[place] for place in range(longest) for items in lists if place < len(items)]


def choose(asked: Asked) -> dict[str, dict[str, float]]:
    """set -> peer -> strength, as far as the curves are measured; written with those of earlier sets.

    A peer that is chosen on one set alone has that strength on all.
    """
    chosen = known_strengths(asked)
    for of in asked.sets:
        points = curve_points(asked, of)
        if baseline := points.pop(BASELINE, {}).get(None):
            whole = {m: p for m, p in points.items() if m in PEERS and len(p) == len(asked.curve_methods[m])}
            chosen[of.name] = {m: curve.chosen_strength(p, baseline) for m, p in whole.items()}
    shared = {m: s for m, s in chosen.get(SHARED, {}).items() if m in OTHER_PEERS}
    for of in asked.sets:
        chosen[of.name] = chosen.get(of.name, {}) | (shared if of.has_other_peers else {})
    write_text(asked.folder / CHOSEN, json.dumps(chosen, indent=2) + "\n")
    return chosen


def known_strengths(asked: Asked) -> dict[str, dict[str, float]]:
    """What earlier calls chose."""
    path = asked.folder / CHOSEN
    return results.read_json(path) if path.exists() else {}


def curve_points(asked: Asked, of: PhotoSet) -> dict[str, dict[float | None, curve.Point]]:
    """What is measured of a set's curve: method -> strength -> point.

    Raises:
        RunError: a point belongs to other options.
    """
    points: dict[str, dict[float | None, curve.Point]] = {}
    for (method, strength), config in curve_configs(asked, of).items():
        run = curve_run(asked.folder, of, method, strength)
        if curve.is_measured(run):
            check_same(config, run)
            points.setdefault(method, {})[strength] = curve.read_point(run)
    return points


def costs_of_strength(asked: Asked) -> tuple[list[str], dict[float, float]]:
    """What S-IB's strengths cost in accuracy, over the held-out images of all sets of one label an image that are not
    shifted and whose curves are there; the sets, and strength -> accuracy over cross-entropy's."""
    points = {of.name: curve_points(asked, of) for of in asked.sets if not of.is_shifted and not is_multilabel(of.data)}
    known = {name: of for name, of in points.items() if OURS in of and BASELINE in of and of[BASELINE][None].images}
    return list(known), curve.pooled_costs([(of[OURS], of[BASELINE][None]) for of in known.values()])


# ----------------------------------------------------------------------------------------------- comparison


def peers_of(of: PhotoSet) -> tuple[str, ...]:
    """The peers that a set is trained with."""
    return PEERS if of.has_other_peers else (PEER,)


def plan_of(asked: Asked, of: PhotoSet, strengths: dict[str, float]) -> Plan:
    """The comparison of one set; peers whose strength is not known are not in it."""
    base = asked.base(of)
    configs: dict[str, TrainConfig] = {BASELINE: base}
    told = replace(base, annotation=of.annotation)
    for method in ORDER[1:]:
        if method == OURS or method in of.variants:
            configs[method] = ours(told, **VARIANTS.get(method, {}))
        elif asked.peers and method in peers_of(of) and method in strengths:
            configs[method] = replace(told, method=method, strength=strengths[method])
    # The last weights, as in the curve.
    return Plan(configs, asked.seeds, images=asked.scale.images, best=False)


def comparison_tasks(asked: Asked, plans: dict[str, Plan]) -> list[Task]:
    """What is not done yet: all sets of a method, then the next method, then the next seed."""
    tasks = []
    for seed in asked.seeds:
        for method in ORDER:
            for name, plan in plans.items():
                folder = asked.folder / name
                if method in plan.configs and not is_done(plan, folder, method, seed):
                    arguments = (plan, method, seed, folder)
                    tasks.append(Task(f"{name} {results.NAMES[method]} seed {seed}", trained_and_measured, arguments))
    return tasks


def is_done(plan: Plan, folder: Path, method: str, seed: int) -> bool:
    """Whether a run is trained and has every part of its measurement, by today's definitions and ``plan``; without its
    weights all but the gallery's maps. Whether they are those of its weights, :func:`compare` sees."""
    run = folder / RUNS / run_name(method, seed)
    tests = [path.stem for quality in QUALITIES for path in (run / MEASURED).glob(f"{quality}-*.json")]
    parts = [*explain.METHODS, "training", *tests]
    maps = seed != plan.seeds[0] or not has_weights(run) or (run / MEASURED / MAPS).exists()
    is_measured = all(is_current(run / MEASURED / f"{part}.json", plan) for part in parts) and len(parts) > ALWAYS
    return is_measured and maps and is_finished(run)


def has_weights(run: Path) -> bool:
    """Whether a run still has those that are measured: the last, as in the curve."""
    return (run / LAST).exists()


def can_be_compared(plan: Plan, folder: Path) -> bool:
    """Whether nothing of a comparison is left to train or measure, and all weights are there."""
    runs = [(method, seed) for seed in plan.seeds for method in plan.configs]
    return all(is_done(plan, folder, *of) and has_weights(folder / RUNS / run_name(*of)) for of in runs)


def check_done(plan: Plan, folder: Path) -> None:
    """Before anything is trained or written:

    Raises:
        CheckpointError: what is done was done with other data.
        RunError: a finished run has neither its weights nor all of its measurement.
    """
    for seed in plan.seeds:
        material = Material(plan, seed)  # which opens nothing that is not asked for
        for method in plan.configs:
            run = folder / RUNS / run_name(method, seed)
            if is_done(plan, folder, method, seed):
                check_unchanged(run, material.data.identity())
            elif is_finished(run) and not has_weights(run):
                raise RunError(
                    f"The run {run} has no weights any more, and its measurement is not whole or not of this version: "
                    "remove it to train it again."
                )


def trained_and_measured(plan: Plan, method: str, seed: int, folder: Path) -> str:
    """One run of a comparison, from where it stands; for people, what was done.

    Raises:
        RunError, DataError, NetworkError: one sentence for the user.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    start = time.monotonic()
    material = _material(plan, seed)
    run = trained(plan, method, seed, folder, material, Console(quiet=True))
    ended = time.monotonic()
    Measurement(plan, material, run, gallery=seed == plan.seeds[0]).complete(Console(quiet=True))
    return f"trained {clock(ended - start)}, measured {clock(time.monotonic() - ended)}"


_opened: dict[str, Material] = {}  #: in a process of its own: the last of each set, by its folder


def _material(plan: Plan, seed: int) -> Material:
    root = plan.config(BASELINE, seed).root
    if root not in _opened or (_opened[root].plan, _opened[root].seed) != (plan, seed):
        _opened[root] = Material(plan, seed)
    return _opened[root]


# ------------------------------------------------------------------------------------------------ all of it


def evidence_photos(
    root: Path,
    folder: Path,
    scale: str,
    seeds: tuple[int, ...],
    jobs: int,
    sets: Sequence[str] = tuple(SETS),
    peers: bool = True,
    epochs: int | None = None,
    curves: bool = True,
    console: Console | None = None,
) -> dict:
    """Does what is not done yet of both parts in ``folder``, and writes what they show together.

    Args:
        root: the folder with the sets, each as a folder or a .zip.
        scale: a key of SCALES.
        jobs: processes, at least 1.
        sets: keys of SETS.
        peers: False: cross-entropy and S-IB with its variants alone.
        epochs: of every training, at least 1; None: the scale's, or each set's.
        curves: False: the comparison alone, without peers whose strength was not chosen earlier.

    Returns:
        the content of evidence-photos.json.

    Raises:
        RunError, DataError, NetworkError: one sentence for the user; trainings that failed left the others whole.
        ValueError: a set that there is not.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    if (unknown := [name for name in sets if name not in SETS]) or not sets:
        raise ValueError(f"sets must be some of {', '.join(SETS)}, got {', '.join(unknown) or 'none'}")
    console = console or plain_console()
    chosen = tuple(of for name, of in SETS.items() if name in sets)
    found = find(root, chosen)
    with locked(folder):
        roots = unpacked(found, folder, console)
        for of in chosen:
            leave_out_boxes_of_tests(of, roots[of.name], folder)
        asked = Asked(chosen, roots, folder, SCALES[scale], seeds, peers, epochs, curves)
        return _both_parts(asked, jobs, console)


def _both_parts(asked: Asked, jobs: int, console: Console) -> dict:
    tasks = curve_tasks(asked) if asked.curves else []
    if tasks:  # what cannot be compared is not trained for
        for of in asked.sets:
            plan = plan_of(asked, of, {})
            check_done(plan, asked.folder / of.name)
            check_all(plan, Material(plan, asked.seeds[0]), asked.folder / of.name, fresh=False)
        console.rule("curves")
    failures = run_tasks(tasks, jobs, console)
    draw_curves(asked)
    strengths = choose(asked) if asked.peers else known_strengths(asked)
    plans = {of.name: plan_of(asked, of, strengths.get(of.name, {})) for of in asked.sets}
    for name, plan in plans.items():
        if left := [results.NAMES[m] for m in peers_of(SETS[name]) if asked.peers and m not in plan.configs]:
            console.print(f"{name}: without {', '.join(left)}, whose strength is not chosen yet.", markup=False)
        check_done(plan, asked.folder / name)
        begun(plan, asked.folder / name, False, console)
    more = comparison_tasks(asked, plans)
    if more:
        console.rule("comparison")
    try:
        failures += run_tasks(more, jobs, console)
    except KeyboardInterrupt:
        sum_up(asked, plans, strengths, Console(quiet=True))
        raise
    summary = sum_up(asked, plans, strengths, console)
    raise_failures(failures, len(tasks) + len(more))
    return summary


# ------------------------------------------------------------------------------------------- what it shows


def sum_up(asked: Asked, plans: dict[str, Plan], strengths: dict[str, dict[str, float]], console: Console) -> dict:
    """Each set's report, and the summary of those of which there is something to compare; prints them."""
    path, found_now = asked.folder / SUMMARY, {}
    for name, plan in plans.items():
        console.rule(name)
        folder = asked.folder / name
        try:
            whole = can_be_compared(plan, folder)
            found = compare(plan, folder, console=console) if whole else write_report(folder, console)
        except results.ReportError:
            console.print("Nothing is measured yet.")
            continue
        seeds = [{run["seed"] for run in found["runs"] if run["method"] == method} for method in (BASELINE, OURS)]
        if seeds[0] & seeds[1]:
            about = {key: found[key] for key in ("machine", "versions", "git_commit")}
            found_now[name] = shown(found, GOALS[name], peers_of(SETS[name])) | about
    known = (results.read_json(path) if path.exists() else {}) | found_now  # sets of earlier calls stay
    summary = {name: known[name] for name in SETS if name in known}
    if not summary:
        return summary
    write_text(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    chosen = {name: of for name, of in strengths.items() if name in summary}
    text = markdown(summary, chosen, costs_of_strength(asked))
    write_text(asked.folder / TABLE, text)
    console.rule("together")
    console.print(text, markup=False)
    console.print(f"Together: {asked.folder / TABLE}, {asked.folder / PICTURE}.", markup=False)
    return summary


def draw_curves(asked: Asked) -> None:
    """curves.png, of what is measured."""
    points = {of.name: curve_points(asked, of) for of in asked.sets}
    if any(points.values()):
        with matplotlib.rc_context(pictures.STYLE):
            pictures.save(curves_figure(points), asked.folder / PICTURE, dpi=110)
