"""One step's rollouts: which prompts, which replica, and the finished buffer."""

from __future__ import annotations

from typing import Callable

from megatron_rpp.data.prompts import PromptSet
from megatron_rpp.records import Request, Sampling
from megatron_rpp.rollout.buffer import RolloutBuffer, from_generations
from megatron_rpp.rollout.engine import RolloutEngine


def shard(count: int, rank: int, size: int) -> range:
    """The contiguous part of range(count) that data-parallel `rank` of `size` owns."""
    return range(count * rank // size, count * (rank + 1) // size)


def collect(
    engine: RolloutEngine,
    prompts: PromptSet,
    sampling: Sampling,
    prompts_per_step: int,
    samples_per_prompt: int,
    data_rank: int,
    data_size: int,
    seed: int,
    step: int,
    prompts_seen: int,
    progress: Callable[[int], None],
) -> RolloutBuffer:
    """Samples this replica's prompts of `step`; a prompt's group stays on one replica.

    Prompt p of the step has samples p·k .. p·k + k-1 (k = samples_per_prompt), whichever replica
    it is on, so the sampled tokens do not depend on the number of replicas. `prompts_seen` is the
    data position: how many prompts all steps before this one took.
    """
    rows = prompts.order(prompts_seen, prompts_per_step, seed)
    chosen, requests = [], []
    for position in shard(prompts_per_step, data_rank, data_size):
        prompt = prompts[rows[position]]  # tokenized here
        for sample in range(samples_per_prompt):
            chosen.append(prompt)
            requests.append(Request(prompt.tokens, position * samples_per_prompt + sample))
    generations = engine.generate(requests, sampling, seed, step, progress)
    return from_generations(chosen, requests, generations, samples_per_prompt)
