"""REINFORCE++ (arXiv 2501.03262): the whole training loop, a line per stage.

    torchrun --nproc-per-node N -m megatron_rpp.train --config FILE [--section.key value ...]

Every rank runs this program. A data-parallel replica (its tensor × pipeline ranks) samples, scores
and keeps its own shard of the rollout buffer; normalisations and losses are reductions over the
data-parallel group.

Left out: asynchronous rollouts, replay, resume inside a step.
"""

from __future__ import annotations

from functools import partial

from megatron_rpp import checkpoint, cli, launching
from megatron_rpp.config import Config, check_world_size
from megatron_rpp.console import Console
from megatron_rpp.inputs import Inputs, check_writable, load_inputs
from megatron_rpp.metrics import MetricsLog, StageTimes, evaluation_row, step_metrics
from megatron_rpp.model.build import parameter_count
from megatron_rpp.model.reference import Reference
from megatron_rpp.parallel import groups
from megatron_rpp.parallel.device import describe
from megatron_rpp.policy import Policy, build_policy, build_reference
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.rollout.engine import MegatronEngine, RolloutEngine
from megatron_rpp.run_state import RunState, due
from megatron_rpp.stages import advantage, reward, rollout, scoring, update
from megatron_rpp.stages.evaluation import Evaluation, evaluate

SHOWN = ("reward/mean", "kl/k1", "policy/entropy", "policy/clip_fraction", "policy/grad_norm",
         "response/length_mean", "throughput/tokens_per_second", "time/step")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    config, dry_run = cli.parse(argv, program="train")
    check_world_size(config, groups.launched_world_size())
    check_writable("checkpoint.dir", config.checkpoint.dir)
    check_writable("logging.dir", config.logging.dir)
    inputs = load_inputs(config)
    groups.start(config.parallel.tensor, config.parallel.pipeline, config.seed)
    train(config, inputs, dry_run)
    groups.stop()


def train(config: Config, inputs: Inputs, dry_run: bool = False) -> None:
    """Trains to config.train.steps, or to the accuracy at which to stop. Collective."""
    console = Console(groups.is_main())
    policy = build_policy(config, config.optimizer, inputs.vocab_size)
    reference = build_reference(config, policy, inputs.vocab_size)
    state = _resume(config, policy)
    _announce(console, config, inputs, policy, state)
    if dry_run:
        console.say("dry run: everything is built and nothing was trained")
        return
    target = config.train.stop_accuracy
    if state.step >= config.train.steps or state.reached(target):
        console.say(f"finished before, at step {state.step}: raise train.steps to go on")
        return

    engine = MegatronEngine(policy.model, inputs.tokenizer, config.rollout.max_batch)
    log = MetricsLog(config.logging.dir, state.step)
    if state.step == 0:
        _evaluate(config, inputs, engine, log, console, state)
        if state.reached(target):
            console.say(f"train.stop_accuracy {target} is reached before the first step")
            return
    while state.step < config.train.steps and not state.reached(target):
        row, buffer = rl_step(config, inputs, policy, reference, engine, console, state)
        log.histograms(state.step + 1, buffer)
        state.step += 1
        state.prompts_seen += config.rollout.prompts_per_step
        last = state.step == config.train.steps
        if last or due(state.step, config.evaluation.interval):
            row |= evaluation_row(_evaluate(config, inputs, engine, log, console, state))
        times = StageTimes()
        if last or state.reached(target) or due(state.step, config.checkpoint.interval):
            with times.measure("checkpoint"), console.stage("checkpoint"):
                _save(config, policy, state)
        row["time/checkpoint"] = times.seconds.get("checkpoint", 0.0)
        log.step(state.step, row)
        console.row({"step": str(state.step)} | {t: f"{row[t]:.4g}" for t in SHOWN if t in row})
    log.close()
    console.say(f"checkpoint: {config.checkpoint.dir}; metrics: {log.rows}")


def rl_step(
    config: Config,
    inputs: Inputs,
    policy: Policy,
    reference: Reference | None,
    engine: RolloutEngine,
    console: Console,
    state: RunState,
) -> tuple[dict[str, float], RolloutBuffer]:
    """One step of REINFORCE++: rollout, reward, score, advantage, update. Collective.

    Returns its row of metrics (the same on every rank) and this replica's shard of the rollouts.
    """
    times, step, temperature = StageTimes(), state.step, config.rollout.temperature
    budget, count = config.train.max_tokens_per_microbatch, config.rollout.prompts_per_step
    own_samples = count * config.rollout.samples_per_prompt // groups.data_size()
    title = f"step {step + 1}/{config.train.steps}"
    with times.measure("rollout"), console.stage(f"{title} rollout", own_samples) as progress:
        buffer = rollout.collect(
            engine, inputs.train, inputs.sampling, count, config.rollout.samples_per_prompt,
            groups.data_rank(), groups.data_size(), config.seed, step, state.prompts_seen, progress,
        )  # fmt: skip
    with times.measure("reward"), console.stage(f"{title} reward"):
        parts = reward.score(buffer, inputs.rewards, inputs.tokenizer)
    with times.measure("score"), console.stage(f"{title} score"):
        logprobs = partial(
            scoring.response_logprobs, buffer=buffer, max_tokens=budget, temperature=temperature
        )
        buffer.old_logprobs = logprobs(policy.model)
        if reference is not None:
            with reference.active() as model:
                buffer.ref_logprobs = logprobs(model)
        stats = advantage.fill(buffer, config.algorithm, config.reward, groups.data_group())
    with times.measure("update"), console.stage(f"{title} update"):
        updated = update.run(
            policy.model, policy.optimizer, policy.scheduler, buffer, config.algorithm,
            config.train, temperature, count * config.rollout.samples_per_prompt,
            config.seed, step,
        )  # fmt: skip
    return step_metrics(buffer, parts, stats, updated, times), buffer


def _resume(config: Config, policy: Policy) -> RunState:
    """Continues from checkpoint.load, else from what checkpoint.dir holds, else at step 0."""
    path = checkpoint.newest(config.checkpoint.dir)
    if config.checkpoint.load is not None:
        path = checkpoint.require(config.checkpoint.load)
    if path is None:
        return RunState()
    return checkpoint.resume(policy.model, policy.optimizer, policy.scheduler, path)


def _save(config: Config, policy: Policy, state: RunState) -> None:
    settings = config.checkpoint
    checkpoint.save(
        settings.dir, policy.model, policy.optimizer, policy.scheduler, state, settings.keep
    )


def _evaluate(config, inputs: Inputs, engine, log, console, state: RunState) -> Evaluation:
    with console.stage("evaluation"):
        result = evaluate(
            engine, inputs.held_out, inputs.rewards, inputs.tokenizer, inputs.greedy,
            config.evaluation.samples,
        )  # fmt: skip
    state.accuracy = result.accuracy
    log.evaluation(state.step, result)
    text = f"held-out accuracy {result.accuracy:.1%}, reward {result.reward:.3f}"
    console.say(f"step {state.step}: {text} ({result.count} prompts)")
    return result


def _announce(console: Console, config: Config, inputs: Inputs, policy: Policy, state) -> None:
    """The start-up log: device, layout, model, data, reward shaping, position."""
    parallel, shaping = config.parallel, config.reward
    count = parameter_count(policy.model.module)
    console.say(describe())
    console.say(
        f"layout: tensor {parallel.tensor} × pipeline {parallel.pipeline} × data "
        f"{groups.data_size()}, sequence parallel {'on' if parallel.sequence_parallel else 'off'}; "
        f"model: {count:,} parameters, vocabulary {inputs.vocab_size}, {config.model.dtype}"
    )
    console.say(
        f"data: {len(inputs.train)} prompts, {len(inputs.held_out)} held out; rewards: "
        f"{', '.join(shaping.functions)}; normalised {shaping.normalize}, scale {shaping.scale}, "
        f"clip {shaping.clip}; algorithm {config.algorithm.name}"
    )
    start = f"resumed at step {state.step}" if state.step else "starts at step 0"
    console.say(f"{start} of {config.train.steps}, {state.prompts_seen} prompts seen")


if __name__ == "__main__":
    launching.run(main)
