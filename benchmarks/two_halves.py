"""What each half of S-IB does: four trainings of one network, without both halves, with one of them, and with both.

    python benchmarks/two_halves.py PICTURES     # the folder that `sib-lab evidence` takes; ten minutes on one core

Goes on where it was stopped. Prints the table of docs/two_halves.md, draws docs/images/two_halves.png and writes
benchmarks/results/cpu/two_halves.json; runs and report stay in --out.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from sib_lab.experiments.compare import compare
from sib_lab.experiments.evidence import BASELINE, OURS, SCALES, SITUATIONS, check_data, plan_of
from sib_lab.experiments.material import Material
from sib_lab.experiments.plan import OF_MASKS, Plan
from sib_lab.explaining import measures as measure
from sib_lab.explaining.methods import METHODS, SIX
from sib_lab.networks.feature_maps import cam_layer
from sib_lab.reporting import pictures
from sib_lab.reporting.page import IMAGES, MAPS
from sib_lab.reporting.results import EMPTY, MEASURED, RUNS, run_name
from sib_lab.training.losses import background_share, captured
from sib_lab.training.runs import Run, open_run, write_text
from torch import Tensor

from sib_ext import functional as sib
from sib_ext.estimators import FLOOR

ROOT = Path(__file__).resolve().parent.parent
BACKGROUND, FOREGROUND = "sib-background", "sib-foreground"
#: Training method -> options of its loss, and name for people.
LOSSES = {
    BASELINE: ({}, "cross-entropy"),
    BACKGROUND: ({"feature_foreground": 0.0}, "background half"),
    FOREGROUND: ({"input_background": 0.0, "feature_background": 0.0}, "foreground half"),
    OURS: ({}, "both halves"),
}
SHOWN = 5  #: images in the picture
DRAWN = ("gradcam", "input_x_gradient")  #: explanations in the picture


def plan_of_halves(folder: Path, seed: int, threads: int | None = None) -> Plan:
    """The evidence's situation of given masks, one seed, with these four losses."""
    given = replace(SITUATIONS["given"], controls=(), parts=())
    plan = plan_of(given, folder, SCALES["cpu"], (seed,), threads)
    configs = {
        method: replace(plan.configs[BASELINE if method == BASELINE else OURS], loss_options=options)
        for method, (options, _) in LOSSES.items()
    }
    return replace(plan, configs=configs, measures=OF_MASKS)


# ---------------------------------------------------------------------------------------------- the numbers


def of_activation(T: Tensor, mask: Tensor) -> dict[str, float]:
    """What the halves speak of, of class activations T [B,1,h,w] in masks [B,1,h,w] in [0,1].

    ``background``: the share of T there, mean. ``capacity``: I_f in nats, geometric mean as in the loss. ``coverage``
    of the object, mean: (sum M sqrt T)^2 / (sum M sum M T), 1 where T is even on it, 0 where T is empty. ``empty``: the
    share of T that are zero everywhere.
    """
    inside, area, filled = (mask * T).sum((1, 2, 3)), mask.sum((1, 2, 3)), T.flatten(1).any(1)
    spread = (mask * T.sqrt()).sum((1, 2, 3)).square() / (area * inside).clamp_min(1e-30)
    return {
        "background": background_share(T, mask)[filled].mean().item(),
        "capacity": math.exp(sib.foreground_log_capacity(T, mask).mean().item()) - FLOOR,
        "coverage": spread.mean().item(),
        "empty": (~filled).double().mean().item(),
    }


def activation(run: Run, x: Tensor, label: Tensor) -> Tensor:
    """T [B,1,h,w] of the label's logit at the last feature map, in eval mode."""
    with measure.in_eval_mode(run.model), captured(run.model, cam_layer(run.model)) as outputs:
        logits = run.model(x)
        (R_A,) = torch.autograd.grad(sib.target_logit(logits, label), outputs[-1])
    return sib.class_activation(outputs[-1].detach(), R_A)


def numbers_of(found: dict, of_t: Mapping[str, Mapping[str, float]]) -> dict:
    """Of a comparison's results: what the page shows, by training method, rounded."""
    numbers = {run["method"]: run["numbers"] for run in found["runs"]}
    wanted = [f"accuracy/{name}" for name in found["data"]["tests"]]
    wanted += [f"{name}/{explanation}" for name in ("epg", "iou", EMPTY) for explanation in SIX]
    return {
        method: {key: _rounded(of[key]["mean"]) for key in wanted}
        | {f"T/{key}": _rounded(value) for key, value in of_t[method].items()}
        for method, of in numbers.items()
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def table(numbers: Mapping[str, Mapping[str, float]]) -> Table:
    """A column a loss."""
    shown = Table("", *(LOSSES[method][1] for method in numbers), title="Given masks, one seed")
    rows = {f"accuracy/{name}": f"accuracy, {name}" for name in ("uncorrelated", "matched", "flipped")}
    for name, text in (("epg", "EPG"), ("iou", "IoU")):
        rows |= {f"{name}/{m}": f"{text}, {METHODS[m]}" for m in SIX}
    rows |= {
        "T/background": "T: background's share",
        "T/capacity": "T: capacity on the object, nats",
        "T/coverage": "T: coverage of the object",
    }
    for key, text in rows.items():
        shown.add_row(text, *(_cell(of[key]) for of in numbers.values()))
    shown.add_section()
    for key, text in {f"{EMPTY}/{m}": METHODS[m] for m in SIX}.items():
        shown.add_row(f"empty of 100, {text}", *(f"{100 * of[key]:.0f}" for of in numbers.values()))
    shown.add_row("empty of 100, T", *(f"{100 * of['T/empty']:.0f}" for of in numbers.values()))
    return shown


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


# ---------------------------------------------------------------------------------------------- the picture


def stored_pictures(folder: Path, seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """Images [G,3,H,W], masks [G,H,W] and maps method -> explanation -> [G,h,w] of a comparison's gallery.

    The gallery has the first explained test images on a background that is not their class's own, one a class.
    """
    with np.load(folder / IMAGES, allow_pickle=False) as stored:
        images, masks = stored["images"], stored["masks"].astype(np.float32)
    maps = {}
    for method in LOSSES:
        with np.load(folder / RUNS / run_name(method, seed) / MEASURED / MAPS, allow_pickle=False) as stored:
            maps[method] = {explanation: stored[explanation] for explanation in DRAWN}
    return images, masks, maps


def figure(
    images: np.ndarray,
    masks: np.ndarray,
    maps: Mapping[str, Mapping[str, np.ndarray]],
    explanations: Sequence[str] = DRAWN,
) -> Figure:
    """One image a line: input, mask, and a block of columns for each explanation, with one for each loss."""
    side, gap, title = 0.98, 0.2, 0.62
    blocks = [("", ["image", "mask"])]
    blocks += [(METHODS[explanation], [LOSSES[method][1] for method in maps]) for explanation in explanations]
    widths = [width for _, columns in blocks for width in (*(1,) * len(columns), gap)][:-1]
    chart = Figure(figsize=(side * sum(widths), side * len(images) + title), facecolor="white")
    grid = chart.subplots(len(images), len(widths), squeeze=False, width_ratios=widths)
    top = 1 - title / chart.get_figheight()
    chart.subplots_adjust(left=0, right=1, bottom=0, top=top, wspace=0.04, hspace=0.04)
    names = [name for _, columns in blocks for name in (*columns, None)][:-1]
    for line, image, mask, row in zip(grid, images, masks, range(len(images)), strict=True):
        cells = iter(line)
        next(cells).imshow(pictures.pixels(image))
        next(cells).imshow(mask, cmap="gray", vmin=0, vmax=1)
        for explanation in explanations:
            next(cells)
            for of_method in maps.values():
                axes, values = next(cells), of_method[explanation][row]
                pictures.show_map(axes, values, pictures.resized(mask, values.shape))
                if not values.any():
                    axes.text(0.5, 0.5, "empty", color="white", ha="center", transform=axes.transAxes, fontsize=8)
        for axes in line:
            pictures.bare(axes)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title((name or "").replace(" ", "\n"), fontsize=8.5, pad=4)
    place = 0
    for name, columns in blocks:
        ends = grid[0, place].get_position(), grid[0, place + len(columns) - 1].get_position()
        chart.text((ends[0].x0 + ends[1].x1) / 2, 0.998, name, ha="center", va="top", fontsize=10, weight="bold")
        place += len(columns) + 1
    return chart


def draw(path: Path, *of_figure) -> None:
    """:func:`figure` as a .png of few colours."""
    with matplotlib.rc_context(pictures.STYLE):
        pictures.save(figure(*of_figure), path, dpi=100)
    Image.open(path).convert("RGB").quantize(160).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, help="the folder with the objects and the backgrounds")
    parser.add_argument("--out", type=Path, default=Path("runs/two_halves"))
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int)
    chosen = parser.parse_args()
    check_data(chosen.pictures)
    plan = plan_of_halves(chosen.pictures, chosen.seed, chosen.threads)
    console = Console()
    found = compare(plan, chosen.out, console=console)

    material = Material(plan, chosen.seed)
    folders = {method: chosen.out / RUNS / run_name(method, chosen.seed) for method in plan.configs}
    items = material.items
    of_t = {}
    for method, folder in folders.items():
        T = activation(open_run(folder, plan.best), items.image, items.label)
        of_t[method] = of_activation(T, F.adaptive_avg_pool2d(items.mask, T.shape[2:]))
    numbers = numbers_of(found, of_t)
    Console(width=max(console.width, 110)).print(table(numbers))
    about = {"seed": chosen.seed, "chance": _rounded(found["chance"]), "images": len(material.rows)}
    about |= {name: found[name] for name in ("machine", "versions")}
    text = json.dumps(about | {"numbers": numbers}, indent=1)
    write_text(ROOT / "benchmarks/results/cpu/two_halves.json", text + "\n")
    images, masks, maps = stored_pictures(chosen.out, chosen.seed)
    first = {method: {m: of[m][:SHOWN] for m in DRAWN} for method, of in maps.items()}
    draw(ROOT / "docs/images/two_halves.png", images[:SHOWN], masks[:SHOWN], first)


if __name__ == "__main__":
    main()
