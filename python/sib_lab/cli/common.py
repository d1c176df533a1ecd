"""What all commands have in common: going on, errors as sentences, words to values."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from ..data import DataError
from . import INSTALL

NETWORK_HELP = (
    "small_cnn, gap_cnn, small_resnet, efficientnet_lite0, a classifier of torchvision, timm:NAME, module:function."
)
WEIGHTS_HELP = "File of weights (.pt, .pth, .ckpt, .safetensors), or imagenet for efficientnet_lite0."
MEAN_HELP = "R,G,B in 0..1 that the network normalises images with."
OWN_MEAN = "that of the weights; 0.5 without any"


def command_line(context: typer.Context, adding: str = "", leaving_out: str = "") -> str:
    """The command as it was given, with one flag more or less."""
    words = ["sib-lab", context.info_name or ""]
    for parameter in context.command.params:
        option = parameter.opts[0]
        source = context.get_parameter_source(parameter.name)
        if source is None or source.name != "COMMANDLINE" or option in (adding, leaving_out):
            continue
        values = context.params[parameter.name]
        if values is False:
            words += parameter.secondary_opts[:1]  # --no-...
            continue
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
    names = {"training.runs": "RunError", "networks.errors": "NetworkError", "reporting.results": "ReportError"}
    loaded = ((sys.modules.get(f"sib_lab.{module}"), name) for module, name in names.items())
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


def numbers(text: str, option: str) -> tuple[float, ...]:
    """``0.5,0.5,0.5`` -> (0.5, 0.5, 0.5).

    Raises:
        DataError: not three numbers.
    """
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        raise DataError(
            f"{option} takes three numbers, of red, green and blue, as 0.5,0.5,0.5: got {text!r}."
        ) from None
    return red, green, blue


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    return context.get_parameter_source(name).name == "COMMANDLINE"


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
