"""What an autograd graph holds."""

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from ..graph import graph_nodes


def custom_functions(outputs: list[Tensor]) -> list[type[Function]]:
    """Classes of the torch.autograd.Functions, other than torch's and ours, in the outputs' graph."""
    found: dict[type[Function], None] = {}
    for node in graph_nodes([z.grad_fn for z in outputs]):
        function = getattr(node, "_forward_cls", None)
        if function is not None and function.__module__.split(".")[0] not in ("torch", __name__.split(".")[0]):
            found[function] = None
    return list(found)


def is_once_differentiable(function: type[Function]) -> bool:
    marked = once_differentiable(lambda ctx: None)
    return getattr(function.backward, "__code__", None) is marked.__code__
