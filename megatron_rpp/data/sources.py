"""Where rows come from: JSONL files, and whatever the `datasets` library opens.

Rows are read when they are asked for, so that memory stays flat however large the source is. JSONL
is read here and not by `datasets`: that infers one schema for all rows, which refuses labels of
mixed types and puts the keys of one row's metadata into every other's. Left out: streaming of
sources that are not on this machine, compressed JSONL.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Row = dict[str, Any]

_READ = 1 << 22
"""Bytes of a file that are searched for line ends at once."""
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
HUB = "hub:"


class Rows(Protocol):
    """Rows 0 .. n-1 of a source."""

    identity: str
    """Changes when the rows do."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """The place of a row in words, for error messages."""

    def __getitem__(self, index: int) -> Row:
        """The row; ValueError where it is malformed."""


def open_rows(source: str, cache_dir: str | None = None) -> Rows:
    """Opens a data set.

    Args:
        source: a JSONL file; a .parquet, .csv or .arrow file; a directory of such files or one
            that `datasets` saved, with "@split" behind it unless that is "train"; or
            "hub:owner/name[:configuration][@split]" of the Hugging Face Hub.
        cache_dir: where `datasets` puts its memory-mapped copies; None = its default.

    Raises:
        ValueError: there is no such source, it is empty, or it cannot be read.
    """
    path = Path(source)
    if source.startswith(HUB) or path.is_dir() or path.suffix in _FORMATS or "@" in path.name:
        if path.suffix in _FORMATS and not path.is_file():
            raise _missing(source)
        return ArrowRows(source, cache_dir)
    return JsonLines(path)


def _missing(source: str | Path) -> ValueError:
    return ValueError(
        f"data set {source} is not a file: correct the path, or make the file first"
    )


class JsonLines:
    """A JSONL file, of which only the places of its lines are kept in memory."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise _missing(path)
        self._path = path
        self._file = os.open(path, os.O_RDONLY)
        self._ends = self._find_ends()
        if len(self._ends) == 1 and self._ends[0] == 0:
            raise ValueError(f"data set {path} is empty: it needs one JSON object a line")
        stat = os.fstat(self._file)
        self.identity = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}"

    def _find_ends(self) -> np.ndarray:
        """[n] where each line ends. Split at "\\n" alone: JSON strings may hold other line
        separators, such as U+2028."""
        found, start = [], 0
        while block := os.pread(self._file, _READ, start):
            found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + start)
            start += len(block)
        ends = np.concatenate([np.empty(0, np.int64), *found])
        return ends if len(ends) and ends[-1] == start - 1 else np.append(ends, start)

    def __len__(self) -> int:
        return len(self._ends)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def where(self, index: int) -> str:
        return f"{self._path}, line {index + 1}"

    def __getitem__(self, index: int) -> Row:
        start = int(self._ends[index - 1]) + 1 if index else 0
        line, where = os.pread(self._file, int(self._ends[index]) - start, start), self.where(index)
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            message = f"{where} is not JSON ({error}): each line is one JSON object"
            raise ValueError(message) from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {kind(row)}: each line must be a JSON object {{...}}")
        return row


class ArrowRows:
    """A table that the `datasets` library memory-maps."""

    def __init__(self, source: str, cache_dir: str | None) -> None:
        import datasets  # here: runs on JSONL need not load it

        datasets.disable_progress_bars()
        try:
            table = _load(datasets, source, cache_dir)
        except Exception as error:  # a file's reader raises whatever it likes
            reason = " ".join(str(error).split())
            raise ValueError(
                f"data set {source} cannot be opened ({type(error).__name__}: {reason}): correct "
                "the name, or convert it to JSONL"
            ) from error
        if not isinstance(table, datasets.Dataset):
            raise ValueError(f"data set {source} has the splits {sorted(table)}: add '@' and one")
        if not len(table):
            raise ValueError(f"data set {source} is empty: it has no rows")
        self._table, self._source = table, source
        self.identity = f"{source} {table._fingerprint} {len(table)}"

    def __len__(self) -> int:
        return len(self._table)

    def where(self, index: int) -> str:
        return f"{self._source}, row {index + 1}"

    def __getitem__(self, index: int) -> Row:
        return self._table[index]


def _load(datasets: Any, source: str, cache_dir: str | None) -> Any:
    path = Path(source)
    if path.suffix in _FORMATS:
        kind_of_file = _FORMATS[path.suffix]
        return datasets.load_dataset(
            kind_of_file, data_files=str(path), split="train", cache_dir=cache_dir
        )
    name, _, split = source.removeprefix(HUB).partition("@")
    if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(name)
        return saved[split] if split else saved
    if Path(name).is_dir():
        return datasets.load_dataset(name, split=split or "train", cache_dir=cache_dir)
    name, _, configuration = name.partition(":")
    return datasets.load_dataset(
        name, configuration or None, split=split or "train", cache_dir=cache_dir
    )


def kind(value: Any) -> str:
    """The JSON type of a value, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")
