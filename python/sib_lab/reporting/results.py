"""What a comparison found: from the numbers stored in its runs to means, intervals, differences, table and files.

Nothing here trains or explains: :func:`collect` reads what ``sib-lab compare`` has stored, so that table and report can
be written again at any time.
"""

import csv
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..data import QUALITIES
from ..explaining.statistics import (
    Difference,
    Estimate,
    estimate,
    over_seeds,
    paired_difference,
    paired_difference_of_shares,
    share,
)
from ..training.runs import MEASURED, write_text
from .classes import by_class

COMPARISON = "comparison.json"  #: what was asked for, in the comparison's folder
RESULTS, METRICS, REPORT, GALLERY = "results.json", "metrics.csv", "report.html", "gallery.png"
RUNS = "runs"  #: folder of all runs
#: Explanation "method" under which the mean over the six methods stands.
MEAN = "mean"
EMPTY = "empty"  #: the measure that counts maps which are zero everywhere
MINUS = "\N{MINUS SIGN}"
HARDLY = 0.0005  #: an interval whose ends are so near to mean ± half width is shown so: not a digit of it is wrong
#: Of metrics.csv.
COLUMNS = ("method", "measure", "mean", "low_95", "high_95", "undefined_images")
COLUMNS += ("difference", "its_low_95", "its_high_95")


#: Training methods -> names for people.
NAMES = {
    "ce": "Cross-entropy",
    "sib": "S-IB",
    "sib-features": "S-IB, feature map alone",
    "sib-background": "S-IB, background half",
    "sib-foreground": "S-IB, foreground half",
    "sib-few": "S-IB, 10 % annotated",
    "sib-one": "S-IB, 1 % annotated",
    "sib-alone": "S-IB, annotated images alone",
    "sib-none": "S-IB, no annotation",
    "sib-paper": "Published S-IB",
    "gradient-penalty": "Gradient penalty",
    "centre-mask": "Centre mask",
    "rrr": "Right reasons",
    "energy-loss": "Energy loss",
    "l1-loss": "L1 loss",
    "rrr-loss": "RRR loss",
    "ppce-loss": "PPCE loss",
    "as-is": "As it is",
}


class ReportError(Exception):
    """A folder without the stored results that were asked for; the message is one sentence for the user."""


@dataclass(frozen=True)
class Measure:
    """How a number is called and read."""

    name: str
    higher_is_better: bool | None  #: None: neither
    reading: str  #: one line for people
    is_share: bool = False  #: a hit or a miss of each image
    most: float = 1.0  #: that a value can be; the least is 0
    always_defined: bool = False  #: whatever the image, its mask and its map are like


MEASURES = {
    "accuracy": Measure(
        "Accuracy",
        True,
        "the share of test images whose most probable class is the right one.",
        is_share=True,
        always_defined=True,
    ),
    "map": Measure(
        "mAP",
        True,
        "mean average precision: the area under a class's precision over its recall, over all images in the order of "
        "its scores, and its mean over the classes. Labels whose objects are all difficult count neither way.",
        always_defined=True,
    ),
    "f1": Measure(
        "F1",
        True,
        "the harmonic mean of a class's precision and recall where every label of at least one half is told, and its "
        "mean over the classes.",
        always_defined=True,
    ),
    "worst_group": Measure(
        "Worst group",
        True,
        "the accuracy of the worst group, a group being the images of one class on one background; in a small test set "
        "groups are small and the worst one is partly bad luck.",
        always_defined=True,
    ),
    "epg": Measure(
        "EPG",
        True,
        "energy-based pointing game: the share of a map's sum that lies on the object, between 0 and 1. A map that "
        "is the same everywhere reaches the object's share of the image, its chance level; one that is zero everywhere "
        "counts as 0, here and in every measure of maps on objects.",
    ),
    "pointing_game": Measure(
        "Pointing game",
        True,
        "the share of images in which the brightest pixel of the map lies on the object; of several equally bright "
        "ones the share that does.",
        True,
    ),
    "iou": Measure(
        "IoU",
        True,
        "intersection over union of the object and the pixels above t times the map's maximum, for the best t between "
        "0.15 and 0.95 of each image (the mean best t is in results.json).",
    ),
    "ehr": Measure(
        "EHR",
        True,
        "effective heat ratio: the share of the heat that is on the object, averaged while only the map's hottest "
        "pixels are kept (Zhang et al. 2021).",
    ),
    "deletion": Measure(
        "Deletion",
        False,
        "area under the predicted class's probability while the map's hottest pixels are blanked first: low means that "
        "the map names the pixels that the network needs.",
    ),
    "insertion": Measure(
        "Insertion",
        True,
        "area under the predicted class's probability while the map's hottest pixels are revealed first on a blurred "
        "copy: high means that the map names pixels that suffice.",
    ),
    EMPTY: Measure(
        "Empty maps", False, "the share of maps that are zero everywhere: the explanation finds nothing.", True
    ),
    "seconds_per_step": Measure(
        "Seconds a step",
        False,
        "the median time of one optimiser step on one batch.",
        most=math.inf,
        always_defined=True,
    ),
}
ROUNDING = 1e-6  #: so far a stored value may lie beyond its range


def run_name(method: str, seed: int) -> str:
    """The folder of a run under ``runs``."""
    return f"{method}-seed{seed}"


# ------------------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> dict:
    """The content of a JSON file.

    Raises:
        ReportError: missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError as error:
        raise ReportError(f"There is no comparison in {path.parent}: {path.name} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path) from error
    if not isinstance(content, dict):
        raise damaged(path)
    return content


def _no_number(name: str) -> None:
    raise ValueError(f"{name}, which is never stored")


def damaged(path: Path, why: str = "") -> ReportError:
    return ReportError(
        f"The file {path} is damaged or of another version{f' ({why})' if why else ''}: remove it and run the same "
        "sib-lab compare command again, which makes anew what is missing."
    )


_OF_OTHER_CONTENT = (LookupError, TypeError, ValueError, AttributeError, EOFError, OverflowError)
_OF_OTHER_CONTENT += (zipfile.BadZipFile, zlib.error)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, what comes of a file or folder with other content than this program stores is a sentence.

    Raises:
        ReportError: that one.
    """
    try:
        yield
    except _OF_OTHER_CONTENT as error:
        raise damaged(path) from error


def check_range(
    path: Path, name: str, values: Any, least: float = 0.0, most: float = 1.0, defined: bool = True
) -> None:
    """Numbers that a file holds under a name lie where they can; NaN passes where not all need be ``defined``.

    Raises:
        ReportError: the first that does not.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    wrong = ~np.isfinite(values) | (values < least - ROUNDING) | (values > most + ROUNDING)
    if not defined:
        wrong &= ~np.isnan(values)
    if wrong.any():
        possible = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of at least {least:g}"
        first = values[wrong][0]
        found = "no number" if math.isnan(first) else f"{first:g}"
        raise damaged(path, f"{name} holds {found} where only numbers {possible} are possible")


def check_classes(path: Path, name: str, labels: Sequence[int], count: int) -> None:
    """Class numbers that a file holds under a name are whole and below ``count``.

    Raises:
        ReportError: the first that is not.
    """
    for label in labels:
        if type(label) is not int or not 0 <= label < count:
            raise damaged(
                path, f"{name} holds {label!r:.20} where only whole numbers from 0 to {count - 1} are possible"
            )


def is_share(curve: str) -> bool:
    """Whether a training curve of this name is of shares; the others are of cross-entropy, which has no upper end."""
    return any(name in curve for name in QUALITIES.values())


def stored_values(run: Path, classes: int) -> dict[str, list]:
    """Every number that a run's measurements hold: key such as ``epg/gradcam`` -> values, one an image (or one in all).

    None stands for an undefined value.

    Args:
        classes: how many there are.

    Raises:
        ReportError: a file is damaged, or holds what a measure cannot be.
    """
    values: dict[str, list] = {}
    weights = None
    for path in sorted((run / MEASURED).glob("*.json")):
        with reading(path):
            content = read_json(path)
            for key, of_key in content["values"].items():
                measure = MEASURES.get(key.partition("/")[0])  # none of IoU's thresholds, which are shares, too
                most, defined = (measure.most, measure.always_defined) if measure else (1.0, False)
                check_range(path, key, tensor(of_key), most=most, defined=defined)
            for name, labels in content.get("classes", {}).items():
                check_classes(path, name, labels, classes)
            if weights not in (None, content["key"]["weights"]):
                raise ValueError("measured on another network")
            weights = content["key"]["weights"]
            for key, of_key in content["values"].items():
                if key.startswith("accuracy/") and len(of_key) != len(content["classes"]["labels"]):
                    raise ValueError("of other images")
        values |= content["values"]
    return values


def collect(folder: Path) -> dict:
    """Everything that results.json holds, from what is stored in ``folder``.

    Raises:
        ReportError: no comparison there, or none of its runs is measured.
    """
    comparison = _comparison(folder / COMPARISON)
    runs, missing = [], []
    for method in comparison["methods"]:
        for seed in comparison["seeds"]:
            run = folder / RUNS / run_name(method, seed)
            if (run / MEASURED / "training.json").exists():
                runs.append(_run(run, method, seed, comparison))
            else:
                missing.append(run.name)
    if not runs:
        raise ReportError(f"None of the runs in {folder} is measured yet: run sib-lab compare --out {folder} first.")
    methods = {m: name for m, name in comparison["methods"].items() if any(r["method"] == m for r in runs)}
    interval = "images" if len(comparison["seeds"]) == 1 else "seeds"
    rows = [summary_row(key, runs, list(methods), interval) for key in _keys(runs, comparison)]
    chances = [run["chance"] for run in runs if run["chance"] is not None]
    of_classes = by_class(comparison["data"]["classes"], list(methods), runs, epg_key(rows))
    for run in runs:
        del run["told"], run["labels"]
        run["numbers"] = {key: _run_number(values) for key, values in run.pop("values").items()}
    return comparison | {
        "methods": methods,
        "missing": missing,
        "interval": interval,
        "chance": sum(chances) / len(chances) if chances else None,
        "rows": rows,
        "classes": of_classes,
        "runs": runs,
    }


def _comparison(path: Path) -> dict:
    comparison = read_json(path)
    with reading(path):
        for within, kinds in ((comparison, _OF_COMPARISON), (comparison["data"], _OF_DATA)):
            if wrong := [name for name, kind in kinds.items() if not isinstance(within[name], kind)]:
                raise TypeError(wrong[0])
        if comparison["losses"].keys() != comparison["methods"].keys() or not comparison["seeds"]:
            raise ValueError("other methods")
        comparison["config"]["network"], comparison["config"]["epochs"]
        data = comparison["data"]
        if data.setdefault("quality", "accuracy") not in QUALITIES:  # which older ones do not say
            raise ValueError("another quality")
        check_range(path, "tests", list(data["tests"].values()), most=math.inf)
        check_range(path, "images", data["images"], most=math.inf)
        check_range(path, "unannotated", data["unannotated"], most=math.inf)
    return comparison


_OF_COMPARISON = {"methods": dict, "losses": dict, "seeds": list, "explanations": dict, "six": list, "data": dict}
_OF_COMPARISON |= {"config": dict, "machine": dict, "versions": dict}
_OF_DATA = {"name": str, "classes": list, "groups": list, "tests": dict, "explained": str, "images": int}
_OF_DATA |= {"unannotated": int, "skipped": list}


def _run(run: Path, method: str, seed: int, comparison: dict) -> dict:
    """One run's part of the results; its ``values`` are still per image."""
    classes = len(comparison["data"]["classes"])
    with reading(run / MEASURED / "training.json"):
        training = read_json(run / MEASURED / "training.json")
        of_run = training["run"]
        check_classes(run / MEASURED / "training.json", "labels", of_run["labels"], classes)
        for name, of in of_run["curves"].items():
            check_range(run / MEASURED / "training.json", name, of, most=1.0 if is_share(name) else math.inf)
        if of_run["chance"] is not None:
            check_range(run / MEASURED / "training.json", "chance", of_run["chance"])
    told = _told(run / MEASURED / f"{quality_key(comparison).replace('/', '-')}.json", classes)
    values = {key: tensor(of_key) for key, of_key in stored_values(run, classes).items() if of_key}
    images = {name: len(training["run"]["labels"]) for name in comparison["explanations"]}
    for key, of_key in values.items():
        of = key.partition("/")[2]
        if len(of_key) != images.get(of, len(of_key)):
            raise damaged(run / MEASURED / f"{of}.json")
    six = [f"epg/{explanation}" for explanation in comparison["six"]]
    if six and all(key in values for key in six):
        values[f"epg/{MEAN}"] = torch.stack([values[key] for key in six]).mean(0)  # NaN where one of them is
    return {"name": run.name, "method": method, "seed": seed, "values": values, "told": told, **training["run"]}


def _told(path: Path, classes: int) -> dict:
    """What a network says of the explained test set: ``labels`` and ``predicted`` of every image; of several labels
    ``images`` and ``average_precision`` of every class."""
    with reading(path):
        content = read_json(path)
        if "of_classes" not in content:
            told = {name: list(content["classes"][name]) for name in ("labels", "predicted")}
            if len(told["labels"]) != len(told["predicted"]):
                raise ValueError("other images")
            return told
        told = {name: list(content["of_classes"][name]) for name in ("images", "average_precision")}
        if {*map(len, told.values())} != {classes}:
            raise ValueError("other classes")
        check_range(path, "images", told["images"], most=math.inf)
        check_range(path, "average_precision", tensor(told["average_precision"]), defined=False)
        return told


def quality_key(results: dict) -> str:
    """The key of how well networks classify the explained test set: its accuracy, or of several labels its mAP."""
    return f"{results['data']['quality']}/{results['data']['explained']}"


def epg_key(rows: list[dict]) -> str:
    """The EPG that stands for all: the mean of the six methods, or the first one measured."""
    keys = [row["key"] for row in rows if row["key"].startswith("epg/")]
    return f"epg/{MEAN}" if f"epg/{MEAN}" in keys or not keys else keys[0]


def tensor(values: list) -> Tensor:
    """Stored values as float64 [N]; None is NaN."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _keys(runs: list[dict], comparison: dict) -> list[str]:
    """The keys of the summary, in the order of the table; IoU's thresholds are in the runs' numbers alone."""
    present = dict.fromkeys(key for run in runs for key in run["values"] if key.partition("/")[0] in MEASURES)
    names = [*comparison["data"]["tests"], *comparison["explanations"], MEAN]
    order = {name: place for place, name in enumerate(names)}

    def place(key: str) -> tuple[int, int]:
        measure, _, of = key.partition("/")
        return list(MEASURES).index(measure), order.get(of, 0)

    return sorted(present, key=place)


def _run_number(values: Tensor) -> dict:
    """One run's mean of a measure."""
    undefined = int(values.isnan().sum())
    return {"mean": plain(values.nanmean().item()), "count": len(values) - undefined, "undefined": undefined}


# ------------------------------------------------------------------------------------------------- summary


def summary_row(key: str, runs: list[dict], methods: list[str], interval: str) -> dict:
    """One line of the table: each method's estimate of ``key`` and its difference to the first method.

    Over seeds, a value is a seed's mean over its images, and differences pair equal seeds; over images (one seed), a
    value is an image's, and differences pair equal images.
    """
    of_method: dict[str, dict[int, Tensor]] = {method: {} for method in methods}
    for run in runs:
        if key in run["values"]:
            of_method[run["method"]][run["seed"]] = run["values"][key]
    first = of_method[methods[0]]
    values, differences = {}, {}
    for method, of_seed in of_method.items():
        if not of_seed:
            continue
        values[method] = as_dict(_estimate(key, list(of_seed.values()), interval)) | {
            "undefined": sum(int(v.isnan().sum()) for v in of_seed.values())
        }
        pairs = [(of_seed[seed], first[seed]) for seed in of_seed if seed in first]
        if method != methods[0] and pairs:
            differences[method] = as_difference(_difference(key, pairs, interval))
    return {"key": key, "values": values, "differences": differences}


def _estimate(key: str, of_seeds: list[Tensor], interval: str) -> Estimate:
    if interval == "images":
        return (share if measure_of(key).is_share else estimate)(of_seeds[0])
    return over_seeds(torch.stack([values.nanmean() for values in of_seeds]))


def _difference(key: str, pairs: list[tuple[Tensor, Tensor]], interval: str) -> Difference:
    """Of each pair's first value minus its second."""
    if interval == "images":
        of_images = paired_difference_of_shares if measure_of(key).is_share else paired_difference
        return of_images(pairs[0][1], pairs[0][0])
    return paired_difference(*(torch.stack([pair[side].nanmean() for pair in pairs]) for side in (1, 0)))


def as_dict(value: Estimate) -> dict:
    """For JSON: None instead of NaN."""
    numbers = {name: plain(getattr(value, name)) for name in ("mean", "half_width", "low", "high")}
    return numbers | {"count": value.count}


def as_difference(value: Difference) -> dict:
    """A difference for JSON, with whether its interval excludes zero (None: there is no interval)."""
    return as_dict(value) | {"excludes_zero": value.clear if math.isfinite(value.half_width) else None}


def plain(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------- numbers for people


def measure_of(key: str) -> Measure:
    """The measure of a row's key."""
    return MEASURES[key.partition("/")[0]]


def row_name(key: str, explanations: dict[str, str]) -> str:
    """What a row is called inside its measure's table: the explanation method or the test set."""
    measure, _, of = key.partition("/")
    if of == MEAN:
        return "Mean of the six"
    if of in explanations:
        return explanations[of]
    return MEASURES[measure].name + (f", {of.replace('_', ' ')}" if of not in ("", "test") else "")


def number(value: dict | None) -> str:
    """An estimate for people: ``0.512 ± 0.049``, or ``0.250 (0.046 to 0.699)`` where the mean is off the middle."""
    if value is None:
        return ""
    return "undefined" if value["mean"] is None else _with_interval(value, "")


def difference(value: dict | None) -> str:
    """A difference for people, e.g. ``+0.120 ± 0.030``; empty where there is none."""
    if value is None or value["mean"] is None:
        return ""
    return _with_interval(value, "+").replace("-", MINUS)


def _with_interval(value: dict, sign: str) -> str:
    mean, half_width, low, high = (value[name] for name in ("mean", "half_width", "low", "high"))
    shown = f"{mean:{sign}.3f}"
    if half_width is None:
        return shown
    if max(abs(mean - half_width - low), abs(mean + half_width - high)) < HARDLY:
        return f"{shown} ± {half_width:.3f}"
    return f"{shown} ({low:{sign}.3f} to {high:{sign}.3f})"


def chance_note(results: dict) -> str:
    """Which networks' accuracy on the explained images is not beyond chance, over all seeds; empty where all are, and
    for several labels an image."""
    classes, key = len(results["data"]["classes"]), quality_key(results)
    if results["data"]["quality"] != "accuracy":
        return ""
    names = []
    for method, name in results["methods"].items():
        told = [run["numbers"][key] for run in results["runs"] if run["method"] == method]
        images, right = sum(one["count"] for one in told), sum(round(one["mean"] * one["count"]) for one in told)
        if share((torch.arange(images) < right).double()).low <= 1 / classes:
            names.append(name)
    if not names:
        return ""
    return (
        f"Not beyond chance, 1 of {classes} classes, is the accuracy of {', '.join(names)}: the explanations of a "
        "network that has learned nothing say little."
    )


def interval_note(results: dict) -> str:
    """What ± means here."""
    if results["interval"] == "seeds":
        seeds = len(results["seeds"])
        return f"± is the 95 % interval of the mean over {seeds} seeds (Student's t); differences pair equal seeds"
    return (
        "±, or the two numbers in brackets, is the 95 % interval of the mean over images, of one network each (of "
        "shares Wilson's, of their differences Agresti and Min's); differences pair equal images"
    )


# --------------------------------------------------------------------------------------------------- writing


def tables(results: dict, width: int = 120) -> list[Table]:
    """As few tables as fit a terminal of ``width`` characters: values, then differences to the first method."""
    names = results["methods"]
    first = next(iter(names))
    columns = [("values", method, name) for method, name in names.items()]
    columns += [("differences", m, f"{name}\n{MINUS} {names[first]}") for m, name in names.items() if m != first]
    found = [_table(results, part) for part in _fitting(results, columns, width)]
    caption = f"{interval_note(results)}. *: the interval of the difference excludes zero."
    if any(value["undefined"] for row in results["rows"] for value in row["values"].values()):
        caption += " †: without the images where it is undefined."
    if note := chance_note(results):
        caption += f" {note}"
    found[-1].caption = Text(caption)
    return found


def _fitting(results: dict, columns: list[tuple[str, str, str]], width: int) -> list[list[tuple[str, str, str]]]:
    """The columns, divided so that each part and the column of names fit into ``width``."""
    around = 3  # of a column: a line and two spaces
    names = max(len(row_name(row["key"], results["explanations"])) for row in results["rows"]) + around + 1
    parts: list[list[tuple[str, str, str]]] = [[]]
    used = names
    for column in columns:
        cells = [_cell(row, *column[:2]) for row in results["rows"]]
        wide = max(map(len, [*cells, *column[2].split("\n")])) + around
        if parts[-1] and used + wide > width:
            parts.append([])
            used = names
        parts[-1].append(column)
        used += wide
    return parts


def _table(results: dict, columns: list[tuple[str, str, str]]) -> Table:
    table = Table(caption_justify="left")
    table.add_column("")
    for _, _, name in columns:
        table.add_column(Text(name), justify="right")
    section = None
    for row in results["rows"]:
        measure, _, of = row["key"].partition("/")
        if measure != section:
            table.add_section()
            if of in results["explanations"]:
                table.add_row(Text.assemble((MEASURES[measure].name, "bold"), _chance(measure, results)))
        section = measure
        cells = (_cell(row, *column[:2]) for column in columns)
        table.add_row(*map(Text, (row_name(row["key"], results["explanations"]), *cells)))
    return table


def _chance(measure: str, results: dict) -> str:
    """The level of a map that says nothing, where the measure has one."""
    return f" (chance {results['chance']:.3f})" if measure == "epg" and results["chance"] is not None else ""


def _cell(row: dict, kind: str, method: str) -> str:
    value = row[kind].get(method)
    if kind == "values":
        return number(value) + ("†" if value and value["undefined"] else " ")
    return difference(value) + ("*" if value and value["excludes_zero"] else " ")


def write(results: dict, folder: Path) -> None:
    """results.json with everything, and metrics.csv with the compared numbers alone, which one seed repeats exactly.

    Raises:
        RunError: they cannot be written.
    """
    write_text(folder / RESULTS, json.dumps(results, indent=2, allow_nan=False) + "\n")
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in results["rows"]:
        if row["key"] == "seconds_per_step":
            continue
        for method, value in row["values"].items():
            change = row["differences"].get(method, dict.fromkeys(("mean", "low", "high")))
            numbers = [*(value[name] for name in ("mean", "low", "high")), value["undefined"]]
            writer.writerow([method, row["key"], *numbers, *(change[name] for name in ("mean", "low", "high"))])
    write_text(folder / METRICS, lines.getvalue())
