"""Keys and values of many growing sequences in blocks (PagedAttention: Kwon et al., arXiv 2309.06180).

The cache is a number of blocks of `block_size()` positions each. A sequence has as many as
its length needs, anywhere (rollout/blocks.py decides which). So the number of blocks bounds the
memory, and not the number of sequences times the longest one.

`KeyValueCache` holds the tensors of all layers of a rank, `Places` says where the tokens of one
forward pass lie.

Shape legend: p blocks, c positions in a block, t tokens of a forward pass, b sequences, m most blocks
of a sequence, n query heads of this rank, k key-value heads of this rank, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from megatron_rpp.model import decode_sizes
from megatron_rpp.parallel import device as devices


def block_size() -> int:
    """Positions in a block."""
    sizes = decode_sizes
    return sizes.CACHE_BLOCK_ON_CPU if devices.ON_CPU else sizes.CACHE_BLOCK_ON_GPU


@dataclass(frozen=True)
class Places:
    """Where the tokens of a forward pass lie: b sequences, each with its next tokens.

    Everything that the layers share is computed once, at its first use.
    """

    table: torch.Tensor
    """[b, m] int64: the blocks of each sequence, then any block."""
    positions: torch.Tensor
    """[t] int64: the position of each token in its sequence."""
    attended: int
    """Positions of the longest sequence, with its new tokens; a bound is enough."""
    row: torch.Tensor | None = None
    """[t] int64: the sequence of each token; None = one token per sequence."""
    starts: torch.Tensor | None = None
    """[b + 1] int64: the first token of each sequence, then t; None = one token per sequence."""
    most: int = 1
    """Most tokens of a sequence in this pass."""
    owner: torch.Tensor | None = None
    """[p'] int64: the sequence of each of the first p' blocks; None = find blocks by `table`."""
    first: torch.Tensor | None = None
    """[p'] int64: the position in its sequence of the first cell of each of those blocks; beyond any
    position if nothing owns the block."""

    @cached_property
    def bounds(self) -> torch.Tensor:
        """[b + 1] int32: `starts`."""
        if self.starts is not None:
            return self.starts.int()
        size = len(self.table) + 1
        return torch.arange(size, device=self.table.device, dtype=torch.int32)

    @cached_property
    def pages(self) -> torch.Tensor:
        """[b, m] int32: `table`."""
        return self.table.int()

    @cached_property
    def cells(self) -> torch.Tensor:
        """[t]: where in the p·c cells of the cache each token's key and value belong."""
        size = block_size()
        column = torch.div(self.positions, size, rounding_mode="floor")
        rows = torch.arange(len(self.table), device=column.device) if self.row is None else self.row
        return self.table[rows, column] * size + self.positions % size

    @cached_property
    def side_by_side(self) -> torch.Tensor:
        """[t]: the index of each token in [b × most]."""
        assert self.row is not None and self.starts is not None
        steps = torch.arange(len(self.row), device=self.row.device)
        return self.row * self.most + steps - self.starts[self.row]

    @cached_property
    def lengths(self) -> torch.Tensor:
        """[b] int32: positions of each sequence, with its new tokens."""
        last = self.positions if self.starts is None else self.positions[self.starts[1:] - 1]
        return (last + 1).int()

    @cached_property
    def newest(self) -> torch.Tensor:
        """[p']: the newest position of each block's sequence, counted from the block's first."""
        assert self.owner is not None and self.first is not None
        return self.positions[self.owner] - self.first


class KeyValueCache:
    """The keys and values of this rank's layers, [p + 1, c, k, d] each.

    The last block belongs to no sequence: rows that only fill up a batch write there.
    """

    def __init__(
        self, *, layers: int, blocks: int, kv_heads: int, head_size: int, dtype: torch.dtype
    ):
        shape = (blocks + 1, block_size(), kv_heads, head_size)
        place = devices.device()
        self.keys = [torch.empty(shape, dtype=dtype, device=place) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=place) for _ in range(layers)]
        self._used = 0
        for tensor in (*self.keys, *self.values):
            tensor[-1].zero_()

    def use(self, blocks: int) -> None:
        """Prepares the first `blocks` blocks: new memory may hold anything, NaN too, and a masked
        key or value must be a number."""
        if blocks > self._used:
            for tensor in (*self.keys, *self.values):
                tensor[self._used : blocks].zero_()
            self._used = blocks

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies the blocks `source` to the blocks `target`, in all layers."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]

    def attend(
        self,
        layer: int,
        *,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        places: Places,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Stores the new keys and values [t, k, d]. Returns causal attention [t, n·d] of `query`
        [t, k, n/k, d] over all positions of its sequence."""
        keys, values = self.keys[layer], self.values[layer]
        keys.view(-1, *key.shape[1:]).index_copy_(0, places.cells, key)
        values.view(-1, *value.shape[1:]).index_copy_(0, places.cells, value)
        if query.dtype != torch.float32 and devices.has_paged_attention():
            context = _paged(query, keys, values, places=places, scale=scale)
        elif places.owner is not None:
            context = _by_block(query, keys, values, places=places, scale=scale)
        else:
            context = _gathered(query, keys, values, places=places, scale=scale)
        return context.reshape(len(query), -1)


def _paged(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    places: Places,
    scale: float | None,
) -> torch.Tensor:
    """By FlashAttention's kernel for paged caches."""
    from torch.nn.attention.varlen import varlen_attn

    context = varlen_attn(
        query.flatten(1, 2),
        keys,
        values,
        places.bounds,
        None,
        places.most,
        places.attended,
        scale=scale,
        window_size=(-1, 0),  # causal, aligned to the last position
        enable_gqa=query.shape[2] > 1,
        seqused_k=places.lengths,
        block_table=places.pages,
    )
    assert isinstance(context, torch.Tensor)
    return context


def _by_block(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    places: Places,
    scale: float | None,
) -> torch.Tensor:
    """One token per sequence, on a CPU: attention within each block, then the mean over the blocks of
    a sequence, weighted by their parts of the softmax's sum (Flash-Decoding, Dao et al. 2023).

    Every key and value is read once, where it lies. The n/k query heads that share a key-value head
    are the rows of one product.
    """
    owner, newest = places.owner, places.newest
    assert owner is not None
    count, wide = len(owner), min(places.attended, keys.shape[1])
    # A block of nobody shows its first cell, because a softmax over nothing is not a number.
    steps = torch.arange(wide, device=owner.device)
    visible = (steps <= newest.clamp(min=0)[:, None])[:, None, None]
    # The kernel behind scaled_dot_product_attention, which does not hand on the second result.
    context, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[owner],
        keys[:count, :wide].transpose(1, 2),
        values[:count, :wide].transpose(1, 2),
        attn_mask=_additive(visible, query.dtype),
        scale=scale,
    )
    if places.attended <= keys.shape[1]:  # every sequence has a single block
        return context[places.table[:, 0]]
    log_sums = log_sums.masked_fill((newest < 0)[:, None, None], -torch.inf)
    shape = (len(query), *log_sums.shape[1:])
    index = owner[:, None, None].expand_as(log_sums)
    peaks = log_sums.new_full(shape, -torch.inf).scatter_reduce_(0, index, log_sums, "amax")
    weights = torch.exp(log_sums - peaks[owner])
    total = weights.new_zeros(shape).index_add_(0, owner, weights)
    weighted = context * (weights / total[owner])[..., None]
    return weighted.new_zeros(query.shape).index_add_(0, owner, weighted).to(query.dtype)


def _gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    places: Places,
    scale: float | None,
) -> torch.Tensor:
    """Any number of tokens per sequence, over copies of the blocks side by side."""
    blocks = places.table[:, : -(-places.attended // keys.shape[1])]
    keys, values = (
        x[blocks].flatten(1, 2)[:, : places.attended].transpose(1, 2) for x in (keys, values)
    )
    steps = torch.arange(keys.shape[2], device=query.device)
    if places.row is None:
        visible = (steps <= places.positions[:, None])[:, None, None]
        mask = _additive(visible, query.dtype)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    cells, rows = places.side_by_side, len(blocks) * places.most
    wide = query.new_zeros(rows, *query.shape[1:]).index_copy_(0, cells, query)
    wide = wide.view(len(blocks), places.most, *query.shape[1:]).permute(0, 2, 3, 1, 4)
    seen = places.positions.new_zeros(rows).index_copy_(0, cells, places.positions)
    visible = steps <= seen.view(len(blocks), places.most, 1)
    keys, values = (x.repeat_interleave(query.shape[2], 1) for x in (keys, values))
    mask = _additive(visible[:, None], query.dtype)
    context = F.scaled_dot_product_attention(
        wide.flatten(1, 2), keys, values, attn_mask=mask, scale=scale
    )
    return context.transpose(1, 2).flatten(0, 1)[cells]


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)
