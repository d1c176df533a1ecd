"""Networks of the user's own, as ``module:function``: importing the module runs its code."""

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from torch import nn

from .errors import NetworkError, first_line


def imported_network(name: str, classes: int, size: int) -> nn.Module:
    """Calls ``module:function``; the working directory is looked in, too.

    Raises:
        NetworkError: no such module or function, or one that makes no network.
    """
    module_name, _, function_name = name.partition(":")
    with _importing_from(os.getcwd()):
        try:
            function = getattr(import_module(module_name), function_name)
        except ImportError as error:
            raise NetworkError(f"{name}: cannot import {module_name!r}: {first_line(error)}.") from error
        except AttributeError as error:
            raise NetworkError(f"{name}: the module {module_name} has no {function_name!r}.") from error
        if not callable(function):
            raise NetworkError(f"{name}: {function_name} is not a function that makes a network.")
        parameters = inspect.signature(function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        given = {"classes": classes, "size": size}
        model = function(**{key: value for key, value in given.items() if takes_all or key in parameters})
    if not isinstance(model, nn.Module):
        raise NetworkError(f"{name} must return an nn.Module, got {type(model).__name__}.")
    return model


@contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
