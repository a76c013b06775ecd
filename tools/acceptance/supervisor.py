"""Starts the process that runs the checks, prints what it finds, and goes on without it if it ends.

A check that raises, crashes the process or takes too long fails. The checks after it run in a new
process. Imports no torch.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from acceptance.catalog import CHECKS, Entry
from acceptance.figures import SKIPPED, Figure, status_of

START_SECONDS = 180.0
"""How long a process may take to import everything."""
END_SECONDS = 10.0
"""How long it may take to end after its last check."""


OVER = "the time for all checks is over"


@dataclass
class Result:
    entry: Entry
    figures: list[Figure] = field(default_factory=list)
    error: str | None = None
    trace: str | None = None
    seconds: float = 0.0
    skipped: str | None = None
    """Why it was not run."""

    @property
    def status(self) -> str:
        return SKIPPED if self.skipped is not None else status_of(self.figures, self.error)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.entry.name,
            "title": self.entry.title,
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "skipped": self.skipped,
            "error": self.error,
            "trace": self.trace,
            "figures": [figure.as_json() for figure in self.figures],
        }


class Supervisor:
    """Runs checks of the catalog one after another."""

    def __init__(self, command: list[str], minutes: float, log: Callable[[str], None]) -> None:
        """
        Args:
            command: starts a worker; `--worker DESCRIPTOR --only NAME ...` is added.
            minutes: for all checks; those that it does not suffice for are skipped.
        """
        self.command, self.log = command, log
        self.deadline = time.monotonic() + 60 * minutes
        self.about: dict[str, Any] = {}
        """What the worker says of the machine."""
        self.workers = 0

    def run(self, names: list[str]) -> Iterator[Result]:
        """Yields the results of the checks `names`, in the order of the catalog."""
        left = [entry for entry in CHECKS if entry.name in names]
        while left and not self._is_over():
            with self._worker([entry.name for entry in left]) as messages:
                error = None
                while left and error is None and not self._is_over():
                    result = self._checked(left.pop(0), messages)
                    error = result.error
                    yield result
        for entry in left:
            self.log(f"{self._title(entry)}\n    SKIPPED: {OVER}")
            yield Result(entry, skipped=OVER)

    def _is_over(self) -> bool:
        return time.monotonic() >= self.deadline

    def _title(self, entry: Entry) -> str:
        return f"[{1 + CHECKS.index(entry)}/{len(CHECKS)}] {entry.name}: {entry.title}"

    def _checked(self, entry: Entry, messages: _Messages) -> Result:
        self.log(self._title(entry))
        result = Result(entry)
        self._follow(result, messages)
        ending = f": {result.error}" if result.error else ""
        self.log(f"    {result.status.upper()} in {result.seconds:.1f} s{ending}")
        return result

    def _follow(self, result: Result, messages: _Messages) -> None:
        """Takes the messages of one check."""
        start = time.monotonic()
        limit = START_SECONDS
        while (message := messages.next(min(start + limit, self.deadline))) is not None:
            if "about" in message:
                self.about = message["about"]
            elif "begin" in message:
                start, limit = time.monotonic(), result.entry.seconds
            elif "figure" in message:
                figure = Figure(**message["figure"])
                result.figures.append(figure)
                self.log(f"    {figure.status:8} {figure}")
            else:
                result.error, result.trace = message.get("error"), message.get("trace")
                break
        else:
            result.error = messages.ended
        result.seconds = time.monotonic() - start

    @contextmanager
    def _worker(self, names: list[str]) -> Iterator[_Messages]:
        """A new worker. It is killed if it still runs at the end."""
        reading, writing = os.pipe()
        command = [*self.command, "--worker", str(writing), "--only", *names]
        # torchrun's store remembers the ranks of an attempt, so each worker is another attempt.
        environment = os.environ | {"TORCHELASTIC_RESTART_COUNT": str(self.workers)}
        self.workers += 1
        process = subprocess.Popen(command, pass_fds=[writing], env=environment)
        os.close(writing)
        try:
            yield _Messages(reading, process)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
        finally:
            process.kill()
            process.wait()
            os.close(reading)


class _Messages:
    """What a worker sends."""

    def __init__(self, descriptor: int, process: subprocess.Popen) -> None:
        self.descriptor, self.process = descriptor, process
        self.ended = ""
        """Why there are no more messages."""
        self._text = b""

    def next(self, deadline: float) -> dict[str, Any] | None:
        """The next message; None if the worker has ended, or has sent none at `deadline`."""
        while b"\n" not in self._text:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.descriptor], [], [], left)[0]:
                self.ended = "it took too long and was killed"
                self.process.kill()
                return None
            read = os.read(self.descriptor, 65536)
            if not read:
                self.ended = f"its process ended with code {self.process.wait()}"
                return None
            self._text += read
        line, _, self._text = self._text.partition(b"\n")
        return json.loads(line)
