from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from megatron_rpp.algorithms import ALGORITHMS, Moments, group_baseline, shape_scores
from megatron_rpp.algorithms.advantages import GROUP_KINDS, advantages
from tests.algorithms import oracle
from tests.algorithms.strategies import batches, quick, scores_for


def ids_for(scores):
    return npst.arrays(np.int64, scores.shape, elements=st.integers(0, 3))


def scores_strategy():
    return st.integers(1, 12).flatmap(
        lambda n: npst.arrays(np.float64, n, elements=st.floats(-3, 3, width=16))
    )


@quick
@given(st.data(), scores_strategy(), st.sampled_from(GROUP_KINDS))
def test_baseline_matches_oracle(data, scores, kind):
    ids = data.draw(ids_for(scores))
    expected = oracle.group_baseline(scores, ids, kind)
    exact = group_baseline(torch.tensor(scores), torch.tensor(ids), kind)
    # The oracle's own mean is off by 1e-16, which grpo divides by 1e-6 in a constant group.
    slack = 1e-9 if kind == "grpo" else 1e-12
    np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=slack)
    single = group_baseline(torch.tensor(scores).float(), torch.tensor(ids), kind)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, rtol=1e-6, atol=1e-9)


def test_baseline_by_hand():
    """Groups interleaved and of sizes 3, 1, 2: scores (1, 4, 4), (5), (0, 2)."""
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


def test_scores_are_normalised_then_scaled_then_clipped():
    """0, 0, 0, 4: mean 1, variance 3; normalised -1/sqrt3 x3, sqrt3; times 2; within 1.5."""
    scores = torch.tensor([0.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    shaped, stats = shape_scores(scores, normalize=True, scale=2.0, clip=1.5)
    assert stats == Moments(4, 1.0, 3.0)
    np.testing.assert_allclose(shaped, [-2 / math.sqrt(3)] * 3 + [1.5], rtol=1e-12)
    scaled, stats = shape_scores(scores, normalize=False, scale=0.5, clip=None)
    assert scaled.tolist() == [0, 0, 0, 2.0] and stats == Moments(4, 1.0, 3.0)


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_bad_clip(clip):
    with pytest.raises(ValueError, match="reward clip"):
        shape_scores(torch.zeros(2), normalize=False, scale=1.0, clip=clip)


def expected_advantages(name, scores, kl, mask, ids, kl_coef, gamma):
    if name == "reinforce++":
        rewards = oracle.token_rewards(scores, kl, mask, kl_coef)
        returns = oracle.returns_to_go(rewards, mask, gamma)
    else:
        kind = {"reinforce++_baseline": "mean"}.get(name, name)
        returns = np.where(mask, oracle.group_baseline(scores, ids, kind)[:, None], 0.0)
    whitened = name.startswith("reinforce++")
    return (oracle.whiten(returns, mask) if whitened else returns), returns


@quick
@given(st.data(), batches(1), st.sampled_from(ALGORITHMS), st.sampled_from([0.9, 1.0]))
def test_advantages_match_oracle(data, batch, name, gamma):
    mask, kl = batch
    scores = data.draw(scores_for(mask))
    ids = data.draw(ids_for(scores))
    expected, expected_returns = expected_advantages(name, scores, kl, mask, ids, 0.1, gamma)
    tensors = [torch.tensor(x) for x in (scores, kl, mask, ids)]
    got, returns, stats = advantages(name, *tensors, 0.1, gamma)
    count, mean, var = oracle.moments(expected_returns, mask)
    assert stats.count == count
    np.testing.assert_allclose([stats.mean, stats.var], [mean, var], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(returns, expected_returns, rtol=1e-12, atol=1e-9)
    # Rounding of 1e-16 over a standard deviation of at least 1e-4 (the variance floor).
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)
    assert not got[~tensors[2]].any() and not returns[~tensors[2]].any()


def test_reinforce_by_hand():
    """No KL: the score is the return of every token, so a long answer weighs by its tokens."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    scores = torch.tensor([1.0, -3.0])
    got, returns, stats = advantages(
        "reinforce++", scores, None, mask, torch.tensor([0, 1]), 0.0, 1.0
    )
    assert returns.tolist() == [[1, 1, 1], [-3, 0, 0]]
    assert stats == Moments(4, 0.0, 3.0)
    root = math.sqrt(3)
    np.testing.assert_allclose(got, [[1 / root] * 3, [-root, 0, 0]], rtol=1e-6)


def test_baseline_ignores_the_kl():
    mask = torch.tensor([[True, True], [True, True]])
    kl = torch.tensor([[9.0, math.nan], [5.0, 7.0]])
    scores, ids = torch.tensor([1.0, 0.0]), torch.tensor([4, 4])
    got, returns, _ = advantages("reinforce++_baseline", scores, kl, mask, ids, 0.5, 1.0)
    assert returns.tolist() == [[0.5, 0.5], [-0.5, -0.5]]
    assert got.tolist() == [[1, 1], [-1, -1]]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_saturated_rewards_give_zero_advantages(name):
    """Every answer right: nothing to learn, and no NaN."""
    mask = torch.arange(24).view(4, 6) % 5 != 0
    ids = torch.tensor([0, 0, 1, 1])
    got, _, stats = advantages(name, torch.full((4,), 0.9), None, mask, ids, 0.0, 1.0)
    assert not got.any() and stats.var == 0


def test_unknown_algorithm():
    with pytest.raises(ValueError, match="'ppo'.*reinforce\\+\\+, reinforce\\+\\+_baseline, grpo"):
        advantages("ppo", torch.zeros(1), None, torch.ones(1, 1, dtype=torch.bool),
                   torch.zeros(1, dtype=torch.long), 0.0, 1.0)
