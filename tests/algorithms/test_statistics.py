from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithms import Moments, global_whiten, moments
from tests.algorithms import oracle
from tests.algorithms.strategies import PRECISIONS, any_batches, assert_close, dirty, quick

CONSTANTS = [0.0, 1.0, 0.9, -0.7, 1e6 + 0.1]


@quick
@given(any_batches(), st.sampled_from([*PRECISIONS]))
def test_matches_oracle(batch, dtype):
    mask, values = batch
    whitened, stats = global_whiten(dirty(values, mask, dtype), torch.tensor(mask))
    # The mean is rounded, so errors are relative to a standard deviation.
    assert_close(whitened, oracle.whiten(values, mask), dtype, size=1.0)
    count, mean, var = oracle.moments(values, mask)
    assert stats.count == count
    assert stats.mean == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert stats.var == pytest.approx(var, rel=1e-12, abs=1e-30)


def test_by_hand():
    """Values 1, 2, 3, 4: mean 2.5, population variance 1.25."""
    values = torch.tensor([[1.0, math.nan, 2.0], [3.0, 4.0, math.inf]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    whitened, stats = global_whiten(values, mask)
    assert stats == Moments(4, 2.5, 1.25)
    root = math.sqrt(1.25)
    expected = [[-1.5 / root, 0.0, -0.5 / root], [0.5 / root, 1.5 / root, 0.0]]
    np.testing.assert_allclose(whitened, expected, rtol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", CONSTANTS)
def test_constants_give_zeros_exactly(constant, dtype):
    values = torch.full((7, 13), constant, dtype=dtype)
    mask = torch.arange(91).view(7, 13) % 3 != 0
    whitened, stats = global_whiten(values, mask)
    assert not whitened.any()
    assert stats == Moments(60, values[0, 0].double().item(), 0.0)


def test_small_spread_around_five():
    values = torch.tensor([[5 - 1e-3, 5 + 1e-3] * 8], dtype=torch.float64)
    whitened, stats = global_whiten(values, torch.ones(1, 16, dtype=torch.bool))
    assert stats.var == pytest.approx(1e-6, rel=1e-9)
    np.testing.assert_allclose(whitened.abs(), 1.0, rtol=1e-9)


def test_large_offset_keeps_the_variance():
    """E[x^2] - E[x]^2 of these in fp32 is 0 or negative; the true variance is 0.25."""
    values = 1e6 + torch.arange(64.0).view(4, 16) % 2
    whitened, stats = global_whiten(values, torch.ones(4, 16, dtype=torch.bool))
    assert stats == Moments(64, 1e6 + 0.5, 0.25)
    assert set(whitened.flatten().tolist()) == {-1.0, 1.0}


def test_variance_floor():
    """A spread of 1e-6 has variance 1e-12, floored to 1e-8, so the result is x / 1e-4."""
    values = torch.tensor([[-1e-6, 1e-6]], dtype=torch.float64)
    whitened, _ = global_whiten(values, torch.ones(1, 2, dtype=torch.bool))
    np.testing.assert_allclose(whitened, [[-0.01, 0.01]], rtol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_selected(shape):
    whitened, stats = global_whiten(
        torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool)
    )
    assert stats == Moments(0, 0, 0)
    assert whitened.shape == shape and not whitened.any()


def test_one_value():
    whitened, stats = global_whiten(torch.tensor([[0.3, 7.0]]), torch.tensor([[False, True]]))
    assert whitened.tolist() == [[0.0, 0.0]] and stats == Moments(1, 7.0, 0.0)


def test_no_gradient_flows_into_advantages():
    values = torch.tensor([[1.0, 2.0]], requires_grad=True)
    whitened, _ = global_whiten(values, torch.ones(1, 2, dtype=torch.bool))
    assert not whitened.requires_grad


@quick
@given(any_batches(), any_batches())
def test_merge_is_the_union(left, right):
    parts = [values[mask] for mask, values in (left, right)]
    both = [Moments(*oracle.moments(p, np.ones_like(p, dtype=bool))) for p in parts]
    union = np.concatenate(parts)
    expected = oracle.moments(union, np.ones_like(union, dtype=bool))
    merged = both[0].merge(both[1])
    assert (merged.count, merged.mean) == pytest.approx(expected[:2], rel=1e-12, abs=1e-12)
    # The rounding of a mean, against that of the other, squared; global_whiten avoids it.
    size = max((abs(part.mean) for part in both), default=0.0)
    assert merged.var == pytest.approx(expected[2], rel=1e-12, abs=1e-15 * size * size)


def test_merge_with_nothing_is_exact():
    some, nothing = Moments(3, 0.9, 0.1), Moments(0, 0, 0)
    assert some.merge(nothing) == some == nothing.merge(some)
    assert nothing.merge(nothing) == nothing


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_live_nan_is_an_error(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        moments(torch.tensor([[1.0, bad]]), torch.ones(1, 2, dtype=torch.bool))


def test_mask_must_be_bool_and_of_the_same_shape():
    with pytest.raises(AssertionError):
        moments(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(AssertionError):
        moments(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))
