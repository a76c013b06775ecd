"""The exit codes of a run, and the failures that need only a message.

0   done
1   failed: a rank raised (its traceback), or a RunFailure (its message) on every rank
2   invalid configuration: a setting, file or row cannot be used; one line names it
70  hung: a rank gave no sign of life for train.hang_timeout_minutes; the message names it
75  preempted: the run was told to stop (SIGTERM, SIGUSR1, train.exit_duration_minutes) and has
    saved; the same command resumes it
"""

from __future__ import annotations

FAILED, REFUSED, HUNG, PREEMPTED = 1, 2, 70, 75


class RunFailure(RuntimeError):
    """Ends the run on every rank with the same message, which needs no traceback."""

    exit_code = FAILED


class SaveFailed(RunFailure):
    """A save could not be written. What was saved before is unchanged."""
