"""Means, intervals and paired differences, with values computed by hand."""

from __future__ import annotations

import math

import pytest
from reproduction.statistics import (
    MOST_VALUES,
    T_QUANTILES,
    Estimate,
    estimate,
    paired_difference,
)


def t_density(x: float, freedom: int) -> float:
    """Student's density."""
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    log -= math.log(freedom * math.pi) / 2
    return math.exp(log) * (1 + x * x / freedom) ** (-(freedom + 1) / 2)


@pytest.mark.parametrize("freedom", range(1, MOST_VALUES))
def test_the_quantiles_are_those_of_students_distribution(freedom):
    """The density between 0 and the quantile, by Simpson's rule, is 47.5% (the table has four decimals)."""
    end, parts = T_QUANTILES[freedom - 1], 4000
    width = end / parts
    inner = sum((4 if i % 2 else 2) * t_density(i * width, freedom) for i in range(1, parts))
    share = (t_density(0, freedom) + inner + t_density(end, freedom)) * width / 3
    assert share == pytest.approx(0.475, abs=3e-6)


def test_an_interval_of_three_values():
    # s = 1, so the margin is t(2) / sqrt(3) = 4.3027 / 1.7320508.
    assert estimate([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.484166, abs=1e-5))


def test_one_value_has_no_interval_and_shows_no_difference():
    assert estimate([5.0]) == (5.0, None)
    assert not estimate([5.0]).leaves_out_zero


def test_differences_are_paired_by_seed():
    # Differences 1, 1 and 4 of seeds 1 to 3: mean 2, s = sqrt(3), margin 4.3027. Seed 4 has no partner.
    found = paired_difference({3: 7.0, 1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0, 3: 3.0, 4: 99.0})
    assert found == (2.0, pytest.approx(4.3027, abs=1e-4))
    assert not found.leaves_out_zero


def test_equal_differences_leave_out_zero():
    # The seeds differ by more than the algorithms, which paired differences do not see.
    found = paired_difference({1: 1.5, 2: 10.5, 3: 100.5}, {1: 1.0, 2: 10.0, 3: 100.0})
    assert found == (0.5, 0.0) and found.leaves_out_zero


def test_without_common_seeds_there_is_no_difference():
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


def test_an_interval_that_ends_at_zero_does_not_leave_it_out():
    assert not Estimate(1.0, 1.0).leaves_out_zero
    assert Estimate(-1.0, 0.9).leaves_out_zero
