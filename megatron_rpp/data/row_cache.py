"""The cache of what one pass over a data set found: which of its rows are used.

Keyed by everything the pass depends on, so an entry is never out of date; the ranks of a node take
turns at a lock, and all but the first read what it wrote. A refused data set leaves no entry. A
cache that cannot be used (another user's, a full disk) is done without, and that is said.
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
    """What a pass over a data set found."""

    rows: np.ndarray
    """[n] int64, the rows that are used."""
    prompts: str
    """Digest of the prompts of all rows."""
    labels: str
    """Digest of the labels of all rows."""


def cached(
    folder: Path, key: list[Any], find: Callable[[], Pass], say: Callable[[str], None] = print
) -> Pass:
    """What is kept under ``key`` in ``folder``, else what ``find`` gives, which is then kept.

    say: is told if it cannot be kept.
    """
    path = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.npz"
    found = _read(path)
    if found is not None:
        return found
    with _turn(path, say) as usable:
        found = _read(path)
        if found is None:
            found = find()
            if usable:
                _write(path, found, say)
    return found


def _read(path: Path) -> Pass | None:
    """None: there is none, or it cannot be read (damaged, another user's)."""
    try:
        with np.load(path) as arrays:
            return Pass(arrays["rows"], str(arrays["prompts"]), str(arrays["labels"]))
    except Exception:  # numpy raises whatever a damaged file makes it raise; then it is made anew
        return None


@contextmanager
def _turn(path: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Holds the lock of an entry; gives whether there is one to hold."""
    with ExitStack() as stack:
        usable = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))
        except (OSError, NotImplementedError) as error:  # the second: a file system without locks
            _say_unusable(path.parent, error, say)
            usable = False
        yield usable


def _write(path: Path, found: Pass, say: Callable[[str], None]) -> None:
    content = io.BytesIO()
    np.savez(content, **asdict(found))
    try:
        write_atomic(path, content.getvalue())
    except OSError as error:
        _say_unusable(path.parent, error, say)


def _say_unusable(folder: Path, error: Exception, say: Callable[[str], None]) -> None:
    reason = error.strerror if isinstance(error, OSError) else error
    say(
        f"the cache {folder.absolute()} cannot be used ({reason}): the data is read anew at every "
        "start; set data.cache_dir to a directory of yours"
    )


def stamp(path: str | Path) -> list[Any]:
    """Name, size and time of change of a file, or of the files of a directory.

    A link that leads nowhere is left out: nothing is read through it.
    """
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [
        [str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
        if file.exists()
    ]
