import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sib_lab.data import stack
from sib_lab.experiments.compare import compare, variances, write_report
from sib_lab.experiments.material import Material, gallery_rows, own_groups
from sib_lab.experiments.measurement import curves, shrunk
from sib_lab.experiments.plan import OF_MASKS, OF_NETWORK, Plan
from sib_lab.experiments.record import loss_sentence
from sib_lab.explaining import methods as explain
from sib_lab.reporting import results
from sib_lab.training.config import recipe
from sib_lab.training.runs import LOCK, RunError, TrainingError, open_run
from sib_lab.training.train import train

SEEDS = (0, 1)
NAMES = [f"{method}-seed{seed}" for method in ("ce", "sib") for seed in SEEDS]


def plan_of(tiny, methods=("ce", "sib"), seeds=SEEDS, measures=OF_MASKS, images=12, layer=None, **changes):
    return Plan({method: tiny(method, **changes) for method in methods}, seeds, measures, images, layer)


def run_comparison(plan, folder, **options):
    """Results, and what was printed."""
    console = Console(file=StringIO(), width=120)
    return compare(plan, folder, console=console, **options), console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished comparison: folder, results, what was printed. Not to be changed."""
    folder = tmp_path_factory.mktemp("compare") / "finished"
    return folder, *run_comparison(plan_of(tiny), folder)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished comparison."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def explained(monkeypatch):
    """The list of (number of images, methods) of every call of explain from now."""
    calls, original = [], explain.explain

    def spy(model, x, target=None, methods=tuple(explain.METHODS), *arguments, **options):
        calls.append((len(x), tuple(methods)))
        return original(model, x, target, methods, *arguments, **options)

    monkeypatch.setattr(explain, "explain", spy)
    return calls


def changed_files(folder, before):
    """Files of the runs that were written since ``before`` (path -> modification time) was taken."""
    return {
        path.relative_to(folder / "runs").as_posix() for path, when in times(folder).items() if before.get(path) != when
    }


def times(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}


def number_of(found, run, key):
    return next(r for r in found["runs"] if r["name"] == run)["numbers"][key]["mean"]


# -------------------------------------------------------------------------------------------------- the numbers


def test_accuracies_are_those_of_the_stored_networks_on_every_test_set(finished):
    folder, found, _ = finished
    run = open_run(folder / "runs" / "sib-seed1")
    assert run.config.seed == 1 and run.config.method == "sib"
    for name, dataset in run.data().test.items():
        items = stack(dataset, range(len(dataset)))
        right = (run.model(items.image).argmax(1) == items.label).float()
        assert number_of(found, "sib-seed1", f"accuracy/{name}") == pytest.approx(right.mean().item())
        pairs = {(label, group) for label, group in zip(items.label.tolist(), items.group.tolist(), strict=True)}
        worst = min(right[(items.label == label) & (items.group == group)].mean().item() for label, group in pairs)
        assert number_of(found, "sib-seed1", f"worst_group/{name}") == pytest.approx(worst)


def test_the_epg_is_the_share_of_the_map_on_the_stroke_for_the_predicted_class(finished):
    folder, found, _ = finished
    run = open_run(folder / "runs" / "ce-seed0")
    test = next(iter(run.data().test.values()))
    chosen = json.loads((folder / "runs/ce-seed0/measured/input_x_gradient.json").read_text())["values"]
    shares = []
    for row in range(len(test)):
        item = test[row]
        x = item.image[None].clone().requires_grad_()
        logits = run.model(x)
        (gradient,) = torch.autograd.grad(logits[0, logits.argmax()], x)
        heat = (gradient * x).abs().sum(1)[0].detach()
        shares.append((heat[item.mask[0] > 0.5].sum() / heat.sum()).item())
    stored = chosen["epg/input_x_gradient"]
    assert len(stored) == 12 and found["data"]["images"] == 12
    # every stored value is that of one of the 30 test images, no image twice
    rows = [int(np.abs(np.array(shares) - value).argmin()) for value in stored]
    assert len(set(rows)) == 12
    assert [shares[row] for row in rows] == pytest.approx(stored, rel=2e-4)
    assert number_of(found, "ce-seed0", "epg/input_x_gradient") == pytest.approx(np.mean(stored))


def test_everything_is_measured_on_every_run(finished):
    _, found, printed = finished
    maps = {f"{measure}/{name}" for measure in (*OF_MASKS, "empty") for name in explain.METHODS}
    for run in found["runs"]:
        assert maps | {"epg/mean", "seconds_per_step"} <= run["numbers"].keys()
    assert [run["name"] for run in found["runs"]] == NAMES and found["missing"] == []
    assert found["interval"] == "seeds" and "over 2 seeds" in printed
    assert 0.05 < found["chance"] < 0.2 and torch.__version__.startswith(found["versions"]["torch"])


def test_maps_that_are_zero_everywhere_count_as_0_and_are_counted(copied, tiny, monkeypatch):
    original = explain.explain

    def some_empty(*arguments, **options):
        maps = original(*arguments, **options)
        if "vjp" in maps:
            maps["vjp"][:3] = 0
            maps["vjp"][3] = float("nan")
        return maps

    expected = results.stored_values(copied / "runs/ce-seed0", classes=10)
    (copied / "runs/ce-seed0/measured/vjp.json").unlink()
    monkeypatch.setattr(explain, "explain", some_empty)
    found, _ = run_comparison(plan_of(tiny), copied)
    stored = results.stored_values(copied / "runs/ce-seed0", classes=10)
    assert stored["empty/vjp"] == [1, 1, 1, None] + 8 * [0]
    for measure in OF_MASKS:
        assert stored[f"{measure}/vjp"] == [0, 0, 0, None, *expected[f"{measure}/vjp"][4:]]
    numbers = next(run["numbers"] for run in found["runs"] if run["name"] == "ce-seed0")
    assert numbers["empty/vjp"] == {"mean": pytest.approx(3 / 11), "count": 11, "undefined": 1}
    assert numbers["epg/vjp"]["mean"] == pytest.approx(sum(expected["epg/vjp"][4:]) / 11)
    assert numbers["epg/vjp"]["undefined"] == 1


def test_a_seed_gives_both_methods_the_same_data_and_the_same_initial_weights(finished):
    folder, *_ = finished
    pictures = [np.load(folder / f"runs/{name}-seed0/measured/gallery.npz") for name in ("ce", "sib")]
    for method, stored in zip(("ce", "sib"), pictures, strict=True):
        values = results.stored_values(folder / f"runs/{method}-seed0", classes=10)
        for name in explain.METHODS:  # the maps that are shown are those that are measured, SmoothGrad's noise included
            assert all(np.isclose(epg, values[f"epg/{name}"], rtol=1e-4).any() for epg in stored[f"epg_{name}"])
    assert pictures[0]["gradcam"].shape == pictures[1]["gradcam"].shape == (8, 40, 40)
    first = [open_run(folder / "runs" / name).history[0]["cross_entropy"] for name in ("ce-seed0", "ce-seed1")]
    assert first[0] != first[1]


def test_the_report_says_which_losses_were_shown_the_objects(finished, tiny, copied):
    assert finished[1]["losses"]["sib"].endswith("; was shown the objects in 100 % of the training images")
    assert (
        "objects" not in finished[1]["losses"]["ce"] and "Cross-entropy alone." in (copied / "report.html").read_text()
    )
    plan = plan_of(tiny, ("sib",), masks="self-made")
    assert loss_sentence(plan, "sib", Material(plan, 0).data).endswith("made its own masks from the network's gradient")
    for method in ("rrr", "energy-loss", "l1-loss", "rrr-loss", "ppce-loss"):
        plan = plan_of(tiny, (method,), annotated=0.25)
        assert loss_sentence(plan, method, Material(plan, 0).data).endswith("objects in 25 % of the training images")
    plan = plan_of(tiny, ("rrr",), annotation="boxes")
    assert "; was shown boxes around the objects in 100 %" in loss_sentence(plan, "rrr", Material(plan, 0).data)


def test_methods_of_one_comparison_may_be_shown_different_things_of_the_same_images(tiny):
    configs = {"ce": tiny("ce"), "sib": tiny("sib", annotation="boxes"), "rrr": tiny("rrr", annotated=0.25)}
    material = Material(Plan(configs, (0,)), 0)
    own, boxes, few = (material.training_data(config).train for config in configs.values())
    assert torch.equal(own[3].image, boxes[3].image) and own.annotated.all() and boxes.annotated.all()
    assert few.annotated.double().mean() == 0.25 and few.annotation == own.annotation == "masks"
    assert own[3].mask.sum() < boxes[3].mask.sum() and set(boxes[3].mask.unique().tolist()) == {0, 1}
    assert material.data.train.annotation == "masks" and material.data.train.annotated.all()


def test_the_folder_holds_the_report_the_numbers_and_the_gallery(finished):
    names = {path.name for path in finished[0].iterdir()}
    expected = {"comparison.json", "images.npz", "runs", "results.json", "metrics.csv", "report.html", "gallery.png"}
    assert names == expected | {LOCK}
    assert sorted(path.name for path in (finished[0] / "runs").iterdir()) == sorted(NAMES)


# --------------------------------------------------------------------------------------------------- going on


def test_a_run_that_was_trained_anew_is_not_reported_with_the_old_network_s_numbers(copied, tiny):
    path = copied / "runs/sib-seed1"
    train(tiny("sib", seed=1), path, resume=False, quiet=True)
    assert not list((path / "measured").glob("*"))
    found = write_report(copied, Console(file=StringIO(), width=120))
    assert found["missing"] == ["sib-seed1"] and "sib-seed1" not in {run["name"] for run in found["runs"]}


def test_a_finished_comparison_is_written_again_without_training_or_explaining(copied, finished, tiny, explained):
    before = times(copied)
    found, printed = run_comparison(plan_of(tiny), copied)
    assert explained == [] and changed_files(copied, before) == set() and "training" not in printed
    assert found["rows"] == finished[1]["rows"]


def test_one_deleted_measurement_is_the_only_one_that_is_done_again(copied, finished, tiny, explained):
    path = copied / "runs/sib-seed1/measured/layercam.json"
    content = json.loads(path.read_text())
    path.unlink()
    before = times(copied)
    run_comparison(plan_of(tiny), copied)
    assert explained == [(12, ("layercam",))]
    assert changed_files(copied, before) == {"sib-seed1/measured/layercam.json", "sib-seed1/measured/training.json"}
    assert json.loads(path.read_text()) == content


def test_a_damaged_measurement_is_done_again(copied, finished, tiny):
    path = copied / "runs/ce-seed1/measured/accuracy-matched.json"
    path.write_text(path.read_text()[:50])
    assert run_comparison(plan_of(tiny), copied)[0]["rows"] == finished[1]["rows"]


def test_a_network_that_was_trained_anew_is_measured_anew(copied, finished, tiny):
    """A run folder of other weights in the place of one: its old measurements do not count."""
    measured = copied / "runs/sib-seed1/measured"
    for name in ("best.pt", "last.pt"):
        shutil.copy(copied / "runs/ce-seed1" / name, copied / "runs/sib-seed1" / name)
    state = torch.load(copied / "runs/sib-seed1/best.pt", weights_only=True)
    assert state["config"]["method"] == "ce"
    run_comparison(plan_of(tiny), copied)
    assert (measured / "vjp.json").read_bytes() == (copied / "runs/ce-seed1/measured/vjp.json").read_bytes()


def test_a_run_that_ctrl_c_stopped_goes_on_to_the_same_numbers(tiny, finished, tmp_path, press_ctrl_c):
    press_ctrl_c(6)  # of 8 steps of each run: in the middle of the second epoch of the first
    with pytest.raises(KeyboardInterrupt):
        run_comparison(plan_of(tiny), tmp_path)
    found, printed = run_comparison(plan_of(tiny), tmp_path)
    assert "Going on at step 6" in printed
    assert found["rows"][:-1] == finished[1]["rows"][:-1]  # all but the seconds


def test_a_killed_comparison_goes_on_to_the_same_numbers(tiny, finished, tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]); torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from conftest import tiny_config as tiny\n"
        "from test_compare import plan_of, run_comparison\n"
        "run_comparison(plan_of(tiny), Path(sys.argv[1]))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "killed"), os.path.dirname(__file__)]
    process = subprocess.Popen(words)
    # kill it while it measures its second network: its first explanation method is stored, its last is not
    wanted = tmp_path / "killed/runs/sib-seed0/measured/gradcam.json"
    deadline = time.monotonic() + 120
    while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wanted.exists() and not (tmp_path / "killed/runs/sib-seed1").exists()
    found, _ = run_comparison(plan_of(tiny), tmp_path / "killed")
    assert found["rows"][:-1] == finished[1]["rows"][:-1]


def test_another_method_seed_and_measure_add_to_what_is_there(copied, finished, tiny, explained):
    before = times(copied)
    found, _ = run_comparison(plan_of(tiny, ("ce", "rrr"), (1, 2), (*OF_MASKS, "deletion")), copied)
    new = {path.partition("/")[0] for path in changed_files(copied, before)}
    assert new == {"ce-seed1", "ce-seed2", "rrr-seed1", "rrr-seed2"}
    assert "ce-seed1/best.pt" not in changed_files(copied, before)
    assert list(found["methods"]) == ["ce", "rrr"] and found["seeds"] == [1, 2]
    for key in ("accuracy/matched", "epg/vjp"):
        assert number_of(found, "ce-seed1", key) == number_of(finished[1], "ce-seed1", key)
    assert 0 < number_of(found, "rrr-seed2", "deletion/smoothgrad") < 1


def test_other_options_than_those_of_the_runs_are_one_sentence_before_anything_is_written(copied, tiny):
    before = (copied / "comparison.json").read_bytes()
    with pytest.raises(RunError, match=r"The run .*ce-seed0 was begun with epochs = 2: compare with the same options"):
        run_comparison(plan_of(tiny, epochs=3), copied)
    assert (copied / "comparison.json").read_bytes() == before


def test_another_number_of_images_measures_the_maps_anew_and_keeps_the_accuracies(copied, tiny):
    before = times(copied)
    found, _ = run_comparison(plan_of(tiny, images=5), copied)
    changed = {path.rpartition("/")[2] for path in changed_files(copied, before)}
    assert changed == {f"{name}.json" for name in explain.METHODS} | {"gallery.npz", "training.json"}
    assert found["data"]["images"] == 5


def test_fresh_removes_the_runs_of_the_plan_alone(copied, tiny):
    before = times(copied)
    _, printed = run_comparison(plan_of(tiny, ("ce",), (1,)), copied, fresh=True)
    assert "Starting anew" in printed and "Cross-entropy, seed 1: training" in printed
    assert {path.partition("/")[0] for path in changed_files(copied, before)} == {"ce-seed1"}


def test_the_report_of_an_unfinished_comparison_shows_what_there_is(copied):
    shutil.rmtree(copied / "runs/sib-seed1/measured")
    console = Console(file=StringIO(), width=120)
    found = write_report(copied, console)
    assert found["missing"] == ["sib-seed1"] and "Not finished yet: sib-seed1" in console.file.getvalue()
    assert (copied / results.REPORT).exists()


def test_a_copied_folder_is_reported_without_its_data_and_networks(copied):
    for run in (copied / "runs").iterdir():
        for path in run.iterdir():
            if path.name != "measured":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = json.loads((copied / results.RESULTS).read_text())
    write_report(copied, Console(file=StringIO()))
    assert json.loads((copied / results.RESULTS).read_text()) == before


# ------------------------------------------------------------------------------------------------------ choices


def test_the_gradient_penalty_is_matched_to_s_ib_of_the_same_seed(tiny, copied):
    run_comparison(plan_of(tiny, ("gradient-penalty", "sib"), (0,)), copied)
    matched, reference = (open_run(copied / f"runs/{name}-seed0") for name in ("gradient-penalty", "sib"))
    assert (
        "at that of the S-IB run" in json.loads((copied / "comparison.json").read_text())["losses"]["gradient-penalty"]
    )
    assert matched.config.match == tuple(line["vjp_variance"] for line in reference.history)


def test_a_penalty_that_follows_no_or_another_s_ib_run_is_refused(tiny, copied):
    run_comparison(plan_of(tiny, ("ce", "gradient-penalty"), (0,)), copied)
    with pytest.raises(RunError, match="gradient-penalty-seed0 follows no S-IB run: remove this folder to train it"):
        run_comparison(plan_of(tiny, ("sib", "gradient-penalty"), (0,)), copied)
    shutil.rmtree(copied / "runs/gradient-penalty-seed0")
    run_comparison(plan_of(tiny, ("sib", "gradient-penalty"), (0,)), copied)
    with pytest.raises(RunError, match="gradient-penalty-seed0 follows another S-IB run, or one that was trained anew"):
        run_comparison(plan_of(tiny, ("ce", "gradient-penalty"), (0,)), copied)
    shutil.rmtree(copied / "runs/sib-seed0")
    plan = plan_of(tiny, ("sib", "gradient-penalty"), (0,))
    plan = replace(plan, configs=plan.configs | {"sib": replace(plan.configs["sib"], strength=5.0)})
    with pytest.raises(RunError, match="gradient-penalty-seed0 follows another S-IB run, or one that was trained anew"):
        run_comparison(plan, copied)


def test_all_methods_of_a_comparison_have_one_precision(tiny, copied):
    with pytest.raises(RunError, match="was begun with precision = 32-true"):
        run_comparison(plan_of(tiny, precision="bf16-mixed"), copied)


def test_fresh_removes_nothing_where_the_device_is_missing(tiny, copied, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = times(copied)
    with pytest.raises(TrainingError, match="1 CUDA device was asked for, but torch sees none"):
        run_comparison(plan_of(tiny, device="cuda"), copied, fresh=True)
    assert not changed_files(copied, before)


def test_epochs_without_a_vjp_are_matched_to_the_one_before(finished):
    run = open_run(finished[0] / "runs/sib-seed0")
    first, second = (line["vjp_variance"] for line in run.history)
    without = {name: value for name, value in run.history[1].items() if name != "vjp_variance"}
    assert variances(run) == (first, second) and first != second
    assert variances(replace(run, history=[run.history[0], without])) == (first, first)
    ended = replace(run, config=replace(run.config, epochs=4, patience=1))
    assert variances(ended) == (first, second, second, second)
    assert variances(open_run(finished[0] / "runs/ce-seed0")) == ()


def test_one_seed_has_intervals_over_images(tiny, copied):
    found, printed = run_comparison(plan_of(tiny, seeds=(0,)), copied)
    assert found["interval"] == "images" and "over images" in printed
    assert next(row for row in found["rows"] if row["key"] == "epg/vjp")["values"]["ce"]["count"] == 12


def test_deletion_and_insertion_are_measured_where_they_are_asked_for(tiny, copied):
    found, _ = run_comparison(plan_of(tiny, ("ce",), (0,), OF_NETWORK, images=3), copied)
    keys = {row["key"].partition("/")[0] for row in found["rows"]}
    assert {"deletion", "insertion"} <= keys


def test_a_layer_that_the_network_does_not_have_is_one_sentence_before_training(tiny, tmp_path):
    with pytest.raises(RunError, match="small_cnn has no module 'layer4' to look at: its first level has block1"):
        run_comparison(plan_of(tiny, layer="layer4"), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_layer_without_a_feature_map_is_one_sentence(tiny, copied):
    with pytest.raises(RunError, match="'head' gives no feature map"):
        run_comparison(plan_of(tiny, layer="head"), copied)


def test_a_folder_without_masks_is_compared_by_accuracy_deletion_and_insertion(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 255, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"photos/{name}/{number}.png")
    changes = {"root": str(tmp_path / "photos"), "size": 32, "epochs": 1, "batch_size": 4}
    configs = {method: recipe("balanced", "folder", method=method, **changes) for method in ("ce", "sib")}
    found, printed = run_comparison(Plan(configs, (0,), (*OF_MASKS, "deletion"), 3), tmp_path / "out")
    measures = {row["key"].partition("/")[0] for row in found["rows"]}
    assert measures == {"accuracy", "deletion", "empty", "seconds_per_step"} and found["chance"] is None
    assert found["data"]["name"] == "photos" and found["losses"]["sib"].endswith("found no masks to use")
    html = (tmp_path / "out/report.html").read_text()
    assert "no object masks" in html and "cat" in html and "on photos (2 classes" in html


def test_wrong_plans_are_refused(tiny):
    with pytest.raises(ValueError, match="nothing to compare"):
        plan_of(tiny, methods=())
    with pytest.raises(ValueError, match="images must be at least 1"):
        plan_of(tiny, images=0)
    with pytest.raises(ValueError, match="measures must be some of epg.*got sharpness"):
        plan_of(tiny, measures=("epg", "sharpness"))


def test_the_gallery_takes_the_first_image_of_each_class_on_a_foreign_background():
    labels, groups = torch.tensor([1, 1, 2, 2, 3, 1]), torch.tensor([1, 0, 5, 6, 7, 8])
    assert gallery_rows(labels, groups, {1: 1, 2: 2, 3: 3}).tolist() == [1, 2, 4, 3, 5]
    assert gallery_rows(labels, groups, {1: 1, 2: 2, 3: 3}, count=2).tolist() == [1, 2]
    assert gallery_rows(labels, torch.full((6,), -1), {}).tolist() == [0, 2, 4, 1, 3, 5]


def test_a_class_s_own_background_is_the_one_it_stands_on_most_often_in_training():
    class Training:
        labels, groups = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([4, 4, 2, -1, -1, -1])

    assert own_groups(Training) == {0: 4}


def test_curves_are_there_where_an_epoch_lacks_a_term_of_the_loss(finished):
    run = open_run(finished[0] / "runs/sib-seed0")
    without = {name: value for name, value in run.history[1].items() if not name.startswith("background_")}
    assert len(without) < len(run.history[0])
    assert curves(replace(run, history=[run.history[0], without])) == curves(run)
    assert curves(run)["Cross-entropy in training"] == [line["cross_entropy"] for line in run.history]


def test_large_maps_are_kept_smaller_with_the_same_mean():
    maps = torch.rand(2, 320, 320)
    assert shrunk(maps).shape == (2, 160, 160)
    torch.testing.assert_close(shrunk(maps).mean((1, 2)), maps.mean((1, 2)))
    assert shrunk(maps[:, :40, :40]) is not None and shrunk(maps[:, :40, :40]).shape == (2, 40, 40)
