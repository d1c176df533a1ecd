"""benchmarks/two_halves.py: its four losses, its picture, and all of it on tiny composites."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import write_backgrounds, write_objects
from PIL import Image
from sib_lab.experiments import evidence as ev
from sib_lab.explaining.methods import SIX
from sib_lab.training.losses import make_criterion

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def halves():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import two_halves
    return two_halves


def test_the_plan_has_cross_entropy_each_half_alone_and_the_preset(halves, tmp_path):
    plan = halves.plan_of_halves(tmp_path, 20)
    ours = ev.plan_of(ev.SITUATIONS["given"], tmp_path, ev.SCALES["cpu"], (20,), None).configs
    assert list(plan.configs) == ["ce", "sib-background", "sib-foreground", "sib"] == list(halves.LOSSES)
    assert plan.seeds == (20,) and not plan.best and plan.images == 100
    assert plan.configs["ce"] == ours["ce"] and plan.configs["sib"] == ours["sib"]
    assert plan.configs["sib-background"] == ours["sib-background"]
    weights = {
        method: (loss.input_background, loss.input_foreground, loss.feature_background, loss.feature_foreground)
        for method in ("sib-background", "sib-foreground", "sib")
        for loss in (make_criterion(plan.configs[method]).criterion,)
    }
    assert weights == {
        "sib-background": (0.75, 0, 1.5, 0),
        "sib-foreground": (0, 0, 0, 0.4),
        "sib": (0.75, 0, 1.5, 0.4),
    }


def test_made_up_maps_are_drawn_a_line_an_image_and_an_empty_one_is_named(halves, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    masks = np.zeros((2, 16, 16), np.float32)
    masks[:, 4:12, 4:12] = 1
    maps = {method: {m: rng.random((2, 16, 16), np.float32) for m in halves.DRAWN} for method in halves.LOSSES}
    maps["sib-background"]["gradcam"][1] = 0
    drawn = halves.figure(images, masks, maps)
    cells = [axes for axes in drawn.axes if axes.images]
    assert len(cells) == 2 * (2 + 2 * 4)
    assert [text.get_text() for axes in cells for text in axes.texts] == ["empty"]
    titles = {axes.get_title() for axes in cells}
    assert titles == {"", "image", "mask", "cross-entropy", "background\nhalf", "foreground\nhalf", "both\nhalves"}
    halves.draw(tmp_path / "halves.png", images, masks, maps)
    assert Image.open(tmp_path / "halves.png").size > (600, 150)


def test_what_is_said_of_the_class_activation(halves):
    mask = torch.zeros(3, 1, 4, 4)
    mask[..., :2, :2] = 1
    T = torch.zeros(3, 1, 4, 4)
    T[0] = 1  # even everywhere
    T[1, 0, 0, 0] = 16  # one position of the object; T[2] is empty
    found = halves.of_activation(T, mask)
    capacity = torch.tensor([math.log(1.0 + (3 / 2) ** 2) / 2 + 0.05, math.log(1.0 + 24**2) / 8 + 0.05, 0.05])
    assert found == pytest.approx(
        {
            "background": (0.75 + 0) / 2,
            "capacity": capacity.log().mean().exp().item() - 0.05,
            "coverage": (1 + 0.25 + 0) / 3,
            "empty": 1 / 3,
        },
        rel=1e-5,
    )


def test_a_tiny_run_writes_numbers_and_picture_and_trains_nothing_twice(halves, tmp_path, monkeypatch, capsys):
    objects = write_objects(tmp_path / "objects", ("cup", "pear"), views=6)
    shutil.make_archive(tmp_path / "data" / ev.OBJECTS.removesuffix(".zip"), "zip", objects)
    write_backgrounds(tmp_path / "data" / ev.BACKGROUNDS)
    monkeypatch.setitem(ev.SCALES, "cpu", ev.Scale("gap_cnn", 32, 1, 8, images=6, limit=24))
    monkeypatch.setattr(halves, "ROOT", tmp_path)
    told = ["two_halves.py", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--seed", "3", "--threads", "1"]
    monkeypatch.setattr("sys.argv", told)
    halves.main()
    assert "T: capacity on the object" in capsys.readouterr().out
    stored = tmp_path / "benchmarks/results/cpu/two_halves.json"
    found = json.loads(stored.read_text())
    assert found["seed"] == 3 and found["numbers"].keys() == halves.LOSSES.keys()
    for numbers in found["numbers"].values():
        assert {"accuracy/matched", "T/empty", *(f"empty/{m}" for m in SIX)} <= numbers.keys()
        assert 0 <= numbers["T/background"] <= 1 and numbers["T/capacity"] >= 0
    assert Image.open(tmp_path / "docs/images/two_halves.png").size[0] > 600

    monkeypatch.setattr("sib_lab.experiments.compare.train", lambda *a, **k: pytest.fail("trained again"))
    halves.main()
    assert json.loads(stored.read_text()) == found
