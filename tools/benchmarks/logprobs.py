"""Peak memory and time of token log-probs, forward and backward (`tools/benchmark.py logprobs`).

    ours      logits in chunks, inside one function with the output projection
    unfused   this rank's logits of all rows at once, then Megatron's vocab_parallel_cross_entropy
    gathered  the logits of all rows gathered over the tensor-parallel ranks, then log_softmax

Each case runs in new processes, because the operating system reports the peak of a process. What the
process held before (inputs, weights, libraries) is subtracted. Left out: entropy, bf16.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from megatron_rpp.model.logprobs import vocab_parallel_logprobs
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups

from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)

VARIANTS = ("ours", "unfused", "gathered")
HIDDEN = 256


def _logprobs(variant: str, *, hidden, weight, targets):
    if variant == "ours":
        group = groups.tensor_group()
        return vocab_parallel_logprobs(
            hidden, weight, targets, valid_rows=len(weight), temperature=1.0, group=group
        )[0]
    logits = (hidden @ weight.t()).float()
    if variant == "unfused":
        return -vocab_parallel_cross_entropy(logits[:, None], targets[:, None])[:, 0]
    whole = gather_from_tensor_model_parallel_region(logits)
    return whole.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _rank(  # noqa: PLR0917 (spawn calls it by position)
    rank: int, tensor: int, variant: str, vocabulary: int, rows: int, folder: str
) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(tensor)}
    store = dist.FileStore(f"{folder}/store", tensor)
    dist.init_process_group(devices.backend(), store=store, rank=rank, world_size=tensor)
    groups.start(tensor, 1, seed=0)
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=random).to(devices.device()).requires_grad_()
    weight = torch.randn(vocabulary // tensor, HIDDEN, generator=random) * 0.05
    weight = weight.to(devices.device()).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=random).to(devices.device())
    # A first, tiny call pays the one-time costs.
    _logprobs(variant, hidden=hidden[:2], weight=weight, targets=targets[:2]).sum().backward()
    hidden.grad = weight.grad = None
    before, start = devices.peak_memory_gb(), time.perf_counter()
    _logprobs(variant, hidden=hidden, weight=weight, targets=targets).sum().backward()
    seconds, peak = time.perf_counter() - start, devices.peak_memory_gb() - before
    if rank == 0:
        result = {"megabytes": round(peak * 1e3), "seconds": round(seconds, 3)}
        Path(folder, "result.json").write_text(json.dumps(result))
    groups.stop()


def run(tensor: int, vocabularies: list[int], lengths: list[int]) -> dict:
    """Runs every variant for every vocabulary and number of rows on `tensor` ranks; prints a table."""
    results = []
    table = Table("vocabulary", "rows", *VARIANTS, title=f"peak MB (seconds), TP{tensor}")
    for vocabulary in vocabularies:
        for rows in lengths:
            found = {}
            for variant in VARIANTS:
                with tempfile.TemporaryDirectory() as folder:
                    mp.spawn(_rank, (tensor, variant, vocabulary, rows, folder), nprocs=tensor)
                    found[variant] = json.loads(Path(folder, "result.json").read_text())
            results.append({"vocabulary": vocabulary, "rows": rows, **found})
            cells = [f"{cell['megabytes']} ({cell['seconds']})" for cell in found.values()]
            table.add_row(str(vocabulary), str(rows), *cells)
    Console(stderr=True).print(table)
    return {"benchmark": "logprobs", "tensor": tensor, "hidden": HIDDEN, "results": results}
