"""A damaged checkpoint is named and set aside, and the previous one is used if there is one.

The checkpoints are from a real run; the tests damage copies of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_rpp import train
from megatron_rpp.checkpoint import manifest
from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.state import SaveFailed
from megatron_rpp.checkpoint.store import POINTER
from megatron_rpp.conversion.dist_checkpoint import Checkpoint
from megatron_rpp.lifecycle.config_error import ConfigError
from tests.small_run import arguments
from tests.whole_runs import VARIED, rows, run_program, train_run, with_whole_run

SETTINGS = {"train__steps": 3, "checkpoint__interval": 1, "checkpoint__keep": 3}
NAMES = ["iter_0000001", "iter_0000002", "iter_0000003"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of the data and of run "whole" with its three checkpoints."""
    return with_whole_run(tmp_path_factory.mktemp("store"), **SETTINGS)


@pytest.fixture
def run(base, tmp_path) -> Path:
    """A copy of the run that a test may damage."""
    shutil.copytree(base / "whole", tmp_path / "run")
    return tmp_path / "run"


def shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


# The damage, and how the message describes it.
DAMAGE = {
    "no metadata": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "empty metadata": (lambda path: (path / ".metadata").write_bytes(b""), ".metadata has 0 bytes"),
    "no common part": (lambda path: Checkpoint(path).common_file.unlink(), "is missing"),
    "truncated": (lambda path: truncate(shard(path)), "bytes, not"),
    "flipped bit": (lambda path: flip(shard(path)), "has another digest"),
    "torn manifest": (lambda path: truncate(path / manifest.MANIFEST), "manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside(run, kind):
    do_damage, message = DAMAGE[kind]
    directory, logged = run / "checkpoints", []
    do_damage(directory / NAMES[2])
    assert checkpoint.newest(directory, logged.append, repair=True) == directory / NAMES[1]
    assert len(logged) == 1 and NAMES[2] in logged[0] and message in logged[0]
    assert "set aside as damaged_iter_0000003; using iter_0000002" in logged[0]
    names = {path.name for path in directory.iterdir()}
    assert names == {*NAMES[:2], "damaged_iter_0000003", POINTER}
    assert (directory / POINTER).read_text() == "2\n"


def test_a_directory_of_another_run_is_read_and_left_alone(run):
    directory, logged = run / "checkpoints", []
    flip(shard(directory / NAMES[2]))
    before = sorted(directory.rglob("*"))
    assert checkpoint.require(directory, logged.append) == directory / NAMES[1]
    assert "is damaged" in logged[0] and sorted(directory.rglob("*")) == before
    with pytest.raises(ValueError, match="iter_0000003 is damaged .*choose another"):
        checkpoint.require(directory / NAMES[2])


def test_the_run_resumes_from_the_previous_one(base, run, capsys):
    """The run repeats step 3 and ends like the undamaged run."""
    truncate(shard(run / "checkpoints" / NAMES[2]))
    train_run(base, run, **SETTINGS)
    assert "iter_0000003 is damaged" in capsys.readouterr().out
    redone, whole = (rows(path / "logs/metrics.jsonl") for path in (run, base / "whole"))
    assert [row["step"] for row in redone] == [1, 2, 3]
    assert redone[2]["policy/loss"] == whole[2]["policy/loss"]
    assert checkpoint.newest(run / "checkpoints").name == NAMES[2]


def test_a_dry_run_reports_damage_and_changes_nothing(base, run, capsys):
    truncate(shard(run / "checkpoints" / NAMES[2]))
    before = sorted(run.rglob("*"))
    argv = arguments(base, run, **(VARIED | SETTINGS))
    run_program(train.main, [*argv, "--dry-run"])
    shown = capsys.readouterr().out
    assert "iter_0000003 is damaged" in shown and "resumed at step 2 of 3" in shown
    assert sorted(run.rglob("*")) == before


def test_without_an_intact_checkpoint_every_start_is_an_error(base, run):
    """A requeued job must not start over in a run that someone can still repair."""
    for name in NAMES:
        flip(shard(run / "checkpoints" / name))
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint in .* is intact .*iter_0000001: "):
            train_run(base, run, **SETTINGS)
    assert len(rows(run / "logs/metrics.jsonl")) == 3


POINTERS = {"empty": "", "of a step that is gone": "7\n", "of noise": "\x00\x00\x00"}


@pytest.mark.parametrize("pointer", POINTERS)
def test_a_useless_pointer(run, pointer):
    directory, logged = run / "checkpoints", []
    (directory / POINTER).write_text(POINTERS[pointer])
    assert checkpoint.newest(directory, logged.append) == directory / NAMES[2]
    assert "names no checkpoint; using iter_0000003" in logged[0]


def test_no_pointer(run):
    """A kill between the rename of the first checkpoint and its pointer leaves this state."""
    (run / "checkpoints" / POINTER).unlink()
    assert checkpoint.newest(run / "checkpoints").name == NAMES[2]


def test_a_pointer_without_checkpoints_is_an_error(run):
    for name in NAMES:
        shutil.rmtree(run / "checkpoints" / name)
    with pytest.raises(ValueError, match="is there, but no checkpoint: restore"):
        checkpoint.newest(run / "checkpoints")


def test_the_pointer_may_name_an_older_one(run):
    (run / "checkpoints" / POINTER).write_text("2\n")
    assert checkpoint.newest(run / "checkpoints").name == NAMES[1]


def test_a_checkpoint_from_elsewhere_needs_no_manifest(run):
    """Megatron's own checkpoints have none, and a converted one is called `release`."""
    directory = run / "checkpoints"
    (directory / NAMES[2] / manifest.MANIFEST).unlink()
    (directory / NAMES[2]).rename(directory / "release")
    (directory / POINTER).write_text("release\n")
    assert checkpoint.newest(directory) == directory / "release"
    assert checkpoint.require(directory / "release") == directory / "release"


def test_a_damaged_common_state_without_a_manifest_is_an_error(base, run):
    path = run / "checkpoints" / NAMES[2]
    (path / manifest.MANIFEST).unlink()
    file = Checkpoint(path).common_file
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ConfigError, match=f"checkpoint {path} cannot be read .*: choose another"):
        train_run(base, run, **(SETTINGS | {"train__steps": 4}))


def test_a_tool_can_write_a_manifest(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below/file").write_bytes(b"content")
    manifest.write_manifest(tmp_path, {"step": 3})
    assert manifest.damage(tmp_path) is None
    assert manifest.read_manifest(tmp_path)["notes"] == {"step": 3}
    (tmp_path / "below/file").write_bytes(b"changed")
    assert manifest.damage(tmp_path) == "below/file has another digest than when it was written"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mounts a file system of `size` bytes, or skips the test."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        # Lazily, because a helper process of the failed save may still be ending.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_save_and_keeps_the_last_good_state(base, tmp_path):
    """There is room for one checkpoint of 0.9 MB; the second save must not harm it."""
    with small_disk(tmp_path / "disk", "1600k") as disk:
        settings = SETTINGS | {"checkpoint__dir": disk / "checkpoints"}
        with pytest.raises(SaveFailed, match="the disk is full") as failed:
            train_run(base, tmp_path / "run", **settings)
        assert "checkpoint of step 2 could not be written" in str(failed.value)
        assert "GB were free" in str(failed.value) and "make room" in str(failed.value)
        assert checkpoint.newest(disk / "checkpoints").name == NAMES[0]
        names = {path.name for path in (disk / "checkpoints").iterdir()}
        assert names == {NAMES[0], POINTER}
    # Only step 1 has its row: the row of step 2 is written when the run resumes and repeats it.
    assert len(rows(tmp_path / "run/logs/metrics.jsonl")) == 1
