"""The rows of a data source: the interface of every kind of source, and a chain of sources."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

Row = dict[str, Any]


class Rows(Protocol):
    """Rows 0 .. n-1 of a source."""

    identity: str
    """Changes when the rows do."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """The place of a row in words, for error messages."""

    def __getitem__(self, index: int) -> Row:
        """The row. Raises ConfigError if it is malformed."""

    def written(self, index: int, keys: Sequence[str]) -> str | None:
        """The number at a path of keys in a row, as it is written in the source; None if it stands
        for a missing value."""


class ChainedRows:
    """The rows of several sources, concatenated."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(map(len, self._parts)))
        self.identity = "\n".join(part.identity for part in self._parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, index: int) -> str:
        part, row = self._place(index)
        return part.where(row)

    def __getitem__(self, index: int) -> Row:
        part, row = self._place(index)
        return part[row]

    def written(self, index: int, keys: Sequence[str]) -> str | None:
        part, row = self._place(index)
        return part.written(row, keys)

    def _place(self, index: int) -> tuple[Rows, int]:
        part, row = locate(self._ends, index)
        return self._parts[part], row


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """(part, index in it) of an index into concatenated parts; `ends`: where each part ends."""
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def kind(value: Any) -> str:
    """The JSON type of a value, in words."""
    names = {
        dict: "an object", list: "a list", str: "a string", bool: "true or false",
        int: "a number", float: "a number", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), f"of type {type(value).__name__}")
