"""The gallery of photographs for the documents, on made-up maps."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sib_lab.explaining.methods import METHODS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 32, 32))
    masks[:, 8:24, 8:24] = 1
    masks[2] = 0
    images = rng.uniform(-1, 1, (3, 3, 32, 32))
    np.savez(tmp_path / "images.npz", images=images, masks=masks, annotated=np.array([True, True, False]))
    (tmp_path / "comparison.json").write_text(json.dumps({"seeds": [4, 5]}))
    for method in ("ce", "sib"):
        measured = tmp_path / "runs" / f"{method}-seed4" / "measured"
        measured.mkdir(parents=True)
        np.savez(measured / "gallery.npz", **{name: rng.random((3, 32, 32)) for name in METHODS})
    return tmp_path


@pytest.mark.parametrize("words", [[], ["--outlines"], ["--images", "1", "--explanations", "gradcam"]])
def test_the_gallery_has_a_column_an_image_whose_object_is_known(folder, words, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import photo_gallery

    out = folder / "picture.png"
    monkeypatch.setattr(sys, "argv", ["photo_gallery.py", str(folder), "--out", str(out), *words])
    photo_gallery.main()
    width, height = Image.open(out).size
    columns, rows = (1, 3) if "--images" in words else (2, 4 if words else 5)
    assert len(photo_gallery.columns_of(folder, ["ce"], 8)) == 2
    assert width / height == pytest.approx((1.25 * columns + 1.6) / (1.25 * rows), rel=0.25)
