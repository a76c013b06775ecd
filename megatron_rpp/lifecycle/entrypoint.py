"""How a program of this package ends: what it raised becomes a message and an exit code, the same
on every rank (the codes: lifecycle/exit_codes.py)."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from typing import Callable

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import FAILED, PREEMPTED, REFUSED, RunFailure


def _print_once(text: str) -> None:
    """Once per node: the ranks of a node meet the same mistake at the same time."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        where = f"[{socket.gethostname()}] " if nodes > 1 else ""
        print(f"{where}{text}", file=sys.stderr, flush=True)


def _leave(code: int) -> None:
    """Ends this process at once: an orderly exit would wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


def run(main: Callable[[], None]) -> None:
    """Runs `main` and turns what it raises into a message and an exit code."""
    try:
        main()
    except (Exception, CheckpointException) as error:  # the second is not one of the first
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
