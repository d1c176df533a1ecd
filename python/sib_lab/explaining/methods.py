"""Seven explanations of a classifier's decision, each a map [N,H,W] >= 0 of where its evidence lies.

The maps keep their scale: none is stretched to [0,1], because the share of a map on the object depends on its zero.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchcam.methods import GradCAM, GradCAMpp, LayerCAM

from sib_ext.functional import vjp

from ..networks.errors import NetworkError
from ..networks.feature_maps import cam_layer, token_grid
from .measures import batch_for, for_model, in_eval_mode, scores_of

#: Key -> name for people. All but the last are "the six"; ``vjp`` is what the S-IB loss shapes in training.
METHODS = {
    "gradcam": "Grad-CAM",
    "gradcam_pp": "Grad-CAM++",
    "layercam": "LayerCAM",
    "integrated_gradients": "Integrated Gradients",
    "smoothgrad": "SmoothGrad",
    "input_x_gradient": "Input x Gradient",
    "vjp": "VJP",
}
SIX = tuple(METHODS)[:6]
CAMS = SIX[:3]  #: those that look at a feature map
AVERAGES = {"integrated_gradients", "smoothgrad"}  #: those that take many passes

if find_spec("captum") is None:  # imported where it is used, but missed before anything is trained
    raise ModuleNotFoundError("No module named 'captum'", name="captum")


def explain(
    model: nn.Module,
    x: Tensor,
    target: Tensor | None = None,
    methods: Sequence[str] = tuple(METHODS),
    layer: str | None = None,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
    rows: Sequence[int] | Tensor | None = None,
) -> dict[str, Tensor]:
    """Maps of images for a class, with the model in eval mode; it is left as it was, without hooks or gradients.

    Class-activation maps are those of the layer's feature map after ReLU, upsampled bilinearly. The other methods give
    a signed value for each channel: the map is the sum of their absolute values.

    Args:
        model: images [N,C,H,W] -> scores [N,classes], on any device.
        x: images [N,C,H,W], normalised as the model takes them.
        target: classes to explain [N]; None: each image's predicted class.
        methods: keys of METHODS.
        layer: name of the module whose output the class-activation maps look at (``model.named_modules()``); None: the
            last feature map, see :func:`sib_lab.networks.feature_maps.cam_layer`.
        batch: the most images in a forward pass; None: as :func:`sib_lab.explaining.measures.batch_for`. Results do not
            depend on it beyond rounding.
        progress: called with the number of images finished since the last call.
        seed: of SmoothGrad's noise, which an image gets by its row, whatever the batch.
        rows: row (>= 0) of each image in the whole set, where ``x`` is a part of it; None: 0, 1, ...

    Returns:
        Method -> maps [N,H,W] >= 0 on the device of ``x``, in the order of ``methods``; float32 (float64 for such x).
        Not finite where the network's values are not.

    Raises:
        ValueError: an unknown method, a layer that does not exist or has no feature map, classes out of range.
        NetworkError: class-activation maps of a network that has no feature map.
    """
    return explain_with_scores(model, x, target, methods, layer, batch, progress, seed, rows)[1]


def explain_with_scores(
    model: nn.Module,
    x: Tensor,
    target: Tensor | None = None,
    methods: Sequence[str] = tuple(METHODS),
    layer: str | None = None,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
    rows: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As :func:`explain`, and before the maps the scores [N,classes] of the same forward pass."""
    if unknown := [method for method in methods if method not in METHODS]:
        raise ValueError(f"methods: unknown {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating images [N,C,H,W]: got {x.dtype} {list(x.shape)}")
    if target is not None and (target.shape != (len(x),) or target.is_floating_point()):
        raise ValueError(
            f"target must be a class an image, whole numbers [N]: got {target.dtype} {list(target.shape)} for {len(x)} "
            "images"
        )
    rows = range(len(x)) if rows is None else [int(row) for row in rows]
    if len(rows) != len(x) or min(rows, default=0) < 0:
        raise ValueError(f"rows must be a number >= 0 for each of the {len(x)} images: got {list(rows)}")
    batch = batch_for(model, x, batch)
    if layer is None and set(methods) & set(CAMS):
        layer = cam_layer(model, x.shape[2])

    scores: list[Tensor] = []
    maps: dict[str, list[Tensor]] = {method: [] for method in methods}
    # inference_mode(False) and clone: tensors made in inference mode cannot take part in a gradient.
    with in_eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        for start in range(0, len(x), batch):
            part = slice(start, start + batch)
            images = for_model(model, x[part].detach().clone())
            classes = None if target is None else target[part].to(images.device).clone()
            some, found = _batch(model, images, classes, methods, layer, batch, seed, rows[part])
            scores.append(some.to(x.device))
            for method, values in found.items():
                maps[method].append(values.to(x.device, torch.promote_types(values.dtype, torch.float32)))
            if progress:
                progress(len(images))
    empty = x.new_empty(0, *x.shape[2:], dtype=torch.promote_types(x.dtype, torch.float32))
    joined = {method: torch.cat(parts) if parts else empty for method, parts in maps.items()}
    return torch.cat(scores) if scores else x.new_empty(0, 0), joined


def _batch(
    model: nn.Module,
    x: Tensor,
    target: Tensor | None,
    methods: Sequence[str],
    layer: str | None,
    batch: int,
    seed: int,
    rows: Sequence[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and all maps of one batch of images on the model's device.

    Scores, VJP and Input x Gradient share a forward pass; class-activation maps have one of their own, for their hooks
    can change what a network computes: one that writes into a layer's output in place where this is also the input.

    Raises:
        NetworkError: the scores have no gradient on the way that a method needs.
    """

    def forward(images: Tensor) -> Tensor:
        # A copy, as a network may write into its input (a first ReLU in place), which a gradient does not allow.
        return scores_of(model, images.clone())

    of_input = bool({"vjp", "input_x_gradient"} & set(methods))
    kinds = {"gradcam": GradCAM, "gradcam_pp": PaperGradCAMpp, "layercam": LayerCAM}
    kinds = {method: kind for method, kind in kinds.items() if method in methods}
    leaf = x.detach().requires_grad_(of_input)
    with torch.set_grad_enabled(of_input):
        scores = forward(leaf)
    if target is None:
        target = scores.argmax(1)
    elif not 0 <= target.min() <= target.max() < scores.shape[1]:
        raise ValueError(f"target must lie in 0..{scores.shape[1] - 1}, the network's classes: got {target.tolist()}")
    maps = {}
    if kinds:
        with _extractors(model, layer, kinds) as extractors:
            logits = forward(x)
            for method, extractor in extractors.items():
                cam = _cam(extractor, logits, target.tolist(), layer)
                maps[method] = F.interpolate(cam[:, None], x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    if of_input:
        with _of_the_image():
            gradient = vjp(scores, leaf, target, seed="target_logit", create_graph=False)
        of_gradient = {"vjp": gradient, "input_x_gradient": x * gradient}
        maps |= {method: values.abs().sum(1) for method, values in of_gradient.items() if method in methods}
    if AVERAGES & set(methods):
        from . import averages  # captum takes most of a second to import

        with _of_the_image():
            if "integrated_gradients" in methods:
                maps["integrated_gradients"] = averages.integrated_gradients(forward, x, target, batch)
            if "smoothgrad" in methods:
                maps["smoothgrad"] = averages.smoothgrad(forward, x, target, batch, seed, rows)
    return scores.detach(), maps


@contextmanager
def _of_the_image() -> Iterator[None]:
    """
    Raises:
        NetworkError: the scores have no gradient by the image.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if any(told in str(error) for told in ("require grad", "not have been used in the graph", "not computed from")):
            raise NetworkError(
                "The scores have no gradient by the image, as a part of the network runs under torch.no_grad() or is "
                "detached: only class-activation maps of a layer behind it can be had."
            ) from error
        raise


# -------------------------------------------------------------------------------- class-activation maps


class PaperGradCAMpp(GradCAMpp):
    """Grad-CAM++ with the paper's weights (Chattopadhay et al. 2018, equations 10 to 12).

    torchcam 0.5 divides a copy, so that its alphas stay g^2, and it has the sum of A g^3 where equation 12 has the sum
    of A times g^3. For scores Y = exp(logit), g the gradient of the logit and S the sum of A over the map,
    alpha = g^2 / (2 g^2 + S g^3) = 1 / (2 + S g) where g is not 0, and the weight is the sum of alpha relu(g); the
    factor exp(logit), the same for a whole image, is left out.
    """

    def _get_weights(self, class_idx: int | list[int], scores: Tensor, **kwargs) -> list[Tensor]:  # type: ignore[override]
        self._backprop(scores, class_idx, **kwargs)
        weights = []
        for activation, gradient in zip(self.hook_a, self.hook_g, strict=True):
            denominator = 2 + activation.sum((2, 3), keepdim=True) * gradient
            alpha = torch.where(denominator == 0, 0, 1 / denominator)
            weights.append((alpha * gradient.relu()).sum((2, 3)))
        return weights


@contextmanager
def _extractors(model: nn.Module, layer: str | None, kinds: dict) -> Iterator[dict]:
    """One torchcam extractor a method on ``layer``, for one forward pass; their hooks are gone afterwards."""
    modules = dict(model.named_modules())
    if layer not in modules:
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"layer: the network has no module {layer!r}; the first level has {names}, and see named_modules()"
        )
    with ExitStack() as stack:
        grid = _FeatureGrid(layer)
        # Before torchcam's hooks: nothing below the layer needs a gradient.
        start = modules[layer].register_forward_hook(_as_leaf)
        stack.callback(start.remove)
        extractors = {
            method: stack.enter_context(kind(model, layer, reshape_transform=grid)) for method, kind in kinds.items()
        }
        # After torchcam's hooks: what follows in place (a ReLU) writes into a copy, not into the feature map.
        copy = modules[layer].register_forward_hook(lambda module, inputs, output: output.clone())
        stack.callback(copy.remove)
        yield extractors


def _as_leaf(module: nn.Module, inputs: tuple, output: object) -> object:
    return output.detach().requires_grad_() if isinstance(output, Tensor) else output


class _FeatureGrid:
    """Brings a layer's output, or its gradient, into the form [B,C,h,w]."""

    def __init__(self, layer: str):
        self.layer = layer

    def __call__(self, output: Tensor) -> Tensor:
        if isinstance(output, Tensor) and output.dim() == 4:
            return output
        if isinstance(output, Tensor) and output.dim() == 3:
            return token_grid(output)
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"layer: {self.layer!r} gives no feature map [B,C,h,w] or tokens [B,T,C] but {shape}: name another layer"
        )


def _cam(extractor: GradCAM, logits: Tensor, target: list[int], layer: str | None) -> Tensor:
    """The extractor's map [B,h,w] after ReLU, not scaled (torchcam's own default stretches each map to [0,1]).

    NaN where the feature map or its gradient is not finite: torchcam adds up past NaN, so that a network that fails
    would seem to find nothing.
    """
    try:
        (cam,) = extractor(class_idx=target, scores=logits, normalized=False, retain_graph=True)
    except RuntimeError as error:
        if "not connected" in str(error):
            raise ValueError(
                f"layer: the scores do not depend on the output of {layer!r}: name another layer"
            ) from error
        raise
    finite = [values.flatten(1).isfinite().all(1) for values in (*extractor.hook_a, *extractor.hook_g)]
    return cam.masked_fill(~torch.stack(finite).all(0)[:, None, None], math.nan)
