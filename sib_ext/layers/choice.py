"""Which of the feature maps on the way to the logits."""

from collections.abc import Sequence
from dataclasses import dataclass

from .layout import Layout
from .record import Map


@dataclass
class Candidate:
    name: str
    map: Map
    neck: bool  #: all of x goes through it on its way to the logits
    reaches: bool  #: the logits depend on several of its positions
    counts: bool  #: the logits depend on something in it

    @property
    def only_prefix(self) -> bool:
        """Of these tokens, a head looks at the class token alone."""
        return self.counts and not self.reaches and self.map.layout.prefix > 0


def chosen(candidates: Sequence[Candidate]) -> str | None:
    """The last bottleneck, or the last map after it that is deeper still, or that stands in front of a class token."""
    candidates = [c for c in candidates if not (c.map.projected and c.map.layout.channels_last)]
    neck = _last_neck(candidates)
    if neck is None:
        later, deeper = candidates, [c for c in candidates if c.reaches]
    else:
        later = candidates[neck + 1 :]
        deeper = [c for c in later if c.reaches and _no_branch(c.map, candidates[neck].map)]
    if any(c.only_prefix for c in later):
        deeper = [c for c in deeper if c.map.normalised] or (deeper if neck is None else [])
    elif neck is not None:
        # What has as many positions is a part of a layer, such as queries, keys and gates; heads of several scales and
        # of two streams go on at a lower resolution.
        deeper = [c for c in deeper if c.map.layout.positions < candidates[neck].map.layout.positions]
    if deeper:
        return deeper[-1].name
    return None if neck is None else candidates[neck].name


def _last_neck(candidates: Sequence[Candidate]) -> int | None:
    """The last bottleneck that has several positions and is no upsampled one and no set of queries.

    Planes without the proportions of the images may be what they seem, or windows or heads of attention, which do not
    count against the maps that follow them.
    """
    last, fewest = None, None
    for number, candidate in enumerate(candidates):
        layout = candidate.map.layout
        if not candidate.neck or (last is not None and not _continues(layout, candidates[last].map.layout)):
            continue
        if not layout.proportional:
            if last is not None and not _no_branch(candidate.map, candidates[last].map):
                continue
        elif layout.dims == 4:
            if fewest is not None and layout.positions > fewest:
                continue
            fewest = layout.positions
        if candidate.reaches:
            last = number
    return last


def _no_branch(later: Map, earlier: Map) -> bool:
    """Of no fewer channels and no more positions, other than attention matrices, single heads and decoders."""
    no_larger = later.channels >= earlier.channels and later.layout.positions <= earlier.layout.positions
    return no_larger and _continues(later.layout, earlier.layout)


def _continues(later: Layout, earlier: Layout) -> bool:
    """Whether tokens may stand for the same image: as many, or merged, and not queries or latents of a number of their
    own, which a grid fits by chance.
    """
    if later.dims == 4 or later.positions >= earlier.positions:
        return True
    sides = ((earlier.height, later.height), (earlier.width, later.width))
    if earlier.dims == 4:
        return all(a % b == 0 for a, b in sides)
    return earlier.prefix == later.prefix and all(b in (a // 2, -(-a // 2)) for a, b in sides)
