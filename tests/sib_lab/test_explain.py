import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from sib_lab import explain as explanations
from sib_lab.explain import METHODS, explain
from sib_lab.models import SmallCNN


@pytest.fixture
def model():
    model = SmallCNN()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def images():
    return torch.rand(5, 3, 40, 40) * 2 - 1


def test_the_vjp_map_is_captums_saliency_summed_over_channels(model, images):
    target = model(images).argmax(1)
    expected = Saliency(model).attribute(images.clone().requires_grad_(), target=target).sum(1)
    torch.testing.assert_close(explain(model, images)["VJP"], expected)


def test_input_x_gradient_is_the_input_times_the_gradient_of_the_predicted_logit(model, images):
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).amax(1).sum(), x)
    torch.testing.assert_close(explain(model, images)["Input x Gradient"], (images * gradient).abs().sum(1))


def test_grad_cam_weighs_the_channels_of_the_last_block_with_their_mean_gradient(model, images):
    kept = {}
    hook = model.block4.register_forward_hook(lambda module, inputs, output: kept.update(features=output))
    scores = model(images)
    hook.remove()
    (gradient,) = torch.autograd.grad(scores.amax(1).sum(), kept["features"])
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * kept["features"]).sum(1, keepdim=True))
    expected = F.interpolate(cam, size=(40, 40), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(explain(model, images)["Grad-CAM"], expected)


def test_maps_are_one_per_image_and_not_negative(model, images):
    for values in explain(model, images).values():
        assert values.shape == (5, 40, 40) and values.min() >= 0 and not values.requires_grad


def test_maps_do_not_depend_on_the_size_of_the_batch(model, images, monkeypatch):
    together = explain(model, images)
    monkeypatch.setattr(explanations, "BATCH", 2)
    in_parts = explain(model, images)
    for name in METHODS:
        torch.testing.assert_close(in_parts[name], together[name], rtol=1e-4, atol=1e-7)


def test_explaining_changes_neither_the_network_nor_its_gradients(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model.train(), images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
