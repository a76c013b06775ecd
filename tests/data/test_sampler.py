"""The order of prompts: independent of where it is cut or resumed, and mixed by weights."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.data.sampler import Mixture, prompt_indices


@settings(deadline=None)
@given(
    cursor=st.integers(0, 200),
    counts=st.lists(st.integers(0, 40), max_size=6),
    size=st.integers(1, 30),
    seed=st.integers(0, 2**64),
)
def test_order_is_the_same_however_it_is_cut(cursor, counts, size, seed):
    parts, position = [], cursor
    for count in counts:
        parts += prompt_indices(position, count, size=size, seed=seed)
        position += count
    assert parts == prompt_indices(cursor, sum(counts), size=size, seed=seed)


@settings(deadline=None)
@given(epoch=st.integers(0, 50), size=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_every_epoch_is_a_permutation(epoch, size, seed):
    assert sorted(prompt_indices(epoch * size, size, size=size, seed=seed)) == list(range(size))


def test_epochs_and_seeds_differ_and_every_first_row_is_possible():
    orders = {tuple(prompt_indices(epoch * 20, 20, size=20, seed=7)) for epoch in range(10)}
    orders |= {tuple(prompt_indices(0, 20, size=20, seed=seed)) for seed in range(8, 18)}
    assert len(orders) == 20
    first = [prompt_indices(epoch * 4, 1, size=4, seed=0)[0] for epoch in range(400)]
    # Binomial(400, 1/4): 100 expected, 60 and 140 are 4.6 standard deviations away.
    assert all(60 < first.count(row) < 140 for row in range(4))


def test_order_is_pinned():
    # A change of this order breaks the resume of every run in flight.
    assert prompt_indices(3, 12, size=8, seed=1234) == [5, 2, 7, 3, 1, 0, 4, 5, 6, 3, 1, 7]


@pytest.mark.parametrize(
    ("cursor", "count", "size", "seed"), [(-1, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, 0), (0, 1, 1, -1)]
)
def test_impossible_positions_are_errors(cursor, count, size, seed):
    with pytest.raises(ValueError, match="must be at least 0"):
        prompt_indices(cursor, count, size=size, seed=seed)


SIZES, WEIGHTS = [7, 1000, 40], [2.0, 1.0, 1.0]


@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.integers(0, 60), max_size=5), start=st.integers(0, 200_000))
def test_a_mixture_is_the_same_however_it_is_cut(counts, start):
    """A fresh object each time, as after a resume; the range crosses blocks of 65,536."""
    parts, position = [], start
    for count in counts:
        parts += Mixture(SIZES, WEIGHTS, 5).rows(position, count)
        position += count
    assert parts == Mixture(SIZES, WEIGHTS, 5).rows(start, sum(counts))


def test_a_mixture_has_its_shares_and_whole_epochs_of_each_source():
    count = 70_000
    drawn = Mixture(SIZES, WEIGHTS, 5).rows(0, count)
    for source, size in enumerate(SIZES):
        rows = [row for part, row in drawn if part == source]
        share = WEIGHTS[source] / sum(WEIGHTS)
        # Binomial: within five standard deviations.
        assert abs(len(rows) - share * count) < 5 * (count * share * (1 - share)) ** 0.5
        for start in range(0, len(rows) - size, size):
            assert sorted(rows[start : start + size]) == list(range(size))


def test_a_mixture_depends_on_its_seed_and_is_pinned():
    # A change of this order breaks the resume of every run in flight.
    first = Mixture(SIZES, WEIGHTS, 5).rows(65_534, 4)
    assert first != Mixture(SIZES, WEIGHTS, 6).rows(65_534, 4)
    assert first == [(2, 12), (0, 5), (1, 383), (1, 988)]
