"""PyTorch's attention kernel for packed rows and paged caches, which needs a GPU, as plain attention.

Every call is bound to the signature of the real function first. Then it must meet the conditions of
FlashAttention (torch 2.13, torch/nn/attention/varlen.py and mha_varlen_fwd). The result is that of
fp64, rounded once. Left out: sizes of pages, which must be multiples of 256 on a GPU.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from megatron_rpp.parallel import device as devices

SIGNATURE = inspect.signature(varlen.varlen_attn)


def install(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts the stand-in in the place of the kernel; returns its calls, a dictionary each."""
    calls: list[dict[str, Any]] = []

    def varlen_attn(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return attend(**bound.arguments)

    patch.setattr(varlen, "varlen_attn", varlen_attn)
    patch.setattr(devices, "has_varlen_attention", lambda: True)
    patch.setattr(devices, "has_paged_attention", lambda: True)
    return calls


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    **options: Any,
) -> torch.Tensor:
    """Attention [T, n, d] of query [T, n, d] over key and value, [T, k, d] or pages [p, c, k, d]."""
    assert options["window_size"] == (-1, 0) and options["return_aux"] is None
    assert all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (query, key, value))
    group = query.shape[1] // key.shape[-2]
    assert group * key.shape[-2] == query.shape[1] and (group == 1 or options["enable_gqa"])
    used, table = options["seqused_k"], options["block_table"]
    if table is None:
        assert used is None and cu_seq_k is not None
        keys, values = (x.split(bounds(cu_seq_k).diff().tolist()) for x in (key, value))
    else:
        assert cu_seq_k is None and used is not None and not query.requires_grad
        assert table.dtype == used.dtype == torch.int32 and len(table) == len(used)
        keys, values = (pages(x, table, used) for x in (key, value))
    queries = query.split(bounds(cu_seq_q).diff().tolist())
    assert max(map(len, queries)) <= max_q and max(map(len, keys)) <= max_k
    scale = options["scale"] or 1 / math.sqrt(query.shape[-1])
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([_sequence(*part, scale=scale, group=group) for part in parts])


def bounds(cumulative: torch.Tensor) -> torch.Tensor:
    assert cumulative.dtype == torch.int32 and cumulative[0] == 0
    return cumulative


def pages(pool: torch.Tensor, table: torch.Tensor, used: torch.Tensor) -> list[torch.Tensor]:
    """The first `used` positions of each sequence; no other page is read."""
    size = pool.shape[1]
    rows = zip(table.tolist(), used.tolist(), strict=True)
    return [pool[blocks[: -(-count // size)]].flatten(0, 1)[:count] for blocks, count in rows]


def _sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, group: int
) -> torch.Tensor:
    """One sequence [s, heads, d]; the last query is at the last key."""
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = scale * q @ k.transpose(1, 2)
    later = torch.ones_like(scores, dtype=torch.bool).triu(len(key) - len(query) + 1)
    context = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
    return context.transpose(0, 1).to(query.dtype)
