"""The pictures of a comparison: tiles for the report's gallery, charts, and the pictures written as files."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..training.runs import write_whole

#: One colour per training method, the same in every chart and report.
COLOURS = {
    "ce": "#8792a2",
    "sib": "#0f766e",
    "sib-features": "#4fb3a9",
    "sib-background": "#12414f",
    "sib-foreground": "#a3d9cf",
    "sib-few": "#58b58c",
    "sib-one": "#7fd67a",
    "sib-alone": "#2c7d50",
    "sib-none": "#9ccbb4",
    "sib-paper": "#6aa84f",
    "gradient-penalty": "#c2571a",
    "centre-mask": "#b88a00",
    "rrr": "#7c4dbd",
    "energy-loss": "#2f6fb5",
    "l1-loss": "#7fb2ea",
    "rrr-loss": "#d23b3b",
    "ppce-loss": "#e39ac2",
    "as-is": "#3d4b63",
}
OTHER_COLOURS = ("#b0457b", "#4d7c8a", "#8a5a44", "#52606d")  #: of methods that are not in COLOURS, in turn
INK, FAINT = "#1f2933", "#9aa5b1"
TILE = 160  #: longest side of a tile in the report, px; smaller images are enlarged by an integer up to it
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names may hold a $
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "image.interpolation": "nearest",
    "svg.hashsalt": "sib_lab",  # the same chart gives the same bytes
}


def colours(methods: Iterable[str]) -> dict[str, str]:
    """The colour of each training method."""
    others = iter(OTHER_COLOURS * 99)
    return {method: COLOURS[method] if method in COLOURS else next(others) for method in methods}


# ----------------------------------------------------------------------------------------------------- tiles


def data_uri(kind: str, content: bytes) -> str:
    """``content`` as the address of an inline picture; ``kind`` is e.g. ``image/png``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def pixels(image: np.ndarray) -> np.ndarray:
    """A normalised image [3,H,W] in [-1,1] -> [H,W,3] uint8."""
    return (np.clip(image.transpose(1, 2, 0) * 0.5 + 0.5, 0, 1) * 255).round().astype(np.uint8)


def tile(picture: Image.Image) -> Image.Image:
    """``picture`` enlarged by an integer without smoothing, or shrunk, to about TILE px."""
    longest = max(picture.size)
    if longest <= TILE:
        times = TILE // longest
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    size = (round(picture.width * TILE / longest), round(picture.height * TILE / longest))
    return picture.resize(size, Image.Resampling.BOX if picture.mode != "P" else Image.Resampling.NEAREST)


def image_tile(image: np.ndarray) -> str:
    """A normalised image [3,H,W] as an inline JPEG."""
    file = io.BytesIO()
    tile(Image.fromarray(pixels(image))).save(file, "JPEG", quality=88, subsampling=0)
    return data_uri("image/jpeg", file.getvalue())


def mask_tile(mask: np.ndarray) -> str:
    """A mask [H,W] in [0,1] as an inline PNG in grey."""
    return png(tile(Image.fromarray((np.clip(mask, 0, 1) * 255).round().astype(np.uint8))))


def map_tile(values: np.ndarray, mask: np.ndarray | None) -> str:
    """A map [h,w] >= 0, scaled to its own maximum, with the white outline of the object where a mask [H,W] is given."""
    shades = 255
    scaled = tile(Image.fromarray((values / max(float(values.max()), 1e-30) * (shades - 1)).round().astype(np.uint8)))
    indices = np.array(scaled)
    if mask is not None:
        object_pixels = Image.fromarray((resized(mask, values.shape) > 0.5).astype(np.uint8) * 255)
        indices[outline(np.array(tile(object_pixels)) > 127)] = shades
    palette = (matplotlib.colormaps["magma"](np.linspace(0, 1, shades))[:, :3] * 255).round().astype(np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette([*palette.ravel().tolist(), 255, 255, 255])
    return png(picture)


def outline(inside: np.ndarray) -> np.ndarray:
    """The pixels of a region [H,W] (boolean) that touch one outside it, or the picture's edge."""
    padded = np.pad(inside, 1)
    surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~surrounded


def png(picture: Image.Image) -> str:
    """As an inline PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return data_uri("image/png", file.getvalue())


# ---------------------------------------------------------------------------------------------------- charts


def svg(draw: Callable[[], Figure]) -> str:
    """The figure that ``draw`` makes, in the report's style, as an inline SVG."""
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        draw().savefig(file, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    return data_uri("image/svg+xml", file.getvalue())


def scatter(
    points: Mapping[str, Sequence[tuple[float, float]]],
    names: Mapping[str, str],
    chance: float,
    label: str,
    quality: str = "Accuracy",
) -> Figure:
    """Accuracy (or another ``quality``) against EPG: a dot a run and a ring at each method's mean.

    Args:
        points: method -> (EPG, accuracy) of each of its runs.
        names: method -> name for people.
        chance: EPG of a map without information, drawn as a line.
        label: of the axis of EPG.
    """
    figure = Figure(figsize=(5, 3.6), facecolor="white")
    axes = figure.subplots()
    for method, colour in colours(points).items():
        x, y = (list(values) for values in zip(*points[method], strict=True))
        axes.scatter(x, y, s=26, color=colour, alpha=0.65, linewidths=0)
        mean = (sum(x) / len(x), sum(y) / len(y))
        axes.scatter(*mean, s=120, facecolors="none", edgecolors=colour, linewidths=1.8, label=names[method])
    axes.axvline(chance, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        "chance", (chance, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points"
    )
    axes.set(xlabel=label, ylabel=quality)
    axes.margins(0.12)
    axes.grid(color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(3, len(points)))
    return figure


def curves(title: str, runs: Mapping[str, Sequence[Sequence[float]]], share: bool) -> Figure:
    """A number per epoch: one thin line a run and, where a method has several runs, their mean as a thick one.

    Args:
        runs: method -> values per epoch, of each of its runs.
        share: the values lie in [0,1].
    """
    figure = Figure(figsize=(4.2, 2.7), facecolor="white")
    axes = figure.subplots()
    for method, colour in colours(runs).items():
        lines = [line for line in runs[method] if line]
        for line in lines:
            axes.plot(range(1, len(line) + 1), line, color=colour, linewidth=0.9, alpha=0.5)
        epochs = min(map(len, lines), default=0)
        mean = [sum(line[epoch] for line in lines) / len(lines) for epoch in range(epochs)]
        axes.plot(range(1, epochs + 1), mean, color=colour, linewidth=2, marker="." if epochs < 30 else "")
    axes.set(title=title, xlabel="epoch", ylim=(0, 1.02 if share else None))
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # a MaxNLocator's
    return figure


# ----------------------------------------------------------------------------------------- pictures as files


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """Of the images of each class (rows) the share that is taken for each (columns)."""
    counts = np.asarray(matrix, float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(3.2, 0.22 * len(names) + 1.6)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    shortened = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
    axes.set_xticks(range(len(names)), shortened, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), shortened, fontsize=7)
    axes.set(xlabel="predicted", ylabel="class")
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return figure


def bare(axes) -> None:
    """No ticks, no frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def show_map(axes, values: np.ndarray, mask: np.ndarray | None = None) -> None:
    """A map [H,W] scaled to its own maximum, with the outline of the object where a mask [H,W] is given."""
    axes.imshow(values, cmap="magma", vmin=0, vmax=max(float(values.max()), 1e-30))
    if mask is not None and (mask > 0.5).any() and not (mask > 0.5).all():
        axes.contour(mask > 0.5, levels=[0.5], colors="white", linewidths=0.6, alpha=0.8)


def gallery(
    images: np.ndarray,
    masks: np.ndarray | None,
    maps: Mapping[str, Mapping[str, np.ndarray]],
    methods: Mapping[str, str],
    explanations: Mapping[str, str],
) -> Figure:
    """One image a column: input, mask, and every explanation's map of every network one above the other.

    Args:
        images: normalised [G,3,H,W].
        masks: [G,H,W] in [0,1], or None where the set has none.
        maps: training method -> explanation -> maps [G,h,w].
        methods, explanations: the keys to show -> their names for people.
    """
    labels = ["Input", *(["Mask"] if masks is not None else [])]
    pictures: list[Any] = [[pixels(image) for image in images], *([list(masks)] if masks is not None else [])]
    for explanation, name in explanations.items():
        labels += ["", *(f"{name}\n{method}" for method in methods.values())]
        pictures += [None, *(maps[method][explanation] for method in methods)]
    heights = [1 if label else 0.12 for label in labels]
    figure = Figure(figsize=(len(images) + 1.5, sum(heights)), facecolor="white")
    grid = figure.subplots(len(labels), len(images), squeeze=False, height_ratios=heights)
    figure.subplots_adjust(left=1.5 / figure.get_figwidth(), right=1, bottom=0, top=1, wspace=0.03, hspace=0.03)
    for line, of_line in zip(grid, pictures, strict=True):
        for column, axes in enumerate(line):
            bare(axes)
            if of_line is None:
                continue
            picture = of_line[column]
            if of_line is pictures[0]:
                axes.imshow(picture)
            elif masks is not None and of_line is pictures[1]:
                axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            else:
                show_map(axes, picture, None if masks is None else resized(masks[column], picture.shape))
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
    return figure


def resized(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask [H,W] at another resolution ``shape`` = (h, w)."""
    if mask.shape == shape:
        return mask
    height, width = shape
    return np.asarray(Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX))


def save(figure: Figure, path: Path, dpi: int) -> None:
    """As a picture file, cropped to the drawing; the name's ending says which kind.

    Raises:
        RunError: it cannot be written.
    """
    kind = path.suffix.lower()[1:]
    write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=dpi, bbox_inches="tight", pad_inches=0.08))


def finite(value: float | None) -> bool:
    """Whether there is a number to draw."""
    return value is not None and math.isfinite(value)
