from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithms import clipped_values, value_loss
from tests.algorithms import oracle
from tests.algorithms.strategies import PRECISIONS, assert_close, batches, dirty, quick

CLIPS = st.sampled_from([None, 0.2, 1.0, 100.0])


@quick
@given(batches(3), CLIPS, st.sampled_from([*PRECISIONS]))
def test_matches_oracle(batch, clip, dtype):
    mask, *columns = batch
    expected = oracle.value_loss(*columns, clip)
    found = value_loss(*(torch.tensor(column, dtype=dtype) for column in columns), clip)
    assert_close(found, expected, dtype, size=np.abs(columns).max() ** 2)


@quick
@given(batches(3), CLIPS)
def test_gradient_is_that_of_the_larger_term(batch, clip):
    """V - R, or 0 where V has moved by more than the clip and the bounded error is larger."""
    mask, values, old, returns = (torch.tensor(column) for column in batch)
    values.requires_grad_()
    loss = value_loss(values, old, returns, clip)
    loss.sum().backward()
    error = (values - returns).detach()
    bound = math.inf if clip is None else clip
    clipped = ((values - old).abs() > bound) & (loss.detach() > error.square() / 2)
    free = (loss.detach() > error.square() / 2) | (loss.detach() == error.square() / 2)
    assert free.all()
    expected = torch.where(clipped, 0.0, error)
    ties = (values - old).abs() == bound  # the derivative of the clamp at its bound is a choice
    torch.testing.assert_close(values.grad[~ties], expected[~ties], rtol=0, atol=1e-12)
    found = clipped_values(values, old, returns, mask=mask, clip=clip)
    assert int(found) == int((clipped & mask).sum())


def test_by_hand():
    values, old, returns = torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    # Towards 2 the value may move by 0.5 only, so the bounded error 1.5 counts; away from 0 it has
    # moved to 1, and the larger error is that of the value itself.
    assert value_loss(values, old, returns, 0.5).tolist() == [[1.125, 0.5]]


def test_nothing_leaks_from_under_the_mask():
    mask = np.array([[True, False]])
    values = dirty(np.array([[1.0, 0.0]]), mask, torch.float32).requires_grad_()
    loss = value_loss(values, torch.full((1, 2), math.inf), torch.zeros(1, 2))
    torch.where(torch.tensor(mask), loss, 0.0).sum().backward()
    assert values.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_a_clip_that_is_not_positive_is_refused(clip):
    with pytest.raises(ValueError, match="must be positive"):
        value_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), clip)
