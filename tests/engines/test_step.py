"""What SIBStep chooses, checks and schedules; its errors and warnings."""

import copy
import gc
import math
import pickle
import re
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from sib_ext import SIBStep, SpatialIBLoss
from sib_ext.functional import class_activation, vjp

from ..compare import assert_near
from ..samples import FIXED
from .networks import CLASSES, IMAGES, Network, Wrapped, as_tuple, per_sample, subtract_in_place
from .step_check import error, flat


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(IMAGES, 3, 12, 12, generator=generator)
    mask = torch.zeros(IMAGES, 1, 12, 12)
    mask[:, :, 3:8, 4:10] = 1
    return x, torch.arange(IMAGES) % CLASSES, mask


def loss_of(preset="balanced", **options):
    """Without chance, so that a step can be compared with another."""
    return SpatialIBLoss(preset, **FIXED | {"mask_source": "activation"} | options)


def step_of(model, criterion, layers=(), every=1, jitter=0, **options):
    """Of the layers that a test names, all terms in every step, without chance."""
    return SIBStep(model, criterion, layers, every=every, jitter=jitter, **options)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return flat(model)


# ---------------------------------------------------------------------------------------------------- layers


def test_layers_add_the_background_share_of_their_contribution(batch):
    """By hand, from the formula."""
    model, criterion = Network().double(), loss_of(feature_background=0.5)
    x, y, mask = batch[0].double(), *batch[1:]
    terms = step_of(model, criterion, ("body",)).terms(x, y, mask)
    kept = []
    handle = model.body.register_forward_hook(lambda m, i, o: kept.append(o))
    logits = model(x)
    handle.remove()
    field = class_activation(kept[0], vjp(logits, kept[0], y, criterion.seed))
    small = nn.functional.adaptive_avg_pool2d(mask, field.shape[2:])
    energy = field.square()
    share = ((1 - small) ** 2 * energy).sum((1, 2, 3)) / (((1 - small) ** 2 + small**2) * energy).sum((1, 2, 3))
    assert_near(terms.background["body"], share.mean(), 1e-6)


def test_the_last_feature_map_is_found_in_the_first_step(batch):
    model = Network()
    step = step_of(model, loss_of(), "auto")
    assert step.layers == ()
    terms = step.terms(*batch)
    assert step.layers == tuple(terms.background)[1:] == ("body",) and model.training
    named = step_of(copy.deepcopy(model), loss_of(), ("body",)).terms(*batch)
    assert_near(terms.background["body"], named.background["body"], 1e-6)


def test_a_network_without_a_feature_map_has_the_input_term_alone_and_says_so_once(batch):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, CLASSES))
    step = step_of(flat, loss_of(), "auto")
    with pytest.warns(UserWarning, match="layers="):
        assert list(step.terms(*batch).background) == ["input"] and step.layers == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*batch)


@pytest.mark.parametrize(
    "criterion", [loss_of("paper"), loss_of(feature_background=0)], ids=["paper", "no layer weight"]
)
def test_no_layer_is_looked_for_where_none_has_a_term(criterion, batch):
    assert list(step_of(Network(), criterion, "auto").terms(*batch).background) == ["input"]


def test_a_resumed_training_has_the_layers_that_were_found(batch):
    step = step_of(Network(), loss_of(), "auto")
    step(*batch)
    resumed = step_of(Network(), loss_of(), "auto")
    resumed.load_state_dict(pickle.loads(pickle.dumps(step.state_dict())))
    assert resumed.layers == ("body",)


# ------------------------------------------------------------------------------------------------- schedule


def test_every_kth_step_has_terms_k_times_as_strong(batch):
    model, criterion = Network(norm=per_sample), loss_of()
    step, full = step_of(model, criterion, every=3), step_of(model, criterion)
    terms = full.terms(*batch)
    found = [step.terms(*batch) for _ in range(7)]
    assert ["input" in t.background for t in found] == [True, False, False, True, False, False, True]
    assert_near(found[0].loss - terms.cross_entropy, 3 * (terms.loss - terms.cross_entropy), 1e-5)
    assert_near(found[1].loss, terms.cross_entropy, 1e-6)
    total = sum(gradient(model, step(*batch)) for _ in range(3))
    assert error(total, 3 * gradient(model, full(*batch))) < 1e-5


def test_feature_maps_have_their_terms_in_every_step(batch):
    """And in those of the input, too, once as strong."""
    criterion = loss_of(feature_foreground=0.5)
    step = step_of(Network(norm=per_sample), criterion, "auto", every=2)
    first, second = step.terms(*batch), step.terms(*batch)
    assert list(first.background) == ["input", "body"] and first.vjp is not None
    assert list(second.background) == list(second.foreground) == ["body"] and second.vjp is None
    assert_near(second.background["body"], first.background["body"], 1e-6)
    of_features = 1.5 * second.background["body"] - 0.5 * second.foreground["body"]
    assert_near(second.loss, second.cross_entropy + of_features, 1e-6)
    of_input = first.background["input"] - 0.1 * first.foreground["input"]
    assert_near(first.loss, second.loss + 2 * of_input, 1e-5)


def test_a_step_between_is_that_of_a_loss_without_terms_for_the_input(batch):
    model = Network(norm=per_sample)
    step = step_of(model, loss_of(feature_foreground=0.5), "auto", every=4)
    step(*batch)
    alone = step_of(model, loss_of(feature_foreground=0.5, input_background=0, input_foreground=0), "auto")
    assert error(gradient(model, step(*batch)), gradient(model, alone(*batch))) < 1e-6


@pytest.mark.parametrize(
    ("preset", "every", "jitter"), [("balanced", 4, 0.25), ("fine_tuning", 4, 0.0), ("paper", 1, 0.0)]
)
def test_the_schedule_is_the_presets(preset, every, jitter):
    step = SIBStep(Network(), SpatialIBLoss(preset))
    assert (step.every, step.jitter) == (every, jitter)
    assert f"every={every}" in repr(step)


class Seen(Network):
    def forward(self, x):
        self.images = x.detach()
        return super().forward(x)


def test_jitter_moves_the_images_of_steps_with_terms_for_the_input_alone(batch):
    x = batch[0] * torch.tensor([1.0, 2, 3, 4, 5, 6])[: len(batch[0]), None, None, None]
    model = Seen()
    step = step_of(model, loss_of(), every=2, jitter=0.25)
    before = x.clone()
    strengths = []
    for number in range(40):
        step(x, *batch[1:])
        noise = model.images - x
        if number % 2:
            assert not noise.any()
        else:
            span = x.amax((1, 2, 3)) - x.amin((1, 2, 3))
            strengths.append(noise.flatten(1).std(1) / span)
    assert torch.equal(x, before)
    strengths = torch.stack(strengths)
    assert strengths.max() < 0.25 * 1.15 and strengths.min() < 0.05
    assert 0.09 < strengths.mean() < 0.16  # uniform from 0 to 0.25, an image each
    assert (strengths.std(0) > 0.03).all() and (strengths.std(1) > 0.01).all()


def test_jitter_is_drawn_from_torchs_generator(batch):
    def images_of():
        model = Seen()
        torch.manual_seed(3)
        step_of(model, loss_of(), jitter=0.25)(*batch)
        return model.images

    assert torch.equal(images_of(), images_of())


def test_jitter_is_the_same_for_images_that_are_channels_last(batch):
    seen = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, x = Seen(), batch[0].contiguous(memory_format=memory_format)
        torch.manual_seed(3)
        step_of(model, loss_of(), jitter=0.25)(x, *batch[1:])
        seen.append(model.images)
    assert torch.equal(*seen)
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


def test_where_nothing_is_left_of_the_loss_it_is_refused(batch):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, CLASSES))
    step = step_of(flat, loss_of(input_background=0, input_foreground=0), "auto")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="nothing is left of the S-IB loss"):
        step(*batch)
    alone = loss_of(input_background=0, input_foreground=0)
    for again in (step, step_of(Network(), alone, ())):  # a second time, and where no layer is wanted
        with pytest.raises(ValueError, match="nothing is left of the S-IB loss"):
            again(*batch)


def test_the_state_of_a_step_without_layers_does_not_end_the_search(batch):
    step = step_of(Network(), loss_of(), "auto")
    step.load_state_dict(step_of(Network(), loss_of("paper")).state_dict())
    assert "body" in step.terms(*batch).background


def test_a_step_that_failed_is_still_due(batch):
    x, y, mask = batch
    step = step_of(Network(), loss_of(), every=4)
    with pytest.raises(ValueError, match="target must lie in"):
        step(x, y + CLASSES, mask)
    assert "input" in step.terms(*batch).background and "input" not in step.terms(*batch).background


def test_feature_weights_may_fall_to_zero_in_a_training(batch):
    step = step_of(Network(), loss_of(), "auto")
    assert "body" in step.terms(*batch).background
    step.criterion.feature_background = 0.0
    assert list(step.terms(*batch).background) == ["input"]


@pytest.mark.parametrize("layers", [3, None, ["body", 3], {"body"}], ids=str)
def test_layers_that_are_no_names_are_refused(layers):
    with pytest.raises(ValueError, match="layers must be 'auto', the name of a module or a sequence of names, got"):
        step_of(Network(), loss_of(), layers)


def test_feature_weights_that_are_raised_in_a_training_find_their_map(batch):
    step = step_of(Network(), loss_of(feature_background=0), "auto")
    assert list(step.terms(*batch).background) == ["input"]
    step.criterion.feature_background = 0.5
    assert "body" in step.terms(*batch).background and step.layers == ("body",)


@pytest.mark.parametrize("resumed", [False, True])
def test_feature_weights_that_are_raised_in_a_compiled_training_are_refused(resumed, batch):
    step = step_of(Network(), loss_of(feature_background=0), "auto", engine="compiled")
    if resumed:
        step.load_state_dict({"steps": 3, "layers": ("body",), "finds_layers": False})
    step.criterion.feature_background = 0.5
    with pytest.raises(ValueError, match="engine='compiled' takes no layers"):
        step(*batch)


def test_a_place_of_the_inputs_name_is_refused(batch):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.head = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.head(self.input(x).mean((2, 3)))

    with pytest.raises(ValueError, match="named 'input'.*wrap"):
        step_of(Named(), loss_of(), "auto")(*batch)
    terms = step_of(nn.Sequential(Named()), loss_of(), "auto").terms(*batch)
    assert list(terms.background) == ["input", "0.input"]


@pytest.mark.parametrize("layers", ["auto", ("body",)])
def test_masks_of_the_inputs_vjp_need_it_in_every_step(layers):
    with pytest.raises(ValueError, match="mask_source='vjp'.*every=4.*take mask_source='activation' or every=1"):
        step_of(Network(), loss_of(mask_source="vjp"), layers, every=4)


@pytest.mark.parametrize("jitter", [-0.1, math.nan, "much"])
def test_a_jitter_out_of_range_is_refused(jitter):
    with pytest.raises(ValueError, match="jitter must be a finite number >= 0"):
        step_of(Network(), loss_of(), jitter=jitter)


def test_the_place_in_the_cycle_survives_a_checkpoint(batch):
    step = step_of(Network(), loss_of(), every=3)
    step(*batch)
    resumed = step_of(Network(), loss_of(), every=3)
    resumed.load_state_dict(pickle.loads(pickle.dumps(step.state_dict())))
    assert ["input" not in resumed.terms(*batch).background for _ in range(3)] == [True, True, False]


def test_without_terms_it_is_cross_entropy(batch):
    terms = step_of(Network(), loss_of(input_background=0, input_foreground=0, feature_background=0)).terms(*batch)
    assert terms.vjp is None and torch.equal(terms.loss, terms.cross_entropy)
    terms.loss.backward()


@pytest.mark.parametrize("options", [{}, {"microbatch": IMAGES}], ids=str)
def test_one_draw_of_a_random_seed_serves_the_whole_step(options, batch):
    """The balanced preset as it is, self-made masks included: all its passes look at the same logits."""
    x, y, mask = batch[0].double(), *batch[1:]
    known, model = torch.arange(IMAGES) < 2, Network(dropout=0.3).double()
    found = []
    for chosen in ({}, options):
        torch.manual_seed(3)
        copied = copy.deepcopy(model)
        terms = SIBStep(copied, SpatialIBLoss(window=3), **chosen).terms(x, y, mask, known)
        found.append((terms.loss.detach(), gradient(copied, terms.loss)))
    assert_near(found[1][0], found[0][0], 1e-12)
    assert error(found[1][1], found[0][1]) < 1e-11


# ------------------------------------------------------------------------------------------ a good guest


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_a_learned_mask_gets_its_gradient(options, batch):
    """As with any loss: what made the mask may be trained by it."""
    x, y, mask = batch[0].double(), batch[1], batch[2].double()
    criterion, found = loss_of(), []
    for chosen in ({}, options):
        soft = (0.8 * mask + 0.1).requires_grad_()
        torch.manual_seed(0)
        step_of(Network(norm=per_sample).double(), criterion, ("body",), **chosen)(x, y, soft).backward()
        found.append(soft.grad)
    assert found[0].any() and error(found[1], found[0]) < 1e-11


class Attached(Network):
    """A parameter with an attribute of the user's."""

    def __init__(self):
        super().__init__()
        self.head.weight.gain = 0.7

    def forward(self, x):
        h = self.body(self.stem(x)).mean((2, 3))
        return nn.functional.linear(h, self.head.weight * self.head.weight.gain, self.head.bias)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_what_users_attach_to_a_parameter_is_there_in_every_pass(options, batch):
    model = Attached()
    step_of(model, loss_of(), "auto", **options)(*batch).backward()
    assert model.head.weight.gain == 0.7 and model.head.weight.grad.any()


def test_state_that_changes_the_gradient_alone_is_refused_in_parts(batch):
    """The logits of both runs are the same, and their VJPs are not."""
    passes = []

    def scaled(h):
        passes.append(1)
        factor = len(passes)
        h.register_hook(lambda g: g * factor)
        return h

    loss = step_of(Wrapped(middle=scaled), loss_of(), microbatch=3)(*batch)
    with pytest.raises(RuntimeError, match="or another VJP"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_generator_of_the_models_own_is_refused_in_parts(dtype, batch):
    generator = torch.Generator().manual_seed(1)

    def dropped(h):
        return h * (torch.rand(h.shape, generator=generator) > 0.1)

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = step_of(Wrapped(middle=dropped), loss_of(), microbatch=3)(*batch)
    with pytest.raises(RuntimeError, match="microbatch: the model gave other logits"):
        loss.backward()


def test_parts_hold_in_steps_without_terms_too(batch):
    sizes, model = [], Network(norm=per_sample)
    model.head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    step = step_of(model, loss_of(), microbatch=2, every=2)
    step(*batch).backward()
    del sizes[:]
    found = gradient(model, step(*batch))
    assert set(sizes) == {2}
    assert error(found, gradient(model, nn.functional.cross_entropy(model(batch[0]), batch[1]))) < 1e-5


def test_a_parameter_reached_past_the_modules_is_refused_in_parts(batch):
    class Aliased(Network):
        def __init__(self):
            super().__init__()
            self.weights = [self.head.weight]

        def forward(self, x):
            return nn.functional.linear(self.body(self.stem(x)).mean((2, 3)), self.weights[0], self.head.bias)

    loss = step_of(Aliased(), loss_of(), microbatch=2)(*batch)
    with pytest.raises(RuntimeError, match="reaches a parameter past its modules"):
        loss.backward()


def test_a_float16_step_that_overflows_in_parts_is_the_scalers_affair(batch):
    model = Network()
    with torch.no_grad():
        model.head.weight.mul_(1e30)
    with torch.autocast("cpu", torch.float16):
        loss = step_of(model, loss_of(), microbatch=2, scaler=torch.amp.GradScaler("cpu"))(*batch)
    loss.backward()


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"every": 2}], ids=str)
def test_a_model_may_write_into_its_input(options, batch):
    x, y, mask = batch
    before = x.clone()
    step = step_of(Wrapped(before=subtract_in_place), loss_of(), "auto", **options)
    for _ in range(2):
        step(x, y, mask).backward()
        assert torch.equal(x, before)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_the_model_is_left_as_it_was_even_after_an_error(options, batch):
    model = Network()
    step = step_of(model, loss_of(), ("body",), **options)

    def traces():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())

    names = list(vars(model.stem))
    with pytest.raises((RuntimeError, ValueError)):
        step(batch[0][:, :2], batch[1])
    assert traces() == 0 and list(vars(model.stem)) == names
    step(*batch).backward()
    assert traces() == 0


def test_two_trainings_in_two_threads_do_not_disturb_each_other(batch, threads):
    """Nor what comes after them: nothing of a step is the process's. (A study with two jobs.)"""
    threads(1)

    def made():
        torch.manual_seed(0)
        return step_of(Network(norm=per_sample), loss_of(), ("body",))

    def run(step, steps=1):
        for _ in range(steps):
            last = gradient(step.model, step(*batch))
        found.append(last)

    found, steps, interval = [], [made() for _ in range(4)], sys.getswitchinterval()
    run(steps[0])
    sys.setswitchinterval(1e-5)  # threads change often, as on a busy machine
    try:
        work = [threading.Thread(target=run, args=(step, 60)) for step in steps[1:3]]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    run(steps[3])
    assert len(found) == 4
    for later in found[1:]:
        assert error(later, found[0]) < 1e-5


def test_a_training_does_not_grow(batch):
    """The tensors alive after a step are those alive after the steps before."""
    for options in ({}, {"microbatch": 2}):
        model = Network()
        step = step_of(model, loss_of(), ("body",), **options)
        counts = []
        for _ in range(4):
            gradient(model, step(*batch))
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        assert counts[-1] == counts[-2] == counts[1], options


@pytest.mark.slow
def test_a_thousand_steps_do_not_grow(batch):
    """The resident memory of the process, for every engine that runs without a compiler."""

    def resident():
        gc.collect()
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    for options in ({}, {"microbatch": 3}, {"every": 4}):
        model = Network()
        step = step_of(model, loss_of(), ("body",), **options)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for count in range(1000):
            optimizer.zero_grad()
            step(*batch).backward()
            optimizer.step()
            if count == 199:
                before = resident()
        assert resident() - before < 8, options  # MB


# ------------------------------------------------------------------------------------------------- choices


def test_auto_says_what_it_chose_and_why():
    model = Network()
    assert step_of(model, loss_of()).engine == "double_backward"
    compiled = torch.compile(model, backend="aot_eager")
    step = step_of(compiled, loss_of())
    assert step.engine == "compiled" and "torch.compile" in step.info
    step = step_of(compiled, loss_of(), ("body",))
    assert step.engine == "double_backward" and "layers" in step.info
    assert "because layers needs it" in step_of(compiled, loss_of(), "auto").info
    assert SIBStep(compiled, loss_of(), layers=()).engine == "compiled"
    with pytest.raises(ValueError, match=r"takes no layers \(give layers=\(\) for none\)"):
        step_of(compiled, loss_of(), "auto", engine="compiled")


@pytest.mark.parametrize("where", [None, "body"])
def test_a_model_compiled_in_place_is_refused_with_the_way_out(where):
    model = Network()
    (model if where is None else getattr(model, where)).compile(backend="aot_eager")
    with pytest.raises(ValueError, match=f"model.compile\\(\\) was called on {'its module' if where else 'the model'}"):
        step_of(model, loss_of(), ("body",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "magic"}, "engine is 'magic'; choose one of 'auto', 'double_backward', 'compiled'"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"microbatch": 1.5}, "microbatch must be an integer >= 1, got 1.5"),
        ({"layers": ("nowhere",)}, "layers: the model has no module 'nowhere'; it has stem"),
        ({"output": "logits"}, "output must be None or a function"),
        ({"engine": "compiled", "layers": ("body",)}, "engine='compiled' takes no layers"),
        ({"engine": "compiled", "microbatch": 2}, "engine='compiled' takes no microbatch"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        step_of(Network(), loss_of(), **options)


def test_wrong_objects_are_named():
    with pytest.raises(ValueError, match="model must be a torch.nn.Module, got function"):
        step_of(lambda x: x, loss_of())
    with pytest.raises(ValueError, match="criterion must be a sib_ext.SpatialIBLoss, got CrossEntropyLoss"):
        step_of(Network(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="layers were given, but.*no term for them.*feature_background=0"):
        step_of(Network(), loss_of(feature_background=0), ("body",))


def test_wrong_calls_are_named(batch):
    x, y, mask = batch
    step = step_of(Network(), loss_of())
    with pytest.raises(ValueError, match="x must be"):
        step(x[0], y)
    with pytest.raises(ValueError, match="target must lie in"):
        step(x, y + 3)
    with pytest.raises(ValueError, match="mask must be"):
        step(x, y, mask[:2])
    with pytest.raises(ValueError, match="annotated was given without mask"):
        step(x, y, annotated=torch.ones(IMAGES, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="switched off"), torch.no_grad():
        step(x, y)
    with pytest.raises(ValueError, match=r"'head' must be a feature map"):
        step_of(Network(), loss_of(), ("head",))(x, y)


# ------------------------------------------------------------------------ models that cannot, and what they hear


class Odd(Network):
    """A forward pass of its own."""

    def __init__(self, run):
        super().__init__()
        self.extra, self.run = nn.Conv2d(8, 8, 3), run

    def forward(self, x):
        return self.run(self, x)


def under_no_grad(net, x):
    with torch.no_grad():
        h = net.body(net.stem(x))
    return net.head(h.mean((2, 3)))


def a_copy_of_x(net, x):
    return Network.forward(net, x.detach())


def everything_detached(net, x):
    return Network.forward(net, x).detach()


def as_an_object(net, x):
    return object()


@pytest.mark.parametrize(
    ("run", "layers", "kind", "message"),
    [
        (under_no_grad, (), RuntimeError, "do not depend on 'x' in a differentiable way: look for torch.no_grad"),
        (under_no_grad, ("body",), RuntimeError, "output of 'body' does not depend on x in a differentiable way"),
        (a_copy_of_x, (), RuntimeError, "do not depend on 'x' in a differentiable way"),
        (everything_detached, (), RuntimeError, "do not require grad"),
        (as_an_object, (), ValueError, "the model returned object with no logits in it: give output="),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_a_model_that_cannot_be_trained_is_told_why(run, layers, kind, message, options, batch):
    with pytest.raises(kind, match=re.escape(message) if kind is RuntimeError else message):
        step_of(Odd(run), loss_of(), layers, **options)(*batch[:2])


def test_a_model_with_a_second_input_is_told_so(batch):
    class Second(Network):
        def forward(self, x, meta):
            return super().forward(x)

    with pytest.raises(TypeError, match="cannot be called with the images alone.*meta"):
        step_of(Second(), loss_of())(*batch)


def test_the_loss_alone_takes_logits_and_says_so_of_anything_else(batch):
    x, y, mask = batch[0].requires_grad_(), *batch[1:]
    model = Wrapped(after=as_tuple)
    with pytest.raises(ValueError, match="logits must be a tensor, got tuple"):
        loss_of()(model(x), y, x, mask)
    loss_of()(model(x)[0], y, x, mask).backward()


def test_a_once_differentiable_function_is_an_error_in_every_engine(batch):
    class Swish(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x.sigmoid()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            s = ctx.saved_tensors[0].sigmoid()
            return g * s * (1 + ctx.saved_tensors[0] * (1 - s))

    for options in ({}, {"microbatch": 2}):
        loss = step_of(Wrapped(middle=Swish.apply), loss_of(), **options)(*batch)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            loss.backward()


def test_a_loss_that_is_not_finite_leaves_the_guard_watching(batch):
    """A GradScaler that looks for its scale begins with such a step."""
    model, criterion = Network(), loss_of()
    step = step_of(model, criterion, scaler=torch.amp.GradScaler("cpu"))
    with torch.no_grad():
        model.head.weight.mul_(1e30)
    with torch.autocast("cpu", torch.float16):
        assert not step(*batch).isfinite()
    with torch.no_grad():
        model.head.weight.mul_(1e-30)
    step(*batch)
    cross_entropy, of_input, of_features, empty = criterion.guard.means
    assert cross_entropy.isfinite() and of_input.isfinite() and of_features.isnan() and empty == 0
