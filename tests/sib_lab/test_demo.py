import json
from dataclasses import replace

import pytest
from sib_lab.cli import commands as cli
from sib_lab.experiments import demo
from sib_lab.training.config import TrainConfig
from sib_lab.training.runs import open_run
from typer.testing import CliRunner


@pytest.fixture
def small_demo(tiny, monkeypatch, tmp_path):
    """The command ``sib-lab demo`` on the sizes of ``tiny``, in an empty folder."""
    original = demo.demo_plan

    def small(*arguments):
        plan = original(*arguments)
        sizes = {"data_options": tiny().data_options, "batch_size": 16, "threads": 1}
        return replace(plan, configs={name: replace(c, **sizes) for name, c in plan.configs.items()}, images=6)

    monkeypatch.setattr(demo, "demo_plan", small)
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(cli.app, ["demo", "--epochs", "2", *words])


def test_the_demo_compares_cross_entropy_with_s_ib_on_the_recipe_of_train():
    plan = demo.demo_plan()
    assert list(plan.configs) == ["ce", "sib"] and plan.seeds == (0,)
    usual = TrainConfig(threads=2)
    assert plan.config("ce", 0) == replace(usual, method="ce")
    assert plan.config("sib", 0) == replace(usual, method="sib", masks="given")


def test_the_options_choose_seed_epochs_masks_and_constants():
    plan = demo.demo_plan(5, 3, "density", "paper")
    assert list(plan.configs) == ["ce", "sib-paper"] and plan.seeds == (5,)
    config = plan.config("sib-paper", 5)
    assert (config.epochs, config.masks, config.learning_rate) == (3, "self-made", TrainConfig.learning_rate)
    assert demo.demo_plan(preset="paper").config("sib-paper", 0).masks == "given"


def test_an_interrupted_demo_says_how_to_go_on_and_ends_with_the_numbers_of_one_that_was_not(
    small_demo, tmp_path, press_ctrl_c
):
    assert small_demo("--out", "whole").exit_code == 0
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"report.html", "gallery.png", "results.json", "metrics.csv"} < names

    press_ctrl_c(11)  # of 8 + 8 steps
    stopped = small_demo("--out", "parts")
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("Go on with: sib-lab demo --epochs 2 --out parts --resume\n")
    assert small_demo("--out", "parts", "--resume").exit_code == 0
    metrics = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]

    anew = small_demo("--out", "parts", "--seed", "1")
    assert anew.exit_code == 0 and "Starting anew" not in anew.output  # another seed, another run folder
    again = small_demo("--out", "parts")
    assert "Starting anew" in again.output
    assert (tmp_path / "parts/metrics.csv").read_bytes() == metrics[0]
    assert json.loads((tmp_path / "parts/results.json").read_text())["seeds"] == [0]
    assert open_run(tmp_path / "parts/runs/sib-seed0").finished


def test_resuming_nothing_is_one_sentence_and_exit_code_1(small_demo):
    result = small_demo("--resume")
    assert result.exit_code == 1
    assert result.stderr == "There is nothing to go on with in runs/demo: start without --resume.\n"
