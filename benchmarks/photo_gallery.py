"""Draws photographs, or their objects' outlines alone, with maps of networks that ``sib-lab evidence-photos`` trained.

    python benchmarks/photo_gallery.py runs/evidence-photos/pets3 --out photographs.png
    python benchmarks/photo_gallery.py runs/evidence-photos/{duts30,cub20,pets3} --images 4 --outlines --out maps.png

``--outlines`` is for sets whose licence does not allow to show a photograph elsewhere.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sib_lab.explaining.methods import METHODS
from sib_lab.reporting import pictures
from sib_lab.reporting.page import MAPS
from sib_lab.reporting.results import COMPARISON, MEASURED, NAMES, RUNS, run_name


def columns_of(folder: Path, methods: list[str], images: int) -> list[dict]:
    """Of the first images of a set's gallery: photograph, mask (None where there is none), and by method the maps."""
    first = json.loads((folder / COMPARISON).read_text())["seeds"][0]
    stored = np.load(folder / "images.npz")
    maps = {m: np.load(folder / RUNS / run_name(m, first) / MEASURED / MAPS) for m in methods}
    known = np.flatnonzero(stored["annotated"])[:images]
    return [
        {
            "set": folder.name,
            "image": stored["images"][k],
            "mask": stored["masks"][k],
            "maps": {m: (maps[m], k) for m in methods},
        }
        for k in known
    ]


def figure(columns: list[dict], methods: list[str], explanations: list[str], outlines: bool) -> Figure:
    """A column an image; rows: the photograph, then every explanation's maps of every network."""
    rows = [(explanation, method) for explanation in explanations for method in methods]
    height = len(rows) + (not outlines)
    chart = Figure(figsize=(1.25 * len(columns) + 1.6, 1.25 * height), facecolor="white")
    grid = chart.subplots(height, len(columns), squeeze=False)
    chart.subplots_adjust(left=1.6 / chart.get_figwidth(), right=1, bottom=0, top=0.95, wspace=0.03, hspace=0.03)
    for place, of in enumerate(columns):
        lines = grid[:, place]
        photograph = pictures.pixels(of["image"])
        if not outlines:
            lines[0].imshow(photograph)
            lines = lines[1:]
        for axes, (explanation, method) in zip(lines, rows, strict=True):
            stored, row = of["maps"][method]
            values = stored[explanation][row]
            if outlines:
                pictures.show_map(axes, values, pictures.resized(of["mask"], values.shape))
            else:
                show_over(axes, photograph, values, of["mask"])
    for axes in grid.flat:
        pictures.bare(axes)
    for place, of in enumerate(columns):
        if place == 0 or of["set"] != columns[place - 1]["set"]:
            grid[0, place].set_title(of["set"], loc="left")
    labels = [f"{METHODS[explanation]}\n{NAMES[method]}" for explanation, method in rows]
    for axes, label in zip(grid[:, 0], labels if outlines else ["Photograph", *labels], strict=True):
        axes.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
    return chart


def show_over(axes, photograph: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
    """A map [h,w], scaled to its own maximum, over its photograph [H,W,3] in grey, with the object's outline."""
    height, width = values.shape
    axes.imshow(photograph.mean(2), cmap="gray", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.imshow(values, cmap="magma", alpha=0.25 + 0.6 * values / max(float(values.max()), 1e-30))
    axes.contour(pictures.resized(mask, values.shape) > 0.5, levels=[0.5], colors="white", linewidths=0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sets", nargs="+", type=Path, help="folders of comparisons")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    parser.add_argument("--methods", default="ce,sib", help="training methods, by their keys")
    parser.add_argument("--explanations", default="gradcam,integrated_gradients", help="by their keys")
    parser.add_argument("--images", type=int, default=8, help="of each set, at most")
    parser.add_argument("--outlines", action="store_true", help="no photograph: maps with the object's outline")
    given = parser.parse_args()
    methods, explanations = given.methods.split(","), given.explanations.split(",")
    columns = [column for folder in given.sets for column in columns_of(folder, methods, given.images)]
    with matplotlib.rc_context(pictures.STYLE):
        pictures.save(figure(columns, methods, explanations, given.outlines), given.out, dpi=75)


if __name__ == "__main__":
    main()
