"""Attention over a cache in blocks, against plain attention over each sequence in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.model import attention_metadata
from megatron_rpp.model.kv_cache import KeyValueCache
from megatron_rpp.parallel import device as devices
from megatron_rpp.rollout.blocks import Blocks
from megatron_rpp.rollout.metadata import prompt_metadata, token_metadata
from tests.model import varlen_kernel

KV_HEADS, SHARED, SIZE = 2, 3, 8
TOLERANCE = 1e-5  # fp32, sums in another order
ROUNDED = 2**-8  # the kernel for paged caches rounds its result to bf16


def plain_attention(queries, keys, values):
    """[t, n, d] of the last t positions of one sequence, with loops over positions and heads."""
    queries, keys, values = (x.double().numpy() for x in (queries, keys, values))
    total, result = len(keys), np.zeros((len(queries), KV_HEADS, SHARED, SIZE))
    for i in range(len(queries)):
        seen = total - len(queries) + i + 1
        for head in range(KV_HEADS):
            scores = queries[i, head] @ keys[:seen, head].T / math.sqrt(SIZE)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            result[i, head] = weights @ values[:seen, head]
    return torch.from_numpy(result).flatten(1)


class Sequences:
    """Random queries, keys and values of sequences that grow in a cache."""

    def __init__(self, count, blocks, longest, dtype=torch.float32):
        self.blocks = Blocks(count, blocks, longest)
        self.dtype = dtype
        self.cache = KeyValueCache(
            layers=1, blocks=blocks, kv_heads=KV_HEADS, head_size=SIZE, dtype=dtype
        )
        self.keys = [torch.zeros(0, KV_HEADS, SIZE) for _ in range(count)]
        self.values = [torch.zeros(0, KV_HEADS, SIZE) for _ in range(count)]
        self.generator = torch.Generator().manual_seed(3)

    def random(self, *shape):
        return (2 * torch.randn(*shape, generator=self.generator)).to(self.dtype)

    def grow(self, rows, counts):
        """Gives each sequence in `rows` new tokens in one pass; checks their context."""
        starts = [len(self.keys[row]) for row in rows]
        for row, start, count in zip(rows, starts, counts, strict=True):
            need = self.blocks.count(start + count) - self.blocks.owned[row]
            self.blocks.grow(row, int(need))
        self.cache.use(self.blocks.highest)
        if all(count == 1 for count in counts):
            metadata = token_metadata(
                self.blocks, np.array(rows), np.array(starts), ahead=1, dtype=self.dtype
            )
        else:
            metadata = prompt_metadata(self.blocks, rows, starts, lengths=counts, dtype=self.dtype)
        total = sum(counts)
        query = self.random(total, KV_HEADS, SHARED, SIZE)
        key, value = self.random(total, KV_HEADS, SIZE), self.random(total, KV_HEADS, SIZE)
        found = self.cache.attend(0, query=query, key=key, value=value, metadata=metadata)
        parts = zip(rows, *(x.split(counts) for x in (query, key, value, found)), strict=True)
        for row, queries, keys, values, context in parts:
            self.keys[row] = torch.cat([self.keys[row], keys])
            self.values[row] = torch.cat([self.values[row], values])
            expected = plain_attention(queries, self.keys[row], self.values[row])
            rounded = 0 if self.dtype == torch.float32 else ROUNDED
            torch.testing.assert_close(context.double(), expected, rtol=rounded, atol=TOLERANCE)

    def end(self, row):
        self.blocks.release(row)
        self.keys[row] = self.values[row] = torch.zeros(0, KV_HEADS, SIZE)

    def close_gaps(self):
        copies = self.blocks.close_gaps()
        if copies:
            self.cache.copy(*torch.tensor(copies).T)
        return copies


@pytest.fixture(params=["by block", "gathered", "paged"])
def dtype(request, monkeypatch):
    """By block: how a CPU attends. Paged: how a GPU does, in bf16, with a stand-in for its kernel.
    Gathered: how a GPU does without that kernel."""
    monkeypatch.setattr(devices, "scans_cache", lambda: request.param == "by block")
    if request.param != "paged":
        yield torch.float32
        return
    calls = varlen_kernel.install(monkeypatch)
    yield torch.bfloat16
    assert calls and all(call["num_splits"] == 1 for call in calls)


@pytest.fixture(params=[4, 64])
def block(request, monkeypatch):
    monkeypatch.setattr(attention_metadata, "block_size", lambda: request.param)


@pytest.mark.usefixtures("block")
def test_prompts_chunks_and_single_tokens(dtype):
    sequences = Sequences(4, 40, 30, dtype)
    sequences.grow([0, 1], [5, 9])  # prompts together
    sequences.grow([1, 0], [1, 1])
    sequences.grow([2], [7])  # a prompt in two parts, while others decode
    sequences.grow([0, 1], [1, 1])
    sequences.grow([2], [6])
    sequences.grow([0, 1, 2], [1, 1, 1])
    sequences.grow([3], [1])  # a prompt of one token
    for _ in range(8):
        sequences.grow([3, 2, 1, 0], [1, 1, 1, 1])


@pytest.mark.usefixtures("block")
def test_a_block_is_used_again_after_its_sequence_has_ended(dtype):
    sequences = Sequences(3, 12, 30, dtype)
    sequences.grow([0, 1, 2], [9, 9, 9])
    sequences.end(0)
    sequences.grow([0], [3])
    for _ in range(5):
        sequences.grow([2, 0], [1, 1])


def test_memory_that_was_never_used_may_hold_anything(dtype, monkeypatch):
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **kwargs: torch.full(*shape, math.nan, **kwargs)
    )
    monkeypatch.setattr(attention_metadata, "block_size", lambda: 4)
    sequences = Sequences(2, 9, 15, dtype)
    sequences.grow([0, 1], [3, 6])
    for _ in range(6):
        sequences.grow([0, 1], [1, 1])


@pytest.mark.parametrize("dtype", ["gathered", "paged"], indirect=True)
@pytest.mark.parametrize("filled", [1, 16])
def test_rows_that_fill_up_a_batch_touch_no_sequence(filled, dtype, monkeypatch):
    monkeypatch.setattr(devices, "padded_batch", lambda count: max(count, filled))
    monkeypatch.setattr(attention_metadata, "block_size", lambda: 4)
    blocks = Blocks(2, 6, 9)
    cache = KeyValueCache(layers=1, blocks=6, kv_heads=1, head_size=2, dtype=dtype)
    blocks.grow(0, 2)
    blocks.grow(1, 3)
    cache.use(blocks.highest)
    metadata = token_metadata(blocks, np.array([0, 1]), np.array([4, 8]), ahead=1, dtype=dtype)
    rows = len(metadata.positions)
    assert rows == max(2, filled)
    new = torch.ones(rows, 1, 2, dtype=dtype)
    cache.attend(0, query=new[:, :, None], key=new, value=new, metadata=metadata)
    written = cache.keys[0][:5].flatten(0, 1).abs().sum((1, 2)).nonzero().flatten().tolist()
    assert written == [1 * 4 + 0, 4 * 4 + 0], "block 1 of sequence 0, block 4 of sequence 1"


steps = st.lists(
    st.tuples(st.sampled_from(["grow", "end", "close gaps"]), st.integers(0, 4)), max_size=40
)


@settings(deadline=None, max_examples=30)
@given(steps)
def test_every_block_has_one_owner_and_copies_keep_what_sequences_hold(actions):
    """Any order of growth, ends and closed gaps leaves the attention right and the blocks unshared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_metadata, "block_size", lambda: 2)
        sequences = Sequences(5, 30, 12)
        for action, row in actions:
            if action == "grow" and len(sequences.keys[row]) < 12:
                sequences.grow([row], [1])
            elif action == "end":
                sequences.end(row)
            elif action == "close gaps":
                sequences.close_gaps()
            check_owners(sequences)


def check_owners(sequences):
    blocks = sequences.blocks
    owned = [int(b) for row in range(5) for b in blocks.table[row, : blocks.owned[row]]]
    assert len(owned) == len(set(owned)) and len(owned) + blocks.free == blocks.total
    assert blocks.owned.tolist() == [blocks.count(len(keys)) for keys in sequences.keys]


def test_gaps_are_closed_once_they_are_many(monkeypatch):
    monkeypatch.setattr(attention_metadata, "block_size", lambda: 2)
    sequences = Sequences(5, 10, 4)
    sequences.grow(list(range(5)), [4] * 5)  # ten blocks
    sequences.end(4)
    assert sequences.close_gaps() == [], "no gaps: the highest blocks are free"
    sequences.end(0)
    assert sorted(sequences.close_gaps()) == [(6, 0), (7, 1)]
    assert sequences.blocks.table[[1, 2, 3]].max() == 5
    assert sequences.blocks.grow(0, 1).tolist() == [6], "the lowest free block comes next"


def test_the_number_of_blocks_follows_the_limit_but_holds_one_sequence(monkeypatch):
    monkeypatch.setattr(attention_metadata, "block_size", lambda: 10)
    assert Blocks.within(1000, sequences=9, at_once=4, longest=25).total == 4 * 3
    assert Blocks.within(105, sequences=9, at_once=4, longest=25).total == 10
    assert Blocks.within(20, sequences=9, at_once=4, longest=25).total == 3
