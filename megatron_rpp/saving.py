"""How a run saves, resumes, and stops where it is told to."""

from __future__ import annotations

from pathlib import Path

from megatron_rpp import checkpoint, sealing, underway
from megatron_rpp.checkpoint_store import Unpublished
from megatron_rpp.failures import PREEMPTED, RunFailure
from megatron_rpp.metrics import StageTimes
from megatron_rpp.run import Run
from megatron_rpp.run_state import due
from megatron_rpp.underway import Underway


class Preempted(RunFailure):
    """Told to stop; everything is saved, and the same command goes on."""

    exit_code = PREEMPTED


def resume(run: Run, repair: bool) -> None:
    """Continues from what checkpoint.dir holds, else from checkpoint.load, else at step 0.

    repair: set damaged checkpoints of checkpoint.dir aside.
    """
    policy, settings, say = run.policy, run.config.checkpoint, run.console.say
    path = checkpoint.newest(settings.dir, say, repair)
    if path is not None:
        run.saved_as = path.name
    elif settings.load is not None:
        path = checkpoint.require(settings.load, say)
    else:
        return
    run.state = checkpoint.resume(policy.model, policy.optimizer, policy.scheduler, path)
    manifest = sealing.gathered(sealing.read_manifest(path))[0]
    if manifest is not None and "underway" in manifest["notes"]:
        begun = underway.read(
            path, manifest["notes"]["underway"], run.config, run.inputs.train, run.state
        )
        if begun is None:
            say(f"the data has other prompts than {path}: step {run.state.step + 1} is begun anew")
        else:
            run.underway = begun


def begin_step(run: Run) -> Underway:
    """The step under way: restored by `resume`, or with its kept rollouts, or new. Collective."""
    if run.underway.buffer is None and run.config.checkpoint.save_rollouts:
        run.underway = underway.kept(run.config, run.inputs.train, run.state)
    return run.underway


def keep(run: Run, stage: str) -> None:
    """After a stage whose work is worth keeping: keeps it if asked to, and is a safe point."""
    underway.keep(run.underway, run.config, run.inputs.train, run.state, stage)
    pause_inside_step(run)


def write_if_due(run: Run, row: dict[str, float]) -> tuple[Unpublished | None, float]:
    """After the last step and every checkpoint.interval steps a checkpoint, not yet in force; and
    the seconds it took. Collective."""
    times = StageTimes()
    if not run.finished and not due(run.state.step, run.config.checkpoint.interval):
        return None, 0.0
    with times.measure("checkpoint"), run.console.stage("checkpoint"):
        written = _write(run, {"accuracy": row.get("eval/accuracy")})
    return written, times.seconds["checkpoint"]


def publish(run: Run, written: Unpublished) -> None:
    """Puts a checkpoint in force; the rollouts kept for its steps go. Collective."""
    run.saved_as = written.publish().name
    underway.forget(run.config, before=run.state.step)


def ensure(run: Run) -> None:
    """The run as it is, between steps, is in checkpoint.dir. Collective."""
    if run.saved_as is None:
        publish(run, _write(run, {}))


def _write(run: Run, notes: dict, **inside) -> Unpublished:
    policy = run.policy
    return checkpoint.write(
        run.config.checkpoint, policy.model, policy.optimizer, policy.scheduler, run.state, notes,
        **inside,
    )  # fmt: skip


def pause(run: Run) -> None:
    """A safe point between steps: where any rank was told to stop, all save and stop. Collective.

    Raises Preempted.
    """
    if run.saved_as is None and run.underway.buffer is not None:
        return pause_inside_step(run)  # resumed from inside a step of another directory
    reason = run.stop.requested()
    if reason is None:
        return
    if run.state.step:
        ensure(run)
    raise Preempted(f"{reason}: saved after step {run.state.step}; the same command goes on")


def pause_inside_step(run: Run) -> None:
    """A safe point inside a step: the rollouts so far and the place in the update are saved too.

    Raises Preempted.
    """
    reason = run.stop.requested()
    if reason is None:
        return
    name = f"iter_{run.state.step:07d}_{run.underway.place}"

    def fill(directory: Path) -> dict:
        prompts = run.inputs.train
        return {"underway": underway.write(run.underway, directory, run.config, prompts, run.state)}

    if run.saved_as != name:  # else it was stopped where it had just resumed
        publish(run, _write(run, {}, suffix=f"_{run.underway.place}", fill=fill))
    raise Preempted(
        f"{reason}: saved in step {run.state.step + 1} after {run.underway.update.done} "
        f"mini-batches; the same command goes on"
    )
