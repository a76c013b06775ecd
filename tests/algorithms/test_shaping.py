from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithms import Moments, shape_scores
from megatron_rpp.algorithms.shaping import ShapingStats
from tests.algorithms import oracle
from tests.algorithms.strategies import PRECISIONS, assert_close, numbers, quick


@quick
@given(
    st.integers(1, 12).flatmap(numbers),
    st.booleans(),
    st.sampled_from([1.0, 0.5, 3.0]),
    st.sampled_from([None, 0.7, 1.5]),
    st.sampled_from([*PRECISIONS]),
)
def test_matches_oracle(scores, normalize, scale, clip, dtype):
    shaped, stats = shape_scores(
        torch.tensor(scores, dtype=dtype), normalize=normalize, scale=scale, clip=clip
    )
    expected, unclipped = oracle.shape(scores, normalize, scale, clip)
    assert_close(shaped, expected, dtype, size=scale)
    everything = np.ones(scores.shape, dtype=bool)
    assert stats.raw.mean == pytest.approx(oracle.moments(scores, everything)[1], rel=1e-12)
    ours = shaped.double().numpy()
    count, mean, var = oracle.moments(ours, everything)
    assert stats.shaped.count == count
    np.testing.assert_allclose(stats.shaped.mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(stats.shaped.var, var, rtol=1e-12, atol=1e-30)
    assert (stats.low, stats.high) == (ours.min(), ours.max())
    # Rounding puts a score that lies on the bound on either side of it.
    bound = math.inf if clip is None else clip
    beyond, at_least = (np.mean(np.abs(unclipped) > bound * (1 + s)) for s in (1e-5, -1e-5))
    assert beyond - 1e-12 <= stats.clipped_share <= at_least + 1e-12


def test_normalised_then_scaled_then_clipped():
    """0, 0, 0, 4: mean 1, variance 3; normalised -1/sqrt3 x3, sqrt3; times 2; within 1.5."""
    scores = torch.tensor([0.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    shaped, stats = shape_scores(scores, normalize=True, scale=2.0, clip=1.5)
    assert stats.raw == Moments(4, 1.0, 3.0)
    np.testing.assert_allclose(shaped, [-2 / math.sqrt(3)] * 3 + [1.5], rtol=1e-12)
    assert (stats.high, stats.clipped_share) == (1.5, 0.25)
    assert stats.low == pytest.approx(-2 / math.sqrt(3))
    scaled, stats = shape_scores(scores, normalize=False, scale=0.5, clip=None)
    assert scaled.tolist() == [0, 0, 0, 2.0]
    assert stats == ShapingStats(Moments(4, 1.0, 3.0), Moments(4, 0.5, 0.75), 0.0, 2.0, 0.0)


def test_clipping_is_counted_where_it_changes_something():
    """1.0 lies on the bound, and 1.5 and -3 beyond it."""
    _, stats = shape_scores(
        torch.tensor([1.0, 1.5, -3.0, 0.0]), normalize=False, scale=1.0, clip=1.0
    )
    assert stats.clipped_share == 0.5 and (stats.low, stats.high) == (-1.0, 1.0)


def test_no_scores():
    shaped, stats = shape_scores(torch.zeros(0), normalize=True, scale=2.0, clip=1.0)
    assert shaped.shape == (0,)
    assert stats == ShapingStats(Moments(0, 0, 0), Moments(0, 0, 0), 0.0, 0.0, 0.0)


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_bad_clip(clip):
    with pytest.raises(ValueError, match="reward clip"):
        shape_scores(torch.zeros(2), normalize=False, scale=1.0, clip=clip)


def test_a_score_that_is_not_finite():
    with pytest.raises(ValueError, match="NaN or infinite"):
        shape_scores(torch.tensor([0.0, math.nan]), normalize=False, scale=1.0, clip=1.0)
