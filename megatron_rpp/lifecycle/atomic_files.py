"""Atomic file writes: a file is whole or absent, even after a kill or a power cut."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def this_process() -> str:
    """A name that no other living process has, on any node of a shared file system."""
    return f"{socket.gethostname()}_{os.getpid()}"


def sync_directory(directory: str | Path) -> None:
    """Flushes a directory to the disk: which names were created, renamed or removed in it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, content: bytes) -> None:
    """Writes ``content`` to a temporary file next to ``path`` and renames it over ``path``.

    Creates missing parent directories. Only one process at a time may write a given path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{this_process()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
