"""Requests to stop early: SIGTERM or SIGUSR1 on any rank, or train.exit_duration_minutes.

A signal only sets a flag. At a safe point all ranks ask together, so all of them stop there. The
processes that Megatron forks to write a checkpoint inherit the handler, so they survive a signal to
the whole job.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_rpp.parallel import groups

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """A request to stop."""

    def __init__(self, after_minutes: float | None = None):
        """after_minutes: counted from now; None: only a signal stops the run."""
        self._end = None if after_minutes is None else time.monotonic() + 60 * after_minutes
        self._received = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals while the context is open. For the main thread."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self._received = number

    def requested(self) -> str | None:
        """The reason to stop, the same on every rank; None if no rank has one. Collective."""
        over = self._end is not None and time.monotonic() >= self._end
        found = [float(self._received), float(over)]
        received, any_over = groups.reduce_sums(found, dist.group.WORLD, dist.ReduceOp.MAX)
        if received:
            return signal.Signals(int(received)).name
        return "the end of train.exit_duration_minutes" if any_over else None
