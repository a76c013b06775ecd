"""The progress of a step, and the two places on the disk where it is saved.

    <checkpoint.dir>/iter_0000003_minibatch_0002/rollouts/   in a checkpoint that a preemption made
                                        inside step 4, with the weights of that moment
                                        (or iter_..._done_1_rollout, iter_..._done_2_reward)
    <checkpoint.dir>/rollouts/step_0000003_reward/           checkpoint.save_rollouts: for a kill;
                                        the steps since the last checkpoint are repeated and give
                                        the same weights

Both have a manifest (manifest.py). Saved rollouts are deleted when a checkpoint of a later step is
current. They are loaded only if settings and prompts are the same as when they were saved.
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
from megatron_rpp.config import (
    CheckpointConfig,
    Config,
    LoggingConfig,
    ParallelConfig,
    RewardModelConfig,
    SftConfig,
)
from megatron_rpp.data.prompts import PromptSet
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.atomic_files import sync_directory, this_process
from megatron_rpp.lifecycle.exit_codes import SaveFailed
from megatron_rpp.parallel import groups, ranks
from megatron_rpp.records import StepKey
from megatron_rpp.reporting.metrics import StageTimes
from megatron_rpp.rewards import Scores
from megatron_rpp.rollout import storage
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.rollout.planning import shard
from megatron_rpp.runtime.inputs import Inputs
from megatron_rpp.stages.minibatches import UpdateProgress

ROLLOUTS = "rollouts"
STAGES = ("rollout", "reward")
"""The stages after which rollouts are saved, in order."""


@dataclass
class StepProgress:
    """What the stages of a step have produced so far."""

    buffer: RolloutBuffer | None = None
    """None before the rollout. A column is None until its stage is done."""
    scores: Scores | None = None
    """Scores of this replica's samples; None before the reward stage."""
    update: UpdateProgress = field(default_factory=UpdateProgress)
    critic: UpdateProgress = field(default_factory=UpdateProgress)
    """Of the critic's update, which comes before that of the policy."""
    times: StageTimes = field(default_factory=StageTimes)
    staleness: int = 0
    """Updated steps between the weights that sampled the rollouts and those of the step."""
    supervised: dict[str, float] | None = None
    """The metrics of a step of sft.py or reward_model.py whose update is done; None before it, and in
    train.py."""

    @property
    def begun(self) -> bool:
        """Whether there is anything of the step to save."""
        return self.buffer is not None or self.supervised is not None

    @property
    def minibatches(self) -> int:
        """Mini-batches whose update is done, of critic and policy; a supervised step has one."""
        return self.critic.done + self.update.done if self.supervised is None else 1

    @property
    def suffix(self) -> str:
        """How far the step has come at a safe point, for the name of a checkpoint.

        The names sort by progress. No two safe points share a name, so a save never replaces the
        current checkpoint.
        """
        if not self.begun:
            return ""
        if self.buffer is not None and self.scores is None:
            return "_done_1_rollout"
        if self.buffer is not None and self.buffer.old_logprobs is None:
            return "_done_2_reward"
        return f"_minibatch_{self.minibatches:04d}"


def save(
    progress: StepProgress, directory: Path, *, config: Config, inputs: Inputs, key: StepKey
) -> dict[str, Any]:
    """Writes the rollouts, one file per replica, and returns the rest as JSON values. Collective.

    Raises OSError, on every rank, if the file system fails on any.
    """
    if progress.supervised is not None:  # its batch is not needed again
        return {"supervised": progress.supervised}
    folder = directory / ROLLOUTS

    def save_shard() -> None:
        if groups.is_replica_leader():
            assert progress.buffer is not None
            path = folder / f"replica_{groups.data_rank():05d}.safetensors"
            storage.save(progress.buffer, progress.scores, path)

    ranks.on_main_rank(folder.mkdir)
    ranks.on_every_rank(save_shard)
    digest = ranks.on_main_rank(partial(_prompts_digest, config, inputs.train, key))
    return {
        "update": asdict(progress.update), "critic": asdict(progress.critic), "prompts": digest,
        "seconds": progress.times.seconds, "staleness": progress.staleness,
    }  # fmt: skip


def load(
    directory: Path, notes: dict[str, Any], *, config: Config, inputs: Inputs, key: StepKey
) -> StepProgress | None:
    """Loads this replica's samples of what `save` wrote. Collective.

    Returns None if the prompts of the step are no longer those of the rollouts.

    Args:
        notes: what `save` returned.
    """
    if "supervised" in notes:
        return StepProgress(supervised=notes["supervised"])
    if notes["prompts"] != ranks.on_main_rank(partial(_prompts_digest, config, inputs.train, key)):
        return None
    rollout, prompts = config.rollout, inputs.train
    rows = prompts.order(key.prompts_seen, rollout.prompts_per_step, key.seed)
    positions = shard(rollout.prompts_per_step, groups.data_rank(), groups.data_size())
    each = rollout.samples_per_prompt
    samples = range(positions.start * each, positions.stop * each)
    paths = sorted((directory / ROLLOUTS).glob("*.safetensors"))
    chosen = [prompts[rows[position]] for position in positions for _ in range(each)]
    buffer, scores = storage.load(paths, samples, chosen)
    # Earlier versions had no critic, and sampled every step with its own weights.
    return StepProgress(
        buffer, scores, UpdateProgress(**notes["update"]),
        UpdateProgress(**notes.get("critic", {})), StageTimes(notes["seconds"]),
        notes.get("staleness", 0),
    )  # fmt: skip


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _prompts_digest(config: Config, prompts: PromptSet, key: StepKey) -> str:
    """Digest of the step's prompts as the model and the rewards see them, whatever their files."""
    rows = prompts.order(key.prompts_seen, config.rollout.prompts_per_step, key.seed)
    return _digest([asdict(prompts[row]) for row in rows])


def fingerprint(config: Config, inputs: Inputs, key: StepKey) -> str:
    """Digest of the settings and reward models that the rollouts of a step and their scores depend on;
    the layout is none of them."""
    relevant = replace(
        config,
        parallel=ParallelConfig(),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        sft=SftConfig(),
        reward_model=RewardModelConfig(),
        train=replace(
            config.train,
            steps=1,
            stop_accuracy=None,
            exit_duration_minutes=None,
            hang_timeout_minutes=None,
        ),  # fmt: skip
    )
    models = [source.digest for source in inputs.reward_models]
    return _digest([asdict(relevant), models, key.step, key.prompts_seen])


def _folder(config: Config) -> Path:
    return Path(config.checkpoint.dir) / ROLLOUTS


def save_rollouts(
    progress: StepProgress, stage: str, *, config: Config, inputs: Inputs, key: StepKey
) -> None:
    """Saves the rollouts after `stage` to <checkpoint.dir>/rollouts, for a resume after a kill.

    Collective. Raises SaveFailed, on every rank: a user who asked for saved rollouts should not
    learn after a kill that there are none.
    """
    heartbeat.enter("save rollouts")
    final = _folder(config) / f"step_{key.step:07d}_{stage}"
    temporary = final.with_name(f".saving_{final.name}_{groups.broadcast_object(this_process())}")
    try:
        ranks.on_main_rank(partial(_make_anew, temporary))
        notes = save(progress, temporary, config=config, inputs=inputs, key=key)
        notes["fingerprint"] = fingerprint(config, inputs, key)
        manifest.write_manifest(temporary, notes)
        ranks.on_main_rank(partial(_replace, temporary, final))
    except OSError as error:
        if groups.is_main():
            shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
        raise SaveFailed(
            f"the rollouts of step {key.step + 1} could not be written to {_folder(config)}: "
            f"{error}. The checkpoints are as they were: make room (or repair the file system, or "
            f"switch checkpoint.save_rollouts off) and run again"
        ) from error


def _make_anew(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)  # left by a killed process with this id
    directory.mkdir(parents=True)


def _replace(temporary: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_directory(final.parent)


def load_rollouts(*, config: Config, inputs: Inputs, key: StepKey) -> StepProgress:
    """Loads what `save_rollouts` saved of a step; if there is nothing, no progress. Collective."""
    for stage in reversed(STAGES):
        path = _folder(config) / f"step_{key.step:07d}_{stage}"
        if not ranks.gathered(path.exists())[0] or manifest.damage(path) is not None:
            continue
        notes = ranks.gathered(manifest.read_manifest(path))[0]["notes"]
        if notes["fingerprint"] == fingerprint(config, inputs, key):
            found = load(path, notes, config=config, inputs=inputs, key=key)
            return found or StepProgress()
    return StepProgress()


def delete_rollouts(config: Config, *, before: int) -> None:
    """Deletes the saved rollouts of the steps before step `before`."""
    folder = _folder(config)
    if not groups.is_main() or not folder.exists():
        return
    for path in (*folder.glob("step_*"), *folder.glob(".saving_*")):
        number = path.name.split("step_")[1][:7]
        if int(number) < before:
            shutil.rmtree(path)
    if not any(folder.iterdir()):
        folder.rmdir()
