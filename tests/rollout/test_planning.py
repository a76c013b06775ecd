"""Mini-batches depend on the seed and the step; micro-batches stay within a token budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.data.prompts import Example, Prompt
from megatron_rpp.records import Generation, Request
from megatron_rpp.rollout.buffer import from_generations
from megatron_rpp.rollout.packing import Split
from megatron_rpp.rollout.planning import micro_batches, minibatch_of, plan
from megatron_rpp.seeds import permutation


def test_a_plan_by_hand():
    # Longest first: 5 + 5 fill the budget of 10.
    assert plan([5, 1, 5, 1], [0, 1, 2, 3], 10) == [[0, 2], [1, 3]]
    # Only the requested samples, in any order.
    assert plan([5, 1, 5, 1], [3, 0], 10) == [[0, 3]]
    # Sequences lie end to end: 4 + 3 tokens are 7.
    assert plan([4, 3], [0, 1], 6) == [[0], [1]]
    assert plan([4, 3], [0, 1], 7) == [[0, 1]]
    assert plan([4, 3], [], 8) == []


def test_a_sample_above_the_budget_is_alone():
    assert plan([50, 2, 2, 60], [0, 1, 2, 3], 10) == [[3], [0], [1, 2]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 100), st.data())
def test_a_plan_covers_each_sample_once_within_the_budget(lengths, budget, data):
    everything = list(range(len(lengths)))
    samples = data.draw(st.permutations([i for i in everything if data.draw(st.booleans())]))
    groups = plan(lengths, samples, budget)
    assert sorted(i for group in groups for i in group) == sorted(samples)
    assert plan(lengths, sorted(samples), budget) == groups, "the order asked for must not matter"
    for group in groups:
        assert group, "an empty group"
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)
    # No group could have taken the sample that opened the next one.
    for group, following in zip(groups, groups[1:]):
        assert sum(lengths[i] for i in group) + lengths[following[0]] > budget


def make_buffer(lengths):
    """Makes samples of one prompt token and a response; all tokens of sample i are i + 1."""
    prompts = [Prompt(Example("?"), (i + 1,)) for i in range(len(lengths))]
    requests = [Request(prompt.tokens, i) for i, prompt in enumerate(prompts)]
    generations = [
        Generation([i + 1] * (n - 1), [0.0] * (n - 1), False) for i, n in enumerate(lengths)
    ]
    return from_generations(prompts, requests, generations, samples_per_prompt=1)


def make_micro_batches(buffer, samples, budget, agree, split=Split(), **options):
    device = torch.device("cpu")
    return micro_batches(
        buffer, samples, budget, split=split, device=device, agree=agree, **options
    )


def test_micro_batches_are_filled_up_to_the_agreed_count():
    buffer = make_buffer([4, 2, 4])
    asked = []

    def agree(count):
        asked.append(count)
        return 5

    batches = make_micro_batches(buffer, [0, 1, 2], 8, agree)
    assert asked == [2], "one agreement, on the own count"
    assert [batch.tokens.tolist() for batch in batches] == [
        [[1, 1, 1, 1, 3, 3, 3, 3]],
        [[2, 2]],
        [[0]],
        [[0]],
        [[0]],
    ]
    assert [len(batch.targets) for batch in batches] == [6, 1, 0, 0, 0]


def test_a_rank_without_samples_still_takes_part():
    batches = make_micro_batches(make_buffer([4, 2]), [], 8, lambda count: count + 2)
    assert [batch.tokens.tolist() for batch in batches] == [[[0]], [[0]]]


@pytest.mark.parametrize("context", [1, 2, 4])
def test_every_response_token_is_in_one_micro_batch_of_one_rank(context):
    buffer = make_buffer([3, 9, 4, 4, 2, 12])
    columns = []
    for rank in range(context):
        batches = make_micro_batches(
            buffer, list(range(6)), 20, lambda count: count, Split(context, rank)
        )
        columns += [batch.column for batch in batches]
    assert sorted(torch.cat(columns).tolist()) == list(range(len(buffer.mask)))


@pytest.mark.parametrize("budget", [1, 9, 16, 100])
def test_pairs_stay_together(budget):
    """Samples 2i and 2i + 1 are in one micro-batch, side by side; pairs share the budget."""
    lengths = [4, 3, 2, 2, 7, 6, 3, 3]
    batches = make_micro_batches(
        make_buffer(lengths), list(range(8)), budget, lambda count: count, together=2
    )
    # All tokens of sample i are i + 1.
    whole = [[t - 1 for t in batch.tokens[0].unique_consecutive().tolist()] for batch in batches]
    for samples in whole:
        assert all(b == a + 1 for a, b in zip(samples[::2], samples[1::2], strict=True))
        assert sum(lengths[i] for i in samples) <= budget or len(samples) == 2
    assert sorted(sample for samples in whole for sample in samples) == list(range(8))


def test_rows_of_one_length_for_interleaved_stages():
    buffer = make_buffer([9, 4, 3])
    batches = make_micro_batches(buffer, [0, 1, 2], 9, lambda count: count + 1, same_length=True)
    assert [batch.tokens.shape for batch in batches] == [(1, 9)] * 3
    assert batches[1].packing.boundaries.tolist() == [0, 4, 7, 9]  # 4 + 3 tokens, 2 of padding
    # Padding is split, so that attention does not lay out one long sequence of padding.
    assert batches[2].packing.longest <= 9 and len(batches[2].column) == 0


def test_the_padding_that_context_parallelism_adds_counts_in_the_budget():
    batches = make_micro_batches(
        make_buffer([5, 5, 5]), [0, 1, 2], 10, lambda count: count, Split(2, 0)
    )
    assert len(batches) == 3  # 8 tokens each, in halves
    assert [batch.tokens.shape[1] for batch in batches] == [4, 4, 4]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 99), st.integers(0, 9))
def test_mini_batches_are_a_balanced_partition(minibatches, each, seed, step):
    count = minibatches * each
    numbers = minibatch_of(count, minibatches, seed=seed, step=step, epoch=0)
    assert numbers.shape == (count,)
    assert torch.bincount(numbers, minlength=minibatches).tolist() == [each] * minibatches


def test_uneven_mini_batches_differ_by_one_at_most():
    sizes = torch.bincount(minibatch_of(11, 4, seed=1, step=0, epoch=0), minlength=4)
    assert sorted(sizes.tolist()) == [2, 3, 3, 3]


def test_mini_batches_do_not_depend_on_the_ranks():
    """Each replica looks its samples up in the table of the whole step, so 1, 2 or 4 agree."""
    whole = minibatch_of(32, 4, seed=7, step=3, epoch=1)
    for replicas in (1, 2, 4):
        ids = torch.arange(32).chunk(replicas)
        tables = [minibatch_of(32, 4, seed=7, step=3, epoch=1)[own] for own in ids]
        assert torch.equal(torch.cat(tables), whole)


def test_mini_batches_change_with_seed_step_and_epoch():
    tables = {
        key: tuple(minibatch_of(32, 4, seed=key[0], step=key[1], epoch=key[2]).tolist())
        for key in [(7, 0, 0), (7, 0, 1), (7, 1, 0), (7, 1, 1), (7, 2, 0), (8, 0, 0)]
    }
    assert len(set(tables.values())) == len(tables)
    assert tables[7, 1, 0] == tuple(minibatch_of(32, 4, seed=7, step=1, epoch=0).tolist())


def test_permutations_are_pinned():
    """A resumed run must draw the same mini-batches as before, with any version of NumPy."""
    assert permutation(8, 1, 2, 3).tolist() == [5, 2, 4, 7, 1, 6, 3, 0]
    assert permutation(0, 1).tolist() == []
    assert sorted(permutation(1000, 5).tolist()) == list(range(1000))


def test_streams_of_different_keys_are_different():
    """(seed, epoch) orders the prompts; (seed, step, epoch) draws the mini-batches."""
    assert permutation(64, 1, 2).tolist() != permutation(64, 1, 2, 0).tolist()
    assert permutation(64, 1, 2, 3).tolist() != permutation(64, 1, 3, 2).tolist()
