from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithms import AGGREGATIONS, policy_loss, policy_stats
from tests.algorithms import oracle
from tests.algorithms.strategies import (
    PRECISIONS,
    aggregate,
    any_batches,
    assert_close,
    batches,
    dirty,
    quick,
)

NAN, INF = math.nan, math.inf


def one(*values):
    return torch.tensor([values], dtype=torch.float64)


@quick
@given(batches(3), st.sampled_from([None, 1.5, 3.0]), st.sampled_from([*PRECISIONS]))
def test_loss_matches_oracle(batch, dual_clip, dtype):
    mask, *arrays = batch
    expected = oracle.policy_loss(*arrays, 0.2, 0.28, dual_clip)
    got = policy_loss(*(dirty(x, mask, dtype) for x in arrays), 0.2, 0.28, dual_clip)
    assert_close(got[torch.tensor(mask)], expected[mask], dtype)


@quick
@given(any_batches(), st.sampled_from(AGGREGATIONS), st.sampled_from([*PRECISIONS]))
def test_aggregate_matches_oracle(batch, kind, dtype):
    mask, per_token = batch
    expected = oracle.aggregate(per_token, mask, kind)
    total, count = aggregate(dirty(per_token, mask, dtype), torch.tensor(mask), kind)
    assert count.item() == expected[1] and count.dtype == torch.int64
    # The sum has the precision of the losses, and these may cancel.
    assert_close(total, expected[0], dtype, size=np.abs(np.where(mask, per_token, 0)).sum())


def test_loss_and_gradient_by_hand():
    """Ratios 2 and 1/2 with either sign of A; d loss / d log pi = -rho A unless clipped."""
    ln2 = math.log(2)
    logprobs = one(ln2, ln2, -ln2, -ln2, 0.0).requires_grad_()
    advantages = one(1.0, -1.0, 1.0, -1.0, 3.0)
    loss = policy_loss(logprobs, torch.zeros_like(logprobs), advantages, 0.2, 0.3)
    np.testing.assert_allclose(loss.detach(), one(-1.3, 2.0, -0.5, 0.8, -3.0), rtol=1e-12)
    loss.sum().backward()
    np.testing.assert_allclose(logprobs.grad, one(0.0, 2.0, -0.5, 0.0, -3.0), rtol=1e-12)


def test_dual_clip_bounds_negative_advantages_only():
    logprobs = one(math.log(10), math.log(10), math.log(2)).requires_grad_()
    advantages = one(-1.0, 1.0, -1.0)
    loss = policy_loss(logprobs, torch.zeros_like(logprobs), advantages, 0.2, 0.2, dual_clip=3.0)
    np.testing.assert_allclose(loss.detach(), one(3.0, -1.2, 2.0), rtol=1e-12)
    loss.sum().backward()
    np.testing.assert_allclose(logprobs.grad, one(0.0, 0.0, 2.0), rtol=1e-12)


def test_on_policy_gradient_is_that_of_reinforce():
    """At rho = 1 the gradient is -A grad log pi, whatever the clip range."""
    logprobs = one(-0.1, -7.0, -2.0).requires_grad_()
    advantages = one(0.5, -2.0, 0.0)
    policy_loss(logprobs, logprobs.detach().clone(), advantages, 0.2, 0.2).sum().backward()
    np.testing.assert_allclose(logprobs.grad, -advantages, rtol=1e-12)


@pytest.mark.parametrize("gap", [1e3, -1e3, 1e30])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_extreme_ratios_stay_finite(gap, advantage):
    logprobs = torch.tensor([[gap]], requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2, 0.2)
    loss.sum().backward()
    assert loss.isfinite().all() and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages"])
@pytest.mark.parametrize("undefined", [NAN, INF, -INF])
def test_masked_out_values_leak_nowhere(kind, name, undefined):
    mask = torch.tensor([[True, False], [True, True]])
    inputs = {
        "logprobs": torch.tensor([[-1.0, -2.0], [-1.5, -0.5]]),
        "old_logprobs": torch.tensor([[-1.1, -2.0], [-1.5, -0.6]]),
        "advantages": torch.tensor([[1.0, -1.0], [-2.0, 0.5]]),
    }
    results = []
    for value in (inputs[name][0, 1].item(), undefined):
        inputs[name][0, 1] = value
        logprobs = inputs["logprobs"].clone().requires_grad_()
        old, advantages = inputs["old_logprobs"], inputs["advantages"]
        loss = policy_loss(logprobs, old, advantages, 0.2, 0.2, dual_clip=3.0)
        total, count = aggregate(loss, mask, kind)
        total.backward()
        stats = policy_stats(logprobs, old, advantages, mask=mask, clip_low=0.2, clip_high=0.2)
        results.append((total.detach(), count, logprobs.grad, *stats))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


def test_the_result_of_the_nonlinear_function_alone_would_leak():
    """This is why ``finite_gradient`` exists: selecting the loss leaves 0 * NaN in the gradient."""
    logprobs = torch.tensor([[-1.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    torch.where(mask, logprobs.exp(), 0.0).sum().backward()
    assert logprobs.grad[0, 1].isnan()


def test_a_live_nan_stays_visible():
    loss = policy_loss(one(NAN, 0.0), one(0.0, 0.0), one(1.0, 1.0), 0.2, 0.2)
    total, _ = aggregate(loss, torch.ones(1, 2, dtype=torch.bool), "token_mean")
    assert total.isnan()


def test_advantages_and_old_logprobs_are_constants():
    tensors = [torch.zeros(1, 1, requires_grad=True) for _ in range(3)]
    policy_loss(*tensors, 0.2, 0.2).sum().backward()
    assert tensors[0].grad is not None and tensors[1].grad is None and tensors[2].grad is None


def test_aggregate_by_hand():
    """Rows of 3, 1 and 0 tokens: token mean 13/4, sequence mean (2 + 7)/2."""
    per_token = one(1.0, 2.0, 3.0).expand(3, 3).clone()
    per_token[1, 0] = 7.0
    mask = torch.tensor([[True] * 3, [True, False, False], [False] * 3])
    assert [x.item() for x in aggregate(per_token, mask, "token_mean")] == [13.0, 4]
    assert [x.item() for x in aggregate(per_token, mask, "sequence_mean")] == [9.0, 2]


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_aggregate_of_nothing(kind):
    per_token = torch.full((2, 3), NAN, requires_grad=True)
    total, count = aggregate(per_token, torch.zeros(2, 3, dtype=torch.bool), kind)
    total.backward()
    assert total == 0 and count == 0 and not per_token.grad.any()


@quick
@given(batches(1), st.sampled_from(AGGREGATIONS), st.integers(0, 4))
def test_aggregate_does_not_depend_on_the_split(batch, kind, cut):
    """Megatron-LM#4590, verl#5867: sums and counts of micro-batches add up to the whole."""
    mask, per_token = (torch.tensor(x) for x in batch)
    parts = [aggregate(per_token[s], mask[s], kind) for s in (slice(cut), slice(cut, None))]
    whole = aggregate(per_token, mask, kind)
    for i in range(2):
        torch.testing.assert_close(parts[0][i] + parts[1][i], whole[i], rtol=1e-12, atol=1e-12)


def test_half_precision_is_summed_in_fp32():
    """4096 times 1 + 2^-7 in bf16: a bf16 sum would stall."""
    same, advantages = torch.zeros(2, 1, 4096, dtype=torch.bfloat16)
    advantages -= 1 + 2.0**-7
    per_token = policy_loss(same, same, advantages, 0.2, 0.2)
    total, _ = aggregate(per_token, torch.ones(1, 4096, dtype=torch.bool), "token_mean")
    assert total.dtype == torch.float32 and total.item() == 4096 + 32


def test_stats_by_hand():
    """Five live tokens: clipped above, not (A < 0), clipped below, not (A > 0), A = 0."""
    ln2 = math.log(2)
    logprobs = one(ln2, ln2, -ln2, -ln2, ln2, 9.0)
    advantages = one(1.0, -1.0, -1.0, 1.0, 0.0, 1.0)
    mask = torch.tensor([[True] * 5 + [False]])
    stats = policy_stats(
        logprobs, torch.zeros_like(logprobs), advantages, mask=mask, clip_low=0.2, clip_high=0.2
    )
    assert (stats.tokens.item(), stats.clipped.item()) == (5, 2)
    assert stats.ratio_max.item() == pytest.approx(2.0)
    assert stats.approx_kl.item() == pytest.approx(3 * (2 - 1 - ln2) + 2 * (0.5 - 1 + ln2))


@quick
@given(batches(3))
def test_clipped_tokens_are_those_without_gradient(batch):
    mask, *arrays = (torch.tensor(x) for x in batch)
    logprobs, old, advantages = arrays
    logprobs.requires_grad_()
    total, _ = aggregate(policy_loss(logprobs, old, advantages, 0.2, 0.2), mask, "token_mean")
    total.backward()
    frozen = (logprobs.grad == 0) & mask & (advantages != 0)
    stats = policy_stats(logprobs, old, advantages, mask=mask, clip_low=0.2, clip_high=0.2)
    assert stats.clipped == frozen.sum() and stats.tokens == mask.sum()


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_stats_of_nothing(shape):
    rubbish = torch.full(shape, NAN)
    mask = torch.zeros(shape, dtype=torch.bool)
    assert [
        x.item()
        for x in policy_stats(rubbish, rubbish, rubbish, mask=mask, clip_low=0.2, clip_high=0.2)
    ] == [0] * 4


@pytest.mark.parametrize(
    ("clips", "name"),
    [
        ((-0.1, 0.2), "clip_low"),
        ((1.1, 0.2), "clip_low"),
        ((0.2, -0.1), "clip_high"),
        ((0.2, 0.2, 1.0), "dual_clip"),
    ],
)
def test_bad_clip_bounds(clips, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        policy_loss(one(0.0), one(0.0), one(0.0), *clips)


def test_unknown_aggregation():
    with pytest.raises(ValueError, match="'mean'.*token_mean, sequence_mean"):
        aggregate(one(0.0), torch.ones(1, 1, dtype=torch.bool), "mean")
