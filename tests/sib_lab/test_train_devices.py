"""Distributed training in two processes on the CPU against one process, and in bfloat16."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sib_lab.data import open_data
from sib_lab.training import runs, train
from sib_lab.training.config import TrainConfig
from sib_lab.training.processes import launch_processes, with_processes_of_torchrun
from sib_lab.training.runs import LAST, TrainingError, open_run
from torch.multiprocessing import ProcessExitedException

DIGITS = {"train": 72, "validation": 19, "test": 10, "copies": 1}
# No BatchNorm and no S-IB statistics: then two halves of a batch are the batch.
NETWORK = """
from torch import nn

def build(classes, size):
    return nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(classes))
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
    (tmp_path / "plain_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return TrainConfig(
        network="plain_network:build", method="gradient-penalty", epochs=2, batch_size=16, data_options=DIGITS,
        threads=1, device="cpu", loss_options={"seed": "target_logit"},
    )  # fmt: skip


def assert_near(one: Path, two: Path) -> None:
    a, b = open_run(one, best=False, trust=True), open_run(two, best=False, trust=True)
    assert a.finished and b.finished and len(a.history) == len(b.history) == 2
    for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-3)
    for first, second in zip(a.history, b.history, strict=True):
        for name in first.keys() - {"seconds_median", "seconds_p20", "seconds_p80", "seconds_mean"}:
            assert second[name] == pytest.approx(first[name], rel=2e-3, abs=1e-5), name


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_after_a_signal(options, tmp_path):
    train.train(options, tmp_path / "one", quiet=True)
    two = replace(options, devices=2)
    train.train(two, tmp_path / "two", quiet=True)
    assert_near(tmp_path / "one", tmp_path / "two")
    assert not torch.distributed.is_initialized()

    # Killed by SIGTERM somewhere on its way, then resumed.
    code = (
        "import os, signal, threading, time\n"
        "from sib_lab.training import train\nfrom sib_lab.training.config import TrainConfig\n"
        "import json, sys\n"
        "def kill():\n"
        "    while not os.path.exists('parts/last.pt'):\n        time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "if __name__ == '__main__':\n"
        "    threading.Thread(target=kill, daemon=True).start()\n"
        "    train.train(TrainConfig(**json.loads(sys.argv[1])), 'parts', quiet=True)\n"
    )
    (tmp_path / "program.py").write_text(code)
    words = json.dumps(runs.plain(vars(replace(two, save_steps=1))))
    stopped = subprocess.run(
        [sys.executable, "-W", "ignore", "program.py", words], capture_output=True, text=True, timeout=200
    )
    assert stopped.returncode == 143, stopped.stderr
    assert 0 < runs.load_state(tmp_path / "parts" / LAST)["step"] < 8
    train.train(two, tmp_path / "parts", quiet=True)
    whole, parts = (open_run(tmp_path / name, best=False, trust=True) for name in ("two", "parts"))
    weights = zip(whole.model.state_dict().values(), parts.model.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in weights)
    assert whole.curves == parts.curves


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_further_options(options, tmp_path):
    options = replace(options, batch_size=8, accumulate=2, ema=0.8, clip_norm=0.5, label_smoothing=0.2, patience=5)
    train.train(options, tmp_path / "one", quiet=True)
    train.train(replace(options, devices=2), tmp_path / "two", quiet=True)
    assert_near(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("came", "outcome", "sentence"),
    [
        (None, TrainingError, "^Process 1 of the training was ended by signal SIGKILL: run the same command again"),
        (signal.SIGINT, KeyboardInterrupt, "^$"),
        (signal.SIGTERM, SystemExit, "^143$"),
    ],
)
def test_a_process_that_dies_is_said_and_one_that_a_signal_ended_is_no_error(came, outcome, sentence):
    def launch(work):
        if came:
            signal.raise_signal(came)
        raise ProcessExitedException("killed", error_index=1, error_pid=2, exit_code=-9, signal_name="SIGKILL")

    found = launch_processes(SimpleNamespace(launch=launch), None)
    assert isinstance(found, outcome) and re.match(sentence, str(found))


@pytest.mark.slow
def test_torchrun_trains_as_one_process(options, tmp_path):
    train.train(options, tmp_path / "one", quiet=True)
    code = (
        "import json, sys\nfrom sib_lab.training import train\nfrom sib_lab.training.config import TrainConfig\n"
        "run = train.train(TrainConfig(**json.loads(sys.argv[1])), 'two', quiet=True)\nassert run.finished\n"
    )
    (tmp_path / "program.py").write_text(code)
    words = json.dumps(runs.plain(vars(options)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "program.py", words], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert open_run(tmp_path / "two", trust=True).config.devices == 2
    assert_near(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_an_error_in_every_process_is_still_one_sentence(options, tmp_path):
    with pytest.raises(TrainingError, match="^plain_network:nothing: the module plain_network has no 'nothing'"):
        train.train(replace(options, devices=2, network="plain_network:nothing"), tmp_path / "two", quiet=True)


def test_torchruns_number_of_processes_counts(options, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert with_processes_of_torchrun(options).devices == 4
    with pytest.raises(TrainingError, match="torchrun started 4 processes, but 2 devices were asked for"):
        with_processes_of_torchrun(replace(options, devices=2))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match="batch_size 16 cannot be shared evenly by 3 devices"):
        with_processes_of_torchrun(options)


@pytest.mark.parametrize("method", ["ce", "sib", "energy-loss", "l1-loss", "rrr-loss", "ppce-loss"])
def test_bfloat16_trains_near_to_single_precision(tmp_path, method):
    data = open_data("digits", **DIGITS)
    base = TrainConfig(method=method, epochs=1, batch_size=16, data_options=DIGITS, threads=1, device="cpu")
    losses = [
        train.train(replace(base, precision=precision), tmp_path / precision, quiet=True, data=data).history[0]["loss"]
        for precision in ("32-true", "bf16-mixed")
    ]
    near = 0.1 if method == "ppce-loss" else 0.03  # a pixel of the mask whose Grad-CAM is rounded to 0 counts 100
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=near)
