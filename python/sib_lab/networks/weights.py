"""Weights from files of others into a network."""

import argparse
import pathlib
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NetworkError, first_line
from .preprocessing import Preprocessing, of_checkpoint

#: Under which names files keep averaged weights, which are what their makers evaluate.
AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema", "params_ema")
#: And the trained ones, or a further level.
TRAINED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params", "shadow")
PREFIXES = ("model.", "net.", "network.", "backbone.", "module.", "student.")  #: in the order that a tie is decided
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  #: classifiers that GoogLeNet and Inception only train with
COUNTERS = "num_batches_tracked"  #: older files have none, and nothing depends on them
SHOWN = 3  #: names in a message
#: Classes that files of training programs hold beside tensors; making one runs no code of the file's.
HARMLESS = (argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath)


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds."""

    path: Path
    state: dict[str, Tensor]
    part: str = ""  #: the name in the file under which the state lay; empty: the file is the state
    averaged: bool = False  #: whether that is a moving average (EMA) over training
    preprocessing: Preprocessing | None = None  #: of a checkpoint of this program; None: unknown
    classes: tuple[str, ...] | None = None  #: likewise
    size: int | None = None  #: likewise, px
    data: str | None = None  #: likewise, the name of the data set


def read_weights(path: Path) -> Weights:
    """Reads a state dict: .safetensors, or whatever ``torch.save`` wrote of tensors (.pt, .pth, .ckpt).

    A file may hold the state under a name ("state_dict", "model", ...), also several levels down. Where it holds
    averaged (EMA) weights beside the trained ones, the averaged ones are taken. No code of the file ever runs.

    Raises:
        NetworkError: no file, one that cannot be read without running its code, or no state dict in it.
    """
    if not path.is_file():
        raise NetworkError(f"There is no file of weights at {path}.")
    if path.suffix == ".safetensors":
        return Weights(path, _read_safetensors(path))
    content = _read_pickle(path)
    found = next(_states(content), None)
    if found is None:
        raise NetworkError(f"{path} holds no state dict: a dict of names and tensors is expected.")
    names, state = found
    averaged = any(name in AVERAGED for name in names)
    return Weights(path, dict(state), ".".join(names), averaged, *_of_this_program(content))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise NetworkError(f"{path} needs safetensors, which is not installed: pip install safetensors.") from error
    try:
        return load_file(path)
    except Exception as error:  # safetensors has an exception of its own for a damaged header
        raise NetworkError(f"{path} cannot be read as safetensors: {first_line(error)}.") from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise NetworkError(
                f"{path} holds more than tensors ({named[1]}), a whole network perhaps, and reading that could run any "
                "code: give a file of its state_dict()."
            ) from error
        raise NetworkError(f"{path} cannot be read as weights: give a state dict written by torch.save.") from error
    except Exception as error:  # torch.load fails in many ways on other files
        raise NetworkError(f"{path} cannot be read as weights: give a state dict written by torch.save.") from error


def _states(content: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Tensor]]]:
    """The state dicts in a file with the names that lead there, the one to take first."""
    if not isinstance(content, Mapping) or not content:
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        yield names, content
        return
    for name in (*AVERAGED, *TRAINED):
        yield from _states(content.get(name), (*names, name))


def _of_this_program(content: Mapping[str, Any]) -> tuple[Preprocessing, tuple[str, ...], int, str | None] | tuple[()]:
    """Preprocessing, classes, size and data set of a checkpoint that ``sib-lab train`` wrote; nothing of others."""
    if not {"config", "classes", "size", "model"} <= content.keys():
        return ()
    return of_checkpoint(content), tuple(content["classes"]), content["size"], content["config"].get("data")


# --------------------------------------------------------------------------------------------- into a network


def load_weights(model: nn.Module, weights: Weights, size: int) -> str:
    """Loads weights into a network; see :func:`sib_lab.networks.build.build_network`.

    Returns:
        what was taken, as one sentence.

    Raises:
        NetworkError: they are those of another network.
    """
    own = model.state_dict()
    state, prefix = _under_one_prefix(weights, own)
    state = {_present_name(key, own): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key in own or not key.startswith(AUXILIARY)}
    state = _fit_positions(model, state, own, size, weights.path)
    head = _head_names(model)
    other_head = any(k in state and state[k].shape != own[k].shape for k in head)
    new_head = bool(head) and (other_head or not any(key in state for key in head))
    if new_head:
        state = {key: value for key, value in state.items() if key not in head}
    _check_fit(model, own, state, head, weights.path)
    model.load_state_dict(own | state)
    where = f" under {weights.part!r}" if weights.part else ""
    kind = "averaged (EMA) weights" if weights.averaged else "weights"
    after = f", names after {prefix!r}" if prefix else ""
    return f"The {kind}{where} of {weights.path} were taken{after}{'; the classifier head is new' * new_head}."


def head_rows(model: nn.Module, weights: Weights) -> int | None:
    """How many classes the classifier head in a file has, for a network of that kind; None: there is no head in it."""
    state, _ = _under_one_prefix(weights, model.state_dict())
    return next((len(state[key]) for key in _head_names(model) if key in state), None)


def _check_fit(
    model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], head: Sequence[str], path: Path
) -> None:
    needed = [key for key in own if key not in head and not key.endswith(COUNTERS)]
    missing = [key for key in needed if key not in state]
    unknown = [key for key in state if key not in own]
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not (missing or unknown or other):
        return
    shapes = [f"{key} ({list(state[key].shape)} instead of {list(own[key].shape)})" for key in other]
    parts = [
        f"{what} {_first(keys)}"
        for what, keys in (("lacks", missing), ("has the unknown", unknown), ("has another shape for", shapes))
        if keys
    ]
    fitting = len(needed) - len(set(missing) | set(needed) & set(other))
    size = "" if missing or unknown else ", or of another image size"
    raise NetworkError(
        f"The weights {path} are those of another network{size}: {fitting} of the {len(needed)} tensors of "
        f"{type(model).__name__} fit; the file {'; it '.join(parts)}."
    )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _under_one_prefix(weights: Weights, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state without the words that wrappers (DataParallel, torch.compile, Lightning) put before every name of the
    network, and these words. What lies under others (a loss, a teacher) is left out.

    Raises:
        NetworkError: the network is there twice, under prefixes that say nothing of which is meant.
    """
    counts = Counter(prefix for key in weights.state for prefix in _prefixes(key, own))
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    if most == 0 or "" in best:
        return weights.state, ""
    averaged = [prefix for prefix in best if "ema" in re.split(r"[._]", prefix)]
    known = [prefix for word in PREFIXES for prefix in best if prefix.startswith(word)]
    chosen = [*averaged, *known, *(best if len(best) == 1 else [])]
    if not chosen:
        raise NetworkError(f"{weights.path} holds the network {len(best)} times, under {_first(best)}: keep one.")
    prefix = chosen[0]
    return {k.removeprefix(prefix): v for k, v in weights.state.items() if k.startswith(prefix)}, prefix


def _prefixes(key: str, own: Mapping[str, Tensor]) -> Iterator[str]:
    """What may stand before one of the network's own names in ``key``."""
    words = key.split(".")
    for skipped in range(len(words)):
        if ".".join(words[skipped:]) in own:
            yield "".join(f"{word}." for word in words[:skipped])


def _present_name(key: str, own: Mapping[str, Tensor]) -> str:
    """torchvision's weight files keep the names that parts of DenseNet and ViT had when they were trained."""
    if key in own:
        return key
    key = re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
    return key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _fit_positions(
    model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor], size: int, path: Path
) -> dict[str, Tensor]:
    """A ViT's position embedding, torchvision's or timm's, interpolated to another image size.

    Raises:
        NetworkError: it is that of no square image.
    """
    for key in ("encoder.pos_embedding", "pos_embed"):
        if key not in own or key not in state or own[key].shape == state[key].shape:
            continue
        try:
            if key == "pos_embed":
                return state | {key: _timm_positions(model, state[key], own[key].shape[1])}
            from torchvision.models.vision_transformer import interpolate_embeddings

            return dict(interpolate_embeddings(size, own["conv_proj.weight"].shape[-1], state))
        except (ValueError, RuntimeError, AttributeError) as error:
            raise NetworkError(
                f"The weights {path} have a position embedding that cannot be brought to images of {size} px: "
                f"{first_line(error)}."
            ) from error
    return state


def _timm_positions(model: Any, positions: Tensor, count: int) -> Tensor:
    """For the ``count`` tokens of the network: its patches after those, as the class's, that have no place."""
    from timm.layers import resample_abs_pos_embed

    rows, columns = model.patch_embed.grid_size
    return resample_abs_pos_embed(positions, [rows, columns], num_prefix_tokens=count - rows * columns)


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """The state-dict names of the classifier head: the last linear layer, or without one the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if names:
            return tuple(key for key in (f"{names[-1]}.weight", f"{names[-1]}.bias") if key in model.state_dict())
    return ()
