"""Options in a file: ``run.yaml``, and files of one's own for ``sib-lab train --config``; light to import."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from .config import TrainConfig


class Loader(yaml.SafeLoader):
    """YAML whose numbers may be written 1e-4, as YAML 1.2 has them."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def options_as_yaml(config: TrainConfig) -> str:
    """All options, so that :func:`read_options` gives the same config back."""
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return yaml.safe_dump(options, sort_keys=False, allow_unicode=True)


def read_options(path: Path) -> dict[str, Any]:
    """The options in a YAML file, names of :class:`TrainConfig` with their values.

    Raises:
        ValueError: it cannot be read, holds something else, or an option that there is not; the message is a clause.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place is not None else ""
        raise ValueError(f"{path} is no YAML file that can be read{where}") from error
    found = {} if found is None else found
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold options with their values (epochs: 14), got a {type(found).__name__}")
    known = [field.name for field in fields(TrainConfig)]
    for name in found:
        if name not in known:
            near = get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise ValueError(f"{path} has the option {name!r}, which there is not: the nearest is {near}")
    for name in ("data_options", "loss_options"):
        if not isinstance(found.get(name, {}), Mapping):
            raise ValueError(f"{path}: {name} must be names with their values, got {found[name]!r}")
    return dict(found)
