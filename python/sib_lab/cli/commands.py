"""The command ``sib-lab``. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..training.config import METHODS, TrainConfig
from . import options
from .check import EPILOG as CHECK_EPILOG
from .check import check_command
from .common import (
    as_sentence,
    command_line,
    is_given,
    listed,
    one_sentence,
    own_options,
)
from .explain import EPILOG as EXPLAIN_EPILOG
from .explain import explain_command
from .train import EPILOG, train_command

DEMO_OUT, COMPARE_OUT, EVIDENCE_OUT = Path("runs/demo"), Path("runs/compare"), Path("runs/evidence")
PHOTOS_OUT = Path("runs/evidence-photos")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def sib_lab() -> None:
    """The workbench of sib_ext: what Spatial Information Bottleneck (S-IB) training does to explanations."""


@app.command(epilog="Example: sib-lab demo --seed 1 --out runs/seed1")
def demo(
    context: typer.Context,
    seed: Annotated[int, typer.Option(min=0, help="Of data, weights and batches.")] = TrainConfig.seed,
    epochs: Annotated[int, typer.Option(min=1, help="Of each of the two trainings.")] = TrainConfig.epochs,
    out: Annotated[Path, typer.Option(help="Folder for the report, the pictures and the runs.")] = DEMO_OUT,
    mask: Annotated[
        Literal["given", "density"],
        typer.Option(help="S-IB foreground: the exact strokes, or made from the network's own gradient."),
    ] = "given",
    preset: Annotated[Literal["balanced", "paper"], typer.Option(help="Constants of the S-IB loss.")] = "balanced",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in the folder.")] = False,
) -> None:
    """Train one small CNN twice, with cross-entropy and with S-IB, and compare accuracy and explanations.

    Handwritten digits stand on photographs that give the label away in 95 % of training, and not in the test.

    A few minutes on two cores, no network. Ctrl-C keeps what was done; --resume goes on.
    """
    with one_sentence(command_line(context, adding="--resume")):
        from ..experiments.compare import compare
        from ..experiments.demo import check_resumable, demo_plan

        if resume:
            check_resumable(out)
        compare(demo_plan(seed, epochs, mask, preset), out, fresh=not resume)


app.command("train", epilog=EPILOG)(train_command)
app.command("check", epilog=CHECK_EPILOG)(check_command)


@app.command(
    "compare",
    epilog="Example: sib-lab compare --data folder --root photos --network resnet18 --methods ce,sib --seeds 3",
)
def compare_command(
    context: typer.Context,
    methods: Annotated[
        str,
        typer.Option(help=f"Training losses, the first is what the others are compared with: {', '.join(METHODS)}."),
    ] = "ce,sib",
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings of each.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The seeds count up from here.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report, the numbers and the runs.")] = COMPARE_OUT,
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
        list[str] | None, typer.Option(help="Weight of a method's main term, METHOD=VALUE; may be repeated.")
    ] = None,
    loss_option: Annotated[
        list[str] | None,
        typer.Option(help="An argument of a method's loss, METHOD:NAME=VALUE; may be repeated. See sib-lab train."),
    ] = None,
    masks: options.Masks = None,
    class_weights: options.ClassWeights = None,
    label_smoothing: options.LabelSmoothing = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of each training; 0: measure the network as its --weights are.", show_default=options.PRESETS
        ),
    ] = None,
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
    images: Annotated[int, typer.Option(min=1, help="Test images that are explained, at most.")] = 500,
    measures: Annotated[
        str, typer.Option(help="Of explanations: epg, pointing_game, iou, ehr; deletion, insertion (slow); or all.")
    ] = "epg,pointing_game,iou,ehr",
    layer: Annotated[
        str | None, typer.Option(help="Module that class-activation maps look at.", show_default="the last feature map")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew and remove these runs first.")] = False,
) -> None:
    """Train with several losses and seeds, explain and measure every network, and write one report.

    Whatever is finished in the folder is kept and used: the same command goes on after Ctrl-C, and another method, seed
    or measure adds to it. A run that `sib-lab train` made at OUT/runs/METHOD-seedK is taken as it is.
    """
    with one_sentence(command_line(context, leaving_out="--fresh")):
        from ..experiments.compare import compare
        from ..experiments.plan import OF_MASKS, OF_NETWORK, Plan

        own = ("strength", "loss_option")
        given = {name: value for name, value in context.params.items() if value is not None and name not in own}
        chosen = OF_MASKS + OF_NETWORK if measures == "all" else tuple(listed(measures))
        with as_sentence(ValueError):
            base, left_out = ({}, "") if config is None else options.shared_options(config, given)
            if given.get("epochs", base.get("epochs")) == 0:
                options.check_nothing_of_training(context)
                seed = first_seed if is_given(context, "first_seed") else base.get("seed", first_seed)
                as_it_is = options.config_from(preset, given | {"method": "ce", "seed": seed}, base)
                plan = Plan.as_it_is(as_it_is, chosen, images, layer)
            else:
                names = listed(methods)
                of_method = own_options(names, strength or [], loss_option or [])
                configs = {name: options.config_from(preset, given | of_method[name], base) for name in names}
                plan = Plan(configs, tuple(range(first_seed, first_seed + seeds)), chosen, images, layer)
        if left_out:
            typer.echo(left_out)
        compare(plan, out, fresh)


@app.command("evidence", epilog="Example: sib-lab evidence photographs --scale small")
def evidence_command(
    context: typer.Context,
    root: Annotated[Path, typer.Argument(help="Folder with eth80_128.zip and backgrounds/<group>/.")],
    scale: Annotated[
        Literal["auto", "small", "cpu", "gpu"],
        typer.Option(help="small: minutes; cpu: 64 px; gpu: ResNet-18 at 128 px; auto: gpu where torch sees one."),
    ] = "auto",
    seeds: Annotated[int, typer.Option(min=2, help="How many trainings of each.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The seeds count up from here.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the reports, the numbers and the runs.")] = EVIDENCE_OUT,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on the CPU.", show_default="torch's")] = None,
    controls: Annotated[
        bool, typer.Option(help="Train the controls, too; without them there is time for many seeds.")
    ] = True,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each training.", show_default="the scale's")] = None,
    network: Annotated[str | None, typer.Option(help="Its name.", show_default="the scale's")] = None,
) -> None:
    """Compare S-IB with its controls in four situations: given masks, boxes, 10 % annotated, none.

    ETH-80 objects stand on photographs that give the label away in 95 % of training. Whatever is finished in the folder
    is kept: the same command goes on after Ctrl-C.
    """
    with one_sentence(command_line(context)):
        import torch

        from ..experiments.evidence import evidence

        if scale == "auto":
            scale = "gpu" if torch.cuda.is_available() else "cpu"
        chosen = tuple(range(first_seed, first_seed + seeds))
        evidence(root, out, scale, chosen, threads, controls=controls, epochs=epochs, network=network)


@app.command("evidence-photos", epilog="Example: sib-lab evidence-photos photos --sets duts30,pets3 --jobs 2")
def evidence_photos_command(
    context: typer.Context,
    root: Annotated[Path, typer.Argument(help="Folder with the sets, each a .zip or a folder.")],
    sets: Annotated[
        str, typer.Option(help="Some of duts30, cub20, pets3, waterbirds, voc2200.")
    ] = "duts30,cub20,pets3,waterbirds,voc2200",
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings of each.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The seeds count up from here.")] = 0,
    scale: Annotated[
        Literal["small", "cpu"], typer.Option(help="small: a try in minutes; cpu: EfficientNet-Lite0 at 128 px.")
    ] = "cpu",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each.", show_default="as there are cores")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each training.", show_default="the set's")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the reports, the numbers and the runs.")] = PHOTOS_OUT,
    peers: Annotated[
        bool, typer.Option(help="Train the other losses that use masks, too; --no-peers: S-IB and its variants alone.")
    ] = True,
    curves: Annotated[
        bool,
        typer.Option(help="Measure what strengths do first; --no-curves: compare, peers at strengths chosen earlier."),
    ] = True,
) -> None:
    """Compare S-IB with its peers on photographs, fine-tuning a network that knows ImageNet.

    The peers' strengths are chosen on images held out of training; then every loss is trained with several seeds and
    measured on the tests. Whatever is finished in the folder is kept: the same command goes on after Ctrl-C.
    """
    with one_sentence(command_line(context)):
        from ..experiments.photographs import evidence_photos

        chosen = tuple(range(first_seed, first_seed + seeds))
        with as_sentence(ValueError):
            processes = jobs or os.cpu_count() or 1
            evidence_photos(root, out, scale, chosen, processes, tuple(listed(sets)), peers, epochs, curves)


@app.command("report", epilog="Example: sib-lab report runs/compare")
def report_command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison or a demo.")],
) -> None:
    """Write table and report of a comparison again, from its stored results, without training.

    Of an unfinished comparison it shows what there is.
    """
    with one_sentence(command_line(context)):
        from ..console import plain_console
        from ..experiments.compare import write_report

        write_report(folder, plain_console())


app.command("explain", epilog=EXPLAIN_EPILOG)(explain_command)
