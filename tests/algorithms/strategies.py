"""Hypothesis strategies for small batches [B, T] with any mask: holes, empty rows, one token."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

quick = settings(max_examples=150, deadline=None)


@st.composite
def batches(draw, tensors, low=-3.0, high=3.0):
    """(mask [B, T] bool, then ``tensors`` float64 arrays [B, T] of values in [low, high])."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    values = npst.arrays(np.float64, shape, elements=st.floats(low, high, width=32))
    mask = draw(npst.arrays(np.bool_, shape))
    return (mask, *(draw(values) for _ in range(tensors)))


def scores_for(mask):
    """One score a row of ``mask``."""
    return npst.arrays(np.float64, mask.shape[:1], elements=st.floats(-3.0, 3.0, width=32))
