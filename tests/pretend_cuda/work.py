"""Whole steps, and the hot loops at two sizes, on a pretended CUDA device; run by each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron_rpp import reward_model, sft
from megatron_rpp.config import Config
from megatron_rpp.parallel import groups
from megatron_rpp.reporting.console import Console
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.rollout.planning import shard
from megatron_rpp.runtime import run as runs
from megatron_rpp.runtime.inputs import load_inputs
from megatron_rpp.runtime.rated_inputs import load_rated_inputs
from megatron_rpp.runtime.run import Run
from megatron_rpp.stages import advantage, critic, logprobs, minibatches, reward, rollout, update
from tests import preference_run
from tests.pretend_cuda.budget import Loop
from tests.pretend_cuda.device import pretended_cuda
from tests.pretend_cuda.watch import Sync, Watch
from tests.small_run import config_of
from tests.whole_runs import VARIED, layout, small_buckets, train_run

SETTINGS = VARIED | {
    "train__steps": 1,
    "train__epochs": 1,
    "rollout__prompts_per_step": 4,
    "rollout__samples_per_prompt": 4,
    # Options that read more columns, so that all of them travel.
    "algorithm__entropy_coef": 0.01,
    "algorithm__kl_loss_coef": 0.02,
    "algorithm__rollout_correction": "cap",
    "rollout__min_new_tokens": 2,
    "rollout__top_p": 0.95,
    "rollout__top_k": 20,
    "sft__steps": 1,
    "sft__batch_size": 16,
}
_SHARED = ("parallel__", "model__")
TOKENS = (3, 6)
"""Numbers of tokens to decode."""
WIDE, NARROW = 400, 60
"""Token budgets of a micro-batch: a few of them, or many."""


def train_resume_finetune(data: Path, run: Path, settings: dict) -> None:
    """A step from the start, saved; one more after a resume; a supervised step; a step of a reward
    model."""
    train_run(data, run, **settings)
    train_run(data, run, **(settings | {"train__steps": 2}))
    config = config_of(data, run, **settings)
    inputs = load_inputs(config)
    with layout(config):
        sft.finetune(config, inputs)
    rate(data / "preferences", run / "reward_model", settings)


def rate(data: Path, run: Path, settings: dict) -> None:
    """A step of reward_model.py, its evaluation and its save, on the layout of `settings`."""
    shared = {name: value for name, value in settings.items() if name.startswith(_SHARED)}
    config = preference_run.config_of(data, run, **shared, reward_model__steps=1)
    inputs = load_rated_inputs(config)
    with layout(config):
        reward_model.train_rewards(config, inputs)


@contextmanager
def built(data: Path, run: Path, settings: dict) -> Iterator[Run]:
    """A run before its first step."""
    config: Config = config_of(data, run, **settings)
    inputs = load_inputs(config)
    with layout(config):
        yield runs.build(config, inputs, Console(False))


def sampled(run: Run) -> RolloutBuffer:
    """Rollouts of a step, as the update takes them."""
    config, inputs = run.config, run.inputs
    buffer = rollout.collect(
        run.engine, inputs.train, inputs.sampling, rollout=config.rollout, key=run.step_key,
        replica=groups.data_rank(), replicas=groups.data_size(), progress=lambda finished: None,
    )  # fmt: skip
    reward.score(buffer, run.scorer)
    logprobs.compute_logprobs(
        buffer, run.policy.model, run.reference, recompute=True, max_tokens=WIDE, temperature=1.0
    )
    if run.critic is not None:
        critic.compute_values(buffer, run.critic.model, max_tokens=WIDE)
    advantage.compute_advantages(buffer, config.algorithm, config.reward, group=groups.data_group())
    return buffer


def decode(run: Run, tokens: int) -> None:
    """Generates `tokens` tokens of every response of a step."""
    sampling = replace(run.inputs.sampling, min_new_tokens=tokens, max_new_tokens=tokens)
    rollout.collect(
        run.engine, run.inputs.train, sampling, rollout=run.config.rollout, key=run.step_key,
        replica=groups.data_rank(), replicas=groups.data_size(), progress=lambda finished: None,
    )  # fmt: skip


def score(run: Run, buffer: RolloutBuffer, max_tokens: int) -> None:
    """One pass of the policy over the buffer."""
    logprobs.response_logprobs(run.policy.model, buffer, max_tokens, temperature=1.0)


def update_once(run: Run, buffer: RolloutBuffer, max_tokens: int) -> None:
    """One optimizer step over the whole buffer."""
    budget = replace(run.config.train, minibatches=1, max_tokens_per_microbatch=max_tokens)
    update.update_policy(
        run.policy, buffer, run.config.algorithm, train=budget, rollout=run.config.rollout,
        key=run.step_key, state=run.state, progress=minibatches.UpdateProgress(),
        safe_point=lambda: None,
    )  # fmt: skip


def predict(run: Run, buffer: RolloutBuffer, max_tokens: int) -> None:
    """One pass of the critic over the buffer."""
    assert run.critic is not None
    critic.compute_values(buffer, run.critic.model, max_tokens=max_tokens)


def update_critic_once(run: Run, buffer: RolloutBuffer, max_tokens: int) -> None:
    """One optimizer step of the critic over the whole buffer."""
    assert run.critic is not None
    budget = replace(run.config.train, minibatches=1, max_tokens_per_microbatch=max_tokens)
    critic.update_critic(
        run.critic, buffer, run.config.critic, aggregation="token_mean", train=budget,
        rollout=run.config.rollout, key=run.step_key, state=run.state,
        progress=minibatches.UpdateProgress(), safe_point=lambda: None,
    )  # fmt: skip


def supervised_batch(run: Run) -> RolloutBuffer:
    """What `sft_step` trains on."""
    key, size = run.step_key, run.config.sft.batch_size
    rows = run.inputs.train.order(key.prompts_seen, size, key.seed)
    positions = shard(size, groups.data_rank(), groups.data_size())
    return sft.batch_of([run.inputs.train[rows[i]] for i in positions], run.inputs.form)


def supervised_step(run: Run, max_tokens: int) -> None:
    """One step of sft.py."""
    config = sft.settings_of(run.config)
    budget = replace(config.train, max_tokens_per_microbatch=max_tokens)
    sft.sft_step(replace(run, config=replace(config, train=budget)))


def loops_of(run: Run) -> dict[str, tuple[Callable[[int], None], tuple[int, int], tuple[int, int]]]:
    """The hot loops: work, two sizes for it, and the units that these are. Collective."""
    buffer, lessons = sampled(run), supervised_batch(run)
    budgets = (WIDE, NARROW)

    def batches(content: RolloutBuffer) -> tuple[int, int]:
        return _micro_batches(run, content, WIDE), _micro_batches(run, content, NARROW)

    of_critic = {
        "values": (partial(predict, run, buffer), budgets, batches(buffer)),
        "critic": (partial(update_critic_once, run, buffer), budgets, batches(buffer)),
    }
    return (of_critic if run.critic is not None else {}) | {
        "token": (partial(decode, run), TOKENS, TOKENS),
        "log-probs": (partial(score, run, buffer), budgets, batches(buffer)),
        "update": (partial(update_once, run, buffer), budgets, batches(buffer)),
        "supervised": (partial(supervised_step, run), budgets, batches(lessons)),
    }


def measure(watch: Watch, run: Run, names: Iterable[str] | None = None) -> dict[str, Loop]:
    """The synchronisations of hot loops at two lengths; None = of all."""
    loops, found = loops_of(run), {}
    for name in loops if names is None else names:
        work, sizes, lengths = loops[name]
        short, long = (_counted(watch, partial(work, size)) for size in sizes)
        found[name] = Loop(short, long, lengths)
    return found


def _micro_batches(run: Run, buffer: RolloutBuffer, max_tokens: int) -> int:
    everything = list(range(len(buffer)))
    return len(
        logprobs.make_micro_batches(run.policy.model, buffer, everything, max_tokens=max_tokens)
    )


def _counted(watch: Watch, work: Callable[[], None]) -> Counter[Sync]:
    before = watch.syncs.copy()
    work()
    return watch.syncs - before


class Found(NamedTuple):
    """What the check saw on one rank."""

    mixes: list[str]
    phases: set[str]
    report: str
    loops: dict[str, Loop]


STEPS = "over two steps, a resume, a supervised step, a step of a reward model and their saves"


def everything(rank: int, data: Path, run: Path, settings: dict) -> Found:
    """Whole steps, and then the loops by themselves; communication overlaps, as on GPUs."""
    with pretended_cuda() as watch, small_buckets():
        train_resume_finetune(data, run, settings)
        report = watch.report()
        with built(data, run, settings) as fresh:
            assert all(chunk.ddp_config.overlap_param_gather for chunk in fresh.policy.model)
            loops = measure(watch, fresh)
    return Found(watch.mixes, watch.phases, report, loops)
