"""Damage to a directory of checkpoints: named, set aside, the previous one taken, or refused.

The checkpoints are a real run's; the damage is done to copies of them.
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
    """A copy of the run to do harm to."""
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


# What is done to the checkpoint, and what is said of it.
HARM = {
    "no metadata": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "empty metadata": (lambda path: (path / ".metadata").write_bytes(b""), ".metadata has 0 bytes"),
    "no common part": (lambda path: (path / "common.pt").unlink(), "common.pt is missing"),
    "truncated": (lambda path: truncate(shard(path)), "bytes, not"),
    "flipped bit": (lambda path: flip(shard(path)), "has another digest"),
    "torn manifest": (lambda path: truncate(path / manifest.MANIFEST), "manifest.json is missing"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_set_aside(run, harm):
    do_harm, message = HARM[harm]
    directory, said = run / "checkpoints", []
    do_harm(directory / NAMES[2])
    assert checkpoint.newest(directory, said.append, repair=True) == directory / NAMES[1]
    assert len(said) == 1 and NAMES[2] in said[0] and message in said[0]
    assert "set aside as damaged_iter_0000003; using iter_0000002" in said[0]
    names = {path.name for path in directory.iterdir()}
    assert names == {*NAMES[:2], "damaged_iter_0000003", POINTER}
    assert (directory / POINTER).read_text() == "2\n"


def test_a_directory_of_another_run_is_read_and_left_alone(run):
    directory, said = run / "checkpoints", []
    flip(shard(directory / NAMES[2]))
    before = sorted(directory.rglob("*"))
    assert checkpoint.require(directory, said.append) == directory / NAMES[1]
    assert "is damaged" in said[0] and sorted(directory.rglob("*")) == before
    with pytest.raises(ValueError, match="iter_0000003 is damaged .*choose another"):
        checkpoint.require(directory / NAMES[2])


def test_the_run_goes_on_from_the_previous_one(base, run, capsys):
    """It redoes step 3 and ends as the run that nothing happened to."""
    truncate(shard(run / "checkpoints" / NAMES[2]))
    train_run(base, run, **SETTINGS)
    assert "iter_0000003 is damaged" in capsys.readouterr().out
    redone, whole = (rows(path / "logs/metrics.jsonl") for path in (run, base / "whole"))
    assert [row["step"] for row in redone] == [1, 2, 3]
    assert redone[2]["policy/loss"] == whole[2]["policy/loss"]
    assert checkpoint.newest(run / "checkpoints").name == NAMES[2]


def test_a_dry_run_says_what_is_damaged_and_changes_nothing(base, run, capsys):
    truncate(shard(run / "checkpoints" / NAMES[2]))
    before = sorted(run.rglob("*"))
    argv = arguments(base, run, **(VARIED | SETTINGS))
    run_program(train.main, [*argv, "--dry-run"])
    shown = capsys.readouterr().out
    assert "iter_0000003 is damaged" in shown and "resumed at step 2 of 3" in shown
    assert sorted(run.rglob("*")) == before


def test_nothing_intact_is_refused_every_time(base, run):
    """A requeued job must not begin anew over a run that someone can still mend."""
    for name in NAMES:
        flip(shard(run / "checkpoints" / name))
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint in .* is intact .*iter_0000001: "):
            train_run(base, run, **SETTINGS)
    assert len(rows(run / "logs/metrics.jsonl")) == 3


POINTERS = {"empty": "", "of a step that is gone": "7\n", "of noise": "\x00\x00\x00"}


@pytest.mark.parametrize("pointer", POINTERS)
def test_a_useless_pointer(run, pointer):
    directory, said = run / "checkpoints", []
    (directory / POINTER).write_text(POINTERS[pointer])
    assert checkpoint.newest(directory, said.append) == directory / NAMES[2]
    assert "names no checkpoint; using iter_0000003" in said[0]


def test_no_pointer(run):
    """A kill between the rename of the very first checkpoint and its pointer."""
    (run / "checkpoints" / POINTER).unlink()
    assert checkpoint.newest(run / "checkpoints").name == NAMES[2]


def test_a_pointer_without_checkpoints_is_refused(run):
    for name in NAMES:
        shutil.rmtree(run / "checkpoints" / name)
    with pytest.raises(ValueError, match="is there, but no checkpoint: restore"):
        checkpoint.newest(run / "checkpoints")


def test_an_older_one_is_taken_where_the_pointer_says_so(run):
    (run / "checkpoints" / POINTER).write_text("2\n")
    assert checkpoint.newest(run / "checkpoints").name == NAMES[1]


def test_a_checkpoint_from_elsewhere_needs_no_manifest(run):
    """Megatron's own have none, and a converted one is called `release`."""
    directory = run / "checkpoints"
    (directory / NAMES[2] / manifest.MANIFEST).unlink()
    (directory / NAMES[2]).rename(directory / "release")
    (directory / POINTER).write_text("release\n")
    assert checkpoint.newest(directory) == directory / "release"
    assert checkpoint.require(directory / "release") == directory / "release"


def test_a_tool_can_seal_what_it_wrote(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below/file").write_bytes(b"content")
    manifest.write_manifest(tmp_path, {"step": 3})
    assert manifest.damage(tmp_path) is None
    assert manifest.read_manifest(tmp_path)["notes"] == {"step": 3}
    (tmp_path / "below/file").write_bytes(b"changed")
    assert manifest.damage(tmp_path) == "below/file has another digest than when it was written"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` bytes, or a skipped test."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        # Lazily: a helper process of the failed save may be about to end.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_save_and_keeps_the_last_good_state(base, tmp_path):
    """Room for one checkpoint of 0.9 MB; the second save must not harm it."""
    with small_disk(tmp_path / "disk", "1600k") as disk:
        settings = SETTINGS | {"checkpoint__dir": disk / "checkpoints"}
        with pytest.raises(SaveFailed, match="the disk is full") as failed:
            train_run(base, tmp_path / "run", **settings)
        assert "checkpoint of step 2 could not be written" in str(failed.value)
        assert "GB were free" in str(failed.value) and "make room" in str(failed.value)
        assert checkpoint.newest(disk / "checkpoints").name == NAMES[0]
        names = {path.name for path in (disk / "checkpoints").iterdir()}
        assert names == {NAMES[0], POINTER}
    # The row of the step that is not in force any more comes again when the run goes on.
    assert len(rows(tmp_path / "run/logs/metrics.jsonl")) == 1
