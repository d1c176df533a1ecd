"""Models return what they like: the logits are found in it, and modules inside return what they like, too."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sib_ext import check_double_backward

from .networks import WIDTH, CubeDetached, Do, Network, blamed

Output = dataclasses.make_dataclass("Output", ["logits", "features"])


class Opaque:
    """Neither a tensor nor a structure of them."""

    def __init__(self, tensor):
        self.tensor = tensor


class Returning(Network):
    def __init__(self, wrap, trap=None):
        super().__init__(trap or nn.Tanh())
        self.wrap = wrap

    def forward(self, x):
        features = self.stem(x)
        return self.wrap(super().forward(x), self.trap(features))


WRAPS = {
    "tuple": lambda logits, features: (logits, features),
    "list": lambda logits, features: [None, logits],
    "mapping": lambda logits, features: {"features": features, "logits": logits},
    "dataclass": Output,
    "object": lambda logits, features: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_the_logits_are_found(wrap, x):
    assert check_double_backward(Returning(wrap), x).verified
    assert blamed(check_double_backward(Returning(wrap, nn.Hardsigmoid()), x)) == ["trap"]


def test_of_transformers_output():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    images = torch.randn(2, 3, 32, 32)
    assert check_double_backward(transformers.ResNetForImageClassification(config), images).verified
    with pytest.raises(ValueError, match="the model returned BaseModelOutput.* with no logits in it: give output="):
        check_double_backward(transformers.ResNetModel(config), images)
    report = check_double_backward(
        transformers.ResNetModel(config), images, output=lambda returned: returned.pooler_output.flatten(1)
    )
    assert report.verified


def test_only_what_the_logits_depend_on_counts(x):
    class Aside(Network):
        def __init__(self, trap):
            super().__init__(trap)
            self.aside = nn.Hardsigmoid()

        def forward(self, x):
            return super().forward(x), self.aside(self.stem(x))

    assert check_double_backward(Aside(nn.Tanh()), x).verified
    report = check_double_backward(Aside(Do(CubeDetached.apply)), x)
    assert blamed(report) == ["trap"] and "aside" not in {f.module for f in report.findings}
    assert blamed(check_double_backward(Aside(nn.Tanh()), x, output=lambda returned: returned[1])) == ["aside"]


@pytest.mark.parametrize(
    "wrap", [Output, Opaque, lambda tensor, _: {"deep": [tensor]}], ids=["dataclass", "object", "mapping"]
)
def test_modules_inside_may_pass_on_any_structure(wrap, x):
    class Wrapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(WIDTH, WIDTH, 1)

        def forward(self, x):
            return wrap(self.inner(x)) if wrap is Opaque else wrap(self.inner(x), None)

    class Unwrapping(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, wrapped):
            if isinstance(wrapped, dict):
                return self.inner(wrapped["deep"][0])
            return self.inner(wrapped.logits if isinstance(wrapped, Output) else wrapped.tensor)

    def trap(inner):
        return nn.Sequential(Wrapping(), Unwrapping(inner))

    assert check_double_backward(Network(trap(nn.Tanh())), x).verified
    report = check_double_backward(Network(trap(nn.Hardsigmoid())), x)
    assert blamed(report) == ["trap.1.inner"]
    assert not any("no gradient" in f.reason for f in report.findings)


def test_a_model_without_logits_is_refused_before_anything_else(x):
    with pytest.raises(ValueError, match="returned Opaque with no logits in it: give output="):
        check_double_backward(Returning(lambda logits, features: Opaque(logits), nn.Hardsigmoid()), x)
    with pytest.raises(ValueError, match="output=... returned NoneType"):
        check_double_backward(Returning(Output), x, output=lambda returned: None)
