"""The row cache: it stores which rows of a data set are used, as one pass over the data found.

The key holds everything that the pass depends on, so an entry is never out of date. The ranks of a
node take turns with a lock: the first one does the pass, the others read its result. A data set
with an error leaves no entry. If the cache cannot be used (a directory of another user, a full
disk), the run logs it and works without the cache.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from megatron_rpp.lifecycle.atomic_files import write_atomic


@dataclass(frozen=True)
class Pass:
    """The result of one pass over a data set."""

    rows: np.ndarray
    """[n] int64, indices of the rows that are used."""
    prompts: str
    """Digest of the prompts of all rows."""
    labels: str
    """Digest of the labels of all rows."""


def cached(
    folder: Path, key: list[Any], find: Callable[[], Pass], *, log: Callable[[str], None] = print
) -> Pass:
    """The entry ``key`` of the cache in ``folder``; if there is none, ``find`` makes it.

    Args:
        log: called with a note if the cache cannot be used.
    """
    path = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.npz"
    found = _read(path)
    if found is not None:
        return found
    with _turn(path, log) as usable:
        found = _read(path)
        if found is None:
            found = find()
            if usable:
                _write(path, found, log)
    return found


def _read(path: Path) -> Pass | None:
    """The entry; None if there is none or it cannot be read (damaged, of another user)."""
    try:
        with np.load(path) as arrays:
            return Pass(arrays["rows"], str(arrays["prompts"]), str(arrays["labels"]))
    except Exception:  # numpy may raise anything on a damaged file, which is then written anew
        return None


@contextmanager
def _turn(path: Path, log: Callable[[str], None]) -> Iterator[bool]:
    """Holds the lock of an entry. Yields False if the file system offers none."""
    with ExitStack() as stack:
        usable = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))
        except (OSError, NotImplementedError) as error:  # the second: a file system without locks
            _log_unusable(path.parent, error, log)
            usable = False
        yield usable


def _write(path: Path, found: Pass, log: Callable[[str], None]) -> None:
    content = io.BytesIO()
    np.savez(content, **asdict(found))
    try:
        write_atomic(path, content.getvalue())
    except OSError as error:
        _log_unusable(path.parent, error, log)


def _log_unusable(folder: Path, error: Exception, log: Callable[[str], None]) -> None:
    reason = error.strerror if isinstance(error, OSError) else error
    log(
        f"the cache {folder.absolute()} cannot be used ({reason}): every run reads all of the data "
        "again; set data.cache_dir to a directory of yours"
    )


def stamp(path: str | Path) -> list[Any]:
    """Name, size and modification time of a file, or of each file of a directory.

    A broken link is left out: nothing is read through it.
    """
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [
        [str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
        if file.exists()
    ]
