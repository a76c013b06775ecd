"""When to stop early: SIGTERM or SIGUSR1 on any one rank, or the run's time being over.

A signal only sets a flag. At a safe point all ranks ask together, so that all of them stop there.
Processes that Megatron forks to write a checkpoint inherit the handler, and so survive a signal
that is sent to the whole job.
"""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from typing import Iterator

import torch.distributed as dist

from megatron_rpp.parallel import groups

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """A request to stop."""

    def __init__(self, after_minutes: float | None = None):
        """after_minutes: from now on; None: only a signal stops the run."""
        self._end = None if after_minutes is None else time.monotonic() + 60 * after_minutes
        self._received = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals for requests while the context is open; in the main thread."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self._received = number

    def requested(self) -> str | None:
        """Why to stop, where any rank has a reason to; the same on every rank. Collective."""
        over = self._end is not None and time.monotonic() >= self._end
        own = [float(self._received), float(over)]
        received, over = groups.reduce_sums(own, dist.group.WORLD, dist.ReduceOp.MAX)
        if received:
            return signal.Signals(int(received)).name
        return "the end of train.exit_duration_minutes" if over else None
