"""Tables that the library `datasets` memory-maps: Parquet, Arrow and CSV files, and the Hub.

CSV has no types, so each cell is the text in the file; an empty cell is a missing value. pandas
turns whole numbers in a column with gaps into 5.0 when it writes Parquet; `written` gives 5 again.
"""

from __future__ import annotations

import csv
import errno
import math
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from megatron_rpp.data.rows import Row, Rows
from megatron_rpp.lifecycle.config_error import ConfigError

FORMATS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
"""Suffixes of files that the library reads, and its names for their formats."""
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
Files = Mapping[str, Sequence[Path]]
"""The files of each split."""


class ArrowRows:
    """A table that the library `datasets` memory-maps."""

    def __init__(self, table: Any, name: str) -> None:
        """Raises ConfigError if the table has several splits or no rows."""
        if isinstance(table, dict):
            raise ConfigError(f"data set {name} has the splits {sorted(table)}: add '@' and one")
        if not len(table):
            raise ConfigError(f"data set {name} is empty: it has no rows")
        self._table, self._name = table, name
        self.identity = f"{name} {table._fingerprint} {len(table)}"
        self._are_whole = cache(self._are_whole_beside_gaps)

    def __len__(self) -> int:
        return len(self._table)

    def where(self, index: int) -> str:
        return f"{self._name}, row {index + 1}"

    def __getitem__(self, index: int) -> Row:
        return self._table[index]

    def written(self, index: int, keys: Sequence[str]) -> str | None:
        """See `Rows.written`. NaN is a missing value."""
        value = self._table[index]
        for key in keys:
            value = value[key]
        if isinstance(value, (int, Decimal)):
            return str(value)
        if math.isnan(value):
            return None
        if self._are_whole(tuple(keys)):
            return str(int(value))
        return _shortest(value, self._column(keys).type)

    def _column(self, keys: Sequence[str]) -> Any:
        import pyarrow.compute as compute

        column = self._table.data.column(keys[0])
        return compute.struct_field(column, list(keys[1:])) if len(keys) > 1 else column

    def _are_whole_beside_gaps(self, keys: tuple[str, ...]) -> bool:
        """Whether a column of floats has gaps and only whole numbers: it held integers in
        pandas."""
        import pyarrow.compute as compute

        column = self._column(keys)
        gaps = compute.is_null(column, nan_is_null=True)
        values = column.filter(compute.invert(gaps))
        whole = compute.and_(
            compute.is_finite(values), compute.equal(compute.floor(values), values)
        )
        return compute.any(gaps).as_py() and compute.all(whole).as_py()


def _shortest(value: float, kind: Any) -> str:
    """The shortest text that gives the same number in the precision of the column."""
    import numpy as np

    return str(np.dtype(kind.to_pandas_dtype()).type(value))


def open_files(
    files: Files, split: str, suffix: str, *, name: str, cache_dir: str | None
) -> ArrowRows:
    """The rows of one split of Parquet, Arrow or CSV files, which all have the format of `suffix`.

    The library gets a resolved list of files, because it would take a path for a pattern. Whatever
    the reader of a file raises passes through.
    """
    import datasets
    import pandas
    from datasets.data_files import DataFilesDict, DataFilesList

    listed = DataFilesDict(
        {
            key: DataFilesList([str(path.absolute()) for path in paths], list(map(_stamp, paths)))
            for key, paths in files.items()
        }
    )
    settings = _all_texts(files) if suffix == ".csv" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # a row with too many cells
        table = datasets.load_dataset(
            FORMATS[suffix], data_files=listed, split=split, cache_dir=cache_dir, **settings
        )
    return ArrowRows(table, name)


def with_copies(
    read: Callable[[str | None], Rows],
    name: str,
    *,
    cache_dir: str | None,
    log: Callable[[str], None],
) -> Rows:
    """Calls `read` with a directory for the library's copies: `cache_dir` or, if nothing can be
    written there, a temporary one."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return read(cache_dir)
    except Exception as error:  # the reader of a file may raise anything
        problem = _problem_of_the_disk(error)
        if problem is None:
            raise
        log(
            f"the cache {cache_dir or datasets.config.HF_DATASETS_CACHE} cannot be used "
            f"({problem.strerror}): {name} is copied to a temporary directory; set data.cache_dir "
            "to a directory of yours"
        )
    temporary = tempfile.TemporaryDirectory()
    rows = read(temporary.name)
    weakref.finalize(rows, temporary.cleanup)
    return rows


def _problem_of_the_disk(error: BaseException | None) -> OSError | None:
    """The error, among those that led to `error`, that says that nothing can be written; or
    None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            return error
        error = error.__cause__
    return None


def _all_texts(files: Files) -> dict[str, Any]:
    """Settings that keep the text of each CSV cell as it is; an empty cell is a missing value."""
    import datasets
    import pandas

    first = next(path for paths in files.values() for path in paths)
    with open(first, newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    if len(set(header)) < len(header):
        raise ConfigError(
            f"{first.absolute()} names a column twice in {header}: rename one of them"
        )
    names = pandas.read_csv(first, nrows=0).columns
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "na_values": [""], "index_col": False}


def _stamp(path: Path) -> tuple[str, str]:
    """Identifies the state of a file: the library compares it with that of its copy."""
    stat = path.stat()
    return str(stat.st_mtime_ns), str(stat.st_size)
