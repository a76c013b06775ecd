"""Evaluation: answers the held-out prompts; measures accuracy and mean reward; returns samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rpp.data.prompts import Prompt
from megatron_rpp.parallel import groups
from megatron_rpp.records import Request, Sampling
from megatron_rpp.rollout.engine import RolloutEngine
from megatron_rpp.rollout.planning import shard
from megatron_rpp.stages.reward import Scorer
from megatron_rpp.stages.rollout import generate


@dataclass(frozen=True)
class Sample:
    """An answer to show."""

    prompt: str
    response: str
    label: str | None
    score: float


@dataclass(frozen=True)
class Evaluation:
    """Results over all prompts; `samples` are the first answers of this replica."""

    count: int
    accuracy: float
    reward: float
    samples: list[Sample]


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    *,
    sampling: Sampling,
    shown: int,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Answers every prompt once; each replica answers its shard. Collective over the world.

    A response is correct if the first reward function gives it 1.0 or more.

    Args:
        shown: how many answers to return as samples.
        stop: whether the run was told to stop.
    Raises:
        Abandoned: on every rank, if the run was told to stop.
    """
    rank, size = groups.data_rank(), groups.data_size()
    own = [prompts[i] for i in shard(len(prompts), rank, size)]
    requests = [Request(prompt.tokens, sample_id=0) for prompt in own]
    generations = generate(engine, requests, sampling, seed=0, step=0, stop=stop)
    responses = [generation.tokens for generation in generations]
    scores = scorer.score(own, responses)
    first = next(iter(scores.parts.values()))
    sums = [float(len(own)), float(sum(value >= 1.0 for value in first)), sum(scores.total)]
    count, correct, reward = groups.reduce_sums(sums, groups.data_group())
    samples = [
        Sample(prompt.example.prompt, scorer.form.text(response), prompt.example.label, score)
        for prompt, response, score in list(zip(own, responses, scores.total))[:shown]
    ]
    return Evaluation(int(count), correct / count, reward / count, samples)
