"""The weights of a model as Megatron's sharded state, and how they come back from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import ReadItem

from megatron_rpp.checkpoint.store import require
from megatron_rpp.config.model import NOT_COMPARED
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.config_error import ConfigError, reading
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
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner


def model_state(model: torch.nn.Module, prefix: str = "") -> dict:
    """The sharded state by chunk. The keys of the tensors count layers in the whole model.

    prefix: begins the keys, for a second model in the same checkpoint.
    """
    return {
        f"chunk{number}": chunk.sharded_state_dict(prefix, metadata={})
        for number, chunk in enumerate(chunks(model))
    }


def check_fit(model: torch.nn.Module, path: Path, prefix: str = "") -> dict:
    """Returns what the checkpoint at `path` holds besides tensors. Collective.

    Raises ConfigError, on every rank, if it is of another model.
    """
    with reading(f"checkpoint {path}", "choose another"):
        stored = dist_checkpointing.load_tensors_metadata(str(path))
        common = dist_checkpointing.load_common_state_dict(str(path))
    # A checkpoint of another program has no such record; then only shapes are compared.
    theirs = common.get("architecture", {})
    own = model_state(model, prefix)
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
def signs_of_life() -> Iterator[None]:
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
    check_fit(model, path)
    load_model(model, path)


def load_model(model: torch.nn.Module, path: Path, prefix: str = "") -> None:
    """Loads the weights at `path`; the data-parallel ranks share the reading. Collective."""
    # What modules hold besides weights (TransformerEngine's FP8 scales) is not loaded: a checkpoint
    # that was converted, or saved without TransformerEngine, has none.
    weights, extra = {}, {}
    for number, state in model_state(model, prefix).items():
        extra[number] = {n: None for n, entry in state.items() if isinstance(entry, ShardedObject)}
        weights[number] = {n: entry for n, entry in state.items() if n not in extra[number]}
    reader = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(path)), groups.token_group()
    )
    with signs_of_life():
        loaded = dist_checkpointing.load({"model": weights}, str(path), reader)["model"]
    for number, chunk in enumerate(chunks(model)):
        name = f"chunk{number}"
        entries = loaded[name] | extra[name]
        chunk.load_state_dict({key.removeprefix(prefix): value for key, value in entries.items()})
