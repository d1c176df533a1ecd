import hypothesis
import pytest
import torch

from sib_ext.ops import dispatch

hypothesis.settings.register_profile("sib_ext", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("sib_ext")


def pytest_report_header(config) -> str:
    problem = dispatch.native_problem("cpu")
    return f"sib_ext native CPU kernels: {'loaded' if problem is None else 'NOT TESTED, ' + problem}"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def need_native() -> None:
    if problem := dispatch.native_problem("cpu"):
        pytest.skip(problem)


@pytest.fixture(params=["reference", "native"])
def implementation(request) -> str:
    if request.param == "native":
        need_native()
    return request.param


@pytest.fixture(scope="session")
def native() -> str:
    """For comparisons of the native kernels with the reference."""
    need_native()
    return "native"


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
