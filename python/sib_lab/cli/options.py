"""The options of a training, each declared once for every command that trains, and how they become a TrainConfig."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import typer

from ..data import SETS
from ..training.config import OPTIONS_OF, TrainConfig, recipe
from .common import MEAN_HELP, NETWORK_HELP, OWN_MEAN, WEIGHTS_HELP, is_given, numbers, pairs

PRESETS = "the preset's"
#: Fields of a TrainConfig that belong to one method or one run, not to all of a comparison.
OF_A_RUN = ("method", "seed", "strength", "loss_options", "match")
#: What a network that is measured as it is, with 0 epochs, has no use for: names of options and fields.
OF_TRAINING = ("annotated", "annotation", "augment", "augmentation", "masks", "class_weights", "label_smoothing")
OF_TRAINING += ("batch_size", "accumulate", "learning_rate", "weight_decay", "schedule", "warm_up", "clip_norm", "ema")
OF_TRAINING += ("patience", "devices", "save_minutes", "save_steps", "wandb")

# Where nothing is given, None: as the file of --config has it, or else the preset.
Preset = Annotated[
    Literal["balanced", "fine_tuning", "paper"],
    typer.Option(
        help="Training recipe; fine_tuning: for a network that starts from --weights; paper: the published one. Any "
        "option below replaces a part of it."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="YAML file of options, such as a run's run.yaml; those given here replace its.", show_default="none"
    ),
]

# data
Data = Annotated[str | None, typer.Option(help=f"Data set: {', '.join(SETS)}.", show_default=TrainConfig.data)]
Root = Annotated[Path | None, typer.Option(help="Folder of the data set.", show_default=False)]
DataOption = Annotated[list[str] | None, typer.Option(help="An option of this data set, NAME=VALUE; may be repeated.")]
Size = Annotated[int | None, typer.Option(help="Side of the images, px.", show_default="the data set's")]
Agreement = Annotated[
    float | None,
    typer.Option(help="Share of training images on their class's background (digits, composite).", show_default=".95"),
]
AnnotatedShare = Annotated[
    float | None, typer.Option(help="Share of the training masks that the losses may see.", show_default="1")
]
Annotation = Annotated[
    str | None, typer.Option(help="What they see of them: masks, or boxes: their bounding boxes.", show_default="masks")
]
Augment = Annotated[
    bool | None, typer.Option("--augment/--no-augment", help="Random crops and flips.", show_default=PRESETS)
]
Augmentation = Annotated[
    str | None,
    typer.Option(
        help="Switches augmentation on: crops (and flips), or trivial: these, then TrivialAugment.",
        show_default="crops",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Images per split, at most.", show_default="all")]
SkipBroken = Annotated[
    bool | None, typer.Option("--skip-broken", help="Leave broken files out and name them.", show_default="stop")
]

# network
Network = Annotated[str | None, typer.Option(help=NETWORK_HELP, show_default=TrainConfig.network)]
Weights = Annotated[Path | None, typer.Option(help=WEIGHTS_HELP, show_default="random")]
Mean = Annotated[str | None, typer.Option(help=MEAN_HELP, show_default=OWN_MEAN)]
Std = Annotated[str | None, typer.Option(help="Likewise, its standard deviation.", show_default=OWN_MEAN)]

# loss
Masks = Annotated[
    str | None,
    typer.Option(
        help="S-IB's foreground: given, self-made, or auto: given, except for sib-paper.", show_default="auto"
    ),
]
ClassWeights = Annotated[
    str | None,
    typer.Option(
        help="Of the cross-entropy: balanced, or numbers in the order of the classes: A,B,C or a file of them.",
        show_default="all 1",
    ),
]
LabelSmoothing = Annotated[float | None, typer.Option(help="Of the cross-entropy, in [0, 1).", show_default="0")]

# optimisation
BatchSize = Annotated[int | None, typer.Option(help="Over all devices.", show_default=PRESETS)]
Accumulate = Annotated[int | None, typer.Option(help="Batches in an optimiser step.", show_default="1")]
LearningRate = Annotated[float | None, typer.Option(help="The highest.", show_default=PRESETS)]
WeightDecay = Annotated[float | None, typer.Option(help="Of AdamW.", show_default="1e-4")]
Schedule = Annotated[
    str | None,
    typer.Option(
        help="one-cycle (warm-up, then a cosine to 0), step (x 0.1 every 30 epochs) or constant.",
        show_default=PRESETS,
    ),
]
WarmUp = Annotated[float | None, typer.Option(help="Share of the steps over which one-cycle rises.", show_default=".1")]
ClipNorm = Annotated[float | None, typer.Option(help="Greatest norm of the gradient.", show_default="any")]
Ema = Annotated[
    float | None,
    typer.Option(help="Evaluate and keep a moving average of the weights with this decay.", show_default="none"),
]
Patience = Annotated[
    int | None,
    typer.Option(help="End after so many epochs without a better validation accuracy.", show_default="none"),
]

# machine
Precision = Annotated[str | None, typer.Option(help="32-true or bf16-mixed.", show_default="32-true")]
Device = Annotated[str | None, typer.Option(help="auto (a GPU if there), cpu or cuda.", show_default="auto")]
Deterministic = Annotated[
    bool | None,
    typer.Option("--deterministic/--fast", help="Repeatable kernels on a GPU, or faster ones.", show_default=False),
]
Threads = Annotated[int | None, typer.Option(help="Of torch on the CPU.", show_default="torch's")]
Workers = Annotated[int | None, typer.Option(help="Processes that load images.", show_default="0")]
Devices = Annotated[
    int | None, typer.Option(help="Processes to train in; or: torchrun -m sib_lab.cli train ...", show_default="1")
]
SaveMinutes = Annotated[float | None, typer.Option(help="Between two checkpoints within an epoch.", show_default="5")]
SaveSteps = Annotated[int | None, typer.Option(help="The same in steps; 0: by time alone.", show_default="0")]
Wandb = Annotated[str | None, typer.Option(help="Project of Weights & Biases for the curves.", show_default="none")]


# ------------------------------------------------------------------------------------------ to a TrainConfig


def options_of(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a file, without those that belong to another method or data set than the ones given.

    Raises:
        ValueError: the file cannot be read, or has an option that there is not.
    """
    from ..training.files import read_options

    found = read_options(path)
    for name, belonging in (("method", ("strength", "match", "loss_options")), ("data", ("root", "data_options"))):
        if given.get(name, found.get(name)) != found.get(name):
            for other in belonging:
                if other != "loss_options" or given["method"] not in OPTIONS_OF.get(found.get("method"), ()):
                    found.pop(other, None)
    return found


def shared_options(path: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The options in a file that all methods of a comparison can have, and a sentence on the others; empty without any.

    Args:
        given: what stands on the command line; with ``epochs`` 0 here, or else in the file, nothing of a training is
            taken but its seed, from which the data's splits follow.

    Raises:
        ValueError: the file cannot be read, or has an option that there is not.
    """
    found = options_of(path, given)
    own = {name: value for name in OF_A_RUN if (value := found.pop(name, None)) not in (None, [], {})}
    if given.get("epochs", found.get("epochs")) == 0:
        kept = {"seed": own["seed"]} if "seed" in own else {}
        return kept | {name: value for name, value in found.items() if name not in OF_TRAINING}, ""
    if not own:
        return found, ""
    left = ", ".join(name if name == "match" else f"{name} = {value}" for name, value in own.items())
    return found, (
        f"Not taken from {path}, because it belongs to one method or one run: {left}. "
        "Instead there are --methods, --first-seed, --strength and --loss-option"
        f"{', and --preset ' + own['loss_options']['preset'] if 'preset' in own.get('loss_options', {}) else ''}."
    )


def check_nothing_of_training(context: typer.Context) -> None:
    """With 0 epochs:

    Raises:
        ValueError: an option that only a training has was given on the command line.
    """
    for name in ("methods", "seeds", "strength", "loss_option", *OF_TRAINING):
        if is_given(context, name):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} has no meaning with --epochs 0, which trains nothing: leave it out")


def config_from(preset: str, given: Mapping[str, Any], base: Mapping[str, Any] = MappingProxyType({})) -> TrainConfig:
    """The preset with what was given on the command line.

    Args:
        base: options that replace the preset's, and that those given replace.

    Raises:
        ValueError: an option that is unknown or out of range.
        RunError: ``match`` is no run, or one without a VJP.
    """
    data, network = (given.get(name, base.get(name, getattr(TrainConfig, name))) for name in ("data", "network"))
    names = {f.name for f in fields(TrainConfig)} - {"data", "network", "match", "class_weights"}
    changes = {name: str(value) if isinstance(value, Path) else value for name, value in given.items() if name in names}
    changes |= {name: numbers(changes[name], f"--{name}") for name in ("mean", "std") if name in changes}
    changes = {name: value for name, value in base.items() if name not in ("data", "network")} | changes
    of_preset = recipe(preset, data, network, **({"method": changes["method"]} if "method" in changes else {}))
    if given.get("option"):
        changes["data_options"] = changes.get("data_options", {}) | pairs(given["option"])
    if given.get("loss_option"):
        words = pairs(given["loss_option"])
        old = changes.get("loss_options", of_preset.loss_options)
        changes["loss_options"] = dict(old) | {name: parsed(value) for name, value in words.items()}
    if given.get("match"):
        changes["match"] = matched(given["match"])
    if given.get("class_weights"):
        changes["class_weights"] = weights_of_classes(given["class_weights"])
    if "augmentation" in given:
        changes["augment"] = given.get("augment", True)
    elif given.get("augment") is False:
        changes.pop("augmentation", None)  # the file's kind of it has no use without it
    return recipe(preset, data, network, **changes)


def weights_of_classes(text: str) -> str | tuple[float, ...]:
    """``balanced``, numbers with commas between them, or those in a file, with commas or blanks between them.

    Raises:
        ValueError: no numbers, and no file of numbers.
    """
    if text == "balanced":
        return text
    try:
        try:
            return tuple(float(word) for word in text.split(","))
        except ValueError:
            return tuple(float(word) for word in Path(text).read_text().replace(",", " ").split())
    except (OSError, ValueError) as error:
        raise ValueError(f"class_weights takes balanced, A,B,C or a file of numbers, got {text!r}") from error


def parsed(text: str) -> Any:
    """``0.1`` and ``true`` as JSON would read them, anything else as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def matched(folder: Path) -> tuple[float, ...]:
    """The VJP variance of every epoch of a run.

    Raises:
        RunError: no run, or one whose method takes no VJP.
    """
    from ..training.runs import LAST, RunError, load_state, read_record

    read_record(folder)  # says where there is no run at all
    epochs = load_state(folder / LAST)["history"]["epochs"]
    variances = tuple(line["vjp_variance"] for line in epochs if "vjp_variance" in line)
    if not variances:
        raise RunError(f"The run in {folder} has no VJP variance to match: take one of method sib or sib-paper.")
    return variances
