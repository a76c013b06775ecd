"""How long a save stalls a run: in the foreground, and in the background.

Runs whole REINFORCE++ steps of the reference work with a wider model (20 million parameters, a
checkpoint of 0.31 GB) and fewer samples, and saves after every step: first in the foreground, then
in the background. tools/benchmark.py calls it; the result is one JSON line:

  waiting, background   stall_seconds: median time that one save stalled the run, up to the moment
                        at which the checkpoint is current; step_seconds: median of whole steps
                        without the stalls, while a background save takes its share of the machine
  stall_ratio           background / waiting

Left out: remote file systems; the disk here may be a cache in memory.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.reference_work import reference_run
from megatron_rpp.parallel import groups
from megatron_rpp.parallel.device import describe
from megatron_rpp.runtime import checkpointing
from megatron_rpp.runtime.run import Run
from megatron_rpp.runtime.session import frozen_heap
from megatron_rpp.train import rl_step

WIDE = {
    "model.layers": 6, "model.hidden": 512, "model.heads": 8, "model.ffn_hidden": 1376,
    "rollout.prompts_per_step": 4, "rollout.samples_per_prompt": 2, "rollout.max_new_tokens": 16,
    "rollout.min_new_tokens": 16, "checkpoint.interval": 1, "checkpoint.keep": 1,
    "train.steps": 1000,
}  # fmt: skip


def measure(run: Run, saves: int) -> dict:
    """`saves` steps, each followed by a save."""
    stalls, steps = [], []

    def step() -> None:
        start = time.perf_counter()
        rl_step(run)
        steps.append(time.perf_counter() - start)

    for _ in range(saves):
        step()
        run.advance(run.config.rollout.prompts_per_step)
        checkpointing.save_if_due(run, {})
        checkpointing.publish_if_written(run)
        while run.saves.pending is not None:  # a run takes its next steps in the meantime
            step()
            checkpointing.publish_if_written(run)
        stalls.append(run.saves.take_stall_seconds())
    return {"stall_seconds": statistics.median(stalls), "step_seconds": statistics.median(steps)}


def worker(saves: int, settings: list[str]) -> None:
    """One rank; the main rank prints the result."""
    folder = tempfile.TemporaryDirectory(prefix="checkpoints_")
    wide = [f"--{name}={value}" for name, value in WIDE.items()]
    run = reference_run([*wide, *settings])
    directory = groups.broadcast_object(folder.name)
    result, waits = {"device": describe()}, replace(run.config.checkpoint, dir=directory)
    for name, background in (("waiting", False), ("background", True)):
        settings_now = replace(waits, async_save=background)
        run.config = replace(run.config, checkpoint=settings_now)
        with frozen_heap():  # like a run
            measure(run, 1)  # the first save is not counted
            result[name] = measure(run, saves)
    if groups.is_main():
        size = sum(f.stat().st_size for f in Path(directory).rglob("*") if f.is_file())
        stalls = [result[name]["stall_seconds"] for name in ("background", "waiting")]
        print(json.dumps(result | {"bytes": size, "stall_ratio": stalls[0] / stalls[1]}))
    groups.stop()
    folder.cleanup()
