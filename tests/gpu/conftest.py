"""Tests that need a GPU; elsewhere they are skipped with the reason, or, with SIB_EXT_REQUIRE_GPU=1, fail with it."""

import os

import pytest
import torch

from sib_ext.ops import dispatch

REQUIRED = os.environ.get("SIB_EXT_REQUIRE_GPU") == "1"


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available() and not REQUIRED:
        for item in items:
            if "tests/gpu" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture(params=["native", "triton"])
def implementation(request) -> str:
    problem = {"native": dispatch.native_problem, "triton": dispatch.triton_problem}[request.param]("cuda")
    if problem:
        pytest.fail(problem) if REQUIRED else pytest.skip(problem)
    return request.param


@pytest.fixture(autouse=True)
def plain_float32():
    """The eager formulas in float32, not TF32: they are what the kernels are compared with."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
