"""REINFORCE++ (arXiv 2501.03262): the whole training loop, a line per stage.

    torchrun --nproc-per-node N -m megatron_rpp.train --config FILE [--section.key value ...]

Every rank runs this program. A data-parallel replica (its tensor × pipeline × context ranks)
samples, scores and keeps its own shard of the rollout buffer; normalisations and losses are
reductions over the data-parallel group.

A step that was interrupted goes on where it was saved: each stage is skipped that is done.

Left out: asynchronous rollouts, replay.
"""

from __future__ import annotations

from functools import partial

from megatron_rpp.config import Config, check_world_size, cli
from megatron_rpp.lifecycle import entrypoint
from megatron_rpp.model.build import parameter_count
from megatron_rpp.parallel import groups
from megatron_rpp.parallel.device import describe
from megatron_rpp.reporting.console import Console
from megatron_rpp.reporting.flops import step_flops
from megatron_rpp.reporting.metrics import step_metrics
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.runtime import checkpointing, export, preflight
from megatron_rpp.runtime import run as runs
from megatron_rpp.runtime.inputs import Inputs, check_writable, load_inputs
from megatron_rpp.runtime.run import Run, evaluate_held_out
from megatron_rpp.runtime.session import run_to_completion, session
from megatron_rpp.runtime.step_progress import StepProgress
from megatron_rpp.stages import advantage, kl_control, logprobs, reward, rollout, update

CONSOLE_METRICS = ("reward/mean", "kl/k1", "policy/entropy", "policy/clip_fraction", "policy/grad_norm",
         "response/length_mean", "throughput/tokens_per_second", "time/step")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    config, dry_run = cli.parse(argv, program="train")
    check_world_size(config, groups.launched_world_size())
    check_writable("checkpoint.dir", config.checkpoint.dir)
    check_writable("logging.dir", config.logging.dir)
    export.check_export(config, config.checkpoint.dir)
    inputs = load_inputs(config)
    groups.start(**config.parallel.sizes(), seed=config.seed)
    if dry_run:
        preflight.run(config, inputs.vocab_size, Console(groups.is_main()))
    train(config, inputs, dry_run)
    groups.stop()


def train(config: Config, inputs: Inputs, dry_run: bool = False) -> None:
    """Trains to config.train.steps, or to the accuracy at which to stop. Collective."""
    console = Console(groups.is_main())
    with session(config, console) as stop:
        run = runs.build(config, inputs, console)
        run.stop = stop
        checkpointing.resume(run, repair=not dry_run)
        _announce(run)
        run_to_completion(run, _loop, "train.steps", dry_run)


def _loop(run: Run) -> None:
    config, console, log, state = run.config, run.console, run.log, run.state
    log.start(state.step, run.begun)
    if not run.begun:
        evaluate_held_out(run)
    while not run.finished:
        checkpointing.stop_if_requested(run)
        row, buffer = rl_step(run)
        log.histograms(state.step + 1, buffer)
        run.saved_as = None
        state.step += 1
        state.prompts_seen += config.rollout.prompts_per_step
        state.kl_factor = kl_control.next_factor(
            config.algorithm, state.kl_factor, row, config.rollout.samples_per_step
        )
        checkpointing.finish_step(run, row)
        console.row({"step": str(state.step)} | {t: f"{row[t]:.4g}" for t in CONSOLE_METRICS if t in row})
    log.close()
    if state.step:
        console.say(f"checkpoint: {config.checkpoint.dir}; metrics: {log.rows}")
    else:
        target = config.train.stop_accuracy
        console.say(f"train.stop_accuracy {target} is reached before the first step")


def rl_step(run: Run) -> tuple[dict[str, float], RolloutBuffer]:
    """One step of REINFORCE++: rollout, reward, score, advantage, update. Collective.

    Goes on where `run.step_progress` stands. Returns the step's row of metrics (the same on every rank)
    and this replica's shard of the rollouts.
    """
    config, inputs, policy, state = run.config, run.inputs, run.policy, run.state
    temperature, count = config.rollout.temperature, config.rollout.prompts_per_step
    algorithm = kl_control.scaled(config.algorithm, state.kl_factor)
    work = checkpointing.begin_step(run)
    if work.buffer is None:
        with run.stage("rollout", runs.own_samples(config)) as progress:
            work.buffer = rollout.collect(
                run.engine, inputs.train, inputs.sampling, count, config.rollout.samples_per_prompt,
                groups.data_rank(), groups.data_size(), config.seed, state.step,
                state.prompts_seen, progress,
            )  # fmt: skip
        checkpointing.keep(run, "rollout")
    if work.buffer.scores is None:
        with run.stage("reward"):
            work.scores = reward.score(work.buffer, inputs.rewards, inputs.response_form)
        checkpointing.keep(run, "reward")
    if work.buffer.old_logprobs is None:
        with run.stage("score"):
            _score(run, work.buffer)
    stats = advantage.fill(work.buffer, algorithm, config.reward, groups.data_group())
    with run.stage("update"):
        updated = update.run(
            policy.model, policy.optimizer, policy.scheduler, work.buffer, algorithm,
            config.train, temperature, config.rollout.samples_per_step, config.seed, state,
            work.update, partial(checkpointing.stop_if_requested_inside_step, run),
        )  # fmt: skip
    for fault in updated.faults:
        run.console.say(f"step {state.step + 1}: update skipped, {fault}")
    scored = (algorithm.old_logprobs == "recompute") + (run.reference is not None)
    flops = step_flops(config.model, inputs.vocab_size, work.buffer, config.train.epochs, scored)
    run.step_progress = StepProgress()
    return (
        step_metrics(work.buffer, algorithm, work.scores, stats, updated, work.times, flops),
        work.buffer,
    )


def _score(run: Run, buffer: RolloutBuffer) -> None:
    """Fills `old_logprobs` and, with a reference, `ref_logprobs`."""
    compute = partial(
        logprobs.response_logprobs, buffer=buffer,
        max_tokens=run.config.train.max_tokens_per_microbatch,
        temperature=run.config.rollout.temperature,
    )  # fmt: skip
    recompute = run.config.algorithm.old_logprobs == "recompute"
    old = compute(run.policy.model) if recompute else buffer.rollout_logprobs
    if run.reference is not None:
        with run.reference.active() as model:
            buffer.ref_logprobs = compute(model)
    buffer.old_logprobs = old


def _announce(run: Run) -> None:
    """The start-up log: device, layout, model, data, reward shaping, position."""
    config, inputs, say = run.config, run.inputs, run.console.say
    parallel, shaping = config.parallel, config.reward
    count = parameter_count(run.policy.model)
    say(describe())
    say(
        f"layout: tensor {parallel.tensor} × pipeline {parallel.pipeline} (× "
        f"{parallel.virtual_pipeline} chunks) × context {parallel.context} × data "
        f"{groups.data_size()}, sequence parallel {'on' if parallel.sequence_parallel else 'off'}; "
        f"model: {count:,} parameters, vocabulary {inputs.vocab_size}, {config.model.dtype}"
    )
    say(
        f"data: {inputs.counts}; rewards: {', '.join(shaping.functions)}; normalised "
        f"{shaping.normalize}, scale {shaping.scale}, clip {shaping.clip}"
    )
    if groups.is_main() and (note := inputs.note_on_labels()) is not None:
        say(note)
    say(f"algorithm {config.algorithm.name}; {config.algorithm.kl_summary}")
    start = f"resumed at step {run.state.step}" if run.state.step else "starts at step 0"
    if run.step_progress.buffer is not None:
        start += f" and {run.step_progress.update.done} mini-batches"
    say(f"{start} of {config.train.steps}, {run.state.prompts_seen} prompts seen")


if __name__ == "__main__":
    entrypoint.run(main)
