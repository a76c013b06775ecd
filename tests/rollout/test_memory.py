"""A replica holds only its own samples, so its bytes fall with the number of replicas."""

from __future__ import annotations

import pytest
import torch

from megatron_rpp.config import RolloutConfig
from megatron_rpp.data.prompts import Example, Prompt, PromptSet
from megatron_rpp.parallel import groups
from megatron_rpp.records import Generation, Sampling, StepKey
from megatron_rpp.rollout.planning import shard
from megatron_rpp.stages.rollout import collect
from tests.rollout.buffer_bytes import nbytes

PROMPTS = [Prompt(Example(f"prompt {i}"), tuple(range(3, 11))) for i in range(20)]
PER_STEP, SAMPLES = 16, 4
RESPONSE_COLUMNS = ("old_logprobs", "ref_logprobs", "advantages", "returns")


@pytest.fixture(scope="module", autouse=True)
def world():
    groups.start(1, 1, seed=1)
    yield
    groups.stop()


class Echo:
    """An engine whose responses depend on the sample's number alone.

    If `ragged`, they have 1 to 8 tokens, otherwise 8.
    """

    def __init__(self, ragged):
        self.ragged = ragged

    def generate(self, requests, sampling, *, seed, step, progress, stop):
        generations = []
        for request in requests:
            length = 1 + request.sample_id * 5 % 8 if self.ragged else 8
            tokens = [(request.sample_id + i + step) % 50 for i in range(length)]
            logprobs = [-1.0 - i - request.sample_id for i in range(length)]
            generations.append(Generation(tokens, logprobs, False))
        progress(len(generations))
        return generations


def collect_shard(rank, size, ragged):
    """The buffer of data-parallel `rank`, with the columns that the stages will write."""
    told = []
    sampling = Sampling(max_new_tokens=8)
    buffer = collect(
        Echo(ragged), PromptSet([PROMPTS]), sampling,
        rollout=RolloutConfig(prompts_per_step=PER_STEP, samples_per_prompt=SAMPLES),
        key=StepKey(seed=1, step=2, prompts_seen=32), replica=rank, replicas=size,
        progress=told.append,
    )  # fmt: skip
    assert told == [PER_STEP * SAMPLES // size]
    for name in RESPONSE_COLUMNS:
        setattr(buffer, name, torch.zeros(len(buffer.mask)))
    buffer.scores = torch.zeros(len(buffer))
    return buffer


def collect_shards(size, ragged):
    return [collect_shard(rank, size, ragged) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_a_replica_fall_as_the_replicas_grow(size):
    """With equal responses each shard has 1/size of the bytes, plus its last offset (8 bytes)."""
    (whole,) = collect_shards(1, ragged=False)
    for buffer in collect_shards(size, ragged=False):
        assert nbytes(buffer) == (nbytes(whole) - 8) // size + 8


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_the_bytes_of_a_step_are_constant(ragged):
    totals = {n: sum(nbytes(b) for b in collect_shards(n, ragged)) for n in (1, 2, 4)}
    assert totals[2] - totals[1] == 8 and totals[4] - totals[1] == 3 * 8
    largest = [max(nbytes(b) for b in collect_shards(n, ragged)) for n in (1, 2, 4)]
    assert largest[0] > 1.8 * largest[1] > 1.8 * 1.8 * largest[2]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_shards_are_the_step(size):
    (whole,) = collect_shards(1, ragged=True)
    shards = collect_shards(size, ragged=True)
    for column in ("tokens", "mask", "rollout_logprobs", "prompt_lengths", "sample_ids",
                   "group_ids", "truncated"):  # fmt: skip
        joined = torch.cat([getattr(buffer, column) for buffer in shards])
        assert torch.equal(joined, getattr(whole, column)), column
    assert [p for buffer in shards for p in buffer.prompts] == whole.prompts
    assert whole.sample_ids.tolist() == list(range(PER_STEP * SAMPLES))
    # A prompt's group stays on one replica.
    homes = [set(buffer.group_ids.tolist()) for buffer in shards]
    assert sum(len(home) for home in homes) == len(set.union(*homes)) == PER_STEP


def test_nothing_is_held_that_grows_with_the_padding():
    """One long response among short ones costs its own tokens, not a matrix of that width."""
    (ragged,), (equal,) = collect_shards(1, ragged=True), collect_shards(1, ragged=False)
    missing = 64 * 8 - len(ragged.mask)
    assert missing > 0
    # A response token: int64 id, bool mask, fp32 log-prob and four fp32 columns.
    assert nbytes(equal) - nbytes(ragged) == missing * (8 + 1 + 4 + 4 * 4)


@pytest.mark.parametrize(("count", "size"), [(16, 4), (10, 4), (3, 4), (0, 2)])
def test_shards_partition_the_prompts(count, size):
    parts = [shard(count, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
