"""Tensors in buckets, for the transports from GPU to GPU (broadcast.py, same_gpu.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rpp.hf.families import Row
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.model import hf_tensors
from megatron_rpp.model.language_model import chunks

BUCKET_BYTES = 2**29
"""Most bytes of a bucket, unless a single parameter has more."""


@dataclass(frozen=True)
class Bucket:
    """Tensors that are sent together."""

    rows: int
    """How many of Megatron's parameters they make up."""
    names: list[str]
    shapes: list[list[int]]
    bytes: int


def plan(rows: list[Row], settings: dict[str, Any], width: int) -> list[Bucket]:
    """The buckets of a model with these rows; `width` is the size of one value in bytes."""
    found: list[Bucket] = []
    names: list[str] = []
    shapes: list[list[int]] = []
    count = size = 0
    for row in rows:
        sizes = row.sizes(settings)
        more = width * sum(torch.Size(shape).numel() for shape in sizes)
        if count and size + more > BUCKET_BYTES:
            found.append(Bucket(count, names, shapes, size))
            names, shapes, count, size = [], [], 0, 0
        names += row.hf
        shapes += [list(shape) for shape in sizes]
        count, size = count + 1, size + more
    return [*found, Bucket(count, names, shapes, size)]


def plan_of(model: torch.nn.Module) -> tuple[list[Bucket], torch.dtype]:
    """The buckets of a running model, and the type of its values."""
    dtype = next(model.parameters()).dtype
    settings = chunks(model)[0].architecture
    return plan(hf_tensors.all_rows(model), settings, dtype.itemsize), dtype


def fill(buffer: torch.Tensor, bucket: Bucket, tensors: Iterator[hf_tensors.Tensors]) -> None:
    """Copies the next tensors into `buffer`, uint8, end to end."""
    start = 0
    for _ in range(bucket.rows):
        heartbeat.current.beat()
        for _, tensor in next(tensors):
            flat = tensor.view(-1).view(torch.uint8)
            buffer[start : start + len(flat)].copy_(flat)
            start += len(flat)
    assert start == bucket.bytes, (start, bucket.bytes)


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in vLLM's requests, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
