"""Whether a directory is one and the same for all ranks."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import groups
from megatron_rpp.parallel.ranks import gathered, raise_on_all_ranks

VISIBLE_SECONDS = 10.0
"""How long a shared file system may take to show a new file on another node."""


def blind_hosts(
    directory: Path, *, while_there: Callable[[Path], None] = lambda file: None
) -> list[str]:
    """The hosts that do not see rank 0's file in `directory`, or whose file rank 0 does not see.
    Collective.

    Args:
        while_there: called on rank 0 with the path of its file, if no host is blind.
    Raises:
        ConfigError: on every rank, if one cannot write there, or `while_there` has raised one.
    """
    name = groups.broadcast_object(f".preflight-{os.getpid()}-{time.time_ns()}")
    files = [directory / f"{name}.{rank}" for rank in range(dist.get_world_size())]
    own = files[dist.get_rank()]
    try:
        raise_on_all_ranks(lambda: _touch(own))
        blind = _blind(files if groups.is_main() else files[:1])
        if groups.is_main() and not blind:
            raise_on_all_ranks(lambda: while_there(own))
        else:
            raise_on_all_ranks(lambda: None)
        return blind
    finally:
        with suppress(OSError):  # it could not be written
            own.unlink()


def _touch(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise ConfigError(
            f"{file.parent} cannot be written ({error.strerror}): change its permissions "
            "or choose another directory"
        ) from error


def _blind(expected: list[Path]) -> list[str]:
    """The hosts on which a rank does not see what it expects. Collective."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while (missing := [f for f in expected if not f.exists()]) and time.monotonic() < deadline:
        os.listdir(expected[0].parent)  # makes NFS ask its server again
        time.sleep(0.2)
    found = gathered((socket.gethostname(), missing))
    return sorted({host for host, lost in found if lost})
