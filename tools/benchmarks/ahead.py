"""Whole steps of the reference work on vLLM, for rollout.ahead: one rank and its server.

With --apart the rank keeps to the first half of the cores and the server to the second, as if each had
a device of its own. Without it both use all cores, so that neither gains by the other's waiting.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress

import psutil

from benchmarks.reference_work import PROMPTS, reference_run
from benchmarks.rl_step import summary, timed_steps
from megatron_rpp.parallel import groups
from megatron_rpp.train import rl_step

APART = "--apart"


def worker(steps: int, settings: list[str]) -> None:
    """The rank; prints the result."""
    cores = sorted(os.sched_getaffinity(0))
    own, others = cores[: len(cores) // 2 or 1], cores[len(cores) // 2 :]
    apart = APART in settings
    if apart:  # before the server starts, which has as many threads as its rank has cores
        keep_to(psutil.Process(), own)
    run = reference_run([word for word in settings if word != APART])
    rl_step(run)  # starts the server
    run.advance(PROMPTS)
    for process in psutil.Process().children(recursive=True) if apart else ():
        keep_to(process, others)
    rows, _ = timed_steps(run, steps)
    if groups.is_main():
        result = summary(rows, run.config.parallel)
        print(json.dumps(result | {"ess": [row["rollout/ess"] for row in rows]}))
    groups.stop()


def keep_to(process: psutil.Process, cores: list[int]) -> None:
    """Lets all threads of `process` run on these cores only."""
    for thread in process.threads():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(thread.id, cores)
