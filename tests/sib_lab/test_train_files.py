"""Options in files, the identity of data and weights, one process a folder, and stored files that are not whole."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import typer
import yaml
from sib_lab.cli.train import train_command
from sib_lab.data import DataError, open_data
from sib_lab.networks.build import build_network
from sib_lab.networks.errors import NetworkError
from sib_lab.networks.own import SmallCNN
from sib_lab.training import runs, train
from sib_lab.training.config import TrainConfig
from sib_lab.training.files import options_as_yaml, read_options
from sib_lab.training.runs import (
    BEST,
    CONFIG,
    DATA,
    FINISHED,
    LAST,
    LOCK,
    METRICS,
    OPTIONS,
    CheckpointError,
    RunError,
    locked,
    open_run,
)
from sib_lab.training.trainer import Trainer
from test_train import DIGITS, SMALL, one_sentence, run, same_weights, stop_at
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def data():
    return open_data("digits", **DIGITS)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "ce"
    run(SMALL, folder, data)
    return folder


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def stopped_at(step, options, folder, data, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, step)
        run(options, folder, data)


@pytest.fixture
def command():
    app = typer.Typer()
    app.command("train")(train_command)
    app.command("other")(lambda: None)
    return lambda *words: CliRunner().invoke(app, ["train", *map(str, words)])


# ------------------------------------------------------------------------------------------ options in files


def test_every_option_comes_back_from_its_file(tmp_path):
    options = TrainConfig(
        data="folder", root="a b", method="gradient-penalty", match=(1e-7, 0.25), learning_rate=1e-5, ema=0.999,
        class_weights=(1.0, 2.0), loss_options={"seed": "target_logit"}, data_options={"masks": "yes"}, weights="w.pt",
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(options_as_yaml(options))
    assert TrainConfig(**read_options(tmp_path / "run.yaml")) == options


def test_a_run_is_repeated_from_its_run_yaml_bit_for_bit(tmp_path, command):
    options = replace(SMALL, method="sib", loss_options={"input_background": 0.3}, epochs=1, ema=0.5, clip_norm=2.0)
    run(options, tmp_path / "first", None)
    done = command("--config", tmp_path / "first" / OPTIONS, "--out", tmp_path / "again", "--quiet")
    assert done.exit_code == 0, done.output
    first, again = (open_run(tmp_path / name) for name in ("first", "again"))
    assert again.config == options and same_weights(first.model, again.model)
    assert str(again.curves) == str(first.curves)  # with NaN in them


@pytest.fixture
def config_of(command, monkeypatch, tmp_path):
    """config_of(text of the file, *words) -> the config that would be trained, or the error."""

    def call(text, *words):
        seen = []

        def trained(config, folder, **options):
            seen.append(config)
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "train", trained)
        (tmp_path / "own.yaml").write_text(text)
        result = command("--config", tmp_path / "own.yaml", "--out", "somewhere", *words)
        return seen[0] if seen else result.stderr

    return call


def test_options_given_replace_those_of_the_file_and_the_file_those_of_the_preset(config_of):
    text = "learning_rate: 1e-3\nepochs: 3\nloss_options: {every: 2, input_background: 5e-1}\n"
    seen = config_of(text, "--epochs", "5", "--loss-option", "every=1")
    assert (seen.learning_rate, seen.epochs, seen.batch_size) == (1e-3, 5, 32)
    assert seen.loss_options == {"every": 1, "input_background": 0.5}
    assert config_of("data: pets\nnetwork: resnet50\nroot: x\n", "--preset", "paper").learning_rate == 1e-4
    assert config_of("network: resnet18\n").learning_rate == 1e-3


def test_another_method_or_data_set_leaves_behind_what_belonged_to_the_files(config_of):
    text = "method: sib\nstrength: 2.0\nloss_options: {every: 2}\ndata_options: {train: 50}\nseed: 3\n"
    seen = config_of(text, "--method", "ce")
    assert (seen.method, seen.strength, seen.loss_options, seen.seed) == ("ce", None, {}, 3)
    assert config_of("data: digits\n" + text, "--data", "cifar100", "--root", "x").data_options == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "has the option 'learning_rat', which there is not: the nearest is learning_rate"),
        ("loss_options: 3", "loss_options must be names with their values, got 3"),
        ("data_options: [1, 2]", r"data_options must be names with their values, got \[1, 2\]"),
        ("- 1", r"must hold options with their values \(epochs: 14\), got a list"),
        ("epochs: [", "is no YAML file that can be read at line 1"),
        ("epochs: many", "Epochs must be a whole number, got 'many'"),
        ("\x00", "is no YAML file that can be read"),
    ],
)
def test_a_file_that_cannot_be_is_said_in_one_sentence(config_of, text, message):
    import re

    found = config_of(text)
    assert re.search(message, found) and found.count("\n") == 1 and found.endswith(".\n")


def test_a_file_that_is_not_there_is_said_in_one_sentence(command, tmp_path):
    done = command("--config", tmp_path / "none.yaml", "--out", tmp_path / "run")
    assert done.exit_code == 1 and done.stderr.endswith("none.yaml cannot be read (No such file or directory).\n")


@pytest.mark.parametrize("text", ["1,2.5", "file", "lines"])
def test_class_weights_are_words_or_a_file(config_of, tmp_path, text):
    if text != "1,2.5":
        (tmp_path / "weights").write_text("1, 2.5\n" if text == "file" else "1\n2.5\n")
        text = str(tmp_path / "weights")
    assert config_of("epochs: 2", "--class-weights", text).class_weights == (1.0, 2.5)
    message = config_of("epochs: 2", "--class-weights", "evenly")
    assert message == "Class_weights takes balanced, A,B,C or a file of numbers, got 'evenly'.\n"


# ------------------------------------------------------------------------------------- the data's identity


@pytest.fixture(scope="module")
def other(data):
    return open_data("digits", **(DIGITS | {"validation": 30}))


def test_other_data_is_refused_when_a_run_goes_on_and_when_it_is_taken(data, other, finished, tmp_path, monkeypatch):
    stopped_at(5, SMALL, tmp_path / "run", data, monkeypatch)
    for folder in (tmp_path / "run", finished):
        with pytest.raises(
            CheckpointError, match=r"is not what it was \(.+\): restore the data, remove this run"
        ) as error:
            run(SMALL, folder, other)
        assert one_sentence(error) and str(folder) in str(error.value)
    assert run(SMALL, tmp_path / "run", data).finished
    assert run(SMALL, tmp_path / "run", other, resume=False).finished
    assert json.loads((tmp_path / "run" / DATA).read_text()) == json.loads(json.dumps(other.identity()))


def test_a_file_that_is_no_checkpoint_is_no_run(finished):
    with pytest.raises(RunError, match="config.json is no checkpoint of this program: give a run folder, or") as error:
        open_run(finished / CONFIG)
    assert one_sentence(error)


def as_of_old(folder, lacking=("mean", "std", "weights_sha256")):
    """A run folder as the first versions of this program wrote it."""
    young = {"mean", "std", "ema", "patience", "clip_norm", "accumulate", "label_smoothing", "class_weights", "wandb"}
    for name in (LAST, BEST):
        state = torch.load(folder / name, weights_only=True)
        state["config"] = {key: value for key, value in state["config"].items() if key not in young}
        torch.save({key: value for key, value in state.items() if key not in lacking}, folder / name)
    record = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({"config": state["config"], "starts": record["starts"]}))
    for name in (DATA, OPTIONS, LOCK):
        (folder / name).unlink(missing_ok=True)


def test_a_run_of_a_former_version_opens_as_it_was_and_is_refused_where_it_says_too_little(data, finished, tmp_path):
    old = copy_of(finished, tmp_path / "old")
    as_of_old(old)
    now, then = open_run(finished), open_run(old)
    assert then.finished and then.model.preprocessing.mean == (0.5, 0.5, 0.5) and then.history == now.history
    x = torch.rand(3, 3, data.size, data.size) * 2 - 1
    assert torch.equal(then.model(x), now.model(x))
    for path in (old / BEST, old / LAST):  # taken as weights of another training, too
        assert build_network("small_cnn", 10, 40, path).preprocessing.mean == (0.5, 0.5, 0.5)
    for name in (FINISHED, None):
        with pytest.raises(RunError, match=r"does not say what data .*data.json is not there") as error:
            run(SMALL, old, data)
        assert one_sentence(error)
        (old / (name or LOCK)).unlink(missing_ok=True)


def test_a_run_goes_on_with_the_normalisation_that_it_had_or_not_at_all(data, finished, tmp_path, monkeypatch):
    weights = torch.load(finished / BEST, weights_only=True) | {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}
    torch.save(weights, tmp_path / "weights.pt")
    options = replace(SMALL, weights=str(tmp_path / "weights.pt"))
    stopped_at(6, options, tmp_path / "run", data, monkeypatch)
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert state["mean"] == [0.4, 0.5, 0.6]
    for lacking, sentence in (
        (("mean", "std"), r"normalised with mean \(0.5, 0.5, 0.5\) .* would be \(0.4, 0.5, 0.6\)"),
        (("weights_sha256",), "weights.pt, whose content it does not say: go on with the same options"),
    ):
        torch.save({key: value for key, value in state.items() if key not in lacking}, tmp_path / "run" / LAST)
        with pytest.raises(CheckpointError, match=sentence) as error:
            run(options, tmp_path / "run", data)
        assert one_sentence(error)


@pytest.mark.parametrize("damage", [None, "", "[1]", "{", "null"])
def test_a_run_that_does_not_say_its_data_is_refused(data, finished, tmp_path, monkeypatch, damage):
    stopped_at(5, SMALL, tmp_path / "stopped", data, monkeypatch)
    for folder in (copy_of(finished, tmp_path / "finished"), tmp_path / "stopped"):
        (folder / DATA).unlink() if damage is None else (folder / DATA).write_text(damage)
        with pytest.raises(RunError, match="does not say what data it was trained on") as error:
            run(SMALL, folder, data)
        assert one_sentence(error)
    assert open_run(tmp_path / "finished").finished  # it still explains


def test_skipping_broken_files_is_not_another_run(finished, data):
    assert run(replace(SMALL, skip_broken=True), finished, data).finished


def test_weights_count_by_their_content_not_their_path(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    torch.save(SmallCNN().state_dict(), "w.pt")
    options = replace(SMALL, weights="w.pt", epochs=1)
    stopped_at(2, options, tmp_path / "run", data, monkeypatch)
    run(options, tmp_path / "whole", data)
    (tmp_path / "elsewhere.pt").write_bytes((tmp_path / "w.pt").read_bytes())
    done = run(replace(options, weights=str(tmp_path / "elsewhere.pt")), tmp_path / "run", data)
    assert same_weights(done.model, open_run(tmp_path / "whole").model)
    assert json.loads((tmp_path / "run" / CONFIG).read_text())["weights_sha256"] == runs.file_hash("w.pt")

    torch.save(SmallCNN().state_dict(), "w.pt")
    for other in (options, replace(options, weights=None)):
        with pytest.raises(CheckpointError, match="was made with weights = ") as error:
            run(other, tmp_path / "run", data)
        assert one_sentence(error)
    with pytest.raises(RunError, match=r"The weights none\.pt cannot be read: No such file") as error:
        run(replace(options, weights="none.pt"), tmp_path / "run", data)
    assert one_sentence(error)


# ------------------------------------------------------------------------------------ one process a folder


def test_two_processes_do_not_work_in_one_folder(data, tmp_path):
    code = "import sys\nfrom sib_lab.training.runs import locked\n"
    code += "with locked(sys.argv[1]): print('in', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=-1, stdout=-1, text=True)
    try:
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(RunError, match=f"Another process is at work in {tmp_path}: wait for its end") as error:
            run(SMALL, tmp_path, data)
        assert one_sentence(error) and {path.name for path in tmp_path.iterdir()} == {LOCK}
    finally:
        holder.kill()
        holder.wait()
    assert run(replace(SMALL, epochs=1), tmp_path, data).finished  # a killed process keeps nobody out


def test_a_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="mine"), locked(tmp_path):
        with pytest.raises(RunError, match="Another process is at work"), locked(tmp_path):
            pass
        raise ValueError("mine")
    with locked(str(tmp_path)):
        pass


# ---------------------------------------------------------------------------------------------- damaged files

JSONS = [
    "",
    "{",
    "[]",
    "3",
    "null",
    '"text"',
    '{"config": 3}',
    '{"config": {"epochs": "x"}}',
    '{"config": {"match": 1}}',
]
JSONS += ['{"best": 3}', '{"config": {"data_options": []}}', '{"config": {}, "starts": 3}', "\udcff", "[" * 100_000]


def answers(call) -> None:
    """It works, or says a sentence."""
    try:
        call()
    except (RunError, DataError, NetworkError) as error:
        text = str(error)
        assert "\n" not in text and text.endswith(".") and text[0].isupper(), text


@pytest.mark.parametrize("name", [CONFIG, FINISHED, DATA, METRICS, OPTIONS, LAST, BEST])
def test_a_file_cut_anywhere_or_of_another_kind_is_never_a_traceback(finished, data, tmp_path, name, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("trained"))
    whole = (finished / name).read_bytes()
    folder = copy_of(finished, tmp_path / "run")
    contents = [whole[: int(share * len(whole))] for share in (0, 0.01, 0.3, 0.5, 0.9, 0.999)] + [whole[:-1]]
    contents += [text.encode(errors="surrogateescape") for text in JSONS]
    contents += [whole[: len(whole) // 2] + b"\xff\x00" + whole[len(whole) // 2 + 2 :]]
    for content in contents:
        (folder / name).write_bytes(content)
        answers(lambda: open_run(folder))
        answers(lambda: run(SMALL, folder, data))


@pytest.mark.parametrize("name", [LAST, BEST])
@pytest.mark.parametrize("value", [None, 3, "text", [], {}, [1], {"a": 1}, torch.zeros(2)], ids=str)
def test_a_checkpoint_whose_parts_are_of_another_kind_is_never_a_traceback(data, finished, tmp_path, name, value):
    state = torch.load(finished / name, weights_only=True)
    folder = copy_of(finished, tmp_path / "run")
    (folder / FINISHED).unlink()
    for key in state:
        torch.save(state | {key: value}, folder / name)
        answers(lambda: open_run(folder))
        answers(lambda: run(SMALL, folder, data))
        (folder / FINISHED).unlink(missing_ok=True)


def test_a_finished_run_without_its_summary_writes_it_anew(finished, data, tmp_path):
    folder = copy_of(finished, tmp_path / "run")
    (folder / FINISHED).write_text("{")
    with pytest.raises(RunError, match=r"finished\.json is damaged: remove it and run the same command again"):
        run(SMALL, folder, data)
    (folder / FINISHED).unlink()
    (folder / METRICS).write_text("nothing")
    assert run(SMALL, folder, data).finished
    assert (folder / METRICS).read_bytes() == (finished / METRICS).read_bytes()
    found, expected = (json.loads((path / FINISHED).read_text()) for path in (folder, finished))
    assert found == expected and yaml.safe_load((folder / OPTIONS).read_text())["seed"] == 0
