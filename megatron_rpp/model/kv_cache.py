"""Keys and values of many growing sequences in blocks (PagedAttention: Kwon et al., arXiv 2309.06180).

The cache is a number of blocks of `block_size()` positions each. A sequence has as many as its length
needs, anywhere (rollout/blocks.py decides which). So the number of blocks bounds the memory, and not the
number of sequences times the longest one.

Shape legend: p blocks, c positions in a block, t tokens of a forward pass, b sequences, n query heads of
this rank, k key-value heads of this rank, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_rpp.model import attention_metadata
from megatron_rpp.model.attention_metadata import AttentionMetadata
from megatron_rpp.parallel import device as devices


class KeyValueCache:
    """The keys and values of this rank's layers, [p + 1, c, k, d] each.

    The last block belongs to no sequence: rows that only pad a batch write there.
    """

    def __init__(
        self, *, layers: int, blocks: int, kv_heads: int, head_size: int, dtype: torch.dtype
    ):
        shape = (blocks + 1, attention_metadata.block_size(), kv_heads, head_size)
        self.keys = [_empty(shape, dtype) for _ in range(layers)]
        self.values = [_empty(shape, dtype) for _ in range(layers)]
        self.dtype = dtype
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
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Stores the new keys and values [t, k, d]. Returns causal attention [t, n·d] of `query`
        [t, k, n/k, d] over all positions of its sequence."""
        keys, values = self.keys[layer], self.values[layer]
        keys[metadata.cells] = key
        values[metadata.cells] = value
        if metadata.paged:
            attention = _paged
        elif metadata.owner is not None:
            attention = _by_block
        elif metadata.row is None:
            attention = _gathered
        else:
            attention = _side_by_side
        return attention(query, keys, values, metadata=metadata).reshape(len(query), -1)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for [p + 1, c, k, d]. If blocks are read in place, the positions of a head lie side by
    side."""
    blocks, positions, heads, size = shape
    if devices.scans_cache():
        shape = (blocks, heads, positions, size)
        return torch.empty(shape, dtype=dtype, device=devices.device()).transpose(1, 2)
    return torch.empty(shape, dtype=dtype, device=devices.device())


def _paged(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, metadata: AttentionMetadata
) -> torch.Tensor:
    """By FlashAttention's kernel for paged caches, for any number of tokens per sequence."""
    from torch.nn.attention.varlen import varlen_attn

    context = varlen_attn(
        query.flatten(1, 2),
        keys,
        values,
        metadata.bounds,
        None,
        metadata.most,
        metadata.table.shape[1] * keys.shape[1],  # a bound; constant, for CUDA graphs
        window_size=(-1, 0),  # causal, aligned to the last position
        enable_gqa=query.shape[2] > 1,
        seqused_k=metadata.lengths,
        block_table=metadata.pages,
        num_splits=1,  # otherwise the rounding of a sequence depends on the others
    )
    assert isinstance(context, torch.Tensor)
    return context


def _by_block(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, metadata: AttentionMetadata
) -> torch.Tensor:
    """One token per sequence, on a CPU: products with each block, then sums over the blocks of a
    sequence (Flash-Decoding, Dao et al. 2023).

    Every fp32 key and value is read once, where it lies. Blocks are read to their end, because a CPU
    prefetches contiguous memory best. The n/k query heads that share a key-value head are the rows of one
    product.
    """
    owner, mask = metadata.owner, metadata.block_mask
    assert owner is not None
    keys, values = (x[: len(owner)].transpose(1, 2).float() for x in (keys, values))
    queries = query.float()[owner] * query.shape[-1] ** -0.5
    scores = torch.matmul(queries, keys.mT).add_(mask)  # [p', k, n/k, c]
    if metadata.attended <= attention_metadata.block_size():  # every sequence has a single block
        return (scores.softmax(-1) @ values)[metadata.table[:, 0]].to(query.dtype)
    peaks = scores.amax(-1)
    index = owner[:, None, None].expand_as(peaks)
    peak = peaks.new_full(query.shape[:-1], -torch.inf).scatter_reduce_(0, index, peaks, "amax")
    weights = scores.sub_(peak[owner][..., None]).exp_()
    sums = peak.new_zeros(peak.shape).index_add_(0, owner, weights.sum(-1))
    context = keys.new_zeros(query.shape).index_add_(0, owner, weights @ values)
    return context.div_(sums[..., None]).to(query.dtype)


def _copied(blocks: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
    """Copies the blocks [p, c, k, d] of each sequence side by side: [b, k, attended, d]."""
    chosen = metadata.table[:, : -(-metadata.attended // blocks.shape[1])]
    return blocks[chosen].flatten(1, 2)[:, : metadata.attended].transpose(1, 2)


def _gathered(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, metadata: AttentionMetadata
) -> torch.Tensor:
    """One token per sequence, over copies of its blocks."""
    keys, values = _copied(keys, metadata), _copied(values, metadata)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=metadata.token_mask)


def _side_by_side(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, metadata: AttentionMetadata
) -> torch.Tensor:
    """Several tokens per sequence, padded to the longest, over copies of its blocks."""
    cells, count = metadata.side_by_side, len(metadata.table)
    shared = query.shape[2]
    padded = query.new_zeros(count * metadata.most, *query.shape[1:]).index_copy_(0, cells, query)
    padded = padded.view(count, metadata.most, *query.shape[1:]).flatten(2, 3).transpose(1, 2)
    keys, values = (_copied(x, metadata).repeat_interleave(shared, 1) for x in (keys, values))
    context = F.scaled_dot_product_attention(padded, keys, values, attn_mask=metadata.prompt_mask)
    return context.transpose(1, 2).flatten(0, 1)[cells]
