"""The rollout buffer: where each sample's tokens and values lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.data.prompts import Example, Prompt
from megatron_rpp.records import Generation, Request
from megatron_rpp.rollout.buffer import from_generations
from tests.rollout.buffer_bytes import nbytes


def make_buffer(samples, first_id=0, samples_per_prompt=1):
    """`samples`: (prompt tokens, response tokens) each; log-probs are -0.5, -1.5, ... in order."""
    prompts = [Prompt(Example("?"), tuple(prompt)) for prompt, _ in samples]
    requests = [Request(p.tokens, first_id + i) for i, p in enumerate(prompts)]
    generations, count = [], 0
    for index, (_, response) in enumerate(samples):
        logprobs = [-0.5 - i for i in range(count, count + len(response))]
        generations.append(Generation(list(response), logprobs, index % 2 == 1))
        count += len(response)
    return from_generations(prompts, requests, generations, samples_per_prompt=samples_per_prompt)


@pytest.fixture
def tiny():
    """Three samples: prompts of 2, 1, 3 tokens, responses of 2, 3, 1."""
    return make_buffer([([5, 6], [7, 8]), ([9], [10, 11, 12]), ([13, 14, 15], [16])], 4, 2)


def test_columns_of_a_tiny_step(tiny):
    assert len(tiny) == 3
    assert tiny.tokens.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert tiny.offsets.tolist() == [0, 4, 8, 12]
    assert tiny.prompt_lengths.tolist() == [2, 1, 3]
    assert tiny.lengths.tolist() == [4, 4, 4]
    assert tiny.response_lengths.tolist() == [2, 3, 1]
    assert tiny.response_offsets.tolist() == [0, 2, 5, 6]
    assert tiny.sample_ids.tolist() == [4, 5, 6]
    assert tiny.group_ids.tolist() == [2, 2, 3]  # two samples a prompt
    assert tiny.mask.tolist() == [True] * 6
    assert tiny.rollout_logprobs.tolist() == [-0.5, -1.5, -2.5, -3.5, -4.5, -5.5]
    assert tiny.rollout_logprobs.dtype == torch.float32
    assert tiny.truncated.tolist() == [False, True, False]
    assert [tiny.response(i) for i in range(3)] == [[7, 8], [10, 11, 12], [16]]
    assert [p.tokens for p in tiny.prompts] == [(5, 6), (9,), (13, 14, 15)]


def test_bytes_of_a_tiny_step(tiny):
    # int64: 12 tokens, 4 offsets, 3 lengths, 3 ids, 3 groups; bool: 6 mask, 3 truncated; fp32: 6.
    assert nbytes(tiny) == 8 * (12 + 4 + 3 + 3 + 3) + 6 + 3 + 4 * 6
    tiny.advantages = torch.zeros(6, dtype=torch.float64)
    assert nbytes(tiny) == 8 * 25 + 9 + 24 + 48


def test_padded_and_back(tiny):
    padded = tiny.padded(tiny.rollout_logprobs)
    assert padded.tolist() == [[-0.5, -1.5, 0.0], [-2.5, -3.5, -4.5], [-5.5, 0.0, 0.0]]
    expected = [[True, True, False], [True, True, True], [True, False, False]]
    assert tiny.padded(tiny.mask).tolist() == expected
    assert torch.equal(tiny.flat(padded), tiny.rollout_logprobs)


def test_a_buffer_without_samples():
    buffer = make_buffer([])
    assert len(buffer) == 0 and buffer.offsets.tolist() == [0]
    assert buffer.response_offsets.tolist() == [0]
    padded = buffer.padded(buffer.rollout_logprobs)
    assert padded.shape == (0, 0)
    assert torch.equal(buffer.flat(padded), buffer.rollout_logprobs)


tokens = st.lists(st.integers(1, 50), min_size=1, max_size=6)
step = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(step)
def test_padded_and_flat_lose_nothing(samples):
    buffer = make_buffer(samples)
    column = torch.arange(len(buffer.mask), dtype=torch.float64) + 1
    padded = buffer.padded(column)
    assert padded.shape == (len(samples), max(len(response) for _, response in samples))
    assert torch.equal(buffer.flat(padded), column)
    assert (padded != 0).sum() == len(column)
