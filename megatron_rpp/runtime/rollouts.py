"""The rollouts of a run: those of its step, and with rollout.ahead those of the step after it.

    step s        takes the samples of s, drawn with the weights before the update of step s - 1
                  new weights to the servers: those before the update of step s
                  the samples of s + 1 are begun with them
                  rewards, log-probs, update
    evaluation    waits for the samples of s + 1, then takes the weights after step s

So the samples of every step are one step older than its weights (`rollout/staleness`), except those of
the first step after a start, which nothing was ahead of. A checkpoint has no older weights with which
a resumed run could draw its first samples again: checkpoint.save_rollouts keeps those samples.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from megatron_rpp.parallel import groups
from megatron_rpp.records import StepKey
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.rollout.engine import Abandoned
from megatron_rpp.runtime import step_progress
from megatron_rpp.runtime.run import Run
from megatron_rpp.runtime.step_progress import StepProgress
from megatron_rpp.stages import rollout


def collect(run: Run, progress: Callable[[int], None]) -> tuple[RolloutBuffer, int]:
    """Samples the responses of the step, or takes those that `begin_next` began. Collective.

    Returns this replica's rollouts and their staleness.

    Args:
        progress: called with the number of responses that have been finished since its last call.
    Raises:
        Abandoned: on every rank, if the run was told to stop.
    """
    staleness = int(run.ahead is not None and run.ahead.key == run.step_key)
    if run.ahead is not None and not staleness and run.state.step:
        run.console.log(
            f"step {run.state.step + 1}: no rollouts were drawn ahead; the weights of now draw them"
        )
    return _collect(run, run.step_key, progress), staleness


def _collect(run: Run, key: StepKey, progress: Callable[[int], None]) -> RolloutBuffer:
    assert run.engine is not None
    return rollout.collect(
        run.engine, run.inputs.train, run.inputs.sampling, rollout=run.config.rollout, key=key,
        replica=groups.data_rank(), replicas=groups.data_size(), progress=progress,
        stop=run.stop.told,
    )  # fmt: skip


def begin_next(run: Run) -> None:
    """With rollout.ahead, begins to sample the next step with the weights of now. Collective.

    It does nothing inside the update, whose weights are of no step; after the last step; and if the
    samples of the next step were kept. Raises Abandoned, on every rank, if the run was told to stop.
    """
    step = run.state.step + 1
    if run.ahead is None or run.step_progress.minibatches or step == run.config.train.steps:
        return
    settings, inputs = run.config.rollout, run.inputs
    key = StepKey(run.config.seed, step, run.state.prompts_seen + settings.prompts_per_step)
    if run.config.checkpoint.save_rollouts and _kept(run, key):
        return
    with run.stage("rollout"):
        _, requests = rollout.requests_of(
            inputs.train, settings, key, replica=groups.data_rank(), replicas=groups.data_size()
        )
        run.ahead.begin(requests, inputs.sampling, key, stop=run.stop.told)


def _kept(run: Run, key: StepKey) -> bool:
    found = step_progress.load_rollouts(config=run.config, inputs=run.inputs, key=key)
    return found.buffer is not None


def keep(run: Run, *, wait: bool) -> None:
    """Before a save: keeps the samples that were begun with weights that the checkpoint will not have.
    Collective.

    With checkpoint.save_rollouts they are written to the disk, from which their step reads them, now
    or after a resume. Otherwise they stay in memory, and a resumed run draws others.

    Args:
        wait: wait for samples that are not finished, unless the run is told to stop. If not, they
            are given up, because the run ends.
    """
    ahead = run.ahead
    if ahead is None or ahead.key is None:
        return
    key, kept = ahead.key, False
    if run.config.checkpoint.save_rollouts and (wait or ahead.finished()):
        with suppress(Abandoned):
            _write(run, key)
            kept = True
    if kept or wait and not run.config.checkpoint.save_rollouts:
        return
    ahead.give_up()
    run.console.log(
        f"the rollouts of step {key.step + 1}, drawn ahead, are not kept: a resumed run draws them "
        "with the weights of then"
    )


def _write(run: Run, key: StepKey) -> None:
    """Waits for the samples of step `key` and writes them. Raises Abandoned, on every rank."""
    found = StepProgress(staleness=1)
    with found.times.measure("rollout"):
        found.buffer = _collect(run, key, lambda finished: None)
    step_progress.save_rollouts(found, "rollout", config=run.config, inputs=run.inputs, key=key)


def end(run: Run) -> None:
    """Abandons what was begun. Not collective."""
    if run.ahead is not None:
        run.ahead.give_up()
