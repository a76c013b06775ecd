"""A process that scores one sample at a time. A scorer that hangs or dies costs only one sample.

    python -m megatron_rpp.rewards.worker DESCRIPTOR PARENT       (started by pool.py)

Protocol on the connection: the worker receives the functions to load and answers None (ready) or a
problem. Then it receives samples, one at a time, and answers each with its score or a problem. It
imports neither torch nor Megatron unless the user's function does.

However the parent ends, the worker ends too, with all that a scorer has started: the process that
pool.py starts only stands guard, and its child does the scoring. Both, and all they start, are one
process group.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.parent_death import end_with
from megatron_rpp.rewards.loading import RewardFunction, load_reward
from megatron_rpp.rewards.validation import SampleError, numbers


def main() -> None:
    descriptor, parent = map(int, sys.argv[1:])
    os.set_inheritable(descriptor, False)
    guard = os.getpid()
    child = os.fork()
    if child:
        os.close(descriptor)
        _guard(child, parent)
    end_with(guard)
    connection = Connection(descriptor)
    _leave_signals_to_the_parent()
    os.dup2(2, 1)  # what a scorer prints is not output of the program
    try:
        functions = {name: load_reward(name, options) for name, options in connection.recv()}
    except ConfigError as error:
        connection.send(str(error))
        return
    connection.send(None)
    while True:
        try:
            name, sample = connection.recv()
        except EOFError:
            return
        connection.send(_score(functions[name], sample))


def _guard(child: int, parent: int) -> NoReturn:
    """Waits for `child` and exits as it did. Kills the whole process group if `parent` ends."""
    signal.signal(signal.SIGUSR2, lambda *_: os.killpg(0, signal.SIGKILL))
    _leave_signals_to_the_parent()
    end_with(parent, signal.SIGUSR2)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def _leave_signals_to_the_parent() -> None:
    """Ignores signals to stop: such a job still scores its samples on the way to a safe point."""
    worker = os.getpid()

    def pass_by(number: int, frame: object) -> None:
        if os.getpid() != worker:  # a process that a scorer has forked, and may want to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_by)


def _score(function: RewardFunction, sample: tuple) -> tuple[float | None, str | None]:
    """(score, None), or (None, problem)."""
    columns: list[list[Any]] = [[value] for value in sample]
    try:
        return numbers(function(*columns), 1)[0], None
    except SampleError as error:
        return None, str(error)
    except Exception as error:  # a user's code raises whatever it likes
        return None, f"raised {type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
