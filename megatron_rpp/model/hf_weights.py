"""Loads a rank's part of the model from a Hugging Face directory.

Files are memory-mapped, so a rank reads only the bytes of its layers and tensor-parallel shards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_rpp.hf.families import (
    EMBEDDING,
    HEAD,
    OUTPUT,
    SCORE,
    Row,
    canonical,
    is_scalar,
    refuse_scalar,
)
from megatron_rpp.hf.safetensors_in import Weights
from megatron_rpp.hf.source import Source, check_source
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.model import initialization
from megatron_rpp.model.language_model import LanguageModel, chunks
from megatron_rpp.model.scalar_model import ScalarModel
from megatron_rpp.parallel.ranks import raise_on_all_ranks


def _check_architecture(
    stage: torch.nn.Module, theirs: dict[str, Any], directory: str | Path
) -> None:
    """Raises ConfigError if `theirs`, the settings of the directory's model, do not fit `stage`.

    A scalar model may be filled from a language model.
    """
    ours, free = chunks(stage)[0].architecture, {"max_length"}
    if isinstance(chunks(stage)[0], ScalarModel):
        free |= {*HEAD, "tied_embeddings"}  # it has no output projection that could be tied
    elif is_scalar(theirs):
        refuse_scalar(directory)
    differences = [
        f"{name} is {theirs[name]} there, {value} here"
        for name, value in ours.items()
        if name not in free and theirs[name] != value
    ]
    if ours["max_length"] > theirs["max_length"]:
        differences.append(
            f"max_length is {theirs['max_length']} at most there, {ours['max_length']} here"
        )
    if differences:
        raise ConfigError(
            f"{directory} does not fit the model: {'; '.join(differences)}. Give the directory of a "
            "model of this shape; for the policy, remove these settings, which model.hf_path sets"
        )


@torch.no_grad()
def load_hf(stage: torch.nn.Module, directory: str | Path | Source) -> None:
    """Loads every parameter of `stage`, cast to the dtype of the stage.

    A scalar model that is filled from a language model keeps the values of its head. Collective if there is a process group.

    Args:
        directory: a Hugging Face directory, or what the check of one returned.
    Raises:
        ConfigError: the same on every rank, if the directory holds a different model or none
            (hf/source.py).
    """
    if isinstance(directory, Source):
        source = directory
    else:
        source = raise_on_all_ranks(lambda: check_source(directory))
    _check_architecture(stage, source.settings, source.weights.directory)
    heartbeat.enter("load the weights")
    by_name = {row.megatron: row for row in source.rows}
    for chunk in chunks(stage):
        for name, parameter in chunk.named_parameters():
            if name == SCORE and SCORE not in by_name:
                continue
            row = by_name[canonical(initialization.global_name(chunk, name))]
            heartbeat.current.beat()
            parameter.copy_(local_shard(chunk, row, parameter, weights=source.weights))


def local_shard(
    model: LanguageModel, row: Row, parameter: torch.nn.Parameter, *, weights: Weights
) -> torch.Tensor:
    """Reads this rank's shard of the tensor of `row` as slices of its source tensors."""
    tensor = model.pg_collection.tp
    rank, size = tensor.rank(), tensor.size()
    if row.megatron in (EMBEDDING, OUTPUT):
        return _vocabulary_rows(row, parameter, weights, first=rank * len(parameter))
    if not initialization.is_tensor_sharded(parameter):
        rank, size = 0, 1
    dim = vars(parameter)["partition_dim"] if size > 1 else 0
    parts = []
    for name in row.hf:
        length = weights.shapes[name][dim] // size
        parts.append(weights.read(name, dim=dim, start=rank * length, stop=(rank + 1) * length))
    return row.merge(parts, model.config.kv_channels)


def _vocabulary_rows(
    row: Row, parameter: torch.nn.Parameter, weights: Weights, *, first: int
) -> torch.Tensor:
    """Reads the rows from `first` on; the padding rows after the vocabulary are zero."""
    (name,) = row.hf
    vocab_size = weights.shapes[name][0]
    shard = torch.zeros(parameter.shape, dtype=weights.dtypes[name], device="cpu")
    last = min(first + len(parameter), vocab_size)
    valid = weights.read(name, start=min(first, vocab_size), stop=last)
    shard[: len(valid)] = valid
    return shard
