"""Waterbirds from a tiny sample in both layouts of its table."""

from collections import Counter

import pytest
import torch
from data_samples import WATERBIRDS as COUNTS
from data_samples import write_waterbirds
from sib_lab.data import DataError, open_data, stack


def pairs(split):
    return Counter(zip(split.labels.tolist(), split.groups.tolist(), strict=True))


@pytest.mark.parametrize("original", [False, True])
def test_splits_birds_and_backgrounds_are_those_of_the_table(tmp_path, original):
    data = open_data("waterbirds", write_waterbirds(tmp_path, original), size=32)
    assert data.classes == ("landbird", "waterbird") and data.groups == ("land", "water")
    for split, counts in zip(data.splits().values(), COUNTS.values(), strict=True):
        assert [pairs(split)[divmod(group, 2)] for group in range(4)] == list(counts)
    assert data.train.annotated.any() != original
    rows = data.train.annotated.nonzero()[:, 0]
    if not original:
        batch = stack(data.train, rows)
        torch.testing.assert_close(batch.image[:, :1] * 0.5 + 0.5, batch.mask, rtol=0, atol=1.5 / 255)


def test_a_limit_is_spread_over_the_groups(tmp_path):
    data = open_data("waterbirds", write_waterbirds(tmp_path), size=32, limit=4)
    assert all(set(pairs(split).values()) == {1} and len(split) == 4 for split in data.splits().values())


def test_the_identity_knows_the_backgrounds(tmp_path):
    entries = open_data("waterbirds", write_waterbirds(tmp_path), size=32).identity()["test/test"]
    assert entries["images/002.Bird/test_0.jpg"].endswith(" - waterbird, group 0")


def test_other_tables_are_one_sentence(tmp_path):
    def refused(sentence):
        with pytest.raises(DataError, match=sentence) as caught:
            open_data("waterbirds", tmp_path, size=32)
        assert "\n" not in str(caught.value)

    refused("metadata.csv is missing: give the folder")
    table = write_waterbirds(tmp_path) / "metadata.csv"
    text = table.read_text()
    table.write_text(text.replace("on_water", "sea"))
    refused("has the columns file, split, waterbird, sea, .* but needs file,waterbird,on_water,split or img_filename,y")
    table.write_text(text.replace("val,1", "maybe,1"))
    refused("4 of 29 images cannot be used .the first: line 15 of .* has another split")
    assert len(open_data("waterbirds", tmp_path, size=32, skip_broken=True).skipped) == 4
    table.write_text(text)
    (tmp_path / "images/001.Bird/val_0.jpg").unlink()
    refused("1 of 29 images cannot be used .the first: .*val_0.jpg is missing")
