import math

import pytest
import torch
from scipy import stats
from sib_lab.explaining.statistics import estimate, over_seeds, paired_difference


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
