from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from megatron_rpp.algorithms import ALGORITHMS, Moments, group_baseline
from megatron_rpp.algorithms.advantages import GROUP_KINDS, compute_advantages
from tests.algorithms import oracle
from tests.algorithms.strategies import (
    PRECISIONS,
    assert_close,
    batches,
    dirty,
    numbers,
    quick,
    scores_for,
)


def ids_for(scores):
    return npst.arrays(np.int64, scores.shape, elements=st.integers(0, 3))


scores_strategy = st.integers(1, 12).flatmap(numbers)


@quick
@given(st.data(), scores_strategy, st.sampled_from(GROUP_KINDS), st.sampled_from([*PRECISIONS]))
def test_baseline_matches_oracle(data, scores, kind, dtype):
    ids = data.draw(ids_for(scores))
    got = group_baseline(torch.tensor(scores, dtype=dtype), torch.tensor(ids), kind)
    # Deviations are of the size of the spread, or of 1 if they are divided by it.
    size = 1.0 if kind == "grpo" else np.ptp(scores)
    assert_close(got, oracle.group_baseline(scores, ids, kind), dtype, size)


def test_baseline_by_hand():
    """Interleaved groups of sizes 3, 1 and 2 with scores (1, 4, 4), (5) and (0, 2)."""
    scores = torch.tensor([1.0, 5.0, 0.0, 4.0, 2.0, 4.0], dtype=torch.float64)
    ids = torch.tensor([7, 3, 9, 7, 9, 7])
    assert group_baseline(scores, ids, "mean").tolist() == [-2, 0, -1, 1, 1, 1]
    np.testing.assert_allclose(
        group_baseline(scores, ids, "rloo"), [-3, 5, -2, 1.5, 2, 1.5], rtol=1e-12
    )
    three, two = math.sqrt(3) + 1e-6, math.sqrt(2) + 1e-6
    np.testing.assert_allclose(
        group_baseline(scores, ids, "grpo"),
        [-2 / three, 5 / (1 + 1e-6), -1 / two, 1 / three, 1 / two, 1 / three],
        rtol=1e-12,
    )


def test_grpo_uses_the_sample_deviation_of_torch():
    scores = torch.tensor([0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    expected = (scores - scores.mean()) / (scores.std() + 1e-6)
    got = group_baseline(scores, torch.zeros(4, dtype=torch.long), "grpo")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", GROUP_KINDS)
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.9, -0.7, 1e6 + 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_groups_give_zeros_exactly(constant, kind, dtype):
    scores = torch.full((15,), constant, dtype=dtype)
    assert not group_baseline(scores, torch.arange(15) % 5, kind).any()


def test_unknown_baseline():
    with pytest.raises(ValueError, match="'median'.*mean, grpo, rloo"):
        group_baseline(torch.zeros(1), torch.zeros(1, dtype=torch.long), "median")


def test_no_samples():
    assert group_baseline(torch.zeros(0), torch.zeros(0, dtype=torch.long), "mean").shape == (0,)


WHITENED = ("reinforce++", "ppo", "reinforce++_baseline")


def expected_advantages(name, scores, kl, mask, *, ids, values, gamma):
    """(advantages, the same before the normalisation, returns); lambda is gamma."""
    rewards = oracle.token_rewards(scores, kl, mask, 0.1)
    if name == "ppo":
        raw, returns = oracle.gae(rewards, values, mask, gamma, gamma)
    elif name == "reinforce++":
        raw = returns = oracle.returns_to_go(rewards, mask, gamma)
    else:
        kind = {"reinforce++_baseline": "mean"}.get(name, name)
        raw = returns = np.where(mask, oracle.group_baseline(scores, ids, kind)[:, None], 0.0)
    return (oracle.whiten(raw, mask) if name in WHITENED else raw), raw, returns


@quick
@given(st.data(), batches(2), st.sampled_from(ALGORITHMS), st.sampled_from([0.9, 1.0]))
def test_advantages_match_oracle(data, batch, name, gamma):
    mask, kl, values = batch
    scores = data.draw(scores_for(mask))
    ids = data.draw(ids_for(scores))
    expected, raw, expected_returns = expected_advantages(
        name, scores, kl, mask, ids=ids, values=values, gamma=gamma
    )
    live = torch.tensor(mask)
    got, returns, stats = compute_advantages(
        name, torch.tensor(scores), live, group_ids=torch.tensor(ids),
        kl=dirty(kl, mask, torch.float64), kl_coef=0.1, gamma=gamma,
        values=dirty(values, mask, torch.float64), gae_lambda=gamma,
    )  # fmt: skip
    # The size of the returns' terms; normalisation divides them by a deviation of at least 1e-4.
    size = 1.0 if name == "grpo" else 3.0 + np.abs(scores).max()
    assert_close(returns, expected_returns, torch.float64, size)
    count, mean, var = oracle.moments(raw, mask)
    assert stats.count == count
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-12, atol=1e-12 * size)
    np.testing.assert_allclose(stats.var, var, rtol=1e-12, atol=1e-12 * size * max(size, 1))
    scale = math.sqrt(max(var, 1e-8)) if name in WHITENED else 1.0
    assert_close(got, expected, torch.float64, size=max(size / scale, 1.0))
    assert not got[~live].any() and not returns[~live].any()


def test_reinforce_by_hand():
    """Without KL the score is every token's return, so each token of a long answer counts."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    scores = torch.tensor([1.0, -3.0])
    got, returns, stats = compute_advantages(
        "reinforce++", scores, mask, group_ids=torch.tensor([0, 1])
    )
    assert returns.tolist() == [[1, 1, 1], [-3, 0, 0]]
    assert stats == Moments(4, 0.0, 3.0)
    root = math.sqrt(3)
    np.testing.assert_allclose(got, [[1 / root] * 3, [-root, 0, 0]], rtol=1e-6)


def test_baseline_ignores_the_kl():
    mask = torch.tensor([[True, True], [True, True]])
    kl = torch.tensor([[9.0, math.nan], [5.0, 7.0]])
    scores, ids = torch.tensor([1.0, 0.0]), torch.tensor([4, 4])
    got, returns, _ = compute_advantages(
        "reinforce++_baseline", scores, mask, group_ids=ids, kl=kl, kl_coef=0.5
    )
    assert returns.tolist() == [[0.5, 0.5], [-0.5, -0.5]]
    assert got.tolist() == [[1, 1], [-1, -1]]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_saturated_rewards_give_zero_advantages(name):
    """If every answer is right, there is nothing to learn and no NaN."""
    mask = torch.arange(24).view(4, 6) % 5 != 0
    ids = torch.tensor([0, 0, 1, 1])
    got, _, stats = compute_advantages(
        name, torch.full((4,), 0.9), mask, group_ids=ids, values=torch.zeros(4, 6)
    )
    assert not got.any() and stats.var == 0


def test_unknown_algorithm():
    with pytest.raises(
        ValueError, match="'sac'.*reinforce\\+\\+, ppo, reinforce\\+\\+_baseline, grpo"
    ):
        compute_advantages(
            "sac",
            torch.zeros(1),
            torch.ones(1, 1, dtype=torch.bool),
            group_ids=torch.zeros(1, dtype=torch.long),
        )
