"""``sib-lab check``: what a data set holds, before anything is trained on it; light to import."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import SETS, DataError
from .common import one_sentence, pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from ..data import DataSets
    from ..data.checks import Report

EPILOG = "Example: sib-lab check --root photos"
KINDS = (".png", ".jpg", ".pdf", ".svg", ".webp")
SHOWN = 12  #: images in the picture
LOOKED_AT = 300  #: annotated images of each split whose objects are measured


def check_command(
    root: Annotated[Path | None, typer.Option(help="Folder of the data set.", show_default=False)] = None,
    data: Annotated[str, typer.Option(help=f"Data set: {', '.join(SETS)}.")] = "folder",
    option: Annotated[
        list[str] | None, typer.Option(help="An option of this data set, NAME=VALUE; may be repeated.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images, px.", show_default="the data set's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the splits that are drawn.")] = 0,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave broken files out and name them.", show_default="stop")
    ] = False,
    out: Annotated[Path, typer.Option(help="The picture: .png, .jpg, .pdf, .svg or .webp.")] = Path("check.png"),
) -> None:
    """Show what a data set holds: images, masks, what was left out, and twelve images with their masks.

    Exit code 1 where something cannot be right, such as masks that mark nothing or the background.
    """
    with one_sentence():
        if out.suffix.lower() not in KINDS:
            raise DataError(f"--out must end in one of {', '.join(KINDS)}, got {out}.")
        from ..console import plain_console
        from ..data import open_data
        from ..data.checks import check
        from ..reporting.pictures import save

        options: dict[str, Any] = dict(pairs(option or []))
        opened = open_data(data, root, size=size, seed=seed, skip_broken=skip_broken, **options)
        report = check(opened, LOOKED_AT)
        plain_console().print(counts(report))
        typer.echo("\n".join(lines(report)))
        out.parent.mkdir(parents=True, exist_ok=True)
        save(picture(opened), out, dpi=100)
        typer.echo(f"Twelve training images with their masks: {out}")
        for problem in report.problems:
            typer.echo(problem, err=True)
        if report.problems:
            raise typer.Exit(1)


def counts(report: "Report") -> "Table":
    """Images of each class and split."""
    from rich.table import Table
    from rich.text import Text

    table = Table("class", show_footer=True)
    table.columns[0].footer = "all"
    for name, split in report.splits.items():
        table.add_column(Text(name.rpartition("/")[2]), str(split.count), justify="right")
    for row, name in enumerate(report.classes):
        table.add_row(Text(name), *(str(split.images[row]) for split in report.splits.values()))
    return table


def lines(report: "Report") -> list[str]:
    """What is known about masks, one line a split, and what was left out."""
    from ..data.checks import EMPTY

    found = []
    for name, split in report.splits.items():
        areas, seen = split.areas, ""
        if areas:
            mean, least, most = sum(areas) / len(areas), min(areas), max(areas)
            seen = f"; the object covers {mean:.1%} of an image ({least:.1%} to {most:.1%}, {len(areas)} looked at)"
            if empty := sum(area < EMPTY for area in areas):
                seen += f"; in {empty} of these nearly nothing is marked"
        found.append(f"{name.rpartition('/')[2]}: {split.annotated:.0%} of the images are annotated{seen}.")
    return [*found, *(f"Left out: {reason}." for reason in report.skipped)]


def picture(data: "DataSets") -> "Figure":
    """Training images, of every class in turn, with the outline of their masks; what is off the object is dimmed."""
    from matplotlib.figure import Figure

    from ..data import stack
    from ..data.base import limited
    from ..reporting.pictures import bare, pixels

    labels = data.train.labels
    # Of several labels an image the one that comes first stands for it.
    rows = limited((labels.argmax(1) if data.multilabel else labels).tolist(), SHOWN, seed=0)
    items = stack(data.train, rows)
    figure = Figure(figsize=(12, 9.6), facecolor="white", layout="constrained")
    for axes, place in zip(figure.subplots(3, 4).flat, range(SHOWN), strict=True):
        bare(axes)
        if place >= len(rows):
            continue
        shown, mask = pixels(items.image[place].numpy()), items.mask[place].amax(0).numpy()
        if items.annotated[place].any():
            shown = (shown * (0.35 + 0.65 * mask[..., None])).astype("uint8")
        axes.imshow(shown)
        if 0.5 < mask.max() and mask.min() <= 0.5:
            axes.contour(mask, levels=[0.5], colors="#ffd60a", linewidths=1.2)
        axes.set_title(_title(data, rows[place]), fontsize=8, parse_math=False)
    return figure


def _title(data: "DataSets", row: int) -> str:
    """An image's classes, and the end of its file's name where it has one."""
    from ..data.files import FileItems, name_of

    labels = data.train.labels[row]
    label = ", ".join(data.classes[n] for n in (labels.nonzero()[:, 0].tolist() if data.multilabel else [int(labels)]))
    name = ""
    if isinstance(data.train, FileItems):
        name = f"\n{name_of(data.train.samples[row].image, data.train.root)[-40:]}"
    return f"{label[-40:]}{'' if data.train.annotated[row] else ' (no mask)'}{name}"
