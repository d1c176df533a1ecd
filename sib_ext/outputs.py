"""The logits in what a model returns: a tensor, or one inside a tuple, a list, a mapping or a dataclass."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


def logits_of(output, chosen: Callable | None = None) -> Tensor:
    """The tensor of logits in a model's ``output``.

    A tensor is taken as it is, of a tuple or list the first tensor, of a mapping or any other object what it holds
    under ``logits``; or what ``chosen``, a function of the output, returns.

    Raises:
        ValueError: there is none.
    """
    if chosen is not None:
        found, place = chosen(output), "output=... returned"
    elif isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
        found, place = next((part for part in output if isinstance(part, Tensor)), None), "its first tensor is"
    elif isinstance(output, Mapping):
        found, place = output.get("logits"), "its 'logits' are"
    elif isinstance(output, Tensor):
        return output
    else:
        found, place = getattr(output, "logits", None), "its .logits are"
    if isinstance(found, Tensor):
        return found
    if chosen is None and found is None:
        place = "with no logits in it"
    else:
        place = f"and {place} {type(found).__name__}"
    raise ValueError(
        f"the model returned {type(output).__name__} {place}: give output=..., a function that takes the output "
        "and returns the logits [B,K]"
    )


def tensors_of(value) -> Iterator[Tensor]:
    """Every tensor in a nested structure of tuples, lists, mappings and dataclasses, in its order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_of(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_of([getattr(value, field.name) for field in dataclasses.fields(value)])
