"""The memory that a piece of work needs beyond what the process held before."""

from __future__ import annotations

import threading
from typing import Self

import psutil
import torch

from megatron_rpp.parallel import device as devices

_INTERVAL = 0.002
"""Seconds between two looks at the process."""


class PeakMemory:
    """Measures while its context is open: `host` and `device`, bytes above those at its start.

    The host's memory is sampled (resident set), so a peak of less than two milliseconds may be
    missed. The device's is what PyTorch allocated; 0 on a CPU.
    """

    host = device = 0

    def __enter__(self) -> Self:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        if not devices.ON_CPU:
            torch.cuda.reset_peak_memory_stats()
            self._allocated = torch.cuda.memory_allocated()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.host = max(self.host, self._process.memory_info().rss - self._before)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        if not devices.ON_CPU:
            self.device = torch.cuda.max_memory_allocated() - self._allocated
