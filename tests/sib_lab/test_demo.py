import json
import re
import subprocess
import sys
from io import StringIO

import pytest
import torch
from PIL import Image
from rich.console import Console
from sib_lab import cli, report
from sib_lab.data.digits_on_textures import Split
from sib_lab.demo import gallery_rows, run_demo
from sib_lab.measure import Estimate
from typer.testing import CliRunner


def demo(config, folder, resume=False):
    """Runs the demo and returns what it printed."""
    console = Console(file=StringIO(), width=120)
    run_demo(config, folder, resume, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(tiny, folder)


@pytest.fixture
def small_cli(tiny, monkeypatch, tmp_path):
    """The command with the tiny data set, in an empty folder."""

    class Small(cli.Config):
        """Config with the sizes of ``tiny``."""

        def __init__(self, **options):
            super().__init__(**{**vars(tiny), **options})

    monkeypatch.setattr(cli, "Config", Small)
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(cli.app, ["demo", *words])


def test_a_run_leaves_a_report_pictures_and_numbers(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    pictures = {"gallery.png", "bars.png", "curves.png"} | {f"image{i}.png" for i in range(1, 9)}
    assert names == pictures | {"report.html", "results.json", "metrics.csv", "checkpoint.pt"}
    for name in pictures:
        with Image.open(folder / name) as picture:
            picture.verify()
    assert (folder / "gallery.png").stat().st_size < 400_000


def test_the_table_shows_every_measure_of_both_networks(finished):
    folder, printed = finished
    results = json.loads((folder / "results.json").read_text())
    for network in ("cross_entropy", "spatial_ib"):
        values = [results["networks"][network][name] for name in ("accuracy_matched", "accuracy_uncorrelated")]
        for value in values + list(results["networks"][network]["epg"].values()):
            assert f"{value['mean']:.3f}" in printed
    assert f"{results['epg_by_chance']:.3f}" in printed and "Seconds per step" in printed


def test_the_report_is_one_file_that_loads_nothing_from_elsewhere(finished):
    html = (finished[0] / "report.html").read_text()
    sources = re.findall(r'src="([^"]{0,30})', html)
    assert len(sources) == 10 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<link" not in html and "<script" not in html and "url(" not in html


def test_a_run_over_a_checkpoint_says_that_it_starts_anew_and_the_same_seed_gives_the_same_numbers(
    finished, tiny, tmp_path
):
    (tmp_path / "checkpoint.pt").write_bytes(b"of another run")
    assert "Starting anew" in demo(tiny, tmp_path)
    assert (tmp_path / "metrics.csv").read_bytes() == (finished[0] / "metrics.csv").read_bytes()


def test_an_interrupted_and_resumed_demo_gives_the_same_numbers(finished, tiny, tmp_path, press_ctrl_c):
    press_ctrl_c(8)
    with pytest.raises(KeyboardInterrupt):
        demo(tiny, tmp_path)
    demo(tiny, tmp_path, resume=True)
    assert (tmp_path / "metrics.csv").read_bytes() == (finished[0] / "metrics.csv").read_bytes()


def test_a_finished_demo_resumes_to_the_same_numbers_without_training(finished, tiny, tmp_path, press_ctrl_c):
    (tmp_path / "checkpoint.pt").write_bytes((finished[0] / "checkpoint.pt").read_bytes())
    press_ctrl_c(1)
    demo(tiny, tmp_path, resume=True)
    assert (tmp_path / "metrics.csv").read_bytes() == (finished[0] / "metrics.csv").read_bytes()


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(small_cli, press_ctrl_c):
    press_ctrl_c(2)
    result = small_cli("--epochs", "1", "--seed", "3")
    assert result.exit_code == 130
    assert "Go on with: sib-lab demo --resume --seed 3 --epochs 1" in result.output


def test_resuming_nothing_is_one_sentence_and_exit_code_1(small_cli):
    result = small_cli("--resume")
    assert result.exit_code == 1
    assert result.output == "There is no checkpoint at runs/demo/checkpoint.pt: start without --resume.\n"


def test_help_is_fast_and_shows_an_example():
    code = "from sib_lab import cli; cli.app(['demo', '--help'], standalone_mode=False); import sys; "
    code += "print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Example: sib-lab demo --seed 1" in shown and shown.endswith("False\n")


def test_a_missing_library_is_one_sentence():
    code = "import sys; sys.modules['{}'] = None; sys.argv = ['sib-lab', 'demo']; from sib_lab import cli; cli.main()"
    for missing in ("typer", "captum"):
        run = subprocess.run([sys.executable, "-c", code.format(missing)], capture_output=True, text=True)
        assert run.returncode == 1
        assert run.stderr.startswith(f"sib-lab needs {missing}") and 'pip install "sib-ext[lab]"\n' in run.stderr
        assert run.stderr.count("\n") == 1


def test_a_difference_is_claimed_only_outside_its_interval():
    assert report.comparison(Estimate(0.5, 0.03, 0), Estimate(0.56, 0.04, 0)) == "+0.060"
    assert report.comparison(Estimate(0.5, 0.03, 0), Estimate(0.54, 0.04, 0)) == report.SAME
    assert report.comparison(Estimate(float("nan"), float("nan"), 9), Estimate(0.5, 0.1, 0)) == report.SAME


def test_undefined_images_show_in_the_table():
    assert report.number(Estimate(0.5, 0.01, 3)) == "0.500 ± 0.010 (3 undefined)"
    assert report.number(Estimate(float("nan"), float("nan"), 3)) == "undefined for all 3"


def test_the_gallery_takes_the_first_image_of_each_label_on_a_foreign_background():
    labels, backgrounds = torch.tensor([1, 1, 2, 2, 3, 1]), torch.tensor([1, 0, 5, 6, 7, 8])
    nothing = torch.empty(0)
    split = Split(nothing, nothing, labels, backgrounds, nothing)
    assert gallery_rows(split).tolist() == [1, 2, 4, 3, 5]
