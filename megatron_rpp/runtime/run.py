"""`Run`: the parts of a training run, which its stages share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.writer import PendingSave
from megatron_rpp.config import Config
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model import overlap
from megatron_rpp.model.reference import Reference
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.records import StepKey
from megatron_rpp.reporting.console import Console
from megatron_rpp.reporting.metrics import MetricsLog, evaluation_row
from megatron_rpp.rollout.engine import MegatronEngine, RolloutEngine
from megatron_rpp.rollout.vllm.ahead import AheadEngine
from megatron_rpp.rollout.vllm.engine import VllmEngine
from megatron_rpp.runtime.cache_size import max_cache_tokens
from megatron_rpp.runtime.engine_check import check_engine
from megatron_rpp.runtime.inputs import Inputs
from megatron_rpp.runtime.policy import build_critic, build_policy, build_reference
from megatron_rpp.runtime.reward_models import build_scorer
from megatron_rpp.runtime.step_progress import StepProgress
from megatron_rpp.runtime.stop_request import Stop
from megatron_rpp.stages.evaluation import evaluate
from megatron_rpp.stages.reward import Scorer


@dataclass
class Saves:
    """The checkpoints that a run writes to checkpoint.dir."""

    current: str | None = None
    """Name of the current checkpoint; None before the first."""
    pending: PendingSave | None = None
    """The checkpoint that is being written."""
    stall_seconds: float = 0.0
    """How long saves have stalled the run since its last row of metrics."""

    @contextmanager
    def stalling(self) -> Iterator[None]:
        """Counts the time in the context as a stall."""
        start = time.perf_counter()
        yield
        self.stall_seconds += time.perf_counter() - start

    def take_stall_seconds(self) -> float:
        """Returns the stall so far and starts to count anew."""
        seconds, self.stall_seconds = self.stall_seconds, 0.0
        return seconds


@dataclass
class Run:
    """The parts of a training run. Only `state`, `step_progress` and `saves` change with its steps."""

    config: Config
    inputs: Inputs
    policy: TrainedModel
    reference: Reference | None
    """None if no KL coefficient needs it, and in supervised fine-tuning."""
    critic: TrainedModel | None
    """None if the algorithm has none, and in supervised fine-tuning."""
    engine: RolloutEngine | None
    """None in the training of a reward model."""
    scorer: Scorer
    console: Console
    metrics: MetricsLog
    stop: Stop = field(default_factory=Stop)
    """Tells whether the run was asked to end early."""
    state: RunState = field(default_factory=RunState)
    """Where the run stands between two steps."""
    step_progress: StepProgress = field(default_factory=StepProgress)
    """What is done of the step after `state`."""
    saves: Saves = field(default_factory=Saves)

    @property
    def started(self) -> bool:
        """Whether there is any work to save."""
        return self.state.step > 0 or self.step_progress.begun

    @property
    def finished(self) -> bool:
        train = self.config.train
        return self.state.step >= train.steps or self.state.reached(train.stop_accuracy)

    @property
    def warms_up(self) -> bool:
        """Whether the step is one in which only the critic is trained."""
        return self.critic is not None and self.state.step < self.config.critic.warmup_steps

    @property
    def step_key(self) -> StepKey:
        """The key of the step after `state`."""
        return StepKey(self.config.seed, self.state.step, self.state.prompts_seen)

    @property
    def ahead(self) -> AheadEngine | None:
        """The engine, if it samples a step ahead (rollout.ahead)."""
        return self.engine if isinstance(self.engine, AheadEngine) else None

    def advance(self, prompts: int) -> None:
        """Counts the step, which took `prompts` prompts, as finished."""
        self.step_progress = StepProgress()
        self.state.step += 1
        self.state.prompts_seen += prompts

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Times a stage of the step and shows a bar; yields the function that advances the bar."""
        heartbeat.enter(name)
        title = f"step {self.state.step + 1}/{self.config.train.steps} {name}"
        with self.step_progress.times.measure(name), self.console.stage(title, total) as progress:
            yield progress


def build(config: Config, inputs: Inputs, console: Console) -> Run:
    """Builds the run of train.py before its first step; writes nothing. Collective."""
    check_engine(config, inputs.vocab_size)
    policy = build_policy(config, config.optimizer, inputs.vocab_size, source=inputs.source)
    reference = build_reference(config, policy, inputs.vocab_size)
    critic = build_critic(config, policy, inputs.vocab_size)
    engine = build_engine(config, policy, inputs, log=console.log)
    return assemble(
        config, inputs, console, policy=policy, reference=reference, critic=critic, engine=engine
    )


def build_engine(
    config: Config, policy: TrainedModel, inputs: Inputs, *, log: Callable[[str], None]
) -> RolloutEngine:
    """The engine of rollout.engine. Collective."""
    if config.rollout.engine == "vllm":
        engine = VllmEngine(config, policy, inputs.tokenizer, log=log)
        return AheadEngine(engine) if config.rollout.ahead else engine
    return megatron_engine(config, policy, inputs)


def megatron_engine(config: Config, policy: TrainedModel, inputs: Inputs) -> MegatronEngine:
    """The engine that samples from the policy in the training processes. Collective."""
    return MegatronEngine(
        policy.model,
        inputs.tokenizer,
        max_batch=config.rollout.max_batch,
        max_cache_tokens=max_cache_tokens(config, inputs.vocab_size),
    )


def assemble(
    config: Config,
    inputs: Inputs,
    console: Console,
    *,
    policy: TrainedModel,
    reference: Reference | None = None,
    critic: TrainedModel | None = None,
    engine: RolloutEngine | None = None,
) -> Run:
    """Makes a run of these models. engine: None if the run samples nothing."""
    metrics = MetricsLog(config.logging.dir)
    scorer = build_scorer(config, inputs)
    return Run(config, inputs, policy, reference, critic, engine, scorer, console, metrics)


def evaluate_held_out(run: Run, step: int, stop: Callable[[], bool]) -> dict[str, float]:
    """Answers the held-out prompts, logs the result and returns its metrics. Collective.

    Sets `run.state.accuracy`.

    Args:
        step: number of steps behind the policy.
        stop: whether to abandon it.
    Raises:
        Abandoned: on every rank, if it was abandoned.
    """
    inputs = run.inputs
    assert run.engine is not None
    heartbeat.enter("evaluation")
    overlap.complete_weights(run.policy.model)
    with run.console.stage("evaluation"):
        result = evaluate(
            run.engine, inputs.held_out, run.scorer, sampling=inputs.greedy,
            shown=run.config.evaluation.samples, stop=stop,
        )  # fmt: skip
    run.state.accuracy = result.accuracy
    run.metrics.evaluation(step, result)
    text = f"held-out accuracy {result.accuracy:.1%}, reward {result.reward:.3f}"
    run.console.log(f"step {step}: {text} ({result.count} prompts)")
    return evaluation_row(result)
