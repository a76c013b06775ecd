"""How a run saves, resumes, and stops where it is told to."""

from __future__ import annotations

from pathlib import Path

from megatron_rpp.checkpoint import manifest
from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.run_state import due
from megatron_rpp.lifecycle.exit_codes import PREEMPTED, RunFailure
from megatron_rpp.parallel import groups, ranks
from megatron_rpp.runtime import identity, step_progress
from megatron_rpp.runtime.run import Run, evaluate_held_out
from megatron_rpp.runtime.step_progress import StepProgress


class Preempted(RunFailure):
    """Told to stop; everything is saved, and the same command goes on."""

    exit_code = PREEMPTED


def resume(run: Run, repair: bool) -> None:
    """Continues from what checkpoint.dir holds, else from checkpoint.load, else at step 0.
    Collective.

    Where the data is other than the checkpoint's, it begins at its start; any difference is said.

    repair: set damaged checkpoints of checkpoint.dir aside.
    """
    policy, settings, say = run.policy, run.config.checkpoint, run.console.say
    own = identity.identities(run.config, run.inputs) if groups.is_main() else None
    now = groups.broadcast_object(own)
    run.state.identity = identity.recorded(now)
    path = checkpoint.newest(settings.dir, say, repair)
    if path is not None:
        run.saved_as = path.name
    elif settings.load is not None:
        path = checkpoint.require(settings.load, say)
    else:
        return
    state = checkpoint.resume(policy.model, policy.optimizer, policy.scheduler, path)
    run.state = identity.carry_over(state, now, path, say)
    content = ranks.gathered(manifest.read_manifest(path))[0]
    if content is not None and "underway" in content["notes"]:
        begun = step_progress.read(
            path, content["notes"]["underway"], run.config, run.inputs.train, run.state
        )
        if begun is None:
            say(f"the data has other prompts than {path}: step {run.state.step + 1} is begun anew")
        else:
            run.step_progress = begun


def begin_step(run: Run) -> StepProgress:
    """The step under way: restored by `resume`, or with its kept rollouts, or new. Collective."""
    if run.step_progress.buffer is None and run.config.checkpoint.save_rollouts:
        run.step_progress = step_progress.kept(run.config, run.inputs.train, run.state)
    return run.step_progress


def keep(run: Run, stage: str) -> None:
    """After a stage whose work is worth keeping: keeps it if asked to, and is a safe point."""
    step_progress.keep(run.step_progress, run.config, run.inputs.train, run.state, stage)
    stop_if_requested_inside_step(run)


def finish_step(run: Run, row: dict[str, float]) -> None:
    """Ends the step that `run.state` counts: evaluation and checkpoint where they are due, its row.
    Collective."""
    step, config = run.state.step, run.config
    if step == config.train.steps or due(step, config.evaluation.interval):
        row |= evaluate_held_out(run)
    row["time/checkpoint"] = write_if_due(run, row)
    # The row before the checkpoint is in force: a kill between them repeats the step, row and all,
    # while the other order would lose the row.
    run.log.step(step, row)
    publish_if_written(run)


def write_if_due(run: Run, row: dict[str, float]) -> float:
    """After the last step and every checkpoint.interval steps a checkpoint, not yet in force; and
    the seconds that saves have held the run up since the last step. Collective."""
    if run.finished or due(run.state.step, run.config.checkpoint.interval):
        with run.saves.measure("checkpoint"), run.console.stage("checkpoint"):
            finish(run)
            background = run.config.checkpoint.async_save and not run.finished
            _write(run, {"accuracy": row.get("eval/accuracy")}, in_background=background)
    return run.saves.seconds.pop("checkpoint", 0.0)


def publish_if_written(run: Run) -> None:
    """Puts a checkpoint in force whose writing is over. Collective."""
    with run.saves.measure("checkpoint"):
        if run.writing is not None and run.writing.written(wait=False):
            finish(run)


def finish(run: Run) -> None:
    """Waits for the checkpoint that is being written, if any, and puts it in force; the rollouts
    kept for its steps go. Collective."""
    if run.writing is None:
        return
    writing, run.writing = run.writing, None
    path = writing.publish()
    if writing.step == run.state.step:
        run.saved_as = path.name
    step_progress.forget(run.config, before=writing.step)


def ensure(run: Run) -> None:
    """The run as it is, between steps, is in checkpoint.dir. Collective."""
    finish(run)
    if run.saved_as is None:
        _write(run, {})
        finish(run)


def _write(run: Run, notes: dict, **how) -> None:
    policy = run.policy
    run.writing = checkpoint.write(
        run.config.checkpoint, policy.model, policy.optimizer, policy.scheduler, run.state, notes,
        **how,
    )  # fmt: skip


def stop_if_requested(run: Run) -> None:
    """A safe point between steps: where any rank was told to stop, all save and stop. Collective.

    Raises Preempted.
    """
    if run.saved_as is None and run.step_progress.buffer is not None:
        return stop_if_requested_inside_step(run)  # resumed from inside a step of another directory
    reason = run.stop.requested()
    if reason is None:
        return
    if run.state.step:
        ensure(run)
    raise Preempted(f"{reason}: saved after step {run.state.step}; the same command goes on")


def stop_if_requested_inside_step(run: Run) -> None:
    """A safe point inside a step: the rollouts so far and the place in the update are saved too.

    Raises Preempted.
    """
    reason = run.stop.requested()
    if reason is None:
        return
    name = f"iter_{run.state.step:07d}_{run.step_progress.place}"

    def fill(directory: Path) -> dict:
        prompts = run.inputs.train
        return {"underway": step_progress.write(run.step_progress, directory, run.config, prompts, run.state)}

    if run.saved_as != name:  # else it was stopped where it had just resumed
        finish(run)
        _write(run, {}, suffix=f"_{run.step_progress.place}", fill=fill)
        finish(run)
    raise Preempted(
        f"{reason}: saved in step {run.state.step + 1} after {run.step_progress.update.done} "
        f"mini-batches; the same command goes on"
    )
