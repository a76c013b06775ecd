"""Signals and the exit code of the launcher. It exits with the code of its ranks; if no rank runs, a
signal ends it at once.

Python runs signal handlers in the main thread, between two of its instructions. The main thread may
wait for minutes in torch's C++ code, for a name server or another node. So a second thread watches
every signal: it forwards signals to the ranks, and ends the process if the main thread does not.
"""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from megatron_rpp.lifecycle.exit_codes import FAILED, PREEMPTED

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
"""These ask the ranks to save; the launcher forwards them and waits."""
ABORTING = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""These end the ranks, within torch's --shutdown-timeout."""

IDLE_SECONDS = 1.0
"""How long the main thread may take to end the launcher when a signal comes and no rank runs."""
OVER_SECONDS = 6.0
"""The same after the ranks have ended; this node may still have to tell other nodes."""
UNNOTICED_SECONDS = 60.0
"""How long the main thread may take to notice, without a signal, that the ranks have ended."""


def exit_code(codes: list[int]) -> int:
    """The code of a launcher whose ranks failed with `codes` (below 0: killed by that signal).

    The codes that ranks choose themselves (invalid configuration, preempted, hung) come first, then
    the signal that killed a rank, as 128 + signal, then code 1, which its peers fail with. SIGTERM
    is last, because launchers send it to stop the remaining ranks.
    """

    def rank(code: int) -> int:
        return 0 if code > FAILED else 3 if code == -signal.SIGTERM else 2 if code > 0 else 1

    first = min(codes, key=rank, default=0)
    return first if first >= 0 else 128 - first


def with_signals(codes: Sequence[int | None], came: set[int]) -> list[int]:
    """Counts ranks as preempted if a forwarded signal killed them: they had nothing to save yet."""
    return [PREEMPTED if -code in came & set(FORWARDED) else code for code in codes if code]


def stopped_by(numbers: set[int]) -> int:
    """The code of a launcher that these signals ended while no rank ran; nothing is lost."""
    return PREEMPTED if numbers & set(FORWARDED) else 128 + min(numbers)


class Signals:
    """Records the signals and reacts to them. The reaction depends on the state: no rank runs, ranks
    run, or all ranks have ended. The main thread calls the methods to set the state."""

    def __init__(self):
        self.came: set[int] = set()
        self.leave_at = math.inf
        """Latest end of the process, by time.monotonic(), even if the main thread still waits."""
        self._idle = True
        self._code: int | None = None  # once the ranks have ended
        self._ranks: list[subprocess.Popen] = []
        self._untold: list[int] = []  # signals that are not forwarded yet
        self._aborted_at = math.inf
        self._kill_at = math.inf  # when to kill ranks that the main thread does not end
        self._lock = threading.Lock()

    def listen(self) -> None:
        """Installs the handlers and starts the second thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in FORWARDED + ABORTING:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (number == signal.SIGHUP and ignored):  # nohup
                signal.signal(number, self.receive)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def receive(self, number: int, frame: object) -> None:
        """The handler of all signals."""
        self.came.add(number)
        if self._idle:
            raise SystemExit(stopped_by(self.came))

    def idle(self) -> None:
        """No rank runs: any signal, even an earlier one, ends the launcher."""
        with self._lock:
            self._idle, self._ranks, self.leave_at = True, [], math.inf
            if self.came:
                self._leave_in(IDLE_SECONDS)
        if self.came:
            raise SystemExit(stopped_by(self.came))

    def starting(self) -> None:
        """Ranks are about to run; signals before `running` are stored for them."""
        with self._lock:
            self._idle, self.leave_at = False, math.inf

    def running(self, ranks: list[subprocess.Popen]) -> None:
        """`ranks` run: forwards stored and new signals to them."""
        with self._lock:
            self._ranks = ranks
            self._tell()

    def abort(self) -> signal.Signals | None:
        """Returns the signal with which the caller must end the ranks, or None."""
        if not (aborting := self.came & set(ABORTING)):
            return None
        with self._lock:
            self._kill_at = math.inf
        return signal.Signals(min(aborting))

    def over(self, code: int, seconds: float) -> None:
        """The ranks have ended; the launcher leaves with `code`, in `seconds` at the latest."""
        with self._lock:
            self._idle, self._ranks, self._code = False, [], code
            self.leave_at = time.monotonic() + seconds

    def _watch(self, reader: int) -> None:
        while True:
            number = os.read(reader, 1)[0] if select.select([reader], [], [], 0.2)[0] else None
            with self._lock:
                if number is not None:
                    self._take(number)
                if self._ranks and all(rank.poll() is not None for rank in self._ranks):
                    self._leave_in(OVER_SECONDS if self.came else UNNOTICED_SECONDS)
                if time.monotonic() >= self._kill_at:
                    self._kill()
                if time.monotonic() >= self.leave_at:
                    os._exit(self._last_code())

    def _take(self, number: int) -> None:
        self.came.add(number)
        if self._code is not None:
            self._leave_in(OVER_SECONDS)
        elif self._idle:
            self._leave_in(IDLE_SECONDS)
            name = signal.Signals(number).name
            os.write(2, f"launcher: {name} came while no rank ran\n".encode())
        elif number in FORWARDED:
            self._untold.append(number)
            self._tell()
        else:  # a second request kills at once; but one key press may arrive twice
            again = time.monotonic() > self._aborted_at + IDLE_SECONDS
            self._kill_at = time.monotonic() + (0 if again else IDLE_SECONDS)
            self._aborted_at = min(self._aborted_at, time.monotonic())

    def _leave_in(self, seconds: float) -> None:
        self.leave_at = min(self.leave_at, time.monotonic() + seconds)

    def _tell(self) -> None:
        while self._ranks and self._untold:
            number = self._untold.pop(0)
            for rank in self._ranks:
                with suppress(ProcessLookupError):
                    rank.send_signal(number)

    def _kill(self) -> None:
        self._kill_at = math.inf
        for rank in self._ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)

    def _last_code(self) -> int:
        if self._code is not None:
            return self._code
        if self._ranks and not self.came & set(ABORTING):
            codes = with_signals([rank.poll() for rank in self._ranks], self.came)
            return exit_code(codes) or PREEMPTED
        return stopped_by(self.came)
