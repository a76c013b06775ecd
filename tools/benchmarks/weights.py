"""How fast new weights come to vLLM through shared files, against a plain write of as many bytes.

A model of SmolLM2's layers (576 × 30, 106 million parameters, 0.43 GB in fp32). The two ways
alternate, after a round that is not counted; in both all ranks write at once. tools/benchmark.py calls
it; the result is one JSON line:

  write    seconds in which all ranks gather, split and write their part as safetensors
  plain    seconds in which they write as many bytes of one tensor to plain files
  push     seconds of whole pushes to a server, with the update of its weights; only if the settings
           name vLLM's Python (--rollout.engine vllm --rollout.vllm.python FILE)
  *_rate   the bytes of the model per second

Left out: transports nccl and ipc; remote file systems.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.reference_work import reference_run
from megatron_rpp.model import hf_tensors
from megatron_rpp.parallel import groups
from megatron_rpp.parallel.device import describe
from megatron_rpp.rollout.vllm.engine import VllmEngine
from megatron_rpp.rollout.vllm.weights import SharedFiles
from megatron_rpp.runtime.run import Run

SMOLLM2 = {
    "model.layers": 30, "model.hidden": 576, "model.ffn_hidden": 1536, "model.heads": 9,
    "model.kv_heads": 3, "algorithm.kl_coef": 0,
}  # fmt: skip


def timed(task: Callable[[], object]) -> float:
    """Seconds until all ranks have done the task."""
    dist.barrier()
    start = time.perf_counter()
    task()
    dist.barrier()
    return time.perf_counter() - start


def plain_write(folder: Path, content: memoryview) -> None:
    """Writes a file."""
    with open(folder / f"plain-{dist.get_rank()}", "wb") as file:
        file.write(content)


def worker(rounds: int, settings: list[str]) -> None:
    """One rank; the main rank prints the result."""
    run = reference_run([*(f"--{name}={value}" for name, value in SMOLLM2.items()), *settings])
    parent = Path(run.config.rollout.vllm.dir)
    name = tempfile.mkdtemp(dir=parent) if groups.is_main() else None
    folder = Path(groups.broadcast_object(name))
    size = sum(t.nbytes for row in hf_tensors.shared_out(run.policy.model) for _, t in row)
    seconds = measure(run, folder, size, rounds=rounds)
    whole = int(sum(groups.gather_objects(size, dist.group.WORLD)))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {"device": describe(), "bytes": whole, **medians}
    result |= {f"{name}_rate": whole / median for name, median in medians.items()}
    if groups.is_main():
        shutil.rmtree(folder)
        print(json.dumps(result | {"write_ratio": medians["plain"] / medians["write"]}))
    groups.stop()


def push(engine: VllmEngine, model: torch.nn.Module) -> None:
    """Sends the weights. Raises RuntimeError if a server does not take them."""
    problems = engine.transport.push(model, engine.fleet.cared_for, "benchmark", stop=lambda: False)
    if problems:
        raise RuntimeError("; ".join(problems.values()))


def measure(run: Run, folder: Path, size: int, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round after round."""
    model, files = run.policy.model, SharedFiles(folder, 600.0)
    content = torch.ones(size, dtype=torch.uint8).numpy().data  # written, so the pages are there
    ways: dict[str, Callable[[], object]] = {
        "write": lambda: files.write(model, lambda: None),
        "plain": lambda: plain_write(folder, content),
    }
    if isinstance(run.engine, VllmEngine):
        engine = run.engine
        engine.prepare(lambda: False)  # starts the servers
        ways["push"] = partial(push, engine, model)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            taken = timed(way)
            if groups.is_main():
                for file in folder.iterdir():
                    file.unlink()
            if number:
                seconds[name].append(taken)
    return seconds
