from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithms import KL_KINDS, adapted_kl_factor, kl_estimate
from tests.algorithms import oracle
from tests.algorithms.strategies import PRECISIONS, aggregate, assert_close, batches, dirty, quick


@quick
@given(batches(2), st.sampled_from(KL_KINDS), st.sampled_from([*PRECISIONS]))
def test_matches_oracle(batch, kind, dtype):
    mask, *arrays = batch
    expected = oracle.kl(*arrays, kind)
    got = kl_estimate(*(dirty(x, mask, dtype) for x in arrays), kind)[torch.tensor(mask)]
    # The oracle computes k3 as a difference of numbers of about 1.
    size = 1.0 if dtype == torch.float64 else 1e-9
    assert_close(got, expected[mask], dtype, size)


@quick
@given(st.floats(0.1, 10), st.floats(-1, 5), st.floats(0.01, 2), st.integers(1, 999))
def test_adaptive_factor_by_its_equation(factor, kl, target, samples):
    """Ziegler et al. 2019, section 2.2, with K = samples / horizon."""
    error = float(np.clip((kl - target) / target, -0.2, 0.2))
    expected = factor * (1 + error * samples / 1000)
    got = adapted_kl_factor(factor, kl, target=target, samples=samples, horizon=1000)
    assert got == pytest.approx(expected, rel=1e-12)


def test_adaptive_factor_by_hand():
    """At twice the target e is clipped to 0.2, so 100 of 1000 responses add 2%."""
    assert adapted_kl_factor(0.5, 0.2, target=0.1, samples=100, horizon=1000) == pytest.approx(
        0.5 * 1.02
    )
    assert adapted_kl_factor(0.5, 0.11, target=0.1, samples=100, horizon=1000) == pytest.approx(
        0.5 * 1.01
    )
    assert adapted_kl_factor(0.5, 0.0, target=0.1, samples=1000, horizon=1000) == pytest.approx(0.4)
    assert adapted_kl_factor(0.5, 0.1, target=0.1, samples=100, horizon=1000) == 0.5


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
@pytest.mark.parametrize("undefined", [math.nan, math.inf, -math.inf, -500.0])
def test_masked_out_values_leave_no_gradient(kind, undefined):
    logprobs = torch.tensor([[-1.0, -2.0, undefined]], requires_grad=True)
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
