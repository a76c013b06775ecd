"""Whole REINFORCE++ steps of the reference work, timed on the main rank."""

from __future__ import annotations

import json
import statistics
import time

from benchmarks.reference_work import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    PROMPTS,
    SAMPLES,
    reference_run,
)
from megatron_rpp.algorithms import global_whiten
from megatron_rpp.config import ParallelConfig
from megatron_rpp.parallel import groups
from megatron_rpp.parallel.device import describe
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.runtime import rollouts
from megatron_rpp.runtime.run import Run
from megatron_rpp.train import rl_step

WARMUP = 2
"""Steps that are not timed."""


def worker(steps: int, settings: list[str]) -> None:
    """One rank: WARMUP + `steps` steps; the main rank prints the result."""
    run = reference_run(settings)
    rows, buffer = timed_steps(run, steps)
    whitening = _whitening_seconds(buffer)
    if groups.is_main():
        result = summary(rows, run.config.parallel)
        result["whitening_share"] = whitening / result["step_seconds"]["median"]
        print(json.dumps(result))
    groups.stop()


def timed_steps(run: Run, steps: int) -> tuple[list[dict], RolloutBuffer]:
    """The rows of `steps` steps after WARMUP others, and the rollouts of the last one."""
    measured = []
    for _ in range(WARMUP + steps):
        row, buffer = rl_step(run)
        assert bool((buffer.response_lengths == NEW_TOKENS).all())
        run.advance(PROMPTS)
        measured.append(row)
    rollouts.end(run)
    return measured[WARMUP:], buffer


def _whitening_seconds(buffer: RolloutBuffer) -> float:
    """Seconds to normalise the step's returns over all replicas, the collective included."""
    returns, mask = buffer.padded(buffer.returns), buffer.padded(buffer.mask)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        global_whiten(returns, mask, groups.data_group())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def summary(rows: list[dict], parallel: ParallelConfig) -> dict:
    phases = [tag for tag in rows[0] if tag.startswith("time/") and tag != "time/step"]
    seconds = [row["time/step"] for row in rows]
    median = statistics.median(seconds)
    return {
        "trainer": "megatron_rpp",
        "layout": {
            "tensor": parallel.tensor, "pipeline": parallel.pipeline, "data": groups.data_size(),
        },
        "device": describe(),
        "step_seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "phases": {
            tag.removeprefix("time/"): statistics.median(row[tag] for row in rows)
            for tag in phases
        },
        "tokens_per_second": PROMPTS * SAMPLES * (PROMPT_TOKENS + NEW_TOKENS) / median,
        "generated_tokens_per_second": statistics.median(
            row["throughput/generated_tokens_per_second"] for row in rows
        ),
    }  # fmt: skip
