import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sib_lab.cli import commands as cli
from sib_lab.training import runs
from sib_lab.training.train import train
from typer.testing import CliRunner

COMMANDS = ("demo", "train", "check", "compare", "report", "explain")
#: A comparison of seconds.
SMALL = "--option train=64 --option validation=20 --option test=20 --option copies=1 --epochs 1 --batch-size 16".split()
SMALL += "--images 4 --threads 1".split()


def sib_lab(*words):
    """Calls the command line in this process."""
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    """A trained run."""
    folder = tmp_path_factory.mktemp("runs") / "sib-seed0"
    train(tiny("sib", epochs=1), folder, quiet=True)
    return folder


@pytest.fixture
def picture(tmp_path):
    """A photograph of 90 x 60 px."""
    path = tmp_path / "cat.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    return path


def stops_with(result, sentence, code=1):
    """The command printed nothing on its error channel but one sentence, and exited with a code."""
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1 and sentence in result.stderr, result.stderr
    return True


# ------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_that_the_command_understands(command, monkeypatch):
    shown = sib_lab(command, "--help").output
    example = shown[shown.index("Example: ") :].removeprefix("Example: ").split()
    assert example[:2] == ["sib-lab", command]
    # parsed in full: --help after it answers before anything runs, and an unknown option would be an error
    assert sib_lab(*example[1:], "--help").exit_code == 0
    group = cli.typer.main.get_command(cli.app)
    context = group.commands[command].make_context(command, example[2:])
    assert context.params


def test_help_is_fast_and_loads_no_torch():
    code = "from sib_lab.cli.commands import app; app(['compare', '--help'], standalone_mode=False); import sys; "
    code += "print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Example: sib-lab compare" in shown and shown.endswith("False\n")


@pytest.mark.parametrize(
    "missing, words",
    [
        ("typer", ["demo"]),
        ("captum", ["compare"]),
        ("torchcam", ["demo"]),
        ("lightning_fabric", ["train", "--out", "nowhere"]),
        ("jinja2", ["report", "nowhere"]),
        ("matplotlib", ["explain", "--checkpoint", "nowhere", "nothing.jpg"]),
    ],
)
def test_a_missing_library_is_one_sentence_with_the_command_that_installs_it(missing, words, tmp_path):
    code = f"import sys; sys.modules['{missing}'] = None; sys.argv = ['sib-lab', *{words}]; "
    code += "from sib_lab.cli.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr == f'sib-lab needs {missing}, which is not installed: pip install "sib-ext[lab]"\n'


# ---------------------------------------------------------------------------------------------------- compare


def test_compare_trains_what_is_asked_for_and_prints_the_table(tmp_path):
    words = ["compare", "--methods", "ce, sib", "--seeds", 1, "--first-seed", 3, "--out", tmp_path / "two", *SMALL]
    words += ["--strength", "sib=2", "--loss-option", "sib:input_foreground=0.5"]
    result = sib_lab(*words)
    assert result.exit_code == 0, result.output
    assert "S-IB" in result.output and "EPG (chance" in result.output and "over images" in result.output
    assert sorted(path.name for path in (tmp_path / "two/runs").iterdir()) == ["ce-seed3", "sib-seed3"]
    config = runs.open_run(tmp_path / "two/runs/sib-seed3").config
    assert (config.seed, config.epochs, config.batch_size, config.threads) == (3, 1, 16, 1)
    assert config.strength == 2 and config.loss_options == {"input_foreground": 0.5}
    assert runs.open_run(tmp_path / "two/runs/ce-seed3").config.loss_options == {}
    assert "; strength 2; input_foreground = 0.5." in (tmp_path / "two/report.html").read_text()
    assert config.data_options == {"copies": "1", "train": "64", "validation": "20", "test": "20"}

    report = tmp_path / "two/report.html"
    before = report.read_bytes()
    report.unlink()
    again = sib_lab("report", tmp_path / "two")
    assert again.exit_code == 0 and report.read_bytes() == before and "EPG (chance" in again.output

    assert stops_with(sib_lab(*words, "--epochs", 2), "was begun with epochs = 1: compare with the same options")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--methods", "ce,magic"], "Method must be one of ce, sib"),
        (["--methods", ","], "There is nothing to compare"),
        (["--measures", "epg,beauty"], "Measures must be some of epg, pointing_game, iou, ehr, deletion, insertion"),
        (["--data", "mnist"], "There is no data set 'mnist': choose one of digits"),
        (["--data", "folder"], "folder needs root"),
        (["--data", "folder", "--root", "nowhere"], "root is not a folder: nowhere."),
        (["--network", "lenet", *SMALL], "There is no network 'lenet'"),
        (["--layer", "conv9", *SMALL], "small_cnn has no module 'conv9'"),
        (["--option", "copies"], "--option takes NAME=VALUE, got 'copies'."),
        (["--option", "copies=many"], "The option copies must be a whole number, got 'many'."),
        (["--option", "colour=red"], "digits has no option 'colour': it takes train, validation"),
        (["--strength", "rrr=2"], "An option was given to rrr, which is not compared."),
        (["--loss-option", "input_foreground=2"], "--loss-option takes METHOD:NAME=VALUE, got 'input_foreground=2'."),
        (["--loss-option", "sib:magic=2", *SMALL], "magic"),
        (["--strength", "2"], "--strength takes METHOD=VALUE, got '2'."),
        (["--strength", "sib=much"], "--strength sib takes a number, got 'much'."),
        (["--strength", "ce=2"], "Strength has no meaning for method ce"),
        (["--agreement", "2"], "Agreement must lie in [0, 1], got 2.0."),
        (["--batch-size", "999", *SMALL[:-6], "--images", "4"], "999"),
        (["--device", "cuda", *SMALL], "but torch sees"),
    ],
)
def test_every_wrong_option_of_compare_is_one_sentence(words, sentence, tmp_path):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert stops_with(sib_lab("compare", "--seeds", 1, "--out", tmp_path / "out", *words), sentence)


def test_a_report_of_nothing_is_one_sentence(tmp_path):
    assert stops_with(sib_lab("report", tmp_path), "There is no comparison in")


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(tmp_path, monkeypatch, press_ctrl_c):
    monkeypatch.chdir(tmp_path)
    press_ctrl_c(3)
    result = sib_lab("compare", "--methods", "ce", "--seeds", 1, "--fresh", *SMALL)
    go_on = " ".join(["sib-lab compare --methods ce --seeds 1", *SMALL[:8], *SMALL[8:]])
    assert result.exit_code == 130
    said = result.stderr.strip()
    assert said.startswith(
        "Stopped; everything done so far is kept. Go on with: sib-lab compare --methods ce --seeds 1"
    )
    assert sorted(said.partition("Go on with: ")[2].split()) == sorted(go_on.split())  # all of it but --fresh
    again = sib_lab(*said.partition("Go on with: sib-lab ")[2].split())
    assert again.exit_code == 0 and "Going on at step 3" in again.output


def test_sigint_to_the_whole_program_keeps_what_was_done(tmp_path):
    out = tmp_path / "stopped"
    words = ["-m", "sib_lab.cli", "compare", "--methods", "ce", "--seeds", "1", "--out", str(out), *SMALL]
    words[words.index("--epochs") + 1] = "500"
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not (out / "runs/ce-seed0/last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.startswith("Stopped; everything done so far is kept. Go on with: sib-lab compare")
    assert runs.load_state(out / "runs/ce-seed0/last.pt")["step"] > 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_sentence(run_folder, picture, tmp_path, monkeypatch):
    original = open

    def full(path, mode="r", *arguments, **options):
        return original("/dev/full" if "w" in mode and "explained" in str(path) else path, mode, *arguments, **options)

    monkeypatch.setattr(runs, "open", full, raising=False)
    result = sib_lab("explain", "--checkpoint", run_folder, "--out", tmp_path / "explained.png", picture)
    assert stops_with(result, "explained.png cannot be written (No space left on device)")


def test_an_error_of_the_system_is_one_sentence(monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "runs/demo")

    monkeypatch.setattr("sib_lab.experiments.compare.compare", refuse)
    assert stops_with(sib_lab("demo"), "runs/demo cannot be used: Permission denied.")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sib_lab.experiments.compare.write_report", fail)
    assert isinstance(sib_lab("report", ".").exception, RuntimeError)
