"""Starts a command and ends all of its processes when it, this process or its parent ends.

    python supervisor.py PARENT WEIGHTS FOLDER command ...

Only the standard library is used, and nothing is imported from the package: a rank starts this file.
PARENT is the process id of the rank. A rank that is killed by SIGKILL tells nobody, so this process
looks for its parent several times a second. If the parent is gone, the folder WEIGHTS is removed, where
it may have left them. FOLDER, that of the command's socket, is removed in any case. This process exits
with the code of the command.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
INTERVAL = 0.2
GRACE = 10.0
"""Seconds that the command has to end by itself after SIGTERM."""


def main(arguments: list[str]) -> int:
    parent, weights, folder, command = int(arguments[0]), *arguments[1:3], arguments[3:]
    try:
        return run(command, lambda: os.getppid() == parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if os.getppid() != parent:
            shutil.rmtree(weights, ignore_errors=True)


def run(
    command: list[str], wanted: Callable[[], bool], environment: dict[str, str] | None = None
) -> int:
    """Runs `command` until it ends, this process gets a signal to end, or it is not wanted any more.

    Returns the command's exit code, 0 if it was ended here. environment: None = that of this process.
    """
    ending: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda received, frame: ending.append(received))
    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=end_with_parent, env=environment
    )
    try:
        while process.poll() is None and not ending and wanted():
            time.sleep(INTERVAL)
        return process.poll() or 0
    finally:
        end(process)


def end_with_parent() -> None:
    """Asks the kernel to send this process SIGTERM if the supervisor itself is killed (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end(process: subprocess.Popen) -> None:
    """Ends the session of `process`: vLLM's front end ends its workers; what is left is killed."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
