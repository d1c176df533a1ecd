"""``sib-lab explain``: what a trained network sees in image files, as one picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from ..data import DataError
from ..data.base import Common, normalise, photo_transforms
from ..data.images import read_image
from ..explaining import measures as measure
from ..explaining import methods as explain
from ..reporting import pictures
from ..training.runs import Run, RunError, open_run

FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")
MADE_AT_SIZE = ("digits", "composite")  #: data sets whose images are not cropped


def explain_files(
    checkpoint: Path, files: Sequence[Path], out: Path, layer: str | None = None, console: Console | None = None
) -> list[tuple[str, float]]:
    """Writes the six methods' maps of each image for its predicted class into ``out``.

    Args:
        checkpoint: a run folder, or a checkpoint file in one.
        out: the picture; its ending says which kind.
        layer: that class-activation maps look at; None: found.

    Returns:
        predicted class and its probability of each image.

    Raises:
        RunError, DataError, NetworkError: one sentence for the user.
    """
    if out.suffix.lower() not in FORMATS:
        raise RunError(f"The picture {out} must end in one of {', '.join(FORMATS)}.")
    run = open_run(checkpoint)
    x = torch.stack([prepared(path, run) for path in files])
    with torch.no_grad():
        probabilities = torch.cat([F.softmax(measure.scores_of(run.model, image), 1) for image in x.split(1)])
    probability, target = probabilities.max(1)
    try:
        maps = explain.explain(run.model, x, target, explain.SIX, layer)
    except ValueError as error:  # of the layer: the rest is ours
        raise RunError(f"{error}.") from error
    found = [(run.classes[label], p) for label, p in zip(target.tolist(), probability.tolist(), strict=True)]
    titles = [
        f"{shortened(path.name)}\n{shortened(name)}, {100 * p:.1f} %"
        for path, (name, p) in zip(files, found, strict=True)
    ]
    arrays = {name: values.numpy() for name, values in maps.items()}
    with matplotlib.rc_context(pictures.STYLE):
        pictures.save(pictures.explained(x.numpy(), titles, arrays, explain.METHODS), out, dpi=110)
    console = console or Console()
    empty = {name: measure.empty_maps(values) == 1 for name, values in maps.items()}
    for row, (path, (name, p)) in enumerate(zip(files, found, strict=True)):
        nothing = ", ".join(explain.METHODS[method] for method, is_empty in empty.items() if is_empty[row])
        told = f"; zero everywhere: {nothing}" if nothing else ""
        console.print(f"{path}: {name} ({100 * p:.1f} %){told}", soft_wrap=True, highlight=False)
    console.print(f"Picture: {out}", soft_wrap=True, highlight=False)
    return found


def shortened(text: str, most: int = 28) -> str:
    """At most so many characters, so that titles do not overlap."""
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def prepared(path: Path, run: Run) -> Tensor:
    """An image file as the network takes it, [3,S,S]: as the images of its test set are made.

    Raises:
        DataError: it is missing or cannot be read as an image.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: name image files.")
    pixels = torch.from_numpy(read_image(path, upright=run.config.data == "folder").copy()).permute(2, 0, 1)
    if run.config.data in MADE_AT_SIZE:
        from torchvision.transforms import v2

        transform = v2.Compose([v2.Resize(run.size, antialias=True), v2.CenterCrop(run.size)])
        return normalise(transform(pixels).float() / 255)
    _, transform = photo_transforms(Common(run.size))
    return normalise(transform(pixels, 0).float() / 255)
