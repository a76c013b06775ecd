"""The losses of a reward model, against the oracle and by their properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithms import bradley_terry_loss, correlation, squared_error
from tests.algorithms import oracle
from tests.algorithms.strategies import PRECISIONS, assert_close, numbers, quick


@st.composite
def columns(draw, count):
    """`count` arrays [n] of any values."""
    size = draw(st.integers(1, 6))
    return [draw(numbers((size,))) for _ in range(count)]


@quick
@given(columns(3), st.sampled_from([*PRECISIONS]))
def test_the_loss_of_pairs_matches_the_oracle(values, dtype):
    found = bradley_terry_loss(*(torch.tensor(column, dtype=dtype) for column in values))
    size = max(1.0, *(np.abs(column).max() for column in values))  # rewards of 1e6 cancel
    assert_close(found, oracle.bradley_terry(*values), dtype, size=2 * size)


@quick
@given(columns(3))
def test_the_gradient_of_pairs_is_the_chance_of_the_wrong_order(values):
    """d loss / d r_chosen = -sigmoid(-(r_chosen - r_rejected - margin)), the other is its opposite."""
    better, worse, margin = (torch.tensor(column, requires_grad=True) for column in values)
    bradley_terry_loss(better, worse, margin).sum().backward()
    lead = values[0] - values[1] - values[2]
    expected = [-math.exp(-max(x, 0)) / (math.exp(-abs(x)) + 1) for x in lead]
    np.testing.assert_allclose(better.grad, expected, rtol=1e-9, atol=1e-300)
    np.testing.assert_array_equal(worse.grad, -better.grad)
    np.testing.assert_array_equal(margin.grad, -better.grad)


@quick
@given(columns(3), st.floats(-1e3, 1e3))
def test_only_the_difference_of_the_rewards_counts(values, shift):
    better, worse, margin = map(torch.tensor, values)
    moved = bradley_terry_loss(better + shift, worse + shift, margin)
    torch.testing.assert_close(
        moved, bradley_terry_loss(better, worse, margin), rtol=1e-6, atol=1e-6
    )


def test_by_hand():
    def loss(*values: float) -> float:
        return float(bradley_terry_loss(*(torch.tensor([v], dtype=torch.float64) for v in values)))

    assert loss(0, 0, 0) == pytest.approx(math.log(2))
    assert loss(1, 0, 1) == pytest.approx(math.log(2))
    assert loss(2, 0, 0) == pytest.approx(-math.log(1 / (1 + math.exp(-2))))
    assert squared_error(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])).tolist() == [0.25, 9]


@pytest.mark.parametrize("lead", [-1e30, -1e4, 1e4, 1e30])
def test_extreme_rewards_give_neither_nan_nor_infinity(lead):
    reward = torch.tensor([lead], requires_grad=True)
    loss = bradley_terry_loss(reward, torch.zeros(1), torch.zeros(1))
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(max(-lead, 0.0))
    assert float(reward.grad) == (-1.0 if lead < 0 else 0.0)


@quick
@given(columns(2))
def test_the_correlation_matches_the_oracle(values):
    found = correlation(*map(torch.tensor, values))
    spread = [column.max() - column.min() for column in values]
    # Where values differ by less than the rounding of their mean, the correlation has no digits.
    exact = all(s == 0 or s > 1e-6 * np.abs(v).max() for s, v in zip(spread, values))
    if exact:
        assert found == pytest.approx(oracle.correlation(*values), abs=1e-9)
    assert -1.000001 <= found <= 1.000001


def test_the_correlation_of_lines_and_constants():
    x = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(x, 3 * x + 1) == pytest.approx(1)
    assert correlation(x, -x) == pytest.approx(-1)
    assert correlation(x, torch.full((3,), 0.1)) == 0
    assert correlation(torch.empty(0), torch.empty(0)) == 0
