import math

import pytest
import torch
from sib_lab.measure import energy_pointing_game, estimate, object_share


def masks_of(*rows):
    return torch.tensor(rows, dtype=torch.float32)[:, None]


def test_epg_is_the_share_of_the_map_on_the_object():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 5.0]]])
    masks = masks_of([[0, 1], [0, 1]], [[1, 1], [1, 0]])
    assert energy_pointing_game(maps, masks).tolist() == [pytest.approx(0.6), 0.0]


def test_a_soft_mask_counts_where_it_is_above_one_half():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert energy_pointing_game(maps, masks_of([[0.5, 0.51], [0.49, 0]])).item() == pytest.approx(0.2)


def test_epg_is_1_on_a_full_mask_and_undefined_for_an_empty_one_or_a_zero_map():
    maps = torch.stack([torch.ones(3, 3), torch.ones(3, 3), torch.zeros(3, 3)])
    masks = torch.stack([torch.ones(1, 3, 3), torch.zeros(1, 3, 3), torch.ones(1, 3, 3)])
    full, empty, zero = energy_pointing_game(maps, masks).tolist()
    assert full == 1 and math.isnan(empty) and math.isnan(zero)


def test_epg_of_an_image_does_not_depend_on_the_others_in_the_batch():
    maps, masks = torch.rand(7, 5, 5), torch.rand(7, 1, 5, 5)
    alone = torch.cat([energy_pointing_game(m[None], k[None]) for m, k in zip(maps, masks, strict=True)])
    assert torch.equal(energy_pointing_game(maps, masks), alone)


def test_epg_of_a_flat_map_is_the_objects_share_of_the_image():
    masks = torch.rand(4, 1, 6, 6)
    torch.testing.assert_close(energy_pointing_game(torch.ones(4, 6, 6), masks), object_share(masks))


def test_epg_does_not_change_with_the_scale_of_a_map():
    maps, masks = torch.rand(3, 5, 5), torch.rand(3, 1, 5, 5)
    torch.testing.assert_close(energy_pointing_game(maps * 1e-30, masks), energy_pointing_game(maps, masks))


def test_undefined_values_are_counted_and_never_averaged_in():
    value = estimate(torch.tensor([1.0, math.nan, 3.0, math.nan]))
    assert (value.mean, value.undefined) == (2.0, 2)
    assert value.half_width == pytest.approx(1.96 * math.sqrt(2) / math.sqrt(2))


def test_a_mean_of_nothing_is_undefined():
    value = estimate(torch.tensor([math.nan]))
    assert math.isnan(value.mean) and math.isnan(value.half_width) and value.undefined == 1
