"""The phase of work that this process is in, and its last sign of life.

The watchdog reports both, and other ranks can see them (parallel/progress_wait.py); tests use the
phases to kill a process at a chosen point. A process does one thing at a time, so it has one
heartbeat, just as it has one logging configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Heartbeat:
    """The current phase and the last sign of life."""

    name: str = "start"
    """The current phase."""
    since: float = field(default_factory=time.monotonic)
    """Time of the last sign of life, by time.monotonic."""
    count: int = 0
    """Number of phases entered so far."""
    listeners: list[Callable[[str], None]] = field(default_factory=list)
    """Called with the name of each phase as it is entered, in the thread that enters it."""
    followers: list[Callable[[], None]] = field(default_factory=list)
    """Called at each sign of life, in the thread that gives it."""

    def beat(self) -> None:
        """Gives a sign of life within a long phase."""
        self.since = time.monotonic()
        for follower in self.followers:
            follower()

    def enter(self, name: str) -> None:
        """Enters a phase. Entering the same phase again is a sign of life."""
        self.name, self.count = name, self.count + 1
        self.beat()
        for listener in self.listeners:
            listener(name)

    def rename(self, name: str) -> None:
        """Says more precisely what the current phase is. This is no sign of life."""
        self.name = name


current = Heartbeat()
enter = current.enter
