"""What a data set is, in a few bytes, and what changed of it."""

from collections.abc import Mapping
from typing import Any


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What is another between two identities (``DataSets.identity``), as a part of a sentence; None: nothing."""
    splits = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    return f"other images or labels in {', '.join(sorted(splits))}" if splits else None
