"""The compiled engine: right, or refused with the module's name, or left for the exact engine with one warning."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

from sib_ext.engines import compiled

from ..compare import assert_near
from .networks import IMAGES, NETWORKS, Network, Tokens, Wrapped, as_mapping, hooked, per_sample
from .step_check import check_step, error, flat
from .test_double_backward import truth_of
from .test_every_step import batch as images
from .test_every_step import batch_of_labels, of_labels
from .test_step import batch, gradient, loss_of, step_of  # noqa: F401


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def eager_compile(monkeypatch):
    """torch.compile without its code generator: seconds instead of a minute."""
    monkeypatch.setattr(compiled, "_inductor", torch._dynamo.lookup_backend("aot_eager"))


slow = pytest.mark.slow
#: Networks that are compiled; the others of the zoo are refused.
OTHERS = ["GroupNorm", "dropout", "transformer", "spectral norm", "weight norm", "tied weights", "frozen stem"]
OTHERS += ["mapping", "unused layer", "computed weights", "input changed in place", "tuple"]
TAKEN = ["BatchNorm", *(pytest.param(name, marks=slow) for name in OTHERS)]
REFUSED = ["custom Function", "tensor hook", "recurrent", "depth by random", "depth by numpy"]


@pytest.mark.parametrize("network", TAKEN)
def test_a_compiled_step_is_right_and_a_good_guest(network, eager_compile, threads):
    threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the compiled engine steps aside")
        step = check_step(NETWORKS[network], *images(), engine="compiled", noisy=network == "dropout")
    assert step.engine == "compiled"


def test_a_random_logit_is_compiled(batch, eager_compile):  # noqa: F811
    x, y, _ = batch
    step = step_of(Network(norm=per_sample), loss_of(seed="random_logit"), engine="compiled")
    torch.manual_seed(1)
    found = gradient(step.model, step(x, y))
    assert step.engine == "compiled" and not step._vjps.left_to_the_exact
    exact = step_of(copy.deepcopy(step.model), loss_of(seed="random_logit"))
    exact.model.zero_grad()
    torch.manual_seed(1)
    assert error(found, gradient(exact.model, exact(x, y))) < 1e-4


@pytest.mark.parametrize("seed", ["target_logit", "random_logit"])
def test_a_compiled_step_with_several_labels_an_image_is_right(seed, eager_compile, threads):
    threads(1)
    options = {"engine": "compiled", "noisy": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the compiled engine steps aside")
        check_step(NETWORKS["GroupNorm"], *batch_of_labels(), (), of_labels(seed), **options)


@pytest.mark.parametrize("network", REFUSED)
def test_what_the_compiler_gets_wrong_is_refused(network, batch, eager_compile):  # noqa: F811
    model = NETWORKS[network]()
    before = {n: b.clone() for n, b in model.named_buffers()}
    with pytest.raises(RuntimeError, match="engine='compiled' cannot train this model.*double_backward"):
        step_of(model, loss_of(), engine="compiled")(*batch)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_wrong_gradient_is_refused_by_the_name_of_its_module(batch, eager_compile):  # noqa: F811
    """The hook halves what the stem and the body get, the compiler drops it for one part of the gradient."""
    with pytest.raises(RuntimeError, match=r"wrong gradients in .*net\..*by \d+"):
        step_of(Wrapped(middle=hooked), loss_of(), engine="compiled")(*batch)


def test_auto_takes_the_exact_engine_where_the_compiler_is_wrong(batch, eager_compile):  # noqa: F811
    model, criterion = Wrapped(middle=hooked), loss_of()
    _, truth = truth_of(model, criterion, batch)
    step = step_of(torch.compile(model), criterion)
    assert step.engine == "compiled"
    with pytest.warns(UserWarning, match="steps aside, first for batches .* wrong gradients"):
        loss = step(*batch)
    assert error(gradient(model, loss), truth) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*batch)


def test_a_layer_unfrozen_later_gets_its_gradient(batch, eager_compile):  # noqa: F811
    model, criterion = Network(), loss_of()
    model.stem.requires_grad_(False)
    step = step_of(model, criterion, engine="compiled")
    step(*batch).backward()
    assert model.stem[0].weight.grad is None
    model.stem.requires_grad_(True)
    _, truth = truth_of(model, criterion, batch)
    assert error(gradient(model, step(*batch)), truth) < 1e-4


def test_a_change_of_mode_makes_another_graph(batch, eager_compile):  # noqa: F811
    """BatchNorm frozen in the middle of a fine-tuning."""
    model, criterion = Network().double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    step = step_of(model, criterion, engine="compiled")
    step(x, y, mask).backward()
    model.stem[1].eval()
    exact = copy.deepcopy(model)
    found = gradient(model, step(x, y, mask))
    assert error(found, gradient(exact, step_of(exact, criterion)(x, y, mask))) < 1e-11


def test_another_seed_of_the_loss_makes_another_graph(batch, eager_compile):  # noqa: F811
    model, criterion = Network().double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    step = step_of(model, criterion, engine="compiled")
    step(x, y, mask).backward()
    criterion.seed = "logit_sum"
    exact = copy.deepcopy(model)
    truth = gradient(exact, step_of(exact, criterion)(x, y, mask))
    assert error(gradient(model, step(x, y, mask)), truth) < 1e-11


class Switched(Network):
    """A part that training switches on later, by an attribute."""

    late = False

    def forward(self, x):
        h = self.body(self.stem(x))
        return self.head((hooked(h) if self.late else h).mean((2, 3)))


def test_a_graph_that_the_compiler_makes_later_proves_itself_as_well(batch, eager_compile):  # noqa: F811
    model, criterion = Switched(), loss_of()
    step = step_of(torch.compile(model), criterion)
    step(*batch).backward()
    model.late = True
    _, truth = truth_of(model, criterion, batch)
    with pytest.warns(UserWarning, match="steps aside"):
        loss = step(*batch)
    assert error(gradient(model, loss), truth) < 1e-4


def test_a_hook_added_later_is_not_passed_over(batch, eager_compile):  # noqa: F811
    model, criterion = Network(), loss_of()
    step = step_of(torch.compile(model), criterion)
    step(*batch).backward()
    model.body.register_forward_hook(lambda module, inputs, output: 0.5 * output.square())
    _, truth = truth_of(model, criterion, batch)
    with pytest.warns(UserWarning, match="steps aside"):
        loss = step(*batch)
    assert error(gradient(model, loss), truth) < 1e-4


def test_a_wrong_gradient_is_seen_under_autocast(batch, eager_compile):  # noqa: F811
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="wrong gradients"):
        step_of(Wrapped(middle=hooked, norm=per_sample), loss_of(), engine="compiled")(*batch)


def test_a_smaller_last_batch_is_compiled_for_itself(batch, eager_compile):  # noqa: F811
    model, criterion = Network().double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    step = step_of(model, criterion, engine="compiled")
    for size in (IMAGES, 4, IMAGES):
        loss = step(x[:size], y[:size], mask[:size])
        exact = step_of(copy.deepcopy(model), criterion)(x[:size], y[:size], mask[:size])
        assert_near(loss, exact, 1e-12)
        loss.backward()


def test_shapes_beyond_the_compilers_limit_go_to_the_exact_engine_with_one_warning(eager_compile):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    step = step_of(model, loss_of(), engine="compiled")
    heard = []
    with torch._dynamo.config.patch(recompile_limit=3), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for side in (12, 13, 14, 15, 16, 12):
            x, y = torch.randn(2, 3, side, side), torch.arange(2)
            _, truth = truth_of(model, loss_of(mask_source="vjp"), (x, y, torch.ones(2, 1, side, side).tril()))
            loss = step(x, y, torch.ones(2, 1, side, side).tril())
            assert error(gradient(model, loss), truth) < 1e-4
        heard = [str(w.message) for w in record if "steps aside" in str(w.message)]
    assert len(heard) == 1 and "takes no more kinds of batches" in heard[0]


def test_another_step_has_its_own_share_of_the_limit(batch, eager_compile):  # noqa: F811
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step_of(Network(), loss_of(), engine="compiled")(*batch).backward()


def test_errors_of_a_call_are_those_of_every_engine(batch, eager_compile):  # noqa: F811
    x, y, mask = batch
    step = step_of(Network(), loss_of(), engine="compiled")
    with pytest.raises(ValueError, match="target must lie in"):
        step(x, y + 3)
    with pytest.raises(ValueError, match="the model returned dict with no logits in it"):
        step_of(Wrapped(after=lambda z: {"scores": z}), loss_of(), engine="compiled")(*batch)


def test_a_compiled_model_with_layers_is_trained_by_the_exact_engine(batch, eager_compile):  # noqa: F811
    model, criterion = Network().double(), loss_of()
    x, y, mask = batch[0].double(), *batch[1:]
    _, truth = truth_of(model, criterion, batch, ("body",))
    loss = step_of(torch.compile(model), criterion, "auto")(x, y, mask)
    assert error(gradient(model, loss), truth) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [functools.partial(Network, nn.ReLU), functools.partial(Network, dropout=0.3, norm=per_sample), Tokens]
    + [functools.partial(Wrapped, after=as_mapping)],
    ids=["BatchNorm", "dropout", "transformer", "mapping"],
)
def test_with_the_real_compiler(make, batch):  # noqa: F811
    """Every graph proves itself, dropout included; and what it gives is the exact engine's."""
    model, criterion = make(), loss_of()
    exact = copy.deepcopy(model)
    step = step_of(model, criterion, engine="compiled")
    torch.manual_seed(1)
    found = gradient(model, step(*batch))
    torch.manual_seed(1)
    truth = gradient(exact, step_of(exact, criterion)(*batch))
    assert error(found, truth) < 1e-4
    assert flat(model).isfinite().all()
