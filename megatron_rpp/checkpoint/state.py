"""Checkpoints in Megatron's tree, through Megatron's dist_checkpointing: sharded by the layout that
writes, readable by any other TP × PP × DP. Policy, optimizer, schedule, step, data position; there
is no random state to keep (seeds.py: every random number is a function of its place).

How one is written: checkpoint/writer.py. Which one of a directory is in force, and how one gets
there unharmed: checkpoint/store.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist

from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.store import POINTER, newest, require
from megatron_rpp.checkpoint.writer import Writing
from megatron_rpp.config import CheckpointConfig
from megatron_rpp.config.model import NOT_COMPARED
from megatron_rpp.lifecycle.config_error import ConfigError, reading
from megatron_rpp.lifecycle.exit_codes import SaveFailed
from megatron_rpp.model.language_model import chunks
from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)
from megatron_rpp.parallel import groups

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
)

__all__ = ["POINTER", "SaveFailed", "load_weights", "newest", "require", "resume", "save", "write"]

# Adam's state in the model's own shapes, so that it loads on any other layout too.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def _model_state(model: torch.nn.Module) -> dict:
    """By chunk; the tensors' own keys hold the layers' numbers in the whole model."""
    return {
        f"chunk{number}": chunk.sharded_state_dict(metadata=dict(_METADATA))
        for number, chunk in enumerate(chunks(model))
    }


def _fill(model: torch.nn.Module, state: dict) -> None:
    for number, chunk in enumerate(chunks(model)):
        chunk.load_state_dict(state[f"chunk{number}"])


def _check_fit(model: torch.nn.Module, path: Path) -> None:
    """Refuses a checkpoint of another model, alike on every rank."""
    with reading(f"checkpoint {path}", "choose another"):
        stored = dist_checkpointing.load_tensors_metadata(str(path))
        # A checkpoint from elsewhere has no such record; its tensors' shapes must do.
        theirs = dist_checkpointing.load_common_state_dict(str(path)).get("architecture", {})
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


def load_weights(model: torch.nn.Module, directory: str | Path) -> None:
    """Fills `model` with the weights of a checkpoint, whatever layout wrote it."""
    path = require(directory)
    _check_fit(model, path)
    # What modules keep beside weights (TransformerEngine's FP8 scales) stays as it is here: a
    # converted checkpoint has none.
    weights, extra = {}, {}
    for number, state in _model_state(model).items():
        extra[number] = {n: None for n, entry in state.items() if isinstance(entry, ShardedObject)}
        weights[number] = {n: entry for n, entry in state.items() if n not in extra[number]}
    loaded = dist_checkpointing.load({"model": weights}, str(path))["model"]
    _fill(model, {number: loaded[number] | extra[number] for number in loaded})


def _whole_state(model, optimizer, scheduler, loading: bool) -> dict:
    model_state = _model_state(model)
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(
            model_state, is_loading=loading, metadata=dict(_METADATA)
        ),
        "scheduler": scheduler.state_dict(),
    }


def _allocate_moments(optimizer) -> None:
    """Gives Adam its state, which Megatron reads before it loads or saves it.

    Both torch's Adam and the fused ones make it in their first step; torch's counts steps in it.
    """
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
                        state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def _load_optimizer(optimizer, content: dict) -> None:
    """Adam's state from the checkpoint; its settings stay those of this run.

    torch's Adam counts steps beside the moments. Megatron 0.16 looks for that count among the
    sharded moments, so it is set aside while they load, and it gives all parameters one tensor to
    count in, which would count every step as many times: each gets its own.
    """
    (part,) = optimizer.chained_optimizers
    settings = ("max_lr", "min_lr", "betas", "eps")
    own = [{name: group[name] for name in settings} for group in part.optimizer.param_groups]
    moments = content.pop("param_state", None)
    # Megatron 0.19 finds a group by its learning rates, which this run may have changed.
    for group in content.get("optimizer", content)["param_groups"]:
        group.update({name: own[0][name] for name in ("max_lr", "min_lr") if name in group})
    part.load_state_dict(content)
    states = list(part.optimizer.state.values())
    steps = [state.pop("step", None) for state in states]
    if moments is not None:
        part.load_parameter_state_from_fully_reshardable(moments)
    for state, step in zip(states, steps):
        if step is not None:
            state["step"] = step.clone()
    for group, mine in zip(part.optimizer.param_groups, own):
        group.update(mine)


def _check_optimizer(content: dict, path: Path) -> None:
    stored = dist_checkpointing.load_common_state_dict(str(path))["optimizer"]
    theirs, own = ("param_state_sharding_type" in state for state in (stored, content))
    if theirs != own:
        raise ConfigError(
            f"checkpoint {path} was saved with optimizer.distributed {theirs}, this run has {own}: "
            f"set it to {theirs}, or start from its weights alone with model.init_path"
        )


def resume(model: torch.nn.Module, optimizer, scheduler, path: Path) -> RunState:
    """Restores everything that `save` wrote at `path`.

    Raises ConfigError, on every rank, where it is of another model or kind of optimizer.
    """
    _check_fit(model, path)
    _allocate_moments(optimizer)
    content = _whole_state(model, optimizer, scheduler, True)
    _check_optimizer(content["optimizer"], path)
    loaded = dist_checkpointing.load(content, str(path))
    _fill(model, loaded["model"])
    _load_optimizer(optimizer, loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    return RunState(**loaded["run"])


def write(
    settings: CheckpointConfig,
    model: torch.nn.Module,
    optimizer,
    scheduler,
    state: RunState,
    notes: dict[str, Any],
    suffix: str = "",
    fill: Callable[[Path], dict[str, Any]] = lambda directory: {},
    in_background: bool = False,
) -> Writing:
    """Writes a checkpoint of `state`, to be put in force by `publish`. Collective.

    Args:
        notes: JSON values for the manifest; "accuracy": held-out accuracy of these weights, where
            they were evaluated.
        suffix: of its name, where it is not of the end of a step.
        fill: writes more into the directory (collective), and returns more notes.
        in_background: return when a process of each rank has begun to write the state as it is now.

    Raises SaveFailed where the file system does not take it; the one in force stays.
    """
    name = f"iter_{state.step:07d}{suffix}"
    _allocate_moments(optimizer)  # there are none yet before the first update
    content = _whole_state(model, optimizer, scheduler, False)
    content |= {"run": asdict(state), "architecture": chunks(model)[0].architecture}
    return Writing(settings, name, state.step, content, notes, fill, in_background)


def save(
    directory: str | Path, model: torch.nn.Module, optimizer, scheduler, state: RunState, keep: int
) -> Path:
    """Writes a checkpoint of `state.step` and drops all but the newest `keep`; collective."""
    settings = CheckpointConfig(dir=str(directory), keep=keep)
    return write(settings, model, optimizer, scheduler, state, {}).publish()
