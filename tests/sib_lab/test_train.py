"""The trainer: its recipes, its numbers against a plain loop, its run folder, and its answers to what goes wrong."""

import csv
import errno
import json
import math
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sib_lab.data import DataError, open_data, stack
from sib_lab.experiments.compare import check_same
from sib_lab.networks.own import SmallCNN
from sib_lab.training import batches, config, runs, train
from sib_lab.training.batches import Batches, all_batches, epoch_order, mean_object_area
from sib_lab.training.config import METHODS, PAPER_NETWORKS, PAPER_SETS, TrainConfig, paper_recipes, recipe
from sib_lab.training.losses import LOCALISATIONS, preset_constants
from sib_lab.training.runs import (
    BEST,
    CONFIG,
    DATA,
    FINISHED,
    LAST,
    LOCK,
    METRICS,
    OPTIONS,
    STEPS,
    TENSORBOARD,
    CheckpointError,
    RunError,
    TrainingError,
    open_run,
)
from sib_lab.training.schedule import learning_rate
from sib_lab.training.trainer import Trainer

from sib_ext import SIBStep, SpatialIBLoss
from sib_ext.loss import PRESETS

DIGITS = {"train": 72, "validation": 20, "test": 10, "copies": 1}
SMALL = TrainConfig(
    method="ce", epochs=2, batch_size=16, learning_rate=2e-3, data_options=DIGITS, threads=1, device="cpu"
)
STEPS_PER_EPOCH = 72 // 16


@pytest.fixture(scope="module")
def data():
    return open_data("digits", **DIGITS)


def run(options, folder, data, **arguments):
    return train.train(options, folder, quiet=True, data=data, **arguments)


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --------------------------------------------------------------------------------------------- recipes


def test_the_papers_twenty_recipes_have_its_constants():
    recipes = paper_recipes()
    assert set(recipes) == {(d, n) for d in PAPER_SETS for n in PAPER_NETWORKS} and len(recipes) == 20
    for (data, network), options in recipes.items():
        assert (options.data, options.network, options.method) == (data, network, "sib-paper")
        assert (options.learning_rate, options.weight_decay, options.epochs) == (1e-4, 1e-4, 90)
        assert options.schedule == "step" and options.size == 224 and 32 <= options.batch_size <= 256
        assert options.augment == (data == "imagenet")
        weak = network == "vit_b_32" and data in ("cub200", "dogs", "pets")
        assert options.loss_options == ({"input_foreground": 1e-5} if weak else {})


def test_the_recipe_for_fine_tuning_has_its_rate_and_the_losses_preset():
    options = recipe("fine_tuning", "folder", "efficientnet_lite0", weights="imagenet")
    assert (options.learning_rate, options.augment, options.loss_options) == (1e-3, True, {"preset": "fine_tuning"})
    assert recipe("fine_tuning", "folder", "vit_b_32").learning_rate == pytest.approx(1e-4)
    assert recipe("fine_tuning", method="centre-mask").loss_options == {"preset": "fine_tuning"}
    for method in ("ce", "sib-paper", "energy-loss", "gradient-penalty"):
        assert recipe("fine_tuning", method=method).loss_options == {}
    assert recipe("fine_tuning", loss_options={"area": 0.4}).loss_options == {"preset": "fine_tuning", "area": 0.4}
    assert recipe("fine_tuning", method="rrr", loss_options={}).loss_options == {}


def test_a_run_is_not_gone_on_with_under_other_constants_of_its_preset(tmp_path, monkeypatch):
    options = recipe("fine_tuning", epochs=1, batch_size=16, data_options=DIGITS, threads=1, device="cpu")
    train.train(options, tmp_path, quiet=True)
    assert runs.read_record(tmp_path)["constants"] == PRESETS["fine_tuning"]
    monkeypatch.setitem(PRESETS["fine_tuning"], "input_background", 30.0)
    with pytest.raises(CheckpointError, match="was made with input_background = 3.0: go on with the same options"):
        train.train(options, tmp_path, quiet=True)
    with pytest.raises(RunError, match="was begun with input_background = 3.0"):
        check_same(options, tmp_path)
    assert not preset_constants(replace(options, method="ce", loss_options={}))


def test_the_papers_learning_rate_falls_tenfold_every_thirty_epochs():
    options = recipe("paper", "imagenet", "resnet50")
    rates = [learning_rate(options, epoch * 7 + step, 90 * 7, 7) for epoch in range(90) for step in (0, 6)]
    assert rates[:60] == pytest.approx([1e-4] * 60)
    assert rates[60:120] == pytest.approx([1e-5] * 60) and rates[120:] == pytest.approx([1e-6] * 60)


def test_the_one_cycle_rate_rises_over_a_tenth_and_falls_as_a_cosine_to_nothing():
    options = recipe()
    rates = [learning_rate(options, step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([4e-3 * (step + 1) / 10 for step in range(10)])
    assert rates[54] == pytest.approx(2e-3) and rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_a_constant_rate_stays():
    assert {learning_rate(replace(SMALL, schedule="constant"), step, 9, 3) for step in range(9)} == {2e-3}


def test_the_balanced_recipe_is_the_demos():
    options = recipe()
    assert (options.batch_size, options.learning_rate, options.epochs, options.weight_decay) == (32, 4e-3, 14, 1e-4)
    assert (options.schedule, options.warm_up, options.method, options.network) == (
        "one-cycle",
        0.1,
        "sib",
        "small_cnn",
    )


def test_changes_replace_a_recipes_options_and_its_methods_own_go_with_the_method():
    assert recipe("paper", "pets", "vit_b_32", epochs=3).epochs == 3
    assert recipe("paper", "pets", "vit_b_32", method="ce").loss_options == {}
    changed = recipe("paper", "pets", "vit_b_32", loss_options={"input_foreground": 0.01})
    assert changed.loss_options == {"input_foreground": 0.01}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method must be one of ce, sib, .*, got 'magic'"),
        ({"schedule": "steps"}, "schedule must be one of"),
        ({"precision": "16"}, "precision must be one of 32-true, bf16-mixed, got '16'"),
        ({"device": "tpu"}, "device must be one of"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"annotated": 1.5}, r"annotated must lie in \[0, 1\], got 1.5"),
        ({"warm_up": 1.0}, r"warm_up must lie in \[0, 1\), got 1.0"),
        ({"strength": -1.0}, "strength must be at least 0"),
        ({"strength": 1.0, "method": "ce"}, "strength has no meaning for method ce"),
        ({"match": (1e-4,)}, "match is an option of method gradient-penalty, got method sib"),
        ({"devices": 3}, "batch_size 32 cannot be shared evenly by 3 devices"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"annotation": "points"}, "annotation must be one of masks, boxes, got 'points'"),
    ],
)
def test_an_option_that_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="preset must be one of balanced, fine_tuning, paper, got 'fast'"):
        recipe("fast")


def test_only_options_of_the_machine_may_differ_between_a_run_and_its_end():
    saved = runs.plain(vars(SMALL))
    assert SMALL.differing(json.loads(json.dumps(saved))) == {}
    other = replace(SMALL, root="/elsewhere", workers=3, threads=2, device="auto", save_steps=7, save_minutes=1.0)
    assert other.differing(saved) == {}
    assert replace(SMALL, seed=3, match=(), loss_options={"a": (1, 2)}).differing(saved) == {
        "seed": 0,
        "loss_options": {},
    }


def test_an_option_that_a_run_was_saved_without_had_its_default():
    saved = runs.plain(vars(SMALL))
    del saved["annotation"]
    assert SMALL.differing(saved) == {}
    assert replace(SMALL, annotation="boxes").differing(saved) == {"annotation": "masks"}


# --------------------------------------------------------------------------------------------- batches


def test_an_epoch_shows_every_image_at_most_once_and_the_next_in_another_order(data):
    loader = Batches(data.train, SMALL)
    assert loader.steps_per_epoch == STEPS_PER_EPOCH
    orders = [[row for number in range(4) for row in loader.rows(epoch, number)] for epoch in range(2)]
    for order in orders:
        assert len(set(order)) == len(order) == 64
    assert orders[0] != orders[1]
    assert orders[0] == epoch_order(0, 0, 72)[:64].tolist()


def test_processes_share_every_batch(data):
    whole = Batches(data.train, SMALL)
    shares = [Batches(data.train, SMALL, rank, 4) for rank in range(4)]
    for number in range(STEPS_PER_EPOCH):
        rows = [share.rows(1, number) for share in shares]
        assert sorted(sum(rows, [])) == sorted(whole.rows(1, number)) and {len(r) for r in rows} == {4}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_of_an_epoch_are_those_of_its_order_from_any_on(data, workers):
    loader = Batches(data.train, replace(SMALL, workers=workers))
    for epoch, start in ((0, 0), (1, 2)):
        items = list(loader.from_batch(epoch, start))
        assert len(items) == STEPS_PER_EPOCH - start
        for number, item in enumerate(items, start):
            expected = stack(data.train, loader.rows(epoch, number))
            assert all(torch.equal(a, b) for a, b in zip(item, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_images_depend_neither_on_workers_nor_on_where_an_epoch_began(workers):
    augmented = open_data("digits", augment=True, **DIGITS).train
    whole = list(Batches(augmented, SMALL).from_batch(1, 0))
    torch.manual_seed(99)
    part = list(Batches(augmented, replace(SMALL, workers=workers)).from_batch(1, 2))
    for a, b in zip(whole[2:], part, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask)
    again = next(iter(Batches(augmented, SMALL).from_batch(2, 0)))
    rows = Batches(augmented, SMALL).rows(2, 0)
    assert not torch.equal(again.image, stack(open_data("digits", **DIGITS).train, rows).image)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_evaluated_once(data, workers, monkeypatch):
    monkeypatch.setattr(batches, "EVALUATION_BATCH", 7)
    split = data.validation["matched"]
    labels = [list(all_batches(split, workers, rank, 3)) for rank in range(3)]
    seen = [torch.cat([item.label for item in items]) for items in labels]
    assert sum(len(s) for s in seen) == 20
    for rank, found in enumerate(seen):
        assert found.tolist() == split.labels[rank::3].tolist()


def test_the_objects_area_is_that_of_the_annotated_masks(data):
    expected = torch.stack([item.mask for item in data.train]).double().mean().item()
    assert mean_object_area(data.train) == pytest.approx(expected)
    half = open_data("digits", annotated=0.5, **DIGITS).train
    expected = torch.stack([item.mask for item in half if item.annotated]).double().mean().item()
    assert mean_object_area(half) == pytest.approx(expected)
    assert mean_object_area(open_data("digits", annotated=0.0, **DIGITS).train) is None


# -------------------------------------------------------------------------------------------- training


def cross_entropy_step(model):
    return lambda x, y, mask: F.cross_entropy(model(x), y)


def plain_loop(data, make_step, options=SMALL):
    """The same training written down as a reader of the README would."""
    torch.manual_seed(options.seed)
    model = SmallCNN()
    step = make_step(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=options.weight_decay)
    steps, done, losses = STEPS_PER_EPOCH * options.epochs, 0, []
    for epoch in range(options.epochs):
        order = epoch_order(options.seed, epoch, len(data.train))
        for number in range(STEPS_PER_EPOCH):
            item = stack(data.train, order[number * 16 : number * 16 + 16].tolist())
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, done, steps, STEPS_PER_EPOCH)
            loss = step(item.image, item.label, item.mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            losses.append(loss.item())
    return model.eval(), losses


@pytest.mark.parametrize("method", ["ce", "sib"])
def test_training_is_a_plain_training_loop_bit_for_bit(data, tmp_path, method):
    # Without chance: the trainer sets torch's generator before every step, a plain loop does not.
    fixed, of_step = ({}, {}) if method == "ce" else ({"seed": "target_logit"}, {"jitter": 0.0})

    def sib_step(model):
        return SIBStep(model, SpatialIBLoss(**fixed), **of_step)

    model, losses = plain_loop(data, cross_entropy_step if method == "ce" else sib_step)
    options = replace(SMALL, method=method, loss_options=fixed | of_step)
    run(options, tmp_path, data)
    trained = open_run(tmp_path, best=False)
    assert same_weights(trained.model, model)
    assert trained.curves["loss"] == losses and trained.curves["step"] == list(range(1, 9))

    split = data.validation["uncorrelated"]
    item = stack(split, range(20))
    with torch.no_grad():
        logits = model(item.image)
    assert trained.history[-1]["accuracy_uncorrelated"] == (logits.argmax(1) == item.label).double().mean().item()
    expected = F.cross_entropy(logits, item.label).item()
    assert trained.history[-1]["cross_entropy_uncorrelated"] == pytest.approx(expected, rel=1e-6)
    assert trained.history[0]["loss"] == pytest.approx(sum(losses[:4]) / 4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_logs_its_parts(data, tmp_path, method):
    done = run(replace(SMALL, method=method, epochs=1), tmp_path, data)
    assert done.finished and done.epoch == 1 and len(done.history) == 1
    of_map = {f"{kind}_block4" for kind in ("background", "foreground", "empty")}
    parts = {
        "ce": set(),
        "gradient-penalty": {"penalty", "vjp_variance"},
        "rrr": {"background"},
        "energy-loss": {"background"},
        "l1-loss": {"distance"},
        "rrr-loss": {"background"},
        "ppce-loss": {"foreground_cross_entropy"},
        "sib-paper": {"background_input", "foreground_input", "empty_input", "vjp_variance"},
    }.get(method, {"background_input", "empty_input", "vjp_variance"} | of_map)
    (line,) = lines(tmp_path / METRICS)
    measured = {"accuracy_matched", "cross_entropy_matched", "accuracy_uncorrelated", "cross_entropy_uncorrelated"}
    seconds = {"seconds_median", "seconds_p20", "seconds_p80", "seconds_mean"}
    common = {"epoch", "step", "learning_rate", "loss", "cross_entropy", "gradient_norm"}
    assert set(line) == common | parts | measured | seconds
    assert all(math.isfinite(float(value)) for value in line.values())
    assert {name: float(value) for name, value in line.items()} == done.history[0]


def test_masks_that_are_not_annotated_do_not_matter(tmp_path):
    some = open_data("digits", annotated=0.4, **DIGITS)
    none = open_data("digits", annotated=0.0, **DIGITS)
    options = replace(SMALL, method="sib", epochs=1)
    results = {}
    for name, (data, masks) in {
        "some": (some, "given"),
        "none": (none, "given"),
        "self-made": (some, "self-made"),
    }.items():
        results[name] = run(replace(options, masks=masks), tmp_path / name, data).history[0]["loss"]
    assert results["none"] == results["self-made"] != results["some"]


def test_a_matched_penalty_takes_the_variances_of_a_run(data, tmp_path):
    reference = run(replace(SMALL, method="sib"), tmp_path / "sib", data)
    match = tuple(line["vjp_variance"] for line in reference.history)
    done = run(replace(SMALL, method="gradient-penalty", match=match), tmp_path / "penalty", data)
    assert done.config.match == match and done.history[-1]["vjp_variance"] > 0


def test_a_part_that_some_steps_do_not_have_is_the_mean_of_those_that_do(data, tmp_path, monkeypatch):
    from sib_lab.training import losses

    monkeypatch.setattr(train, "check", lambda *_: None)  # which calls the loss, too
    original, calls = losses.CrossEntropy.forward, iter(range(100))

    def forward(self, model, x, y, *masks):
        parts, call = original(self, model, x, y, *masks), next(calls)
        return parts | ({"now_and_then": torch.tensor(float(call))} if call % 3 == 1 else {})

    monkeypatch.setattr(losses.CrossEntropy, "forward", forward)
    done = run(SMALL, tmp_path, data)
    assert str(done.curves["now_and_then"]) == "[nan, 1.0, nan, nan, 4.0, nan, nan, 7.0]"
    assert [line["now_and_then"] for line in done.history] == [1.0, 5.5]


# ------------------------------------------------------------------------------------------ run folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "ce"
    run(replace(SMALL, epochs=3), folder, data)
    return folder


def test_a_run_folder_records_options_versions_and_commit(finished):
    files = {CONFIG, OPTIONS, DATA, METRICS, STEPS, TENSORBOARD, LAST, BEST, FINISHED, LOCK}
    assert {p.name for p in finished.iterdir()} == files
    record = json.loads((finished / CONFIG).read_text())
    assert record["config"]["seed"] == 0 and record["config"]["data_options"] == DIGITS
    (start,) = record["starts"]
    assert start["step"] == 0 and start["versions"]["torch"] == torch.__version__.split("+")[0]
    here = Path(train.__file__).parent
    try:
        git = ["git", "-C", str(here)]
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "keeper.py"], capture_output=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return
    if tracked.returncode == 0:
        assert start["git_commit"].removesuffix("+changes") == head.stdout.strip()
    else:
        assert start["git_commit"] is None


def test_outside_git_there_is_no_commit(tmp_path, monkeypatch):
    from sib_lab.training import keeper

    (tmp_path / "keeper.py").touch()
    monkeypatch.setattr(keeper, "__file__", str(tmp_path / "keeper.py"))
    assert keeper.git_commit() is None
    monkeypatch.setenv("PATH", "")
    assert keeper.git_commit() is None


def tensorboard_events(folder: Path) -> list[tuple[str, int, float]]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    (path,) = (folder / TENSORBOARD).iterdir()
    events = loader.EventFileLoader(str(path)).Load()
    return [(v.tag, e.step, v.tensor.float_val[0]) for e in events for v in e.summary.value]


def test_tensorboard_shows_the_numbers_of_the_csv_files_once(finished):
    events = tensorboard_events(finished)
    keys = [(tag, step) for tag, step, _ in events]
    assert len(set(keys)) == len(keys)
    found = {key: value for *key, value in map(list, events) for key in [tuple(key)]}
    for group, name in (("epoch", METRICS), ("step", STEPS)):
        for line in lines(finished / name):
            for column in line.keys() - {"epoch", "step"}:
                value = float(line[column])
                assert found.pop((f"{group}/{column}", int(line["step"]))) == pytest.approx(value, rel=1e-6)
    assert not found


def test_seconds_a_step_leave_out_loading_data(data, tmp_path, monkeypatch):
    slow = batches.stack

    def slowed(dataset, rows):
        import time

        if dataset is data.train:
            time.sleep(0.5)
        return slow(dataset, rows)

    monkeypatch.setattr(batches, "stack", slowed)
    done = run(replace(SMALL, epochs=1), tmp_path, data)
    assert 0 < done.seconds_per_step["p20"] <= done.seconds_per_step["median"] <= done.seconds_per_step["p80"] < 0.4
    assert json.loads((tmp_path / FINISHED).read_text())["seconds_per_step"] == done.seconds_per_step


@pytest.mark.parametrize(("accuracies", "best"), [((0.2, 0.9, 0.5), 2), ((0.2, 0.9, 0.9), 3), ((0.0, 0.0, 0.0), 3)])
def test_the_best_network_on_validation_is_kept_of_equals_the_later(data, tmp_path, monkeypatch, accuracies, best):
    kept, original = {}, Trainer.evaluate

    def evaluate(self, split):
        kept[self.epoch] = {name: value.clone() for name, value in self.network.state_dict().items()}
        original(self, split)
        # The other split would choose otherwise.
        return (accuracies[self.epoch - 1] if split is data.validation["matched"] else 1 - self.epoch / 10), 1.0

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    done = run(replace(SMALL, epochs=3), tmp_path, data)
    assert done.epoch == best
    assert all(torch.equal(value, kept[best][name]) for name, value in done.model.state_dict().items())
    assert open_run(tmp_path, best=False).epoch == 3 == open_run(tmp_path / LAST).epoch
    summary = json.loads((tmp_path / FINISHED).read_text())
    assert summary["best"]["epoch"] == best and summary["selected_by"] == "accuracy_matched"


def test_an_opened_run_is_in_eval_mode_and_gives_back_what_was_trained(finished, data):
    done = open_run(finished)
    assert not done.model.training and done.classes == data.classes and done.size == 40
    assert done.config == replace(SMALL, epochs=3) and done.finished and len(done.history) == 3
    again = done.data()
    assert torch.equal(again.train[3].image, data.train[3].image)


def test_a_finished_run_is_opened_without_training(finished, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("trained"))
    before = (finished / LAST).stat().st_mtime_ns
    done = train.train(replace(SMALL, epochs=3), finished, quiet=True)
    assert done.finished and (finished / LAST).stat().st_mtime_ns == before


def test_progress_is_a_line_an_epoch_where_there_is_no_terminal(data, tmp_path):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    train.train(SMALL, tmp_path, console=console, data=data)
    text = console.file.getvalue().splitlines()
    assert [line.split(":")[0] for line in text] == ["ce epoch 1/2", "ce epoch 2/2"]


def test_progress_is_a_bar_with_the_time_left_in_a_terminal(data, tmp_path):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    train.train(SMALL, tmp_path, console=console, data=data)
    text = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "8/8 steps" in text and "left 0:00:00" in text and "accuracy" in text


# ----------------------------------------------------------------------------------- stopping, going on


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """A real signal while the given step (from 1) runs."""
    original = Trainer.train_step

    def train_step(self, *arguments, **options):
        if self.step + 1 == step:
            signal.raise_signal(number)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_last_epoch_is_evaluated_stops_with_a_whole_folder(data, tmp_path, monkeypatch, number):
    original = Trainer.evaluate

    def evaluate(self, split):
        if self.step == self.steps:
            signal.raise_signal(number)
        return original(self, split)

    first = next(iter(data.validation))
    data = replace(data, validation={first: data.validation[first]})
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)) as stopped:
        patch.setattr(Trainer, "evaluate", evaluate)
        run(SMALL, tmp_path, data)
    assert isinstance(stopped.value, KeyboardInterrupt) or stopped.value.code == 143
    done = open_run(tmp_path)
    assert done.finished and len(done.history) == 2
    assert run(SMALL, tmp_path, data).history == done.history


def without_seconds(path: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines(path)]


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / STEPS).read_bytes() == (b / STEPS).read_bytes()
    assert without_seconds(a / METRICS) == without_seconds(b / METRICS)
    for best in (True, False):
        assert same_weights(open_run(a, best, trust=True).model, open_run(b, best, trust=True).model)
    strip = [[event for event in tensorboard_events(folder) if "seconds" not in event[0]] for folder in (a, b)]
    assert sorted(strip[0]) == sorted(strip[1])


@pytest.mark.parametrize("step", [1, 4, 6, 8, 12])
def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_numbers(finished, data, tmp_path, monkeypatch, step):
    options = replace(SMALL, epochs=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, step)
        run(options, tmp_path, data)
    assert runs.load_state(tmp_path / LAST)["step"] == step
    assert run(options, tmp_path, data).finished
    assert_same_run(finished, tmp_path)
    starts = json.loads((tmp_path / CONFIG).read_text())["starts"]
    assert [start["step"] for start in starts] == [0, step]


def test_sigterm_stops_in_the_same_way_with_its_own_exit_code(data, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2, signal.SIGTERM)
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as stopped:
        run(SMALL, tmp_path, data)
    assert stopped.value.code == 143 and runs.load_state(tmp_path / LAST)["step"] == 2
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_does_not_wait(data, tmp_path, monkeypatch):
    original = Trainer.train_step

    def train_step(self, *arguments, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, tmp_path, data)
    assert not (tmp_path / LAST).exists()


DROPOUT = """
import torch
from torch import nn

def build(classes, size):
    return nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(),
                         nn.LazyLinear(classes)).to("cpu")
"""


@pytest.fixture
def dropout(tmp_path, monkeypatch):
    """A network that draws random numbers while it trains."""
    (tmp_path / "dropout_network.py").write_text(DROPOUT)
    monkeypatch.chdir(tmp_path)
    return replace(SMALL, network="dropout_network:build", method="gradient-penalty", augment=True)


def test_a_network_with_dropout_on_augmented_images_goes_on_to_the_same_numbers(dropout, tmp_path, monkeypatch):
    run(dropout, tmp_path / "whole", None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 6)
        run(dropout, tmp_path / "parts", None)
    torch.manual_seed(123)  # whatever the generator is then
    run(dropout, tmp_path / "parts", None)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_numbers_do_not_depend_on_the_workers(dropout, tmp_path):
    run(dropout, tmp_path / "none", None)
    run(replace(dropout, workers=2), tmp_path / "two", None)
    assert_same_run(tmp_path / "none", tmp_path / "two")


def test_checkpoints_are_written_within_an_epoch_by_steps_and_by_time(data, tmp_path, monkeypatch):
    saved, original = [], runs.save_state

    def save_state(path, state):
        if path.name == LAST:
            saved.append(state["step"])
        original(path, state)

    monkeypatch.setattr(runs, "save_state", save_state)
    run(replace(SMALL, save_steps=3), tmp_path / "steps", data)
    assert saved == [3, 4, 6, 8]
    saved.clear()
    run(replace(SMALL, save_minutes=1e-9), tmp_path / "time", data)
    assert saved == list(range(1, 9))


def test_starting_anew_removes_what_the_old_run_left(data, tmp_path):
    run(replace(SMALL, epochs=3), tmp_path, data)
    done = run(replace(SMALL, epochs=1, seed=1), tmp_path, data, resume=False)
    assert len(done.history) == 1 and done.config.seed == 1
    assert len(json.loads((tmp_path / CONFIG).read_text())["starts"]) == 1
    assert max(step for _, step, _ in tensorboard_events(tmp_path)) == STEPS_PER_EPOCH


# ---------------------------------------------------------------------------------------------- errors


@pytest.fixture
def stopped(data, tmp_path, monkeypatch):
    """A run folder that stands after step 5 of 8."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 5)
        run(SMALL, tmp_path, data)
    return tmp_path


def one_sentence(error) -> bool:
    text = str(error.value)
    return text.count("\n") == 0 and text.endswith(".") and text[0] == text[0].upper()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other", "lacking"])
def test_a_damaged_checkpoint_is_said_in_one_sentence(stopped, data, damage):
    path = stopped / LAST
    whole = path.read_bytes()
    if damage in ("other", "lacking"):
        state = torch.load(path, weights_only=True)
        del state["model" if damage == "other" else "optimizer"]
        torch.save(state, path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"not a checkpoint", "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"remove this run .* with --out\.$") as error:
        run(SMALL, stopped, data)
    assert one_sentence(error) and str(path) in str(error.value)


def test_a_checkpoint_of_other_options_is_said_in_one_sentence(stopped, data):
    with pytest.raises(CheckpointError, match=r"was made with method = ce, seed = 0: go on with the same") as error:
        run(replace(SMALL, seed=3, method="sib"), stopped, data)
    assert one_sentence(error)


def test_other_options_than_a_finished_runs_are_said_in_one_sentence(finished, data):
    with pytest.raises(CheckpointError, match=r"was made with epochs = 3: go on") as error:
        run(replace(SMALL, epochs=5), finished, data)
    assert one_sentence(error)


def test_a_checkpoint_of_other_classes_does_not_fit(stopped, data):
    with pytest.raises(CheckpointError, match="data of the run in .* is not what it was"):
        run(SMALL, stopped, replace(data, classes=tuple("abcdefghij")))


def test_a_full_disk_leaves_the_last_checkpoint_whole(stopped, data, monkeypatch):
    before = (stopped / LAST).read_bytes()
    original, synced = os.fsync, iter(range(100))

    def full(descriptor):
        if next(synced) >= 3:  # past config.json and the curves of the start
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"cannot be written \(No space left on device\): what was saved") as error:
            run(SMALL, stopped, data)
    assert one_sentence(error)
    assert (stopped / LAST).read_bytes() == before and not list(stopped.glob(".*.tmp"))
    assert run(SMALL, stopped, data).finished


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("state", [{"a": torch.zeros(10)}, {"a": torch.zeros(2_000_000)}], ids=["small", "large"])
def test_a_disk_that_refuses_a_checkpoints_bytes_is_said_in_one_sentence(tmp_path, state):
    path = tmp_path / LAST
    runs.save_state(path, state)
    before = path.read_bytes()
    (tmp_path / f".{LAST}.tmp").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"last.pt cannot be written \(No space left on device\)") as error:
        runs.save_state(path, state)
    assert one_sentence(error) and path.read_bytes() == before


def test_a_folder_that_may_not_be_written_is_said_in_one_sentence(tmp_path, data):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot be written or removed \(Not a directory\)") as error:
        run(SMALL, tmp_path / "file" / "run", data)
    assert one_sentence(error)


def test_a_class_without_training_images_is_named(data, tmp_path):
    with pytest.raises(DataError, match=r"1 of 11 classes have no training image \(unicorn\)"):
        run(SMALL, tmp_path, replace(data, classes=(*data.classes, "unicorn")))


def test_a_device_that_is_not_there_is_said_in_one_sentence(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="1 CUDA device was asked for, but torch sees none") as error:
        run(replace(SMALL, device="cuda"), tmp_path, data)
    assert one_sentence(error)


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_loss_that_is_not_finite_stops_with_its_step_and_leaves_the_weights(data, tmp_path, monkeypatch, where):
    from sib_lab.training import losses

    monkeypatch.setattr(train, "check", lambda *_: None)  # which calls the loss, too
    original, calls = losses.CrossEntropy.forward, iter(range(1, 100))

    def forward(self, model, x, y, *masks):
        parts = original(self, model, x, y, *masks)
        if next(calls) == 6:
            if where == "loss":
                parts["loss"] = parts["loss"] * math.nan
            else:
                parts["loss"].register_hook(lambda gradient: gradient * math.inf)
        return parts

    monkeypatch.setattr(losses.CrossEntropy, "forward", forward)
    message = rf"^The {where} is (nan|inf) at step 6 of 8 \(learning rate 0\.\d+\): train anew with a lower"
    with pytest.raises(TrainingError, match=message) as error:
        run(SMALL, tmp_path, data)
    assert one_sentence(error)
    state = runs.load_state(tmp_path / LAST)
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["model"].values())


def test_batches_larger_than_the_data_are_said_in_one_sentence(data, tmp_path):
    with pytest.raises(TrainingError, match="72 training images in digits, too few for batches of 80") as error:
        run(replace(SMALL, batch_size=80), tmp_path, data)
    assert one_sentence(error)


@pytest.mark.parametrize("method", ["rrr", "energy-loss", "l1-loss", "rrr-loss", "ppce-loss"])
def test_a_method_that_needs_masks_says_so(tmp_path, method):
    none = open_data("digits", annotated=0.0, **DIGITS)
    with pytest.raises(TrainingError, match=f"The method {method} needs masks, but no training image"):
        run(replace(SMALL, method=method), tmp_path, none)


def test_a_loss_option_that_cannot_be_is_said_in_one_sentence(data, tmp_path):
    with pytest.raises(TrainingError, match="The loss cannot be made: .*'speed'") as error:
        run(replace(SMALL, loss_options={"speed": 1}), tmp_path, data)
    assert one_sentence(error)


@pytest.mark.parametrize("method", LOCALISATIONS)
def test_a_layer_is_named_by_option_and_one_that_is_not_there_is_said_in_one_sentence(data, tmp_path, method):
    options = replace(SMALL, method=method, epochs=1)
    terms = [
        run(replace(options, loss_options=extra), tmp_path / str(number), data).history[0][LOCALISATIONS[method].part]
        for number, extra in enumerate(({}, {"layer": "block4"}, {"layer": "block2"}))
    ]
    assert terms[0] == terms[1] != terms[2]
    with pytest.raises(TrainingError, match="The loss cannot be made: the network SmallCNN has no layer 'block9'"):
        run(replace(options, loss_options={"layer": "block9"}), tmp_path / "none", data)


# -------------------------------------------------------------------------------------------- open_run


def test_a_folder_without_a_run_is_said_in_one_sentence(tmp_path):
    with pytest.raises(RunError, match=f"There is no run in {tmp_path}: it has no config.json") as error:
        open_run(tmp_path)
    assert one_sentence(error)


def test_a_run_without_a_first_epoch_has_no_best_network(data, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, tmp_path, data)
    with pytest.raises(RunError, match=r"There is no checkpoint .*best\.pt: the run has not reached") as error:
        open_run(tmp_path)
    assert one_sentence(error) and open_run(tmp_path, best=False).epoch == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["config"].update(network="resnet18"), "do not fit the network resnet18"),
        (lambda record: record["config"].update(speed=3), "has options that this version does not know: speed"),
        (
            lambda record: record["config"].update(method="magic"),
            "has an option that this version refuses: method",
        ),
        (lambda record: record.pop("config"), "cannot be read as a run's configuration"),
    ],
)
def test_a_run_that_does_not_fit_is_said_in_one_sentence(stopped, change, message):
    record = json.loads((stopped / CONFIG).read_text())
    change(record)
    (stopped / CONFIG).write_text(json.dumps(record))
    with pytest.raises(RunError, match=message) as error:
        open_run(stopped)
    assert one_sentence(error)


def test_a_crash_while_writing_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file"
    runs.write_text(path, "old")

    def crash(file):
        file.write(b"half of the n")
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        runs.write_whole(path, crash)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


# ----------------------------------------------------------------------------------------- command line


@pytest.fixture
def from_words(monkeypatch):
    """What a command line's words become, without training."""
    import typer
    from sib_lab.cli import train as command
    from typer.testing import CliRunner

    def call(*words):
        seen = {}

        def trained(config, folder, **options):
            seen.update(config=config, folder=folder, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "train", trained)
        app = typer.Typer()
        app.command("train")(command.train_command)
        app.command("other")(lambda: None)
        result = CliRunner().invoke(app, ["train", "--out", "somewhere", *words])
        return seen or result.stderr

    return call


def test_without_options_the_command_trains_the_balanced_recipe(from_words):
    seen = from_words()
    assert seen == {"config": recipe(), "folder": Path("somewhere"), "resume": True, "quiet": False}


def test_every_option_of_the_command_reaches_the_config(from_words):
    words = (
        "--method rrr --preset paper --data folder --root photos --option masks=m --option boxes=b --size 64 "
        "--agreement 0.5 --annotated 0.25 --annotation boxes --augmentation trivial --limit 9 --skip-broken "
        "--network resnet18 --weights w.pt --mean 0.1,0.2,0.3 --std 1,2,3 "
        "--strength 3 --masks given --loss-option a=0.5 --loss-option b=word "
        "--seed 4 --epochs 5 --batch-size 6 --learning-rate 0.1 --weight-decay 0.2 --schedule constant --warm-up 0.3 "
        "--precision bf16-mixed --device cpu --devices 2 --fast --threads 3 --workers 7 "
        "--save-minutes 8 --save-steps 10 "
        "--class-weights 1,2.5 --label-smoothing 0.1 --accumulate 3 --clip-norm 2 --ema 0.9 --patience 4 --wandb mine "
        "--fresh --quiet"
    )
    seen = from_words(*words.split())
    assert seen["resume"] is False and seen["quiet"] is True
    assert seen["config"] == TrainConfig(
        data="folder", root="photos", size=64, agreement=0.5, annotated=0.25, annotation="boxes", augment=True,
        augmentation="trivial", limit=9, skip_broken=True,
        data_options={"masks": "m", "boxes": "b"}, network="resnet18", weights="w.pt",
        mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0),
        method="rrr", strength=3.0,
        masks="given", loss_options={"a": 0.5, "b": "word"}, seed=4, epochs=5, batch_size=6, learning_rate=0.1,
        weight_decay=0.2, schedule="constant", warm_up=0.3, precision="bf16-mixed", device="cpu", devices=2,
        deterministic=False, threads=3, workers=7, save_minutes=8.0, save_steps=10,
        class_weights=(1.0, 2.5), label_smoothing=0.1, accumulate=3, clip_norm=2.0, ema=0.9, patience=4, wandb="mine",
    )  # fmt: skip
    unset = {f for f in vars(TrainConfig()) if getattr(seen["config"], f) == getattr(TrainConfig(), f)}
    assert unset == {"match"}


def test_match_takes_the_variances_of_a_run_folder(from_words, data, tmp_path):
    reference = run(replace(SMALL, method="sib", epochs=1), tmp_path / "sib", data)
    seen = from_words("--method", "gradient-penalty", "--match", str(tmp_path / "sib"))
    assert seen["config"].match == (reference.history[0]["vjp_variance"],)


def test_match_with_a_run_that_has_no_vjp_is_said_in_one_sentence(from_words, finished):
    message = from_words("--method", "gradient-penalty", "--match", str(finished))
    assert "has no VJP variance to match" in message and message.count("\n") == 1


def test_an_option_that_cannot_be_is_one_sentence_on_the_command_line(from_words):
    assert from_words("--batch-size", "0") == "Batch_size must be at least 1, got 0.\n"


def test_the_options_module_is_light_to_import():
    code = "import sys, sib_lab.training.config, sib_lab.cli.train; assert 'torch' not in sys.modules"
    subprocess.run([os.sys.executable, "-c", code], check=True)
    assert config.METHODS


def test_layers_and_lazy_steps_are_options_of_the_loss_and_survive_a_stop(data, tmp_path, press_ctrl_c):
    options = replace(SMALL, method="sib", loss_options={"layers": ["block4"], "feature_background": 0.5, "every": 3})
    run(options, tmp_path / "whole", data)
    line = open_run(tmp_path / "whole", best=False).history[0]
    assert 0 < line["background_block4"] < 1

    press_ctrl_c(5)
    with pytest.raises(KeyboardInterrupt):
        run(options, tmp_path / "stopped", data)
    run(options, tmp_path / "stopped", data)
    whole, stopped = (open_run(tmp_path / name, best=False) for name in ("whole", "stopped"))
    assert same_weights(whole.model, stopped.model)


def test_a_layer_that_is_not_there_is_named(data, tmp_path):
    with pytest.raises(TrainingError, match="no layer 'block9'"):
        run(replace(SMALL, method="sib", loss_options={"layers": ["block9"]}), tmp_path, data)
