from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithms import returns_to_go, token_rewards
from tests.algorithms import oracle
from tests.algorithms.strategies import (
    PRECISIONS,
    any_batches,
    assert_close,
    batches,
    dirty,
    quick,
    scores_for,
)

ROW = torch.tensor([[True, True, False, False, True, True, False]])
NAN = math.nan


@quick
@given(st.data(), batches(1), st.sampled_from([0.0, 0.01, 0.5]), st.sampled_from([*PRECISIONS]))
def test_rewards_match_oracle(data, batch, kl_coef, dtype):
    mask, kl = batch
    scores = data.draw(scores_for(mask))
    expected = oracle.token_rewards(scores, kl, mask, kl_coef)
    got = token_rewards(
        torch.tensor(scores, dtype=dtype), dirty(kl, mask, dtype), torch.tensor(mask), kl_coef
    )
    # Score and penalty are 3 and more, and their difference may be small.
    assert_close(got, expected, dtype, size=max(3.0, np.abs(scores).max()))


@quick
@given(any_batches(), st.sampled_from([0.0, 0.3, 0.99, 1.0]), st.sampled_from([*PRECISIONS]))
def test_returns_match_oracle(batch, gamma, dtype):
    mask, rewards = batch
    expected = oracle.returns_to_go(rewards, mask, gamma)
    got = returns_to_go(dirty(rewards, mask, dtype), torch.tensor(mask), gamma)
    # Both precisions are summed in fp64, and rewards of opposite sign may cancel.
    size = np.abs(rewards).max() if dtype == torch.float64 else 1e-6
    assert_close(got, expected, dtype, size)


def test_by_hand_with_a_hole():
    """G passes through tool output, whose KL does not count (verl#7278, slime#1370)."""
    kl = torch.tensor([[1.0, 2.0, 99.0, 99.0, 3.0, 4.0, 99.0]])
    rewards = token_rewards(torch.tensor([10.0]), kl, ROW, 0.5)
    assert rewards.tolist() == [[-0.5, -1.0, 0, 0, -1.5, 8.0, 0]]
    assert returns_to_go(rewards, ROW, 1.0).tolist() == [[5.0, 5.5, 0, 0, 6.5, 8.0, 0]]
    assert returns_to_go(rewards, ROW, 0.5).tolist() == [[-0.375, 0.25, 0, 0, 2.5, 8.0, 0]]


def test_rubbish_under_the_mask_is_gone():
    kl = torch.tensor([[0.0, 0.0, NAN, math.inf, 0.0, 0.0, NAN]])
    rewards = token_rewards(torch.tensor([1.0]), kl, ROW, 0.1)
    assert rewards.tolist() == [[0, 0, 0, 0, 0, 1.0, 0]]
    dirty = torch.where(ROW, rewards, NAN)
    assert returns_to_go(dirty, ROW, 1.0).tolist() == [[1.0, 1.0, 0, 0, 1.0, 1.0, 0]]


def test_rows_without_tokens_and_with_one():
    mask = torch.tensor([[False, False], [True, False], [False, True]])
    scores = torch.tensor([NAN, 2.0, 3.0])
    rewards = token_rewards(scores, torch.zeros(3, 2), mask, 0.1)
    assert rewards.tolist() == [[0, 0], [2.0, 0], [0, 3.0]]
    assert returns_to_go(rewards, mask, 0.9).tolist() == [[0, 0], [2.0, 0], [0, 3.0]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    rewards = token_rewards(torch.ones(shape[0]), torch.zeros(shape), mask, 0.1)
    assert returns_to_go(rewards, mask, 1.0).shape == shape


def test_long_rows_neither_overflow_nor_drift():
    """At T = 4096 gamma^-T overflows, and fp32 sums are off by several roundings."""
    ones = torch.ones(1, 4096, dtype=torch.bool)
    rewards = torch.linspace(0.1, 0.3, 4096)[None] ** 2
    returns = returns_to_go(rewards, ones, 1.0)[0].tolist()
    for t in (0, 1, 1000, 4095):
        exact = math.fsum(rewards[0, t:].tolist())
        assert returns[t] == torch.tensor(exact, dtype=torch.float32).item()
    assert returns_to_go(rewards * 0 + 1, ones, 0.5)[0, 0].item() == 2.0


def test_no_kl_is_needed_without_a_coefficient():
    rewards = token_rewards(torch.tensor([1.0]), None, ROW, 0.0)
    assert rewards.sum() == 1
    with pytest.raises(ValueError, match="kl_coef is 0.1"):
        token_rewards(torch.tensor([1.0]), None, ROW, 0.1)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, NAN])
def test_gamma_out_of_range(gamma):
    with pytest.raises(ValueError, match="gamma"):
        returns_to_go(torch.zeros(1, 7), ROW, gamma)


def test_scores_of_the_wrong_shape_do_not_broadcast():
    with pytest.raises(AssertionError):
        token_rewards(torch.zeros(1, 1), None, ROW, 0.0)
