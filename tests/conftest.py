import pytest
import torch

from sib_ext.ops import dispatch

try:
    import hypothesis
except ImportError:  # tests/gpu do without it
    pass
else:
    hypothesis.settings.register_profile("sib_ext", deadline=None, derandomize=True, database=None, max_examples=60)
    hypothesis.settings.load_profile("sib_ext")


def pytest_report_header(config) -> str:
    native, triton = dispatch.native_problem("cpu"), dispatch.triton_problem("cpu")
    return (
        f"sib_ext native CPU kernels: {'loaded' if native is None else 'NOT TESTED, ' + native}\n"
        f"sib_ext Triton kernels: {'interpreted' if triton is None else 'NOT TESTED, ' + triton}"
    )


# Minutes in Triton's interpreter. They rest on the values and first derivatives that other tests compare, and on the
# second derivative, which every implementation takes from the reference.
SLOW_INTERPRETED = (
    "test_it_is_differentiable_once_and_twice",
    "test_it_is_differentiable_in_any_of_its_arguments_with_any_grams",
    "test_the_backward_op_is_differentiable_by_itself",
)


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.originalname in SLOW_INTERPRETED and "triton" in item.callspec.params.values():
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def need_native() -> None:
    if problem := dispatch.native_problem("cpu"):
        pytest.skip(problem)


def need_triton() -> None:
    if problem := dispatch.triton_problem("cpu"):
        pytest.skip(problem)


@pytest.fixture(params=["reference", "native", "triton"])
def implementation(request) -> str:
    {"native": need_native, "triton": need_triton}.get(request.param, lambda: None)()
    return request.param


@pytest.fixture(params=["default", "reference", "triton"])
def overload_name(request) -> str:
    """Each registered overload of an op."""
    if request.param == "triton":
        need_triton()
    return request.param


@pytest.fixture(scope="session")
def native() -> str:
    """For comparisons of the native kernels with the reference."""
    need_native()
    return "native"


@pytest.fixture(scope="session")
def triton() -> str:
    """For comparisons of the Triton kernels with the reference."""
    need_triton()
    return "triton"


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
