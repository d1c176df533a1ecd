"""What stands beside the code: workflows, forms, the citation, versions, and the types that a user's checker sees."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sib_ext

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "CHANGELOG.md").is_file(), reason="needs the source tree")
in_repository = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="needs the repository")

USER = """
import torch
import sib_ext

step = sib_ext.SIBStep(torch.nn.Conv2d(3, 2, 3), sib_ext.SpatialIBLoss())
x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
reveal_type(step(x, y))
reveal_type(step.terms(x, y).cross_entropy)
reveal_type(sib_ext.SpatialIBLoss("paper").cross_entropy(x, y))
reveal_type(sib_ext.SpatialIBLoss().terms(x, y, x).background)
reveal_type(sib_ext.check_double_backward(step.model, x).findings)
reveal_type(sib_ext.density_mask(x))
sib_ext.density_mask(x, windw=3)
"""
SEEN = ["Tensor", "Tensor", "Tensor", "Mapping[str, Tensor]", "tuple[Finding, ...]", "Tensor"]


def run(tool, *arguments, cwd=ROOT, **env):
    """A command of this environment; where it is not installed the test is skipped."""
    path = shutil.which(tool, path=Path(sys.executable).parent)
    if path is None:
        pytest.skip(f"needs {tool}: pip install '.[dev]'")
    command = [path, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


@in_repository
def test_the_workflows_are_safe():
    done = run("zizmor", "--offline", "--no-progress", "--persona", "auditor", ".github")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "schema, files",
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("custom.github-workflows-require-timeout", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
@in_repository
def test_the_files_that_a_site_reads_are_as_it_wants_them(schema, files):
    found = sorted(ROOT.glob(files))
    assert found
    done = run("check-jsonschema", "--builtin-schema", schema, *found)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_changelog_and_the_citation_name_the_version():
    yaml = pytest.importorskip("yaml")
    released = re.search(r"^## \[(.+?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released.groups() == (sib_ext.__version__, citation["date-released"])
    assert citation["version"] == sib_ext.__version__


@in_repository
def test_the_hooks_before_a_commit_run_the_ruff_of_the_constraints():
    pinned = re.search(r"^ruff==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    assert f"[{pinned}]" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_a_type_checker_sees_the_types_of_the_public_face(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    done = run("mypy", "--follow-imports=silent", "user.py", cwd=tmp_path, MYPYPATH=str(ROOT))
    seen = re.findall('Revealed type is "(.+)"', done.stdout)
    assert [re.sub(r"[\w.]+\.(?=\w)", "", kind) for kind in seen] == SEEN, done.stdout
    assert re.findall("error: (.+?) for", done.stdout) == ['Unexpected keyword argument "windw"'], done.stdout
