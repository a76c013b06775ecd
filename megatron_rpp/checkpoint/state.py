"""Saves and loads the state of a run, through Megatron's dist_checkpointing.

A checkpoint is in Megatron's format: each rank writes its shards, and any other TP × PP × DP reads
them. It holds policy and critic, each with its optimizer and schedule, the step and the data position.
There is no random state to save: every random number is a function of seed, step and position
(seeds.py). The tensors of the critic have the same names as those of the policy, after "critic.".

The other files of this room: weights.py and optimizer_state.py are about one model, writer.py writes the
files, store.py keeps the directory of checkpoints and says which one is current.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_rpp.checkpoint.optimizer_state import (
    allocate_moments,
    check_optimizer,
    load_optimizer,
    optimizer_state,
)
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.store import POINTER, newest, require
from megatron_rpp.checkpoint.weights import CRITIC, check_fit, load_model, load_weights, model_state
from megatron_rpp.checkpoint.writer import PendingSave
from megatron_rpp.config import CheckpointConfig
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import SaveFailed
from megatron_rpp.model import overlap
from megatron_rpp.model.language_model import chunks
from megatron_rpp.model.trained_model import TrainedModel

__all__ = ["POINTER", "SaveFailed", "load_weights", "newest", "require", "resume", "save"]


@dataclass(frozen=True)
class _Part:
    """A model in training, and the names of its state in a checkpoint."""

    trained: TrainedModel
    model: str = "model"
    prefix: str = ""
    """Begins the names of its tensors."""
    optimizer: str = "optimizer"
    scheduler: str = "scheduler"
    section: str = "optimizer"
    """The settings of its optimizer."""

    def save(self) -> dict[str, Any]:
        """What a checkpoint holds of it. Collective."""
        overlap.complete_weights(self.trained.model)
        allocate_moments(self.trained.optimizer)  # before the first update there are none
        weights = model_state(self.trained.model, self.prefix)
        return {
            self.model: weights,
            self.optimizer: optimizer_state(self.trained, weights),
            self.scheduler: self.trained.scheduler.state_dict(),
        }

    def load(self, common: dict[str, Any], path: Path) -> None:
        """Restores what `save` returned. Collective."""
        load_model(self.trained.model, path, self.prefix)
        load_optimizer(
            self.trained, common[self.optimizer], path, name=self.optimizer, prefix=self.prefix
        )
        self.trained.scheduler.load_state_dict(common[self.scheduler])


def _parts(policy: TrainedModel, critic: TrainedModel | None) -> list[_Part]:
    parts = [_Part(policy)]
    if critic is not None:
        part = _Part(
            critic, model="critic", prefix=CRITIC, optimizer="critic_optimizer",
            scheduler="critic_scheduler", section="critic.optimizer",
        )  # fmt: skip
        parts.append(part)
    return parts


def resume(policy: TrainedModel, path: Path, *, critic: TrainedModel | None = None) -> RunState:
    """Restores everything that `save` wrote at `path`. Collective.

    Without a critic, that of the checkpoint is left out. Raises ConfigError, on every rank, if the
    checkpoint is of another model or another kind of optimizer, or has no critic.
    """
    heartbeat.enter("resume")
    parts = _parts(policy, critic)
    common: dict[str, Any] = {}
    for part in parts:
        if common and part.optimizer not in common:
            raise ConfigError(
                f"checkpoint {path} has no critic, because algorithm.name was not ppo: start from "
                "its weights alone with model.init_path, or go on with that algorithm"
            )
        common = check_fit(part.trained.model, path, part.prefix)
        check_optimizer(part.trained, common[part.optimizer], path, section=part.section)
    for part in parts:
        part.load(common, path)
    return RunState(**common["run"])


def _nothing_more(directory: Path) -> dict[str, Any]:
    return {}


def save(
    policy: TrainedModel,
    state: RunState,
    settings: CheckpointConfig,
    *,
    critic: TrainedModel | None = None,
    notes: Mapping[str, Any] = MappingProxyType({}),
    suffix: str = "",
    write_more: Callable[[Path], dict[str, Any]] = _nothing_more,
    in_background: bool = False,
) -> PendingSave:
    """Writes a checkpoint of `state` to `settings.dir`; `publish` makes it current. Collective.

    Args:
        critic: the critic of the policy, if there is one.
        notes: JSON values for the manifest. "accuracy" is the held-out accuracy of these weights,
            if they were evaluated.
        suffix: ends the name of a checkpoint that is not of the end of a step.
        write_more: writes more files into the directory (collective) and returns more notes.
        in_background: return as soon as a process of each rank writes the present state.
    Raises:
        SaveFailed: the file system fails; the current checkpoint stays as it is.
    """
    content = {"run": asdict(state), "architecture": chunks(policy.model)[0].architecture}
    for part in _parts(policy, critic):
        content |= part.save()
    pending = PendingSave(settings, f"iter_{state.step:07d}{suffix}", state.step)
    pending.start(content, dict(notes), write_more, in_background=in_background)
    return pending
