"""The build rule, and what is shipped."""

import os
import re
import site
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def python(*arguments, cwd=ROOT, **env):
    env = {**os.environ, **env}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("sdist")
    done = python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), ".")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.tar.gz"))


def install(sdist, folder, **env):
    """Installs the sdist into a folder and gives a function that runs Python there."""
    pip = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(folder), str(sdist))
    done = python(*pip, cwd=folder, **env)
    assert done.returncode == 0, done.stderr
    # Without site (-S) there is no editable install of this tree, which would lend its native modules.
    path = os.pathsep.join([str(folder), *site.getsitepackages()])
    return lambda *arguments: python("-S", *arguments, cwd=folder, PYTHONPATH=path, PYTHONSAFEPATH="1").stdout


def test_the_sdist_ships_every_native_source_and_both_packages(sdist):
    with tarfile.open(sdist) as archive:
        shipped = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    folders = ("csrc", "sib_ext", "python", "tests", "benchmarks", "docs")
    sources = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    wanted = {
        str(p.relative_to(ROOT))
        for p in sources
        if p.suffix in (".cpp", ".cu", ".cuh", ".h", ".py", ".typed", ".j2", ".md", ".sh")
    }
    assert not wanted - shipped
    assert {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "CITATION.cff"} <= shipped
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= shipped
    assert not [name for name in shipped if name.endswith((".so", "_build.json"))]


def test_an_install_without_native_code_runs_the_reference_and_says_why(sdist, tmp_path):
    run = install(sdist, tmp_path, SIB_EXT_NO_NATIVE="1")
    assert run("-m", "sib_ext.info").count("switched off by SIB_EXT_NO_NATIVE=1") == 2
    code = "import torch, sib_ext; print(sib_ext.__file__, sib_ext.density_mask(torch.rand(1, 3, 8, 8)).shape)"
    assert run("-c", code).strip() == f"{tmp_path / 'sib_ext/__init__.py'} torch.Size([1, 1, 8, 8])"


@pytest.mark.slow
def test_an_install_from_the_sdist_builds_the_native_module(sdist, tmp_path):
    run = install(sdist, tmp_path)
    assert run("-c", "import sib_ext._C; print(sib_ext._C.build_info()['device'])").strip() == "cpu"


@pytest.mark.parametrize("variable", ["SIB_EXT_CUDA", "SIB_EXT_NO_NATIVE"])
def test_a_build_option_with_a_value_that_is_not_one_stops_with_the_choices(variable):
    done = python("setup.py", "--version", **{variable: "perhaps"})
    assert done.returncode != 0 and f"{variable}='perhaps' is not one of" in done.stderr


def test_an_old_setuptools_stops_with_the_one_that_is_needed():
    old = "import setuptools; setuptools.__version__ = '75.8.0'; __file__ = 'setup.py'; exec(open(__file__).read())"
    done = python("-c", old)
    needed = re.search(r"setuptools>=(\d+)", (ROOT / "pyproject.toml").read_text())[1]
    assert done.stderr.startswith("sib_ext: setuptools 75.8.0 is too old") and f"setuptools>={needed}'" in done.stderr


def test_asking_for_cuda_without_the_means_stops_with_the_reason(tmp_path):
    code = (
        "import runpy, torch; torch.version.cuda = None; import sys; sys.argv = ['setup.py', '--version'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = python("-c", code, SIB_EXT_CUDA="1")
    assert done.returncode != 0 and "SIB_EXT_CUDA=1 asks for the CUDA kernels, but" in done.stderr


def test_the_build_says_what_it_builds_and_why_not_the_rest():
    done = python("setup.py", "--version", SIB_EXT_CUDA="0")
    assert "building sib_ext._C" in done.stderr
    assert "not building sib_ext._C_cuda: switched off by SIB_EXT_CUDA=0" in done.stderr
