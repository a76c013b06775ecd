"""How the checks measure: differences, time, memory. What only a GPU can tell is skipped on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import psutil
import torch

from acceptance.figures import Figure
from megatron_rpp.parallel import device as devices


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    """The largest deviation, relative to the largest true value."""
    return float((found.double() - true.double()).abs().max() / true.double().abs().max())


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """The median time of `work`, which has run before."""
    times = []
    for _ in range(rounds):
        devices.synchronize()
        start = time.perf_counter()
        work()
        devices.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def host_growth(work: Callable[[], object]) -> float:
    """Megabytes (1e6 bytes) of host memory that this process has more after `work`."""
    process = psutil.Process()
    before = process.memory_info().rss
    work()
    return (process.memory_info().rss - before) / 1e6


def gpu_peak(work: Callable[[], object]) -> float:
    """GB (1e9 bytes) of GPU memory that `work` needs at its peak, beyond what is allocated now."""
    devices.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    devices.synchronize()
    return devices.peak_memory_gb() - before / 1e9


def on_gpu(what: str, figures: Callable[[], Iterator[Figure]]) -> Iterator[Figure]:
    """The figures of `figures`, which calls CUDA; on a CPU one that says what was skipped."""
    if devices.ON_CPU:
        yield Figure(name=what, skipped="needs a CUDA device")
        return
    yield from figures()
