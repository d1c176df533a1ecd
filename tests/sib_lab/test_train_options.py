"""What a training may do beside descending its loss: weights, smoothing, clipping, accumulation, averages, patience."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sib_lab.data import open_data, stack
from sib_lab.networks.own import SmallCNN
from sib_lab.training import augmentation, logs, runs, train
from sib_lab.training.batches import Batches, epoch_order
from sib_lab.training.config import METHODS, TrainConfig
from sib_lab.training.history import History
from sib_lab.training.losses import LOCALISATIONS, make_criterion
from sib_lab.training.making import class_weights
from sib_lab.training.runs import LAST, TrainingError, open_run
from sib_lab.training.schedule import learning_rate
from sib_lab.training.trainer import Trainer
from test_train import DIGITS, SMALL, assert_same_run, one_sentence, run, same_weights, stop_at
from torch.nn.utils import clip_grad_norm_, get_total_norm

from sib_ext import SIBStep, SpatialIBLoss

WEIGHTS = tuple(0.25 * (label + 1) for label in range(10))


@pytest.fixture(scope="module")
def data():
    return open_data("digits", **DIGITS)


def latest(folder):
    return open_run(folder, best=False).model


def plain_loop(data, options, step_of, after_backward=lambda model: None, after_step=lambda model: None):
    """The same training written down: ``step_of(model)`` gives the loss of the images of a step, and goes backward."""
    torch.manual_seed(options.seed)
    model = SmallCNN()
    backward = step_of(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=options.weight_decay)
    size = options.images_per_step
    count = len(data.train) // size
    for done in range(count * options.epochs):
        epoch, number = divmod(done, count)
        item = stack(data.train, epoch_order(options.seed, epoch, len(data.train))[number * size :][:size].tolist())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, done, count * options.epochs, count)
        optimizer.zero_grad()
        backward(item)
        after_backward(model)
        optimizer.step()
        after_step(model)
    return model.eval()


def cross_entropy_of(**options):
    return lambda model: lambda item: F.cross_entropy(model(item.image), item.label, **options).backward()


# ------------------------------------------------------------------------- class weights, label smoothing


@pytest.mark.parametrize("extra", [{"class_weights": WEIGHTS}, {"label_smoothing": 0.2}], ids=["weights", "smoothing"])
def test_the_cross_entropy_of_every_method_is_torchs(data, extra):
    item = stack(data.train, range(8))
    of_torch = {"label_smoothing": extra.get("label_smoothing", 0.0)}
    weight = torch.tensor(WEIGHTS) if "class_weights" in extra else None
    for method in METHODS:
        for mask in (item.mask, None):
            torch.manual_seed(3)
            model = SmallCNN()
            options = {"jitter": 0.0} if method in ("sib", "sib-paper", "centre-mask") else {}
            config = replace(SMALL, method=method, loss_options=options, **extra)
            layer = "block4" if method in LOCALISATIONS else None
            parts = make_criterion(config, layer, 0.2, weight)(model, item.image, item.label, mask)
            expected = F.cross_entropy(model(item.image), item.label, weight=weight, **of_torch)
            assert parts["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5), method
            assert parts["cross_entropy"].item() != pytest.approx(F.cross_entropy(model(item.image), item.label).item())


def test_training_with_weights_and_smoothing_is_a_plain_loop(data, tmp_path):
    options = replace(SMALL, class_weights=WEIGHTS, label_smoothing=0.1)
    run(options, tmp_path, data)
    step = cross_entropy_of(weight=torch.tensor(WEIGHTS), label_smoothing=0.1)
    assert same_weights(latest(tmp_path), plain_loop(data, options, step))


def test_balanced_weights_give_every_class_the_same_total(data):
    weights = class_weights(replace(SMALL, class_weights="balanced"), data)
    counts = torch.bincount(data.train.labels, minlength=10)
    assert len(set(counts.tolist())) > 1
    torch.testing.assert_close(weights * counts, torch.full((10,), len(data.train) / 10))
    assert class_weights(SMALL, data) is None


def test_weights_that_are_not_one_a_class_are_said_in_one_sentence(data, tmp_path):
    with pytest.raises(TrainingError, match="class_weights must have one number for each of the 10 classes, got 2"):
        run(replace(SMALL, class_weights=(1.0, 2.0)), tmp_path, data)


def test_weights_are_given_once_for_every_method(data, tmp_path):
    options = replace(SMALL, method="sib", loss_options={"label_smoothing": 0.1})
    with pytest.raises(
        TrainingError, match="label_smoothing is no option of one method: give label_smoothing"
    ) as error:
        run(options, tmp_path, data)
    assert one_sentence(error)


# ---------------------------------------------------------------------------------- clipping, accumulation


def test_clipping_bounds_the_norm_of_the_gradient_and_is_torchs(data, tmp_path, monkeypatch):
    options, norms = replace(SMALL, clip_norm=0.5), []
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        norms.append(get_total_norm([p.grad for group in self.param_groups for p in group["params"]]).item())
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        done = run(options, tmp_path, data)
    assert max(norms) <= 0.5 + 1e-5 and max(done.curves["gradient_norm"]) > 0.6
    loop = plain_loop(
        data, options, cross_entropy_of(), after_backward=lambda model: clip_grad_norm_(model.parameters(), 0.5)
    )
    assert same_weights(latest(tmp_path), loop)


def test_a_step_of_several_batches_has_the_mean_of_their_losses(data, tmp_path):
    options = replace(SMALL, batch_size=8, accumulate=3, epochs=2)

    def step_of(model):
        def backward(item):
            for x, y in zip(item.image.chunk(3), item.label.chunk(3), strict=True):
                (F.cross_entropy(model(x), y) / 3).backward()

        return backward

    done = run(options, tmp_path, data)
    assert same_weights(latest(tmp_path), plain_loop(data, options, step_of))
    assert done.curves["step"] == list(range(1, 7)) and Batches(data.train, options).steps_per_epoch == 3


def test_the_statistics_of_sib_are_those_of_all_batches_of_a_step(data, tmp_path):
    fixed, of_step = {"seed": "target_logit"}, {"jitter": 0.0}
    options = replace(SMALL, method="sib", batch_size=8, accumulate=3, loss_options=fixed | of_step)

    def step_of(model):
        step = SIBStep(model, SpatialIBLoss(**fixed), microbatch=8, **of_step)
        return lambda item: step(item.image, item.label, item.mask).backward()

    run(options, tmp_path, data)
    assert same_weights(latest(tmp_path), plain_loop(data, options, step_of))


# -------------------------------------------------------------------------------------------- averaged weights


def test_the_average_is_the_hand_made_one_and_is_evaluated_and_kept(data, tmp_path):
    options, average, decay = replace(SMALL, ema=0.7), {}, 0.7

    def after_step(model):
        for name, value in model.state_dict().items():
            known = average.get(name)
            average[name] = value.clone() if known is None else decay * known + (1 - decay) * value

    done = run(options, tmp_path, data)
    raw = plain_loop(data, options, cross_entropy_of(), after_step=after_step)
    assert open_run(tmp_path / LAST).epoch == 2
    for name, value in latest(tmp_path).state_dict().items():
        torch.testing.assert_close(value, average[name].to(value.dtype), rtol=1e-5, atol=1e-7)
        assert not value.is_floating_point() or not torch.equal(value, raw.state_dict()[name])
    stored = runs.load_state(tmp_path / LAST)["raw"]
    assert all(torch.equal(value, stored[name]) for name, value in raw.state_dict().items())

    item = stack(data.validation["matched"], range(20))
    with torch.no_grad():
        right = (latest(tmp_path)(item.image).argmax(1) == item.label).double().mean().item()
    assert done.history[-1]["accuracy_matched"] == right


@pytest.mark.parametrize("network", ["resnet18", "vit_b_32"])
def test_an_average_of_a_larger_network_is_a_network_of_its_own(network):
    from sib_lab.networks.build import build_network
    from sib_lab.training.average import average_of

    model = build_network(network, 3, 32)
    average = average_of(model, 0.5)
    average.update_parameters(model)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    expected = model.eval()(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(average.module.eval()(x), expected) and not torch.equal(model(x), expected)


# -------------------------------------------------------------------------------------------- patience


def test_patience_counts_the_epochs_since_the_accuracy_was_last_better():
    history = History(10, 2)
    counts = []
    for accuracy in (0.2, 0.5, 0.5, 0.4, 0.6, 0.6):
        history.epochs.append({"accuracy": accuracy})
        counts.append(history.epochs_without_better("accuracy"))
    assert counts == [0, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("stop", [None, 10])
def test_a_training_ends_when_its_patience_does(data, tmp_path, monkeypatch, stop):
    accuracies = (0.2, 0.5, 0.5, 0.4, 0.6, 0.6)

    def evaluate(self, split):
        return accuracies[self.epoch - 1], 1.0

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    options = replace(SMALL, epochs=6, patience=2)
    if stop:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, stop)
            run(options, tmp_path, data)
    done = run(options, tmp_path, data)
    assert done.finished and len(done.history) == 4 and done.epoch == 3
    # The schedule is that of all epochs.
    assert done.history[-1]["learning_rate"] == learning_rate(options, 15, 24, 4)
    assert run(options, tmp_path, data).finished


# ------------------------------------------------------------------------------------------ resumption of all


@pytest.mark.parametrize(
    "extra",
    [
        {"class_weights": "balanced", "label_smoothing": 0.1, "clip_norm": 0.5},
        {"method": "sib", "accumulate": 2, "batch_size": 8},
        {"ema": 0.9},
        {"method": "rrr", "ema": 0.5, "accumulate": 2, "batch_size": 8, "clip_norm": 1.0, "patience": 9},
        {"augment": True, "augmentation": "trivial"},
    ],
    ids=lambda extra: "+".join(extra),
)
@pytest.mark.parametrize("step", [2, 6])
def test_with_each_option_a_run_that_was_stopped_goes_on_to_the_same_numbers(tmp_path, monkeypatch, extra, step):
    options = replace(SMALL, **extra)
    run(options, tmp_path / "whole", None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, step)
        run(options, tmp_path / "parts", None)
    torch.manual_seed(5)  # whatever the generator is then
    run(options, tmp_path / "parts", None)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# -------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_the_mask_follows_where_pixels_move_and_stays_where_colours_change(kind, monkeypatch):
    trivial = augmentation.TrivialLayers()
    layers = torch.zeros(4, 20, 20)
    layers[:, 5:12, 6:15] = 1.0
    layers = (255 * layers).to(kind) if kind == torch.uint8 else layers
    torch.manual_seed(0)
    for name in trivial._AUGMENTATION_SPACE:
        monkeypatch.setattr(trivial, "_get_random_item", lambda space, name=name: (name, space[name]))
        moved = []
        for _ in range(6):
            out = torch.as_tensor(trivial(layers))
            assert out.shape == layers.shape and out.dtype == kind
            moved.append(not torch.equal(out[3], layers[3]))
            if name in augmentation.GEOMETRIC:  # all layers are alike, and move alike
                assert torch.equal(out[3], out[0])
        assert any(moved) == (name in augmentation.GEOMETRIC), name


def test_trivial_augmentation_changes_training_images_beyond_their_crops():
    sets = [
        runs.open_config_data(replace(SMALL, augment=True, augmentation=name)).train for name in ("crops", "trivial")
    ]
    same = [torch.equal(sets[0][row].image, sets[1][row].image) for row in range(24)]
    assert not all(same)
    again = runs.open_config_data(replace(SMALL, augment=True, augmentation="trivial")).train
    assert all(torch.equal(sets[1][row].image, again[row].image) for row in range(24))


# ------------------------------------------------------------------------------------- Weights & Biases


@pytest.fixture
def wandb(monkeypatch):
    """A module in its place that notes what it is told; a run goes on by its id."""
    known: dict[str, list] = {}

    def init(**options):
        lines = known.setdefault(options["id"], [])

        def log(values, step):
            assert not lines or step >= lines[-1][0]
            lines.append((step, values))

        step = lines[-1][0] + 1 if lines else 0
        module.calls.append(options)
        return SimpleNamespace(log=log, finish=lambda exit_code: module.ends.append(exit_code), step=step)

    module = ModuleType("wandb")
    module.calls, module.ends, module.known, module.init = [], [], known, init
    module.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
    module.__spec__ = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_curves_go_to_weights_and_biases_once_when_asked_for(data, tmp_path, wandb, monkeypatch):
    run(SMALL, tmp_path / "without", data)
    assert not wandb.calls
    options = replace(SMALL, wandb="mine")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 6)
        run(options, tmp_path / "run", data)
    run(options, tmp_path / "run", data)
    first, second = wandb.calls
    assert first["project"] == "mine" and first["name"] == "run" and first["id"] == second["id"]
    assert first["reinit"] == "create_new" and first["config"]["epochs"] == 2
    assert wandb.ends == [1, 0]  # stopped, ended
    ((_, lines),) = wandb.known.items()
    steps = [step for step, values in lines if "step/loss" in values]
    assert steps == list(range(1, 9))
    assert [step for step, values in lines if "epoch/accuracy_matched" in values] == [4, 8]
    done = open_run(tmp_path / "run")
    assert [values["step/loss"] for _, values in lines if "step/loss" in values] == done.curves["loss"]


@pytest.mark.parametrize("kind", ["Error", "ValueError"])
def test_weights_and_biases_that_refuse_are_one_sentence_and_the_old_run_stays(
    data, tmp_path, wandb, monkeypatch, kind
):
    run(SMALL, tmp_path, data)

    def refuse(**options):
        raise (wandb.errors.Error if kind == "Error" else ValueError)("1 error\nmode\n  Should be online.\n    See.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(TrainingError, match=r"cannot be used \(1 error mode Should be online\): log in with") as error:
        run(replace(SMALL, wandb="mine", seed=1), tmp_path, data, resume=False)
    assert one_sentence(error) and open_run(tmp_path).finished and open_run(tmp_path).config.seed == 0


def test_without_weights_and_biases_it_is_said_in_one_sentence(data, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="--wandb needs wandb, which is not installed: pip install wandb") as error:
        run(replace(SMALL, wandb="mine"), tmp_path, data)
    assert one_sentence(error)


# ---------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0 and finite, got 0.0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"ema": 1.0}, r"ema must lie in \(0, 1\), got 1.0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"class_weights": "even"}, "class_weights must be balanced or a number for each class, got 'even'"),
        ({"class_weights": (0.0, 0.0)}, "class_weights must be finite numbers of at least 0, not all of them 0"),
        ({"class_weights": (1.0, float("nan"))}, "class_weights must be finite numbers"),
        ({"augmentation": "more", "augment": True}, "augmentation must be one of crops, trivial, got 'more'"),
        ({"augmentation": "trivial"}, "augmentation trivial has no use without augment"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"loss_options": [1]}, r"loss_options must be names with their values, got \[1\]"),
        ({"match": 3}, "match must be a list of numbers, got 3"),
        ({"root": 3}, "root must be a word or nothing, got 3"),
    ],
)
def test_an_option_that_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_train_has_the_check_that_others_call():
    assert train.check.__module__ == "sib_lab.training.check"


def test_weights_of_classes_may_be_whole_numbers(data):
    options = replace(SMALL, class_weights=[1, 2] + [1] * (len(data.classes) - 2))
    assert options.class_weights[1] == 2.0 and class_weights(options, data).dtype == torch.float32
