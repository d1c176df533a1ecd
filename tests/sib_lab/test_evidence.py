"""The evidence: its situations on tiny composites, and what the summary says of made-up results."""

import io
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
from data_samples import write_backgrounds, write_objects
from PIL import Image
from rich.console import Console
from sib_lab.data import DataError
from sib_lab.experiments import evidence as ev
from sib_lab.explaining.methods import SIX
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Objects in a .zip and backgrounds, in the layout of the real files."""
    folder = tmp_path_factory.mktemp("pictures")
    objects = write_objects(tmp_path_factory.mktemp("objects"), ("cup", "pear"), views=6)
    shutil.make_archive(folder / ev.OBJECTS.removesuffix(".zip"), "zip", objects)
    write_backgrounds(folder / ev.BACKGROUNDS)
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """Boxes, few and none alone, in seconds."""
    monkeypatch.setitem(ev.SCALES, "small", ev.Scale("gap_cnn", 32, 1, 8, images=6, limit=24))
    monkeypatch.setattr(ev, "SITUATIONS", {key: ev.SITUATIONS[key] for key in ("boxes", "few", "none")})


def test_the_situations_are_compared_and_summed_up_and_nothing_is_done_twice(root, tiny, tmp_path, monkeypatch):
    def run():
        text = io.StringIO()
        return ev.evidence(root, tmp_path, "small", (0, 1), 1, Console(file=text, width=200)), text.getvalue()

    summary, text = run()
    stored = json.loads((tmp_path / ev.SUMMARY).read_text())
    assert stored == json.loads(json.dumps(summary)) and set(stored) == {"boxes", "few", "none"}
    assert stored["none"]["numbers"]["centre-mask"]["1"].keys() >= {
        "epg/gradcam",
        "deletion/vjp",
        "empty/smoothgrad",
        "accuracy/flipped",
    }
    assert (tmp_path / ev.TABLE).read_text() in text
    assert Image.open(tmp_path / ev.PICTURE).size[0] > 500
    assert set(summary["none"]["leads"]) == {"gradient-penalty", "centre-mask"}
    assert text.count("Cross-entropy, seed 0: training") == 1  # looks at no mask: once for all situations
    for key, share in (("boxes", 1.0), ("few", 0.1), ("none", 0.0)):
        results = json.loads((tmp_path / key / "results.json").read_text())
        assert results["methods"].keys() == {"ce", "sib", *ev.SITUATIONS[key].controls} and not results["missing"]
        configs = {r["method"]: r["config"] for r in results["runs"]}
        assert configs["sib"]["annotated"] == share and configs["ce"]["annotated"] == 1.0
        assert (configs["sib"]["annotation"] == "boxes") == (key == "boxes") and configs["ce"]["annotation"] == "masks"
        assert stored[key]["empty"].keys() == results["methods"].keys()
        assert "accuracy/flipped" in {row["key"] for row in results["rows"]}
    assert "made its own masks" not in text  # a sentence of the report, not of the terminal
    losses = json.loads((tmp_path / "boxes" / "comparison.json").read_text())["losses"]
    assert all("was shown boxes around the objects in 100 %" in losses[method] for method in ("sib", "rrr"))
    losses = json.loads((tmp_path / "few" / "comparison.json").read_text())["losses"]
    assert "was shown the objects in 8 % of the training images" in losses["sib"]  # 2 of 24

    monkeypatch.setattr("sib_lab.experiments.compare.train", lambda *a, **k: pytest.fail("trained again"))
    again, text = run()
    assert again == summary and "training" not in text


def test_without_controls_s_ib_and_cross_entropy_alone_are_trained_for_as_long_as_asked(root, tiny, tmp_path):
    summary = ev.evidence(
        root, tmp_path, "small", (4, 5), 1, Console(file=io.StringIO(), width=200), controls=False, epochs=2
    )
    for key in ("boxes", "few", "none"):
        assert summary[key]["numbers"].keys() == {"ce", "sib"} and summary[key]["seeds"] == [4, 5]
        assert not summary[key]["leads"] and summary[key]["reached"]["ahead_of_controls"] is None
        results = json.loads((tmp_path / key / "results.json").read_text())
        assert {run["config"]["epochs"] for run in results["runs"]} == {2}


def test_missing_pictures_are_named(tmp_path):
    with pytest.raises(DataError, match="eth80_128.zip, which is not there: name the folder"):
        ev.check_data(tmp_path)
    from sib_lab.cli.commands import app

    told = CliRunner().invoke(app, ["evidence", str(tmp_path), "--scale", "small"])
    assert told.exit_code == 1 and "which is not there" in told.stderr


@pytest.mark.parametrize("key", ev.SITUATIONS)
def test_a_plan_has_the_situations_methods_and_tells_cross_entropy_nothing(key, tmp_path):
    situation = ev.SITUATIONS[key]
    plan = ev.plan_of(situation, tmp_path, ev.SCALES["gpu"], (0, 1, 2), None)
    assert list(plan.configs) == ["ce", "sib", *situation.parts, *situation.controls]
    assert all(plan.configs[m].loss_options == ev.PARTS[m] and plan.configs[m].method == "sib" for m in situation.parts)
    assert {c.annotated for m, c in plan.configs.items() if m not in ev.EVERYWHERE} == {situation.annotated}
    assert {plan.configs[m].annotated for m in ev.EVERYWHERE if m in plan.configs} == {1.0}
    shown = {m: c.annotation for m, c in plan.configs.items()}
    assert {shown[m] for m in shown if m not in ev.EVERYWHERE} == {"boxes" if key == "boxes" else "masks"}
    assert {shown[m] for m in shown if m in ev.EVERYWHERE} == {"masks"}
    assert all(c.network == "resnet18" and c.size == 128 and c.agreement == 0.95 for c in plan.configs.values())
    assert plan.configs["sib"].loss_options == {}  # the preset as it is


# ------------------------------------------------------------------------------------------------ the summary


def made_up(**epg):
    """Results of three seeds; a method's EPG is its value plus a hundredth of the seed, the same for all six, but for
    a thousandth from one to the next with S-IB; IoU is half of it, falling; insertion and accuracies are like it."""
    runs = [
        {
            "method": method,
            "seed": seed,
            "numbers": {
                **{
                    f"epg/{m}": {"mean": value + 0.01 * seed + 0.001 * i * (method == "sib")} for i, m in enumerate(SIX)
                },
                **{f"iou/{m}": {"mean": value / 2 - 0.001 * i * (method == "sib")} for i, m in enumerate(SIX)},
                **{f"insertion/{m}": {"mean": value + 0.1 * i + 0.01 * seed} for i, m in enumerate(SIX)},
                **{f"empty/{m}": {"mean": 0.0} for m in SIX},
                "accuracy/uncorrelated": {"mean": value + 0.02 * seed},
                "accuracy/matched": {"mean": value / 2 + 0.02 * seed},
                "accuracy/flipped": {"mean": value - 0.02 * seed},
            },
        }
        for method, value in epg.items()
        for seed in (0, 1, 2)
    ]
    return {"methods": dict.fromkeys(epg), "runs": runs}


SITUATION = ev.Situation(
    "tiny", 1.0, ("rrr",), accuracy_gain=0.02, accuracy_matched_gain=0.01, epg_gain=0.2, iou_gain=0.05
)


def test_gains_and_leads_are_paired_differences_and_the_worst_is_named():
    found = ev.shown(SITUATION, made_up(ce=0.2, sib=0.5, rrr=0.3))
    assert found["worst"] == SIX[0] and found["epg_gain"][SIX[0]]["mean"] == pytest.approx(0.3)
    assert found["epg_gain"][SIX[5]]["mean"] == pytest.approx(0.305)
    assert found["epg_gain"][SIX[0]]["half_width"] == pytest.approx(0, abs=1e-9)  # pairs take the seeds out
    assert found["leads"]["rrr"][SIX[0]]["mean"] == pytest.approx(0.2)
    assert found["accuracy_gain"]["mean"] == pytest.approx(0.3)
    assert found["worst_iou"] == SIX[5] and found["iou_gain"][SIX[5]]["mean"] == pytest.approx(0.15 - 0.005)
    assert found["accuracy_matched_gain"]["mean"] == pytest.approx(0.15)
    assert found["insertion_gain"]["mean"] == pytest.approx(0.3)
    assert found["goals"] == {
        "accuracy_gain": 0.02,
        "accuracy_matched_gain": 0.01,
        "epg_gain": 0.2,
        "iou_gain": 0.05,
        "insertion_gain": 0.0,
        "empty": 0.0,
    }
    assert found["reached"] == dict.fromkeys((*found["goals"], "ahead_of_controls"), True)
    text = ev.markdown({"tiny": found})
    assert "| EPG, worst of the six | +0.300 ± 0.000 (Grad-CAM); +0.20: reached |" in text
    assert "| IoU, worst of the six | +0.145 ± 0.000 (Input x Gradient); +0.05: reached |" in text
    assert "| empty maps of 100, most of the six | 0; 0: reached |" in text


def test_the_goals_of_the_situations():
    goals = ("accuracy_gain", "accuracy_matched_gain", "epg_gain", "iou_gain", "insertion_gain", "empty")
    assert {key: tuple(getattr(of, goal) for goal in goals) for key, of in ev.SITUATIONS.items()} == {
        "given": (0.10, 0.05, 0.25, 0.05, 0, 0),
        "boxes": (0.08, 0.04, 0.20, 0.03, 0, 0),
        "few": (0.08, 0.03, 0.20, 0.03, 0, 0),
        "none": (0.06, 0, 0.12, 0, 0, 1),
    }


def test_empty_maps_are_those_of_the_worst_seed_of_100_and_have_a_goal():
    results = made_up(ce=0.2, sib=0.5, rrr=0.3)
    for run in results["runs"]:
        if run["method"] == "sib":
            run["numbers"]["empty/layercam"]["mean"] = (0.0, 0.02, 0.01)[run["seed"]]
        if run["method"] == "ce":
            run["numbers"]["empty/gradcam"]["mean"] = 0.25
    found = ev.shown(SITUATION, results)
    assert found["empty"]["sib"] == {m: 2.0 * (m == "layercam") for m in SIX}
    assert found["empty"]["ce"]["gradcam"] == 25 and found["empty"]["rrr"] == dict.fromkeys(SIX, 0)
    assert not found["reached"]["empty"] and found["reached"]["epg_gain"]
    assert ev.shown(replace(SITUATION, empty=2), results)["reached"]["empty"]
    text = ev.markdown({"tiny": found})
    assert "| empty maps of 100, most of the six | 2; 0: not reached |" in text
    assert "| S-IB, tiny | 0 | 0 | 2 | 0 | 0 | 0 |" in text and "| Cross-entropy, tiny | 25 | 0 | 0 |" in text


def test_a_number_that_is_undefined_in_one_seed_leaves_that_pair_out():
    results = made_up(ce=0.2, sib=0.5, rrr=0.3)
    for run in results["runs"]:
        if run["method"] == "sib" and run["seed"] == 1:
            run["numbers"]["epg/vjp"] = run["numbers"]["insertion/gradcam"] = {"mean": None}
    found = ev.shown(SITUATION, results)
    assert found["insertion_gain"]["count"] == 2 and found["insertion_gain"]["mean"] == pytest.approx(0.3)
    for run in results["runs"]:
        run["numbers"]["iou/smoothgrad"] = {"mean": None}
    found = ev.shown(SITUATION, results)
    assert found["worst_iou"] == "smoothgrad" and not found["reached"]["iou_gain"]
    assert json.dumps(found, allow_nan=False) and ev.markdown({"tiny": found})


@pytest.mark.parametrize(
    ("epg", "missed"),
    [
        ({"ce": 0.2, "sib": 0.3, "rrr": 0.25}, "epg_gain"),
        ({"ce": 0.2, "sib": 0.5, "rrr": 0.6}, "ahead_of_controls"),
        ({"ce": 0.5, "sib": 0.5, "rrr": 0.1}, "accuracy_gain"),
        ({"ce": 0.5, "sib": 0.5, "rrr": 0.1}, "accuracy_matched_gain"),
        ({"ce": 0.45, "sib": 0.5, "rrr": 0.1}, "iou_gain"),
        ({"ce": 0.5, "sib": 0.45, "rrr": 0.1}, "insertion_gain"),
    ],
)
def test_goals_that_are_missed_are_said_to_be(epg, missed):
    found = ev.shown(SITUATION, made_up(**epg))
    assert not found["reached"][missed]
    text = ev.markdown({"tiny": found})
    assert ("not reached" in text) == (missed != "ahead_of_controls")
    assert len(re.findall(r"^\| (cross-entropy|right reasons), tiny \|", text, re.M)) == 2


def test_one_seed_has_no_interval_and_reaches_nothing():
    one = made_up(ce=0.2, sib=0.5, rrr=0.3)
    one["runs"] = [run for run in one["runs"] if run["seed"] == 0]
    found = ev.shown(SITUATION, one)
    assert found["epg_gain"][SIX[0]]["half_width"] is None and not found["reached"]["epg_gain"]
    assert not math.isnan(found["epg_gain"][SIX[0]]["mean"]) and json.dumps(found, allow_nan=False)
