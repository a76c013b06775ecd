"""A directory has one writer, and the next one may follow after the first has died."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from megatron_rpp.checkpoint import directory_lock
from tests.small_run import config_of, make_data
from tests.whole_runs import layout, train_run


def hold_in_a_child(directory: Path) -> int:
    """Starts a process that holds the lock of `directory` until it is killed; returns its id."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        directory_lock._take(directory / ".lock")
        os.write(writer, b"held")
        signal.pause()
    os.read(reader, 4)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("which", ["checkpoints", "logs"])
def test_a_second_run_is_an_error_and_the_next_one_is_not(tmp_path, monkeypatch, which):
    monkeypatch.setattr(directory_lock, "PATIENCE_SECONDS", 0.2)
    make_data(tmp_path)
    directory = tmp_path / "run" / which
    directory.mkdir(parents=True)
    child = hold_in_a_child(directory)
    try:
        where = f"process {child} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=f"{directory} is in use by {where}: stop that run"):
            train_run(tmp_path, tmp_path / "run", train__steps=1)
        assert [path.name for path in directory.iterdir()] == [".lock"]
    finally:
        kill(child)
    train_run(tmp_path, tmp_path / "run", train__steps=1)
    assert not (directory / ".lock").exists()


def test_a_lock_that_cannot_be_taken_is_an_error(tmp_path):
    make_data(tmp_path)
    (tmp_path / "run/logs/.lock").mkdir(parents=True)
    message = "logs/.lock cannot be locked .Is a directory.: change its permissions, or give this"
    with pytest.raises(ValueError, match=message):
        train_run(tmp_path, tmp_path / "run", train__steps=1)


def test_one_directory_for_both_is_locked_once(tmp_path):
    make_data(tmp_path)
    with layout(config_of(tmp_path, tmp_path)):
        with directory_lock.one_writer([str(tmp_path), f"{tmp_path}/."], log=print):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert not (tmp_path / ".lock").exists()
