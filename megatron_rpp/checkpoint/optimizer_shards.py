"""The state of the distributed optimizer as shards of whole tensors, without gathering any of it.

Megatron's distributed optimizer lays the parameters of a rank end to end and gives each data-parallel
rank one stretch of them, so a rank owns a flat range of some parameters. A flat range of a matrix is
at most three rectangles: the end of a row, whole rows, the start of a row. Saved as such, under the
keys of Megatron's own "fully_reshardable" format, a checkpoint holds Adam's moments in the shapes of
the model. Any other layout reads them, and so does Megatron. Each rank writes and reads only its own
part, in place.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_STATE = ("param", "exp_avg", "exp_avg_sq")
"""Megatron's names for what the optimizer holds of a parameter: its fp32 weights and two moments."""


def optimizer_shards(
    optimizer: DistributedOptimizer, model_state: dict[str, Any]
) -> dict[str, list[ShardedTensor]]:
    """This rank's part of fp32 weights and moments; the data are views, so a load writes in place.

    Args:
        model_state: the sharded state of the model, whose entries hold the parameters themselves.
    """
    entries = {id(entry.data): entry for entry in nested_values(model_state)}
    shards: dict[str, list[ShardedTensor]] = {}
    for parameter in optimizer.model_param_gbuf_map:
        owned = optimizer._get_model_param_range_map(parameter)["param"]
        state = optimizer._get_main_param_and_optimizer_states(parameter)
        for piece, start in _pieces(entries[id(parameter)]):
            for name in _STATE:
                key = f"optimizer.state.{name}.{piece.key}"
                shards.setdefault(key, []).extend(
                    _rectangles_of(
                        replace(piece, key=key, data=None, dtype=torch.float32),
                        state[name].view(-1),
                        first=owned.start - start,
                    )
                )
    return shards


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """The parts of a parameter that have a place of their own in the checkpoint (gate and up of
    SwiGLU), each with its first position in the flattened parameter."""
    if isinstance(entry, ShardedTensor):
        yield entry, 0
        return
    whole = torch.empty(entry.data.shape, device="meta")
    for piece in nested_values(replace(entry, data=whole).build()):
        yield piece, piece.data.storage_offset()


def _rectangles_of(piece: ShardedTensor, owned: torch.Tensor, *, first: int) -> list[ShardedTensor]:
    """The part of `owned` that lies in `piece`; its element 0 is at `first` of the flat piece."""
    size = math.prod(piece.local_shape)
    start, stop = max(0, first), min(size, first + len(owned))
    if start >= stop:
        return []
    found, position = [], start - first
    # Megatron prepends the axis of the layers to a regular shard; others have it in their shape.
    whole = (*[1] * piece.prepend_axis_num, *piece.local_shape)
    for offsets, shape in rectangles(start, stop, whole):
        count = math.prod(shape)
        shard = replace(
            piece,
            data=owned[position : position + count].view(shape),
            local_shape=tuple(shape),
            global_offset=tuple(map(operator.add, piece.global_offset, offsets)),
            prepend_axis_num=0,
            axis_fragmentations=None,  # the ranks' parts differ in shape
            # A data-parallel rank is the only one that holds its part.
            replica_id=(*piece.replica_id[:2], 0),
        )
        found.append(shard)
        position += count
    return found


def rectangles(
    start: int, stop: int, shape: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Splits the elements start..stop-1 of a row-major array into (offsets, sizes) of sub-arrays.

    Each sub-array is contiguous, and they follow each other in order.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield [start], [stop - start]
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within one row
        for offsets, sizes in rectangles(start - last * row, stop - last * row, shape[1:]):
            yield [last, *offsets], [1, *sizes]
        return
    for offsets, sizes in rectangles(start - (first - 1) * row, row, shape[1:]):
        if start % row:
            yield [first - 1, *offsets], [1, *sizes]
    if first < last:
        yield [first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]]
    for offsets, sizes in rectangles(0, stop - last * row, shape[1:]):
        yield [last, *offsets], [1, *sizes]
