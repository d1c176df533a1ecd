"""report.html: one self-contained page from the stored results of a comparison."""

import math
from functools import partial
from pathlib import Path

import jinja2
import matplotlib
import numpy as np

from ..training.runs import write_text
from . import pictures
from .classes import mistakes
from .results import (
    EMPTY,
    GALLERY,
    MEAN,
    MEASURED,
    MEASURES,
    REPORT,
    RUNS,
    chance_note,
    check_classes,
    check_range,
    difference,
    epg_key,
    interval_note,
    is_share,
    number,
    quality_key,
    reading,
    row_name,
    run_name,
)

IMAGES = "images.npz"  #: the gallery's images in the comparison's folder
MAPS = "gallery.npz"  #: their maps and predictions in a run's folder of measurements
#: Explanations in gallery.png, which is made to be shown elsewhere; the report's gallery has all.
PICTURED = ("vjp", "input_x_gradient", "gradcam")

TOLD = ("predicted", "probability")  #: of each image, in MAPS

CLASSES = 50  #: that the table of classes has at most
CONFUSED = 40  #: classes that a picture of the confusion matrix has at most
MISTAKES = 5  #: of each method that are named
FEW = 3  #: training methods that the summary speaks of in full


def write(results: dict, folder: Path) -> None:
    """Writes report.html and gallery.png into ``folder``.

    Args:
        results: the content of results.json.
        folder: the comparison's folder, with the gallery's images and, in its runs, their maps.
    """
    examples, gallery = Examples.load(results, folder), []
    if examples is not None:
        with reading(folder / IMAGES), matplotlib.rc_context(pictures.STYLE):
            figure = examples.figure(results)
            gallery = examples.figures(results)
        pictures.save(figure, folder / GALLERY, dpi=90)
    write_text(folder / REPORT, page(results, gallery))


def page(results: dict, gallery: list[dict]) -> str:
    """The page as text; ``gallery``: an entry an image, of :meth:`Examples.figures`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        results=results,
        colours=pictures.colours(results["methods"]),
        measures={name: measure for name, measure in MEASURES.items() if measure_rows(results, name)},
        sections=[section(results, name) for name in MEASURES if is_of_maps(name) and measure_rows(results, name)],
        headline=table(results, [row for row in results["rows"] if not is_of_maps(row["key"].partition("/")[0])]),
        findings=findings(results),
        interval_note=interval_note(results),
        chance_note=chance_note(results),
        quality=MEASURES[results["data"]["quality"]].name,
        several=results["data"]["quality"] == "map",
        scatter=scatter(results),
        curves=curves(results),
        cost=cost(results),
        empty=empty_sentence(results),
        undefined=any(value["undefined"] for row in results["rows"] for value in row["values"].values()),
        differences=count_differences(results),
        gallery=gallery,
        options=options(results["config"]),
        classes=class_rows(results),
        class_epg=any(any(v is not None for v in row["epg"].values()) for row in results["classes"]["rows"]),
        confusions=confusions(results),
        class_limit=CLASSES,
    )


def options(config: dict) -> list[tuple[str, str]]:
    """The options of the training that are set, for people."""
    found = []
    for name, value in config.items():
        if value is None or value in ([], {}, ""):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} = {of_key}" for key, of_key in value.items())
        found.append((name.replace("_", " "), str(value)))
    return found


# ---------------------------------------------------------------------------------------------------- tables


def is_of_maps(measure: str) -> bool:
    """Whether a measure judges explanation maps."""
    return measure in ("epg", "pointing_game", "iou", "ehr", "deletion", "insertion", EMPTY)


def measure_rows(results: dict, measure: str) -> list[dict]:
    """The summary's rows of a measure."""
    return [row for row in results["rows"] if row["key"].partition("/")[0] == measure]


def table(results: dict, rows: list[dict]) -> list[dict]:
    """Rows for the template: a name, and for each method its number, its difference and how that is to be shown."""
    return [
        {
            "name": row_name(row["key"], results["explanations"]),
            "cells": [cell(row, method) for method in results["methods"]],
        }
        for row in rows
    ]


def cell(row: dict, method: str) -> dict:
    """One method's part of a row."""
    value = row["values"].get(method)
    change = row["differences"].get(method)
    return {
        "number": number(value),
        "undefined": value["undefined"] if value and value["mean"] is not None else 0,
        "difference": difference(change),
        "excludes_zero": bool(change and change["excludes_zero"]),
    }


def section(results: dict, name: str) -> dict:
    """One measure of maps: its table and its bar charts, one chart an explanation method."""
    rows = measure_rows(results, name)
    return {
        "key": name,
        "measure": MEASURES[name],
        "rows": table(results, rows),
        "charts": [{"name": row_name(row["key"], results["explanations"]), "bars": bars(results, row)} for row in rows],
        "chance": results["chance"] if name == "epg" else None,
    }


def bars(results: dict, row: dict, most: float = 1.0) -> list[dict]:
    """A bar a method, in per cent of ``most``: its length, its 95 % interval and its number."""
    found = []
    for method, name in results["methods"].items():
        value = row["values"].get(method)
        mean = value and value["mean"]
        has_interval = bool(value and value["low"] is not None)
        ends = (value["low"], value["high"]) if has_interval else (0, 0)
        low, high = (min(max(100 * end / most, 0), 100) for end in ends)
        found.append(
            {
                "method": method,
                "name": name,
                "length": min(max(100 * (mean or 0) / most, 0), 100),
                "low": low,
                "span": high - low,
                "factor": "",
                "number": "none" if mean is None else f"{mean:.2f}" if most == 1 else f"{mean:.3f}",
            }
        )
    return found


def cost(results: dict) -> list[dict]:
    """Bars of the seconds a step, with each method's factor to the first."""
    rows = measure_rows(results, "seconds_per_step")
    if not rows:
        return []
    means = {method: value["mean"] for method, value in rows[0]["values"].items()}
    found = bars(results, rows[0], most=1.15 * max(means.values()))
    first = means.get(next(iter(results["methods"])))
    for bar in found:
        bar["factor"] = f"× {means[bar['method']] / first:.1f}" if first and bar["method"] in means else ""
    return found


# ---------------------------------------------------------------------------------------------------- charts


def scatter(results: dict) -> str | None:
    """Accuracy (of several labels mAP) on the first test set against EPG, as an inline picture; None without masks."""
    accuracy, name = quality_key(results), MEASURES[results["data"]["quality"]].name
    epg = epg_key(results["rows"])
    points: dict[str, list] = {}
    for run in results["runs"]:
        pair = [run["numbers"].get(key, {"mean": None})["mean"] for key in (epg, accuracy)]
        if all(map(pictures.finite, pair)):
            points.setdefault(run["method"], []).append(tuple(pair))
    if not points:
        return None
    return pictures.svg(
        lambda: pictures.scatter(points, results["methods"], results["chance"], epg_label(results), name)
    )


def epg_label(results: dict) -> str:
    """What :func:`epg_key` is called."""
    key = epg_key(results["rows"])
    return (
        "EPG, mean of the six methods"
        if key.endswith(f"/{MEAN}")
        else f"EPG of {row_name(key, results['explanations'])}"
    )


def curves(results: dict) -> list[dict]:
    """The training curves as inline pictures, one a quantity."""
    quantities: dict[str, dict[str, list]] = {}
    for run in results["runs"]:
        for quantity, values in run["curves"].items():
            quantities.setdefault(quantity, {}).setdefault(run["method"], []).append(values)
    return [
        {
            "name": quantity,
            "picture": pictures.svg(partial(pictures.curves, quantity, of, share=is_share(quantity))),
        }
        for quantity, of in quantities.items()
    ]


def class_rows(results: dict) -> list[dict]:
    """The CLASSES classes that the first method tells worst, for the template."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    told = "average_precision" if results["data"]["quality"] == "map" else "accuracy"

    def of_first(row: dict) -> float:
        value = next(iter(row[told].values()))
        return math.inf if value is None else value

    return [
        {
            "name": row["name"],
            "images": row["images"],
            "cells": [(shown(row[told].get(m)), shown(row["epg"].get(m))) for m in results["methods"]],
        }
        for row in sorted(results["classes"]["rows"], key=of_first)[:CLASSES]
    ]


def confusions(results: dict) -> list[dict]:
    """A picture of each method's confusion matrix, where there are few enough classes to see it, and what is most
    often taken for what."""
    names = results["data"]["classes"]
    return [
        {
            "method": method,
            "name": results["methods"][method],
            "picture": pictures.svg(partial(pictures.confusion, matrix, names)) if len(names) <= CONFUSED else None,
            "mistakes": mistakes(matrix, names, most=MISTAKES),
        }
        for method, matrix in results["classes"]["confusion"].items()
    ]


# ---------------------------------------------------------------------------------------------- in plain words


def findings(results: dict) -> list[dict]:
    """The summary's answers, each a question, bars, and a sentence for each method but the first."""
    methods = results["methods"]
    first = next(iter(methods))
    rows = {row["key"]: row for row in results["rows"]}
    found = []
    key = epg_key(results["rows"])
    if key in rows:
        found.append(
            {
                "question": "Does it look at the object?",
                "what": f"{epg_label(results)}: the share of an explanation that lies on the object",
                "bars": bars(results, rows[key]),
                "chance": results["chance"],
                "sentences": [looks_sentence(results, method) for method in methods if method != first],
            }
        )
    accuracies = measure_rows(results, results["data"]["quality"])
    if accuracies:
        found.append(
            {
                "question": "Is it right as often?",
                "what": row_name(accuracies[0]["key"], results["explanations"]),
                "bars": bars(results, accuracies[0]),
                "chance": None,
                "sentences": [accuracy_sentence(results, method) for method in methods if method != first],
            }
        )
    if cost(results):
        found.append(
            {
                "question": "What does it cost?",
                "what": "Seconds a training step, median",
                "bars": cost(results),
                "chance": None,
                "sentences": [
                    f"A step with {bar['name']} takes {bar['factor'][2:]} times as long as with {methods[first]}."
                    for bar in cost(results)
                    if bar["factor"] and bar["method"] != first and len(methods) <= FEW
                ],
            }
        )
    return found


def sorted_by_verdict(results: dict, rows: list[dict], method: str) -> dict[str, list[str]]:
    """The names of the rows in which ``method`` lies clearly above, clearly below or not clearly off the first one."""
    verdicts: dict[str, list[str]] = {"more": [], "less": [], "unclear": [], "unknown": []}
    for row in rows:
        change = row["differences"].get(method)
        name = row_name(row["key"], results["explanations"])
        if change is None or change["excludes_zero"] is None:
            verdicts["unknown"].append(name)
        elif not change["excludes_zero"]:
            verdicts["unclear"].append(name)
        else:
            verdicts["more" if change["mean"] > 0 else "less"].append(name)
    return verdicts


def looks_sentence(results: dict, method: str) -> str:
    """In which explanation methods ``method`` has more on the object than the first one."""
    rows = [row for row in measure_rows(results, "epg") if not row["key"].endswith(f"/{MEAN}")]
    name, first = results["methods"][method], next(iter(results["methods"].values()))
    verdicts = sorted_by_verdict(results, rows, method)
    if len(verdicts["unknown"]) == len(rows):
        return f"{name}: too few runs to tell from {first}."
    found = {kind: in_words(of_kind, len(results["methods"])) for kind, of_kind in verdicts.items()}
    parts = []
    if found["more"]:
        parts.append(f"more of the explanation on the object in {found['more']}")
    if found["less"]:
        parts.append(f"less in {found['less']}")
    if found["unclear"]:
        parts.append(f"no clear difference in {found['unclear']}")
    of = f" of {len(rows)} explanation methods" if len(results["methods"]) > FEW else ""
    return f"{name} against {first}: {'; '.join(parts)}{of}."


def accuracy_sentence(results: dict, method: str) -> str:
    """How much accuracy ``method`` wins or loses on each test set."""
    name, first = results["methods"][method], next(iter(results["methods"].values()))
    parts = []
    for row in measure_rows(results, results["data"]["quality"]):
        of = row["key"].partition("/")[2].replace("_", " ")
        where = "" if of == "test" else f" on {of}"
        change = row["differences"].get(method)
        if change is None or change["mean"] is None:
            continue
        points = f"{100 * abs(change['mean']):.1f} points {'higher' if change['mean'] > 0 else 'lower'}"
        if change["excludes_zero"]:
            parts.append(f"{points}{where}")
        else:
            unclear = "no clear difference" if change["excludes_zero"] is not None else f"{points} in one training"
            parts.append(f"{unclear}{where}")
    return f"{name} against {first}: {'; '.join(parts)}." if parts else f"{name}: not measured."


def empty_sentence(results: dict) -> str:
    """How many maps of each training method are zero everywhere, over all explanations, images and seeds; empty where
    no maps were measured."""
    parts = []
    for method, name in results["methods"].items():
        numbers = [
            value
            for run in results["runs"]
            if run["method"] == method
            for key, value in run["numbers"].items()
            if key.partition("/")[0] == EMPTY
        ]
        maps = sum(value["count"] for value in numbers)
        empty = sum(round(value["mean"] * value["count"]) for value in numbers if value["count"])
        if maps:
            parts.append(f"{empty} of {maps} with {name}")
    return f"Maps that are zero everywhere: {', '.join(parts)}." if parts else ""


def in_words(names: list[str], methods: int) -> str:
    """The names, or where many training methods are compared their number alone."""
    return listed(names) if methods <= FEW or not names else f"{len(names)}"


def listed(names: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def count_differences(results: dict) -> dict:
    """How many differences of measures have an interval, and how many of these would exclude zero by chance alone."""
    rows = [row for row in results["rows"] if row["key"].partition("/")[0] != EMPTY]  # which rarely differs at all
    intervals = [d for row in rows for d in row["differences"].values() if d["excludes_zero"] is not None]
    return {
        "all": len(intervals),
        "excluding_zero": sum(d["excludes_zero"] for d in intervals),
        "by_chance": math.ceil(0.05 * len(intervals)),
    }


# --------------------------------------------------------------------------------------------------- gallery


class Examples:
    """The gallery: some test images, and what every training method's first run makes of them."""

    def __init__(self, images: dict[str, np.ndarray], runs: dict[str, dict[str, np.ndarray]]):
        """``images``: the arrays of IMAGES; ``runs``: training method -> the arrays of its MAPS."""
        self.images = images
        self.runs = runs

    @classmethod
    def load(cls, results: dict, folder: Path) -> "Examples | None":
        """From the comparison's folder; None where nothing is stored."""
        seed = results["seeds"][0]
        runs = {
            method: folder / RUNS / run_name(method, seed) / MEASURED / MAPS
            for method in results["methods"]
            if (folder / RUNS / run_name(method, seed) / MEASURED / MAPS).exists()
        }
        if not runs or not (folder / IMAGES).exists():
            return None
        images = cls._images(folder / IMAGES, results["data"])
        return cls(images, {method: cls._maps(path, len(images["images"]), results) for method, path in runs.items()})

    @staticmethod
    def _images(path: Path, data: dict) -> dict[str, np.ndarray]:
        """The arrays of IMAGES.

        Raises:
            ReportError: the file is damaged, or holds what cannot be.
        """
        images = arrays(path)
        with reading(path):
            names = ("images", "masks", "labels", "groups", "annotated")
            shapes = [images[name].shape for name in names]
            if [len(shape) for shape in shapes] != [4, 3, 1, 1, 1] or len({shape[0] for shape in shapes}) > 1:
                raise ValueError("other shapes")
            check_range(path, "images", images["images"], least=-1)
            check_range(path, "masks", images["masks"])
            check_classes(path, "labels", images["labels"].tolist(), len(data["classes"]))
            check_range(path, "groups", images["groups"], least=-1, most=len(data["groups"]) - 1)
        return images

    @staticmethod
    def _maps(path: Path, count: int, results: dict) -> dict[str, np.ndarray]:
        """The arrays of a run's MAPS, of so many images.

        Raises:
            ReportError: the file is damaged, or holds what cannot be.
        """
        maps = arrays(path)
        with reading(path):
            check_classes(path, "predicted", maps["predicted"].tolist(), len(results["data"]["classes"]))
            check_range(path, "probability", maps["probability"], defined=False)
            for explanation in results["explanations"]:
                of_epg, values = maps[f"epg_{explanation}"], maps[explanation]
                check_range(path, f"epg_{explanation}", of_epg, most=MEASURES["epg"].most, defined=False)
                check_range(path, explanation, values[np.isfinite(values)], most=math.inf)
                if values.ndim != 3 or {len(a) for a in (values, of_epg, *map(maps.get, TOLD))} != {count}:
                    raise ValueError("of other images")
        return maps

    @property
    def masks(self) -> np.ndarray | None:
        """[G,H,W], or None where no image of the gallery has one."""
        return self.images["masks"] if self.images["annotated"].any() else None

    def figure(self, results: dict):
        """gallery.png."""
        shown = [e for e in PICTURED if e in results["explanations"]] or list(results["explanations"])[:3]
        return pictures.gallery(
            self.images["images"],
            self.masks,
            self.runs,
            {method: results["methods"][method] for method in self.runs},
            {explanation: results["explanations"][explanation] for explanation in shown},
        )

    def figures(self, results: dict) -> list[dict]:
        """For the template: an entry an image with inline pictures."""
        return [self._figure(results, place) for place in range(len(self.images["images"]))]

    def _figure(self, results: dict, place: int) -> dict:
        classes = results["data"]["classes"]
        mask = self.images["masks"][place] if self.images["annotated"][place] else None
        group = int(self.images["groups"][place])
        groups = results["data"]["groups"]
        label = int(self.images["labels"][place])
        return {
            "label": classes[label],
            "background": groups[group] if 0 <= group < len(groups) else "",
            "input": pictures.image_tile(self.images["images"][place]),
            "mask": "" if mask is None else pictures.mask_tile(mask),
            "networks": [
                {
                    "method": method,
                    "name": results["methods"][method],
                    **_told(results, int(run["predicted"][place]), label, float(run["probability"][place])),
                    "probability": float(run["probability"][place]),
                    "maps": [
                        one_map(run[explanation][place], mask, run[f"epg_{explanation}"][place])
                        for explanation in results["explanations"]
                    ],
                }
                for method, run in self.runs.items()
            ],
        }


def _told(results: dict, predicted: int, label: int, probability: float) -> dict:
    """What a network says of an image, and whether it is right; of several labels, whether it tells that one."""
    if results["data"]["quality"] == "map":
        right = probability >= 0.5
        return {"says": f"{'tells' if right else 'misses'} {results['data']['classes'][label]}", "right": right}
    return {"says": f"says {results['data']['classes'][predicted]}", "right": predicted == label}


def one_map(values: np.ndarray, mask: np.ndarray | None, epg: float) -> dict:
    """A map's picture and what stands under it."""
    text = "all zero" if not values.any() else f"{epg:.2f}" if math.isfinite(epg) else ""
    return {"picture": pictures.map_tile(values.astype(np.float32), mask), "text": text}


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, read and closed."""
    with reading(path), np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
