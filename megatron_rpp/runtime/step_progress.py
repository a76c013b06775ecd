"""The step under way, and its two places on the disk.

    <checkpoint.dir>/iter_0000003_minibatch_0002/rollouts/   in a checkpoint that a preemption made
                                        inside step 4: the weights as they are, and what is here
                                        (or iter_..._done_1_rollout, iter_..._done_2_reward)
    <checkpoint.dir>/rollouts/step_0000003_reward/           checkpoint.save_rollouts: for a kill;
                                        the weights are those that the steps before it make again

Both are sealed (manifest.py). Kept rollouts stay until a checkpoint has their step behind it. They
serve only the run that made them: another recipe, or other prompts, and they are left out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rpp.checkpoint import manifest
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import CheckpointConfig, Config, LoggingConfig, ParallelConfig, SftConfig
from megatron_rpp.data.prompts import PromptSet
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.atomic_files import sync_directory, this_process
from megatron_rpp.lifecycle.exit_codes import SaveFailed
from megatron_rpp.parallel import groups, ranks
from megatron_rpp.reporting.metrics import StageTimes
from megatron_rpp.rewards import Scores
from megatron_rpp.rollout import storage
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.stages.rollout import shard
from megatron_rpp.stages.update import UpdateProgress

ROLLOUTS = "rollouts"
STAGES = ("rollout", "reward")
"""After which rollouts are kept, in this order."""


@dataclass
class StepProgress:
    """What the stages of a step have made so far."""

    buffer: RolloutBuffer | None = None
    """None before the rollout; a column that is None is of a stage to come."""
    scores: Scores | None = None
    """Of this replica's samples; None before the reward."""
    update: UpdateProgress = field(default_factory=UpdateProgress)
    times: StageTimes = field(default_factory=StageTimes)

    @property
    def place(self) -> str:
        """How far the step has come at a safe point, for a checkpoint's name; sorts by progress.

        No two places share a name, so a save never replaces the checkpoint in force.
        """
        if self.scores is None:
            return "done_1_rollout"
        if self.buffer.old_logprobs is None:
            return "done_2_reward"
        return f"minibatch_{self.update.done:04d}"


def write(
    work: StepProgress, directory: Path, config: Config, prompts: PromptSet, state: RunState
) -> dict[str, Any]:
    """Writes the rollouts, one file a replica, and returns the rest as JSON values. Collective.

    Raises OSError, on every rank, where the disk of any does not take them.
    """
    folder = directory / ROLLOUTS

    def save() -> None:
        if groups.is_replica_leader():
            path = folder / f"replica_{groups.data_rank():05d}.safetensors"
            storage.save(work.buffer, work.scores, path)

    ranks.on_main_rank(folder.mkdir)
    ranks.on_every_rank(save)
    digest = ranks.on_main_rank(partial(_prompts_digest, config, prompts, state))
    return {"update": asdict(work.update), "seconds": work.times.seconds, "prompts": digest}


def read(
    directory: Path, notes: dict[str, Any], config: Config, prompts: PromptSet, state: RunState
) -> StepProgress | None:
    """What `write` wrote, this replica's samples of it. Collective.

    None where the data no longer holds the prompts of these rollouts.
    """
    if notes["prompts"] != ranks.on_main_rank(partial(_prompts_digest, config, prompts, state)):
        return None
    rollout = config.rollout
    rows = prompts.order(state.prompts_seen, rollout.prompts_per_step, config.seed)
    own = shard(rollout.prompts_per_step, groups.data_rank(), groups.data_size())
    each = rollout.samples_per_prompt
    samples = range(own.start * each, own.stop * each)
    paths = sorted((directory / ROLLOUTS).glob("*.safetensors"))
    chosen = [prompts[rows[position]] for position in own for _ in range(each)]
    buffer, scores = storage.load(paths, samples, chosen)
    return StepProgress(buffer, scores, UpdateProgress(**notes["update"]), StageTimes(notes["seconds"]))


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _prompts_digest(config: Config, prompts: PromptSet, state: RunState) -> str:
    """Of the step's prompts as the model and the rewards see them, not of where they lie."""
    rows = prompts.order(state.prompts_seen, config.rollout.prompts_per_step, config.seed)
    return _digest([asdict(prompts[row]) for row in rows])


def _fingerprint(config: Config, state: RunState) -> str:
    """Of all settings that the rollouts of a step depend on; the layout is not among them."""
    relevant = replace(
        config,
        parallel=ParallelConfig(),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        sft=SftConfig(),
        train=replace(
            config.train, steps=1, stop_accuracy=None, exit_duration_minutes=None,
            hang_timeout_minutes=None,
        ),  # fmt: skip
    )
    return _digest([asdict(relevant), state.step, state.prompts_seen])


def _folder(config: Config) -> Path:
    return Path(config.checkpoint.dir) / ROLLOUTS


def keep(
    work: StepProgress, config: Config, prompts: PromptSet, state: RunState, stage: str
) -> None:
    """Keeps the rollouts after `stage` where checkpoint.save_rollouts is on. Collective.

    Raises SaveFailed, on every rank: who asked for them to be kept would not want to learn after a
    kill that they were not.
    """
    if not config.checkpoint.save_rollouts:
        return
    heartbeat.enter("keep rollouts")
    final = _folder(config) / f"step_{state.step:07d}_{stage}"
    temporary = final.with_name(f".saving_{final.name}_{groups.broadcast_object(this_process())}")
    try:
        ranks.on_main_rank(partial(_make_anew, temporary))
        notes = write(work, temporary, config, prompts, state)
        manifest.seal(temporary, notes | {"fingerprint": _fingerprint(config, state)})
        ranks.on_main_rank(partial(_replace, temporary, final))
    except OSError as error:
        if groups.is_main():
            shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
        raise SaveFailed(
            f"the rollouts of step {state.step + 1} could not be kept in {_folder(config)}: "
            f"{error}. The checkpoints are as they were: make room (or repair the file system, or "
            f"switch checkpoint.save_rollouts off) and run again"
        ) from error


def _make_anew(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)  # of a killed run that had the same name
    directory.mkdir(parents=True)


def _replace(temporary: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_directory(final.parent)


def kept(config: Config, prompts: PromptSet, state: RunState) -> StepProgress:
    """The kept rollouts of the step to come, else a step with nothing done. Collective."""
    for stage in reversed(STAGES):
        path = _folder(config) / f"step_{state.step:07d}_{stage}"
        if not ranks.gathered(path.exists())[0] or manifest.damage(path) is not None:
            continue
        notes = ranks.gathered(manifest.read_manifest(path))[0]["notes"]
        if notes["fingerprint"] == _fingerprint(config, state):
            return read(path, notes, config, prompts, state) or StepProgress()
    return StepProgress()


def forget(config: Config, before: int) -> None:
    """Removes the kept rollouts of the steps before `before`, which a checkpoint has behind it."""
    folder = _folder(config)
    if not groups.is_main() or not folder.exists():
        return
    for path in (*folder.glob("step_*"), *folder.glob(".saving_*")):
        number = path.name.split("step_")[1][:7]
        if int(number) < before:
            shutil.rmtree(path)
    if not any(folder.iterdir()):
        folder.rmdir()
