"""``sib-lab explain``: from the command line to :mod:`sib_lab.experiments.explain_files`; light to import."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..data import DataError
from .common import MEAN_HELP, NETWORK_HELP, OWN_MEAN, WEIGHTS_HELP, listed, numbers, one_sentence

EPILOG = "Example: sib-lab explain --checkpoint runs/compare/runs/sib-seed0 cat.jpg dog.jpg"
QUICK = "gradcam,layercam,input_x_gradient,vjp"


def explain_command(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Run folder, or a checkpoint file in one.", show_default=False)
    ] = None,
    network: Annotated[str | None, typer.Option(help=f"Instead, with --weights: {NETWORK_HELP}")] = None,
    weights: Annotated[Path | None, typer.Option(help=WEIGHTS_HELP, show_default=False)] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="File with their names, one a line.", show_default="ImageNet's for 1000, else numbers"),
    ] = None,
    mean: Annotated[str | None, typer.Option(help=MEAN_HELP, show_default=OWN_MEAN)] = None,
    std: Annotated[str | None, typer.Option(help="Likewise, its standard deviation.", show_default=OWN_MEAN)] = None,
    target: Annotated[
        str | None, typer.Option(help="Class to explain, its name or number.", show_default="the predicted one")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="gradcam, gradcam_pp, layercam, input_x_gradient, vjp; slow: integrated_gradients, smoothgrad; or all."
        ),
    ] = QUICK,
    layer: Annotated[
        str | None, typer.Option(help="Module that class-activation maps look at.", show_default="the last feature map")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="One picture: .png, .jpg, .pdf, .svg or .webp; or a folder, for a .png each.")
    ] = Path("explanation.png"),
    save: Annotated[
        Literal["maps"] | None, typer.Option(help="Write the maps beside, as .npy files.", show_default=False)
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Import the code that the run names as its network (module:function).")
    ] = False,
) -> None:
    """Show where a network sees the evidence for its decision, over whole pictures in their own aspect ratio."""
    with one_sentence():
        if (checkpoint is None) == (network is None):
            raise DataError("Name what is explained: --checkpoint RUN, or --network NAME with --weights FILE.")
        if network is not None and weights is None:
            raise DataError(f"--network {network} needs --weights: random ones decide nothing.")
        if checkpoint is not None and any(value is not None for value in (weights, classes, mean, std)):
            raise DataError("A run has its own weights, classes, mean and std: leave these options out.")
        chosen = _methods(methods)
        normalised = {
            name: numbers(text, f"--{name}") for name, text in (("mean", mean), ("std", std)) if text is not None
        }
        from ..experiments.explain_files import explain_files, subject_of_network, subject_of_run

        if network is None:
            subject = subject_of_run(checkpoint, trust)
        else:
            subject, note = subject_of_network(network, weights, classes, **normalised)
            typer.echo(note)
        explain_files(subject, images, out, chosen, layer, target, save is not None)


def _methods(text: str) -> list[str]:
    """
    Raises:
        DataError: none, or an unknown one.
    """
    from ..explaining.methods import METHODS

    chosen = list(METHODS) if text == "all" else listed(text)
    if not chosen or (unknown := [method for method in chosen if method not in METHODS]):
        told = f"unknown {', '.join(unknown)}" if chosen else "none named"
        raise DataError(f"--methods takes some of {', '.join(METHODS)}, or all: {told}.")
    return chosen
