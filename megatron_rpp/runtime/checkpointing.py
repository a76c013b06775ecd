"""How a run saves, resumes, and stops early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_rpp.checkpoint import manifest
from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.run_state import due
from megatron_rpp.lifecycle.exit_codes import PREEMPTED, RunFailure
from megatron_rpp.parallel import groups, ranks
from megatron_rpp.runtime import identity, rollouts, step_progress
from megatron_rpp.runtime.run import Run, evaluate_held_out
from megatron_rpp.runtime.step_progress import StepProgress

Told = Callable[[], bool]
"""Tells whether any rank has a reason to stop (stop_request.py)."""
Evaluate = Callable[[Run, int, Told], dict[str, float]]
"""Evaluates the model after so many steps and returns metrics; abandons that if told to stop."""
_PROGRESS = "underway"
"""Where the manifest of a checkpoint inside a step has the progress of that step."""


class Preempted(RunFailure):
    """The run was asked to stop. Everything is saved, and the same command continues it."""

    exit_code = PREEMPTED


def resume(run: Run, *, repair: bool) -> None:
    """Continues from checkpoint.dir, or else from checkpoint.load, or else starts at step 0.

    Collective. Logs what has changed since the checkpoint. If the training data has, it starts from
    the beginning.

    Args:
        repair: rename damaged checkpoints of checkpoint.dir.
    """
    settings, log = run.config.checkpoint, run.console.log
    found = identity.identities(run.config, run.inputs) if groups.is_main() else None
    now = groups.broadcast_object(found)
    run.state.identity = identity.recorded(now)
    path = checkpoint.newest(settings.dir, log, repair)
    if path is not None:
        run.saves.current = path.name
    elif settings.load is not None:
        path = checkpoint.require(settings.load, log)
    else:
        return
    state = checkpoint.resume(run.policy, path, critic=run.critic)
    run.state = identity.carry_over(state, now, path, log=log)
    content = ranks.gathered(manifest.read_manifest(path))[0]
    if content is not None and _PROGRESS in content["notes"]:
        notes = content["notes"][_PROGRESS]
        progress = step_progress.load(
            path, notes, config=run.config, inputs=run.inputs, key=run.step_key
        )
        if progress is None:
            log(f"the data has other prompts than {path}: step {state.step + 1} starts over")
        else:
            run.step_progress = progress


def begin_step(run: Run) -> StepProgress:
    """The progress of the step: what `resume` or saved rollouts restored, or none. Collective."""
    if run.step_progress.buffer is None:
        run.step_progress = StepProgress()  # `resume` may have read one of sft.py
        if run.config.checkpoint.save_rollouts:
            run.step_progress = step_progress.load_rollouts(
                config=run.config, inputs=run.inputs, key=run.step_key
            )
    return run.step_progress


def finish_stage(run: Run, stage: str) -> None:
    """Ends the stage rollout or reward: saves the rollouts if asked to; a safe point. Collective."""
    if run.config.checkpoint.save_rollouts:
        step_progress.save_rollouts(
            run.step_progress, stage, config=run.config, inputs=run.inputs, key=run.step_key
        )
    stop_if_requested(run)


def evaluate_if_due(run: Run, evaluate: Evaluate = evaluate_held_out) -> dict[str, float]:
    """Evaluates the model after the updates of a step if it is due; returns metrics. Collective.

    Raises Abandoned, on every rank, if the run was told to stop. For then it comes before the step
    counts as finished: the run is still inside the step, after its last mini-batch, and a resumed run
    evaluates again.
    """
    step, config = run.state.step + 1, run.config
    if step == config.train.steps or due(step, config.evaluation.interval):
        return evaluate(run, step, run.stop.told)
    return {}


def finish_step(run: Run, row: dict[str, float]) -> None:
    """Ends a step that `run.state` counts: saves if due, logs its row. Collective."""
    save_if_due(run, row)
    row["time/checkpoint"] = run.saves.take_stall_seconds()
    # The row is written before the checkpoint becomes current. A kill in between repeats the step
    # and its row; in the other order, it would lose the row.
    run.metrics.step(run.state.step, row)
    publish_if_written(run)


def save_if_due(run: Run, row: dict[str, float]) -> None:
    """Saves after the last step and every checkpoint.interval steps. Collective.

    The checkpoint becomes current later, in `publish_if_written` or `publish`.
    """
    if run.finished or due(run.state.step, run.config.checkpoint.interval):
        with run.saves.stalling(), run.console.stage("checkpoint"):
            publish(run)
            rollouts.keep(run, wait=True)
            background = run.config.checkpoint.async_save and not run.finished
            _save(run, {"accuracy": row.get("eval/accuracy")}, in_background=background)


def publish_if_written(run: Run) -> None:
    """Makes the pending checkpoint current if it is written. Collective."""
    with run.saves.stalling():
        if run.saves.pending is not None and run.saves.pending.written(wait=False):
            publish(run)


def publish(run: Run) -> None:
    """Waits for the pending checkpoint, if any, and makes it current. Collective.

    Deletes the saved rollouts of the steps that it has behind it.
    """
    pending, run.saves.pending = run.saves.pending, None
    if pending is not None:
        run.saves.current = pending.publish().name
        step_progress.delete_rollouts(run.config, before=pending.step)


def ensure_saved(run: Run) -> None:
    """Saves the run at this safe point, if the current checkpoint is not of it. Collective."""
    publish(run)
    if run.saves.current != f"iter_{run.state.step:07d}{run.step_progress.suffix}":
        _save(run)
        publish(run)


def _save(
    run: Run, notes: Mapping[str, Any] = MappingProxyType({}), *, in_background: bool = False
) -> None:
    """Saves the run at a safe point, between two steps or inside one."""

    def save_progress(directory: Path) -> dict[str, Any]:
        if not run.step_progress.begun:
            return {}
        saved = step_progress.save(
            run.step_progress, directory, config=run.config, inputs=run.inputs,
            key=run.step_key,
        )  # fmt: skip
        return {_PROGRESS: saved}

    run.saves.pending = checkpoint.save(
        run.policy, run.state, run.config.checkpoint, critic=run.critic, notes=notes,
        suffix=run.step_progress.suffix, write_more=save_progress, in_background=in_background,
    )  # fmt: skip


def stop_if_requested(run: Run) -> None:
    """A safe point: if any rank was asked to stop, all ranks save and stop. Collective.

    Raises Preempted.
    """
    reason = run.stop.requested()
    if reason is None:
        return
    rollouts.keep(run, wait=False)
    if run.started:
        ensure_saved(run)
    step, progress = run.state.step, run.step_progress
    place = f"after step {step}"
    if progress.begun:
        place = f"in step {step + 1} after {progress.minibatches} mini-batches"
    raise Preempted(f"{reason}: saved {place}; the same command goes on")
