"""A LightningModule with SIBModule trains as the plain loop does."""

import logging
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from sib_ext import SIBStep
from sib_ext.integrations.lightning import SIBModule

from . import problem
from .problem import EVERY, Net, assert_alike, criterion, images, plain, sgd

PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # of one code, under two names


@pytest.fixture(params=PACKAGES)
def L(request):
    logging.getLogger(request.param).setLevel(logging.WARNING)
    return pytest.importorskip(request.param)


def module_of(L, automatic=True):
    class Module(SIBModule, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.model = Net()
            self.step = SIBStep(self.model, criterion(), every=EVERY, jitter=0)
            self.validated = []

        def training_step(self, batch, number):
            loss = self.step(*batch)
            if automatic:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

        def validation_step(self, batch, number):
            x, y, _ = batch
            self.validated.append(self.step.criterion.cross_entropy(self.model(x), y))

        def configure_optimizers(self):
            return sgd(self.model)

    torch.manual_seed(0)
    return Module()


def trainer(L, tmp_path, epochs=2, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1} | quiet | options
    return L.Trainer(max_epochs=epochs, default_root_dir=tmp_path, **options)


def batches(size=4):
    return torch.utils.data.DataLoader(images(), size)


def expected(**options):
    torch.manual_seed(0)
    return plain(Net(), **options)


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_it_trains_as_the_plain_loop_does_and_validates_without_gradients(L, automatic, tmp_path):
    module = module_of(L, automatic)
    trainer(L, tmp_path).fit(module, batches(), batches())
    assert_alike(module.model.parameters(), expected())
    assert module.validated and not any(value.requires_grad for value in module.validated)


def test_accumulated_batches_count_alike(L, tmp_path):
    module = module_of(L)
    trainer(L, tmp_path, accumulate_grad_batches=2).fit(module, batches())
    assert_alike(module.model.parameters(), expected(accumulate=2))


def test_bfloat16_is_the_autocast_of_the_plain_loop(L, tmp_path):
    module = module_of(L)
    trainer(L, tmp_path, precision="bf16-mixed").fit(module, batches())
    assert_alike(module.model.parameters(), expected(bfloat16=True))


def test_a_checkpoint_goes_on_within_the_cycle_of_the_steps(L, tmp_path):
    whole = module_of(L)
    trainer(L, tmp_path / "whole").fit(whole, batches())
    first = trainer(L, tmp_path / "first", epochs=1)
    first.fit(module_of(L), batches())
    first.save_checkpoint(tmp_path / "first.ckpt")
    again = module_of(L)
    trainer(L, tmp_path / "again").fit(again, batches(), ckpt_path=tmp_path / "first.ckpt")
    assert again.step.steps == 8 and 4 % EVERY != 0
    assert_alike(again.model.parameters(), whole.model.parameters(), rtol=1e-7)


def test_a_checkpoint_of_a_module_without_the_mixin_loads(L, tmp_path):
    module = module_of(L)
    module.on_load_checkpoint({})
    assert module.step.steps == 0


def test_a_module_without_a_step_is_told_so(L, tmp_path):
    module = module_of(L)
    del module.step
    with pytest.raises(RuntimeError, match="give it one in __init__"):
        trainer(L, tmp_path).fit(module, batches())


def test_the_step_takes_the_scaler_of_float16(L):
    module, scaler = module_of(L), torch.amp.GradScaler("cpu")
    module._trainer = types.SimpleNamespace(precision_plugin=types.SimpleNamespace(scaler=scaler))
    module.on_fit_start()
    assert module.step.scaler is scaler


def test_the_mixin_imports_neither_package():
    code = "import sys, sib_ext.integrations.lightning; print([n for n in sys.modules if 'lightning' in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['sib_ext.integrations.lightning']"


PROCESSES = """
    import sys, torch
    sys.path.insert(0, {root!r})
    import lightning.pytorch as L
    from sib_ext import SIBStep
    from tests.integrations.test_lightning import module_of, trainer
    from tests.integrations.problem import criterion, images, EVERY

    module = module_of(L)
    module.step = SIBStep(module.model, criterion(process_group="world"), every=EVERY, jitter=0)
    class Mine(torch.utils.data.Sampler):
        def __iter__(self):  # the two halves of each batch of four
            rank = torch.distributed.get_rank()
            return iter([row for start in range(2 * rank, 16, 4) for row in (start, start + 1)])
        def __len__(self):
            return 8
    loader = torch.utils.data.DataLoader(images(), 2, sampler=Mine())
    options = dict(strategy="ddp", devices=2, use_distributed_sampler=False)
    trainer(L, {folder!r}, **options).fit(module, loader)
    if module.global_rank == 0:
        torch.save(list(module.model.parameters()), {folder!r} + "/found.pt")
"""


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    pytest.importorskip("lightning.pytorch")
    root = Path(problem.__file__).parents[2]
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PROCESSES).format(root=str(root), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_alike(torch.load(tmp_path / "found.pt"), expected())
