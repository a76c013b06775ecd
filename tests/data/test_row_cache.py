"""The row cache: a run works without it if it cannot be used, and rewrites it if it is damaged."""

from __future__ import annotations

import numpy as np

from megatron_rpp.data.row_cache import Pass, cached, stamp

FOUND = Pass(np.array([0, 2]), "p" * 32, "l" * 32)


def asked(folder, times: int = 1) -> tuple[int, list[str]]:
    """Starts `times` runs; returns the number of passes over the data and the log."""
    made, said = [], []

    def find() -> Pass:
        made.append(True)
        return FOUND

    for _ in range(times):
        found = cached(folder, ["key"], find, log=said.append)
        assert found.rows.tolist() == [0, 2]
        assert (found.prompts, found.labels) == (FOUND.prompts, FOUND.labels)
    return len(made), said


def test_the_second_start_reads_the_result_of_the_first(tmp_path):
    assert asked(tmp_path / "new" / "cache", times=3) == (1, [])


def test_a_run_without_a_usable_cache_logs_it(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    made, said = asked(folder, times=2)
    assert made == 2 and len(said) == 2
    assert said[0] == (
        f"the cache {folder} cannot be used (Not a directory): every run reads all of the data "
        "again; set data.cache_dir to a directory of yours"
    )


def test_a_run_without_the_lock_of_the_cache_ignores_it(tmp_path):
    assert asked(tmp_path) == (1, [])
    (entry,) = tmp_path.glob("*.npz")
    entry.unlink()
    entry.with_suffix(".lock").unlink(missing_ok=True)
    entry.with_suffix(".lock").mkdir()
    made, said = asked(tmp_path)
    assert made == 1 and "Is a directory" in said[0]


def test_a_damaged_entry_is_rewritten(tmp_path):
    assert asked(tmp_path) == (1, [])
    (entry,) = tmp_path.glob("*.npz")
    for damage in (b"", entry.read_bytes()[:40], b"not an archive"):
        entry.write_bytes(damage)
        assert asked(tmp_path, times=2) == (1, [])


def test_a_dangling_link_does_not_change_the_stamp_of_a_directory(tmp_path):
    (tmp_path / "a").write_text("x")
    before = stamp(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "gone")
    assert stamp(tmp_path) == before
