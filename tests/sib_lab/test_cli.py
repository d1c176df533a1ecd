import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from sib_lab.cli import commands as cli
from sib_lab.cli.options import OF_A_RUN, OF_TRAINING
from sib_lab.experiments import compare
from sib_lab.training import runs
from sib_lab.training.config import TrainConfig, recipe
from sib_lab.training.files import options_as_yaml
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


# ---------------------------------------------------------------------------- the recipe, shared with sib-lab train

#: Every field another than by default, as sib-lab train would write it.
RUN = TrainConfig(
    data="folder", root="photos", size=64, agreement=0.9, annotated=0.5, annotation="boxes", augment=True,
    augmentation="trivial", limit=100, skip_broken=True, data_options={"boxes": "b.csv"}, network="gap_cnn",
    weights="w.pt", mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2), method="sib-paper", strength=2.0, masks="given",
    loss_options={"every": 2}, class_weights=(1.0, 2.5), label_smoothing=0.1, seed=7, epochs=3, batch_size=16,
    accumulate=2, learning_rate=2e-3, weight_decay=0.01, schedule="constant", warm_up=0.2, clip_norm=1.0, ema=0.9,
    patience=2, precision="bf16-mixed", device="cpu", devices=2, deterministic=False, threads=1, workers=1,
    save_minutes=1.0, save_steps=9, wandb="mine",
)  # fmt: skip


RUN_WORDS = {"class_weights": "1,2.5"}  #: where a value is written in another way on the command line


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """compared(text of the file of --config, or None, *words) -> the plan that would be carried out, and the output."""

    def call(text, *words):
        plans = []
        monkeypatch.setattr(compare, "compare", lambda plan, out, fresh: plans.append(plan))
        if text is not None:
            (tmp_path / "run.yaml").write_text(text)
            words = ("--config", tmp_path / "run.yaml", *words)
        result = sib_lab("compare", *words)
        assert result.exit_code == 0, result.output
        return plans[0], result.stdout

    return call


def test_compare_has_every_option_of_train_in_the_same_words():
    of = {name: command.params for name, command in cli.typer.main.get_command(cli.app).commands.items()}
    train_, compare_ = ({option.name: option for option in of[name]} for name in ("train", "compare"))
    assert train_.keys() - compare_.keys() == {"method", "seed", "match", "quiet"}  # of one run
    own = {"out", "fresh", "strength", "loss_option", "epochs"}
    for name in (train_.keys() & compare_.keys()) - own:
        one, other = train_[name], compare_[name]
        assert (one.opts, one.help, one.default) == (other.opts, other.help, other.default), name


def test_a_file_that_a_run_wrote_gives_its_recipe_to_every_method_and_says_what_it_does_not_give(compared):
    default = asdict(TrainConfig())
    assert {name for name, value in asdict(RUN).items() if value == default[name]} == {"match"}  # of one method
    plan, said = compared(options_as_yaml(RUN), "--methods", "ce,sib-paper,rrr", "--seeds", 2)
    assert list(plan.configs) == ["ce", "sib-paper", "rrr"] and plan.seeds == (0, 1)
    for method, config in plan.configs.items():
        assert config == replace(RUN, method=method, strength=None, loss_options={}, seed=0)
    assert said.startswith("Not taken from ") and said.count("\n") == 1
    assert "method = sib-paper, seed = 7, strength = 2.0, loss_options = {'every': 2}. Instead there are" in said
    assert compared("epochs: 3\nstrength: null\nmatch: []\n")[1] == ""  # there is nothing to say


def test_the_preset_of_a_files_loss_is_kept_by_its_relatives_or_said_to_be_left(compared, tmp_path):
    from sib_lab.cli.options import options_of

    run = recipe("fine_tuning", loss_options={"area": 0.4})
    (tmp_path / "run.yaml").write_text(options_as_yaml(run))
    for method, kept in (("centre-mask", True), ("rrr", False), ("sib-paper", False)):
        assert ("loss_options" in options_of(tmp_path / "run.yaml", {"method": method})) == kept
    assert compared(options_as_yaml(run), "--methods", "ce,sib")[1].endswith("and --preset fine_tuning.\n")


def test_options_of_compare_replace_those_of_the_file(compared):
    words = "--epochs 5 --class-weights balanced --clip-norm 3 --no-augment --strength sib=4 --loss-option sib:every=3"
    plan, _ = compared(options_as_yaml(RUN), *words.split())
    shared = replace(
        RUN, epochs=5, class_weights="balanced", clip_norm=3.0, augment=False, augmentation="crops", method="ce",
        seed=0, strength=None, loss_options={},
    )  # fmt: skip
    assert plan.configs["ce"] == shared
    assert plan.configs["sib"] == replace(shared, method="sib", strength=4.0, loss_options={"every": 3})
    assert compared("augment: false\n", "--augmentation", "crops")[0].configs["sib"].augment
    other, _ = compared(options_as_yaml(RUN), "--data", "digits")
    assert (other.configs["ce"].root, other.configs["ce"].data_options) == (None, {})


def test_the_recipe_on_the_command_line_is_that_of_every_method(compared):
    words = "--class-weights 1,2.5 --label-smoothing 0.1 --accumulate 2 --weight-decay 0.01 --schedule constant "
    words += "--warm-up 0.2 --clip-norm 1 --ema 0.9 --patience 2 --augmentation trivial --devices 2 --fast "
    words += "--save-minutes 1 --save-steps 9 --wandb mine"
    plan, _ = compared(None, *words.split())
    names = {word[2:].replace("-", "_") for word in words.split() if word.startswith("--")} - {"fast"}
    for method in ("ce", "sib"):
        config = plan.configs[method]
        assert {name: getattr(config, name) for name in names} == {name: getattr(RUN, name) for name in names}
        assert config.augment and not config.deterministic and config.method == method


def test_a_file_that_cannot_be_is_one_sentence_of_compare(tmp_path):
    (tmp_path / "own.yaml").write_text("label_smothing: 0.1\n")
    result = sib_lab("compare", "--config", tmp_path / "own.yaml", "--out", tmp_path / "out")
    assert stops_with(result, "has the option 'label_smothing', which there is not: the nearest is label_smoothing.")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OF_TRAINING)
def test_what_only_a_training_has_is_refused_by_name_with_0_epochs(name, tmp_path):
    option, value = (
        f"--{name.replace('_', '-')}",
        [] if name == "augment" else [RUN_WORDS.get(name, getattr(RUN, name))],
    )
    words = ("compare", "--weights", "w.pt", "--out", tmp_path / "out", option, *value)
    assert stops_with(sib_lab(*words, "--epochs", 0), f"{option} has no meaning with --epochs 0, which trains nothing")
    (tmp_path / "zero.yaml").write_text("epochs: 0\n")
    assert stops_with(sib_lab(*words, "--config", tmp_path / "zero.yaml"), f"{option} has no meaning with --epochs 0")


def test_with_0_epochs_a_file_gives_data_and_network_alone(compared):
    plan, said = compared(options_as_yaml(RUN), "--epochs", 0)
    assert plan.seeds == (
        RUN.seed,
    )  # its splits are drawn anew from the seed: the network must not meet what it learned
    assert compared(options_as_yaml(RUN), "--epochs", 0, "--first-seed", 0)[0].seeds == (0,)
    used = {f.name for f in fields(TrainConfig)} - {*OF_A_RUN, *OF_TRAINING, "epochs"}
    assert used == set(
        "data root size agreement limit skip_broken data_options network weights mean std "
        "precision device deterministic threads workers".split()
    )
    kept = {name: value for name, value in asdict(RUN).items() if name in used}
    assert plan.configs["as-is"] == TrainConfig(**kept, method="ce", seed=RUN.seed, epochs=0) and said == ""


def test_the_recipe_is_in_the_report_and_another_one_is_refused(tmp_path):
    out = tmp_path / "out"
    words = ["compare", "--methods", "ce", "--seeds", 1, "--out", out, *SMALL]
    recipe = ["--label-smoothing", 0.1, "--patience", 3]
    result = sib_lab(*words, *recipe)
    assert result.exit_code == 0, result.output
    page = (out / "report.html").read_text()
    assert "<dt>label smoothing</dt><dd>0.1</dd>" in page and "at most 1 epoch)" in page
    again = sib_lab(*words, "--config", out / "runs/ce-seed0/run.yaml")
    assert again.exit_code == 0 and "training" not in again.output
    assert stops_with(sib_lab(*words), "was begun with label_smoothing = 0.1, patience = 3: compare with the same")


def test_a_comparison_from_before_the_recipe_had_these_settings_was_made_with_their_defaults(tmp_path):
    out = tmp_path / "out"
    words = ["compare", "--methods", "ce", "--seeds", 1, "--out", out, *SMALL]
    assert sib_lab(*words).exit_code == 0
    for path in (out / "comparison.json", out / "runs/ce-seed0/config.json"):
        record = json.loads(path.read_text())
        for name in ("class_weights", "label_smoothing", "accumulate", "clip_norm", "ema", "patience", "augmentation"):
            del record["config"][name]
        path.write_text(json.dumps(record))
    assert sib_lab("report", out).exit_code == 0 and "1 epoch)" in (out / "report.html").read_text()
    assert stops_with(sib_lab(*words, "--ema", 0.9), "was begun with ema = None: compare with the same options")
    again = sib_lab(*words)
    assert again.exit_code == 0 and "training" not in again.output


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
