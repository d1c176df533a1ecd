"""Feature maps: which one class-activation maps look at, and its class activation, of planes or of tokens."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .checks import describe
from .estimators import class_activation


def class_activation_of(name: str, features: Tensor, vjp: Tensor | None, size: Sequence[int]) -> Tensor:
    """:func:`sib_ext.functional.class_activation` [B,1,h,w] of a feature map or of tokens [B,T,D], named for errors.

    Raises:
        ValueError: neither the one nor tokens of a square grid, or nothing that the logits depend on.
    """
    if vjp is None:
        raise ValueError(
            f"features: the logits were not computed from {name!r}: pass what the model's forward pass went through"
        )
    return class_activation(*(_planes(name, t) for t in (features, vjp)))


def _planes(name: str, features: Tensor) -> Tensor:
    """[B,C,h,w] as it is; tokens of a square grid, with or without a class token, as [B,D,h,w]."""
    if features.dim() == 4:
        return features
    if features.dim() == 3:
        tokens = features.shape[1]
        side = math.isqrt(tokens)
        with_class_token = tokens - side * side == 1
        if with_class_token or side * side == tokens:
            return features[:, int(with_class_token) :].transpose(1, 2).unflatten(2, (side, side))
    raise ValueError(
        f"layers: the output of {name!r} must be a feature map [B,C,h,w], or tokens [B,T,D] of a square grid with or "
        f"without a class token, got {describe(features)}"
    )


def last_feature_map(model: nn.Module, x: Tensor) -> str | None:
    """Name of the module whose output class-activation maps look at, None where there is none.

    For a vision transformer of torchvision or timm it is the first LayerNorm of the last block, whose tokens still
    reach the logits through attention (of the tokens after it only the class token does). For any other network the
    last module whose output is a feature map [B,C,h,w] with more than one position, found by one forward pass in eval
    mode without gradients.

    Args:
        x: images [B,C,H,W] that the model takes; the first two are used.
    """
    return _token_layer(model) or _last_plane(model, x[:2])


def _token_layer(model: nn.Module) -> str | None:
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if isinstance(layers, nn.Sequential) and len(layers) and hasattr(layers[-1], "ln_1"):
        return f"encoder.layers.{list(layers._modules)[-1]}.ln_1"
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks):
        if hasattr(blocks[-1], "attn") and hasattr(blocks[-1], "norm1"):
            return f"blocks.{len(blocks) - 1}.norm1"
    return None


def _last_plane(model: nn.Module, x: Tensor) -> str | None:
    found: list[str] = []

    def keep(name: str) -> Callable:
        def hook(module, inputs, output) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and len(output) == len(x) and output[0, 0].numel() > 1:
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found[-1] if found else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def captured(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward pass fills the dictionary with the named modules' outputs.

    Raises:
        ValueError: an output that is no tensor, or a module that runs twice.
    """
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def note(module, inputs, output):
            if not isinstance(output, Tensor):
                raise ValueError(f"layers: the output of {name!r} is {type(output).__name__}, not a tensor")
            if name in found:
                raise ValueError(
                    f"layers: {name!r} runs more than once in a forward pass: name a module that runs once"
                )
            found[name] = output

        return note

    modules = dict(model.named_modules())
    handles = []
    try:
        for name in layers:
            handles.append(modules[name].register_forward_hook(hook(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
