"""Entry point of the programs: turns what they raise into a message and an exit code.

Both are the same on every rank (exit_codes.py lists the codes). torch is not imported here, so
`--help` and command-line mistakes are answered at once.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import FAILED, PREEMPTED, REFUSED, RunFailure

Result = TypeVar("Result")


def launched_world_size() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _print_once(text: str) -> None:
    """Prints once per node: all ranks of a node meet the same mistake at the same time."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        where = f"[{socket.gethostname()}] " if nodes > 1 else ""
        print(f"{where}{text}", file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """Ends this process at once: an orderly exit would wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")  # not imported: there is no process group
    if distributed is not None and distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def _is_failure(error: BaseException) -> bool:
    """Whether the program failed. torch's CheckpointException is not an Exception."""
    api = sys.modules.get("torch.distributed.checkpoint.api")
    return isinstance(error, Exception) or (
        api is not None and isinstance(error, api.CheckpointException)
    )


def run(main: Callable[[], Result]) -> Result:
    """Runs `main` and turns what it raises into a message and an exit code."""
    try:
        return main()
    except BaseException as error:
        if not _is_failure(error):
            raise
        if isinstance(error, RunFailure):
            word = "stopped" if error.exit_code == PREEMPTED else "error"
            _print_once(f"{word}: {error}")
            _leave(error.exit_code)
        if isinstance(error, ConfigError):
            _print_once(f"error: {error}")
            _leave(REFUSED)
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        # One write, so that the tracebacks of several ranks do not run into each other.
        print(f"rank {rank} of {world} failed:\n{traceback.format_exc()}", file=sys.stderr)
        _leave(FAILED)
