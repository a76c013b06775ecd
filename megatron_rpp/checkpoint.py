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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_rpp.data.files import write_atomic
from megatron_rpp.model.language_model import unwrap
from megatron_rpp.parallel import groups

POINTER = "latest_checkpointed_iteration.txt"
# Adam's state in the model's own shapes, so that it loads on any other layout too.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass
class RunState:
    """Where a run stands."""

    step: int = 0
    """Steps done."""
    prompts_seen: int = 0
    """Data position: prompts taken from the shuffled data set so far."""
    accuracy: float | None = None
    """Held-out accuracy of the last evaluation."""


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
    return unwrap(model).sharded_state_dict(metadata=dict(_METADATA))


def _check_shapes(model: torch.nn.Module, path: Path) -> None:
    """Refuses a checkpoint of another model, alike on every rank."""
    stored = dist_checkpointing.load_tensors_metadata(str(path))
    own = _model_state(model)
    apply_factories(own)
    problems = []
    for entry in nested_values(own):
        if not isinstance(entry, ShardedTensor) or entry.allow_shape_mismatch:
            continue
        found = stored.get(entry.key)
        if found is None:
            problems.append(f"{entry.key} is not in it")
        elif found.global_shape != entry.global_shape:
            shapes = f"{list(found.global_shape)} there, {list(entry.global_shape)} here"
            problems.append(f"{entry.key} is {shapes}")
    for theirs in groups.gather_objects(problems[:3], dist.group.WORLD):
        if theirs:
            raise ValueError(
                f"checkpoint {path} does not fit the model: {'; '.join(theirs)}. "
                f"Set the model section to the shape it was saved with, or load another"
            )


def load_weights(model: torch.nn.Module, directory: str | Path) -> None:
    """Fills `model` with the weights of a checkpoint, whatever layout wrote it."""
    path = require(directory)
    _check_shapes(model, path)
    loaded = dist_checkpointing.load({"model": _model_state(model)}, str(path))
    unwrap(model).load_state_dict(loaded["model"])


def _whole_state(model, optimizer, scheduler, loading: bool) -> dict:
    model_state = _model_state(model)
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(
            model_state, is_loading=loading, metadata=dict(_METADATA)
        ),
        "scheduler": scheduler.state_dict(),
    }


def resume(model: torch.nn.Module, optimizer, scheduler, path: Path) -> RunState:
    """Restores everything that `save` wrote at `path`."""
    _check_shapes(model, path)
    loaded = dist_checkpointing.load(_whole_state(model, optimizer, scheduler, True), str(path))
    unwrap(model).load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
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
    content = _whole_state(model, optimizer, scheduler, False) | {"run": asdict(state)}
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
