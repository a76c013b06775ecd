"""Training of a reward model: one number for a response, on any layout.

    torchrun --nproc-per-node N -m megatron_rpp.reward_model --config FILE [--section.key value ...]

The model learns from pairs of responses of which one is better, or from responses with a score
(data/pairs.py). The loss is the mean over the rows of the whole batch (algorithms/preferences.py). The
reward is read at the last token of a response (data/pair_files.py). Models, packed micro-batches,
checkpoints, resume and stopping are those of `train.py`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from megatron_rpp.config import Config, RewardConfig
from megatron_rpp.lifecycle import entrypoint, heartbeat
from megatron_rpp.runtime import startup

if __name__ == "__main__":
    STARTUP = entrypoint.run(startup.for_reward_model)  # --help and mistakes end here, before torch

from megatron_rpp.data.pairs import Content
from megatron_rpp.model import overlap
from megatron_rpp.model.scalar_model import ScalarModel
from megatron_rpp.parallel import groups
from megatron_rpp.reporting.console import Console
from megatron_rpp.rollout.planning import shard
from megatron_rpp.runtime import checkpointing, supervised
from megatron_rpp.runtime.policy import build_policy
from megatron_rpp.runtime.rated_inputs import RatedInputs
from megatron_rpp.runtime.run import Run, assemble
from megatron_rpp.runtime.session import freeze_heap, session
from megatron_rpp.stages import nonfinite, rating
from megatron_rpp.stages.minibatches import optimizer_step


def main(argv: list[str] | None = None, *, start: startup.Startup | None = None) -> None:
    start = start or startup.for_reward_model(argv)
    config = start.config
    groups.start(
        **config.parallel.sizes(), seed=config.seed, deterministic=config.train.deterministic
    )
    freeze_heap()
    assert isinstance(start.inputs, RatedInputs)
    train_rewards(config, start.inputs, start.dry_run)
    groups.stop()


def settings_of(config: Config) -> Config:
    """The settings of the run: no reward function takes part in it."""
    return replace(supervised.with_section(config, config.reward_model), reward=RewardConfig())


def train_rewards(config: Config, inputs: RatedInputs, dry_run: bool = False) -> None:
    """Trains for reward_model.steps steps, or until reward_model.stop_accuracy is reached. Collective."""
    config, console = settings_of(config), Console(groups.is_main())
    with session(config, console) as stop:
        model = build_policy(
            config, config.optimizer, inputs.vocab_size, source=inputs.source, kind=ScalarModel
        )
        run = assemble(config, inputs, console, policy=model)
        run.stop = stop
        supervised.train_steps(
            run, config.reward_model, partial(rating_step, content=inputs.content),
            name="reward_model", title="reward-model steps", dry_run=dry_run,
            evaluate=evaluate_held_out,
        )  # fmt: skip


def rating_step(run: Run, content: Content) -> dict[str, float]:
    """One optimizer step. Returns its metrics. Collective.

    Raises RunFailure if too many updates in a row were skipped (stages/nonfinite.py).
    """
    heartbeat.enter("reward-model step")
    start = time.perf_counter()
    prompts, model, train, key = run.inputs.train, run.policy, run.config.train, run.step_key
    size = run.config.reward_model.batch_size
    rows = prompts.order(key.prompts_seen, size, key.seed)
    positions = shard(size, groups.data_rank(), groups.data_size())
    batch = rating.batch_of([prompts[rows[i]] for i in positions], content)
    micro_batches = batch.micro_batches(model.model, train.max_tokens_per_microbatch)
    done = optimizer_step(model, micro_batches, rating.rating_loss(model.model, batch))
    nonfinite.count_skipped(run.state, done.skip_reason, train.max_skipped_updates)
    row = {"rm/skipped_updates": 0, "rm/grad_norm": done.grad_norm}
    if done.skip_reason is not None:
        row["rm/skipped_updates"] = 1
    else:
        row["rm/loss"], accuracy, margin = rating.mean_report(done.reports)
        if content == "pairs":
            row |= {"rm/accuracy": accuracy, "rm/margin_mean": margin}
    return row | {"time/step": time.perf_counter() - start}


def evaluate_held_out(run: Run, step: int, stop: checkpointing.Told) -> dict[str, float]:
    """Rates the held-out rows and returns the metrics. Collective.

    Sets `run.state.accuracy`. Raises Abandoned, on every rank, if the run was told to stop.

    Args:
        step: number of steps behind the model.
        stop: whether to abandon it.
    """
    heartbeat.enter("evaluation")
    overlap.complete_weights(run.policy.model)
    inputs, config = run.inputs, run.config
    assert isinstance(inputs, RatedInputs)
    with run.console.stage("evaluation"):
        row = rating.evaluate(
            run.policy.model, inputs.held_out, inputs.content,
            batch_size=config.reward_model.batch_size,
            max_tokens=config.train.max_tokens_per_microbatch, stop=stop,
        )  # fmt: skip
    run.state.accuracy = row.get("eval/accuracy")
    shown = ", ".join(f"{tag.removeprefix('eval/')} {value:.4g}" for tag, value in row.items())
    run.console.log(f"step {step}: held-out {shown} ({len(inputs.held_out)} rows)")
    return row


if __name__ == "__main__":
    entrypoint.run(partial(main, start=STARTUP))
