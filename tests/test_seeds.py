"""Each seed's vector-Jacobian product against the explicit Jacobian."""

import pytest
import torch
from torch.autograd.functional import jacobian

from sib_ext.functional import vjp
from sib_ext.seeds import SEEDS

from .compare import assert_near, gradients
from .samples import tiny_problem


def explicit_vjp(problem, target, seed):
    """R = J^T v, sample by sample, with the Jacobian of what the seed looks at."""

    def looks_at(x):
        logits = problem.model(x[None])[0]
        return {"probability_energy": logits.softmax(0), "target_log_prob": logits.log_softmax(0)}.get(seed, logits)

    def vector(output, label):
        if seed == "probability_energy":
            return output
        if seed == "logit_sum":
            return torch.ones_like(output)
        if label.is_floating_point():
            return label
        return torch.nn.functional.one_hot(label, len(output)).to(output.dtype)

    rows = []
    for image, label in zip(problem.x.detach(), target, strict=True):
        rows.append(torch.einsum("k,kchw->chw", vector(looks_at(image), label), jacobian(looks_at, image)))
    return torch.stack(rows)


@pytest.fixture
def problem():
    """GroupNorm keeps samples apart, so that a Jacobian per sample is the truth."""
    return tiny_problem(batch=3, size=5, norm="group")


WITHOUT_CHANCE = [seed for seed in SEEDS if seed != "random_logit"]


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("seed", WITHOUT_CHANCE)
def test_the_vjp_equals_the_explicit_jacobian_product(seed, soft, problem):
    target = torch.rand(3, 3, dtype=torch.float64).softmax(1) if soft else problem.y
    R = vjp(problem.logits(), problem.x, target, seed)
    assert R.shape == problem.x.shape
    assert_near(R, explicit_vjp(problem, target, seed), 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_vjp_is_differentiable_in_the_parameters(seed, problem):
    R = vjp(problem.logits(), problem.x, problem.y, seed)
    grads = gradients(R.square().sum(), problem.parameters)
    assert any(g.any() for g in grads) and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_a_random_logit_is_the_labels_half_of_the_time_and_else_any(soft):
    logits = torch.zeros(4000, 4, dtype=torch.float64, requires_grad=True)
    label = torch.full((4000,), 2)
    target = torch.nn.functional.one_hot(label, 4).double() if soft else label
    torch.manual_seed(0)
    (drawn,) = torch.autograd.grad(SEEDS["random_logit"](logits, target), logits)
    assert torch.equal(drawn.sum(1), torch.ones(4000, dtype=torch.float64)) and set(drawn.unique().tolist()) == {0, 1}
    expected = torch.tensor([0.125, 0.125, 0.625, 0.125], dtype=torch.float64)
    assert (drawn.mean(0) - expected).abs().max() < 0.03


def test_a_random_logit_follows_torchs_generator(problem):
    logits = problem.logits()
    draws = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        draws.append(vjp(logits, problem.x, problem.y, "random_logit"))
    assert torch.equal(draws[0], draws[1])
    assert any(not torch.equal(draws[0], other) for other in draws[2:])


def test_without_create_graph_the_vjp_is_a_constant_and_the_graph_of_the_logits_stays(problem):
    logits = problem.logits()
    R = vjp(logits, problem.x, problem.y, create_graph=False)
    assert not R.requires_grad
    logits.sum().backward()


@pytest.mark.parametrize("seed", ["probability_energy", "target_log_prob"])
def test_saturated_logits_give_a_vanishing_and_finite_vjp(seed, problem):
    logits = problem.logits() + 1e4 * torch.nn.functional.one_hot(problem.y, 3)
    R = vjp(logits, problem.x, problem.y, seed)
    assert R.isfinite().all() and R.abs().max() < 1e-100


@pytest.mark.parametrize("seed", WITHOUT_CHANCE)
def test_half_logits_are_seeded_in_float32(seed, problem):
    logits, x = problem.logits().bfloat16(), problem.x
    rounded = logits.detach().double() - problem.logits().detach()
    expected = vjp(problem.logits() + rounded, x, problem.y, seed)
    R = vjp(logits, x, problem.y, seed)
    assert R.dtype == x.dtype
    assert_near(R, expected, 1e-2)


def test_a_seed_that_does_not_exist_is_refused_with_the_choices(problem):
    with pytest.raises(ValueError, match="seed is 'best'.*'target_logit'"):
        vjp(problem.logits(), problem.x, problem.y, "best")


def test_x_that_does_not_require_grad_is_refused_with_the_remedy(problem):
    logits = problem.logits()
    with pytest.raises(RuntimeError, match=r"x does not require grad: call x.requires_grad_\(\) before"):
        vjp(logits, problem.x.detach(), problem.y)


def test_logits_of_another_tensor_are_refused_with_the_remedy(problem):
    logits = problem.logits()
    with pytest.raises(RuntimeError, match="logits were not computed from x: pass the very tensor"):
        vjp(logits, problem.x.detach().clone().requires_grad_(), problem.y)


def test_switched_off_gradients_are_refused_with_the_remedy(problem):
    logits = problem.logits()
    with torch.no_grad(), pytest.raises(RuntimeError, match="switched off here.*criterion.cross_entropy"):
        vjp(logits, problem.x, problem.y)
