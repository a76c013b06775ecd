"""What the writer of one rank reports if one of its files cannot be written.

Whole saves that fail are in tests/runs/test_one_rank_fails.py and test_checkpoint_store.py.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import pytest

from megatron_rpp.checkpoint import writer
from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

# Megatron's function for the files of a rank: 0.16 has processes write them, 0.19 threads.
(WRITE,) = (
    getattr(FileSystemWriterAsync, name)
    for name in ("write_preloaded_data_multiproc", "write_preloaded_data_multithread")
    if hasattr(FileSystemWriterAsync, name)
)


def outcome(folder: Path, names: list[str]) -> object:
    """What the writer reports after it has written two empty files."""
    results = writer._Results()
    files = [(str(folder / name), name, ([], [])) for name in names]
    write = partial(WRITE, [], False)
    writer._write_own(0, files, results, write=write, directory=folder, trainer=os.getpid())
    return results.get_nowait()


# 0.19 writes the last file in the calling thread and the others in threads of their own.
@pytest.mark.parametrize("names", [["gone/__0_0", "__0_1"], ["__0_0", "gone/__0_1"]])
def test_the_error_of_the_file_system_is_reported(tmp_path, names):
    failure = outcome(tmp_path, names)
    assert isinstance(failure, OSError) and os.strerror(errno.ENOENT) in str(failure)
    assert "/gone/__0_" in str(failure)


def test_without_an_error_there_is_a_result_for_each_file(tmp_path):
    assert outcome(tmp_path, ["__0_0", "__0_1"]) == {0: [], 1: []}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("\nfirst\nsecond"), "first"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_the_reason_is_a_line_that_says_something(error, reason):
    assert writer._reason(error) == reason
