"""Data sources: JSON Lines, CSV, Parquet and Arrow files, directories of them, and the Hub.

Rows are read on access, so memory does not grow with the source. JSON Lines are read by our own
reader (json_lines.py), everything else by the library `datasets` (tables.py). Left out: streaming
from other machines; the original spelling of numbers in compressed files.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from pathlib import Path

from megatron_rpp.data import tables
from megatron_rpp.data.json_lines import JsonLines, not_a_file
from megatron_rpp.data.rows import ChainedRows, Rows
from megatron_rpp.lifecycle.config_error import ConfigError, reading
from megatron_rpp.lifecycle.extras import require_extra

HUB = "hub:"
_LINES = {".jsonl", ".ndjson"}
"""Suffixes of JSON Lines in a directory. A .json file may be JSON Lines or one array."""


def open_rows(
    source: str, cache_dir: str | None = None, log: Callable[[str], None] = print
) -> Rows:
    """Opens a data set.

    Args:
        source: a file of JSON Lines; a .parquet, .csv or .arrow file; a directory of such files or
            one that `datasets` saved, followed by "@split" unless the split is "train"; or
            "hub:owner/name[:configuration][@split]" on the Hugging Face Hub. A path that exists is
            used as it is, whatever characters it contains.
        cache_dir: where `datasets` puts its memory-mapped copies; None = its default.
        log: called with a note if nothing can be written there.

    Raises:
        ConfigError: there is no such source, it is empty, or it cannot be read.
    """
    with reading(f"data set {source[:200]!r}", "correct the path"):
        path, split = _place(source)
    if not path.exists() and source.startswith(HUB):
        return _opened(source, lambda folder: _hub(source, folder), cache_dir=cache_dir, log=log)
    name = str(path.absolute())
    if path.is_dir():
        name += split and f"@{split}"
        return _opened(
            name,
            lambda folder: _directory(path, split, name, cache_dir=folder),
            cache_dir=cache_dir,
            log=log,
        )
    if path.suffix.lower() in tables.FORMATS and path.is_file():
        return _opened(
            name, lambda folder: _table(path, name, folder), cache_dir=cache_dir, log=log
        )
    return JsonLines(path)


def check_present(source: str) -> None:
    """Raises ConfigError if a data set on this machine is neither a file nor a directory."""
    with reading(f"data set {source[:200]!r}", "correct the path"):
        path, _ = _place(source)
    if not source.startswith(HUB) and not path.exists():
        raise ConfigError(not_a_file(str(path.absolute())))


def _place(source: str) -> tuple[Path, str]:
    """The path of a source, and its split ("" if none is given)."""
    if not source:
        raise ConfigError("a data set has no name: correct data.train or data.eval")
    path = Path(source)
    folder, _, split = source.rpartition("@")
    if not path.exists() and folder and Path(folder).is_dir():
        return Path(folder), split
    return path, ""


def _opened(
    name: str,
    read: Callable[[str | None], Rows],
    *,
    cache_dir: str | None,
    log: Callable[[str], None],
) -> Rows:
    require_extra("data", f"data set {name}")
    what, remedy = f"data set {name}", "correct the name or the files, or convert them to JSONL"
    with reading(what, remedy, "opened"):
        return tables.with_copies(read, what, cache_dir=cache_dir, log=log)


def _table(path: Path, name: str, cache_dir: str | None) -> Rows:
    files = {"train": [path]}
    return tables.open_files(files, "train", path.suffix.lower(), name=name, cache_dir=cache_dir)


def _directory(path: Path, split: str, name: str, *, cache_dir: str | None) -> Rows:
    import datasets  # imported here: runs on JSON Lines do not need it

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        return tables.ArrowRows(saved[split] if split else saved, name)
    _check_one_format(path)
    files = {key: list(map(Path, found)) for key, found in _files(path, cache_dir).items()}
    split = split or "train"
    suffixes = {file.suffix.lower() for found in files.values() for file in found}
    if split in files and all(map(_holds_lines, files[split])):
        return ChainedRows([JsonLines(file) for file in files[split]])
    if len(suffixes) == 1 and suffixes <= tables.FORMATS.keys():
        return tables.open_files(files, split, suffixes.pop(), name=name, cache_dir=cache_dir)
    table = datasets.load_dataset(str(path), split=split, cache_dir=cache_dir)
    return tables.ArrowRows(table, name)


def _check_one_format(directory: Path) -> None:
    """Raises ConfigError if a directory mixes formats: the library would read only one of them."""
    known = {*_LINES, *tables.FORMATS}
    found = {file.suffix.lower() for file in directory.rglob("*")} & known
    if len(found) > 1:
        raise ConfigError(
            f"data set {directory.absolute()} holds files of the formats "
            f"{', '.join(sorted(found))}: name the files that you mean, or keep one format in a "
            "directory"
        )


def _holds_lines(file: Path) -> bool:
    if file.suffix.lower() != ".json":
        return file.suffix.lower() in _LINES
    with open(file, "rb") as content:
        try:
            return isinstance(json.loads(content.readline()), dict)
        except ValueError:  # an array, or an object over several lines
            return False


def _files(directory: Path, cache_dir: str | None) -> dict[str, list[str]]:
    """The files of each split, as `datasets` finds them: by their names or the README."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    place = str(directory.absolute())
    if glob.escape(place) == place:
        return datasets.load_dataset_builder(place, cache_dir=cache_dir).config.data_files
    place = glob.escape(place)  # else the library takes the name for a pattern
    return DataFilesDict.from_patterns(get_data_patterns(place), base_path=place)


def _hub(source: str, cache_dir: str | None) -> Rows:
    import datasets

    name, _, split = source.removeprefix(HUB).partition("@")
    name, _, configuration = name.partition(":")
    split = split or "train"
    builder = datasets.load_dataset_builder(name, configuration or None, cache_dir=cache_dir)
    files = builder.config.data_files or {}
    suffixes = {Path(file).suffix for found in files.values() for file in found}
    if split in files and (suffixes <= _LINES or suffixes == {".csv"}):
        local = map(Path, datasets.DownloadManager().download(list(files[split])))
        if suffixes == {".csv"}:
            found = {split: list(local)}
            return tables.open_files(found, split, ".csv", name=source, cache_dir=cache_dir)
        named = [f"{source}, {Path(file).name}" for file in files[split]]
        return ChainedRows([JsonLines(*pair) for pair in zip(local, named)])
    table = datasets.load_dataset(name, configuration or None, split=split, cache_dir=cache_dir)
    return tables.ArrowRows(table, source)
