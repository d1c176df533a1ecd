"""``sib-lab explain``: what a network sees in image files, as pictures."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ..data import DataError, is_multilabel
from ..data.base import normalise
from ..data.images import read_image
from ..explaining import methods as explain
from ..networks.build import IMAGENET_CLASSES, build_network, published_preprocessing
from ..networks.errors import NetworkError
from ..networks.feature_maps import cam_layer
from ..networks.imagenet_classes import imagenet_names
from ..networks.weights import read_weights
from ..reporting import sheets
from ..training.runs import RunError, open_run, write_whole

FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")
CHUNK = 32  #: pictures in memory at a time
MOST_IN_ONE = 40  #: pictures in one file, so that it is not too tall for its format
USUAL_SIZE = 224  #: px, of a network that says nothing of its images
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass
class Subject:
    """A network whose decisions are explained."""

    model: nn.Module  #: in eval mode, its parameters frozen
    classes: tuple[str, ...]
    size: int  #: shorter side of the images that it is given, px
    interpolation: str = "bilinear"
    multilabel: bool = False  #: whether a picture may have several labels

    def __post_init__(self):
        # A copy is not needed, gradients of weights are not, and convolutions on a CPU like their channels last.
        self.model = self.model.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @cached_property
    def layer(self) -> str:
        """The module that class-activation maps look at.

        Raises:
            NetworkError: there is none.
        """
        return cam_layer(self.model, self.size)

    @cached_property
    def takes_any_shape(self) -> bool:
        """Whether it takes wide and tall images, too, and has no tokens, whose grid would not be known."""
        try:
            layer = self.model.get_submodule(self.layer)
        except NetworkError:  # no feature map at all
            return False
        dimensions = []
        hook = layer.register_forward_hook(lambda module, inputs, output: dimensions.append(output.dim()))
        try:
            with torch.no_grad():
                self.model(torch.zeros(1, 3, self.size, self.size + 32))
        except Exception:  # whatever a network raises on another shape
            return False
        finally:
            hook.remove()
        return dimensions == [4]


def subject_of_run(checkpoint: Path, trust: bool = False) -> Subject:
    """The network of a run folder, or of a checkpoint file in one.

    Raises:
        RunError, NetworkError: as :func:`sib_lab.training.runs.open_run`.
    """
    run = open_run(checkpoint, trust=trust)
    return Subject(run.model, run.classes, run.size, multilabel=run.multilabel)


def subject_of_network(
    name: str,
    weights: Path,
    classes: Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Subject, str]:
    """A network with weights from a file, and what was taken from the file, as one sentence.

    Args:
        name, weights, mean, std: see :func:`sib_lab.networks.build.build_network`.
        classes: a text file, a name a line; None: those of a checkpoint of this program, ImageNet's for 1000 classes,
            else numbers.

    Raises:
        NetworkError, RunError: one sentence.
    """
    published = published_preprocessing(name)
    own = read_weights(weights) if weights.is_file() else None
    size = own.size if own and own.size else published.size or USUAL_SIZE
    model: Any = build_network(name, None, size, weights, mean, std)
    count = model.class_count
    if classes is not None:
        names = read_names(classes, count)
    elif own and own.classes:
        names = own.classes
    else:
        names = imagenet_names() if count == IMAGENET_CLASSES else tuple(map(str, range(count)))
    several = is_multilabel(own.data if own else None)
    return Subject(model, names, size, published.interpolation, several), model.weights_note


def read_names(path: Path, count: int) -> tuple[str, ...]:
    """Names of classes, one a line.

    Raises:
        RunError: the file cannot be read, or has another number of names.
    """
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip())
    except FileNotFoundError as error:
        raise RunError(f"There is no file of class names at {path}: give a text file, one name a line.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"The names of classes in {path} cannot be read: give a text file in UTF-8.") from error
    if len(names) != count:
        raise RunError(f"{path} has {len(names)} names, but the network has {count} classes: give one a line.")
    return names


def class_number(text: str, classes: Sequence[str]) -> int:
    """The class that a name (in any case) or else a number means.

    Raises:
        RunError: none, or several.
    """
    lower = [name.lower() for name in classes]
    found = [number for number, name in enumerate(lower) if name == text.lower()]
    if len(found) == 1:
        return found[0]
    if found:
        raise RunError(f"There are {len(found)} classes {text}: give a number, {' or '.join(map(str, found))}.")
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    near = [classes[lower.index(name)] for name in get_close_matches(text.lower(), lower, n=3)]
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise RunError(f"There is no class {text!r}{hint}: give one's name, or its number in 0..{len(classes) - 1}.")


# ------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Picture:
    """An image file, upright, as it is shown and as the network gets it."""

    path: Path
    shown: np.ndarray  #: [H,W,3] uint8, in its own aspect ratio
    image: Tensor  #: [3,h,w] in [-1,1]
    squeezed: bool  #: whether h x w has another aspect ratio

    @property
    def seen(self) -> str:
        """For the caption."""
        height, width = self.image.shape[1:]
        return f"{'squeezed to' if self.squeezed else 'seen whole at'} {width} x {height} px"


def read_picture(path: Path, subject: Subject) -> Picture:
    """The whole picture: its shorter side becomes the network's size; for a network that takes squares alone, both.

    Raises:
        DataError: it is missing or cannot be read as an image.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: name image files.")
    picture = Image.fromarray(read_image(path, upright=True))
    scale = subject.size / min(picture.size)
    width, height = (max(subject.size, round(side * scale)) for side in picture.size)
    squeezed = width != height and not subject.takes_any_shape
    size = (subject.size, subject.size) if squeezed else (width, height)
    seen = picture if picture.size == size else picture.resize(size, RESAMPLING[subject.interpolation])
    shown = picture.resize(sheets.shown_size(*picture.size), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(seen)).permute(2, 0, 1).float() / 255
    return Picture(path, np.asarray(shown), normalise(image), squeezed)


# ------------------------------------------------------------------------------------------------- explaining


@dataclass(frozen=True)
class Explained:
    """What the network says of a picture, and why."""

    picture: Picture
    label: int  #: the predicted class
    probability: float
    target: int  #: the class that the maps explain
    target_probability: float
    others: tuple[tuple[int, float], ...]  #: further labels of at least one half, where there may be several
    maps: dict[str, np.ndarray]  #: method -> [h,w] float32 >= 0, of the size of ``picture.image``


def explain_files(
    subject: Subject,
    files: Sequence[Path],
    out: Path,
    methods: Sequence[str],
    layer: str | None = None,
    target: str | None = None,
    save_maps: bool = False,
    console: Console | None = None,
) -> list[tuple[str, float]]:
    """Writes each picture with the maps of a class over it: into one file, or a file each into a folder.

    Args:
        out: a picture, whose ending says which kind; or a folder, without an ending.
        methods: keys of :data:`sib_lab.explaining.methods.METHODS`.
        layer: that class-activation maps look at; None: found.
        target: name or number of the class; None: the predicted one of each picture.
        save_maps: also write every map as .npy, float32 [h,w] as large as the network got the picture, not scaled.

    Returns:
        predicted class and its probability of each image.

    Raises:
        RunError, DataError, NetworkError: one sentence for the user.
    """
    into_one = _is_picture(out)
    if into_one and len(files) > MOST_IN_ONE:
        raise RunError(f"{len(files)} pictures are too many for one file: name a folder with --out, without an ending.")
    for path in files:
        if not path.exists():
            raise DataError(f"{path} is missing.")
    number = None if target is None else class_number(target, subject.classes)
    if layer is None and set(methods) & set(explain.CAMS):
        layer = subject.layer
    console = console or Console()
    names = _file_names(files)

    def draw(file: int, found: Explained) -> Image.Image:
        sheet = _sheet(found, subject)
        if not into_one:
            _write(out / f"{names[file]}.png", sheets.encoded(sheet, ".png"))
        if save_maps:
            for method, values in found.maps.items():
                _write((out.parent if into_one else out) / f"{names[file]}.{method}.npy", _npy(values))
        return sheet

    drawn, results = [], []
    with _threads(torch.get_num_threads() - (not explain.AVERAGES & set(methods))):
        for found, sheet in _explained(subject, files, methods, layer, number, draw):
            if into_one:
                drawn.append(sheet)
            results.append((subject.classes[found.label], found.probability))
            console.out(sheets.printable(_line(found, subject)), highlight=False)
    if into_one:
        _write(out, sheets.encoded(sheets.stacked(drawn), out.suffix.lower()))
    what = "Picture" if into_one else "Pictures"
    maps = f"; maps, .npy, float32 [h,w], beside {'it' if into_one else 'them'}" if save_maps else ""
    console.out(f"{what}: {sheets.printable(str(out))}{maps}", highlight=False)
    return results


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The network's: where it takes few passes a picture, the drawing needs a core of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_picture(out: Path) -> bool:
    """Whether ``out`` is one picture; otherwise it is a folder.

    Raises:
        RunError: it has an ending that is no picture's.
    """
    if out.suffix.lower() in FORMATS and not out.is_dir():
        return True
    if out.suffix and not out.is_dir():
        raise RunError(f"The picture {out} must end in one of {', '.join(FORMATS)}; a folder has no ending.")
    return False


def _file_names(files: Sequence[Path]) -> list[str]:
    """A name for what is written of each file: its own without the ending, with a number where that is taken."""
    names: list[str] = []
    for path in files:
        others = (path.stem, *(f"{path.stem}-{number}" for number in range(2, len(files) + 2)))
        names.append(next(name for name in others if name not in names))
    return names


def _explained(
    subject: Subject,
    files: Sequence[Path],
    methods: Sequence[str],
    layer: str | None,
    target: int | None,
    draw: Callable[[int, Explained], Image.Image],
) -> Iterator[tuple[Explained, Image.Image]]:
    """In the order of the files; pictures of one shape go through the network together.

    Args:
        draw: called with a file's place in ``files``, while the network goes on with others; its result is given, too.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), CHUNK):
            pictures = list(pool.map(lambda path: read_picture(path, subject), files[start : start + CHUNK]))
            shapes: dict[tuple[int, ...], list[int]] = {}
            for row, picture in enumerate(pictures):
                shapes.setdefault(tuple(picture.image.shape), []).append(row)
            found: dict[int, tuple[Explained, Future]] = {}
            for rows in shapes.values():
                some = _explained_batch(subject, [pictures[row] for row in rows], methods, layer, target)
                found |= {row: (one, pool.submit(draw, start + row, one)) for row, one in zip(rows, some, strict=True)}
            for row in range(len(pictures)):
                one, drawing = found[row]
                yield one, drawing.result()


def _explained_batch(
    subject: Subject, pictures: Sequence[Picture], methods: Sequence[str], layer: str | None, target: int | None
) -> list[Explained]:
    x = torch.stack([picture.image for picture in pictures]).contiguous(memory_format=torch.channels_last)
    targets = None if target is None else torch.full((len(x),), target)
    try:
        scores, maps = explain.explain_with_scores(subject.model, x, targets, methods, layer)
    except ValueError as error:  # of the layer: the rest is ours
        raise RunError(f"{error}.") from error
    probabilities = scores.float().sigmoid() if subject.multilabel else F.softmax(scores.float(), 1)
    labels = probabilities.argmax(1)
    targets = labels if targets is None else targets
    return [
        Explained(
            picture,
            int(labels[row]),
            float(probabilities[row, labels[row]]),
            int(targets[row]),
            float(probabilities[row, targets[row]]),
            _others(subject, probabilities[row], int(labels[row])),
            {method: values[row].float().numpy() for method, values in maps.items()},
        )
        for row, picture in enumerate(pictures)
    ]


def _others(subject: Subject, probabilities: Tensor, first: int) -> tuple[tuple[int, float], ...]:
    """The labels from one half on but the first, falling."""
    if not subject.multilabel:
        return ()
    order = probabilities.argsort(descending=True).tolist()
    return tuple((n, float(probabilities[n])) for n in order if n != first and probabilities[n] >= 0.5)


def _sheet(found: Explained, subject: Subject) -> Image.Image:
    caption = [found.picture.path.name, _decision(found, subject), found.picture.seen]
    maps = {explain.METHODS[method]: values for method, values in found.maps.items()}
    return sheets.sheet(found.picture.shown, caption, maps)


def _decision(found: Explained, subject: Subject) -> str:
    labels = ((found.label, found.probability), *found.others)
    told = ", ".join(f"{subject.classes[label]} ({100 * probability:.1f} %)" for label, probability in labels)
    if found.target == found.label and not found.others:
        return told
    return f"{told}; explained: {subject.classes[found.target]} ({100 * found.target_probability:.1f} %)"


def _line(found: Explained, subject: Subject) -> str:
    """What is printed of a picture."""
    line = f"{found.picture.path}: {_decision(found, subject)}"
    for told, is_so in (("zero everywhere", _is_empty), ("not finite", _is_broken)):
        if names := [explain.METHODS[method] for method, values in found.maps.items() if is_so(values)]:
            line += f"; {told}: {', '.join(names)}"
    return line


def _is_empty(values: np.ndarray) -> bool:
    return not values.any()


def _is_broken(values: np.ndarray) -> bool:
    return not np.isfinite(values).all()


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def _write(path: Path, content: bytes) -> None:
    write_whole(path, lambda file: file.write(content))
