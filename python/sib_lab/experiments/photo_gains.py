"""What ``sib-lab evidence-photos`` shows: gains over cross-entropy and over the peers, a set a column, with goals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from ..data import QUALITIES, is_multilabel
from ..explaining import methods as explain
from ..explaining.statistics import Difference
from ..reporting import pictures, results
from .gains import (
    Numbers,
    as_differences,
    gain,
    gains_of_six,
    means_of,
    most_empty,
    numbers_of,
    starred,
    table,
    worst,
    yes,
)
from .photo_sets import SETS
from .strengths import Point

BASELINE, OURS = "ce", "sib"
#: S-IB by what it is told about the objects -> name for people.
TOLD = {
    OURS: "S-IB",
    "sib-alone": "annotated images alone",
    "sib-few": "10 % annotated",
    "sib-one": "1 % annotated",
    "sib-none": "no annotation",
}
#: What is compared with cross-entropy: key -> name for people.
MEASURES = {
    "accuracy": "accuracy (of several labels mAP)",
    "worst_group": "worst group",
    "epg": "EPG, mean of the three CAMs",
    "epg_worst": "EPG, worst of the six",
    "iou": "IoU, mean of the three CAMs",
}
COST = 1.3  #: goal: at most so many times cross-entropy's mean time of a step
AHEAD = 5  #: goal: of the six explanations, those in which S-IB is ahead of every peer
ABOVE = math.ulp(0.0)  #: goal: above 0


@dataclass(frozen=True)
class Goals:
    """What S-IB should reach on a set: gains over cross-entropy, by the keys of MEASURES; above 0 they must be clear,
    up to 0 the mean is enough."""

    given: Mapping[str, float]
    few: Mapping[str, float]
    none: Mapping[str, float]
    one: Mapping[str, float] = field(default_factory=dict)

    def of(self, method: str) -> Mapping[str, float]:
        told = {"sib-few": self.few, "sib-one": self.one, "sib-none": self.none}
        return told.get(method, self.given)


GOALS = {
    "duts30": Goals(
        {"accuracy": -0.01, "epg": 0.12, "epg_worst": 0.06, "iou": 0.06},
        {"accuracy": -0.01, "epg": 0.06},
        {"epg": ABOVE},
    ),
    "cub20": Goals(
        {"accuracy": 0.0, "epg": 0.12, "epg_worst": 0.06, "iou": 0.05},
        {"accuracy": 0.0, "epg": 0.06},
        {"epg": ABOVE},
    ),
    "pets3": Goals(
        {"accuracy": -0.01, "epg": 0.10, "epg_worst": 0.05, "iou": 0.05},
        {"accuracy": -0.01, "epg": 0.05},
        {"epg": ABOVE},
    ),
    "waterbirds": Goals(
        {"accuracy": -0.01, "worst_group": 0.10, "epg": 0.15, "epg_worst": 0.08, "iou": 0.06},
        {},
        {"epg": ABOVE, "worst_group": 0.0},
    ),
    "voc2200": Goals(
        {"accuracy": -0.01, "epg": 0.12},
        {"accuracy": -0.01, "epg": 0.08},
        {},
        {"accuracy": -0.01, "epg": 0.04},
    ),
}


def shown(found: dict, goals: Goals, peers: Sequence[str]) -> dict:
    """Of one set, from the content of its results.json with at least a seed of cross-entropy and of S-IB.

    Gains over cross-entropy and leads over the peers are paired by seeds, with 95 % intervals where there are two and
    more; of one training there is none, and its mean alone decides what is reached.
    """
    numbers = numbers_of(found)
    test, quality = found["data"]["explained"], results.quality_key(found)
    told = {method: _gains(numbers, method, quality, test) for method in TOLD if method in numbers}
    seeds = _both(numbers, OURS, BASELINE)
    leads = {peer: gains_of_six(numbers, "epg", OURS, peer) for peer in peers if _both(numbers, OURS, peer)}
    single = len(seeds) == 1
    ahead = [n for n in explain.SIX if all(_clearly_above(of[n], single) for of in leads.values())]
    all_there = all(_both(numbers, OURS, peer) == seeds for peer in peers)  # else "every peer" would say too much
    cost = _cost(found)
    return {
        "seeds": seeds,
        "goals": {method: dict(goals.of(method)) for method in told} | {"cost": COST, "ahead": AHEAD},
        "gains": {method: as_differences(of) for method, of in told.items()},
        "worst": {method: worst(gains_of_six(numbers, "epg", method, BASELINE)) for method in told},
        "leads": {
            peer: {
                "epg": as_differences(of),
                "accuracy": results.as_difference(gain(numbers, [quality], OURS, peer)),
            }
            for peer, of in leads.items()
        },
        "ahead": ahead if all_there else None,
        "cost": cost,
        "empty": {method: most_empty(list(of_seeds.values())) for method, of_seeds in numbers.items()},
        "reached": {
            method: {key: is_reached(of[key], goal, single) for key, goal in goals.of(method).items()}
            for method, of in told.items()
        }
        | {
            "cost": None if cost is None else cost <= COST,
            "ahead": len(ahead) >= AHEAD if all_there else None,
        },
        "numbers": means_of(numbers),
    }


def _both(numbers: Numbers, method: str, other: str) -> list[int]:
    """The seeds of which there are both."""
    return sorted(numbers.get(method, {}).keys() & numbers.get(other, {}).keys())


def _gains(numbers: Numbers, method: str, quality: str, test: str) -> dict[str, Difference]:
    """Over cross-entropy, by the keys of MEASURES; the worst group only where the set has groups."""
    cams = {name: [f"{name}/{cam}" for cam in explain.CAMS] for name in ("epg", "iou")}
    of_six = gains_of_six(numbers, "epg", method, BASELINE)
    keys = {"accuracy": [quality], "worst_group": [f"worst_group/{test}"], **cams}
    if not all(keys["worst_group"][0] in of for of in numbers[BASELINE].values()):
        del keys["worst_group"]
    found = {name: gain(numbers, of, method, BASELINE) for name, of in keys.items()}
    return found | {"epg_worst": of_six[worst(of_six)]}


def is_reached(value: Difference, goal: float, single: bool = False) -> bool | None:
    """Whether a gain is as high as its goal and, where that is above 0, clear; of a ``single`` seed the mean does.
    None: of one training, where others have several, which says too little."""
    if not single and value.count == 1 and value.mean >= goal:
        return None
    return value.mean >= goal and (goal <= 0 or _clearly_above(value, single))


def _clearly_above(value: Difference, single: bool) -> bool:
    return value.mean > 0 and (value.clear or single)


def _cost(found: dict) -> float | None:
    """How many times cross-entropy's time an S-IB step takes, with what only every few steps do: the mean over seeds of
    the ratio of mean times; None: not known. A seed whose two runs were not timed on one machine does not count."""
    runs = {(run["method"], run["seed"]): run for run in found["runs"]}
    ratios = []
    for (method, seed), run in runs.items():
        baseline = runs.get((BASELINE, seed))
        if method != OURS or baseline is None or len(_machines(run) | _machines(baseline)) > 1:
            continue
        if (seconds := run.get("mean_seconds_per_step")) and (plain := baseline.get("mean_seconds_per_step")):
            ratios.append(seconds / plain)
    return sum(ratios) / len(ratios) if ratios else None


def _machines(run: dict) -> set[tuple]:
    """Where a run was trained, from its start and after each stop; without what old records do not have."""
    starts = run.get("record", {}).get("starts", [])
    return {tuple(start.get(key) for key in ("system", "device", "threads")) for start in starts}


# --------------------------------------------------------------------------------------------------- people


def markdown(
    summary: dict[str, dict],
    strengths: Mapping[str, Mapping[str, float]],
    costs: tuple[Sequence[str], Mapping[float, float]],
) -> str:
    """The summary for people: a line a goal and a column a set, then the leads over the peers, empty maps, the
    strengths that were chosen, set -> peer -> strength, and what S-IB's strengths cost in accuracy on which sets."""
    six = [explain.METHODS[m] for m in explain.SIX]
    rows = [
        [f"{name}: {of_measure}" if method != OURS else of_measure, *cells]
        for method, name in TOLD.items()
        for key, of_measure in MEASURES.items()
        if any(cells := [_gain_cell(of, method, key) for of in summary.values()])
    ]
    rows.append([f"time of a step, times cross-entropy's; at most {COST:g}", *map(_cost_cell, summary.values())])
    rows.append([f"explanations ahead of every peer, of six; at least {AHEAD}", *map(_ahead_cell, summary.values())])
    lines = table(["over cross-entropy", *summary], rows)

    rows = [
        [f"{results.NAMES[peer]}, {name}", *(starred(lead["epg"][m]) for m in explain.SIX), starred(lead["accuracy"])]
        for name, of in summary.items()
        for peer, lead in of["leads"].items()
    ]
    if rows:
        lines += ["", *table(["EPG of S-IB minus that of", *six, "accuracy"], rows)]

    rows = [
        [f"{results.NAMES[method]}, {name}", *(f"{counts[m]:g}" for m in explain.SIX)]
        for name, of in summary.items()
        for method, counts in of["empty"].items()
    ]
    lines += ["", *table(["empty maps of 100", *six], rows)]
    if strengths:
        peers = dict.fromkeys(peer for of in strengths.values() for peer in of)
        rows = [[name, *(f"{of[peer]:g}" if peer in of else "" for peer in peers)] for name, of in strengths.items()]
        lines += ["", *table(["strength chosen on held-out images", *(results.NAMES[peer] for peer in peers)], rows)]
    sets, of_strengths = costs
    if of_strengths:
        row = [_cost_of(cost) for cost in of_strengths.values()]
        head = ["S-IB's strength", *(f"{strength:g}" for strength in of_strengths)]
        lines += ["", *table(head, [[f"accuracy over cross-entropy, held-out images of {', '.join(sets)}", *row]])]
    return "\n".join([*lines, "", *_notes(summary), ""])


def _cost_of(difference: float) -> str:
    return f"{difference:+.3f}".replace("-", results.MINUS) if math.isfinite(difference) else "diverged"


def _notes(summary: dict[str, dict]) -> list[str]:
    several = {name: len(of["seeds"]) for name, of in summary.items() if len(of["seeds"]) > 1}
    single = [name for name in summary if name not in several]
    notes = []
    if several:
        seeds = ", ".join(f"{name} {count}" for name, count in several.items())
        notes.append(f"± is the 95 % interval over seeds ({seeds}; paired, Student's t); *: it excludes zero.")
    if single:
        notes.append(f"Of one training each, without an interval, and reached by the mean: {', '.join(single)}.")
    return [
        " ".join([*notes, "Empty maps are zero everywhere and count as 0; of several seeds the one with the most."])
    ]


def _gain_cell(of: dict, method: str, key: str) -> str:
    """A gain with its goal where it has one, and where it is the worst of the six, of which explanation."""
    value = of["gains"].get(method, {}).get(key)
    if value is None:
        return ""
    where = f" ({explain.METHODS[of['worst'][method]]})" if key == "epg_worst" else ""
    goal = of["goals"][method].get(key)
    if goal is None:
        return f"{starred(value)}{where}"
    words = "above 0" if goal == ABOVE else f"{goal:+.2f}".replace("-", results.MINUS)
    return f"{results.difference(value)}{where}; {words}: {yes(of['reached'][method][key])}"


def _cost_cell(of: dict) -> str:
    return "" if of["cost"] is None else f"{of['cost']:.2f}: {yes(of['reached']['cost'])}"


def _ahead_cell(of: dict) -> str:
    return "" if of["ahead"] is None else f"{len(of['ahead'])}: {yes(of['reached']['ahead'])}"


def curves_figure(points: Mapping[str, Mapping[str, Mapping[float | None, Point]]]) -> Figure:
    """Accuracy on held-out images against EPG and against IoU, a column a set: lines of S-IB and the energy loss over
    their strengths, cross-entropy as a cross with its standard error, other methods as small points.

    Args:
        points: set -> method -> strength (cross-entropy: None) -> point.
    """
    chart = Figure(figsize=(4.2 * len(points), 7), layout="constrained")
    panels = chart.subplots(2, len(points), squeeze=False)
    for column, (name, of_methods) in enumerate(points.items()):
        for axes, measure in zip(panels[:, column], ("epg", "iou"), strict=True):
            for method, colour in pictures.colours(of_methods).items():
                _draw(axes, method, of_methods[method], measure, colour)
            axes.set(
                xlabel=f"{results.MEASURES[measure].name}, mean of the three CAMs",
                ylabel=f"{QUALITIES['map' if is_multilabel(SETS[name].data) else 'accuracy']}, held out",
            )
            axes.set_title(name, loc="left")
            axes.margins(0.12)
            axes.grid(color="#e4e7eb", linewidth=0.6)
            axes.set_axisbelow(True)
    handles = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    chart.legend(handles.values(), handles, loc="outside lower center", ncols=6)
    return chart


def _draw(axes, method: str, of: Mapping[float | None, Point], measure: str, colour: str) -> None:
    at = [(strength, getattr(of[strength], measure), of[strength].accuracy) for strength in of]
    at = [place for place in at if all(map(math.isfinite, place[1:]))]
    x, y = [x for _, x, _ in at], [y for _, _, y in at]
    name = results.NAMES[method]
    if method == BASELINE:
        axes.plot(x, y, "x", color=pictures.INK, markersize=9, markeredgewidth=2, label=name)
        axes.errorbar(x, y, [of[None].error] * len(x), color=pictures.FAINT, capsize=3, linestyle="none", zorder=1)
    elif method in (OURS, "energy-loss"):
        axes.plot(x, y, "o-", color=colour, markersize=5, linewidth=1.2, label=name)
        for strength, *place in at:
            axes.annotate(f"{strength:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour)
    else:
        axes.plot(x, y, ".", color=colour, markersize=5, label=name)
