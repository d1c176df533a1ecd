"""The command ``sib-lab``. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

import ctypes
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from .config import METHODS, TrainConfig
from .data import SETS, DataError

INSTALL = 'sib-lab needs {missing}, which is not installed: pip install "sib-ext[lab]"'

try:
    import typer

    from .train_command import EPILOG, config_from, train_command
except ModuleNotFoundError as error:
    raise SystemExit(INSTALL.format(missing=error.name)) from error

DEMO_OUT, COMPARE_OUT, EVIDENCE_OUT = Path("runs/demo"), Path("runs/compare"), Path("runs/evidence")

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
        from .compare import compare
        from .demo import check_resumable, demo_plan

        if resume:
            check_resumable(out)
        compare(demo_plan(seed, epochs, mask, preset), out, fresh=not resume)


app.command("train", epilog=EPILOG)(train_command)


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
    data: Annotated[str, typer.Option(help=f"Data set: {', '.join(SETS)}.")] = TrainConfig.data,
    root: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of this data set, NAME=VALUE; may be repeated.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images, px.", show_default="the data set's")] = None,
    agreement: Annotated[
        float, typer.Option(help="Share of training images on their class's background (digits, composite).")
    ] = TrainConfig.agreement,
    annotated: Annotated[
        float, typer.Option(help="Share of the training masks that the losses may see.")
    ] = TrainConfig.annotated,
    annotation: Annotated[
        Literal["masks", "boxes"], typer.Option(help="What they see of these: as they are, or their bounding boxes.")
    ] = "masks",
    augment: Annotated[
        bool | None, typer.Option("--augment/--no-augment", help="Random crops and flips.", show_default="the preset's")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Images per split, at most.")] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken files out.")] = False,
    network: Annotated[
        str,
        typer.Option(help="small_cnn, gap_cnn, resnet18, resnet50, densenet121, vit_b_32, module:function, timm:NAME."),
    ] = TrainConfig.network,
    weights: Annotated[Path | None, typer.Option(help="File of initial weights.", show_default="random")] = None,
    preset: Annotated[
        Literal["balanced", "paper"], typer.Option(help="Training recipe; the options below replace parts of it.")
    ] = "balanced",
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each training.", show_default="the preset's")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, show_default="the preset's")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest.", show_default="the preset's")] = None,
    strength: Annotated[
        list[str] | None, typer.Option(help="Weight of a method's main term, METHOD=VALUE; may be repeated.")
    ] = None,
    loss_option: Annotated[
        list[str] | None,
        typer.Option(help="An argument of a method's loss, METHOD:NAME=VALUE; may be repeated. See sib-lab train."),
    ] = None,
    masks: Annotated[
        Literal["auto", "given", "self-made"],
        typer.Option(help="S-IB's foreground; auto: given, except for sib-paper."),
    ] = "auto",
    precision: Annotated[str, typer.Option(help="32-true or bf16-mixed.")] = TrainConfig.precision,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = TrainConfig.device,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on the CPU.", show_default="torch's")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = TrainConfig.workers,
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
        from .compare import OF_MASKS, OF_NETWORK, Plan, compare

        own = ("strength", "loss_option")
        given = {name: value for name, value in context.params.items() if value is not None and name not in own}
        with as_sentence(ValueError):
            names = listed(methods)
            of_method = own_options(names, strength or [], loss_option or [])
            plan = Plan(
                {name: config_from(preset, data, network, given | of_method[name]) for name in names},
                tuple(range(first_seed, first_seed + seeds)),
                OF_MASKS + OF_NETWORK if measures == "all" else tuple(listed(measures)),
                images,
                layer,
            )
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

        from .evidence import evidence

        if scale == "auto":
            scale = "gpu" if torch.cuda.is_available() else "cpu"
        chosen = tuple(range(first_seed, first_seed + seeds))
        evidence(root, out, scale, chosen, threads, controls=controls, epochs=epochs, network=network)


@app.command("report", epilog="Example: sib-lab report runs/compare")
def report_command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison or a demo.")],
) -> None:
    """Write table and report of a comparison again, from its stored results, without training.

    Of an unfinished comparison it shows what there is.
    """
    with one_sentence(command_line(context)):
        from rich.console import Console

        from .compare import write_report

        write_report(folder, Console())


@app.command("explain", epilog="Example: sib-lab explain --checkpoint runs/compare/runs/sib-seed0 cat.jpg dog.jpg")
def explain_command(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Annotated[Path, typer.Option(help="Run folder, or a checkpoint file in one.")],
    layer: Annotated[
        str | None, typer.Option(help="Module that class-activation maps look at.", show_default="the last feature map")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture: .png, .jpg, .pdf, .svg or .webp.")] = Path("explanation.png"),
) -> None:
    """Show where a trained network sees the evidence for its decision: six explanation methods, one picture."""
    with one_sentence():
        from .explain_files import explain_files

        explain_files(checkpoint, images, out, layer)


# -------------------------------------------------------------------------------------------- going on, errors


def command_line(context: typer.Context, adding: str = "", leaving_out: str = "") -> str:
    """The command as it was given, with one flag more or less."""
    words = ["sib-lab", context.info_name or ""]
    for parameter in context.command.params:
        option = parameter.opts[0]
        source = context.get_parameter_source(parameter.name)
        if source is None or source.name != "COMMANDLINE" or option in (adding, leaving_out):
            continue
        values = context.params[parameter.name]
        for value in values if isinstance(values, (list, tuple)) else [values]:
            words += [
                word for word in (option, value) if word is not True and (option.startswith("-") or word is value)
            ]
    return shlex.join(str(word) for word in [*words, adding] if word != "")


@contextmanager
def one_sentence(go_on: str = "") -> Iterator[None]:
    """Every known failure as one sentence and exit code 1; Ctrl-C as exit code 130.

    Args:
        go_on: the command that goes on after Ctrl-C; empty where there is nothing to go on with.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        _stop_at_missing(error)
    except KeyboardInterrupt as error:
        kept = f" everything done so far is kept. Go on with: {go_on}" if go_on else ""
        typer.echo(f"Stopped{';' if kept else '.'}{kept}", err=True)
        raise typer.Exit(130) from error
    except OSError as error:  # a full disk, a folder that may not be written
        _stop(f"{error.filename or 'A file'} cannot be used: {error.strerror or error}.", error)
    except Exception as error:
        if not isinstance(error, _known_errors()):
            raise
        _stop(str(error), error)


def _known_errors() -> tuple[type[Exception], ...]:
    """The exceptions whose message is a sentence for the user, of the modules that are loaded."""
    names = {"runs": "RunError", "networks": "NetworkError", "results": "ReportError"}
    loaded = ((sys.modules.get(f"{__package__}.{module}"), name) for module, name in names.items())
    return DataError, *(getattr(module, name) for module, name in loaded if module is not None)


@contextmanager
def as_sentence(*kinds: type[Exception]) -> Iterator[None]:
    """Exceptions about options as one sentence and exit code 1."""
    try:
        yield
    except kinds as error:
        text = str(error)
        _stop(f"{text[0].upper()}{text[1:]}.", error)


def _stop(sentence: str, error: Exception) -> NoReturn:
    typer.echo(sentence, err=True)
    raise typer.Exit(1) from error


def _stop_at_missing(error: ModuleNotFoundError) -> NoReturn:
    """One sentence for a library that is not installed; an own module that is missing stays a bug."""
    if (error.name or "").startswith("sib_"):
        raise error
    raise SystemExit(INSTALL.format(missing=(error.name or "a library").partition(".")[0])) from error


# ------------------------------------------------------------------------------------------------ words to values


def listed(text: str) -> list[str]:
    """``a,b`` -> [a, b], each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def pairs(words: list[str], option: str = "--option", form: str = "NAME=VALUE") -> dict[str, str]:
    """NAME=VALUE words as a dict.

    Raises:
        DataError: a word without "=".
    """
    for word in words:
        if "=" not in word:
            raise DataError(f"{option} takes {form}, got {word!r}.")
    return dict(word.split("=", 1) for word in words)


def own_options(methods: list[str], strengths: list[str], loss_options: list[str]) -> dict[str, dict[str, Any]]:
    """What each method has for itself: METHOD=VALUE and METHOD:NAME=VALUE words, sorted by method.

    Raises:
        DataError, ValueError: another form, no number, or a method that is not in ``methods``.
    """
    found: dict[str, dict[str, Any]] = {method: {"method": method} for method in methods}
    for method, value in pairs(strengths, "--strength", "METHOD=VALUE").items():
        try:
            _of(found, method)["strength"] = float(value)
        except ValueError:
            raise ValueError(f"--strength {method} takes a number, got {value!r}") from None
    for name, value in pairs(loss_options, "--loss-option", "METHOD:NAME=VALUE").items():
        method, colon, option = name.partition(":")
        if not colon:
            raise ValueError(f"--loss-option takes METHOD:NAME=VALUE, got '{name}={value}'")
        _of(found, method).setdefault("loss_option", []).append(f"{option}={value}")
    return found


def _of(found: dict[str, dict[str, Any]], method: str) -> dict[str, Any]:
    if method not in found:
        raise DataError(f"An option was given to {method}, which is not compared.")
    return found[method]


def main() -> None:
    """Entry point of the console script."""
    # Read when torch loads: threads that wait without spinning cost little when idle and much less beside other jobs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    app(prog_name="sib-lab")


def keep_freed_memory() -> None:
    """Tells glibc, where it is the C library, not to hand freed pages back: the system fills every new one with zeros,
    a fifth of a training step's time on a CPU where other work runs (docs/engines.md)."""
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


if __name__ == "__main__":
    main()
