"""``sib-lab train``: from the command line to a :class:`sib_lab.training.config.TrainConfig`; light to import."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..data import QUALITIES
from ..training.config import METHODS
from . import options
from .common import as_sentence, command_line, one_sentence

if TYPE_CHECKING:
    from ..training.runs import Run

EPILOG = "Example: sib-lab train --data folder --root photos --network resnet18 --method sib --out runs/photos"
METHOD_HELP = "Training loss. " + "; ".join(f"{name}: {sentence}" for name, sentence in METHODS.items()) + "."


def train_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Run folder. A run that was stopped there goes on; a finished one stays.")],
    method: Annotated[str | None, typer.Option(help=METHOD_HELP, show_default=options.PRESETS)] = None,
    preset: options.Preset = "balanced",
    config: options.Config = None,
    data: options.Data = None,
    root: options.Root = None,
    option: options.DataOption = None,
    size: options.Size = None,
    agreement: options.Agreement = None,
    annotated: options.AnnotatedShare = None,
    annotation: options.Annotation = None,
    augment: options.Augment = None,
    augmentation: options.Augmentation = None,
    limit: options.Limit = None,
    skip_broken: options.SkipBroken = None,
    network: options.Network = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    strength: Annotated[
        float | None, typer.Option(help="Weight of the method's main term, >= 0.", show_default="the method's")
    ] = None,
    masks: options.Masks = None,
    match: Annotated[
        Path | None,
        typer.Option(help="gradient-penalty: the run folder whose VJP variance it follows.", show_default="none"),
    ] = None,
    loss_option: Annotated[
        list[str] | None,
        typer.Option(
            help="An argument of the method's loss, NAME=VALUE; may be repeated. sib, sib-paper, centre-mask: those of "
            "sib_ext.SpatialIBLoss; centre-mask: centre_area; gradient-penalty: seed; "
            "energy-loss, l1-loss, rrr-loss, ppce-loss: attribution (gradcam, input_x_gradient), layer."
        ),
    ] = None,
    class_weights: options.ClassWeights = None,
    label_smoothing: options.LabelSmoothing = None,
    seed: Annotated[int | None, typer.Option(help="Of data, weights and batches.", show_default="0")] = None,
    epochs: Annotated[int | None, typer.Option(help="Times every image is seen.", show_default=options.PRESETS)] = None,
    batch_size: options.BatchSize = None,
    accumulate: options.Accumulate = None,
    learning_rate: options.LearningRate = None,
    weight_decay: options.WeightDecay = None,
    schedule: options.Schedule = None,
    warm_up: options.WarmUp = None,
    clip_norm: options.ClipNorm = None,
    ema: options.Ema = None,
    patience: options.Patience = None,
    precision: options.Precision = None,
    device: options.Device = None,
    devices: options.Devices = None,
    deterministic: options.Deterministic = None,
    threads: options.Threads = None,
    workers: options.Workers = None,
    save_minutes: options.SaveMinutes = None,
    save_steps: options.SaveSteps = None,
    wandb: options.Wandb = None,
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
        base = {} if config is None else options.options_of(config, given)
        chosen = options.config_from(preset, given, base)
        from ..training.train import train

        print_summary(train(chosen, out, resume=not fresh, quiet=quiet))


def print_summary(run: "Run") -> None:
    """What came out, in the first process of distributed training."""
    import os

    if os.environ.get("RANK", "0") != "0":
        return
    line = next(line for line in run.history if line["epoch"] == run.epoch)
    measured = [name.partition("_") for name in line if name.partition("_")[0] in QUALITIES]
    values = [f"{split} {line[f'{quality}_{split}']:.3f}" for quality, _, split in measured]
    name = QUALITIES[measured[0][0]]
    typer.echo(f"Best on validation: epoch {run.epoch} of {run.config.epochs}, {name} {', '.join(values)}.")
    typer.echo(f"{run.seconds_per_step['median']:.3f} seconds a step. Everything is in {run.folder}.")
    typer.echo(f"See where it looks: sib-lab explain --checkpoint {run.folder} IMAGE.jpg")
