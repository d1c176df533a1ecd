"""The evidence on photographs: tiny sets through the command, the rule for strengths, and the summary of made-up
results."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from data_samples import box_of, save, save_picture, square, write_labels, write_waterbirds
from PIL import Image
from rich.console import Console
from sib_lab.data import DataError
from sib_lab.experiments import photo_gains as gains
from sib_lab.experiments import photo_sets
from sib_lab.experiments import photographs as photos
from sib_lab.experiments import strengths as curve
from sib_lab.experiments.tasks import Task, raise_failures, run_tasks
from sib_lab.explaining.methods import CAMS, SIX
from sib_lab.training.losses import preset_constants
from sib_lab.training.runs import DivergedError, RunError, TrainingError, locked, write_text
from typer.testing import CliRunner

PATCHED = {"STRENGTHS": (0.3,), "OTHER_PEERS": (), "PEERS": ("energy-loss",)}
COMMAND = ("--scale", "small", "--seeds", "1", "--jobs", "2", "--sets", "duts30")


def write_split_folder(root, rng, counts, boxes=False):
    """train/, val/, test/ of two classes with masks/, or with segmentations/ of half of them and boxes of all."""
    lines = ["file,x1,y1,x2,y2"]
    for split, count in counts.items():
        for name in ("cup", "pear"):
            for place in range(count):
                mask = square(rng)
                path = Path(split, name, f"{place}.png")
                save_picture(root / path, mask)
                if not boxes or place % 2:
                    save(root / ("segmentations" if boxes else "masks") / path, mask * 255)
                lines.append(",".join(map(str, (path.as_posix(), *box_of(mask)))))
    if boxes:
        (root / "boxes.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """duts30 as a .zip, cub20, Waterbirds and VOC as folders, in the layouts of the real ones."""
    import numpy as np

    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("photos")
    write_split_folder(folder / "unzipped", rng, {"train": 9, "val": 2, "test": 4})
    shutil.make_archive(folder / "duts30", "zip", folder / "unzipped")
    write_split_folder(folder / "cub20", rng, {"train": 12, "test": 4}, boxes=True)
    write_waterbirds(folder / "waterbirds2k", times=3)
    write_labels(folder / "voc2200", (("train", 48), ("val", 12), ("test", 12)))
    return folder


def asked(root, folder, *names, peers=True):
    sets = tuple(photo_sets.SETS[name] for name in names)
    roots = photo_sets.unpacked(photo_sets.find(root, sets), folder, Console(quiet=True))
    for of in sets:
        photo_sets.leave_out_boxes_of_tests(of, roots[of.name], folder)
    return photos.Asked(sets, roots, folder, photos.SCALES["small"], (0,), peers)


# ------------------------------------------------------------------------------------------------ the command


def killed_after_a_task(root, out):
    """The command in a process of its own, killed when it says that a first training is done."""
    settings = "; ".join(f"photographs.{name} = {value!r}" for name, value in PATCHED.items())
    code = f"from sib_lab.experiments import photographs; {settings}; from sib_lab.cli.commands import app; app()"
    command = [sys.executable, "-u", "-c", code, "evidence-photos", str(root), "--out", str(out), *COMMAND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        for line in process.stdout:
            if "(1 of" in line:
                break
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_the_command_goes_on_after_it_was_killed_and_does_nothing_twice(root, tmp_path, monkeypatch):
    from sib_lab.cli.commands import app

    for name, value in PATCHED.items():
        monkeypatch.setattr(photos, name, value)

    def command():
        told = CliRunner().invoke(app, ["evidence-photos", str(root), "--out", str(tmp_path), *COMMAND])
        return told, [line for line in told.stdout.splitlines() if " of " in line and "measured" in line]

    killed_after_a_task(root, tmp_path)
    first = [path for path in tmp_path.glob("*/curve/*/point.json")]
    assert first and not (tmp_path / "evidence-photos.json").exists()

    told, done = command()
    assert told.exit_code == 0, told.stdout + told.stderr
    assert len([line for line in done if "curve" in line]) == 3 - len(first)
    assert len([line for line in done if "seed 0" in line]) == 6
    summary = json.loads((tmp_path / "evidence-photos.json").read_text())
    assert summary.keys() == {"duts30"} and summary["duts30"]["cost"] > 0
    assert summary["duts30"]["leads"].keys() == {"energy-loss"}
    assert "Of one training each" in (tmp_path / "evidence-photos.md").read_text()
    assert Image.open(tmp_path / "curves.png").size[0] > 300
    found = json.loads((tmp_path / "duts30" / "results.json").read_text())
    assert found["data"]["explained"] == "test" and not found["missing"]
    assert (tmp_path / "duts30" / "report.html").exists() and (tmp_path / "duts30" / "gallery.png").exists()
    configs = {run["method"]: run["config"] for run in found["runs"]}
    assert configs["sib"]["strength"] is None and configs["sib-none"]["annotated"] == 0
    assert json.loads((tmp_path / "strengths.json").read_text()) == {"duts30": {"energy-loss": 0.3}}
    assert configs["energy-loss"]["strength"] == 0.3
    assert not list(tmp_path.glob("*/curve/*/*.pt"))  # nobody opens them again

    measured = tmp_path / "duts30" / "runs" / "sib-seed0" / "measured"
    (measured / "gradcam.json").unlink()
    shutil.rmtree(tmp_path / "duts30" / "curve" / "sib-0.3")
    again, done = command()
    assert again.exit_code == 0 and (measured / "gradcam.json").exists()
    assert [line.partition(":")[0] for line in done] == ["duts30 curve, S-IB x 0.3", "duts30 S-IB seed 0"]
    anew = json.loads((tmp_path / "evidence-photos.json").read_text())
    assert anew["duts30"]["numbers"] == summary["duts30"]["numbers"]

    # What is measured is taken up without the weights, on another machine as well, and no file of it is written again.
    for path in (*tmp_path.glob("*/runs/*/*.pt"), *tmp_path.glob("*/runs/*/measured/gallery.npz")):
        path.unlink()
    stored = {path: path.stat().st_mtime_ns for path in measured.glob("*")}
    again, done = command()
    assert again.exit_code == 0 and not done and stored
    assert {path: path.stat().st_mtime_ns for path in measured.glob("*")} == stored
    assert json.loads((tmp_path / "evidence-photos.json").read_text())["duts30"]["numbers"] == anew["duts30"]["numbers"]
    before = (tmp_path / "evidence-photos.json").read_bytes()
    monkeypatch.setattr("sib_lab.experiments.stored.DEFINITIONS", 0)
    again, done = command()
    assert again.exit_code == 1 and "has no weights any more" in again.stderr and not done
    assert (tmp_path / "evidence-photos.json").read_bytes() == before
    monkeypatch.undo()
    for name, value in PATCHED.items():
        monkeypatch.setattr(photos, name, value)
    for path in ("test/cup/0.png", "masks/test/cup/0.png"):
        (tmp_path / "data" / "duts30" / path).unlink()
    again, done = command()
    assert again.exit_code == 1 and "is not what it was" in again.stderr and not done

    with locked(tmp_path):
        refused, _ = command()
    assert refused.exit_code == 1 and "Another process is at work" in refused.stderr


def test_a_set_of_several_labels_is_measured_by_its_map_and_has_one_peer(root, tmp_path, monkeypatch):
    for name, value in PATCHED.items():
        monkeypatch.setattr(photos, name, value)
    monkeypatch.setattr(photos, "OTHER_PEERS", ("l1-loss",))
    monkeypatch.setattr(photos, "PEERS", ("energy-loss", "l1-loss"))
    write_text(tmp_path / "strengths.json", '{"duts30": {"l1-loss": 0.3}}')
    summary = photos.evidence_photos(root, tmp_path, "small", (0,), 2, ("voc2200",), console=Console(quiet=True))
    of = summary["voc2200"]
    assert of["leads"].keys() == {"energy-loss"} and of["gains"].keys() == {"sib", "sib-few", "sib-one"}
    assert of["goals"]["sib-one"] == {"accuracy": -0.01, "epg": 0.04} and of["reached"]["ahead"] in (True, False)
    numbers = of["numbers"]
    told = {method: numbers[method][0]["map/test"] for method in ("ce", "sib")}
    assert of["gains"]["sib"]["accuracy"]["mean"] == pytest.approx(told["sib"] - told["ce"])
    point = json.loads((tmp_path / "voc2200" / "curve" / "ce" / "point.json").read_text())
    assert 0 < point["map"] <= 1 and "accuracy" not in point
    assert curve.read_point(tmp_path / "voc2200" / "curve" / "ce").accuracy == point["map"]
    known = asked(root, tmp_path, "voc2200")
    assert photos.costs_of_strength(known) == ([], {})
    plan = photos.plan_of(known, known.sets[0], {"energy-loss": 0.3, "l1-loss": 0.3})
    assert "l1-loss" not in plan.configs and photos.can_be_compared(plan, tmp_path / "voc2200")
    assert (tmp_path / "curves.png").exists() and "mAP" in (tmp_path / "evidence-photos.md").read_text()


def test_without_curves_there_is_the_comparison_alone(root, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(photos, "run_tasks", lambda tasks, *_: done.extend(task.name for task in tasks) or [])
    write_text(tmp_path / "strengths.json", '{"duts30": {"energy-loss": 0.3}}')
    photos.evidence_photos(root, tmp_path, "small", (0,), 1, ("duts30",), curves=False, console=Console(quiet=True))
    assert [name.partition(" ")[2] for name in done] == [
        f"{name} seed 0"
        for name in (
            "Cross-entropy",
            "S-IB",
            "Energy loss",
            "S-IB, no annotation",
            "S-IB, 10 % annotated",
            "S-IB, feature map alone",
        )
    ]


def test_runs_of_a_set_with_boxes_may_be_moved(root, tmp_path):
    of = asked(root, tmp_path / "one", "cub20", peers=False)
    config = photos.curve_configs(of, of.sets[0])["sib", 1.0]
    moved = asked(root, tmp_path / "two", "cub20", peers=False)
    other = photos.curve_configs(moved, moved.sets[0])["sib", 1.0]
    assert config.data_options != other.data_options and not other.differing(asdict(config))
    assert replace(other, data_options={"x": 1}).differing(asdict(config)).keys() == {"data_options"}


def test_what_strengths_cost_is_asked_of_sets_without_a_shift(root, tmp_path):
    of = asked(root, tmp_path, "duts30", "waterbirds", peers=False)
    assert photos.costs_of_strength(of) == ([], {})
    for one, right in zip(of.sets, (0.9, 0.1), strict=True):
        for (method, strength), config in photos.curve_configs(of, one).items():
            run = photos.curve_run(tmp_path, one, method, strength)
            write_text(
                run / "config.json", json.dumps({"config": asdict(config), "constants": preset_constants(config)})
            )
            accuracy = right - (0.1 if strength == 3 else 0)
            write_text(run / "point.json", json.dumps({"accuracy": accuracy, "held_out": 50}))
    sets, costs = photos.costs_of_strength(of)
    assert sets == ["duts30"] and costs == pytest.approx({0.03: 0, 0.1: 0, 0.3: 0, 1.0: 0, 3.0: -0.1})


def test_what_is_missing_or_unknown_is_named(root, tmp_path):
    from sib_lab.cli.commands import app

    with pytest.raises(DataError, match=r"The set pets3 needs .*pets3.zip, or the folder"):
        photo_sets.find(root, [photo_sets.SETS["pets3"]])
    told = CliRunner().invoke(app, ["evidence-photos", str(root), "--sets", "cub", "--out", str(tmp_path)])
    assert told.exit_code == 1 and told.stderr.startswith("Sets must be some of duts30, cub20, pets3, waterbirds")
    (tmp_path / "pets3.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="damaged"):
        photo_sets.unpacked({"pets3": tmp_path / "pets3.zip"}, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out" / "data" / "pets3").exists()


# ------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("name", ["duts30", "cub20", "waterbirds", "voc2200"])
def test_no_held_out_image_is_trained_on_and_no_test_image_is_in_the_curve(root, tmp_path, name):
    of = asked(root, tmp_path, name, peers=False)
    config = photos.curve_configs(of, of.sets[0])["sib", 1.0]
    whole, data = curve.open_config_data(config), curve.open_held_out(config)
    rest, held = ({sample.image for sample in part.samples} for part in (data.train, data.validation["held_out"]))
    tests = {sample.image for sample in whole.test["test"].samples}
    validation = {sample.image for sample in whole.validation["validation"].samples}
    assert not rest & held and not (rest | held) & tests and data.test == {} and validation <= held
    assert rest | held == validation | {sample.image for sample in whole.train.samples}
    assert len(held - validation) == pytest.approx(len(whole.train) / 3, abs=len(whole.train) / 5)
    if data.multilabel:
        assert (data.train.labels == 1).any(0).all()
        return
    assert set(data.train.labels.tolist()) == set(range(len(data.classes)))
    assert data.train.annotation == ("masks" if name == "duts30" else "boxes")
    assert data.validation["held_out"].annotation == "masks"  # measured as they are
    again = curve.open_held_out(config)
    assert again.identity() == data.identity()
    assert torch.equal(again.train[0].mask, data.train[0].mask)


def test_a_point_is_that_of_the_last_weights(root, tmp_path, monkeypatch):
    of = asked(root, tmp_path, "duts30", peers=False)
    config = replace(photos.curve_configs(of, of.sets[0])["ce", None], epochs=2)
    opened, open_run = [], curve.open_run
    monkeypatch.setattr(curve, "open_run", lambda folder, **how: opened.append(how) or open_run(folder, **how))
    curve.measured_point(config, tmp_path / "run")
    assert opened == [{"best": False, "trust": True}]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert curve.read_point(tmp_path / "run").accuracy == pytest.approx(float(last["accuracy_held_out"]))


def test_held_out_birds_are_measured_on_segmentations_alone(root, tmp_path):
    of = asked(root, tmp_path, "cub20")
    held = curve.open_held_out(of.base(of.sets[0])).validation["held_out"]
    rows = curve.known_alike(held).tolist()
    assert 0 < len(rows) < len(held) and held.annotated.all()
    assert all(held.samples[row].mask is not None for row in rows)


def test_the_command_takes_all_sets_unless_some_are_named():
    import inspect

    from sib_lab.cli import commands

    default = inspect.signature(commands.evidence_photos_command).parameters["sets"].default
    assert default == ",".join(photo_sets.SETS)


def test_another_archive_of_a_set_is_unpacked_anew(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
        shutil.make_archive(tmp_path / "pets3", "zip", tmp_path / name)
        for _ in range(2):
            roots = photo_sets.unpacked({"pets3": tmp_path / "pets3.zip"}, tmp_path / "out", Console(quiet=True))
        assert (roots["pets3"] / "a.txt").read_text() == name


def test_boxes_of_tests_are_left_out_however_their_paths_are_written(tmp_path):
    (tmp_path / "set").mkdir()
    rows = ["train/a/1.jpg", "./test/a/2.jpg", "Test/a/3.jpg", "test\\a\\4.jpg", "testing/a/5.jpg"]
    (tmp_path / "set" / "boxes.csv").write_text("file,x1,y1,x2,y2\n" + "".join(f"{row},0,0,9,9\n" for row in rows))
    photo_sets.leave_out_boxes_of_tests(photo_sets.SETS["cub20"], tmp_path / "set", tmp_path)
    written = tmp_path / "data" / "cub20-boxes.csv"
    assert [line.partition(",")[0] for line in written.read_text().splitlines()] == ["file", rows[0], rows[4]]
    (tmp_path / "set" / "boxes.csv").unlink()
    photo_sets.leave_out_boxes_of_tests(photo_sets.SETS["cub20"], tmp_path / "set", tmp_path)
    assert not written.exists()


def test_tests_of_birds_are_measured_on_segmentations_alone(root, tmp_path):
    of = asked(root, tmp_path, "cub20")
    data = curve.open_config_data(of.base(of.sets[0]))
    test = data.test["test"]
    assert all((sample.mask is not None) == known for sample, known in zip(test.samples, test.annotated, strict=True))
    assert test.annotated.double().mean() == 0.5 and data.train.annotated.all()


def test_cross_entropy_is_told_nothing_and_the_other_peers_are_chosen_on_one_set(root, tmp_path, monkeypatch):
    of = asked(root, tmp_path, "duts30", "waterbirds", peers=False)
    plan = photos.plan_of(of, of.sets[1], {})
    assert list(plan.configs) == ["ce", "sib", "sib-alone", "sib-none", "sib-features"] and not plan.best
    assert {method: config.annotation for method, config in plan.configs.items()} == {
        method: "masks" if method == "ce" else "boxes" for method in plan.configs
    }
    monkeypatch.setattr(photos, "OTHER_PEERS", ("rrr",))
    both = photos.Asked(**{**vars(of), "peers": True})
    methods = [{method for method, _ in photos.curve_configs(both, one)} for one in of.sets]
    assert methods == [{"ce", "sib", "energy-loss", "rrr"}, {"ce", "sib", "energy-loss"}]
    configs = photos.curve_configs(both, of.sets[1])
    assert configs["sib", 0.3].strength == 0.3 and {config.seed for config in configs.values()} == {100}


def test_all_sets_of_a_method_come_before_the_next_method_and_all_methods_before_the_next_seed(root, tmp_path):
    of = asked(root, tmp_path, "duts30", "waterbirds", peers=False)
    of = photos.Asked(**{**vars(of), "seeds": (0, 1)})
    plans = {one.name: photos.plan_of(of, one, {}) for one in of.sets}
    names = [task.name for task in photos.comparison_tasks(of, plans)]
    assert names[:3] == ["duts30 Cross-entropy seed 0", "waterbirds Cross-entropy seed 0", "duts30 S-IB seed 0"]
    assert [name[-1] for name in names] == ["0"] * 10 + ["1"] * 10
    assert not any("waterbirds S-IB, 10 %" in name for name in names)


# ------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("points", "strength"),
    [
        ({0.1: (0.90, 0.4), 1.0: (0.89, 0.6), 3.0: (0.88, 0.9)}, 1.0),  # 3 costs too much
        ({0.1: (0.80, 0.4), 1.0: (0.85, 0.6), 3.0: (0.70, 0.9)}, 1.0),  # all do: the best accuracy
        ({3.0: (0.95, 0.6), 0.1: (0.90, 0.6), 1.0: (0.92, 0.6)}, 0.1),  # of equals the weakest
        ({0.3: (0.70, 0.6), 0.1: (0.70, 0.5)}, 0.1),
        ({0.1: (0.90, math.nan), 1.0: (0.90, 0.2)}, 1.0),
        ({0.1: (0.90, math.nan), 1.0: (0.95, math.nan)}, 0.1),
        ({0.1: (math.nan, 0.9), 1.0: (0.60, 0.2)}, 1.0),
        ({0.1: (math.nan, math.nan), 1.0: (math.nan, math.nan)}, 0.1),
    ],
)
def test_the_rule_for_strengths(points, strength):
    points = {key: curve.Point(*values) for key, values in points.items()}
    assert curve.chosen_strength(points, curve.Point(0.90, 0.3)) == strength


def test_no_strengths_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        curve.chosen_strength({}, curve.Point(0.9))


def test_what_a_strength_costs_is_counted_over_the_images_of_all_sets():
    large = {0.3: curve.Point(0.80, images=300), 1.0: curve.Point(0.79, images=300), 3.0: curve.Point(0.7, images=300)}
    small = {0.3: curve.Point(0.70, images=100), 1.0: curve.Point(0.60, images=100)}
    costs = curve.pooled_costs([(large, curve.Point(0.80, images=300)), (small, curve.Point(0.62, images=100))])
    assert costs == pytest.approx({0.3: 0.08 / 4, 1.0: (-0.01 * 3 - 0.02) / 4}) and curve.pooled_costs([]) == {}
    assert curve.Point(0.5, images=100).error == pytest.approx(0.05) and math.isnan(curve.Point(0.5).error)


def test_a_training_without_a_finite_loss_is_a_point_without_accuracy(root, tmp_path, monkeypatch):
    of = asked(root, tmp_path, "duts30", peers=False)
    config = photos.curve_configs(of, of.sets[0])["ce", None]
    monkeypatch.setattr("sib_lab.training.trainer.check_finite", lambda *_: failing(DivergedError("The loss is nan.")))
    assert "below every accuracy" in curve.measured_point(config, tmp_path / "run")
    point = curve.read_point(tmp_path / "run")
    assert math.isnan(point.accuracy) and math.isnan(point.epg)
    monkeypatch.setattr(curve, "train", lambda *_, **__: failing(TrainingError("It cannot be.")))
    with pytest.raises(TrainingError, match="cannot be"):  # which says nothing about the strength
        curve.measured_point(config, tmp_path / "run")


# ------------------------------------------------------------------------------------------------ the summary


def made_up(seeds=(0, 1, 2), **epg):
    """A method's EPG is its value plus a hundredth of the seed in all six, its accuracy half of it."""
    runs = [
        {
            "method": method,
            "seed": seed,
            "mean_seconds_per_step": 0.12 if method == "sib" else 0.1,
            "numbers": {
                **{f"{measure}/{m}": {"mean": value + 0.01 * seed} for m in SIX for measure in ("epg", "iou")},
                **{f"empty/{m}": {"mean": 0.1 * (m == CAMS[0])} for m in SIX},
                "accuracy/test": {"mean": value / 2 + 0.02 * seed},
            },
        }
        for method, value in epg.items()
        for seed in seeds
    ]
    return {"methods": dict.fromkeys(epg), "data": {"explained": "test", "quality": "accuracy"}, "runs": runs}


METHODS = {"ce": 0.2, "sib": 0.5, "sib-none": 0.25, "energy-loss": 0.4}


def test_gains_leads_and_costs_are_paired_and_have_goals():
    found = gains.shown(made_up(**METHODS), gains.GOALS["duts30"], ["energy-loss"])
    assert found["gains"]["sib"]["epg"]["mean"] == pytest.approx(0.3) and found["seeds"] == [0, 1, 2]
    assert found["gains"]["sib"]["epg_worst"]["half_width"] == pytest.approx(0, abs=1e-9)
    assert found["gains"]["sib"].keys() == {"accuracy", "epg", "epg_worst", "iou"}  # no groups
    assert found["leads"].keys() == {"energy-loss"} and found["ahead"] == list(SIX)
    assert found["leads"]["energy-loss"]["accuracy"]["mean"] == pytest.approx(0.05)
    assert found["cost"] == pytest.approx(1.2) and found["empty"]["sib"][CAMS[0]] == 10
    assert found["reached"] == {
        "sib": dict.fromkeys(("accuracy", "epg", "epg_worst", "iou"), True),
        "sib-none": {"epg": True},
        "cost": True,
        "ahead": True,
    }
    costs = (["duts30"], {0.3: 0.002, 1.0: -0.0094, 3.0: math.nan})
    text = gains.markdown({"duts30": found}, {"duts30": {"energy-loss": 0.3}}, costs)
    assert "| EPG, mean of the three CAMs | +0.300 ± 0.000; +0.12: reached |" in text
    assert "| no annotation: EPG, mean of the three CAMs | +0.050 ± 0.000; above 0: reached |" in text
    assert "| Energy loss, duts30 | +0.100 ± 0.000* |" in text and "| duts30 | 0.3 |" in text
    assert "| S-IB's strength | 0.3 | 1 | 3 |" in text
    assert "held-out images of duts30 | +0.002 | \N{MINUS SIGN}0.009 | diverged |" in text
    assert json.dumps(found, allow_nan=False)


def test_of_several_seeds_a_single_pair_decides_nothing():
    results = made_up(**METHODS)
    results["runs"] = [run for run in results["runs"] if run["method"] in ("ce", "sib") or run["seed"] == 0]
    found = gains.shown(results, gains.GOALS["duts30"], ["energy-loss"])
    assert found["leads"].keys() == {"energy-loss"} and found["ahead"] is None and found["reached"]["ahead"] is None
    assert found["gains"]["sib-none"]["epg"]["mean"] > 0 and found["reached"]["sib-none"] == {"epg": None}
    assert "+0.050; above 0: of one training" in gains.markdown({"duts30": found}, {}, ([], {}))
    results = made_up(**METHODS | {"sib-none": 0.1})
    results["runs"] = [run for run in results["runs"] if run["method"] in ("ce", "sib") or run["seed"] == 0]
    missed = gains.shown(results, gains.GOALS["duts30"], ["energy-loss"])
    assert missed["reached"]["sib-none"] == {"epg": False}  # which one training shows as well
    other = gains.shown(made_up(**METHODS), gains.GOALS["duts30"], ["energy-loss", "rrr-loss"])
    assert other["ahead"] is None  # not every peer is there


def test_goals_that_are_missed_and_peers_that_are_better():
    found = gains.shown(made_up(ce=0.4, sib=0.3, **{"energy-loss": 0.5}), gains.GOALS["duts30"], ["energy-loss"])
    assert not any(found["reached"]["sib"].values()) and not found["reached"]["ahead"] and found["ahead"] == []


def test_of_one_training_the_mean_decides_and_is_said_to():
    found = gains.shown(made_up((4,), **METHODS), gains.GOALS["pets3"], ["energy-loss"])
    assert found["gains"]["sib"]["epg"]["half_width"] is None and found["reached"]["sib"]["epg"]
    assert found["reached"]["ahead"] and json.dumps(found, allow_nan=False)
    assert "Of one training each, without an interval, and reached by the mean: pets3." in gains.markdown(
        {"pets3": found}, {}, ([], {})
    )


def test_a_set_without_peers_or_step_times_leaves_their_goals_open():
    results = made_up(ce=0.2, sib=0.5)
    for run in results["runs"]:
        run["mean_seconds_per_step"] = None
    found = gains.shown(results, gains.GOALS["cub20"], ["energy-loss"])
    assert found["cost"] is None and found["ahead"] is None
    assert found["reached"]["cost"] is None and found["reached"]["ahead"] is None
    assert gains.markdown({"cub20": found}, {}, ([], {}))


def test_step_times_of_two_machines_are_not_compared():
    results = made_up(**METHODS)
    for run in results["runs"]:
        starts = [{"system": "Linux", "device": "a processor", "threads": 1}]
        if (run["method"], run["seed"]) == ("sib", 0):
            run["mean_seconds_per_step"], starts = 99.0, [*starts, {**starts[0], "device": "another processor"}]
        run["record"] = {"starts": starts}
    assert gains.shown(results, gains.GOALS["duts30"], [])["cost"] == pytest.approx(1.2)  # of seeds 1 and 2
    for run in results["runs"]:
        run["record"] = {"starts": [{"system": run["method"], "device": "a processor", "threads": 1}]}
    found = gains.shown(results, gains.GOALS["duts30"], [])
    assert found["cost"] is None and found["reached"]["cost"] is None


# -------------------------------------------------------------------------------------------------- the tasks


def written(path):
    path.write_text("done")
    return "wrote"


def failing(error):
    raise error


def interrupted(path):
    path.write_text("begun")
    try:
        time.sleep(120)
    except KeyboardInterrupt:
        path.write_text("stopped")
        raise


def test_a_task_that_fails_or_whose_process_ends_loses_no_other(tmp_path):
    tasks = [
        Task("a", failing, (RunError("It cannot be."),)),
        Task("b", os._exit, (3,)),
        Task("c", failing, (ValueError("a bug"),)),
        Task("d", written, (tmp_path / "d",)),
    ]
    failures = run_tasks(tasks, 1, Console(quiet=True))
    assert [(failure.task.name, failure.sentence.split()[0]) for failure in failures] == [
        ("a", "It"),
        ("b", "a"),
        ("c", "ValueError:"),
    ]
    assert (tmp_path / "d").exists()
    with pytest.raises(RunError, match=r"^3 of 4 trainings failed \(the first, a: It cannot be\): the others are done"):
        raise_failures(failures, len(tasks))


def test_ctrl_c_stops_the_task_under_way_and_begins_no_other(tmp_path):
    def press():
        while not (tmp_path / "a").exists():
            time.sleep(0.05)
        while (tmp_path / "a").read_text() == "begun":  # Python drops one that comes while it collects garbage
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)

    threading.Thread(target=press, daemon=True).start()
    tasks = [Task("a", interrupted, (tmp_path / "a",)), Task("b", written, (tmp_path / "b",))]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job does not hear it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tasks(tasks, 1, Console(quiet=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "a").read_text() == "stopped" and not (tmp_path / "b").exists()
