"""Every engine of SIBStep against the plain loss in float64, and everything a training loop asks of it."""

import copy
import functools
import gc
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from sib_ext import SIBStep, SpatialIBLoss, fused_double_backward
from sib_ext.functional import class_activation, vjp

from .compare import assert_near, relative_error
from .samples import FIXED

IMAGES, CLASSES = 6, 5


class Network(nn.Module):
    """BatchNorm and GroupNorm, dropout if wanted, a feature map by name."""

    def __init__(self, activation=nn.SiLU, dropout: float = 0.0, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), activation())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1), nn.GroupNorm(2, 8), activation())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.dropout(self.body(self.stem(x)).mean((2, 3))))


class Tokens(nn.Module):
    """A tiny vision transformer with a class token."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
        self.blocks = nn.Sequential(layer, copy.deepcopy(layer))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        tokens = self.norm(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)))
        return self.head(tokens[:, 0])


def per_sample(channels):
    return nn.GroupNorm(2, channels)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(IMAGES, 3, 12, 12, generator=generator)
    mask = torch.zeros(IMAGES, 1, 12, 12)
    mask[:, :, 3:8, 4:10] = 1
    return x, torch.arange(IMAGES) % CLASSES, mask


def gradients(model, loss):
    """d loss, for every parameter, by backward."""
    model.zero_grad()
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def error(grads, truths):
    flat = [torch.cat([g.double().flatten() for g in side]) for side in (grads, truths)]
    return relative_error(*flat)


def loss_of(preset="balanced", **options):
    """Without chance, so that a step can be compared with another."""
    return SpatialIBLoss(preset, **FIXED | options)


def step_of(model, criterion, layers=(), **options):
    """Of the layers that a test names."""
    return SIBStep(model, criterion, layers, **options)


def plainly(model, criterion, batch, layers=()):
    """The loss by its definition in float64, with ordinary autograd: no engine, no fused layer."""
    model = copy.deepcopy(model).double()
    x, y, mask = (t.double() if t.is_floating_point() else t for t in batch)
    x.requires_grad_()
    kept = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: kept.update({name: o}))
        for name in layers
    ]
    logits = model(x)
    for handle in handles:
        handle.remove()
    loss = criterion(logits, y, x, mask)
    for features in kept.values():
        field = class_activation(features, vjp(logits, features, y, criterion.seed))
        small = nn.functional.adaptive_avg_pool2d(mask, field.shape[2:])
        energy = field.square()
        share = ((1 - small) ** 2 * energy).sum((1, 2, 3)) / (((1 - small) ** 2 + small**2) * energy).sum((1, 2, 3))
        loss = loss + criterion.layer_weight * criterion.background_weight * share.mean()
    return loss.detach(), gradients(model, loss)


@pytest.fixture
def eager_compile(monkeypatch):
    """torch.compile without its code generator: seconds instead of a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


EXACT = {
    "double_backward": {},
    "compiled": {"engine": "compiled"},
    "microbatch of everything": {"microbatch": IMAGES},
    "recompute": {"recompute": ("stem", "body.1")},
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_exact_engine_has_the_loss_and_the_gradients_of_the_plain_loss(name, dtype, batch, eager_compile):
    model, criterion = Network(nn.ReLU).to(dtype), loss_of()
    loss, truths = plainly(model, criterion, batch)
    x, y, mask = batch[0].to(dtype), batch[1], batch[2]
    terms = step_of(model, criterion, **EXACT[name]).terms(x, y, mask)
    grads = gradients(model, terms.loss)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_near(terms.loss, loss, tolerance)
    assert error(grads, truths) < tolerance
    assert not x.requires_grad


@pytest.mark.parametrize("options", [{}, {"microbatch": IMAGES}, {"recompute": ("stem",)}], ids=str)
def test_layers_add_the_background_share_of_their_contribution(options, batch):
    model, criterion = Network().double(), loss_of(layer_weight=0.5)
    loss, truths = plainly(model, criterion, batch, ("stem", "body"))
    x, y, mask = batch[0].double(), *batch[1:]
    terms = step_of(model, criterion, ("stem", "body"), **options).terms(x, y, mask)
    assert_near(terms.loss, loss, 1e-12)
    assert error(gradients(model, terms.loss), truths) < 1e-11
    assert set(terms.layers) == {"stem", "body"} and all(0 < v < 1 for v in terms.layers.values())


def test_the_tokens_of_a_transformer_are_a_layer(batch):
    """Attention in train mode has no second derivative in its fused kernels: the engine takes the math one."""
    model = Tokens()
    x, y, mask = batch
    step = step_of(model, loss_of(), ("blocks.0",))
    terms = step.terms(x, y, mask)
    grads = gradients(model, terms.loss)
    assert 0 < terms.layers["blocks.0"] < 1 and all(g.isfinite().all() and g.any() for g in grads[:2])


@pytest.mark.parametrize("layers", [(), ("stem",), ("body",)], ids=str)
def test_finite_differences_are_near_on_a_smooth_network(layers, batch):
    model, criterion = Network(), loss_of()
    _, truths = plainly(model, criterion, batch, layers)
    step = step_of(model, criterion, layers, engine="finite_difference")
    loss = step(*batch)
    assert error(gradients(model, loss), truths) < 2e-3
    assert step.error < 1e-3


def test_finite_differences_in_float64_converge(batch):
    model, criterion = Network().double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    _, truths = plainly(model, criterion, batch)
    step = step_of(model, criterion, engine="finite_difference")
    assert error(gradients(model, step(x, y, mask)), truths) < 1e-6


def test_finite_differences_work_where_the_mask_follows_the_vjp(batch):
    """The paper's mask is not detached: u holds what flows through it, too."""
    x, y, _ = batch
    criterion = loss_of("paper", background_weight=1e5, foreground_weight=1.0, transform="expm1")
    model = Network()
    double = copy.deepcopy(model).double()
    truths = gradients(double, step_of(double, criterion)(x.double(), y))
    grads = gradients(model, step_of(model, criterion, engine="finite_difference")(x, y))
    assert error(grads, truths) < 1e-2


def test_finite_differences_refuse_kinks_unless_forced(batch):
    model = Network(nn.ReLU)
    with pytest.raises(ValueError, match="kinks.*stem.2.*force=True"):
        step_of(model, loss_of(), engine="finite_difference")
    step = step_of(model, loss_of(), engine="finite_difference", force=True)
    assert step(*batch).isfinite()


def test_kinks_that_are_no_modules_are_met_in_the_first_step(batch):
    class Hidden(nn.Module):
        def forward(self, x):
            return torch.relu(x)

    step = step_of(Network(Hidden), loss_of(), engine="finite_difference")
    with pytest.raises(ValueError, match="kinks"):
        step(*batch)


def test_inaccurate_finite_differences_are_called_so(batch):
    class Wavy(nn.Module):
        def forward(self, x):
            return torch.sin(1e7 * x)

    model = nn.Sequential(Wavy(), Network())
    with pytest.warns(UserWarning, match="inaccurate"):
        step_of(model, loss_of(), engine="finite_difference")(*batch)


@pytest.mark.parametrize("engine", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_microbatches_give_the_gradients_of_the_whole_batch(engine, microbatch, batch):
    """With a network that normalises each sample by itself the cut must not show, not even in CKA."""
    model, criterion = Network(norm=per_sample).double(), loss_of(foreground_weight=1.0)
    x, y, mask = batch[0].double(), *batch[1:]
    loss, truths = plainly(model, criterion, batch, ("body",))
    terms = step_of(model, criterion, ("body",), engine=engine, microbatch=microbatch).terms(x, y, mask)
    assert_near(terms.loss, loss, 1e-12)
    assert error(gradients(model, terms.loss), truths) < (1e-11 if engine == "double_backward" else 1e-5)


def test_microbatches_weigh_classes_as_the_whole_batch(batch):
    weight = torch.rand(CLASSES, dtype=torch.float64)
    model, criterion = Network(norm=per_sample).double(), loss_of(weight=weight)
    x, y, mask = batch[0].double(), *batch[1:]
    loss, truths = plainly(model, criterion, batch)
    found = step_of(model, criterion, microbatch=4)(x, y, mask)
    assert_near(found, loss, 1e-12)
    assert error(gradients(model, found), truths) < 1e-11


@pytest.mark.parametrize(
    ("engine", "momentum"),
    # torch.compile itself does not take momentum=None in train mode.
    [("double_backward", 0.1), ("double_backward", None), ("finite_difference", 0.1), ("compiled", 0.1)],
)
def test_running_statistics_see_the_batch_once(engine, momentum, batch, eager_compile):
    model = Network(norm=functools.partial(nn.BatchNorm2d, momentum=momentum))
    expected = copy.deepcopy(model)
    for _ in range(2):
        expected(batch[0])
    step = step_of(model, loss_of(), engine=engine)
    for _ in range(2):
        step(*batch).backward()
    for (name, buffer), truth in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, truth, msg=name)
    assert model.stem[1].track_running_stats


@pytest.mark.parametrize("options", [{"microbatch": 2}, {"engine": "finite_difference"}], ids=str)
def test_two_phases_drop_out_the_same_units(options, batch):
    """Otherwise R of the first phase would not be the R of the second."""
    model, criterion = Network(dropout=0.5, norm=per_sample).double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    parts = {"microbatch": IMAGES} | options
    torch.manual_seed(11)
    loss = step_of(model, criterion, **(parts if "engine" not in options else options))(x, y, mask)
    grads = gradients(model, loss)
    after = torch.rand(1)

    # The same draws, part by part, in one pass.
    torch.manual_seed(11)
    masks = [torch.nn.functional.dropout(torch.ones(n, 8, dtype=x.dtype), 0.5) for n in sizes(options)]
    assert torch.equal(after, torch.rand(1))
    model.dropout = Fixed(torch.cat(masks))
    exact = step_of(model, criterion)(x, y, mask)
    assert_near(loss, exact, 1e-12)
    assert error(grads, gradients(model, exact)) < 1e-5


def sizes(options):
    return [options["microbatch"]] * (IMAGES // options["microbatch"]) if "microbatch" in options else [IMAGES]


class Fixed(nn.Module):
    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def forward(self, x):
        return x * self.factors


# ------------------------------------------------------------------------------------------------- knobs


def test_every_kth_step_has_terms_k_times_as_strong(batch):
    model, criterion = Network(norm=per_sample), loss_of()
    step, full = step_of(model, criterion, every=3), step_of(model, criterion)
    terms = full.terms(*batch)
    found = [step.terms(*batch) for _ in range(7)]
    assert [t.background is not None for t in found] == [True, False, False, True, False, False, True]
    assert_near(found[0].loss - terms.cross_entropy, 3 * (terms.loss - terms.cross_entropy), 1e-5)
    assert_near(found[1].loss, terms.cross_entropy, 1e-6)
    total = [
        sum(g) for g in zip(*(gradients(model, t.loss) for t in (step.terms(*batch) for _ in range(3))), strict=True)
    ]
    triple = [3 * g for g in gradients(model, full(*batch))]
    assert error(total, triple) < 1e-5


def test_the_place_in_the_cycle_survives_a_checkpoint(batch):
    model = Network()
    step = step_of(model, loss_of(), every=3, engine="finite_difference")
    step(*batch)
    state = pickle.loads(pickle.dumps(step.state_dict()))
    resumed = step_of(model, loss_of(), every=3, engine="finite_difference")
    resumed.load_state_dict(state)
    assert [resumed.terms(*batch).background is None for _ in range(3)] == [True, True, False]


def test_a_share_of_the_batch_gets_terms_and_all_of_it_cross_entropy(batch):
    model, criterion = Network(norm=per_sample).double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    torch.manual_seed(3)
    terms = step_of(model, criterion, share=0.5).terms(x, y, mask)
    grads = gradients(model, terms.loss)
    torch.manual_seed(3)
    rows = torch.randperm(IMAGES)[:3]
    assert_near(terms.cross_entropy, criterion.cross_entropy(model(x), y), 1e-12)
    of_rows = step_of(model, criterion).terms(x[rows], y[rows], mask[rows])
    truth = criterion.cross_entropy(model(x), y) + (of_rows.loss - of_rows.cross_entropy)
    assert_near(terms.loss, truth, 1e-12)
    assert error(grads, gradients(model, truth)) < 1e-11

    torch.manual_seed(3)
    cut = step_of(model, criterion, share=0.5, microbatch=2)(x, y, mask)
    assert_near(cut, truth, 1e-12)
    assert error(gradients(model, cut), gradients(model, SIBStepAgain(model, criterion, rows)(x, y, mask))) < 1e-11


class SIBStepAgain:
    """The loss of some rows' terms and all rows' cross-entropy, in plain words."""

    def __init__(self, model, criterion, rows):
        self.model, self.criterion, self.rows = model, criterion, rows

    def __call__(self, x, y, mask):
        part = x[self.rows].clone().requires_grad_()
        terms = self.criterion.terms(self.model(part), y[self.rows], part, mask[self.rows])
        return self.criterion.cross_entropy(self.model(x), y) + terms.loss - terms.cross_entropy


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"engine": "finite_difference"}], ids=str)
def test_a_grad_scaler_changes_nothing_but_the_scale(options, batch):
    model, criterion = Network(norm=per_sample).double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss, truths = plainly(model, criterion, batch)
    scaled = step_of(model, criterion, scaler=scaler, **options)(x, y, mask)
    grads = gradients(model, scaler.scale(scaled))
    assert_near(scaled, loss, 1e-12)
    assert error([g / 1024 for g in grads], truths) < (1e-6 if "engine" in options else 1e-11)


def test_a_scaled_vjp_does_not_underflow_in_float16(batch):
    """R of 1e-9 an element is zero in float16; scaled by 2^15 it is not."""
    model = Network(norm=per_sample)
    with torch.no_grad():
        model.head.weight.mul_(1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    with torch.autocast("cpu", torch.float16):
        lost = step_of(model, loss_of()).terms(*batch).vjp
        kept = step_of(model, loss_of(), scaler=scaler).terms(*batch).vjp
    exact = step_of(model, loss_of()).terms(*batch).vjp
    assert relative_error(kept, exact) < 0.1 < relative_error(lost, exact)


@pytest.mark.parametrize("engine", ["double_backward", "finite_difference"])
def test_bfloat16_autocast_is_near(engine, batch):
    model, criterion = Network(norm=per_sample), loss_of()
    _, truths = plainly(model, criterion, batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = step_of(model, criterion, engine=engine).terms(*batch)
    assert terms.vjp.dtype == terms.background.dtype == torch.float32
    assert error(gradients(model, terms.loss), truths) < (0.1 if engine == "double_backward" else 0.6)


def test_channels_last_is_the_same(batch):
    model, criterion = Network().double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    _, truths = plainly(model, criterion, batch)
    model.to(memory_format=torch.channels_last)
    loss = step_of(model, criterion)(x.to(memory_format=torch.channels_last), y, mask)
    assert error(gradients(model, loss), truths) < 1e-11


# ----------------------------------------------------------------------------------------- being a guest


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"recompute": ("stem",)}, {"engine": "finite_difference"}])
def test_the_model_is_left_as_it_was_even_after_an_error(options, batch):
    model = Network()
    step = step_of(model, loss_of(), ("body",), **options)

    def traces():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
        return hooks, [m for m in model.modules() if "forward" in vars(m)], model.stem[1].track_running_stats

    before = traces()
    step(*batch).backward()
    assert traces() == before
    with pytest.raises((RuntimeError, ValueError)):
        step(batch[0][:, :2], batch[1])
    assert traces() == before


def test_unused_and_frozen_parameters_have_no_gradient(batch):
    for options in ({}, {"microbatch": 2}, {"engine": "finite_difference"}):
        model = Network()
        model.unused = nn.Linear(2, 2)
        model.stem[0].weight.requires_grad_(False)
        gradients(model, step_of(model, loss_of(), **options)(*batch))
        assert model.unused.weight.grad is None and model.stem[0].weight.grad is None
        assert model.head.weight.grad is not None


def test_gradients_accumulate_and_scale_as_usual(batch):
    for options in ({}, {"microbatch": 2}):
        model = Network(norm=per_sample).double()
        x, y, mask = batch[0].double(), *batch[1:]
        step = step_of(model, loss_of(), **options)
        once = gradients(model, step(x, y, mask))
        model.zero_grad()
        for _ in range(2):
            (0.25 * step(x, y, mask)).backward()
        assert error([p.grad for p in model.parameters()], [0.5 * g for g in once]) < 1e-12


def test_a_second_backward_says_what_to_do(batch):
    loss = step_of(Network(), loss_of(), microbatch=2)(*batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


def test_a_training_does_not_grow(batch):
    """The tensors alive after a step are those alive after the steps before."""
    for options in ({}, {"microbatch": 2}, {"engine": "finite_difference"}, {"recompute": ("stem",)}):
        model = Network()
        step = step_of(model, loss_of(), ("body",), **options)
        counts = []
        for _ in range(4):
            gradients(model, step(*batch))
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        assert counts[-1] == counts[-2] == counts[1], options


@pytest.mark.slow
def test_a_thousand_steps_do_not_grow(batch):
    """The resident memory of the process, for every engine that runs without a compiler."""

    def resident():
        gc.collect()
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    for options in ({}, {"microbatch": 3}, {"engine": "finite_difference"}, {"every": 4, "share": 0.5}):
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


def test_without_terms_it_is_cross_entropy(batch):
    model = Network()
    step = step_of(model, loss_of(background_weight=0, foreground_weight=0))
    terms = step.terms(*batch)
    assert terms.vjp is None and torch.equal(terms.loss, terms.cross_entropy)
    terms.loss.backward()


def test_the_fused_context_alone_gives_the_same(batch):
    model, criterion = Network().double(), loss_of()
    x, y, mask = batch[0].double().requires_grad_(), *batch[1:]
    _, truths = plainly(model, criterion, batch)
    with fused_double_backward():
        logits = model(x)
    assert error(gradients(model, criterion(logits, y, x, mask)), truths) < 1e-11


# ------------------------------------------------------------------------------------------ engine choice


def test_auto_says_what_it_chose_and_why(eager_compile):
    model = Network()
    assert step_of(model, loss_of()).engine == "double_backward"
    compiled = torch.compile(model)
    step = step_of(compiled, loss_of())
    assert step.engine == "compiled" and "torch.compile" in step.info
    step = step_of(compiled, loss_of(), ("body",))
    assert step.engine == "double_backward" and "layers" in step.info


@pytest.mark.parametrize("options", [{}, {"layers": ("body",)}, {"engine": "finite_difference"}], ids=str)
def test_a_compiled_model_is_trained_all_the_same(options, batch, eager_compile):
    model, criterion = Network().double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    _, truths = plainly(model, criterion, batch, options.get("layers", ()))
    loss = step_of(torch.compile(model), criterion, **options)(x, y, mask)
    assert error(gradients(model, loss), truths) < (1e-5 if "engine" in options else 1e-11)


def test_a_smaller_last_batch_is_compiled_for_itself(batch, eager_compile):
    model, criterion = Network().double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    step = step_of(model, criterion, engine="compiled")
    for size in (IMAGES, 4, 3, IMAGES):
        loss = step(x[:size], y[:size], mask[:size])
        exact = step_of(copy.deepcopy(model), criterion)(x[:size], y[:size], mask[:size])
        assert_near(loss, exact, 1e-12)
        loss.backward()


def test_a_model_compiled_in_place_is_refused_with_the_way_out():
    model = Network()
    model.compile(backend="aot_eager")
    assert step_of(model, loss_of()).engine == "compiled"
    with pytest.raises(ValueError, match=r"torch.compile\(model\)"):
        step_of(model, loss_of(), ("body",))


@pytest.mark.slow
def test_the_compiled_engine_with_the_real_compiler(batch):
    model, criterion = Network(), loss_of()
    loss, truths = plainly(model, criterion, batch)
    step = step_of(model, criterion, engine="compiled")
    for _ in range(2):
        found = step(*batch)
    assert_near(found, loss, 1e-5)
    assert error(gradients(model, found), truths) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "magic"}, "engine is 'magic'"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"microbatch": 1.5}, "microbatch must be an integer >= 1, got 1.5"),
        ({"share": 0}, r"share must be a number in \(0,1\], got 0"),
        ({"layers": ("nowhere",)}, "layers: the model has no module 'nowhere'; it has stem"),
        ({"recompute": ("nowhere",)}, "recompute: the model has no module 'nowhere'"),
        ({"engine": "compiled", "layers": ("body",)}, "engine='compiled' takes no layers"),
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
    with pytest.raises(
        ValueError, match="layers were given, but the criterion has no term for them.*background_weight=0"
    ):
        step_of(Network(), loss_of(background_weight=0), ("body",))


# ---------------------------------------------------------------------------------------------- layers="auto"


def test_the_last_feature_map_is_found_in_the_first_step(batch):
    model, x = Network(), batch[0]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    step = SIBStep(model, loss_of())
    assert step.layers == ()
    terms = step.terms(*batch)
    assert step.layers == tuple(terms.layers) == ("body",) and model.training
    named = SIBStep(copy.deepcopy(model), loss_of(), ("body",)).terms(*batch)
    assert_near(terms.layers["body"], named.layers["body"], 1e-6)
    counted = [int(b) - int(before[n]) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counted == [1]  # looking for it left the running statistics alone
    assert len(x) == IMAGES


def test_a_network_without_a_feature_map_has_the_input_term_alone(batch):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, CLASSES))
    step = SIBStep(flat, loss_of())
    assert not step.terms(*batch).layers and step.layers == ()


@pytest.mark.parametrize("criterion", [loss_of("paper"), loss_of(layer_weight=0)], ids=["paper", "no layer weight"])
def test_no_layer_is_looked_for_where_none_has_a_term(criterion, batch):
    assert not SIBStep(Network(), criterion).terms(*batch).layers


def test_a_compiled_model_gets_layers_unless_they_are_left_out(batch, eager_compile):
    compiled = torch.compile(Network())
    assert "because layers needs it" in SIBStep(compiled, loss_of()).info
    assert SIBStep(compiled, loss_of(), layers=()).engine == "compiled"
    with pytest.raises(ValueError, match=r"takes no layers \(give layers=\(\) for none\)"):
        SIBStep(compiled, loss_of(), engine="compiled")


@pytest.mark.parametrize("options", [{}, {"microbatch": IMAGES}, {"engine": "finite_difference"}], ids=str)
def test_every_engine_takes_one_draw_of_a_random_seed_for_the_whole_step(options, batch):
    """The balanced preset as it is, self-made masks included: all its passes look at the same logits."""
    model = Network(dropout=0.3).double()
    x, y, mask = batch[0].double(), *batch[1:]
    known = torch.arange(IMAGES) < 2
    found = []
    for chosen in ({}, options):
        torch.manual_seed(3)
        copied = copy.deepcopy(model)
        terms = SIBStep(copied, SpatialIBLoss(window=3), **chosen).terms(x, y, mask, known)
        found.append((terms.loss.detach(), gradients(copied, terms.loss)))
    assert_near(found[1][0], found[0][0], 1e-12)
    assert error(found[1][1], found[0][1]) < (1e-4 if "engine" in options else 1e-11)


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


def test_a_model_that_cannot_be_differentiated_is_named(batch):
    class Rounding(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1) @ torch.ones(432, CLASSES)

    with pytest.raises(RuntimeError, match="do not require grad"):
        step_of(Rounding(), loss_of())(*batch[:2])
