"""What this process is doing, in a word: for the watchdog's reports, and tests that kill it there.

A process does one thing at a time, so there is one phase for the whole process, as there is one
logging configuration.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Callable


@dataclass
class Phases:
    """The phase entered last, when (time.monotonic) and as the how manyth."""

    name: str = "start"
    since: float = field(default_factory=time.monotonic)
    count: int = 0
    listeners: list[Callable[[str], None]] = field(default_factory=list)
    """Called with the name of every phase that is entered, in the thread that enters it."""

    def beat(self) -> None:
        """A sign of life within a long phase."""
        self.since = time.monotonic()

    def enter(self, name: str) -> None:
        """A new phase begins; the same name again is a sign of life within it."""
        self.name, self.since, self.count = name, time.monotonic(), self.count + 1
        for listener in self.listeners:
            listener(name)


current = Phases()
enter = current.enter
