from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithms import gae, returns_to_go
from megatron_rpp.algorithms.advantages import compute_advantages
from tests.algorithms import oracle
from tests.algorithms.strategies import PRECISIONS, assert_close, batches, dirty, quick

DISCOUNTS = st.sampled_from([0.0, 0.3, 0.95, 1.0])
ROW = torch.tensor([[True, True, False, False, True]])
NAN = math.nan


@quick
@given(batches(2), DISCOUNTS, DISCOUNTS, st.sampled_from([*PRECISIONS]))
def test_matches_oracle(batch, gamma, lam, dtype):
    mask, rewards, values = batch
    expected = oracle.gae(rewards, values, mask, gamma, lam)
    found = gae(
        dirty(rewards, mask, dtype), dirty(values, mask, dtype), torch.tensor(mask), gamma, lam
    )
    # Both precisions are summed in fp64, and terms of opposite sign may cancel.
    size = np.abs([rewards, values]).max() if dtype == torch.float64 else 1e-6
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, dtype, size)


@quick
@given(batches(1), DISCOUNTS, st.sampled_from([*PRECISIONS]))
def test_lambda_one_and_a_zero_critic_are_the_returns_of_reinforce(batch, gamma, dtype):
    """Bit for bit."""
    mask, rewards = batch
    mask, rewards = torch.tensor(mask), dirty(rewards, mask, dtype)
    advantages, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
    expected = returns_to_go(rewards, mask, gamma)
    assert torch.equal(advantages, expected) and torch.equal(returns, expected)


@quick
@given(batches(1), st.integers(0, 2**31))
def test_ppo_with_a_zero_critic_is_reinforce_plus_plus(batch, seed):
    """The same advantages after the KL penalty and the normalisation, bit for bit."""
    mask, kl = torch.tensor(batch[0]), torch.tensor(batch[1])
    scores = torch.randn(len(mask), generator=torch.Generator().manual_seed(seed)).double()
    arguments = {"group_ids": torch.zeros(len(mask)), "kl": kl, "kl_coef": 0.1, "gamma": 0.9}
    plain = compute_advantages("reinforce++", scores, mask, **arguments)
    zero = torch.zeros_like(kl)
    with_critic = compute_advantages("ppo", scores, mask, values=zero, gae_lambda=1.0, **arguments)
    assert torch.equal(plain[0], with_critic[0]) and torch.equal(plain[1], with_critic[1])
    assert plain[2] == with_critic[2]


@quick
@given(batches(2), DISCOUNTS)
def test_lambda_zero_is_the_error_of_one_step(batch, gamma):
    """The target is then r + gamma V_next, whatever comes later."""
    mask, rewards, values = batch
    _, returns = gae(*map(torch.tensor, (rewards, values, mask)), gamma, 0.0)
    for row, live, reward, value in zip(returns, mask, rewards, values):
        own = np.append(value[live], 0.0)
        np.testing.assert_allclose(row[live], reward[live] + gamma * own[1:], atol=1e-12)


def test_by_hand_with_a_gap():
    """Tool output between the second and the third token changes nothing."""
    rewards = torch.tensor([[0.0, -1.0, NAN, 99.0, 2.0]])
    values = torch.tensor([[1.0, 0.5, 99.0, NAN, 1.5]])
    advantages, returns = gae(rewards, values, ROW, 0.5, 0.5)
    # deltas: 0 + 0.25 - 1, -1 + 0.75 - 0.5, 2 - 1.5; each next one counts a quarter.
    assert advantages.tolist() == [[-0.90625, -0.625, 0, 0, 0.5]]
    assert returns.tolist() == [[0.09375, -0.125, 0, 0, 2.0]]


def test_values_are_constants():
    values = torch.zeros(1, 2, requires_grad=True)
    found = gae(torch.ones(1, 2), values, torch.ones(1, 2, dtype=torch.bool), 1.0, 1.0)
    assert not any(column.requires_grad for column in found)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches(shape):
    zeros = torch.zeros(shape)
    assert gae(zeros, zeros, zeros.bool(), 1.0, 1.0)[0].shape == shape


@pytest.mark.parametrize("discounts", [(1.5, 1.0), (1.0, -0.1)])
def test_discounts_outside_their_range_are_refused(discounts):
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="must lie in"):
        gae(zeros, zeros, zeros.bool(), *discounts)
