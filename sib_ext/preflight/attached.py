"""Deep copies of a model with all that is attached to it: hooks, patched methods and what they hold.

``copy.deepcopy`` refuses results of an earlier forward, and shares functions: a hook that fills a list of features
would fill the user's list from the copy, too, and a patched ``forward`` would run the original.
"""

import copy
import copyreg
import dis
import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# One for both is fine: they have no contents, or none that a check changes.
SHARED = (ModuleType, type(threading.Lock()), type(threading.RLock()))
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def copied(model: nn.Module) -> nn.Module:
    """
    Raises:
        ValueError: something in it cannot be copied, or a hook or method holds such a thing.
    """
    memo: dict = {}
    with _CopiesOfResults(), _sharing():
        try:
            twin = copy.deepcopy(model, memo)
        except Exception as error:
            raise ValueError(
                f"model cannot be copied for the check: {_culprit(model)}{_said(error)}; take that away for the check, "
                "or check the model before it is wrapped or sharded"
            ) from error
        for name, module in twin.named_modules():
            _own_functions(name, module, memo)
    return twin


class _CopiesOfResults(TorchFunctionMode):
    """Results of an operation are copied as constants."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = result = tensor.detach().clone()
            return result
        return function(*args, **(kwargs or {}))


@contextmanager
def _sharing() -> Iterator[None]:
    """Inside, deepcopy leaves SHARED objects as they are, which it would refuse."""
    table = copyreg.dispatch_table
    kinds = [kind for kind in SHARED if kind not in table]
    try:
        for kind in kinds:
            table[kind] = lambda value: "shared"  # a string stands for the object itself
        yield
    finally:
        for kind in kinds:
            del table[kind]


def _own_functions(name: str, module: nn.Module, memo: dict) -> None:
    """The module's hooks, and its attributes that are functions or weak references, become the copy's own."""
    for holder in (vars(module), *(vars(module)[kind] for kind in HOOKS)):
        for key, value in holder.items():
            try:
                holder[key] = _own(value, memo)
            except Exception as error:
                what = getattr(value, "__qualname__", repr(value))
                raise ValueError(
                    f"model cannot be copied for the check: the function {what}, attached to "
                    f"{_place(name)}, holds what cannot be copied{_said(error)}; detach it for the check"
                ) from error


def _own(value, memo: dict):
    """``value`` with copies of what it holds, if it is a function or a weak reference; else as it is."""
    if isinstance(value, FunctionType):
        return memo[id(value)] if id(value) in memo else _own_function(value, memo)
    if isinstance(value, MethodType):  # whose object has been copied
        function = _own(value.__func__, memo)
        return value if function is value.__func__ else MethodType(function, value.__self__)
    if type(value) is functools.partial:
        arguments = [_own(a, memo) for a in value.args]
        return functools.partial(_own(value.func, memo), *arguments, **value.keywords)
    if type(value) is weakref.ref and id(value()) in memo:
        return weakref.ref(memo[id(value())])
    return value


def _own_function(function: FunctionType, memo: dict) -> FunctionType:
    names = [name for name in _globals_of(function.__code__) if name in function.__globals__]
    own = {name: _copied_global(function.__globals__[name], memo) for name in names}
    own = {name: value for name, value in own.items() if value is not function.__globals__[name]}
    defaults = copy.deepcopy(function.__defaults__, memo)
    if not own and not function.__closure__ and defaults is function.__defaults__ and not function.__kwdefaults__:
        return function
    cells = tuple(memo.setdefault(id(cell), CellType()) for cell in function.__closure__ or ())
    result = FunctionType(
        function.__code__, {**function.__globals__, **own}, function.__name__, defaults, cells or None
    )
    result.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    result.__dict__.update(function.__dict__)
    result.__qualname__ = function.__qualname__
    memo[id(function)] = result  # before the cells, which may hold the function itself
    for cell, original in zip(cells, function.__closure__ or (), strict=True):
        if _is_empty(cell) and not _is_empty(original):
            cell.cell_contents = _own(copy.deepcopy(original.cell_contents, memo), memo)
    return result


def _copied_global(value, memo: dict):
    """What cannot be copied stays shared: a library's loggers and registries, not the hook's own."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value


def _is_empty(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _globals_of(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _culprit(model: nn.Module) -> str:
    """The first attribute that resists."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            try:
                copy.deepcopy(value, {id(m): m for m in model.modules()})
            except Exception:
                return f"{key!r} of {_place(name)}, {type(value).__name__}"
    return "its own __deepcopy__ fails"


def _place(name: str) -> str:
    return f"module {name!r}" if name else "the model"


def _said(error: Exception) -> str:
    return f" ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
