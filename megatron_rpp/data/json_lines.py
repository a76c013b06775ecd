"""JSON Lines files. Memory holds only the positions of the lines.

The library `datasets` is not used for them. It infers one schema for all rows, so it fails on
labels of mixed types, adds the metadata keys of one row to all others, and reformats numbers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rpp.data.rows import Row, kind
from megatron_rpp.lifecycle.config_error import ConfigError, reading

_READ = 1 << 22
"""Bytes of a file that are searched for line ends at a time."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escapes of surrogates: a pair is one character, a single one is none."""
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
"""Characters in a JSON string that many programs take for the end of a line."""


def json_line(value: Any) -> str:
    """``value`` as one line of JSON. Text stays readable; what could end a line is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def not_a_file(name: str) -> str:
    """The message for a data set that is not there."""
    return f"data set {name} is not a file: correct the path, or make the file first"


class JsonLines:
    """The objects of a file, one per line."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Opens a file.

        Args:
            name: how messages name the file; None = its absolute path.

        Raises:
            ConfigError: the file cannot be read, or it is empty.
        """
        self._name = str(path.absolute()) if name is None else name
        if not path.is_file():
            raise ConfigError(not_a_file(self._name))
        with reading(f"data set {self._name}", "correct the file or its permissions"):
            self._file = os.open(path, os.O_RDONLY)
            self._ends = self._find_ends()
            stat = os.fstat(self._file)
        if len(self._ends) == 1 and self._ends[0] == 0:
            raise ConfigError(f"data set {self._name} is empty: it needs one JSON object a line")
        self.identity = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}"

    def _find_ends(self) -> np.ndarray:
        """[n] the position where each line ends.

        Only "\\n" ends a line: JSON strings may hold other separators, such as U+2028.
        """
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
        return f"{self._name}, line {index + 1}"

    def __getitem__(self, index: int) -> Row:
        line, where = self._line(index), self.where(index)
        with reading(where, "each line is one JSON object"):
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                message = f"{where} is not JSON ({error}): each line is one JSON object"
                raise ConfigError(message) from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where} is {kind(row)}: each line must be a JSON object {{...}}")
        if _SURROGATE.search(line):
            _check_characters(row, where)
        return row

    def written(self, index: int, keys: Sequence[str]) -> str | None:
        """See `Rows.written`. 5.0, 1e3 and NaN stay as they are."""
        row = json.loads(self._line(index), parse_int=str, parse_float=str, parse_constant=str)
        for key in keys:
            row = row[key]
        return row

    def _line(self, index: int) -> bytes:
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.pread(self._file, int(self._ends[index]) - start, start)


def _check_characters(row: Row, where: str) -> None:
    """Raises ConfigError if a string holds half of a surrogate pair.

    No tokenizer accepts it, and it cannot be written to a file.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ConfigError(
            f"{where} holds {ascii(half)[1:-1]} alone, half of a surrogate pair and not a "
            "character: write both halves, or remove it"
        ) from error
