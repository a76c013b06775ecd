"""How a run can end: its exit codes, and the failures that one message explains.

    0   done
    1   failed: a rank raised (its traceback), or a RunFailure (its message) on every rank
    2   refused: the user's mistake, one line, before any expensive work
    70  hung: no sign of life of some rank for train.hang_timeout_minutes; the message names it
    75  preempted: told to stop (SIGTERM, SIGUSR1, train.exit_duration_minutes) and saved; the same
        command goes on
"""

from __future__ import annotations

DONE, FAILED, REFUSED, HUNG, PREEMPTED = 0, 1, 2, 70, 75


class RunFailure(RuntimeError):
    """Ends the run, alike on every rank, with a message that needs no traceback."""

    exit_code = FAILED


class SaveFailed(RunFailure):
    """What the run would have saved could not be written; what was there before is as it was."""
