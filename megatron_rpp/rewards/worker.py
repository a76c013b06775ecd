"""A process that scores one sample at a time: a scorer that hangs or dies costs one sample.

    python -m megatron_rpp.rewards.worker DESCRIPTOR PARENT       (started by pool.py)

Over the connection: first the functions to load come in and None (ready) or a problem goes out;
then, for each sample, its score or the problem with it. It knows neither torch nor Megatron, unless
the user's function does, and ends with its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from megatron_rpp.rewards.checks import SampleError, numbers
from megatron_rpp.rewards.loading import RewardFunction, load_reward

_PR_SET_PDEATHSIG = 1


def main() -> None:
    descriptor, parent = map(int, sys.argv[1:])
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.dup2(2, 1)  # what a scorer prints is no output of the program
    try:
        functions = {name: load_reward(name, options) for name, options in connection.recv()}
    except ValueError as error:
        connection.send(str(error))
        return
    connection.send(None)
    while True:
        try:
            name, sample = connection.recv()
        except EOFError:
            return
        connection.send(_score(functions[name], sample))


def _end_with(parent: int) -> None:
    """Ends this process when its parent ends, also while a scorer hangs (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        sys.exit()


def _score(function: RewardFunction, sample: tuple) -> tuple[float | None, str | None]:
    """(score, None), or (None, what is wrong)."""
    columns: list[list[Any]] = [[value] for value in sample]
    try:
        return numbers(function(*columns), 1)[0], None
    except SampleError as error:
        return None, str(error)
    except Exception as error:  # a user's code raises whatever it likes
        return None, f"raised {type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
