"""Requests to stop early: SIGTERM or SIGUSR1 on any rank, or train.exit_duration_minutes.

A signal only sets a flag. At a safe point all ranks ask together, so all of them stop there. Between
safe points, work that takes long asks `told` whether it may be abandoned: a rank with a reason to
stop leaves a mark in the store of the process group, and the others look for it once a second.

The processes that Megatron forks to write a checkpoint inherit the handler, so they survive a signal to
the whole job.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch.distributed as dist

from megatron_rpp.parallel import groups, progress_wait

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOOK_INTERVAL = 1.0
"""Seconds between two looks of a rank at the mark in the store."""

_numbers = count()


class Stop:
    """A request to stop."""

    def __init__(self, after_minutes: float | None = None):
        """after_minutes: counted from now; None: only a signal stops the run."""
        self._end = None if after_minutes is None else time.monotonic() + 60 * after_minutes
        self._received = 0
        # A program may run several times over the same ranks.
        self._mark, self._told, self._looked = f"stop/{next(_numbers)}", False, 0.0

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

    def _over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def told(self) -> bool:
        """Whether any rank has a reason to stop; the others know within seconds. Not collective.

        Call it on every rank, as often as you like: it also tells the others of this rank's reason.
        """
        if self._told:
            return True
        if self._received or self._over():
            progress_wait.store().set(self._mark, "")
            self._told = True
        elif time.monotonic() - self._looked >= LOOK_INTERVAL:
            self._looked = time.monotonic()
            self._told = progress_wait.store().check([self._mark])
        return self._told

    def requested(self) -> str | None:
        """The reason to stop, the same on every rank; None if no rank has one. Collective."""
        progress_wait.wait_for_all(idle=self.told)
        found = [float(self._received), float(self._over())]
        received, any_over = groups.reduce_sums(found, dist.group.WORLD, dist.ReduceOp.MAX)
        if received:
            return signal.Signals(int(received)).name
        return "the end of train.exit_duration_minutes" if any_over else None
