"""Packed rows: sequences end to end, distributed over context-parallel ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.rollout.packing import Split, pack, zigzag
from tests.rollout.test_buffer import make_buffer

CPU = torch.device("cpu")
SAMPLES = [([5, 6], [7, 8]), ([9], [10, 11, 12]), ([13, 14, 15], [16])]


def row_of(samples, order, split=Split(), length=None, **options):
    buffer = make_buffer(samples)
    length = length or split.row_length(buffer.lengths[torch.tensor(order, dtype=int)])
    return pack(buffer, order, split, row_length=length, device=CPU, **options)


def test_a_row_by_hand():
    """Sample 2 (13 14 15 | 16), then sample 1 (9 | 10 11 12); the token before predicts each."""
    batch = row_of(SAMPLES, [2, 1])
    assert batch.tokens.tolist() == [[13, 14, 15, 16, 9, 10, 11, 12]]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.packing.boundaries.tolist() == [0, 4, 8]
    assert batch.packing.longest == 4
    assert batch.packing.gathered is batch.packing.visible is None
    assert batch.rows.tolist() == [2, 4, 5, 6]
    assert batch.targets.tolist() == [16, 10, 11, 12]
    assert batch.column.tolist() == [5, 2, 3, 4]


@pytest.mark.parametrize("context", [1, 2, 4])
def test_without_a_lag_the_rows_are_those_of_the_response_tokens_themselves(context):
    found = {}
    for rank in range(context):
        batch = row_of(SAMPLES, [2, 0, 1], Split(context, rank), lag=0)
        assert batch.tokens[0, batch.rows].tolist() == batch.targets.tolist()
        found |= dict(zip(batch.column.tolist(), batch.targets.tolist(), strict=True))
    assert found == dict(enumerate([7, 8, 10, 11, 12, 16]))


def test_the_zigzag_by_hand():
    # A sequence of 8 in 4 pieces of 2: rank 0 has the first and the last, rank 1 the middle two.
    assert zigzag(torch.tensor([8]), 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert zigzag(torch.tensor([4, 8]), 2).tolist() == [
        [0, 3, 4, 5, 10, 11],
        [1, 2, 6, 7, 8, 9],
    ]
    assert zigzag(torch.tensor([3, 2]), 1).tolist() == [[0, 1, 2, 3, 4]]


def test_a_row_on_two_context_parallel_ranks_by_hand():
    """(1 2 | 3 4 5) is padded to 8: rank 0 has 1 2 and the padding, rank 1 has 3 4 5 and a zero."""
    first, second = (row_of([([1, 2], [3, 4, 5])], [0], Split(2, rank)) for rank in range(2))
    assert first.tokens.tolist() == [[1, 2, 0, 0]] and second.tokens.tolist() == [[3, 4, 5, 0]]
    assert first.positions.tolist() == [0, 1, 6, 7]
    assert second.positions.tolist() == [2, 3, 4, 5]
    # The position of 2, on the other rank, predicts 3; the positions of 3 and 4 predict 4 and 5.
    assert (first.rows.tolist(), first.targets.tolist(), first.column.tolist()) == ([1], [3], [0])
    assert second.rows.tolist() == [0, 1]
    assert (second.targets.tolist(), second.column.tolist()) == ([4, 5], [1, 2])
    assert first.packing.gathered.tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
    seen = second.packing.visible[0, 0].int().tolist()
    assert seen == [[1] * (position + 1) + [0] * (7 - position) for position in (2, 3, 4, 5)]


def test_padding_at_the_end_forms_sequences_no_longer_than_the_longest():
    batch = row_of([([1, 2], [3])], [0], Split(tensor=4))
    assert batch.tokens.tolist() == [[1, 2, 3, 0]]
    assert batch.packing.boundaries.tolist() == [0, 3, 4]
    batch = row_of([([1, 2], [3])], [0], length=10)
    assert batch.packing.boundaries.tolist() == [0, 3, 6, 9, 10]
    assert batch.column.tolist() == [0]


@pytest.mark.parametrize(
    ("split", "tokens"), [(Split(), 1), (Split(tensor=4), 4), (Split(2, 1, 2), 4)]
)
def test_a_row_without_samples_is_padding(split, tokens):
    batch = row_of(SAMPLES, [], split)
    assert batch.tokens.tolist() == [[0] * tokens]
    for values in (batch.rows, batch.targets, batch.column):
        assert values.shape == (0,) and values.dtype == torch.int64


tokens = st.lists(st.integers(1, 50), min_size=1, max_size=6)
step = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(step, st.sampled_from([1, 2, 3]), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_ranks_hold_the_row_and_every_response_token_once(samples, context, tensor, random):
    buffer = make_buffer(samples)
    order = random.sample(range(len(samples)), len(samples))
    split = Split(context, 0, tensor)
    length = split.row_length(buffer.lengths)
    assert length % (context * tensor) == 0
    ranks = [
        pack(buffer, order, Split(context, r, tensor), row_length=length, device=CPU)
        for r in range(context)
    ]
    for batch in ranks:
        assert batch.tokens.shape == (1, length // context)
    everything = torch.cat([batch.tokens[0] for batch in ranks])
    if context > 1:  # gathered one rank after the other, then put in the order of the row
        everything = everything[ranks[0].packing.gathered]
    starts = ranks[0].packing.boundaries.tolist()
    for place, index in zip(starts, order):
        whole = samples[index][0] + samples[index][1]
        assert everything[place : place + len(whole)].tolist() == whole
    columns = torch.cat([batch.column for batch in ranks])
    assert columns.sort().values.tolist() == list(range(len(buffer.mask)))
    responses = [token for _, response in samples for token in response]
    assert torch.cat([b.targets for b in ranks]).tolist() == [responses[i] for i in columns]
    for batch in ranks:  # a token's position is its place in its sequence
        cells = batch.packing.key_cells if context == 1 else batch.packing.query_cells
        assert len(cells.unique()) == len(cells)
