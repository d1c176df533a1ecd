"""Kinks: modules whose derivative jumps, across which difference quotients of gradients say nothing."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .twin import check_forward, check_images, check_module, reseed, twin, undisturbed

KINKED_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.SELU,
    nn.Threshold,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardshrink,
    nn.Softshrink,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
# The same and their relatives as operations, in-place or not.
KINKED_OPERATIONS = {
    *("relu", "threshold", "leaky_relu", "_prelu_kernel", "rrelu", "rrelu_with_noise", "selu"),
    *("hardtanh", "relu6", "hardswish", "hardsigmoid", "hardshrink", "softshrink"),
    *("max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("fractional_max_pool2d", "fractional_max_pool3d", "mkldnn_max_pool2d"),
    *("abs", "maximum", "minimum", "max", "min", "amax", "amin", "topk", "sort", "median", "kthvalue"),
}
CLAMPS = {"clamp", "clamp_min", "clamp_max"}


def has_kinks(model: nn.Module, x: Tensor | None = None) -> list[str]:
    """Names of the modules whose derivative jumps (ReLU and its kin, maxima), in the model's order.

    Kinks do not harm exact double backward: the jumps are passed over, as in ReLU networks' own training. Difference
    quotients of gradients with a finite step in x, however, are useless across them.

    Args:
        model: left as it is.
        x: images [B,C,H,W], optional. Without x, modules are known by their type alone; with x, a copy of the model
            runs once, and operations called inside a module's forward (``F.relu``, ``abs``, a clamp that binds) count
            for that module.

    Raises:
        ValueError: as in :func:`check_double_backward`.
    """
    check_module(model)
    if x is None:
        return kinks_of_type(model)
    check_images(x)
    with undisturbed(x):
        copied = twin(model)
        check_forward(copied, x)
        return kinks_met(copied, x)


def kinks_of_type(model: nn.Module) -> list[str]:
    def kinked(module: nn.Module) -> bool:
        return isinstance(module, KINKED_MODULES) or (isinstance(module, nn.ELU) and module.alpha != 1)

    return [name for name, module in model.named_modules() if kinked(module)]


class _KinkFinder(TorchDispatchMode):
    """Notes in which module kinked operations run on values that depend on x."""

    def __init__(self):
        super().__init__()
        self.inside, self.found = [""], set()  # Softsign enters as None: smooth, though made with abs

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and args[0].requires_grad and _kinked(function, args, result):
            self.found.add(self.inside[-1])
        return result


def _kinked(function, args: tuple, result) -> bool:
    name = function.overloadpacket.__name__.rstrip("_")
    if name == "elu":  # (input, alpha, scale, input_scale)
        alpha, _, input_scale = (*args[1:], 1, 1, 1)[:3]
        return alpha * input_scale != 1
    if name in CLAMPS:
        return result is args[0] or bool((result != args[0]).any())
    return name in KINKED_OPERATIONS


def kinks_met(model: nn.Module, x: Tensor) -> list[str]:
    """Runs the model itself, once: buffers may change."""
    finder = _KinkFinder()

    def enter(name: str) -> Callable:
        return lambda module, _: finder.inside.append(None if isinstance(module, nn.Softsign) else name)

    def leave(*_) -> None:
        finder.inside.pop()

    trainable = [p for p in model.parameters() if p.requires_grad]
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        for parameter in trainable:  # then only what depends on x requires grad
            parameter.requires_grad_(False)
        with finder:
            reseed(x.device)
            model(x.detach().clone().requires_grad_())
    except Exception:  # a forward that only fails with gradients on is check_double_backward's finding
        finder.found.update(kinks_of_type(model))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_()
    return [name for name, _ in model.named_modules() if name in finder.found]
