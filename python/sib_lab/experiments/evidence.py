"""``sib-lab evidence``: the balanced preset with masks, boxes, a few masks and none, against its controls.

Objects on backgrounds that agree with the class in 95 % of the training images (:mod:`sib_lab.data.composite`). Each
situation is a comparison of its own (:mod:`sib_lab.experiments.compare`) in a folder of that name; what is the same in
all of them is trained once. What they show together stands in ``evidence.json``, ``evidence.md`` and ``evidence.png``.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from ..console import plain_console
from ..data import DataError
from ..explaining import methods as explain
from ..explaining.statistics import Difference
from ..reporting import pictures, results
from ..reporting.results import EMPTY, MEASURED, RUNS, run_name
from ..training.config import TrainConfig, recipe
from ..training.runs import write_text
from .compare import compare
from .gains import as_differences, gain, gains_of_six, means_of, most_empty, numbers_of, starred, table, worst, yes
from .plan import OF_MASKS, OF_NETWORK, Plan

SUMMARY, TABLE, PICTURE = "evidence.json", "evidence.md", "evidence.png"
OBJECTS, BACKGROUNDS = "eth80_128.zip", "backgrounds"  #: in the data's folder
BASELINE, OURS = "ce", "sib"
#: Trained once for all situations: cross-entropy looks at no mask, the centre mask only at the objects' mean size.
EVERYWHERE = (BASELINE, "centre-mask")
#: S-IB without a part of itself: options of its loss.
PARTS = {"sib-features": {"input_background": 0.0}, "sib-background": {"feature_foreground": 0.0}}
UNCORRELATED = "accuracy/uncorrelated"
#: What :func:`shown` compares with cross-entropy and a situation has a goal of: key -> name for people.
GAINS = {
    "accuracy_gain": "accuracy, uncorrelated",
    "accuracy_matched_gain": "accuracy, matched",
    "epg_gain": "EPG, worst of the six",
    "iou_gain": "IoU, worst of the six",
    "insertion_gain": "insertion, mean of the six",
}


@dataclass(frozen=True)
class Situation:
    """What is known about the objects, what S-IB is compared with, and what it should reach.

    The goals named gain are over cross-entropy, paired by seeds; 0: not lower.
    """

    name: str
    annotated: float  #: share of the training images whose mask the losses may see
    controls: tuple[str, ...]
    accuracy_gain: float  #: goal: on uncorrelated backgrounds
    accuracy_matched_gain: float  #: goal: on backgrounds as in training
    epg_gain: float  #: goal: of every one of the six explanations
    iou_gain: float  #: goal: of every one of the six explanations
    insertion_gain: float = 0.0  #: goal: of the mean of the six explanations
    empty: float = 0.0  #: goal: at most so many empty maps of 100, of each of the six explanations in every seed
    parts: tuple[str, ...] = ()  #: of PARTS, that are trained beside S-IB
    annotation: str = "masks"  #: what the losses see of the masks: as they are, or their bounding "boxes"


SITUATIONS = {
    "given": Situation(
        "given masks",
        1.0,
        ("gradient-penalty", "centre-mask", "rrr", "sib-paper"),
        accuracy_gain=0.10,
        accuracy_matched_gain=0.05,
        epg_gain=0.25,
        iou_gain=0.05,
        parts=tuple(PARTS),
    ),
    "boxes": Situation(
        "boxes",
        1.0,
        ("rrr",),
        accuracy_gain=0.08,
        accuracy_matched_gain=0.04,
        epg_gain=0.20,
        iou_gain=0.03,
        annotation="boxes",
    ),
    "few": Situation(
        "10 % annotated",
        0.1,
        ("rrr",),
        accuracy_gain=0.08,
        accuracy_matched_gain=0.03,
        epg_gain=0.20,
        iou_gain=0.03,
    ),
    "none": Situation(
        "no annotation",
        0.0,
        ("gradient-penalty", "centre-mask"),
        accuracy_gain=0.06,
        accuracy_matched_gain=0.0,
        epg_gain=0.12,
        iou_gain=0.0,
        empty=1.0,
    ),
}


@dataclass(frozen=True)
class Scale:
    """How large the experiment is."""

    network: str
    size: int  #: px
    epochs: int
    batch_size: int
    images: int  #: that are explained and measured
    limit: int | None = None  #: images per split


SCALES = {
    "small": Scale("gap_cnn", 32, 3, 32, images=40, limit=320),
    "cpu": Scale("gap_cnn", 64, 10, 32, images=100),
    "gpu": Scale("resnet18", 128, 30, 64, images=500),
}
#: Of right-for-the-right-reasons: of 1 and 10 the better on validation.
RRR_STRENGTH = 1.0


def chosen_situations(controls: bool) -> dict[str, Situation]:
    """The situations, with their controls or with cross-entropy alone."""
    return SITUATIONS if controls else {key: replace(of, controls=()) for key, of in SITUATIONS.items()}


def check_data(root: Path) -> None:
    """
    Raises:
        DataError: the objects or the backgrounds are not in ``root``.
    """
    for name in (OBJECTS, BACKGROUNDS):
        if not (root / name).exists():
            raise DataError(
                f"The evidence needs {root / name}, which is not there: name the folder that holds {OBJECTS} (ETH-80 "
                f"with masks) and {BACKGROUNDS}/ (two folders of pictures), see docs/objective.md."
            )


def plan_of(situation: Situation, root: Path, scale: Scale, seeds: tuple[int, ...], threads: int | None) -> Plan:
    """The comparison of one situation."""
    base = recipe(
        "balanced",
        "composite",
        scale.network,
        method=BASELINE,
        size=scale.size,
        epochs=scale.epochs,
        batch_size=scale.batch_size,
        limit=scale.limit,
        augment=True,
        threads=threads,
        data_options={"objects": str(root / OBJECTS), "backgrounds": str(root / BACKGROUNDS)},
    )
    configs: dict[str, TrainConfig] = {}
    for method in (BASELINE, OURS, *situation.parts, *situation.controls):
        strength = RRR_STRENGTH if method == "rrr" else None
        part: dict[str, Any] = {"loss_options": PARTS[method]} if method in PARTS else {}
        of_method = {"method": OURS if part else method} | part
        configs[method] = replace(base, strength=strength, **of_method)
        if method not in EVERYWHERE:
            seen: dict[str, Any] = {"annotated": situation.annotated, "annotation": situation.annotation}
            configs[method] = replace(configs[method], **seen)
    # The last weights: the rate has fallen to zero, and the best on validation would be the best with the shortcut.
    return Plan(configs, seeds, OF_MASKS + OF_NETWORK, scale.images, best=False)


def evidence(
    root: Path,
    folder: Path,
    scale: str,
    seeds: tuple[int, ...],
    threads: int | None = None,
    console: Console | None = None,
    controls: bool = True,
    epochs: int | None = None,
    network: str | None = None,
) -> dict:
    """Does what is not done yet of all situations in ``folder``, and writes what they show together.

    Args:
        root: the folder with the objects and the backgrounds.
        scale: a key of SCALES.
        controls: False: cross-entropy, S-IB and its parts alone, for many seeds.
        epochs: of every training, at least 1; None: the scale's.
        network: see :func:`sib_lab.networks.build.build_network`; None: the scale's.

    Returns:
        the content of evidence.json.

    Raises:
        RunError, DataError: one sentence for the user.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    console = console or plain_console()
    check_data(root)
    found = {}
    trained: dict[str, Path] = {}
    situations = chosen_situations(controls)
    given: dict[str, Any] = {"epochs": epochs, "network": network}
    size = replace(SCALES[scale], **{name: value for name, value in given.items() if value is not None})
    for key, situation in situations.items():
        console.rule(f"{situation.name}")
        plan = plan_of(situation, root, size, seeds, threads)
        for method in EVERYWHERE:
            if method in plan.configs and method in trained:
                take_over(method, trained[method], folder / key, seeds)
        found[key] = compare(plan, folder / key, console=console)
        trained |= dict.fromkeys(plan.configs, folder / key)
    return write(found, situations, folder, console)


def take_over(method: str, source: Path, target: Path, seeds: tuple[int, ...]) -> None:
    """A method's runs, with what was measured on them, for another situation."""
    for seed in seeds:
        run = target / RUNS / run_name(method, seed)
        if not (run / MEASURED / "training.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(source / RUNS / run_name(method, seed), run)


# ----------------------------------------------------------------------------------------------- what it shows


def write(found: dict[str, dict], situations: dict[str, Situation], folder: Path, console: Console) -> dict:
    """evidence.json, evidence.md and evidence.png from each situation's results; prints the table."""
    about = ("machine", "versions", "git_commit")
    summary = {key: shown(situations[key], of) | {name: of[name] for name in about} for key, of in found.items()}
    write_text(folder / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    text = markdown(summary)
    write_text(folder / TABLE, text)
    with matplotlib.rc_context(pictures.STYLE):
        pictures.save(figure(found), folder / PICTURE, dpi=110)
    console.print(text, markup=False)
    console.print(
        f"Together: {folder / TABLE}, {folder / PICTURE}; each situation has a report.html of its own.", markup=False
    )
    return summary


def shown(situation: Situation, found: dict) -> dict:
    """Of one situation: gains over cross-entropy and leads over every control, with 95 % intervals over seeds, and the
    empty maps of every training method."""
    numbers = numbers_of(found)

    def over_baseline(*keys: str) -> Difference:
        return gain(numbers, keys, OURS, BASELINE)

    def of_six(measure: str, over: str = BASELINE) -> dict[str, Difference]:
        return gains_of_six(numbers, measure, OURS, over)

    epg, iou = of_six("epg"), of_six("iou")
    gains = {
        "accuracy_gain": over_baseline(UNCORRELATED),
        "accuracy_matched_gain": over_baseline("accuracy/matched"),
        "epg_gain": epg[worst(epg)],
        "iou_gain": iou[worst(iou)],
        "insertion_gain": over_baseline(*(f"insertion/{method}" for method in explain.SIX)),
    }
    leads = {other: as_differences(of_six("epg", other)) for other in (*situation.parts, *situation.controls)}
    empty = {method: most_empty(list(of_seeds.values())) for method, of_seeds in numbers.items()}
    return {
        "situation": situation.name,
        "seeds": sorted(numbers[OURS]),
        "goals": {key: getattr(situation, key) for key in (*GAINS, EMPTY)},
        **{key: results.as_difference(value) for key, value in gains.items()},
        "epg_gain": as_differences(epg),
        "worst": worst(epg),
        "iou_gain": as_differences(iou),
        "worst_iou": worst(iou),
        "accuracy_gain_flipped": results.as_difference(over_baseline("accuracy/flipped")),
        "empty": empty,
        "leads": leads,
        "reached": {
            **{key: _is_reached(value, getattr(situation, key)) for key, value in gains.items()},
            "empty": max(empty[OURS].values()) <= situation.empty,
            "ahead_of_controls": all(
                lead["excludes_zero"] and lead["mean"] > 0
                for control in situation.controls
                for lead in leads[control].values()
            )
            if situation.controls
            else None,
        },
        "numbers": means_of(numbers),
    }


def _is_reached(gain: Difference, goal: float) -> bool:
    """A gain must be clear; "not lower" is all that a goal of 0 asks for."""
    return gain.mean >= goal and (gain.clear or not goal)


def markdown(summary: dict) -> str:
    """The summary for people: a line a goal and a column a situation, then a line a control, and the empty maps."""
    six = [explain.METHODS[m] for m in explain.SIX]
    rows = [[name, *(_gain_cell(of, key) for of in summary.values())] for key, name in GAINS.items()]
    most = (
        f"{max(of['empty'][OURS].values()):g}; {of['goals']['empty']:g}: {yes(of['reached']['empty'])}"
        for of in summary.values()
    )
    rows.append(["empty maps of 100, most of the six", *most])
    rows.append(["accuracy, flipped", *(results.difference(of["accuracy_gain_flipped"]) for of in summary.values())])
    lines = table(["S-IB over cross-entropy", *(of["situation"] for of in summary.values())], rows)

    rows = []
    for of in summary.values():
        leads = {"cross-entropy": of["epg_gain"]}
        leads |= {results.NAMES[control].lower(): lead for control, lead in of["leads"].items()}
        rows += [
            [f"{name}, {of['situation']}", *(starred(lead[m]) for m in explain.SIX)] for name, lead in leads.items()
        ]
    lines += ["", *table(["EPG of S-IB minus that of", *six], rows)]

    rows = [
        [f"{results.NAMES[method]}, {of['situation']}", *(f"{counts[m]:g}" for m in explain.SIX)]
        for of in summary.values()
        for method, counts in of["empty"].items()
    ]
    lines += ["", *table(["empty maps of 100", *six], rows)]
    seeds = len(next(iter(summary.values()))["seeds"])
    lines += [
        "",
        f"± is the 95 % interval over {seeds} seeds (paired, Student's t); *: it excludes zero. Empty maps are zero "
        "everywhere and count as 0; their number is that of the seed with the most.",
        "",
    ]
    return "\n".join(lines)


def _gain_cell(of: dict, key: str) -> str:
    """A gain with its goal, and where it is the worst of the six, of which explanation."""
    value, worst = of[key], ""
    if key in ("epg_gain", "iou_gain"):
        method = of["worst" if key == "epg_gain" else "worst_iou"]
        value, worst = value[method], f" ({explain.METHODS[method]})"
    return f"{results.difference(value)}{worst}; {of['goals'][key]:+.2f}: {yes(of['reached'][key])}"


def figure(found: dict[str, dict]) -> Figure:
    """EPG of each explanation by training method, and accuracy on uncorrelated backgrounds: a row a situation."""
    chart = Figure(figsize=(11, 2.9 * len(found)), layout="constrained")
    rows = chart.subplots(len(found), 2, width_ratios=(6, 1), squeeze=False, sharey="col")
    for (key, of), (maps, accuracy) in zip(found.items(), rows, strict=True):
        colours = pictures.colours(of["methods"])
        estimates: Callable = {row["key"]: row["values"] for row in of["rows"]}.__getitem__
        width = 0.84 / len(of["methods"])
        for place, (method, name) in enumerate(of["methods"].items()):
            values = [estimates(f"epg/{m}")[method] for m in explain.SIX]
            at = np.arange(len(values)) + (place - (len(of["methods"]) - 1) / 2) * width
            _bars(maps, at, values, width, colours[method], name)
            _bars(accuracy, [place], [estimates(UNCORRELATED)[method]], 0.84, colours[method], name)
        maps.axhline(of["chance"], color=pictures.FAINT, linewidth=1, linestyle=":")
        maps.set_xticks(range(len(explain.SIX)), [explain.METHODS[m] for m in explain.SIX])
        maps.set_title(
            f"{SITUATIONS[key].name}: share of each explanation on the object (EPG; dotted: chance)", loc="left"
        )
        maps.set_ylim(0, 1.5)  # room for the legend
        maps.set_yticks(np.arange(0, 1.01, 0.2))
        legend = maps.legend(ncols=min(4, len(of["methods"])), loc="upper left")
        legend.set_in_layout(False)  # a long one would take the charts' room
        accuracy.set_title("Accuracy, uncorrelated", loc="left")
        accuracy.set_xticks([])
    return chart


def _bars(axes, at, values: list[dict], width: float, colour: str, name: str) -> None:
    spread = [value["half_width"] or 0 for value in values]
    axes.bar(at, [v["mean"] for v in values], width, color=colour, label=name, yerr=spread, ecolor=pictures.INK)
