from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given

from megatron_rpp.algorithms import KL_KINDS, aggregate, kl_estimate
from tests.algorithms import oracle
from tests.algorithms.strategies import batches, quick


@quick
@given(batches(2))
def test_matches_oracle(batch):
    _, logprobs, ref = batch
    for kind in KL_KINDS:
        expected = oracle.kl(logprobs, ref, kind)
        exact = kl_estimate(torch.tensor(logprobs), torch.tensor(ref), kind)
        np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=1e-12)
        single = kl_estimate(torch.tensor(logprobs).float(), torch.tensor(ref).float(), kind)
        assert single.dtype == torch.float32
        # Inputs up to 3 nats, exp(6): one rounding of their difference, magnified by k3's slope.
        np.testing.assert_allclose(single, expected, rtol=1e-6, atol=1e-6)


def test_by_hand():
    policy, reference = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    ln2 = math.log(2)
    assert kl_estimate(policy, reference, "k1").item() == pytest.approx(ln2)
    assert kl_estimate(policy, reference, "k2").item() == pytest.approx(ln2**2 / 2)
    assert kl_estimate(policy, reference, "k3").item() == pytest.approx(0.5 - 1 + ln2)


def test_expectations_over_a_distribution():
    """Weighted by the policy's probabilities, k1 and k3 are the exact KL."""
    policy = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    reference = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    for kind in ("k1", "k3"):
        estimate = (policy * kl_estimate(policy.log(), reference.log(), kind)).sum()
        torch.testing.assert_close(estimate, exact)


def test_k3_of_close_policies_keeps_its_digits_in_fp32():
    """exp(-1e-4) - 1 + 1e-4 = 5e-9 is smaller than the fp32 rounding of exp(-1e-4)."""
    k3 = kl_estimate(torch.full((1, 1), 1e-4), torch.zeros(1, 1), "k3").item()
    assert k3 == pytest.approx(5e-9, rel=2e-3)


@pytest.mark.parametrize("kind", KL_KINDS)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, -500.0])
def test_rubbish_under_the_mask_leaves_no_gradient(kind, rubbish):
    logprobs = torch.tensor([[-1.0, -2.0, rubbish]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    total, _ = aggregate(kl_estimate(logprobs, torch.zeros(1, 3), kind), mask, "token_mean")
    total.backward()
    slope = {"k1": [1, 1], "k2": [-1, -2], "k3": [1 - math.e, 1 - math.e**2]}[kind]
    torch.testing.assert_close(logprobs.grad, torch.tensor([[*slope, 0.0]]))


def test_a_live_nan_stays_visible():
    estimate = kl_estimate(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2), "k2")
    assert estimate[0, 0].isnan() and estimate[0, 1] == 0


def test_half_precision_is_computed_in_fp32():
    # 1 - 2^-9 needs 9 bits: bf16 would round the difference.
    a = torch.tensor([[1.0]], dtype=torch.bfloat16)
    b = torch.tensor([[2.0**-9]], dtype=torch.bfloat16)
    assert kl_estimate(a, b, "k1").item() == 1 - 2.0**-9


def test_unknown_kind():
    with pytest.raises(ValueError, match="'k4'.*k1, k2, k3"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")
