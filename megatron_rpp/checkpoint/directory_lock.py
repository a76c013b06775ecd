"""One run per directory: a second run is refused while the first one lives.

The lock is a flock on `<dir>/.lock`. The kernel releases it when the process ends, in whatever way;
forked processes, such as the writer of a checkpoint, do not hold it. The text in the file (host,
process) serves the message alone.

Left out: file systems without flock (some NFS and Lustre mounts). The run logs that and goes on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import groups

PATIENCE_SECONDS = 5.0
"""A killed run may need a moment to end."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[int] = set()  # descriptors of this process


def _leave_to_the_parent() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)


def _open_locked(path: Path) -> int:
    """Opens and locks `path`; the descriptor is that of the file that has the name now."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        # The previous holder may have removed the file between our open and our lock.
        if path.exists() and os.stat(path).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)


def _take(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            descriptor = _open_locked(path)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    _held.add(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


@contextmanager
def one_writer(directories: Iterable[str], log: Callable[[str], None]) -> Iterator[None]:
    """Holds the locks of `directories` while the context is open. Collective.

    Raises ConfigError, on every rank, if another run holds one of them or a lock cannot be taken.
    """
    with ExitStack() as stack:
        for directory in sorted({Path(directory).resolve() for directory in directories}):
            stack.enter_context(_one_writer(directory, log))
        yield


@contextmanager
def _one_writer(directory: Path, log: Callable[[str], None]) -> Iterator[None]:
    path, descriptor, problem = directory / ".lock", None, None
    if groups.is_main():
        try:
            descriptor = _take(path)
        except BlockingIOError:
            problem = f"{directory} is in use by {path.read_text().strip() or 'another run'}"
            problem += ": stop that run, or give this one another directory"
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                log(f"{directory} has no file locks ({error.strerror}): let no second run use it")
            else:
                problem = (
                    f"{path} cannot be locked ({error.strerror}): change its permissions, or give "
                    f"this run another directory"
                )
    problem = groups.broadcast_object(problem)
    if problem is not None:
        raise ConfigError(problem)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            _held.discard(descriptor)
            os.close(descriptor)
