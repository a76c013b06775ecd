"""Stage 1, rollout: samples responses to the prompts of a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from megatron_rpp.config import RolloutConfig
from megatron_rpp.data.prompts import Prompt, PromptSet
from megatron_rpp.parallel import groups, progress_wait
from megatron_rpp.records import Generation, Request, Sampling, StepKey
from megatron_rpp.rollout.buffer import RolloutBuffer, from_generations
from megatron_rpp.rollout.engine import Abandoned, RolloutEngine
from megatron_rpp.rollout.planning import shard


def generate(
    engine: RolloutEngine,
    requests: list[Request],
    sampling: Sampling,
    *,
    seed: int,
    step: int,
    progress: Callable[[int], None] = lambda finished: None,
    stop: Callable[[], bool],
) -> list[Generation]:
    """Does the same as `RolloutEngine.generate`, in agreement with the other replicas. Collective.

    Raises Abandoned, on every rank of the world, if any replica has abandoned its sequences.
    """
    generations: list[Generation] | None = None
    with suppress(Abandoned):
        generations = engine.generate(
            requests, sampling, seed=seed, step=step, progress=progress, stop=stop
        )
    progress_wait.wait_for_all(idle=stop)
    if groups.on_any(generations is None) or generations is None:
        raise Abandoned
    return generations


def requests_of(
    prompts: PromptSet, rollout: RolloutConfig, key: StepKey, *, replica: int, replicas: int
) -> tuple[list[Prompt], list[Request]]:
    """The requests of this replica in a step, and the prompt of each."""
    rows = prompts.order(key.prompts_seen, rollout.prompts_per_step, key.seed)
    chosen, requests = [], []
    for position in shard(rollout.prompts_per_step, replica, replicas):
        prompt = prompts[rows[position]]  # reading it tokenizes it
        for sample in range(rollout.samples_per_prompt):
            chosen.append(prompt)
            requests.append(Request(prompt.tokens, position * rollout.samples_per_prompt + sample))
    return chosen, requests


def collect(
    engine: RolloutEngine,
    prompts: PromptSet,
    sampling: Sampling,
    *,
    rollout: RolloutConfig,
    key: StepKey,
    replica: int,
    replicas: int,
    progress: Callable[[int], None] = lambda finished: None,
    stop: Callable[[], bool] = lambda: False,
) -> RolloutBuffer:
    """Samples responses to this replica's prompts of a step. Collective.

    All responses to a prompt are sampled on one replica. Prompt p of the step has the samples
    p·k .. p·k + k-1 (k = samples_per_prompt) on any replica, so the sampled tokens do not depend on
    the number of replicas.

    Args:
        replica: number of this data-parallel replica, out of `replicas`.
        progress: called with the number of responses that have been finished since its last call.
        stop: whether the run was told to stop (RolloutEngine.generate).
    Raises:
        Abandoned: on every rank of the world, if the run was told to stop.
    """
    chosen, requests = requests_of(prompts, rollout, key, replica=replica, replicas=replicas)
    generations = generate(
        engine, requests, sampling, seed=key.seed, step=key.step, progress=progress, stop=stop
    )
    return from_generations(
        chosen, requests, generations, samples_per_prompt=rollout.samples_per_prompt
    )
