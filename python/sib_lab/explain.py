"""Three explanations of a classifier's decision, each a map [N,H,W] >= 0 of where its evidence lies."""

import torch
from captum.attr import InputXGradient, LayerAttribution, LayerGradCam
from torch import Tensor, nn

from sib_ext.functional import vjp

from .models import GRAD_CAM_LAYER

BATCH = 100  #: images explained at a time


def vjp_map(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """sum_c |R|, R the vector-Jacobian product of the target's logit: what the S-IB loss shapes in training."""
    x = x.detach().requires_grad_()
    return vjp(model(x), x, target, seed="target_logit", create_graph=False).abs().sum(1)


def input_x_gradient_map(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """sum_c |x * dz_target/dx|."""
    return InputXGradient(model).attribute(x.detach().requires_grad_(), target=target).detach().abs().sum(1)


def grad_cam_map(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Grad-CAM of the last convolutional block, after ReLU, upsampled bilinearly."""
    cam = LayerGradCam(model, model.get_submodule(GRAD_CAM_LAYER)).attribute(x, target=target, relu_attributions=True)
    return LayerAttribution.interpolate(cam.detach(), tuple(x.shape[2:]), "bilinear")[:, 0]


METHODS = {"VJP": vjp_map, "Input x Gradient": input_x_gradient_map, "Grad-CAM": grad_cam_map}


def explain(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Every method's maps [N,H,W] of images x [N,3,H,W] for the predicted class, with the network in eval mode."""
    model.eval()
    maps: dict[str, list[Tensor]] = {name: [] for name in METHODS}
    for images in x.split(BATCH):
        with torch.no_grad():
            predicted = model(images).argmax(1)
        for name, method in METHODS.items():
            maps[name].append(method(model, images, predicted))
    return {name: torch.cat(parts) for name, parts in maps.items()}
