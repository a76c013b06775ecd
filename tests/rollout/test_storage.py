"""Rollouts are loaded from disk unchanged, for any number of replicas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rpp.data.examples import Example
from megatron_rpp.data.prompts import Prompt
from megatron_rpp.records import Generation, Request
from megatron_rpp.rewards import Scores
from megatron_rpp.rollout import storage
from megatron_rpp.rollout.buffer import RolloutBuffer, from_generations

SAMPLES = 6


def buffer_of(samples: range) -> RolloutBuffer:
    """Sample i has i % 3 + 1 prompt tokens and i response tokens, all with value i."""
    prompts = [Prompt(Example(str(i // 2)), (i,) * (i % 3 + 1)) for i in samples]
    requests = [Request(prompt.tokens, i) for prompt, i in zip(prompts, samples)]
    generations = [Generation([i] * i, [-float(i)] * i, i % 2 == 0) for i in samples]
    buffer = from_generations(prompts, requests, generations, samples_per_prompt=2)
    buffer.scores = torch.tensor([i / 10 for i in samples])
    return buffer


def scores_of(samples: range) -> Scores:
    """Scores of the samples, with one time-out."""
    return Scores([i / 7 for i in samples], {"a:b": [i / 3 for i in samples]}, timeouts=1)


def same(ours: RolloutBuffer, theirs: RolloutBuffer) -> bool:
    for name, value in vars(theirs).items():
        mine = getattr(ours, name)
        equal = torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value
        if not equal:
            return False
    return True


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_any_number_of_replicas_reads_any(tmp_path: Path, writers, readers):
    paths = [tmp_path / f"{rank}.safetensors" for rank in range(writers)]
    for rank, path in enumerate(paths):
        own = range(SAMPLES * rank // writers, SAMPLES * (rank + 1) // writers)
        storage.save(buffer_of(own), scores_of(own), path)
    timeouts = 0
    for rank in range(readers):
        own = range(SAMPLES * rank // readers, SAMPLES * (rank + 1) // readers)
        expected = buffer_of(own)
        found, scores = storage.load(paths, own, expected.prompts)
        assert same(found, expected) and found.old_logprobs is None
        assert (scores.total, scores.parts) == (scores_of(own).total, scores_of(own).parts)
        timeouts += scores.timeouts
    assert timeouts == writers


def test_before_the_reward(tmp_path: Path):
    buffer = buffer_of(range(SAMPLES))
    buffer.scores = None
    storage.save(buffer, None, tmp_path / "0.safetensors")
    found, scores = storage.load([tmp_path / "0.safetensors"], range(SAMPLES), buffer.prompts)
    assert same(found, buffer) and scores is None
