"""How long a save stalls a run: in the foreground, and in the background.

Runs whole REINFORCE++ steps of the reference work with a wider model (20 million parameters, a
checkpoint of 0.31 GB) and fewer samples, and saves after every step: first in the foreground, then
in the background. tools/benchmark.py calls it; the result is one JSON line:

  waiting, background   stall_seconds: median time that one save stalled the run, up to the moment
                        at which the checkpoint is current; step_seconds: median of whole steps
                        without the stalls, while a background save takes its share of the machine;
                        host_bytes, device_bytes: the most memory that a rank needed for a save in
                        addition, up to its return (the writer of a background save not included)
  own_bytes             what the largest rank writes: its share of weights and Adam's state
  stall_ratio           background / waiting

Left out: remote file systems; the disk here may be a cache in memory.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from benchmarks.peak_memory import PeakMemory
from benchmarks.reference_work import reference_run
from megatron_rpp.parallel import groups
from megatron_rpp.parallel.device import describe
from megatron_rpp.runtime import checkpointing
from megatron_rpp.runtime.run import Run
from megatron_rpp.runtime.session import freeze_heap
from megatron_rpp.runtime.step_progress import StepProgress
from megatron_rpp.train import rl_step

WIDE = {
    "model.layers": 6, "model.hidden": 512, "model.heads": 8, "model.ffn_hidden": 1376,
    "rollout.prompts_per_step": 4, "rollout.samples_per_prompt": 2, "rollout.max_new_tokens": 16,
    "rollout.min_new_tokens": 16, "checkpoint.interval": 1, "checkpoint.keep": 1,
    "train.steps": 1000,
}  # fmt: skip


def measure(run: Run, saves: int) -> dict:
    """`saves` steps, each followed by a save."""
    stalls, steps, peaks = [], [], []

    def step() -> None:
        start = time.perf_counter()
        rl_step(run)
        run.step_progress = StepProgress()
        steps.append(time.perf_counter() - start)

    for _ in range(saves):
        step()
        run.advance(run.config.rollout.prompts_per_step)
        with PeakMemory() as peak:
            checkpointing.save_if_due(run, {})
            checkpointing.publish_if_written(run)
        peaks.append((peak.host, peak.device))
        while run.saves.pending is not None:  # a run takes its next steps in the meantime
            step()
            checkpointing.publish_if_written(run)
        stalls.append(run.saves.take_stall_seconds())
    most = [max(column) for column in zip(*peaks, strict=True)]
    host, device = groups.reduce_sums(most, dist.group.WORLD, dist.ReduceOp.MAX)
    return {
        "stall_seconds": statistics.median(stalls),
        "step_seconds": statistics.median(steps),
        "host_bytes": int(host),
        "device_bytes": int(device),
    }


def worker(saves: int, settings: list[str]) -> None:
    """One rank; the main rank prints the result."""
    folder = tempfile.TemporaryDirectory(prefix="checkpoints_")
    wide = [f"--{name}={value}" for name, value in WIDE.items()]
    freeze_heap()  # like a program
    run = reference_run([*wide, *settings])
    directory = groups.broadcast_object(folder.name)
    result, waits = {"device": describe()}, replace(run.config.checkpoint, dir=directory)
    for name, background in (("waiting", False), ("background", True)):
        settings_now = replace(waits, async_save=background)
        run.config = replace(run.config, checkpoint=settings_now)
        measure(run, 1)  # the first save is not counted
        result[name] = measure(run, saves)
    if groups.is_main():
        files = [f for f in Path(directory).rglob("*") if f.is_file()]
        size = sum(f.stat().st_size for f in files)
        own = Counter[str]()
        for file in files:
            own[file.name.split("_")[2] if file.suffix == ".distcp" else ""] += file.stat().st_size
        stalls = [result[name]["stall_seconds"] for name in ("background", "waiting")]
        print(
            json.dumps(
                result
                | {
                    "bytes": size,
                    "own_bytes": max(own.values()),
                    "stall_ratio": stalls[0] / stalls[1],
                }
            )
        )
    groups.stop()
    folder.cleanup()
