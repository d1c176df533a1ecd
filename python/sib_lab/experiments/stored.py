"""What is measured on a run, as it is stored: each part with what it depends on; nothing old is taken for new."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..data import QUALITIES
from ..explaining import methods as explain
from ..reporting.page import MAPS
from ..reporting.results import MEASURED
from ..training.runs import Run, write_text, write_whole
from .material import Material
from .plan import Plan

DEFINITIONS = 4  #: counted up when a measure's definition changes, so that stored values are made anew


class Stored:
    """The parts that are stored of one run's measurements."""

    def __init__(self, plan: Plan, material: Material, run: Run):
        self.folder = run.folder / MEASURED
        weights = hashlib.sha256()
        for tensor in run.model.state_dict().values():
            weights.update(tensor.contiguous().numpy())
        self.of_network = {"definitions": DEFINITIONS, "weights": weights.hexdigest()}
        self.of_images = {"rows": len(material.rows), "images": plan.images, "layer": plan.layer}
        self.explained = material.test_name
        identity = material.data.identity()
        self.digests = {name: _digest(identity[f"test/{name}"]) for name in material.data.test}

    def key(self, name: str) -> dict:
        """What a part depends on."""
        of_images = self.of_images if name in explain.METHODS or name == MAPS else {}
        quality, _, test = name.partition("-")
        test = test if quality in QUALITIES else name
        return self.of_network | of_images | {"data": self.digests[test if test in self.digests else self.explained]}

    def values(self, name: str) -> dict[str, list]:
        """What is stored under a name; empty where nothing is, or where it is of another network or other images."""
        try:
            stored = json.loads((self.folder / f"{name}.json").read_text())
            return dict(stored["values"]) if stored["key"] == self.key(name) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # missing or damaged: measured anew

    def write(self, name: str, values: dict[str, list], **more) -> None:
        content = {"key": self.key(name), "values": {key: plain(of_key) for key, of_key in values.items()}} | more
        write_text(self.folder / f"{name}.json", json.dumps(content, allow_nan=False))

    def fits(self, name: str) -> bool:
        """Whether arrays are stored that belong to this network and these images."""
        try:
            with np.load(self.folder / name, allow_pickle=False) as stored:
                return json.loads(str(stored["key"])) == self.key(name)
        except Exception:  # numpy fails in many ways on a damaged file: measured anew
            return False

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        keyed: dict[str, Any] = arrays | {"key": json.dumps(self.key(name))}
        write_whole(self.folder / name, lambda file: np.savez_compressed(file, **keyed))


def is_current(path: Path, plan: Plan) -> bool:
    """Whether a file holds values by today's definitions and ``plan``; of which network and data, it does not say."""
    now = {"definitions": DEFINITIONS, "images": plan.images, "layer": plan.layer}
    try:
        key = json.loads(path.read_text())["key"]
        return "definitions" in key and all(key[name] == now[name] for name in now.keys() & key.keys())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(identity: Any) -> str:
    """Of what :meth:`sib_lab.data.base.DataSets.identity` says of a split."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def plain(values: list) -> list:
    """None for what JSON cannot hold; six digits are enough for a value of one image."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
