"""Walks through autograd's graph."""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor
from torch.autograd.graph import Node


def graph_nodes(roots: Sequence[Node | None], until: Collection[Node | None] = ()) -> Iterator[Node]:
    """Each once, without ``until`` and what is behind; nor what is behind compiled code or a reentrant checkpoint."""
    seen, waiting = set(until), list(roots)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def graph_leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that require grad and that the tensors were computed from."""
    nodes = graph_nodes([tensor.grad_fn for tensor in tensors])
    return [node.variable for node in nodes if hasattr(node, "variable")]


def has_reentrant_checkpoint(tensor: Tensor) -> bool:
    """On the way to the tensor."""
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_nodes([tensor.grad_fn]))
