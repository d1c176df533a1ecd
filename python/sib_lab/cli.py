"""The command ``sib-lab``. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from .config import CHECKPOINT, Config

OUT = Path("runs/demo")
INSTALL = 'sib-lab needs {missing}, which is not installed: pip install "sib-ext[lab]"'

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(INSTALL.format(missing=error.name)) from error

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def sib_lab() -> None:
    """The workbench of sib_ext: what Spatial Information Bottleneck (S-IB) training does to explanations."""


@app.command(epilog="Example: sib-lab demo --seed 1 --out runs/seed1")
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Of data, weights and batches.")] = Config.seed,
    epochs: Annotated[int, typer.Option(min=1, help="Of each of the two trainings.")] = Config.epochs,
    out: Annotated[Path, typer.Option(help="Folder for the report, the pictures and the checkpoint.")] = OUT,
    mask: Annotated[
        Literal["given", "density"],
        typer.Option(help="S-IB foreground: the exact strokes, or made from the network's own gradient."),
    ] = Config.mask,
    preset: Annotated[Literal["balanced", "paper"], typer.Option(help="Constants of the S-IB loss.")] = Config.preset,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
) -> None:
    """Train one small CNN twice, with cross-entropy and with S-IB, and compare accuracy and explanations.

    Handwritten digits stand on photographs that give the label away in 95 % of training, and not in the test.

    A few minutes on two cores, no network. Ctrl-C keeps what was done; --resume goes on.
    """
    try:
        from .demo import run_demo
        from .train import CheckpointError
    except ModuleNotFoundError as error:
        _stop_at_missing(error)
    config = Config(seed=seed, epochs=epochs, mask=mask, preset=preset)
    try:
        run_demo(config, out, resume)
    except CheckpointError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        if (out / CHECKPOINT).exists():
            typer.echo(f"Stopped; everything done so far is kept. Go on with: {_resume_command(config, out)}", err=True)
        raise typer.Exit(130) from error


def _resume_command(config: Config, out: Path) -> str:
    """The command line that goes on with a run."""
    words = ["sib-lab", "demo", "--resume"]
    if out != OUT:
        words += ["--out", str(out)]
    for option in ("seed", "epochs", "mask", "preset"):
        if getattr(config, option) != getattr(Config, option):
            words += [f"--{option}", str(getattr(config, option))]
    return shlex.join(words)


def _stop_at_missing(error: ModuleNotFoundError) -> NoReturn:
    """One sentence for a library that is not installed; an own module that is missing stays a bug."""
    if (error.name or "").startswith("sib_"):
        raise error
    raise SystemExit(INSTALL.format(missing=error.name)) from error


def main() -> None:
    """Entry point of the console script."""
    # Read when torch loads: threads that wait without spinning cost little when idle and much less beside other jobs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="sib-lab")


if __name__ == "__main__":
    main()
