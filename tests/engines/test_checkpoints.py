"""Models with checkpoints of their own: right, and at a checkpoint's memory."""

import copy
import functools
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from sib_ext import checkpoints

from .networks import CLASSES, CheckpointedNetwork, Network, Tokens, per_sample
from .step_check import check_step, fixed
from .test_every_step import batch as images
from .test_step import batch, gradient, loss_of, step_of  # noqa: F401


class Block(nn.Module):
    """Two inputs, one by keyword; a tuple comes out."""

    def __init__(self, norm=nn.BatchNorm2d, wrap=lambda m: m):
        super().__init__()
        self.net = nn.Sequential(wrap(nn.Conv2d(8, 8, 3, padding=1)), norm(8), nn.SiLU(), nn.Dropout(0.0))

    def forward(self, h, scale=1.0, skip=None):
        y = self.net(h) * scale
        return y + skip, {"mean": y.mean((2, 3)), "count": torch.tensor(len(h))}


class Blocks(Network):
    """Two blocks in checkpoints, the first of them called twice."""

    def __init__(self, **options):
        super().__init__(norm=per_sample)
        self.one, self.two = Block(**options), Block(**options)

    def forward(self, x):
        h = self.stem(x)
        h, of_one = checkpoint(self.one, h, scale=0.7, skip=h, use_reentrant=False)
        h, _ = checkpoint(self.one, h, skip=h, use_reentrant=False)
        h, of_two = checkpoint(lambda h, s: self.two(h.relu(), skip=s), h, x.mean(1, keepdim=True), use_reentrant=False)
        return self.head(self.body(h).mean((2, 3)) + of_one["mean"] + of_two["mean"])


class Segments(Network):
    def __init__(self):
        super().__init__(norm=per_sample)
        self.many = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()) for _ in range(4)))

    def forward(self, x):
        h = checkpoint_sequential(self.many, 2, self.stem(x), use_reentrant=False)
        return self.head(self.body(h).mean((2, 3)))


class Auxiliary(Network):
    """A module that keeps a tensor of its pass, from which the logits are computed as well."""

    class Keeping(nn.Sequential):
        def forward(self, h):
            h = super().forward(h)
            self.kept = h.mean((2, 3))
            return h

    def __init__(self):
        super().__init__(norm=per_sample)
        self.body = self.Keeping(*self.body)
        self.body.kept = None

    def forward(self, x):
        h = checkpoint(self.body, self.stem(x), use_reentrant=False)
        return self.head(h.mean((2, 3)) + self.body.kept)


def in_checkpoint(function, *inputs):
    return checkpoint(function, *inputs, use_reentrant=False)


def directly(function, *inputs):
    return function(*inputs)


class Within(Network):
    """The body inside a module, in a checkpoint."""

    def __init__(self, inner, run=in_checkpoint):
        super().__init__(norm=per_sample)
        self.body, self.run = inner(self), run

    def forward(self, x):
        return self.head(self.after(self.run(self.body, self.before(self.stem(x)))).mean((2, 3)))

    def before(self, h):
        return h

    def after(self, h):
        return h


class Inner(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.net = network.body

    def forward(self, h):
        return self.net(h)


class WithUnused(Inner):
    def __init__(self, network):
        super().__init__(network)
        self.unused = nn.Linear(2, 2)


class TiedFromOutside(Inner):
    """Uses a weight of a module that is none of its own."""

    def __init__(self, network):
        super().__init__(network)
        self.others = [network.stem[0]]

    def forward(self, h):
        return self.net(h) * self.others[0].weight.mean()


class HandedOver(Within):
    """A tensor of the pass reaches the unit past its arguments."""

    def before(self, h):
        self.body.context = h.mean((2, 3), keepdim=True)
        return h

    class Inner(Inner):
        def __init__(self, network):
            super().__init__(network)
            self.context = None

        def forward(self, h):
            return self.net(h) * self.context


class KeptInAList(Within):
    def before(self, h):
        self.body.kept.clear()
        return h

    def after(self, h):
        return h + self.body.kept[0]

    class Inner(Inner):
        def __init__(self, network):
            super().__init__(network)
            self.kept = []

        def forward(self, h):
            h = self.net(h)
            self.kept.append(h.mean((2, 3), keepdim=True))
            return h


class ReturnsItsInput(Within):
    def after(self, h):
        return h.mul_(0.5)

    class Inner(Inner):
        def forward(self, h):
            return h


class WrittenIntoAfterwards(Within):
    def after(self, h):
        return h.mul_(0.5)


class Spectral(Inner):
    """Its buffers, which every pass moves, change what it computes."""

    def __init__(self, network):
        super().__init__(network)
        parametrizations.spectral_norm(self.net[0])


def frozen():
    model = CheckpointedNetwork()
    model.stem.requires_grad_(False).eval()
    return model


MODELS = {
    "two inputs": Blocks,
    "BatchNorm moves twice, as in any checkpoint": functools.partial(Blocks, norm=nn.BatchNorm2d),
    "weight norm": functools.partial(Blocks, norm=per_sample, wrap=parametrizations.weight_norm),
    "segments": Segments,
    "a tensor kept": Auxiliary,
    "frozen": frozen,
    "an unused parameter": functools.partial(Within, WithUnused),
    "a weight from outside": functools.partial(Within, TiedFromOutside),
    "a tensor from outside": functools.partial(HandedOver, HandedOver.Inner),
    "kept in a list": functools.partial(KeptInAList, KeptInAList.Inner),
    "returns its input": functools.partial(ReturnsItsInput, ReturnsItsInput.Inner),
    "written into afterwards": functools.partial(WrittenIntoAfterwards, Inner),
}
#: A microbatch refuses parameters that are reached past their modules; a checkpoint sees the last part's tensors.
WHOLE_BATCHES_ALONE = {"a weight from outside", "a tensor from outside"}


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_right_and_a_good_guest(name, options, threads):
    if options and name in WHOLE_BATCHES_ALONE:
        pytest.skip("not in parts")
    threads(1)
    check_step(MODELS[name], *images(), noisy=name == "frozen", **options)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_what_runs_again_has_the_buffers_of_the_first_run(options, threads):
    """A plain checkpoint computes with the next singular vectors; the truth is the model without checkpoints."""
    threads(1)
    exact = functools.partial(Within, Spectral, run=directly)
    check_step(functools.partial(Within, Spectral), *images(), exact=exact, **options)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_a_unit_needs_must_not_be_written_into_before_backward(what, batch):  # noqa: F811
    """An error, as with any loss."""

    class Writing(Within):
        def before(self, h):
            self.given = [h]
            return h

    model = Writing(Inner)
    loss = step_of(model, loss_of())(*batch)
    with torch.no_grad():
        (model.given[0] if what == "input" else model.body.net[0].weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_module_that_cannot_be_a_unit_is_tried_once(batch):  # noqa: F811
    runs = []

    class Counting(KeptInAList.Inner):
        def forward(self, h):
            runs.append(len(runs))
            return super().forward(h)

    step = step_of(KeptInAList(Counting), loss_of())
    counts = []
    for _ in range(2):
        runs.clear()
        step(*batch).backward()
        counts.append(len(runs))
    assert counts[0] == counts[1] + 1


@pytest.mark.parametrize("layers", [("body",), ("body.1",), ("stem", "body.0")], ids=str)
def test_feature_maps_in_and_after_checkpoints(layers, threads):
    threads(1)
    check_step(CheckpointedNetwork, *images(), layers, noisy=True)


def timm_vit():
    timm = pytest.importorskip("timm")
    options = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": CLASSES}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options)
    model.set_grad_checkpointing()
    return model


def transformers_vit():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=12, patch_size=4, num_labels=CLASSES, **sizes)
    model = transformers.ViTForImageClassification(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("make", [timm_vit, transformers_vit], ids=lambda f: f.__name__)
def test_the_switches_of_libraries(make, threads):
    threads(1)
    assert check_step(make, *images(), "auto", noisy=True).layers


def kept_by(model, batch, monkeypatch, of_units):  # noqa: F811
    """Bytes of the tensors that are made in a step and live until its backward pass."""
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(weakref.ref(t.untyped_storage()) for t in (result,) if isinstance(t, torch.Tensor))
            return result

    if not of_units:
        monkeypatch.setattr(checkpoints, "checkpoint_hook", lambda: None)
    with Watch():
        loss = step_of(model, loss_of())(*batch)
    alive = {s.data_ptr(): s.nbytes() for s in (ref() for ref in made) if s is not None}
    loss.backward()
    return sum(alive.values())


def test_units_keep_a_fraction_of_what_the_graph_would(batch, monkeypatch):  # noqa: F811
    def model():
        net = Network(norm=per_sample)
        block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        deep = nn.Sequential(*(copy.deepcopy(block) for _ in range(6)))
        net.stem = nn.Sequential(*net.stem, InCheckpoint(deep))
        return net

    with_units = kept_by(model(), batch, monkeypatch, True)
    without = kept_by(model(), batch, monkeypatch, False)
    assert with_units < 0.5 * without


class InCheckpoint(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h):
        return checkpoint(self.inner, h, use_reentrant=False)


def test_a_once_differentiable_function_in_a_unit_is_an_error(batch):  # noqa: F811
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 0.5

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * 0.5

    class Inner(nn.Sequential):
        def forward(self, h):
            return Half.apply(super().forward(h))

    model = Network(norm=per_sample)
    model.body = InCheckpoint(Inner(*model.body))
    loss = step_of(model, loss_of())(*batch)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        loss.backward()


def test_a_unit_that_writes_into_its_input_is_refused(batch):  # noqa: F811
    class Writing(nn.Sequential):
        def forward(self, h):
            return super().forward(h.mul_(2))

    model = Network(norm=per_sample)
    model.body = InCheckpoint(Writing(*model.body))
    with pytest.raises(RuntimeError, match="writes into its input inside a checkpoint"):
        step_of(model, loss_of())(*batch)


def test_the_tokens_of_a_checkpointed_transformer_in_bfloat16(batch):  # noqa: F811
    """Autocast reaches what is run again in backward."""
    model = Tokens()
    model.blocks = InCheckpoint(model.blocks)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step_of(model, fixed())(*batch)
    assert gradient(model, loss).isfinite().all()


def test_what_users_attach_to_a_parameter_is_there_when_a_unit_runs_again(batch):  # noqa: F811
    class Gained(nn.Sequential):
        def forward(self, h):
            return super().forward(h) * self[0].weight.gain

    model = Network(norm=per_sample)
    model.body = InCheckpoint(Gained(*model.body))
    model.body.inner[0].weight.gain = 0.7
    step_of(model, loss_of())(*batch).backward()
    assert model.body.inner[0].weight.grad.any()


def test_forwards_are_the_modules_own_afterwards(batch):  # noqa: F811
    model = CheckpointedNetwork()
    step_of(model, loss_of())(*batch).backward()
    assert not any("forward" in vars(m) for m in model.modules())
