"""The weights of a model as Megatron's sharded state, and how they come back from a checkpoint."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

from megatron_rpp.checkpoint.store import require
from megatron_rpp.config.model import NOT_COMPARED
from megatron_rpp.hf.families import SCORE, refuse_scalar
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.config_error import ConfigError, reading
from megatron_rpp.model.language_model import chunks
from megatron_rpp.model.scalar_model import ScalarModel
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

CRITIC = "critic."
"""Begins the names of a critic's tensors, beside those of its policy."""


def model_state(model: torch.nn.Module, prefix: str = "") -> dict:
    """The sharded state by chunk. The keys of the tensors count layers in the whole model.

    prefix: begins the keys, for a second model in the same checkpoint.
    """
    return {
        f"chunk{number}": chunk.sharded_state_dict(prefix, metadata={})
        for number, chunk in enumerate(chunks(model))
    }


def _stored(path: Path) -> dict[str, ShardedTensor]:
    """The tensors of a checkpoint by their keys, without their values."""
    with reading(f"checkpoint {path}", "choose another"):
        return dist_checkpointing.load_tensors_metadata(str(path))


def _common(path: Path) -> dict:
    """What a checkpoint holds besides tensors."""
    with reading(f"checkpoint {path}", "choose another"):
        try:
            return dist_checkpointing.load_common_state_dict(str(path))
        except CheckpointException as error:  # of Megatron 0.19; it is not an Exception
            raise error.failures[0][0] from None  # each rank reads alone, as rank 0 of one


def check_fit(
    model: torch.nn.Module, path: Path, prefix: str = "", *, keep: Container[str] = ()
) -> dict:
    """Returns what the checkpoint at `path` holds besides tensors. Collective.

    keep: tensors of `model` that the checkpoint need not hold.

    Raises ConfigError, on every rank, if it is of another model.
    """
    stored, scalar = _stored(path), isinstance(chunks(model)[0], ScalarModel)
    common = _common(path)
    if SCORE in stored and not scalar:
        refuse_scalar(f"checkpoint {path}")
    # A checkpoint of another program has no such record; then only shapes are compared.
    theirs = common.get("architecture", {})
    # A scalar model has no output projection that could be tied.
    free = {*NOT_COMPARED, "tied_embeddings"} if scalar else {*NOT_COMPARED}
    own = model_state(model, prefix)
    apply_factories(own)
    problems = [
        f"{name} is {theirs[name]} there, {value} here"
        for name, value in chunks(model)[0].architecture.items()
        if name not in free and theirs.get(name, value) != value
    ]
    for entry in nested_values(own):
        if not isinstance(entry, ShardedTensor) or entry.allow_shape_mismatch or entry.key in keep:
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


def load_weights(
    model: torch.nn.Module, directory: str | Path, *, prefer_critic: bool = False
) -> None:
    """Loads the weights of a checkpoint that any layout wrote into `model`. Collective.

    A scalar model that is filled from a policy keeps the values of its head.

    prefer_critic: take the critic of the checkpoint, if it has one.
    """
    path = require(directory)
    heartbeat.enter("load the weights")
    stored = _stored(path).keys()
    prefix = CRITIC if prefer_critic and CRITIC + SCORE in stored else ""
    keep = {SCORE} - {key.removeprefix(prefix) for key in stored}
    check_fit(model, path, prefix, keep=keep)
    load_model(model, path, prefix, keep=keep)


def load_model(
    model: torch.nn.Module, path: Path, prefix: str = "", *, keep: Container[str] = ()
) -> None:
    """Loads the weights at `path`, except `keep`; the data-parallel ranks share the reading.
    Collective."""
    # What modules hold besides weights (TransformerEngine's FP8 scales) is not loaded: a checkpoint
    # that was converted, or saved without TransformerEngine, has none.
    weights, extra = {}, {}
    for number, state in model_state(model, prefix).items():
        extra[number] = {n: None for n, entry in state.items() if isinstance(entry, ShardedObject)}
        extra[number] |= {n: entry.data for n, entry in state.items() if n in keep}
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
