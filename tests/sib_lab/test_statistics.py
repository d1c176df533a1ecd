import math

import numpy as np
import pytest
import torch
from scipy import stats
from sib_lab.explaining.statistics import (
    estimate,
    over_seeds,
    paired_difference,
    paired_difference_of_shares,
    share,
)


def test_the_interval_over_images_is_the_normal_one():
    value = estimate(torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]))
    assert value.mean == pytest.approx(0.6) and value.count == 5 and value.undefined == 0
    assert value.half_width == pytest.approx(1.959964 * math.sqrt(0.3 / 5), rel=1e-6)


def test_undefined_values_are_counted_and_never_averaged_in():
    for summary in (estimate, over_seeds):
        value = summary(torch.tensor([1.0, math.nan, 3.0, math.nan]))
        assert (value.mean, value.count, value.undefined) == (2.0, 2, 2)
        assert value.half_width == summary([1.0, 3.0]).half_width


def test_a_mean_of_nothing_is_undefined():
    for summary in (estimate, over_seeds):
        for values, undefined in (([math.nan], 1), ([], 0)):
            value = summary(values)
            assert math.isnan(value.mean) and math.isnan(value.half_width)
            assert (value.count, value.undefined) == (0, undefined)


def test_one_value_has_no_interval():
    for value in (estimate([0.5]), over_seeds([0.5, math.nan]), paired_difference([0.25], [0.75])):
        assert value.mean == 0.5 and math.isnan(value.half_width) and value.count == 1


def test_the_interval_over_three_seeds_uses_students_t_from_the_table():
    value = over_seeds([1.0, 2.0, 3.0])
    assert value.mean == 2 and value.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_the_interval_over_seeds_is_scipys():
    values = [0.31, 0.42, 0.38, 0.35]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    value = over_seeds(values)
    assert (value.mean - value.half_width, value.mean + value.half_width) == pytest.approx((low, high))


def test_pairing_sees_a_difference_that_the_seeds_hide():
    a = [0.10, 0.50, 0.90]
    b = [0.15, 0.56, 0.94]
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(0.05) and difference.clear
    assert over_seeds(a).half_width > 0.05
    assert not paired_difference(a, [0.15, 0.40, 0.99]).clear


def test_a_paired_difference_is_clear_exactly_where_scipys_paired_t_test_is_below_5_percent():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        a = torch.randn(4, generator=generator, dtype=torch.float64)
        b = a + 0.3 + 0.3 * torch.randn(4, generator=generator, dtype=torch.float64)
        clear = paired_difference(a, b).clear
        assert clear == (stats.ttest_rel(b.numpy(), a.numpy()).pvalue < 0.05)
        seen.add(clear)
    assert seen == {True, False}


@pytest.mark.parametrize("hits, images", [(4, 4), (0, 4), (3, 4), (57, 100), (1, 1)])
def test_the_interval_of_a_share_is_scipys_of_wilson(hits, images):
    value = share([1.0] * hits + [0.0] * (images - hits) + [math.nan])
    expected = stats.binomtest(hits, images).proportion_ci(method="wilson")
    assert (value.low, value.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (value.mean, value.count, value.undefined) == (hits / images, images, 1)


def test_all_of_four_images_right_is_not_certainty():
    value = share([1.0, 1.0, 1.0, 1.0])
    assert value.mean == value.high == 1 and value.low == pytest.approx(0.510, abs=1e-3)


def test_the_interval_of_a_share_never_leaves_0_1_and_holds_the_mean():
    rng = np.random.default_rng(0)
    for _ in range(200):
        value = share(rng.random(rng.integers(1, 9)).round(int(rng.integers(0, 3))))
        assert 0 <= value.low <= value.mean <= value.high <= 1


def test_two_gained_images_are_no_clear_difference_and_twelve_are():
    assert not paired_difference_of_shares([0.0, 0.0], [1.0, 1.0]).clear
    assert paired_difference_of_shares([0.0] * 12, [1.0] * 12).clear
    assert paired_difference_of_shares([1.0] * 12, [0.0] * 12).high < 0
    same = paired_difference_of_shares([1.0, 0.0] * 20, [1.0, 0.0] * 20)
    assert same.mean == 0 and same.low < 0 < same.high and not same.clear


def test_the_interval_of_paired_shares_is_agresti_and_mins():
    a, b = [1.0] * 10 + [0.0] * 30, [1.0] * 8 + [0.0] * 2 + [1.0] * 9 + [0.0] * 21
    both, gained, lost, none = 8.5, 9.5, 2.5, 21.5  # half an image in each of the four cells
    images = both + gained + lost + none
    wald = math.sqrt(gained + lost - (gained - lost) ** 2 / images) / images
    value = paired_difference_of_shares(a, b)
    assert value.mean == pytest.approx(7 / 40)
    assert value.low == pytest.approx((gained - lost) / images - 1.959964 * wald, abs=1e-6)
    assert value.high == pytest.approx((gained - lost) / images + 1.959964 * wald, abs=1e-6)


def test_nine_in_ten_intervals_of_paired_shares_and_more_hold_the_truth():
    rng = np.random.default_rng(1)
    held = []
    for _ in range(400):
        a, b = rng.random((2, 20)) < np.array([[0.6], [0.8]])
        value = paired_difference_of_shares(a.astype(float), b.astype(float))
        held.append(value.low <= 0.2 <= value.high)
    assert 0.92 < sum(held) / len(held) < 0.99


def test_the_sign_of_a_difference_is_second_minus_first():
    assert paired_difference([1.0, 1.0], [3.0, 4.0]).mean == 2.5


def test_a_pair_with_an_undefined_half_is_left_out():
    difference = paired_difference([1.0, math.nan, 3.0, 4.0], [2.0, 2.0, math.nan, 6.0])
    assert (difference.mean, difference.count, difference.undefined) == (1.5, 2, 2)


def test_no_difference_at_all_is_not_clear_and_one_pair_never_is():
    assert not paired_difference([1.0, 2.0], [1.0, 2.0]).clear
    assert paired_difference([1.0, 2.0], [1.5, 2.5]).clear
    assert not paired_difference([1.0], [9.0]).clear


def test_values_of_unlike_lengths_or_shapes_are_refused():
    with pytest.raises(ValueError, match="3 and 2 values"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"shape \[2, 2\]"):
        estimate(torch.ones(2, 2))
