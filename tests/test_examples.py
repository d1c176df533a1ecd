"""Every example runs, on little data, and is short."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LITTLE = ["--images", "64", "--epochs", "1"]
NEEDS = {
    "plain_pytorch": (),
    "frozen_backbone": (),
    "with_accelerate": ("accelerate",),
    "with_lightning": ("lightning",),
    "with_timm": ("timm",),
    "with_transformers": ("transformers", "accelerate"),
    "several_processes": (),
}
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")


def needs(name):
    pytest.importorskip("sib_lab")
    for package in NEEDS[name]:
        pytest.importorskip(package)


@pytest.fixture
def example(monkeypatch, tmp_path):
    """name -> the example's module; what it writes is written elsewhere."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def opened(name):
        needs(name)
        return importlib.import_module(name)

    yield opened
    if "accelerate" in sys.modules:  # a process has one precision
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def test_every_example_is_short_and_its_page_shows_it():
    files = {path.stem: path for path in EXAMPLES.glob("*.py") if path.stem != "digits"}
    assert files.keys() == NEEDS.keys()
    page = (ROOT / "docs/examples.md").read_text()
    for name, path in files.items():
        assert len(path.read_text().splitlines()) < 80, name
        assert f"(../examples/{name}.py)" in page and re.search(rf"\$ [\w\d =-]*{name}\.py", page), name


@pytest.mark.parametrize(
    "name, options",
    [
        ("plain_pytorch", ()),
        ("frozen_backbone", ()),
        ("with_accelerate", ()),
        ("with_accelerate", ("--precision", "bf16")),
        ("with_lightning", ()),
        ("with_lightning", ("--manual",)),
        ("with_lightning", ("--precision", "bf16-mixed")),
        ("with_timm", ()),
        ("with_timm", ("--mixup",)),
        ("with_timm", ("--loader",)),
        ("with_transformers", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "as it is",
)
def test_it_runs(name, options, example):
    found = example(name).main([*LITTLE, *options])
    assert 0 <= found["accuracy"] <= 1 and 0 <= found["epg"] <= 1


def test_a_trained_backbone_gets_a_new_head(example, tmp_path):
    import torch
    from sib_lab.networks.build import build_network

    torch.save(build_network("small_cnn", 10, 40).state_dict(), tmp_path / "backbone.pt")
    assert example("frozen_backbone").main([*LITTLE, "--weights", str(tmp_path / "backbone.pt")])


def test_a_model_of_the_hub_gets_a_head_for_these_classes(example, tmp_path):
    module = example("with_transformers")
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.for_model("resnet", num_labels=3, **module.SMALL)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    assert module.main([*LITTLE, "--model", str(tmp_path / "model")])


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_several_processes_end_with_one_network(options, tmp_path):
    needs("several_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "several_processes.py"), *LITTLE, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("accuracy") == 1
