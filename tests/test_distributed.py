"""Two gloo processes get the loss and the gradients that one process gets on the joined batch."""

import concurrent.futures
import copy
import datetime
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from sib_ext import SIBStep, SpatialIBLoss
from sib_ext import functional as sib
from sib_ext.distributed import JoinedBatch, project, twice_differentiable
from sib_ext.layers import last_feature_map

from .compare import assert_near, gradients, relative_error
from .samples import FIXED, tiny_problem

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch was built without gloo", allow_module_level=True)
WORLD = 2
LOSSES = {
    "paper": {"preset": "paper", "input_background": 3e4, "input_foreground": 30.0},
    "balanced": {"input_foreground": 1.0},
    "unbiased HSIC, live mask": {
        "foreground": "hsic_unbiased",
        "input_foreground": 10.0,
        "detach_mask": False,
    },
    "gaussian terms": {"background": "gaussian", "foreground": "gaussian", "transform": "expm1"},
    "background alone": {"background": "gaussian", "input_foreground": 0.0, "transform": "exp"},
    "cross-entropy alone": {"input_background": 0.0, "input_foreground": 0.0, "feature_background": 0.0},
    "log capacity": {"foreground": "log_capacity", "input_foreground": 1.0, "kappa": 0.3},
    "class weights and label smoothing": {"weight": torch.tensor([0.2, 1.0, 5.0]).double(), "label_smoothing": 0.1},
}

PLAIN = {"every": 1, "jitter": 0}  #: of SIBStep: every term in every step
OF_FEATURES = {
    "input_background": 0.0,
    "input_foreground": 0.0,
    "feature_foreground": 1.0,
    "mask_source": "activation",
    "background": "magnitude_ratio",
}


def cross_entropies(logits, target):
    return nn.functional.cross_entropy(logits, target, reduction="none")


# ------------------------------------------------------------------------------------------------------ two processes


def start(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD, timeout=timeout)


def call(task, rank, arguments):
    torch.manual_seed(rank)
    return task(rank, *arguments)


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """on_ranks(task, *arguments): [task(rank, *arguments) of each rank], run at once in two gloo processes."""
    file = str(tmp_path_factory.mktemp("gloo") / "store")
    context = multiprocessing.get_context("spawn")
    pools = [
        concurrent.futures.ProcessPoolExecutor(1, context, initializer=start, initargs=(rank, file))
        for rank in range(WORLD)
    ]

    def run(task, *arguments):
        futures = [pool.submit(call, task, rank, arguments) for rank, pool in enumerate(pools)]
        return [future.result(timeout=90) for future in futures]

    yield run
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)


def part(problem, sizes, rank):
    """The rank's images and labels."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return problem.x.detach()[own].clone().requires_grad_(), problem.y[own]


def problem_of(sizes, dtype=torch.float64):
    return tiny_problem(batch=sum(sizes), dtype=dtype, norm="group", activation=nn.Softplus)


def loss_of(options, dtype=torch.float64, **more):
    """Without chance: ranks draw other random seeds than one process does."""
    fixed = {} if options.get("preset") == "paper" else FIXED
    options = {name: v.to(dtype) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    return SpatialIBLoss(window=3, **fixed | options, **more)


def ddp_step(rank, sizes, options, dtype, mask=None, **more):
    """One backward of a DistributedDataParallel model: (terms by name, gradients)."""
    problem = problem_of(sizes, dtype)
    model = DistributedDataParallel(problem.model)
    x, y = part(problem, sizes, rank)
    own = None if mask is None else mask[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
    terms = loss_of(options, dtype, **more).terms(model(x), y, x, own)
    terms.loss.backward()
    return {name: value.detach() for name, value in scalars_of(terms).items()}, [p.grad for p in problem.parameters]


def scalars_of(terms):
    """The loss and its parts, terms by kind and place."""
    by_place = {f"{k} {n}": v for k in ("background", "foreground") for n, v in getattr(terms, k).items()}
    return {"loss": terms.loss, "cross_entropy": terms.cross_entropy} | by_place


def joined_step(sizes, options, dtype, mask=None):
    problem = problem_of(sizes, dtype)
    terms = loss_of(options, dtype).terms(problem.logits(), problem.y, problem.x, mask)
    return terms, gradients(terms.loss, problem.parameters)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def assert_same_step(ranks, expected, tolerance):
    terms, expected_gradients = expected
    for scalars, found in ranks:
        truth = scalars_of(terms)
        assert set(scalars) == {"loss"} or set(scalars) == set(truth)
        for name, value in scalars.items():
            assert_near(value, truth[name], tolerance)
        assert_near(flat(found), flat(expected_gradients), tolerance)


# ------------------------------------------------------------------------------------------------- DDP, one backward


@pytest.mark.parametrize("sizes", [(4, 4), (5, 2)], ids=["equal batches", "unequal batches"])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_two_processes_equal_one_on_the_joined_batch(on_ranks, options, sizes):
    ranks = on_ranks(ddp_step_in_group, sizes, options, torch.float64)
    assert_same_step(ranks, joined_step(sizes, options, torch.float64), 1e-12)


IGNORED = -7
SINGLE = {"seed": "target_logit", "foreground": "log_capacity", "input_foreground": 1.0}
TARGETS = {
    "several labels, weighted": SINGLE | {"task": "multilabel", "pos_weight": torch.tensor([3.0, 1.0, 0.5]).double()},
    "ignored labels": SINGLE | {"ignore_index": IGNORED},
    "ignored labels, weighted": SINGLE | {"ignore_index": IGNORED, "weight": torch.tensor([0.2, 1.0, 5.0]).double()},
    "base, one value a sample": SINGLE | {"base": cross_entropies},
    "base, a mean": SINGLE | {"base": nn.CrossEntropyLoss(label_smoothing=0.2)},
}


def targets_of(options, y):
    """One label an image at most: ranks draw apart from one another."""
    if "task" in options:
        return nn.functional.one_hot(y, 3) * (torch.arange(len(y)) % 4 > 0)[:, None]
    return torch.where(torch.arange(len(y)) % 4 > 0, y, IGNORED) if "ignore_index" in options else y


def test_a_large_batch_of_bfloat16_logits_is_counted_exactly():
    logits, y = torch.zeros(301, 3, dtype=torch.bfloat16), torch.zeros(301, dtype=torch.int64)  # 301: no bfloat16
    joined = JoinedBatch(torch.zeros(301, 1, 1, 1))
    single = nn.functional.cross_entropy(logits, y, reduction="sum").float() / 301
    assert torch.equal(joined.cross_entropy(logits, y), single)


def step_with_mixed_targets(rank, options):
    """As after a CutMix that each rank draws for itself: probabilities on the first, class indices on the second."""
    problem = problem_of((4, 4))
    x, y = part(problem, (4, 4), rank)
    target = nn.functional.one_hot(y, 3).double() if rank == 0 else y
    model = DistributedDataParallel(problem.model)
    terms = loss_of(options, process_group="world").terms(model(x), target, x)
    terms.loss.backward()
    return {name: value.detach() for name, value in scalars_of(terms).items()}, [p.grad for p in problem.parameters]


@pytest.mark.parametrize("options", [SINGLE, SINGLE | {"ignore_index": IGNORED}], ids=["plain", "ignored labels"])
def test_ranks_may_have_targets_of_different_kinds(on_ranks, options):
    problem = problem_of((4, 4))
    terms = loss_of(options).terms(problem.logits(), problem.y, problem.x)
    truth = terms, gradients(terms.loss, problem.parameters)
    assert_same_step(on_ranks(step_with_mixed_targets, options), truth, 1e-11)


def ddp_step_with_targets(rank, sizes, options):
    problem = problem_of(sizes)
    problem = problem._replace(y=targets_of(options, problem.y))
    model, (x, y) = DistributedDataParallel(problem.model), part(problem, sizes, rank)
    terms = loss_of(options, process_group="world").terms(model(x), y, x)
    terms.loss.backward()
    return {name: value.detach() for name, value in scalars_of(terms).items()}, [p.grad for p in problem.parameters]


@pytest.mark.parametrize("sizes", [(4, 4), (5, 2)], ids=["equal batches", "unequal batches"])
@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS)
def test_losses_and_labels_of_other_kinds_are_joined(on_ranks, options, sizes):
    problem = problem_of(sizes)
    terms = loss_of(options).terms(problem.logits(), targets_of(options, problem.y), problem.x)
    truth = terms, gradients(terms.loss, problem.parameters)
    assert_same_step(on_ranks(ddp_step_with_targets, sizes, options), truth, 1e-11)


def ddp_step_in_group(rank, sizes, options, dtype, mask=None, more=None):
    return ddp_step(rank, sizes, options, dtype, mask, process_group="world", **(more or {}))


@pytest.mark.parametrize("sizes", [(8, 8), (9, 4)], ids=["equal batches", "unequal batches"])
@pytest.mark.parametrize("preset", ["paper", "balanced"])
def test_in_float32_they_agree_to_a_millionth(on_ranks, preset, sizes):
    ranks = on_ranks(ddp_step_in_group, sizes, {"preset": preset}, torch.float32)
    assert_same_step(ranks, joined_step(sizes, {"preset": preset}, torch.float32), 1e-6)


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_in_float32_two_processes_are_as_near_the_truth_as_one(on_ranks, options):
    # With weights that bring the terms' second derivatives forward, rounding alone passes a millionth.
    ranks = on_ranks(ddp_step_in_group, (8, 8), options, torch.float32)
    truth, one = (flat(joined_step((8, 8), options, dtype)[1]) for dtype in (torch.float64, torch.float32))
    for _, found in ranks:
        assert relative_error(flat(found), truth) <= 1.5 * relative_error(one, truth) + 1e-7


@pytest.mark.parametrize("name", ["balanced", "class weights and label smoothing"])
def test_bfloat16_networks_get_float32_statistics(on_ranks, name):
    terms, expected = joined_step((8, 8), LOSSES[name], torch.bfloat16)
    for scalars, found in on_ranks(ddp_step_in_group, (8, 8), LOSSES[name], torch.bfloat16):
        assert {value.dtype for value in scalars.values()} == {torch.float32}
        assert_near(scalars["loss"], terms.loss, 1e-2)
        assert_near(flat(found), flat(expected), 3e-2)


def ddp_step_alone(rank, sizes, options, dtype):
    return ddp_step(rank, sizes, options, dtype)


@pytest.mark.parametrize("name", ["paper", "balanced", "unbiased HSIC, live mask"])
def test_without_a_group_the_gradients_differ(on_ranks, name):
    (_, found), _ = on_ranks(ddp_step_alone, (4, 4), LOSSES[name], torch.float64)
    assert relative_error(flat(found), flat(joined_step((4, 4), LOSSES[name], torch.float64)[1])) > 1e-3


def test_masks_may_be_given_on_one_rank_only(on_ranks):
    mask = [torch.rand(9, 11, dtype=torch.float64), None, torch.rand(9, 11, dtype=torch.float64), *[None] * 3]
    options = LOSSES["unbiased HSIC, live mask"]
    ranks = on_ranks(ddp_step_in_group, (3, 3), options, torch.float64, mask)
    assert_same_step(ranks, joined_step((3, 3), options, torch.float64, mask), 1e-12)


def test_one_image_a_rank_is_a_batch_of_two(on_ranks):
    ranks = on_ranks(ddp_step_in_group, (1, 1), LOSSES["paper"], torch.float64)
    assert_same_step(ranks, joined_step((1, 1), LOSSES["paper"], torch.float64), 1e-12)


def ddp_step_with_static_graph(rank):
    problem = problem_of((4, 4))
    model = DistributedDataParallel(problem.model, static_graph=True)
    x, y = part(problem, (4, 4), rank)
    with pytest.raises(RuntimeError, match="never averages the gradients: leave out static_graph=True"):
        SpatialIBLoss(window=3, process_group="world")(model(x), y, x)
    # What that message stands for: plain autograd leaves each rank its own gradients.
    logits = model(x)
    (logits.sum() + sib.vjp(logits, x, y).square().sum()).backward()
    return flat(p.grad for p in problem.parameters)


def test_ddp_with_a_static_graph_gets_a_clear_message(on_ranks):
    first, second = on_ranks(ddp_step_with_static_graph)
    assert relative_error(first, second) > 1e-3


def ddp_step_with_batch_norm(rank, sizes):
    problem = tiny_problem(batch=sum(sizes), norm="batch")
    x, y = part(problem, sizes, rank)
    model = DistributedDataParallel(problem.model)
    loss = loss_of({}, process_group="world")(model(x), y, x)
    loss.backward()
    return loss.detach(), flat(p.grad for p in problem.parameters)


def test_batch_norm_keeps_the_statistics_of_its_rank(on_ranks):
    (loss, found), other = on_ranks(ddp_step_with_batch_norm, (4, 4))
    assert torch.equal(loss, other[0]) and torch.equal(found, other[1])
    problem = tiny_problem(batch=8, norm="batch")
    expected = flat(gradients(loss_of({})(problem.logits(), problem.y, problem.x), problem.parameters))
    assert 1e-3 < relative_error(found, expected) < 1


def step_in_groups_of_one(rank, sizes, options, dtype):
    groups = [dist.new_group([r]) for r in range(WORLD)]
    problem = problem_of(sizes, dtype)
    x, y = part(problem, sizes, rank)
    alone, grouped = (loss_of(options, dtype, process_group=g)(problem.model(x), y, x) for g in (None, groups[rank]))
    return alone.detach(), grouped.detach(), *(gradients(loss, problem.parameters) for loss in (alone, grouped))


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_a_group_of_one_changes_nothing(on_ranks, options):
    for alone, grouped, alone_gradients, grouped_gradients in on_ranks(
        step_in_groups_of_one, (4, 5), options, torch.float64
    ):
        assert_near(grouped, alone, 1e-12)
        assert_near(flat(grouped_gradients), flat(alone_gradients), 1e-12)


# -------------------------------------------------------------------------------------------------------------- FSDP2


def blocks(dtype):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU()) for c in (3, 8)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 8 * 8, 5)).to(dtype)


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()


def train(model, x, y, criterion):
    """Three steps of SGD: the gradients of each."""
    optimizer, kept = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(x), y, x).backward()
        kept.append([whole(p.grad) for p in model.parameters()])
        optimizer.step()
    return kept


def images(batch, dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(5, (batch,), generator=generator)


def fsdp_training(rank, sizes, options, dtype):
    from torch.distributed.fsdp import fully_shard

    model = blocks(dtype)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for module in (model[0], model[1], model):
        fully_shard(module, mesh=mesh)
    x, y = images(sum(sizes), dtype)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return train(model, x[own].requires_grad_(), y[own], loss_of(options, dtype, process_group="world"))


@pytest.mark.parametrize("name", ["paper", "balanced"])
def test_three_steps_of_fsdp2_equal_those_of_one_process(on_ranks, name):
    x, y = images(8, torch.float64)
    expected = train(blocks(torch.float64), x.requires_grad_(), y, loss_of(LOSSES[name]))
    for found in on_ranks(fsdp_training, (4, 4), LOSSES[name], torch.float64):
        for step, truth in zip(found, expected, strict=True):
            assert_near(flat(step), flat(truth), 1e-11)


@pytest.mark.parametrize("preset", ["paper", "balanced"])
def test_in_float32_a_step_of_fsdp2_agrees_to_a_millionth(on_ranks, preset):
    x, y = images(8, torch.float32)
    expected, *_ = train(blocks(torch.float32), x.requires_grad_(), y, loss_of({"preset": preset}))
    for found, *_ in on_ranks(fsdp_training, (4, 4), {"preset": preset}, torch.float32):
        assert_near(flat(found), flat(expected), 1e-6)


def fsdp_engine_training(rank, options):
    """SIBStep finds its layer on the sharded model: the name, whether the search left it sharded, and the gradients."""
    from torch.distributed.fsdp import fully_shard

    model = blocks(torch.float64)
    for module in (model[0], model[1], model):
        fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (WORLD,)))
    x, y = images(8, torch.float64)
    own = slice(4 * rank, 4 * rank + 4)
    name = last_feature_map(model, x[own])
    sharded = all(isinstance(p, dist.tensor.DTensor) and p.grad is None for p in model.parameters())
    step = SIBStep(model, loss_of(options, process_group="world"), **PLAIN)
    kept = train(model, x[own], y[own], lambda logits, y, x: step(x, y))
    return name, step.layers, sharded, kept


@pytest.mark.parametrize("options", [LOSSES["balanced"], OF_FEATURES], ids=["input too", "features alone"])
def test_the_last_feature_map_of_a_sharded_model_is_found_and_trained(on_ranks, options):
    model, (x, y) = blocks(torch.float64), images(8, torch.float64)
    step = SIBStep(model, loss_of(options), ("1",), **PLAIN)
    expected = train(model, x, y, lambda logits, y, x: step(x, y))
    for name, layers, sharded, found in on_ranks(fsdp_engine_training, options):
        assert (name, layers, sharded) == ("1", ("1",), True)
        for gradients_found, truth in zip(found, expected, strict=True):
            assert_near(flat(gradients_found), flat(truth), 1e-11)


def reshard_flags(rank, wanted):
    from torch.distributed.fsdp import fully_shard

    model = blocks(torch.float32)
    for module in (model[0], model):
        fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (WORLD,)))
    model[0].set_reshard_after_backward(wanted, recurse=False)
    groups = [module._get_fsdp_state()._fsdp_param_group for module in (model[0], model)]
    x, y = images(4, torch.float32)
    logits = model(x.requires_grad_())
    with pytest.raises(ArithmeticError), twice_differentiable(logits, [x]):
        inside = [group.reshard_after_backward for group in groups]
        raise ArithmeticError
    SpatialIBLoss(process_group="world", window=3)(logits, y, x).backward()
    return inside, [group.reshard_after_backward for group in groups]


@pytest.mark.parametrize("wanted", [True, False])
def test_fsdp2_keeps_its_weights_for_the_vjp_only(on_ranks, wanted):
    assert on_ranks(reshard_flags, wanted) == [([False, False], [wanted, True])] * WORLD


def unknown_fsdp(rank):
    class RegisterPostBackwardFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    logits = RegisterPostBackwardFunction.apply(x).mean((2, 3)).square()
    with pytest.raises(RuntimeError, match="the FSDP2 of torch .* cannot be told"):
        SpatialIBLoss(process_group="world")(logits, torch.zeros(2, dtype=torch.int64), x)


def test_an_fsdp2_that_hides_its_flag_is_an_error(on_ranks):
    on_ranks(unknown_fsdp)


# ------------------------------------------------------------------------------------------------ random projections


def test_a_projection_is_linear_and_keeps_inner_products_in_the_mean():
    rows, size, draws = torch.randn(3, 50, dtype=torch.float64), 8, 4000
    rows[1] += 2 * rows[0]
    generator = torch.Generator().manual_seed(0)
    grams = []
    for _ in range(draws):
        projected = project(rows, size, generator)
        grams.append(projected @ projected.T)
    grams = torch.stack(grams)
    each = -(-50 // size)
    q = (each - 1) / (each * size - 1)
    gram, squares = rows @ rows.T, rows.square()
    norms = gram.diagonal()
    variance = q * (norms[:, None] * norms + gram.square() - 2 * squares @ squares.T)
    # Four standard errors of the mean; of the variance about a tenth.
    assert ((grams.mean(0) - gram).abs() < 4 * (variance / draws).sqrt()).all()
    assert torch.allclose(grams.var(0), variance, rtol=0.15)

    same = [torch.Generator().manual_seed(5) for _ in range(2)]
    matrix = project(torch.eye(50, dtype=torch.float64), size, same[0])
    assert_near(project(rows, size, same[1]), rows @ matrix, 1e-14)
    assert ((matrix != 0).sum(1) == 1).all() and (matrix != 0).sum(0).max() <= each


@pytest.mark.parametrize("size", [50, 51, 200])
def test_a_projection_to_no_fewer_values_is_exact(size):
    rows = torch.randn(4, 50, dtype=torch.float64)
    projected = project(rows, size, torch.Generator().manual_seed(0))
    assert_near(projected @ projected.T, rows @ rows.T, 1e-13)


def joined_with_projection(rank, sizes, options, projection):
    """The joined batch in a group of one, which draws the same projections as rank 0 does."""
    groups = [dist.new_group([r]) for r in range(WORLD)]
    torch.manual_seed(0)
    problem = problem_of(sizes)
    criterion = loss_of(options, process_group=groups[rank], projection=projection)
    terms = criterion.terms(problem.logits(), problem.y, problem.x)
    return terms.loss.detach(), gradients(terms.loss, problem.parameters)


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3)], ids=["equal batches", "unequal batches"])
@pytest.mark.parametrize("name", ["paper", "balanced", "unbiased HSIC, live mask"])
def test_two_processes_with_projections_equal_one_with_the_same(on_ranks, name, sizes):
    ranks = on_ranks(ddp_step_in_group, sizes, LOSSES[name], torch.float64, None, {"projection": 16})
    (loss, expected), _ = on_ranks(joined_with_projection, sizes, LOSSES[name], 16)
    exact = joined_step(sizes, LOSSES[name], torch.float64)
    for scalars, found in ranks:
        assert_near(scalars["loss"], loss, 1e-12)
        assert_near(flat(found), flat(expected), 1e-12)
        # Teeth: it was projected, and only the foreground was.
        assert relative_error(scalars["foreground input"], exact[0].foreground["input"]) > 1e-6
        assert_near(scalars["background input"], exact[0].background["input"], 1e-12)


def test_rows_shorter_than_the_projection_are_exchanged_as_they_are(on_ranks):
    options = LOSSES["balanced"]
    ranks = on_ranks(ddp_step_in_group, (4, 4), options, torch.float64, None, {"projection": 3 * 9 * 11})
    assert_same_step(ranks, joined_step((4, 4), options, torch.float64), 1e-12)


def projected_grams(rank, sizes, seeds):
    """Rank 0's projected Grams under many seeds, and the exact ones."""
    problem = problem_of(sizes)
    x, _ = part(problem, sizes, rank)
    # R like x: one projection for both would then bias every product of their Grams' entries.
    vjp, mask = 2 * x.detach(), torch.rand(len(x), 1, *x.shape[2:], dtype=x.dtype)
    moments = sib.masked_statistics(vjp, x, mask).moments
    exact = torch.stack(JoinedBatch(x, "world").grams(vjp, x, mask, moments))
    drawn = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        drawn.append(torch.stack(JoinedBatch(x, "world", projection=32).grams(vjp, x, mask, moments)))
    return exact.detach(), torch.stack(drawn).detach()


def test_projected_grams_have_the_exact_diagonal_and_hsic_in_the_mean(on_ranks):
    ranks = on_ranks(projected_grams, (3, 3), 300)
    for exact, drawn in ranks:
        assert_near(drawn.diagonal(dim1=2, dim2=3), exact.diagonal(dim1=1, dim2=2).expand(300, 2, 6), 1e-12)
        for estimator in (sib.foreground_hsic, sib.foreground_hsic_unbiased):
            values = torch.stack([estimator(*grams) for grams in drawn])
            assert abs(values.mean() - estimator(*exact)) < 4 * values.std() / 300**0.5
    assert torch.equal(ranks[0][1], ranks[1][1])


# ----------------------------------------------------------------------------------------------------- JoinedBatch


def second_derivatives(rank, sizes):
    """Of sum(gram^3) by the rank's rows, against a vector."""
    torch.manual_seed(0)
    vjp, x, v = (torch.randn(sum(sizes), 2, 3, 3, dtype=torch.float64) for _ in range(3))
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    vjp, x, v = vjp[own].requires_grad_(), x[own], v[own]
    mask = torch.full((len(x), 1, 3, 3), 0.5, dtype=torch.float64)
    moments = sib.masked_statistics(vjp, x, mask).moments
    gram, _ = JoinedBatch(x, "world").grams(vjp, x, mask, moments)
    (first,) = torch.autograd.grad(gram.pow(3).sum(), vjp, create_graph=True)
    return torch.autograd.grad((first * v).sum(), vjp)[0]


def test_joined_grams_are_differentiable_twice(on_ranks):
    sizes = (2, 3)
    found = torch.cat(on_ranks(second_derivatives, sizes))
    vjp, _, v = (torch.randn(5, 2, 3, 3, dtype=torch.float64) for _ in range(3))
    vjp.requires_grad_()
    a = 0.5 * vjp.flatten(1)
    # Each rank's backward sums the cotangents of all ranks: twice the gradient of one loss.
    (first,) = torch.autograd.grad(WORLD * (a @ a.T).pow(3).sum(), vjp, create_graph=True)
    (expected,) = torch.autograd.grad((first * v).sum(), vjp)
    assert_near(found, expected, 1e-12)


def step_with_images(rank, shapes, dtypes, options):
    x = torch.randn(*shapes[rank], dtype=dtypes[rank], requires_grad=True)
    logits = x.flatten(1)[:, :3].square()
    criterion = SpatialIBLoss(process_group="world", **options)
    try:
        criterion(logits, torch.zeros(len(x), dtype=torch.int64), x)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "shapes, dtypes, options, message",
    [
        (
            ((2, 3, 8, 8), (2, 3, 8, 9)),
            (torch.float32, torch.float32),
            {},
            "same C*H*W and precision on every rank of process_group, got, by rank: 32-bit rows of 192, "
            "32-bit rows of 216",
        ),
        (((2, 3, 8, 8),) * 2, (torch.float32, torch.float64), {}, "64-bit rows of 192"),
        (
            ((1, 3, 8, 8), (2, 3, 8, 8)),
            (torch.float32,) * 2,
            {"foreground": "hsic_unbiased", "input_foreground": 1.0},
            "at least 4, got 3",
        ),
    ],
    ids=["sizes", "precisions", "too few images"],
)
def test_ranks_that_do_not_fit_get_the_same_error_and_do_not_hang(on_ranks, shapes, dtypes, options, message):
    ranks = on_ranks(step_with_images, shapes, dtypes, options)
    assert all(message in found for found in ranks), ranks
    assert on_ranks(step_with_images, ((2, 3, 8, 8),) * 2, (torch.float32,) * 2, {}) == [None, None]


# ------------------------------------------------------------------------------------------------------ SyncBatchNorm


def _of_channels(values):
    return values[None, :, None, None]


# What SyncBatchNorm calls and PyTorch has for GPUs only. With these, the class itself runs on a CPU.
SYNC_BATCH_NORM_OPS = {
    "batch_norm_stats": lambda x, eps: (x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + eps).rsqrt()),
    "batch_norm_gather_stats_with_counts": lambda x, mean, invstd, *_: (mean.mean(0), invstd.mean(0)),
    "batch_norm_elemt": lambda x, weight, bias, mean, invstd, eps: torch.addcmul(
        _of_channels(bias), x - _of_channels(mean), _of_channels(invstd * weight)
    ),
    "batch_norm_backward_reduce": lambda grad, x, mean, invstd, weight, *_: (
        *(grad.sum((0, 2, 3)), (grad * (x - _of_channels(mean))).sum((0, 2, 3))),
        *((grad * (x - _of_channels(mean))).sum((0, 2, 3)) * invstd, grad.sum((0, 2, 3))),
    ),
    "batch_norm_backward_elemt": lambda grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count: (
        (
            grad
            - _of_channels(sum_dy / count.sum())
            - (x - _of_channels(mean)) * _of_channels(invstd.square() * sum_dy_xmu / count.sum())
        )
        * _of_channels(invstd * weight)
    ),
}


def sync_batch_norm_step(rank):
    library = torch.library.Library("aten", "IMPL")
    for name, op in SYNC_BATCH_NORM_OPS.items():
        library.impl(name, op, "CPU")
    x = torch.randn(3, 3, 6, 6, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    normalised = SyncBatchNorm.apply(x, weight, bias, None, None, 1e-5, 0.1, dist.group.WORLD, WORLD)
    logits = normalised.pow(3).mean((2, 3))
    with pytest.raises(RuntimeError, match="SyncBatchNorm in train mode, which PyTorch cannot differentiate twice"):
        SpatialIBLoss(window=3, process_group="world")(logits, torch.zeros(3, dtype=torch.int64), x)
    # What that message stands for.
    vjp = sib.vjp(logits, x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="batch_norm_backward_elemt is not implemented"):
        vjp.square().sum().backward()


def test_sync_batch_norm_gets_a_clear_message(on_ranks):
    on_ranks(sync_batch_norm_step)


def local_batch_norm_step(rank):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4).eval(), nn.BatchNorm2d(4), nn.Flatten())
    images_ = torch.randn(2, 3, 4, 4, requires_grad=True)
    logits = model(images_)
    with twice_differentiable(logits, [images_]):
        assert logits.shape == (2, 16)


def test_batch_norm_of_the_rank_and_sync_batch_norm_in_eval_mode_pass(on_ranks):
    on_ranks(local_batch_norm_step)


# ---------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"process_group": 3}, "process_group must be None, 'world' or a torch.distributed.ProcessGroup.* got 3"),
        ({"process_group": "all"}, "got 'all'"),
        ({"process_group": dist.GroupMember.NON_GROUP_MEMBER}, "that this process belongs to, got "),
        ({"projection": 256}, "projection=256 .* has no meaning alone: give process_group too"),
        *(
            ({"process_group": "world", "projection": p}, "projection must be None or .* an integer >= 1, got")
            for p in (0, -1, 2.0, True, "many")
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SpatialIBLoss(**options)


def test_a_group_before_init_process_group_is_an_error():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    criterion = SpatialIBLoss(process_group="world")
    with pytest.raises(RuntimeError, match="not initialised in this process: call torch.distributed.init_process"):
        criterion(x.flatten(1)[:, :3].square(), torch.zeros(2, dtype=torch.int64), x)


def test_a_loss_with_the_world_as_its_group_can_be_copied():
    copied = copy.deepcopy(SpatialIBLoss(process_group="world", projection=64))
    assert copied.process_group == "world" and copied.projection == 64


# ----------------------------------------------------------------------------------------------------------- SIBStep


def engine_step(rank, sizes, more, of_ddp=None, wrap="ddp"):
    """Two backward passes of SIBStep around a DistributedDataParallel model: the second one's gradients."""
    problem = problem_of(sizes)
    x, y = part(problem, sizes, rank)
    model, parameters = problem.model, list(problem.parameters)
    if (of_ddp or {}).get("find_unused_parameters"):
        model.unused = nn.Linear(2, 2).double()
    if wrap == "compiled inside":
        model = torch.compile(model, backend="aot_eager")
    model = DistributedDataParallel(model, **(of_ddp or {}))
    if wrap == "compiled outside":
        model = torch.compile(model, backend="aot_eager")
    step = SIBStep(model, loss_of(LOSSES["balanced"], process_group="world"), (), **PLAIN | more)
    for _ in range(2):  # DDP takes another way in its second iteration
        model.zero_grad()
        terms = step.terms(x, y)
        terms.loss.backward()
    if (of_ddp or {}).get("find_unused_parameters"):
        assert problem.model.unused.weight.grad is None
    return {"loss": terms.loss.detach()}, [p.grad for p in parameters]


@pytest.mark.parametrize("sizes", [(4, 4), (5, 2)], ids=["equal batches", "unequal batches"])
@pytest.mark.parametrize("more", [{}, {"microbatch": 2}], ids=str)
@pytest.mark.parametrize("of_ddp", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_a_step_on_two_processes_equals_the_loss_on_the_joined_batch(on_ranks, of_ddp, more, sizes):
    """DDP sees one forward pass and one backward pass a step, whatever the engine does in them."""
    ranks = on_ranks(engine_step, sizes, more, of_ddp)
    assert_same_step(ranks, joined_step(sizes, LOSSES["balanced"], torch.float64), 1e-12)


def feature_step(rank, sizes, options, more, of_ddp):
    problem = problem_of(sizes)
    x, y = part(problem, sizes, rank)
    model = DistributedDataParallel(problem.model, **of_ddp)
    step = SIBStep(model, loss_of(options, process_group="world"), **PLAIN | more)
    for _ in range(2):
        model.zero_grad()
        terms = step.terms(x, y)
        terms.loss.backward()
    assert step.layers
    return {name: value.detach() for name, value in scalars_of(terms).items()}, [p.grad for p in problem.parameters]


@pytest.mark.parametrize("sizes", [(4, 4), (5, 2)], ids=["equal batches", "unequal batches"])
@pytest.mark.parametrize("more", [{}, {"microbatch": 2}], ids=str)
@pytest.mark.parametrize("of_ddp", [{}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("options", [OF_FEATURES, OF_FEATURES | {"input_background": 1.0}], ids=["alone", "beside"])
def test_terms_for_feature_maps_are_those_of_the_joined_batch(on_ranks, options, of_ddp, more, sizes):
    problem = problem_of(sizes)
    terms = SIBStep(problem.model, loss_of(options), **PLAIN).terms(problem.x, problem.y)
    expected = terms, gradients(terms.loss, problem.parameters)
    assert_same_step(on_ranks(feature_step, sizes, options, more, of_ddp), expected, 1e-12)


@pytest.mark.parametrize(
    "more", [{"engine": "double_backward"}, {"microbatch": 2, "engine": "double_backward"}], ids=str
)
@pytest.mark.parametrize("wrap", ["compiled inside", "compiled outside"])
def test_a_compiled_model_in_ddp_is_averaged_over_the_ranks(on_ranks, wrap, more):
    ranks = on_ranks(engine_step, (4, 4), {"engine": "double_backward"} | more, None, wrap)
    assert_same_step(ranks, joined_step((4, 4), LOSSES["balanced"], torch.float64), 1e-12)


def unused_step(rank, more):
    """A parameter that no logit needs, and DDP not told of it: an error in the second step, as with any loss."""
    problem = problem_of((4, 4))
    problem.model.unused = nn.Linear(2, 2).double()
    step = SIBStep(DistributedDataParallel(problem.model), loss_of(LOSSES["balanced"]), (), **PLAIN | more)
    x, y = part(problem, (4, 4), rank)
    try:
        for _ in range(2):
            step(x, y).backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("more", [{}, {"microbatch": 2}], ids=str)
def test_ddp_complains_of_unused_parameters_as_ever(on_ranks, more):
    assert all("find_unused_parameters" in message for message in on_ranks(unused_step, more))


def batch_norm_step(rank, options, of_ddp):
    """Three steps with BatchNorms: they leave rank 0's statistics, and the mean of the ranks' gradients."""
    sizes = (4, 4)
    problem = tiny_problem(batch=sum(sizes), dtype=torch.float64, norm="batch", activation=nn.Softplus)
    x, y = part(problem, sizes, rank)
    alone, plain = copy.deepcopy(problem.model), DistributedDataParallel(copy.deepcopy(problem.model), **of_ddp)
    model = DistributedDataParallel(problem.model, **of_ddp)
    step, own = (SIBStep(m, loss_of(options), **PLAIN) for m in (model, alone))
    for _ in range(3):
        model.zero_grad()
        step(x, y).backward()
        plain(x).sum().backward()
    own(x, y).backward()
    gradients = flat([p.grad for p in alone.parameters()])
    dist.all_reduce(gradients)
    assert_near(flat([p.grad for p in problem.parameters]), gradients / WORLD, 1e-12)
    for found, expected in zip(model.module.buffers(), plain.module.buffers(), strict=True):
        assert_near(found, expected, 1e-12)
    assert sum(1 for _ in model.module.buffers())


@pytest.mark.parametrize("of_ddp", [{}, {"broadcast_buffers": False}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("options", [LOSSES["balanced"], OF_FEATURES], ids=["input", "feature map"])
def test_batch_norms_keep_the_statistics_that_plain_ddp_leaves(on_ranks, options, of_ddp):
    on_ranks(batch_norm_step, options, of_ddp)
