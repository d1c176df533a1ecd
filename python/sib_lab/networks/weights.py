"""Weights from files of others into a network."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import NetworkError, first_line


def load_weights(model: nn.Module, path: Path, size: int) -> None:
    """Loads a state dict from a file into a network; see :func:`build_network`.

    Raises:
        NetworkError: no file, no state dict in it, or one of another network.
    """
    state = _read_state(path)
    own = model.state_dict()
    if "encoder.pos_embedding" in own and "encoder.pos_embedding" in state:
        state = _fit_positions(state, size, path)
    head = _head_names(model)
    other_head = any(k in state and state[k].shape != own[k].shape for k in head)
    if other_head or not any(key in state for key in head):
        state = {key: value for key, value in state.items() if key not in head}
    counters = "num_batches_tracked"  # older files have none, and nothing depends on them
    missing = [key for key in own if key not in state and key not in head and not key.endswith(counters)]
    unknown = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    for keys, what in ((missing, "lacks"), (unknown, "has the unknown"), (shapes, "has another shape for")):
        if keys:
            raise NetworkError(
                f"The weights {path} are those of another network: the file {what} {keys[0]}"
                f"{f' and {len(keys) - 1} more' if keys[1:] else ''}."
            )
    model.load_state_dict(own | state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NetworkError(f"There is no file of weights at {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on other files
        raise NetworkError(f"{path} cannot be read as weights: give a state dict written by torch.save.") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise NetworkError(f"{path} holds no state dict: a dict of names and tensors is expected.")
    # DataParallel and torch.compile put a word before every name.
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {_present_name(key): value for key, value in state.items()}


def _present_name(key: str) -> str:
    """torchvision's weight files keep the names that parts of DenseNet and ViT had when they were trained."""
    key = re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
    return key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _fit_positions(state: dict[str, Tensor], size: int, path: Path) -> dict[str, Tensor]:
    """A torchvision ViT's position embedding, interpolated to another image size."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    patch = state["conv_proj.weight"].shape[-1] if "conv_proj.weight" in state else 32
    try:
        return dict(interpolate_embeddings(size, patch, state))
    except ValueError as error:
        raise NetworkError(
            f"The weights {path} have a position embedding that cannot be brought to images of {size} px: "
            f"{first_line(error)}."
        ) from error


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """The state-dict names of the classifier head: the last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return (f"{linear[-1]}.weight", f"{linear[-1]}.bias") if linear else ()
