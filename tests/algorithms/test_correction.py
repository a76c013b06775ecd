from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithms import (
    CORRECTIONS,
    correction_weights,
    effective_share,
    importance_ratio,
)
from tests.algorithms import oracle
from tests.algorithms.strategies import PRECISIONS, assert_close, batches, quick


@quick
@given(
    batches(2), st.sampled_from(CORRECTIONS), st.sampled_from([1.0, 2.0, 5.0]),
    st.sampled_from([*PRECISIONS]),
)  # fmt: skip
def test_matches_oracle(batch, kind, maximum, dtype):
    _, old, rollout = batch
    ratio = importance_ratio(*(torch.tensor(x, dtype=dtype) for x in (old, rollout)))
    weights = correction_weights(ratio, kind, maximum)
    # Close to a bound, rounding decides whether a token is dropped.
    log_ratio = np.abs(np.abs(old - rollout) - math.log(maximum))
    clear = (log_ratio > 1e-5) | (old == rollout)
    expected = oracle.rollout_weights(old, rollout, kind, maximum)
    assert_close(weights[torch.tensor(clear)], expected[clear], dtype)


def test_by_hand():
    """The trainer gives the tokens 1, 3, 1/3 and 1.5 times the probability that the engine did."""
    rollout = torch.full((1, 4), -2.0, dtype=torch.float64)
    ratio = torch.tensor([[1.0, 3.0, 1 / 3, 1.5]], dtype=torch.float64)
    got = importance_ratio(rollout + ratio.log(), rollout)
    torch.testing.assert_close(got, ratio)
    cap, mask = ([[1.0, 2.0, 1 / 3, 1.5]], [[1.0, 0.0, 0.0, 1.5]])
    np.testing.assert_allclose(correction_weights(got, "cap", 2.0), cap)
    np.testing.assert_allclose(correction_weights(got, "mask", 2.0), mask)


def test_weights_are_constants_and_finite():
    old = torch.tensor([[1e30, -1e30]], requires_grad=True)
    ratio = importance_ratio(old, torch.zeros(1, 2))
    assert not ratio.requires_grad and ratio.isfinite().all()
    assert correction_weights(ratio, "cap", 2.0)[0, 0] == 2


@quick
@given(batches(1))
def test_effective_share_is_that_of_kish(batch):
    weights = np.exp(batch[1])
    share = effective_share(weights.sum(), (weights**2).sum(), weights.size)
    assert share == pytest.approx(weights.mean() ** 2 / np.mean(weights**2), rel=1e-12)


def test_effective_share_by_hand():
    """1 if all weights are equal, 1/4 if one of four samples has all the weight, 0 for no samples."""
    assert effective_share(8.0, 16.0, 4) == 1.0
    assert effective_share(5.0, 25.0, 4) == 0.25
    assert effective_share(0.0, 0.0, 0) == 0.0


def test_invalid_arguments_are_errors():
    with pytest.raises(ValueError, match="'truncate'.*cap, mask"):
        correction_weights(torch.ones(1), "truncate", 2.0)
    with pytest.raises(ValueError, match="rollout weight is 0.5"):
        correction_weights(torch.ones(1), "cap", 0.5)
