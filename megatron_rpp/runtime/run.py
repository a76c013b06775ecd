"""What a run holds, from the moment everything is built: the one argument of the loop's stages."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Callable, Iterator

from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.writer import Writing
from megatron_rpp.config import Config
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model.reference import Reference
from megatron_rpp.parallel import groups
from megatron_rpp.reporting.console import Console
from megatron_rpp.reporting.metrics import MetricsLog, StageTimes, evaluation_row
from megatron_rpp.rollout.engine import MegatronEngine, RolloutEngine
from megatron_rpp.runtime.inputs import Inputs
from megatron_rpp.runtime.policy import Policy, build_policy, build_reference
from megatron_rpp.runtime.step_progress import StepProgress
from megatron_rpp.runtime.stop_request import Stop
from megatron_rpp.stages.evaluation import evaluate


@dataclass
class Run:
    """Built by `build`; `state` is where it stands, everything else stays."""

    config: Config
    inputs: Inputs
    policy: Policy
    reference: Reference | None
    """None where no KL coefficient needs it, and in the supervised warm start."""
    engine: RolloutEngine
    console: Console
    log: MetricsLog
    stop: Stop = field(default_factory=Stop)
    """Whether the run was told to end early."""
    state: RunState = field(default_factory=RunState)
    step_progress: StepProgress = field(default_factory=StepProgress)
    """What is done of the step after `state`."""
    writing: Writing | None = None
    """A checkpoint that is not in force yet."""
    saves: StageTimes = field(default_factory=StageTimes)
    """How long saves have held the run up since its last row of metrics."""
    saved_as: str | None = None
    """The checkpoint of checkpoint.dir that holds `state`; None where none does."""

    @property
    def begun(self) -> bool:
        """Whether anything of its first step is done and saved."""
        return self.state.step > 0 or self.step_progress.buffer is not None

    @property
    def finished(self) -> bool:
        train = self.config.train
        return self.state.step >= train.steps or self.state.reached(train.stop_accuracy)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Times a stage of the step under way and shows a bar; yields what advances the bar."""
        heartbeat.enter(name)
        title = f"step {self.state.step + 1}/{self.config.train.steps} {name}"
        with self.step_progress.times.measure(name), self.console.stage(title, total) as progress:
            yield progress


def build(config: Config, inputs: Inputs, console: Console) -> Run:
    """A run of train.py at step 0, with fresh models and nothing written yet. Collective."""
    policy = build_policy(config, config.optimizer, inputs.vocab_size)
    reference = build_reference(config, policy, inputs.vocab_size)
    return assemble(config, inputs, console, policy, reference, config.logging.dir)


def assemble(
    config: Config,
    inputs: Inputs,
    console: Console,
    policy: Policy,
    reference: Reference | None,
    log_dir: str,
) -> Run:
    """The run of these models, with the engine that samples from `policy`."""
    engine = MegatronEngine(policy.model, inputs.tokenizer, config.rollout.max_batch)
    return Run(config, inputs, policy, reference, engine, console, MetricsLog(log_dir))


def evaluate_held_out(run: Run) -> dict[str, float]:
    """Asks the held-out prompts, logs and shows the answer; its part of the step's row. Collective.

    Its accuracy is kept in `run.state`.
    """
    inputs, state = run.inputs, run.state
    heartbeat.enter("evaluation")
    with run.console.stage("evaluation"):
        result = evaluate(
            run.engine, inputs.held_out, inputs.rewards, inputs.response_form, inputs.greedy,
            run.config.evaluation.samples,
        )  # fmt: skip
    state.accuracy = result.accuracy
    run.log.evaluation(state.step, result)
    text = f"held-out accuracy {result.accuracy:.1%}, reward {result.reward:.3f}"
    run.console.say(f"step {state.step}: {text} ({result.count} prompts)")
    return evaluation_row(result)


def own_samples(config: Config) -> int:
    """Responses of one step that this replica samples."""
    return config.rollout.samples_per_step // groups.data_size()
