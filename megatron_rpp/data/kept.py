"""The cache of what one pass over a data set found: which of its rows are used.

Keyed by everything the pass depends on, so an entry is never out of date; the ranks of a node take
turns at a lock, and all but the first read what it wrote. A refused data set leaves no entry.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from megatron_rpp.data.files import write_atomic


def cached(folder: Path, key: list[Any], find: Callable[[], np.ndarray]) -> np.ndarray:
    """The array kept under ``key`` in ``folder``, else what ``find`` gives, which is then kept."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    path = folder / f"{name}.npy"
    if not path.exists():
        _make(folder)
        with FileLock(folder / f"{name}.lock"):
            if not path.exists():
                content = io.BytesIO()
                np.save(content, find())
                write_atomic(path, content.getvalue())
    return np.load(path)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the cache directory {folder} cannot be made ({error.strerror}): set data.cache_dir "
            "to another"
        ) from error


def stamp(path: str | Path) -> list[Any]:
    """Name, size and time of change of a file, or of the files of a directory."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
