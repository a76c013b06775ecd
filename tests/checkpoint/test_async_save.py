"""Checkpoints that are written while the run continues (checkpoint.async_save)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_rpp.checkpoint import manifest, writer
from megatron_rpp.checkpoint import state as checkpoint
from megatron_rpp.checkpoint.directory_lock import one_writer
from megatron_rpp.checkpoint.state import POINTER, SaveFailed
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.runtime.checkpointing import Preempted
from tests.checkpoint.test_checkpoint_store import small_disk
from tests.distributed import PRELOADED
from tests.small_run import config_of
from tests.whole_runs import layout, same_bits, train_run, with_whole_run

SETTINGS = {"train__steps": 3, "checkpoint__interval": 1, "checkpoint__keep": 3}
ASYNC = SETTINGS | {"checkpoint__async_save": "true"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of the data and of run "whole", which saves synchronously."""
    return with_whole_run(tmp_path_factory.mktemp("async"), **SETTINGS)


@pytest.fixture
def entered():
    """The phases entered during a test, in order."""
    names: list[str] = []
    heartbeat.current.listeners.append(names.append)
    yield names
    heartbeat.current.listeners.remove(names.append)


def in_the_writer(monkeypatch, action) -> None:
    """Makes every background writer call `action` before it writes."""
    trainer, real = os.getpid(), writer._write_own

    def write_own(*arguments, write, **place):
        def after_act(*inner):
            if os.getpid() != trainer:
                action()
            write(*inner)

        real(*arguments, write=after_act, **place)

    monkeypatch.setattr(writer, "_write_own", write_own)


def tensors(run: Path, step: int) -> dict:
    """The manifest's entries of the files that hold weights and moments."""
    files = manifest.read_manifest(run / f"checkpoints/iter_{step:07d}")["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".distcp")}


def test_the_run_continues_and_the_checkpoint_is_of_its_step(base, monkeypatch, entered):
    """Each checkpoint is written while the next step changes weights and moments."""
    in_the_writer(monkeypatch, lambda: time.sleep(0.5))
    config = train_run(base, base / "meanwhile", **ASYNC)
    same_bits(base / "meanwhile", base / "whole", config, 3)
    for step in (1, 2, 3):
        assert tensors(base / "meanwhile", step) == tensors(base / "whole", step) != {}
    start = entered.index("save: write")
    assert entered[start + 1 : start + 3] == ["rollout", "reward"]  # of the next step
    assert entered.count("save: rename") == 3 and entered.index("save: manifest") > start + 2


def test_a_stop_waits_for_the_writer(base, monkeypatch):
    """The run is asked to stop during the first save. That save becomes current, and the run
    resumes from it."""
    in_the_writer(monkeypatch, lambda: time.sleep(0.5))

    def stop(name: str) -> None:
        if name == "save: write":
            os.kill(os.getpid(), signal.SIGTERM)

    heartbeat.current.listeners.append(stop)
    with pytest.raises(Preempted, match="saved after step 1"):
        train_run(base, base / "stopped", **ASYNC)
    heartbeat.current.listeners.remove(stop)
    names = sorted(path.name for path in (base / "stopped/checkpoints").iterdir())
    assert names == ["iter_0000001", POINTER]
    config = train_run(base, base / "stopped", **ASYNC)
    same_bits(base / "stopped", base / "whole", config, 3)


def test_a_killed_writer_ends_the_run_and_harms_nothing(base, monkeypatch):
    def action() -> None:
        if (base / "killed/checkpoints/iter_0000001").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    in_the_writer(monkeypatch, action)
    with pytest.raises(SaveFailed, match="step 2 could not be .* process that writes was killed"):
        train_run(base, base / "killed", **ASYNC)
    names = sorted(path.name for path in (base / "killed/checkpoints").iterdir())
    assert names == ["iter_0000001", POINTER]
    assert manifest.damage(base / "killed/checkpoints/iter_0000001") is None


def test_a_full_disk(base, tmp_path):
    """Room for one checkpoint of 0.9 MB; the second save must not harm it."""
    with small_disk(tmp_path / "disk", "1600k") as disk:
        settings = ASYNC | {"checkpoint__dir": disk / "checkpoints"}
        with pytest.raises(SaveFailed, match="of step 2 could not be written .* the disk is full"):
            train_run(base, tmp_path / "run", **settings)
        assert checkpoint.newest(disk / "checkpoints").name == "iter_0000001"
        assert len(list((disk / "checkpoints").iterdir())) == 2


def train_with_a_slow_writer(base: Path, folder: Path) -> None:
    """Trains in a separate process; the writer puts its process id into the file folder/writer."""
    part = folder / "writer.part"

    def action() -> None:
        part.write_text(str(os.getpid()))
        part.rename(folder / "writer")
        time.sleep(60)

    in_the_writer(pytest.MonkeyPatch(), action)
    train_run(base, folder / "run", **ASYNC)


def test_the_writer_dies_with_its_run_and_holds_no_lock(base, tmp_path):
    """The run is killed during a write. The next run does not wait for the orphaned writer."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver = multiprocessing.get_context("forkserver")
    run = forkserver.Process(target=train_with_a_slow_writer, args=(base, tmp_path))
    run.start()
    while not (tmp_path / "writer").exists():
        assert run.is_alive()
        time.sleep(0.01)
    run.kill()
    run.join()
    start = time.monotonic()
    with (
        layout(config_of(base, tmp_path / "run")),
        one_writer([tmp_path / "run/checkpoints"], print),
    ):
        assert time.monotonic() - start < 2
    writer = int((tmp_path / "writer").read_text())
    while not ended(writer):
        assert time.monotonic() - start < 10, f"process {writer} outlives its run"
        time.sleep(0.01)


def ended(process: int) -> bool:
    """Whether the process is gone or a zombie."""
    try:
        return " Z " in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return True
