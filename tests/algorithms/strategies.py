"""Hypothesis strategies for small batches [B, T] with any mask and any values, and tolerances.

All values are exact in fp32, so that one batch serves both precisions. They include cases that broke
other trainers: constant rewards, a spread of 1e-3 around 5, an offset of 1e6.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from megatron_rpp.algorithms import aggregation_weights

quick = settings(max_examples=80, deadline=None)
PRECISIONS = {torch.float64: 1e-12, torch.float32: 1e-6}


def numbers(shape, low=-3.0, high=3.0):
    """fp64 arrays of ``shape``: any values in [low, high], one constant, 5 +- 1e-3, 1e6 + noise."""
    plain = npst.arrays(np.float64, shape, elements=st.floats(low, high, width=32))
    signs = npst.arrays(np.float64, shape, elements=st.sampled_from([-1.0, 1.0]))
    constant = st.sampled_from([0.0, 1.0, 0.9, -0.7]).map(lambda value: np.full(shape, value))
    narrow = signs.map(lambda sign: 5 + 1e-3 * sign)
    offset = plain.map(lambda noise: 1e6 + noise)
    return st.one_of(plain, constant, narrow, offset).map(lambda x: np.float64(np.float32(x)))


@st.composite
def masks(draw, shape):
    """Random rows, some of them empty, full or with a single token."""
    mask = draw(npst.arrays(np.bool_, shape))
    for row in mask:
        kind = draw(st.sampled_from(["random", "random", "empty", "whole", "one token"]))
        if kind != "random":
            row[:] = kind == "whole"
        if kind == "one token":
            row[draw(st.integers(0, shape[1] - 1))] = True
    return mask


shapes = st.tuples(st.integers(1, 4), st.integers(1, 9))


@st.composite
def batches(draw, tensors, low=-3.0, high=3.0):
    """(mask [B, T] bool, then ``tensors`` float64 arrays [B, T] of values in [low, high])."""
    shape = draw(shapes)
    values = npst.arrays(np.float64, shape, elements=st.floats(low, high, width=32))
    return (draw(masks(shape)), *(draw(values) for _ in range(tensors)))


@st.composite
def any_batches(draw):
    """(mask [B, T] bool, float64 [B, T] ``numbers``)."""
    shape = draw(shapes)
    return draw(masks(shape)), draw(numbers(shape))


def scores_for(mask):
    """One score for each row of ``mask``."""
    return numbers(mask.shape[:1])


def dirty(values, mask, dtype):
    """Returns a tensor of ``values``, with NaN where the mask is False."""
    return torch.where(torch.tensor(mask), torch.tensor(values, dtype=dtype), torch.nan)


def assert_close(ours, expected, dtype, size=0.0):
    """Asserts equality to PRECISIONS[dtype], relative to the value or to ``size``, that of its terms.

    Differences below 1e-30 are ignored: fp32 ends at 1e-38.
    """
    assert ours.dtype == dtype
    tolerance = PRECISIONS[dtype]
    np.testing.assert_allclose(
        ours.double(), expected, rtol=tolerance, atol=max(tolerance * size, 1e-30)
    )


def aggregate(per_token, mask, kind):
    """The numerator and the count of the mini-batch mean, summed up as the update stage does."""
    weights, counts = aggregation_weights(mask, kind)
    return (torch.where(mask, per_token, 0.0) * weights.to(per_token)).sum(), counts.sum()
