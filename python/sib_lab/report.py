"""Pictures and report.html of a demo run."""

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure
from torch import Tensor, nn

from .data.digits_on_textures import BACKGROUNDS, Split
from .explain import METHODS
from .measure import Estimate, energy_pointing_game, object_pixels, predict
from .train import NETWORKS

COLOURS = {"cross_entropy": "#8792a2", "spatial_ib": "#0f766e"}
INK, FAINT = "#1f2933", "#9aa5b1"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "image.interpolation": "nearest",
}
#: What a difference within its 95 % interval is called.
SAME = "no clear difference"


@dataclass(frozen=True)
class Example:
    """One image of the gallery."""

    picture: str  #: file name
    label: int
    background: str
    predicted: dict[str, int]  #: network -> class


def measures(network: dict) -> dict[str, Estimate]:
    """A network's results in the order of the table: name for people -> estimate."""
    return {
        "Accuracy, matched backgrounds": network["accuracy_matched"],
        "Accuracy, uncorrelated backgrounds": network["accuracy_uncorrelated"],
    } | {f"EPG, {method}": network["epg"][method] for method in METHODS}


def number(value: Estimate) -> str:
    """An estimate for people, e.g. ``0.512 ± 0.049``, with the images left out where there are any."""
    if math.isnan(value.mean):
        return f"undefined for all {value.undefined}"
    interval = "" if math.isnan(value.half_width) else f" ± {value.half_width:.3f}"
    return f"{value.mean:.3f}{interval}" + (f" ({value.undefined} undefined)" if value.undefined else "")


def comparison(baseline: Estimate, value: Estimate) -> str:
    """What S-IB changed, in words: a difference outside the 95 % interval of the difference, or none that is clear."""
    difference = value.mean - baseline.mean
    if not abs(difference) > math.hypot(baseline.half_width, value.half_width):
        return SAME
    return f"{difference:+.3f}".replace("-", "\N{MINUS SIGN}")


def write(
    folder: Path,
    results: dict,
    split: Split,
    rows: Tensor,
    maps: Mapping[str, Mapping[str, Tensor]],
    models: Mapping[str, nn.Module],
) -> None:
    """Draws all pictures into ``folder`` and the report that contains them.

    Args:
        results: the content of results.json.
        split, rows: the images of the gallery are ``split.images[rows]``.
        maps: network -> method -> maps [len(rows),H,W].
        models: network -> model, for the predicted classes.
    """
    predicted = {name: predict(model, split.inputs[rows]) for name, model in models.items()}
    with matplotlib.rc_context(STYLE):
        save(gallery(split, rows, maps), folder / "gallery.png", dpi=90)
        save(bars(results), folder / "bars.png")
        save(training_curves(results), folder / "curves.png")
        examples = []
        for place, row in enumerate(rows.tolist()):
            name = f"image{place + 1}.png"
            of_image = {n: {method: m[place] for method, m in of_network.items()} for n, of_network in maps.items()}
            save(example(split, row, of_image), folder / name)
            examples.append(
                Example(
                    name,
                    int(split.labels[row]),
                    background_name(int(split.backgrounds[row])),
                    {n: int(classes[place]) for n, classes in predicted.items()},
                )
            )
    (folder / "report.html").write_text(page(folder, results, examples), encoding="utf-8")


def background_name(index: int) -> str:
    """For people."""
    return BACKGROUNDS[index].replace("_", " ")


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """As PNG, cropped to the drawing."""
    figure.savefig(path, dpi=dpi, bbox_inches="tight", pad_inches=0.08)


# ---------------------------------------------------------------------------------------------- pictures


def show_image(axes, image: Tensor) -> None:
    """An image [3,H,W] in [0,1]."""
    axes.imshow(image.permute(1, 2, 0).numpy())


def show_mask(axes, mask: Tensor) -> None:
    """A mask [1,H,W] in [0,1]."""
    axes.imshow(mask[0].numpy(), cmap="gray", vmin=0, vmax=1)


def show_map(axes, values: Tensor, mask: Tensor) -> None:
    """A map [H,W] scaled to its own maximum, with the outline of the object."""
    axes.imshow(values.numpy(), cmap="magma", vmin=0, vmax=max(values.max().item(), 1e-30))
    axes.contour(object_pixels(mask[None])[0].numpy(), levels=[0.5], colors="white", linewidths=0.6, alpha=0.8)


def bare(axes) -> None:
    """No ticks, no frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def gallery(split: Split, rows: Tensor, maps: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """One image a column: input, mask, and every method's map of both networks one above the other."""
    labels = ["Input", "Mask"]
    for method in METHODS:
        labels += ["", *(f"{method}\n{NETWORKS[name]}" for name in maps)]
    heights = [1 if label else 0.12 for label in labels]
    figure = Figure(figsize=(len(rows) + 1.5, sum(heights)), facecolor="white")
    grid = figure.subplots(len(labels), len(rows), squeeze=False, height_ratios=heights)
    figure.subplots_adjust(left=1.5 / figure.get_figwidth(), right=1, bottom=0, top=1, wspace=0.03, hspace=0.03)
    for column, row in enumerate(rows.tolist()):
        show_image(grid[0, column], split.images[row])
        show_mask(grid[1, column], split.masks[row])
        panels = (axes for axes, label in zip(grid[2:, column], labels[2:], strict=True) if label)
        for method in METHODS:
            for name in maps:
                show_map(next(panels), maps[name][method][column], split.masks[row])
    for axes in grid.flat:
        bare(axes)
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
    return figure


def example(split: Split, row: int, maps: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """One image: input and mask on the left, a line of maps with their EPG for each network."""
    figure = Figure(figsize=(5.6, 3.2), facecolor="white")
    grid = figure.subplots(len(maps), 2 + len(METHODS), squeeze=False, width_ratios=[1, 0.16] + [1] * len(METHODS))
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.05, hspace=0.2)
    show_image(grid[0, 0], split.images[row])
    show_mask(grid[1, 0], split.masks[row])
    grid[0, 0].set_title("Input")
    grid[1, 0].set_xlabel("Mask")
    for line, (name, of_network) in enumerate(maps.items()):
        for column, (method, values) in enumerate(of_network.items(), start=2):
            show_map(grid[line, column], values, split.masks[row])
            share = energy_pointing_game(values[None], split.masks[row][None]).item()
            grid[line, column].set_title(method if line == 0 else "")
            grid[line, column].set_xlabel("no map" if math.isnan(share) else f"EPG {share:.2f}", labelpad=3)
        grid[line, 2].set_ylabel(NETWORKS[name], color=COLOURS[name], fontweight="bold")
    for axes in grid.flat:
        bare(axes)
    return figure


def bars(results: dict) -> Figure:
    """Every measure of both networks side by side, with the 95 % intervals and the chance level of EPG."""
    figure = Figure(figsize=(7.2, 3.4), facecolor="white")
    axes = figure.subplots()
    width = 0.38
    for place, (name, network) in enumerate(results["networks"].items()):
        values = list(measures(network).values())
        x = [i + (place - 0.5) * width for i in range(len(values))]
        axes.bar(
            x,
            [v.mean for v in values],
            width * 0.94,
            yerr=[v.half_width for v in values],
            color=COLOURS[name],
            error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
            label=NETWORKS[name],
        )
        for at, value in zip(x, values, strict=True):
            if not math.isnan(value.mean):
                top = value.mean + (0 if math.isnan(value.half_width) else value.half_width)
                axes.text(at, top + 0.015, f"{value.mean:.2f}", ha="center", fontsize=9)
    labels = [measure.replace(", ", "\n") for measure in measures(next(iter(results["networks"].values())))]
    axes.set_xticks(range(len(labels)), [label.replace(" backgrounds", "") for label in labels])
    axes.hlines(results["epg_by_chance"], 1.5, len(labels) - 0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.text(len(labels) - 0.48, results["epg_by_chance"], "chance", va="center", fontsize=9)
    axes.set(ylim=(0, 1.08), xlim=(-0.6, len(labels) - 0.05))
    axes.tick_params(axis="x", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.62, 1.02), ncols=2)
    return figure


def training_curves(results: dict) -> Figure:
    """Cross-entropy in training, and accuracy on both validation splits, per epoch."""
    figure = Figure(figsize=(7.2, 2.7), facecolor="white")
    loss, accuracy = figure.subplots(1, 2, gridspec_kw={"wspace": 0.25})
    for name, curve in results["curves"].items():
        epochs = range(1, len(curve["cross_entropy"]) + 1)
        loss.plot(epochs, curve["cross_entropy"], color=COLOURS[name], label=NETWORKS[name], marker=".")
        accuracy.plot(epochs, curve["validation_uncorrelated"], color=COLOURS[name], marker=".")
        accuracy.plot(epochs, curve["validation_matched"], color=COLOURS[name], linestyle=(0, (2, 2)), linewidth=1)
    loss.set(title="Cross-entropy in training", xlabel="epoch", ylim=(0, None))
    loss.legend()
    accuracy.set(title="Accuracy in validation", xlabel="epoch", ylim=(0, 1.02))
    accuracy.plot([], [], color=FAINT, marker=".", label="uncorrelated")
    accuracy.plot([], [], color=FAINT, linestyle=(0, (2, 2)), linewidth=1, label="matched")
    accuracy.legend(fontsize=9)
    for axes in (loss, accuracy):
        axes.title.set_size(10)
    return figure


# -------------------------------------------------------------------------------------------------- page


def page(folder: Path, results: dict, examples: list[Example]) -> str:
    """report.html: one file, its pictures inside."""

    def picture(name: str) -> str:
        return "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()

    columns = [measures(network) for network in results["networks"].values()]
    lines = [
        {
            "measure": measure,
            "numbers": [number(column[measure]) for column in columns],
            "comparison": comparison(*(column[measure] for column in columns)),
        }
        for measure in columns[0]
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        results=results,
        lines=lines,
        networks=NETWORKS,
        examples=examples,
        picture=picture,
        same=SAME,
    )
