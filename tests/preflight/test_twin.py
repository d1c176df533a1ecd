"""The model, what is attached to it and the world stay as they were; copies can be made of it."""

import functools
import logging
import random
import threading
import types
import weakref

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sib_ext import check_double_backward
from sib_ext.preflight.twin import twin

from ..compare import snapshot
from .networks import WIDTH, Do, Network, PythonDropout, blamed


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())


@pytest.mark.parametrize("trap", [nn.Dropout, nn.Hardsigmoid, PythonDropout], ids=["healthy", "trap", "Python"])
def test_the_model_and_the_world_stay_as_they_were(trap, x):
    model = Network(trap())
    model.stem.eval()
    model.last[0].weight.requires_grad_(False)
    model.head.linear.bias.grad = torch.ones(3)
    handle = model.head.register_forward_hook(lambda *_: None)
    x.requires_grad_()
    unchanged = snapshot([*model.parameters(), *model.buffers(), model.head.linear.bias.grad, x])
    modes = [m.training for m in model.modules()]
    states = random_states()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    check_double_backward(model, x)
    unchanged()
    assert random_states() == states
    assert [m.training for m in model.modules()] == modes
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.linear.bias"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["last.0.weight"]
    assert x.grad is None and x.requires_grad
    assert torch.get_default_dtype() == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    handle.remove()


def test_the_random_numbers_go_on_as_before_even_after_an_error(x):
    model = Network(nn.Linear(3, 3))
    states = random_states()
    with pytest.raises(ValueError):
        check_double_backward(model, x)
    assert random_states() == states


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(switch, x):
    model = Network(nn.Identity())
    with switch():
        assert check_double_backward(model, x.clone()).verified
        assert not torch.is_grad_enabled()


def test_the_same_answer_twice(x):
    model = Network(nn.Dropout())
    assert str(check_double_backward(model, x)) == str(check_double_backward(model, x))


class Keeping(nn.Module):
    """Like a network that keeps its features for a picture."""

    def forward(self, x):
        self.last, self.features = x.exp(), {"layer": [x.tanh()]}
        return self.features["layer"][0]


def test_results_of_an_earlier_forward_do_not_stop_the_copy(x):
    model = Network(Keeping())
    model(x)
    kept = model.trap.last, model.trap.features["layer"][0]
    assert check_double_backward(model, x).verified
    assert model.trap.last is kept[0] and model.trap.features["layer"][0] is kept[1]


GLOBAL_FEATURES: list = []


def into_a_closure(module):
    features = []
    module.register_forward_hook(lambda module, inputs, output: features.append(output))
    return features


def into_a_global(module):
    GLOBAL_FEATURES.clear()
    module.register_forward_hook(lambda module, inputs, output: GLOBAL_FEATURES.append(output))
    return GLOBAL_FEATURES


def into_a_default(module):
    features = []
    module.register_forward_hook(lambda module, inputs, output, to=features: to.append(output))
    return features


def into_a_partial(module):
    def keep(to, module, inputs, output):
        to.append(output)

    features = []
    module.register_forward_hook(functools.partial(keep, features))
    return features


class Recorder:
    def __init__(self):
        self.features, self.lock = [], threading.Lock()

    def keep(self, module, inputs, output):
        with self.lock:
            self.features.append(output)


def into_an_object(module):
    recorder = Recorder()
    module.register_forward_hook(recorder.keep)
    return recorder.features


def behind_a_lock(module):
    features, lock = [], threading.RLock()

    def keep(module, inputs, output):
        with lock:
            features.append(output)

    module.register_forward_hook(keep)
    return features


HOOKS = [into_a_closure, into_a_global, into_a_default, into_a_partial, into_an_object, behind_a_lock]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("trap", [nn.Tanh, nn.Hardsigmoid])
def test_what_hooks_hold_is_copied_and_does_not_grow(hook, trap, x):
    model = Network(trap())
    features = hook(model.trap)
    model(x)
    kept = list(features)
    report = check_double_backward(model, x)
    assert report.verified if trap is nn.Tanh else blamed(report) == ["trap"]
    assert len(kept) == len(features) == 1 and features[0] is kept[0]


def test_gradients_that_backward_hooks_keep_do_not_grow(x):
    model, gradients = Network(nn.Tanh()), []
    model.trap.register_full_backward_hook(lambda module, of_inputs, of_outputs: gradients.append(of_outputs))
    model(x).sum().backward()
    assert check_double_backward(model, x).verified and len(gradients) == 1


def test_a_model_with_a_class_activation_method_attached_is_checked(x):
    methods = pytest.importorskip("torchcam.methods")
    model = Network(nn.Tanh())
    cam = methods.GradCAM(model, target_layer="trap", input_shape=(3, 8, 8))
    cam(0, model(x))
    kept = list(cam.hook_a)
    assert check_double_backward(model, x).verified
    assert all(kept_now is before for kept_now, before in zip(cam.hook_a, kept, strict=True))


def patched_by_a_closure(layer):
    before = layer.forward
    layer.forward = lambda x: 2 * before(x)


def patched_by_a_method(layer):
    layer.forward = types.MethodType(lambda self, x: F.conv2d(x, 2 * layer.weight, padding=1), layer)


def patched_by_a_partial(layer):
    layer.forward = functools.partial(lambda module, x: F.conv2d(x, 2 * module.weight, padding=1), layer)


@pytest.mark.parametrize("patch", [patched_by_a_closure, patched_by_a_method, patched_by_a_partial])
def test_a_patched_forward_runs_on_the_copy(patch, x):
    model = Network(nn.Tanh()).eval()
    patch(model.stem[0])
    copied = twin(model)
    assert torch.equal(copied(x), model(x))
    with torch.no_grad():
        copied.stem[0].weight.zero_()
    assert not torch.equal(copied(x), model(x))
    assert check_double_backward(model, x).verified


def test_functions_that_hold_nothing_are_shared():
    """Others know them by identity: SIBStep's rules for attention, for one."""
    model = Network(Do(F.multi_head_attention_forward))
    assert twin(model).trap.function is F.multi_head_attention_forward


class Child(nn.Module):
    """Uses weights of the module around it, without a cycle of modules."""

    def __init__(self, parent):
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x):
        return x * self.parent().stem[0].weight.mean()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        return x * torch.rand(x.shape, generator=self.generator, dtype=torch.float32)


def with_a_weak_reference(model):
    model.trap = Child(model)


def with_tied_weights(model):
    model.trap = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.Tanh(), nn.Conv2d(WIDTH, WIDTH, 1))
    model.trap[2].weight = model.trap[0].weight


def with_things_that_deepcopy_refuses(model):
    model.trap.locks, model.trap.functional, model.trap.log = [threading.Lock()], F, logging.getLogger("trap")


def with_a_generator_of_its_own(model):
    model.trap = Noisy()


@pytest.mark.parametrize(
    "change",
    [with_a_weak_reference, with_tied_weights, with_things_that_deepcopy_refuses, with_a_generator_of_its_own],
)
def test_models_with_unusual_contents_are_checked(change, x):
    model = Network(nn.Tanh())
    change(model)
    assert check_double_backward(model, x).verified
    if isinstance(model.trap, Noisy):
        assert torch.equal(model.trap.generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_what_cannot_be_copied_is_named(x):
    model = Network(nn.Tanh())
    model.trap.numbers = (i for i in range(3))
    with pytest.raises(ValueError, match="cannot be copied for the check: 'numbers' of module 'trap', generator"):
        check_double_backward(model, x)
    numbers = model.trap.numbers
    del model.trap.numbers
    model.trap.register_forward_hook(lambda *_: next(numbers) and None)
    with pytest.raises(ValueError, match="the function .*lambda.* attached to module 'trap', holds .*generator"):
        check_double_backward(model, x)
    assert next(numbers) == 0
