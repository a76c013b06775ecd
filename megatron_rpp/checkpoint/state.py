"""Saves and loads the state of a run, through Megatron's dist_checkpointing.

A checkpoint is in Megatron's format: each rank writes its shards, and any other TP × PP × DP reads
them. It holds policy, optimizer, schedule, step and data position. There is no random state to save:
every random number is a function of seed, step and position (seeds.py).

The other files of this room: writer.py writes the files, store.py keeps the directory of
checkpoints and says which one is current.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import ReadItem

from megatron_rpp.checkpoint.optimizer_shards import optimizer_shards
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.store import POINTER, newest, require
from megatron_rpp.checkpoint.writer import PendingSave
from megatron_rpp.config import CheckpointConfig
from megatron_rpp.config.model import NOT_COMPARED
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.config_error import ConfigError, reading
from megatron_rpp.lifecycle.exit_codes import SaveFailed
from megatron_rpp.model import overlap
from megatron_rpp.model.language_model import chunks
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)
from megatron_rpp.parallel import groups

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
)
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

__all__ = ["POINTER", "SaveFailed", "load_weights", "newest", "require", "resume", "save"]

_SHARDING = "param_state_sharding_type"
"""Megatron's name for the format of a distributed optimizer; other optimizers have none."""


def _model_state(model: torch.nn.Module) -> dict:
    """The sharded state by chunk. The keys of the tensors count layers in the whole model."""
    return {
        f"chunk{number}": chunk.sharded_state_dict(metadata={})
        for number, chunk in enumerate(chunks(model))
    }


def _check_fit(model: torch.nn.Module, path: Path) -> dict:
    """Returns what the checkpoint at `path` holds besides tensors. Collective.

    Raises ConfigError, on every rank, if it is of another model.
    """
    with reading(f"checkpoint {path}", "choose another"):
        stored = dist_checkpointing.load_tensors_metadata(str(path))
        common = dist_checkpointing.load_common_state_dict(str(path))
    # A checkpoint of another program has no such record; then only shapes are compared.
    theirs = common.get("architecture", {})
    own = _model_state(model)
    apply_factories(own)
    problems = [
        f"{name} is {theirs[name]} there, {value} here"
        for name, value in chunks(model)[0].architecture.items()
        if name not in NOT_COMPARED and theirs.get(name, value) != value
    ]
    for entry in nested_values(own):
        if not isinstance(entry, ShardedTensor) or entry.allow_shape_mismatch:
            continue
        found = stored.get(entry.key)
        if found is None:
            problems.append(f"{entry.key} is not in it")
        elif found.global_shape != entry.global_shape:
            shapes = f"{list(found.global_shape)} there, {list(entry.global_shape)} here"
            problems.append(f"{entry.key} is {shapes}")
    for found in groups.gather_objects(problems[:3], dist.group.WORLD):
        if found:
            raise ConfigError(
                f"checkpoint {path} does not fit the model: {'; '.join(found)}. "
                f"Set the model section to the shape it was saved with, or load another"
            )
    return common


@contextmanager
def _signs_of_life() -> Iterator[None]:
    """Gives a sign of life for each tensor that is loaded in the context.

    Megatron makes the planner itself, which torch calls after each tensor that it has read.
    """
    original = MCoreLoadPlanner.commit_tensor

    def commit_tensor(planner: MCoreLoadPlanner, item: ReadItem, tensor: torch.Tensor) -> None:
        original(planner, item, tensor)
        heartbeat.current.beat()

    MCoreLoadPlanner.commit_tensor = commit_tensor
    try:
        yield
    finally:
        MCoreLoadPlanner.commit_tensor = original


def load_weights(model: torch.nn.Module, directory: str | Path) -> None:
    """Loads the weights of a checkpoint that any layout wrote into `model`. Collective."""
    path = require(directory)
    heartbeat.enter("load the weights")
    _check_fit(model, path)
    _load_model(model, path)


def _load_model(model: torch.nn.Module, path: Path) -> None:
    """Loads the weights at `path`; the data-parallel ranks share the reading. Collective."""
    # What modules hold besides weights (TransformerEngine's FP8 scales) is not loaded: a checkpoint
    # that was converted, or saved without TransformerEngine, has none.
    weights, extra = {}, {}
    for number, state in _model_state(model).items():
        extra[number] = {n: None for n, entry in state.items() if isinstance(entry, ShardedObject)}
        weights[number] = {n: entry for n, entry in state.items() if n not in extra[number]}
    reader = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(path)), groups.token_group()
    )
    with _signs_of_life():
        loaded = dist_checkpointing.load({"model": weights}, str(path), reader)["model"]
    for number, chunk in enumerate(chunks(model)):
        name = f"chunk{number}"
        chunk.load_state_dict(loaded[name] | extra[name])


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Allocates Adam's state, which Megatron reads before it loads or saves it.

    Torch's Adam and the fused ones allocate it in their first step; torch's counts steps in it.
    """
    for part in optimizer.chained_optimizers:
        hybrid = isinstance(part.optimizer, HybridDeviceOptimizer)
        for adam in part.optimizer.sub_optimizers if hybrid else [part.optimizer]:
            _allocate_moments_of(adam)
        if hybrid:
            part.optimizer._sync_sub_optimizers_state_to_hdo()


def _allocate_moments_of(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            if not state:
                if isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
                    state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)


def _optimizer_state(policy: TrainedModel, model_state: dict, *, loading: bool = False) -> dict:
    """The sharded state of the optimizer, in Megatron's format."""
    (part,) = policy.optimizer.chained_optimizers
    if not isinstance(part, DistributedOptimizer):
        return part.sharded_state_dict(model_state, is_loading=loading)
    state = part.state_dict()
    for group in state["optimizer"]["param_groups"]:
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]  # classes of the hybrid optimizer: a checkpoint holds data only
    shards = optimizer_shards(part, model_state)
    return state | {"param_state": shards, _SHARDING: "fully_reshardable"}


def _check_optimizer(policy: TrainedModel, common: dict, path: Path) -> None:
    """Raises ConfigError if the checkpoint is of another kind of optimizer."""
    (part,) = policy.optimizer.chained_optimizers
    distributed = isinstance(part, DistributedOptimizer)
    if distributed != (_SHARDING in common["optimizer"]):
        raise ConfigError(
            f"checkpoint {path} was saved with optimizer.distributed {not distributed}, this run "
            f"has {distributed}: set it to {not distributed}, or start from its weights alone with "
            "model.init_path"
        )


def _load_optimizer(policy: TrainedModel, common: dict, path: Path) -> None:
    """Loads Adam's state at `path`. Each rank reads its own part of it. Collective."""
    (part,) = policy.optimizer.chained_optimizers
    _allocate_moments(policy.optimizer)
    model_state = _model_state(policy.model)
    if isinstance(part, DistributedOptimizer):
        # Settings first: the moments are written into the tensors that are left then.
        _load_settings(part, common["optimizer"])
        shards = {"optimizer": {"param_state": optimizer_shards(part, model_state)}}
        with _signs_of_life():
            dist_checkpointing.load(shards, str(path))
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_hdo_state_to_sub_optimizers()
    else:
        content = {"optimizer": _optimizer_state(policy, model_state, loading=True)}
        with _signs_of_life():
            loaded = dist_checkpointing.load(content, str(path))
        _load_settings(part, loaded["optimizer"])


def _load_settings(part: MegatronOptimizer, content: dict) -> None:
    """Loads `content` into the optimizer; its settings stay those of this run.

    Megatron gives all parameters one tensor to count torch's steps in, which would count every step
    many times, so each gets its own here.
    """
    progress = ("params", "step", "lr", "weight_decay")  # the last two follow from the schedule
    own = [
        {name: value for name, value in group.items() if name not in progress}
        for group in part.optimizer.param_groups
    ]
    # Megatron 0.19 identifies a group by its learning rates, which this run may have changed.
    for group in content.get("optimizer", content)["param_groups"]:
        group.update({name: own[0][name] for name in ("max_lr", "min_lr") if name in group})
    part.load_state_dict(content)
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()
    for group, mine in zip(part.optimizer.param_groups, own):
        group.update(mine)


def resume(policy: TrainedModel, path: Path) -> RunState:
    """Restores everything that `save` wrote at `path`. Collective.

    Raises ConfigError, on every rank, if it is of another model or another kind of optimizer.
    """
    heartbeat.enter("resume")
    common = _check_fit(policy.model, path)
    _check_optimizer(policy, common, path)
    _load_model(policy.model, path)
    _load_optimizer(policy, common, path)
    policy.scheduler.load_state_dict(common["scheduler"])
    return RunState(**common["run"])


def _nothing_more(directory: Path) -> dict[str, Any]:
    return {}


def save(
    policy: TrainedModel,
    state: RunState,
    settings: CheckpointConfig,
    *,
    notes: Mapping[str, Any] = MappingProxyType({}),
    suffix: str = "",
    write_more: Callable[[Path], dict[str, Any]] = _nothing_more,
    in_background: bool = False,
) -> PendingSave:
    """Writes a checkpoint of `state` to `settings.dir`; `publish` makes it current. Collective.

    Args:
        notes: JSON values for the manifest. "accuracy" is the held-out accuracy of these weights,
            if they were evaluated.
        suffix: ends the name of a checkpoint that is not of the end of a step.
        write_more: writes more files into the directory (collective) and returns more notes.
        in_background: return as soon as a process of each rank writes the present state.
    Raises:
        SaveFailed: the file system fails; the current checkpoint stays as it is.
    """
    overlap.complete_weights(policy.model)
    _allocate_moments(policy.optimizer)  # before the first update there are none
    model_state = _model_state(policy.model)
    content = {
        "model": model_state,
        "optimizer": _optimizer_state(policy, model_state),
        "scheduler": policy.scheduler.state_dict(),
        "run": asdict(state),
        "architecture": chunks(policy.model)[0].architecture,
    }
    pending = PendingSave(settings, f"iter_{state.step:07d}{suffix}", state.step)
    pending.start(content, dict(notes), write_more, in_background=in_background)
    return pending
