"""What a data set consists of, in short hashes that can be stored beside a result and compared later."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

CHUNK = 2**20  #: bytes that are read at once
#: Of a split: name of an image -> "image annotation label", hashes of the two files and what it is; or one digest.
Split = dict[str, str] | str


def digest(parts: Iterable[str]) -> str:
    """A short hash of strings in this order."""
    found = blake2b(digest_size=8)
    for part in parts:
        found.update(part.encode(errors="surrogateescape") + b"\0")
    return found.hexdigest()


def file_digest(path: Path | str) -> str:
    """A short hash of a file's content; "missing" where there is none."""
    found = blake2b(digest_size=8)
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
    except OSError:
        return "missing"
    return found.hexdigest()


def changed(before: Mapping[str, Split], now: Mapping[str, Split]) -> str | None:
    """What is different between two identities of :meth:`sib_lab.data.base.DataSets.identity`; None: nothing.

    Returns:
        Part of a sentence, such as "3 images of the test split are new, 1 mask differs (first: that of test/cat/3.jpg)"
    """
    if before == now:
        moved = [split for split in now if list(before[split]) != list(now[split])]  # of one digest: equal letters
        return f"the images of the {_name(moved[0])} split are in another order" if moved else None
    if before.keys() != now.keys():
        return f"the splits were {_listed(before)} and are {_listed(now)}"
    whole = [split for split in now if not (isinstance(before[split], dict) and isinstance(now[split], dict))]
    found = [f"the {_name(split)} split differs" for split in whole if before[split] != now[split]]
    by_name = (_by_name({s: images for s, images in i.items() if s not in whole}) for i in (before, now))
    return ", ".join(found + _differences(*by_name)) or None


#: Name of an image -> its split, its hash, that of its annotation, and its label.
Images = dict[str, tuple[str, ...]]


def _by_name(splits: Mapping[str, Any]) -> Images:
    return {name: (split, *entry.split(" ", 2)) for split, images in splits.items() for name, entry in images.items()}


def _differences(before: Images, now: Images) -> list[str]:
    """The parts of :func:`changed`'s sentence. An image with another name and the same content has moved."""
    of_content = defaultdict(list)
    for name in sorted(before.keys() - now.keys()):
        of_content[before[name][1]].append(name)
    pairs = {name: name for name in before.keys() & now.keys()}
    for name in sorted(now.keys() - before.keys()):
        if of_content[now[name][1]]:
            pairs[name] = of_content[now[name][1]].pop()
    moved: Counter[tuple[str, str]] = Counter()
    differing: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, old in sorted(pairs.items()):
        (split, *_), (split_before, *_) = now[name], before[old]
        if split != split_before:
            moved[split_before, split] += 1
        elif name != old:
            differing["image", "has another name", "have other names"].append(name)
        for place, words in enumerate(_WORDS, start=1):
            if now[name][place] != before[old][place]:
                differing[words].append(name)
    new = Counter(now[name][0] for name in now.keys() - pairs.keys())
    gone = Counter(before[name][0] for name in before.keys() - set(pairs.values()))
    return [
        *(f"{_images(n)} of the {_name(split)} split {'is' if n == 1 else 'are'} new" for split, n in new.items()),
        *(f"{_images(n)} of the {_name(split)} split {'is' if n == 1 else 'are'} gone" for split, n in gone.items()),
        *(f"{_images(n)} moved from {_name(a)} to {_name(b)}" for (a, b), n in moved.items()),
        *(
            f"{len(names)} {what}{'' if len(names) == 1 else 's'} {one if len(names) == 1 else more} "
            f"(first: {'' if what == 'image' else 'that of '}{names[0]})"
            for (what, one, more), names in differing.items()
        ),
    ]


_WORDS = (("image", "differs", "differ"), ("mask", "differs", "differ"), ("label", "differs", "differ"))


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def _listed(identity: Iterable[str]) -> str:
    return ", ".join(map(_name, identity))


def _name(split: str) -> str:
    """A split for people: "training", "test", "test (flipped)"."""
    kind, _, name = split.partition("/")
    kind = "training" if kind == "train" else kind
    return kind if name in ("", kind) else f"{kind} ({name})"
