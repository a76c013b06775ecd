"""A round of a rollout on vLLM, and one that runs in a thread beside the training.

The thread talks to servers, and to nothing else: no collective, no store of the process group and no
sign of life comes from it. What it raises is kept for the main thread, which tells all ranks.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.records import Generation, Request
from megatron_rpp.rollout.vllm.samples import Sampler

_POLL = 0.2
"""Seconds between two looks at the thread."""
_LONGEST_END = 30.0
"""Seconds that the end of a run waits for the thread, which otherwise ends with the process."""


@dataclass
class Round:
    """What a round of a rollout gave on one rank; only the first of a replica sends requests."""

    generations: list[Generation | None] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    """Lost servers, by number in the run, and what happened."""
    abandoned: bool = False
    problem: str | None = None


class Draw:
    """A rollout whose first round runs in a thread of each replica's first rank."""

    def __init__(self, requests: list[Request], sampler: Sampler):
        self.requests, self.sampler = requests, sampler
        self.given_up = threading.Event()
        """Tells the thread to abandon its requests, which takes it seconds at most."""
        self._finished, self._told = 0, 0
        self._outcome, self._thread = Round(), threading.Thread()

    def start(self, work: Callable[[Draw], Round]) -> None:
        """Starts the thread, which runs `work`."""
        self._thread = threading.Thread(
            target=self._run, args=(work,), name="rollout ahead", daemon=True
        )
        self._thread.start()

    def _run(self, work: Callable[[Draw], Round]) -> None:
        try:
            self._outcome = work(self)
        except Exception as error:  # raised on every rank by the main thread
            what = f"{type(error).__name__}: {error}"
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._outcome = Round(
                problem=f"the rollout beside the training failed at {where.name} "
                f"({where.filename}:{where.lineno}): {what}"
            )

    def count(self, finished: int) -> None:
        """Counts finished responses; the thread calls it."""
        self._finished += finished

    @property
    def done(self) -> bool:
        """Whether this rank has nothing more to wait for."""
        return not self._thread.is_alive()

    def wait(self, progress: Callable[[int], None], stop: Callable[[], bool]) -> Round:
        """Waits for the thread and returns what it gave. If `stop` is true, the thread gives up."""
        while not self.done:
            heartbeat.current.beat()  # the limits of the requests end a rollout that hangs
            if stop():
                self.given_up.set()
            self._thread.join(_POLL)
            self._report(progress)
        self._report(progress)
        return self._outcome

    def _report(self, progress: Callable[[int], None]) -> None:
        finished = self._finished
        if finished > self._told:
            progress(finished - self._told)
            self._told = finished

    def give_up(self) -> None:
        """Abandons the requests of this rank; returns when the thread has ended. Not collective."""
        self.given_up.set()
        if not self.done:
            self._thread.join(_LONGEST_END)
