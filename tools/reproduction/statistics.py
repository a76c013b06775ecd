"""Means over seeds with 95% intervals, and differences paired by seed.

The interval of n values is ``mean ± t * s / sqrt(n)``, with the standard deviation s (n - 1 in its
denominator) and the 97.5% quantile t of Student's distribution with n - 1 degrees of freedom. Two
algorithms differ if the interval of their differences, paired by seed, leaves out 0. Left out: any
correction for the number of comparisons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip
"""97.5% quantiles of Student's t distribution with 1, 2, ... degrees of freedom."""
MOST_VALUES = len(T_QUANTILES) + 1


class Estimate(NamedTuple):
    """A mean over seeds."""

    mean: float
    margin: float | None
    """Half the width of the 95% interval; None with one value."""

    @property
    def leaves_out_zero(self) -> bool:
        """Whether the interval is known and leaves out 0."""
        return self.margin is not None and abs(self.mean) > self.margin


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of 1 to MOST_VALUES values."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None)
    quantile = T_QUANTILES[len(values) - 2]
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)))


def paired_difference(values: dict[int, float], others: dict[int, float]) -> Estimate | None:
    """Mean and interval of ``values - others`` over the seeds that both have; None if there is none."""
    seeds = sorted(values.keys() & others.keys())
    return estimate([values[seed] - others[seed] for seed in seeds]) if seeds else None
