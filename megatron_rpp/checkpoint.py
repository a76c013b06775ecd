"""Checkpoints in Megatron's tree, through Megatron's dist_checkpointing: sharded by the layout that
writes, readable by any other TP × PP × DP.

    <dir>/latest_checkpointed_iteration.txt     the newest step
    <dir>/iter_0000040/                         policy, optimizer, schedule, step, data position

A save goes to a temporary directory that is renamed when whole, then the pointer moves; so a kill
leaves the previous checkpoint in force.

Left out: asynchronous saves, checksums, the rollout buffer of a step under way.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
)

from megatron_rpp.config_model import NOT_COMPARED
from megatron_rpp.data.files import write_atomic
from megatron_rpp.model.language_model import chunks
from megatron_rpp.parallel import groups
from megatron_rpp.run_state import RunState

POINTER = "latest_checkpointed_iteration.txt"
# Adam's state in the model's own shapes, so that it loads on any other layout too.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def newest(directory: str | Path) -> Path | None:
    """The checkpoint that the pointer in `directory` names; None where there is none.

    Raises ValueError where the pointer names something that is not there.
    """
    pointer = Path(directory) / POINTER
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    path = Path(directory) / (f"iter_{int(name):07d}" if name.isdigit() else name)
    if not (path / ".metadata").exists():
        raise ValueError(
            f"{pointer} names {name!r}, but {path} is not a complete checkpoint: write the step "
            f"of an older iter_* directory into that file, or remove it to start anew"
        )
    return path


def require(directory: str | Path) -> Path:
    """The newest checkpoint of `directory`, which may also be a checkpoint itself.

    Raises ValueError where there is none.
    """
    path = Path(directory)
    found = path if (path / ".metadata").exists() else newest(path)
    if found is None:
        raise ValueError(
            f"no checkpoint at {path}: it holds no {POINTER}; give the directory of an earlier run"
        )
    return found


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
            raise ValueError(
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
    """Gives Adam its state, which Megatron reads before it loads it.

    Megatron's fused Adam has one from the start, torch's makes it in its first step.
    """
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
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
        raise ValueError(
            f"checkpoint {path} was saved with optimizer.distributed {theirs}, this run has {own}: "
            f"set it to {theirs}, or start from its weights alone with model.init_path"
        )


def resume(model: torch.nn.Module, optimizer, scheduler, path: Path) -> RunState:
    """Restores everything that `save` wrote at `path`.

    Raises ValueError, on every rank, where it is of another model or kind of optimizer.
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


def save(
    directory: str | Path, model: torch.nn.Module, optimizer, scheduler, state: RunState, keep: int
) -> Path:
    """Writes a checkpoint of `state.step` and drops all but the newest `keep`; collective."""
    directory = Path(directory)
    final = directory / f"iter_{state.step:07d}"
    temporary = directory / f".saving_{final.name}"
    if groups.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    content = _whole_state(model, optimizer, scheduler, False)
    content |= {"run": asdict(state), "architecture": chunks(model)[0].architecture}
    dist_checkpointing.save(content, str(temporary))
    dist.barrier()
    if groups.is_main():
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        write_atomic(directory / POINTER, f"{state.step}\n".encode())
        for old in sorted(directory.glob("iter_*"))[:-keep]:
            if old != final:
                shutil.rmtree(old)
    dist.barrier()
    return final
