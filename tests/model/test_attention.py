"""Attention of packed rows, whole and over 2 and 4 context-parallel ranks, against fp64.

The oracle is a softmax written out per sequence in fp64, differentiated by autograd. Outputs and
gradients of query, key and value must agree to 1e-5 of the largest true value. PyTorch's kernel for
packed rows needs a GPU: a stand-in takes its place (varlen_kernel.py), in bf16.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.model.attention import CoreAttention, Row
from megatron_rpp.model.build import transformer_config
from megatron_rpp.parallel import groups
from megatron_rpp.rollout.packing import Split, pack, zigzag
from tests.distributed import run_ranks
from tests.model import varlen_kernel
from tests.rollout.test_buffer import make_buffer

HEADS, KV_HEADS, SIZE, TOLERANCE = 4, 2, 8, 1e-5
ROUNDED = 2**-8  # of bf16
LENGTHS = [5, 8, 2, 13]
CONTEXTS = (1, 2, 4)
MODEL = ModelConfig(hidden=HEADS * SIZE, heads=HEADS, kv_heads=KV_HEADS)


def row_on(rank, context):
    """Returns (packing, indices of this rank's tokens, padded lengths) of the row of LENGTHS."""
    buffer = make_buffer([([1], [2] * (length - 1)) for length in LENGTHS])
    split = Split(context, rank)
    row = split.row_length(buffer.lengths)
    batch = pack(
        buffer, list(range(len(LENGTHS))), split, row_length=row, device=torch.device("cpu")
    )
    pieces = batch.packing.boundaries.diff().long()
    return batch.packing, zigzag(pieces, context)[rank], pieces.tolist()


def inputs(tokens, dtype):
    """Query, key, value and the gradient of the output of a whole row, rounded to `dtype`."""
    random = torch.Generator().manual_seed(tokens)
    shapes = [(HEADS, SIZE), (KV_HEADS, SIZE), (KV_HEADS, SIZE), (HEADS, SIZE)]
    return [torch.randn(tokens, *shape, generator=random).to(dtype) for shape in shapes]


def oracle(pieces, dtype=torch.float32):
    """Output [T, n, d] and the gradients of query, key and value, fp64."""
    query, key, value, upstream = (x.double() for x in inputs(sum(pieces), dtype))
    wanted = [x.requires_grad_() for x in (query, key, value)]
    outputs, start = [], 0
    for length in pieces:
        q, k, v = (x[start : start + length].transpose(0, 1) for x in wanted)
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(SIZE)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        outputs.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        start += length
    output = torch.cat(outputs)
    return [output.detach(), *torch.autograd.grad(output, wanted, upstream)]


def attend(rank, context, dtype=torch.float32):
    """Returns this rank's output and gradients, its tokens' indices in the row, and the lengths."""
    groups.start(1, 1, seed=0, context=context)
    config = transformer_config(MODEL, ParallelConfig(context=context))

    class Groups:
        cp = groups.context_group()

    attention = CoreAttention(config, 1, None, "self", pg_collection=Groups)
    packing, own, pieces = row_on(groups.context_group().rank(), context)
    query, key, value, upstream = (x[own, None] for x in inputs(sum(pieces), dtype))
    wanted = [x.requires_grad_() for x in (query, key, value)]
    output = attention(*wanted, packed_seq_params=Row.of(packing))
    gradients = torch.autograd.grad(output, wanted, upstream.flatten(2))
    groups.destroy()
    found = [output.unflatten(2, (HEADS, SIZE)).detach(), *gradients]
    return [x[:, 0] for x in found], own, pieces


def on_every_context(rank):
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    return {context: attend(rank, context) for context in CONTEXTS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(on_every_context, 4, tmp_path_factory.mktemp("ranks"))


def compare(found, wholes, *, own, tolerance):
    for name, ours, whole in zip(("output", "query", "key", "value"), found, wholes, strict=True):
        error = (ours.double() - whole[own]).abs().max() / whole.abs().max()
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("context", CONTEXTS)
def test_outputs_and_gradients_are_those_of_fp64(ranks, context):
    held = []
    for rank in ranks[:context]:
        found, own, pieces = rank[context]
        held += own.tolist()
        compare(found, oracle(pieces), own=own, tolerance=TOLERANCE)
    assert sorted(held) == list(range(sum(pieces)))


@pytest.mark.parametrize("kernel", [True, False], ids=["its kernel", "side by side"])
def test_pytorchs_kernel_for_packed_rows(kernel, monkeypatch):
    """It takes 16-bit numbers. Without it, sequences lie side by side, whatever the numbers."""
    calls = varlen_kernel.install(monkeypatch) if kernel else []
    found, own, pieces = attend(0, 1, torch.bfloat16)
    assert len(calls) == kernel
    compare(found, oracle(pieces, torch.bfloat16), own=own, tolerance=ROUNDED if kernel else 0.02)
    attend(0, 1)
    assert len(calls) == kernel, "fp32 is not for it"


def test_a_sequence_does_not_see_its_neighbours(ranks):
    """The comparison can fail: one long sequence instead of four gives other outputs."""
    found, own, pieces = ranks[0][1]
    whole = oracle([sum(pieces)])
    assert (found[0].double() - whole[0][own]).abs().max() > 0.1
