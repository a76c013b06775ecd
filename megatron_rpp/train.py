"""REINFORCE++ (arXiv 2501.03262), and PPO and others to compare it with: the training loop.

    torchrun --nproc-per-node N -m megatron_rpp.train --config FILE [--section.key value ...]

Every rank runs this program. A data-parallel replica (its tensor × pipeline × context ranks) samples
and scores its own shard of the rollouts; normalisations and losses are reduced over the replicas.

A run resumes from the last saved stage; completed stages are skipped.

Left out: rollouts more than one step ahead, replay.
"""

from __future__ import annotations

from functools import partial

from megatron_rpp.config import AlgorithmConfig, Config
from megatron_rpp.lifecycle import entrypoint
from megatron_rpp.runtime import startup

if __name__ == "__main__":
    STARTUP = entrypoint.run(startup.for_training)  # --help and mistakes end here, before torch

from megatron_rpp.model import kernels
from megatron_rpp.model.build import parameter_count
from megatron_rpp.parallel import groups
from megatron_rpp.parallel.device import describe
from megatron_rpp.reporting.console import Console
from megatron_rpp.reporting.flops import step_flops
from megatron_rpp.reporting.metrics import step_metrics
from megatron_rpp.rewards import Scores
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.runtime import checkpointing, preflight, rollouts
from megatron_rpp.runtime import run as runs
from megatron_rpp.runtime.inputs import Inputs
from megatron_rpp.runtime.run import Run, evaluate_held_out
from megatron_rpp.runtime.session import freeze_heap, session, training
from megatron_rpp.stages import advantage, critic, kl_control, logprobs, reward, update

CONSOLE_METRICS = ("reward/mean", "kl/k1", "policy/entropy", "policy/clip_fraction", "policy/grad_norm",
         "response/length_mean", "throughput/tokens_per_second", "time/step")  # fmt: skip


def main(argv: list[str] | None = None, *, start: startup.Startup | None = None) -> None:
    start = start or startup.for_training(argv)
    config, inputs = start.config, start.inputs
    groups.start(
        **config.parallel.sizes(), seed=config.seed, deterministic=config.train.deterministic
    )
    freeze_heap()
    if start.dry_run:
        preflight.run(config, inputs.vocab_size, Console(groups.is_main()))
    train(config, inputs, start.dry_run)
    groups.stop()


def train(config: Config, inputs: Inputs, dry_run: bool = False) -> None:
    """Trains for train.steps steps, or until train.stop_accuracy is reached. Collective."""
    console = Console(groups.is_main())
    with session(config, console) as stop:
        run = runs.build(config, inputs, console)
        run.stop = stop
        checkpointing.resume(run, repair=not dry_run)
        _log_start(run)
        if dry_run:
            console.log("dry run: everything is built and nothing was trained")
            return
        with training(run, "train.steps"):
            if not (run.started or run.finished):
                evaluate_held_out(run, 0, stop.told)
            while not run.finished:
                checkpointing.stop_if_requested(run)
                row, buffer = rl_step(run)
                row |= checkpointing.evaluate_if_due(run)
                if not run.warms_up:  # then the KL says nothing about the coefficient
                    kl_control.adapt(
                        run.state, row, config.algorithm, samples=config.rollout.samples_per_step
                    )
                run.advance(config.rollout.prompts_per_step)
                run.metrics.histograms(run.state.step, buffer)
                checkpointing.finish_step(run, row)
                _log_step(run, row)
            _log_end(run)


def rl_step(run: Run) -> tuple[dict[str, float], RolloutBuffer]:
    """One step; stages that are done already are skipped. Collective.

    Returns the metrics of the step (the same on every rank) and this replica's rollouts.
    """
    algorithm = kl_control.scaled(run.config.algorithm, run.state.kl_factor)
    progress = checkpointing.begin_step(run)
    if progress.buffer is None:
        progress.buffer, progress.staleness = _sample(run)
        checkpointing.finish_stage(run, "rollout")
    buffer = progress.buffer
    rollouts.begin_next(run)
    if progress.scores is None:
        progress.scores = _score(run, buffer)
        checkpointing.finish_stage(run, "reward")
    if buffer.old_logprobs is None:
        _compute_values(run, buffer)
        _compute_logprobs(run, buffer)
    advantages = advantage.compute_advantages(
        buffer, algorithm, run.config.reward, group=groups.data_group()
    )
    values = _update_critic(run, buffer)
    updates = _update(run, buffer, algorithm)
    row = step_metrics(
        buffer, algorithm, rewards=progress.scores, advantage=advantages, update=updates,
        critic=values, times=progress.times, flops=_flops(run, buffer),
        staleness=progress.staleness,
    )  # fmt: skip
    return row, buffer


def _sample(run: Run) -> tuple[RolloutBuffer, int]:
    """Stage 1: samples responses to the prompts of the step, unless the run is told to stop; returns
    them and their staleness. With rollout.ahead they may have been sampled during the step before."""
    count = run.config.rollout.samples_per_step // groups.data_size()
    with run.stage("rollout", count) as advance_bar:
        return rollouts.collect(run, advance_bar)


def _score(run: Run, buffer: RolloutBuffer) -> Scores:
    """Stage 2: scores the responses with the reward functions and models."""
    with run.stage("reward"):
        return reward.score(buffer, run.scorer)


def _compute_values(run: Run, buffer: RolloutBuffer) -> None:
    """Stage 3, with PPO: values under the critic before its update."""
    if run.critic is not None:
        with run.stage("values"):
            critic.compute_values(
                buffer, run.critic.model, max_tokens=run.config.train.max_tokens_per_microbatch
            )


def _compute_logprobs(run: Run, buffer: RolloutBuffer) -> None:
    """Stage 3: log-probs under the policy before its update and under the reference."""
    with run.stage("logprobs"):
        logprobs.compute_logprobs(
            buffer, run.policy.model, run.reference, recompute=_recomputes(run.config),
            max_tokens=run.config.train.max_tokens_per_microbatch,
            temperature=run.config.rollout.temperature,
        )  # fmt: skip


def _update_critic(run: Run, buffer: RolloutBuffer) -> critic.CriticStats | None:
    """Stage 5, with PPO: updates the critic; logs the updates that were skipped."""
    if run.critic is None:
        return None
    config = run.config
    with run.stage("critic"):
        stats = critic.update_critic(
            run.critic, buffer, config.critic, aggregation=config.algorithm.aggregation,
            train=config.train, rollout=config.rollout, key=run.step_key, state=run.state,
            progress=run.step_progress.critic,
            safe_point=partial(checkpointing.stop_if_requested, run),
        )  # fmt: skip
    _log_skipped(run, "critic", stats.skip_reasons)
    return stats


def _update(run: Run, buffer: RolloutBuffer, algorithm: AlgorithmConfig) -> update.UpdateStats:
    """Stage 5: updates the policy, except in critic.warmup_steps; logs the updates that were
    skipped."""
    if run.warms_up:
        return update.UpdateStats.of(run.step_progress.update, run.policy)
    with run.stage("update"):
        stats = update.update_policy(
            run.policy, buffer, algorithm, train=run.config.train, rollout=run.config.rollout,
            key=run.step_key, state=run.state, progress=run.step_progress.update,
            safe_point=partial(checkpointing.stop_if_requested, run),
        )  # fmt: skip
    _log_skipped(run, "policy", stats.skip_reasons)
    return stats


def _log_skipped(run: Run, model: str, reasons: list[str]) -> None:
    for reason in reasons:
        run.console.log(f"step {run.state.step + 1}: update of the {model} skipped, {reason}")


def _recomputes(config: Config) -> bool:
    """Whether the log-probs of the policy come from the training kernels, not from the engine."""
    return config.algorithm.old_logprobs == "recompute"


def _flops(run: Run, buffer: RolloutBuffer) -> float:
    """Floating-point operations of the step for this replica's samples."""
    config, passes = run.config, _recomputes(run.config) + (run.reference is not None)
    epochs = config.train.epochs
    return step_flops(
        config.model, run.inputs.vocab_size, buffer, epochs=0 if run.warms_up else epochs,
        passes=passes, critic_epochs=None if run.critic is None else epochs,
        reward_models=[source.model for source in run.inputs.reward_models],
    )  # fmt: skip


def _log_start(run: Run) -> None:
    """Logs device, kernels, layout, model, data, rewards, algorithm, and where the run starts."""
    config, inputs, log = run.config, run.inputs, run.console.log
    parallel, shaping = config.parallel, config.reward
    count = parameter_count(run.policy.model)
    log(describe())
    log(kernels.describe(run.policy.model))
    log(
        f"layout: tensor {parallel.tensor} × pipeline {parallel.pipeline} (× "
        f"{parallel.virtual_pipeline} chunks) × context {parallel.context} × data "
        f"{groups.data_size()}, sequence parallel {'on' if parallel.sequence_parallel else 'off'}; "
        f"model: {count:,} parameters, vocabulary {inputs.vocab_size}, {config.model.dtype}"
    )
    log(
        f"data: {inputs.counts}; rewards: {', '.join(shaping.functions)}; normalised "
        f"{shaping.normalize}, scale {shaping.scale}, clip {shaping.clip}"
    )
    if groups.is_main() and (note := inputs.note_on_labels()) is not None:
        log(note)
    log(f"algorithm {config.algorithm.name}; {config.algorithm.kl_summary}")
    start = f"resumed at step {run.state.step}" if run.state.step else "starts at step 0"
    if run.step_progress.buffer is not None:
        start += f" and {run.step_progress.minibatches} mini-batches"
    log(f"{start} of {config.train.steps}, {run.state.prompts_seen} prompts seen")


def _log_step(run: Run, row: dict[str, float]) -> None:
    """Prints one line of the run's table."""
    cells = {tag: f"{row[tag]:.4g}" for tag in CONSOLE_METRICS if tag in row}
    run.console.row({"step": str(run.state.step)} | cells)


def _log_end(run: Run) -> None:
    """Logs where the results are."""
    config = run.config
    if run.state.step:
        run.console.log(f"checkpoint: {config.checkpoint.dir}; metrics: {run.metrics.rows}")
    else:
        target = config.train.stop_accuracy
        run.console.log(f"train.stop_accuracy {target} is reached before the first step")


if __name__ == "__main__":
    entrypoint.run(partial(main, start=STARTUP))
