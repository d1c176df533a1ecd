"""``sib-lab train``: from the command line to a :class:`sib_lab.training.config.TrainConfig`; light to import."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..data import SETS
from ..training.config import METHODS, TrainConfig, recipe
from .common import (
    MEAN_HELP,
    NETWORK_HELP,
    OWN_MEAN,
    WEIGHTS_HELP,
    as_sentence,
    command_line,
    numbers,
    one_sentence,
    pairs,
)

if TYPE_CHECKING:
    from ..training.runs import Run

EPILOG = "Example: sib-lab train --data folder --root photos --network resnet18 --method sib --out runs/photos"
METHOD_HELP = "Training loss. " + "; ".join(f"{name}: {sentence}" for name, sentence in METHODS.items()) + "."
PRESETS = "the preset's"


def train_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Run folder. A run that was stopped there goes on; a finished one stays.")],
    method: Annotated[str | None, typer.Option(help=METHOD_HELP, show_default=PRESETS)] = None,
    preset: Annotated[
        Literal["balanced", "paper"],
        typer.Option(help="Training recipe; paper: the published one. Any option below replaces a part of it."),
    ] = "balanced",
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of options, such as a run's run.yaml; those given here replace its.", show_default="none"
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help=f"Data set: {', '.join(SETS)}.", show_default=TrainConfig.data)
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the data set.", show_default=False)] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of this data set, NAME=VALUE; may be repeated.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images, px.", show_default="the data set's")] = None,
    agreement: Annotated[
        float | None,
        typer.Option(help="Share of training images on their class's background.", show_default=".95"),
    ] = None,
    annotated: Annotated[
        float | None, typer.Option(help="Share of the training masks that the loss may see.", show_default="1")
    ] = None,
    annotation: Annotated[
        str | None,
        typer.Option(help="What it sees of them: masks, or boxes: their bounding boxes.", show_default="masks"),
    ] = None,
    augment: Annotated[
        bool | None, typer.Option("--augment/--no-augment", help="Random crops and flips.", show_default=PRESETS)
    ] = None,
    augmentation: Annotated[
        str | None,
        typer.Option(
            help="Switches augmentation on: crops (and flips), or trivial: these, then TrivialAugment.",
            show_default="crops",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Images per split, at most.", show_default="all")] = None,
    skip_broken: Annotated[
        bool | None, typer.Option("--skip-broken", help="Leave broken files out and name them.", show_default="stop")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help=NETWORK_HELP, show_default=TrainConfig.network),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help=WEIGHTS_HELP, show_default="random")] = None,
    mean: Annotated[str | None, typer.Option(help=MEAN_HELP, show_default=OWN_MEAN)] = None,
    std: Annotated[str | None, typer.Option(help="Likewise, its standard deviation.", show_default=OWN_MEAN)] = None,
    strength: Annotated[
        float | None, typer.Option(help="Weight of the method's main term, >= 0.", show_default="the method's")
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="S-IB's foreground: given, self-made, or auto: given, except for sib-paper.", show_default="auto"
        ),
    ] = None,
    match: Annotated[
        Path | None,
        typer.Option(help="gradient-penalty: the run folder whose VJP variance it follows.", show_default="none"),
    ] = None,
    loss_option: Annotated[
        list[str] | None,
        typer.Option(
            help="An argument of the method's loss, NAME=VALUE; may be repeated. sib, sib-paper, centre-mask: those of "
            "sib_ext.SpatialIBLoss; centre-mask: centre_area; gradient-penalty: seed; "
            "energy-loss: attribution (gradcam, input_x_gradient), layer."
        ),
    ] = None,
    class_weights: Annotated[
        str | None,
        typer.Option(
            help="Of the cross-entropy: balanced, or numbers in the order of the classes: A,B,C or a file of them.",
            show_default="all 1",
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Of the cross-entropy, in [0, 1).", show_default="0")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of data, weights and batches.", show_default="0")] = None,
    epochs: Annotated[int | None, typer.Option(help="Times every image is seen.", show_default=PRESETS)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Over all devices.", show_default=PRESETS)] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches in an optimiser step.", show_default="1")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest.", show_default=PRESETS)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.", show_default="1e-4")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="one-cycle (warm-up, then a cosine to 0), step (x 0.1 every 30 epochs) or constant.",
            show_default=PRESETS,
        ),
    ] = None,
    warm_up: Annotated[
        float | None, typer.Option(help="Share of the steps over which one-cycle rises.", show_default=".1")
    ] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Greatest norm of the gradient.", show_default="any")] = None,
    ema: Annotated[
        float | None,
        typer.Option(help="Evaluate and keep a moving average of the weights with this decay.", show_default="none"),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="End after so many epochs without a better validation accuracy.", show_default="none"),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="32-true or bf16-mixed.", show_default="32-true")] = None,
    device: Annotated[str | None, typer.Option(help="auto (a GPU if there), cpu or cuda.", show_default="auto")] = None,
    devices: Annotated[
        int | None, typer.Option(help="Processes to train in; or: torchrun -m sib_lab.cli train ...", show_default="1")
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic/--fast", help="Repeatable kernels on a GPU, or faster ones.", show_default=False),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch on the CPU.", show_default="torch's")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that load images.", show_default="0")] = None,
    save_minutes: Annotated[
        float | None, typer.Option(help="Between two checkpoints within an epoch.", show_default="5")
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="The same in steps; 0: by time alone.", show_default="0")
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(help="Project of Weights & Biases for the curves.", show_default="none")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew over what the folder holds.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train one network with one loss, and keep everything that comes out in a run folder.

    In it: best.pt (best on validation), last.pt, metrics.csv, steps.csv, tensorboard/, config.json (options, versions),
    run.yaml (--config run.yaml repeats the run).

    Ctrl-C finishes the batch and keeps everything; the same command goes on, also after a crash.

    A run that was stopped ends with the numbers of one that never was.
    """
    with one_sentence(command_line(context, leaving_out="--fresh")), as_sentence(ValueError):
        given = {name: value for name, value in context.params.items() if value is not None}
        base = {} if config is None else options_of(config, given)
        chosen = config_from(
            preset,
            data or base.get("data", TrainConfig.data),
            network or base.get("network", TrainConfig.network),
            given,
            base,
        )
        from ..training.train import train

        print_summary(train(chosen, out, resume=not fresh, quiet=quiet))


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
                found.pop(other, None)
    return found


def config_from(
    preset: str, data: str, network: str, given: Mapping[str, Any], base: Mapping[str, Any] = MappingProxyType({})
) -> TrainConfig:
    """The preset with what was given on the command line.

    Args:
        base: options that replace the preset's, and that those given replace.

    Raises:
        ValueError: an option that is unknown or out of range.
        RunError: ``match`` is no run, or one without a VJP.
    """
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
    if given.get("augmentation"):
        changes.setdefault("augment", True)
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


def print_summary(run: "Run") -> None:
    """What came out, in the first process of distributed training."""
    import os

    if os.environ.get("RANK", "0") != "0":
        return
    line = next(line for line in run.history if line["epoch"] == run.epoch)
    accuracies = [
        f"{name.removeprefix('accuracy_')} {value:.3f}" for name, value in line.items() if name.startswith("accuracy_")
    ]
    typer.echo(f"Best on validation: epoch {run.epoch} of {run.config.epochs}, accuracy {', '.join(accuracies)}.")
    typer.echo(f"{run.seconds_per_step['median']:.3f} seconds a step. Everything is in {run.folder}.")
    typer.echo(f"See where it looks: sib-lab explain --checkpoint {run.folder} IMAGE.jpg")
