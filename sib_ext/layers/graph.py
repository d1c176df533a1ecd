"""The autograd graph between x and the logits."""

from torch.autograd.graph import Node


def bottlenecks(top: Node, bottom: Node) -> dict[Node, set[int]]:
    """Nodes that every path from ``top`` to ``bottom`` goes through -> which of their outputs the paths use."""
    order = _topological(top, bottom)
    place = {node: i for i, node in enumerate(order)}
    used: dict[Node, set[int]] = {node: set() for node in order}
    found, furthest = {}, 0
    for i, node in enumerate(order):
        if furthest <= i:  # no edge jumps over it
            found[node] = used[node]
        for following, output in node.next_functions:
            if following in place:
                used[following].add(output)
                furthest = max(furthest, place[following])
    return found


def _topological(top: Node, bottom: Node) -> list[Node]:
    """The nodes on the paths, each before those that follow it."""
    reaches: dict[Node, bool] = {bottom: True}
    finished = [bottom]
    stack = [(top, iter(top.next_functions))]
    while stack:
        node, edges = stack[-1]
        following = next((n for n, _ in edges if n is not None and n not in reaches), None)
        if following is not None:
            stack.append((following, iter(following.next_functions)))
            continue
        stack.pop()
        if node not in reaches:
            reaches[node] = any(reaches[n] for n, _ in node.next_functions if n is not None)
            finished.append(node)
    return [node for node in reversed(finished) if reaches[node]]
