import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from sib_lab.explaining.averages import SeededNoiseTunnel
from sib_lab.explaining.measures import batch_for, energy_pointing_game
from sib_lab.explaining.methods import CAMS, METHODS, SIX, explain, explain_with_scores
from sib_lab.networks.errors import NetworkError
from sib_lab.networks.own import SmallCNN
from torch import nn


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomised(SmallCNN(widths=(6, 8, 8, 10))).double().eval()


@pytest.fixture
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def randomised(model):
    """BatchNorm as after training: with statistics and weights of its own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


class InPlace(nn.Module):
    """Overwrites its input and the feature map; both the layer and what follows it are in place."""

    def __init__(self, inplace=True):
        super().__init__()
        self.relu0 = nn.ReLU(inplace)
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.relu1 = nn.ReLU(inplace)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.relu2 = nn.ReLU(inplace)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.relu2(self.conv2(self.relu1(self.conv1(self.relu0(x))))).mean((2, 3)))


class Transformer(nn.Module):
    """Four patches and a class token that the head reads."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x).flatten(2).transpose(1, 2)], 1)
        kept = self.norm(tokens)
        return self.head((tokens + self.attention(kept, kept, kept, need_weights=False)[0])[:, 0])


class Broken(nn.Module):
    """Fails in its n-th forward pass."""

    def __init__(self, model, passes):
        super().__init__()
        self.model, self.passes = model, passes

    def forward(self, x):
        self.passes -= 1
        if self.passes < 0:
            raise RuntimeError("out of luck")
        return self.model(x)


def feature_map_and_gradient(model, layer, x, target=None):
    """Output of the layer, and the gradient of the sum of the target logits with respect to it."""
    kept = {}
    hook = model.get_submodule(layer).register_forward_hook(lambda m, i, output: kept.update(features=output))
    scores = model(x)
    hook.remove()
    target = scores.argmax(1) if target is None else target
    (gradient,) = torch.autograd.grad(scores.gather(1, target[:, None]).sum(), kept["features"])
    return kept["features"].detach(), gradient


def upsampled(cam, size):
    return F.interpolate(F.relu(cam)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def grad_cam(features, gradient):
    return (gradient.mean((2, 3), keepdim=True) * features).sum(1)


def grad_cam_pp(features, gradient):
    alpha = 1 / (2 + features.sum((2, 3), keepdim=True) * gradient)
    return ((alpha * F.relu(gradient)).sum((2, 3), keepdim=True) * features).sum(1)


def layer_cam(features, gradient):
    return (F.relu(gradient) * features).sum(1)


ORACLES = {"gradcam": grad_cam, "gradcam_pp": grad_cam_pp, "layercam": layer_cam}


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


# ------------------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize("layer", [None, "block4", "block2", "block3.0"])
@pytest.mark.parametrize("method", CAMS)
def test_a_class_activation_map_is_its_formula_on_the_layers_output(model, images, method, layer):
    expected = upsampled(ORACLES[method](*feature_map_and_gradient(model, layer or "block4", images)), (32, 32))
    assert expected.max() > 0
    torch.testing.assert_close(explain(model, images, methods=[method], layer=layer)[method], expected)


def test_grad_cam_pp_weighs_by_the_second_and_third_derivative_of_exp_of_the_score():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.append(nn.Linear(3, 4))
    model = model.double()
    x = torch.rand(1, 3, 5, 5, dtype=torch.float64)
    A = model[1](model[0](x)).detach().requires_grad_()
    score = model[3](model[2](A)).max()

    def diagonal(derivative):
        flat = derivative.flatten()
        rows = [torch.autograd.grad(v, A, create_graph=True)[0].flatten()[i] for i, v in enumerate(flat)]
        return torch.stack(rows).view(A.shape)

    (first,) = torch.autograd.grad(score.exp(), A, create_graph=True)
    second = diagonal(first)
    third = diagonal(second)
    alpha = second / (2 * second + A.sum((2, 3), keepdim=True) * third)
    weights = (alpha * first.relu()).sum((2, 3), keepdim=True)
    expected = upsampled((weights * A).sum(1).detach(), (5, 5)) / score.exp().item()
    torch.testing.assert_close(explain(model, x, methods=["gradcam_pp"], layer="1")["gradcam_pp"], expected)


def test_grad_cam_pp_stays_finite_where_a_feature_map_is_dead(model, images):
    with torch.no_grad():
        model.block4[1].weight.zero_()
        model.block4[1].bias.fill_(-1)
    for values in explain(model, images, methods=CAMS).values():
        assert (values == 0).all()


def test_the_vjp_map_is_captums_saliency_summed_over_channels(model, images):
    target = model(images).argmax(1)
    expected = Saliency(model).attribute(images.clone().requires_grad_(), target=target).sum(1)
    torch.testing.assert_close(explain(model, images)["vjp"], expected)


def test_input_x_gradient_is_the_input_times_the_gradient_of_the_predicted_logit(model, images):
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).amax(1).sum(), x)
    torch.testing.assert_close(explain(model, images)["input_x_gradient"], (images * gradient).abs().sum(1))


def test_integrated_gradients_average_the_gradient_over_32_gauss_legendre_points_from_zeros(model, images):
    target = model(images).argmax(1)
    points, weights = np.polynomial.legendre.leggauss(32)
    mean = torch.zeros_like(images)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        x = (point * images).requires_grad_()
        mean += weight * torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0]
    # captum keeps its weights in float32.
    values = explain(model, images)["integrated_gradients"]
    torch.testing.assert_close(values, (mean * images).abs().sum(1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("seed, rows", [(0, None), (7, torch.tensor([11, 3, 4, 900, 0]))])
def test_smoothgrad_averages_signed_gradients_over_16_noisy_copies(model, images, seed, rows):
    target = model(images).argmax(1)
    expected = []
    for row, image, label in zip(range(5) if rows is None else rows.tolist(), images, target, strict=True):
        noise = torch.from_numpy(np.random.default_rng([seed, row]).standard_normal((16, 3, 32, 32), dtype=np.float32))
        x = (image + 0.15 * (image.max() - image.min()) * noise.double()).requires_grad_()
        (gradients,) = torch.autograd.grad(model(x)[:, label].sum(), x)
        expected.append(gradients.mean(0).abs().sum(0))
    values = explain(model, images, methods=["smoothgrad"], seed=seed, rows=rows)["smoothgrad"]
    torch.testing.assert_close(values, torch.stack(expected))


def test_another_seed_gives_other_noise_and_equal_images_get_noise_of_their_own(model, images):
    same = images[:1].expand(2, -1, -1, -1)
    values = explain(model, same, methods=["smoothgrad"])["smoothgrad"]
    other = explain(model, same, methods=["smoothgrad"], seed=1)["smoothgrad"]
    assert not torch.allclose(values[0], values[1], rtol=1e-3)
    assert not torch.allclose(values, other, rtol=1e-3)
    assert torch.equal(values, explain(model, same, methods=["smoothgrad"])["smoothgrad"])


def test_a_captum_that_would_draw_the_noise_itself_is_refused(model, images, monkeypatch):
    monkeypatch.delattr(SeededNoiseTunnel, "_add_noise_to_input")
    with pytest.raises(RuntimeError, match="use captum 0.8 or 0.9"):
        explain(model, images, methods=["smoothgrad"])


def test_smoothgrad_leaves_the_global_generator_alone(model, images):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    explain(model, images, methods=["smoothgrad"])
    assert torch.equal(torch.rand(3), expected)


def test_an_image_of_one_value_gets_smoothgrad_without_noise(model):
    x = torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)
    values = explain(model, x, methods=["smoothgrad", "vjp"])
    torch.testing.assert_close(values["smoothgrad"], values["vjp"])


def test_a_given_target_is_explained_instead_of_the_predicted_class(model, images):
    target = (model(images).argmax(1) + 1) % 10
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)
    values = explain(model, images, target)
    torch.testing.assert_close(values["vjp"], gradient.abs().sum(1))
    torch.testing.assert_close(values["input_x_gradient"], (gradient * images).abs().sum(1))
    cam = upsampled(layer_cam(*feature_map_and_gradient(model, "block4", images, target)), (32, 32))
    torch.testing.assert_close(values["layercam"], cam)
    for method in ("integrated_gradients", "smoothgrad", "gradcam", "gradcam_pp"):
        assert not torch.allclose(values[method], explain(model, images, methods=[method])[method])


# -------------------------------------------------------------------------------------------------- results


def test_maps_are_one_per_image_not_negative_and_in_the_order_asked_for(model, images):
    values = explain(model, images)
    assert tuple(values) == tuple(METHODS) and SIX == tuple(METHODS)[:6] and "vjp" not in SIX
    for value in values.values():
        assert value.shape == (5, 32, 32) and value.min() >= 0 and value.max() > 0 and not value.requires_grad
    assert tuple(explain(model, images[:1], methods=["vjp", "gradcam"])) == ("vjp", "gradcam")


@pytest.mark.parametrize("batch", [1, 2, 3, 20, 33])
def test_maps_do_not_depend_on_the_size_of_the_batch(model, images, batch):
    together, in_parts = explain(model, images), explain(model, images, batch=batch)
    for name in METHODS:
        torch.testing.assert_close(in_parts[name], together[name], rtol=1e-5, atol=1e-9)


def test_a_part_of_the_images_gives_the_same_maps_when_it_says_which_they_are(model, images):
    together, part = explain(model, images), explain(model, images[[4, 1]], rows=[4, 1], batch=1)
    for name in METHODS:
        torch.testing.assert_close(part[name], together[name][[4, 1]], rtol=1e-5, atol=1e-9)


def test_maps_are_the_same_to_rounding_in_float32_and_come_in_its_type(model, images):
    exact = explain(model, images)
    for name, values in explain(model.float(), images.float()).items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), exact[name], rtol=1e-3, atol=1e-4 * exact[name].max().item())


def test_half_precision_networks_give_float32_maps(model, images):
    for values in explain(model.bfloat16(), images.bfloat16()).values():
        assert values.dtype == torch.float32 and values.isfinite().all() and values.max() > 0


def test_no_images_give_no_maps(model, images):
    for values in explain(model, images[:0]).values():
        assert values.shape == (0, 32, 32)


def test_progress_adds_up_to_the_number_of_images(model, images):
    done = []
    explain(model, images, batch=2, methods=["vjp", "gradcam"], progress=done.append)
    assert done == [2, 2, 1]


def test_images_need_not_be_square(model):
    x = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    expected = upsampled(grad_cam(*feature_map_and_gradient(model, "block4", x)), (32, 48))
    values = explain(model, x)
    torch.testing.assert_close(values["gradcam"], expected)
    assert all(value.shape == (2, 32, 48) for value in values.values())


def test_images_of_one_pixel_have_maps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    values = explain(model, torch.rand(3, 3, 1, 1), layer="1")
    assert all(value.shape == (3, 1, 1) and value.isfinite().all() for value in values.values())


def test_an_image_that_is_not_finite_has_no_share_on_the_object_and_spoils_no_other(model, images):
    broken = images.clone()
    broken[2, 0, 4, 4] = math.nan
    expected, values = explain(model, images), explain(model, broken)
    for name in METHODS:
        share = energy_pointing_game(values[name], torch.ones(5, 1, 32, 32))
        assert share.isnan().tolist() == [False, False, True, False, False]
        torch.testing.assert_close(values[name][[0, 1, 3, 4]], expected[name][[0, 1, 3, 4]])


# ---------------------------------------------------------------------------------------- no side effects


def test_explaining_changes_neither_the_network_nor_its_gradients(model, images):
    model.train()
    model.block2.eval()
    model.block1.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    explain(model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert (model.head.weight.grad == 1).all()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith("block1")
        assert parameter.grad is None or name == "head.weight"


def test_the_network_is_explained_in_eval_mode(model, images):
    expected = explain(model, images)
    for name, values in explain(model.train(), images).items():
        torch.testing.assert_close(values, expected[name])


def test_the_images_are_left_as_they_were(images):
    x = images.clone().requires_grad_()
    explain(InPlace().double(), x, layer="conv2")
    assert torch.equal(x, images) and x.requires_grad and x.grad is None
    plain = images.clone()
    explain(InPlace().double(), plain, layer="conv2")
    assert torch.equal(plain, images) and not plain.requires_grad


def test_hooks_are_gone_afterwards_and_those_of_others_stay(model, images):
    handle = model.block1.register_forward_hook(lambda module, inputs, output: None)
    explain(model, images)
    assert hooks_of(model) == 1
    handle.remove()


@pytest.mark.parametrize("passes", range(6))
def test_hooks_and_modes_are_as_before_after_an_exception_wherever_it_comes(images, passes):
    model = Broken(InPlace(), passes).train()
    with pytest.raises(RuntimeError, match="out of luck"):
        explain(model, images.float(), layer="model.conv2")
    assert hooks_of(model) == 0 and all(module.training for module in model.modules())


def test_an_exception_in_a_hook_leaves_no_hooks(images):
    model = InPlace()
    with pytest.raises(ValueError):
        explain(model, images.float(), layer="head")
    assert hooks_of(model) == 0 and model.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off_outside(model, images, context):
    expected = explain(model, images)
    with context():
        values = explain(model, images + 0)
    for name in METHODS:
        torch.testing.assert_close(values[name], expected[name])


# --------------------------------------------------------------------------------------- kinds of networks


def test_a_network_with_frozen_parameters_gives_the_same_maps(model, images):
    expected = explain(model, images)
    for name, values in explain(model.requires_grad_(False), images).items():
        torch.testing.assert_close(values, expected[name])


@pytest.mark.parametrize("layer", ["conv1", "relu1", "conv2", "relu2"])
def test_in_place_activations_change_nothing(images, layer):
    torch.manual_seed(0)
    model, plain = InPlace().double(), InPlace(inplace=False).double()
    plain.load_state_dict(model.state_dict())
    expected = explain(plain, images, layer=layer)
    oracle = upsampled(grad_cam(*feature_map_and_gradient(plain, layer, images)), (32, 32))
    torch.testing.assert_close(expected["gradcam"], oracle)
    for name, values in explain(model, images, layer=layer).items():
        torch.testing.assert_close(values, expected[name])


def test_the_tokens_of_a_transformer_are_a_grid_without_the_class_token(images):
    torch.manual_seed(0)
    model = Transformer().double()
    tokens, gradient = feature_map_and_gradient(model, "norm", images)
    features, gradient = (t[:, 1:].transpose(1, 2).reshape(5, 12, 2, 2) for t in (tokens, gradient))
    values = explain(model, images, layer="norm")
    for method, oracle in ORACLES.items():
        torch.testing.assert_close(values[method], upsampled(oracle(features, gradient), (32, 32)))
    assert values["gradcam"].max() > 0


def test_a_network_that_reshapes_with_view_can_be_explained(images):
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4 * 30 * 30, 5)

        def forward(self, x):
            return self.head(self.conv(x).view(len(x), -1))

    torch.manual_seed(0)
    model = Viewing().double()
    expected = upsampled(layer_cam(*feature_map_and_gradient(model, "conv", images)), (32, 32))
    torch.testing.assert_close(explain(model, images)["layercam"], expected)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_b_32"])
def test_torchvisions_networks_have_maps_of_all_methods(name):
    pytest.importorskip("torchvision")
    from sib_lab.networks.build import build_network
    from sib_lab.networks.feature_maps import cam_layer, token_grid

    torch.manual_seed(0)
    model = build_network(name, 4, 64).eval()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(head.weight)  # torchvision's ViT starts with zeros, whose gradient is zero
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    values = explain(model, x, methods=[*CAMS, "input_x_gradient", "vjp"])
    features, gradient = feature_map_and_gradient(model, cam_layer(model), x)
    if features.dim() == 3:
        features, gradient = token_grid(features), token_grid(gradient)
    expected = upsampled(grad_cam(features, gradient), (64, 64))
    torch.testing.assert_close(values["gradcam"], expected, rtol=1e-3, atol=1e-4 * expected.max().item() + 1e-9)
    assert all(v.isfinite().all() and v.shape == (1, 64, 64) for v in values.values())
    assert values["vjp"].max() > 0 and values["layercam"].max() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_network_on_a_gpu_explains_images_on_the_cpu_as_the_cpu_does(model, images):
    expected = explain(model, images)
    for name, values in explain(model.cuda(), images).items():
        assert values.device.type == "cpu"
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-9)


# --------------------------------------------------------------------------------------------------- errors


def test_errors_name_the_argument(model, images):
    for arguments, message in [
        ({"methods": ["gradcam", "cam"]}, "methods: unknown cam; there are gradcam, gradcam_pp"),
        ({"layer": "layer4"}, "no module 'layer4'.*block1, block2"),
        ({"layer": "head"}, r"'head' gives no feature map .* but \[5, 10\]"),
        ({"target": torch.tensor([0, 1, 2, 3, 10])}, r"target must lie in 0..9"),
        ({"target": torch.tensor([0, 1, 2, 3, -1])}, r"target must lie in 0..9"),
        ({"target": torch.tensor([0, 1])}, r"\[2\] for 5 images"),
        ({"batch": 0}, "batch must be at least 1: got 0"),
        ({"rows": [0, 1]}, r"each of the 5 images: got \[0, 1\]"),
        ({"rows": [0, 1, 2, 3, -1]}, "rows must be a number >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            explain(model, images, **arguments)
    with pytest.raises(ValueError, match=r"got torch.float64 \[3, 32, 32\]"):
        explain(model, images[0])


def test_a_layer_that_the_scores_do_not_depend_on_is_named(images):
    class Aside(InPlace):
        def __init__(self):
            super().__init__(inplace=False)
            self.aside = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            self.aside(x)
            return super().forward(x)

    model = Aside().double()
    with pytest.raises(ValueError, match="do not depend on the output of 'aside'"):
        explain(model, images, layer="aside")
    assert hooks_of(model) == 0


def test_a_network_without_a_feature_map_has_no_class_activation_maps_but_the_others(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).double()
    with pytest.raises(NetworkError, match="no module with a feature map"):
        explain(model, images)
    others = [method for method in METHODS if method not in CAMS]
    values = explain(model, images, methods=others)
    assert all(v.max() > 0 for v in values.values())
    assert math.isclose(
        values["vjp"].sum(), model[1].weight.detach().abs()[model(images).argmax(1)].sum(), rel_tol=1e-9
    )


def test_scores_and_prediction_come_with_the_maps(model, images):
    scores, maps = explain_with_scores(model, images)
    torch.testing.assert_close(scores, model(images))
    assert not scores.requires_grad and not any(values.requires_grad for values in maps.values())


class Aliased(nn.Module):
    """Its layer gives back its own input, which is used again behind it; ``in_place``: and written into."""

    def __init__(self, in_place):
        super().__init__()
        self.first, self.layer, self.second = nn.Conv2d(3, 6, 3), nn.Identity(), nn.Conv2d(6, 6, 1)
        self.in_place = in_place

    def forward(self, x):
        h = self.first(x)
        z = self.layer(h)
        z = F.relu_(z) if self.in_place else z
        return (self.second(z) + 2 * h).mean((2, 3))


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_asked_for_beside_it_changes_no_map_and_no_score(images, in_place):
    model = Aliased(in_place).to(images.dtype)
    scores, together = explain_with_scores(model, images, layer="layer")
    torch.testing.assert_close(scores, model(images))
    for method, values in together.items():
        torch.testing.assert_close(values, explain(model, images, methods=[method], layer="layer")[method])


@pytest.mark.parametrize("cut", ["whole", "part"])
@pytest.mark.parametrize("method", ["vjp", "input_x_gradient", "integrated_gradients", "smoothgrad"])
def test_a_network_without_a_gradient_by_the_image_is_one_sentence(images, cut, method):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.back = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.front(x)
            return self.back(x).mean((2, 3))

    model = Frozen().to(images.dtype)
    model.requires_grad_(cut == "part")
    with pytest.raises(NetworkError, match="The scores have no gradient by the image"):
        explain(model, images, methods=[method])
    assert explain(model, images, methods=["gradcam"], layer="back")["gradcam"].any()


def test_targets_may_be_made_in_inference_mode_but_must_be_whole_numbers(model, images):
    with torch.inference_mode():
        target = torch.ones(len(images), dtype=torch.long)
        values = explain(model, images, target, ["vjp"])["vjp"]
    assert torch.equal(values, explain(model, images, torch.ones(len(images), dtype=torch.long), ["vjp"])["vjp"])
    with pytest.raises(ValueError, match="target must be a class an image, whole numbers"):
        explain(model, images, target.double())


def test_maps_of_one_pass_are_those_of_a_pass_each(model, images):
    together = explain(model, images)
    for method, values in together.items():
        torch.testing.assert_close(values, explain(model, images, methods=[method])[method])


def test_on_a_cpu_large_images_go_through_a_few_at_a_time():
    model = nn.Conv2d(3, 3, 1)
    assert [batch_for(model, torch.empty(99, 3, side, side), None) for side in (64, 224, 2000)] == [32, 5, 1]
    assert batch_for(model, torch.empty(99, 3, 224, 224), 64) == 64
