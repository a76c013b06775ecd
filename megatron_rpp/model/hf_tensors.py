"""The weights of a running model as Hugging Face tensors, one of Megatron's parameters at a time.

Ranks that hold shards of a parameter gather it whole, split it by the table of the model's family
(hf/families.py), and let it go before the next. `shared_out` gives each whole parameter to one rank, so
that all ranks work at once; `on_every_rank` gives all of them to every rank of a replica.

A tensor may be a view of a parameter: use it before the next update of the model, and do not change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_rpp.hf.architecture import family_of
from megatron_rpp.hf.families import EMBEDDING, OUTPUT, Row, canonical, rows_of
from megatron_rpp.model import initialization, overlap
from megatron_rpp.model.language_model import LanguageModel, chunks
from megatron_rpp.parallel import groups

Tensors = list[tuple[str, torch.Tensor]]
"""Hugging Face names and whole tensors."""


@dataclass(frozen=True)
class _Held:
    """A parameter of this pipeline stage."""

    row: Row
    parameter: torch.Tensor
    sharded: bool
    dim: int
    settings: dict[str, Any]

    @classmethod
    def of(cls, chunk: LanguageModel, row: Row, parameter: torch.nn.Parameter) -> _Held:
        sharded = initialization.is_tensor_sharded(parameter) and groups.tensor_group().size() > 1
        dim = vars(parameter)["partition_dim"] if sharded else 0
        return cls(row, parameter.detach(), sharded, dim, chunk.architecture)

    def split(self, shards: list[torch.Tensor]) -> Tensors:
        """The tensors of the row, from the shards of all tensor-parallel ranks. They are views of the
        shards where nothing has to be copied."""
        heads, kv_heads = (self.settings[name] // len(shards) for name in ("heads", "kv_heads"))
        parts = [self.row.split(shard, heads, kv_heads) for shard in shards]
        whole = [
            torch.cat(pieces, self.dim) if len(pieces) > 1 else pieces[0]
            for pieces in zip(*parts, strict=True)
        ]
        if self.row.megatron in (EMBEDDING, OUTPUT):  # without the rows that pad the vocabulary
            whole = [tensor[: self.settings["vocab_size"]] for tensor in whole]
        return [(name, tensor.contiguous()) for name, tensor in zip(self.row.hf, whole)]

    def gather(self, target: int) -> list[torch.Tensor] | None:
        """The shards of all tensor-parallel ranks, on rank `target` of them. Collective."""
        group = groups.tensor_group()
        if not self.sharded:
            return [self.parameter] if group.rank() == target else None
        flat = self.parameter.contiguous().view(torch.uint8)  # gloo does not know every type
        found = [torch.empty_like(flat) for _ in range(group.size())]
        wanted = found if group.rank() == target else None
        dist.gather(flat, wanted, group=group, group_dst=target)
        return wanted and [shard.view(self.parameter.dtype) for shard in wanted]

    def gather_everywhere(self) -> list[torch.Tensor]:
        """The same, on all of them. Collective."""
        if not self.sharded:
            return [self.parameter]
        flat = self.parameter.contiguous().view(torch.uint8)
        found = [torch.empty_like(flat) for _ in range(groups.tensor_group().size())]
        dist.all_gather(found, flat, group=groups.tensor_group())
        return [shard.view(self.parameter.dtype) for shard in found]


def all_rows(model: torch.nn.Module) -> list[Row]:
    """The rows of the whole model, in order."""
    settings = chunks(model)[0].architecture
    return rows_of(family_of(settings), settings)


def _held(model: torch.nn.Module) -> dict[str, _Held]:
    """This stage's parameters, in the order of the rows; a tied copy of the embedding is left out."""
    assert overlap.are_weights_complete(model)
    found = {}
    for chunk in chunks(model):
        for name, parameter in chunk.named_parameters():
            found[canonical(initialization.global_name(chunk, name))] = (chunk, parameter)
    tied_copy = not groups.is_first_stage() and chunks(model)[0].share_embeddings_and_output_weights
    return {
        row.megatron: _Held.of(found[row.megatron][0], row, found[row.megatron][1])
        for row in all_rows(model)
        if row.megatron in found and not (tied_copy and row.megatron == EMBEDDING)
    }


@torch.no_grad()
def shared_out(model: torch.nn.Module) -> Iterator[Tensors]:
    """The tensors of which this rank is in charge: all ranks together yield each exactly once.

    Collective over the tensor-parallel ranks.
    """
    copies, tensor = groups.token_group(), groups.tensor_group()
    for position, held in enumerate(_held(model).values()):
        turn, copy = divmod(position, copies.size())
        if copy == copies.rank():
            shards = held.gather(turn % tensor.size())
            if shards is not None:
                yield held.split(shards)


@torch.no_grad()
def on_every_rank(model: torch.nn.Module) -> Iterator[Tensors]:
    """All tensors, in the order of the rows, on every rank of the replica. Collective over it."""
    held, stages = _held(model), groups.pipeline_group()
    owners: dict[str, int] = {}
    for stage, names in enumerate(groups.gather_objects(list(held), stages)):
        owners |= dict.fromkeys(names, stage)
    settings = chunks(model)[0].architecture
    dtype = next(model.parameters()).dtype
    for row in all_rows(model):
        own = row.megatron in held
        tensors = (
            held[row.megatron].split(held[row.megatron].gather_everywhere())
            if own
            else [
                (name, torch.empty(size, dtype=dtype, device=next(model.parameters()).device))
                for name, size in zip(row.hf, row.sizes(settings))
            ]
        )
        if stages.size() > 1:
            for _, tensor in tensors:
                dist.broadcast(
                    tensor.view(torch.uint8), group=stages, group_src=owners[row.megatron]
                )
        yield tensors
