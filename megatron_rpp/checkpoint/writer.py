"""A checkpoint on its way to the disk: written at once, or by a process of its own meanwhile.

Megatron's own way to save asynchronously: the tensors go to the host, each rank forks a process that
writes them (on the CPU the fork itself is the copy: later updates do not reach it), and when the
processes of all ranks are done, the ranks finish the checkpoint together. A save that waits runs the
same functions in this process.

Left out: more than one save at a time; Megatron's persistent writer process, which needs CUDA.
"""

from __future__ import annotations

import inspect
import os
import pickle
import shutil
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator

from torch.distributed.checkpoint.api import CheckpointException

from megatron_rpp.checkpoint import manifest, store
from megatron_rpp.config import CheckpointConfig
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.exit_codes import SaveFailed
from megatron_rpp.lifecycle.parent_death import end_with
from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)
from megatron_rpp.parallel import groups, ranks

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue


class _Results:
    """What the writing of one rank hands back, through a file without a name that a forked process
    shares: Megatron's results, for which this stands in for a queue, and digests of its files.

    Megatron would make the queue in a process of its own, which imports the whole program again
    (seconds, in every rank's first save) and which a signal to the job would kill.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()

    def put(self, value: Any) -> None:
        pickle.dump(value, self.file)
        self.file.flush()

    def _read(self, number: int) -> Any:
        self.file.seek(0)
        try:
            for _ in range(number):
                pickle.load(self.file)
            return pickle.load(self.file)
        except EOFError:
            return RuntimeError("the process that writes was killed")

    def get_nowait(self) -> Any:
        return self._read(0)

    def digests(self) -> dict[str, dict]:
        """Of this rank's files, by name. Raises OSError where they could not be read again."""
        found = self._read(1)
        if isinstance(found, str):
            raise OSError(found)
        return found


def _write_own(write: Callable, directory: Path, trainer: int, rank: int, *arguments: Any) -> None:
    """Runs Megatron's writing of this rank's files, then digests them while they are in memory.

    trainer: the process that trains; where that is another than this one and dies, this ends.
    """
    if os.getpid() != trainer:
        end_with(trainer)
    *_, results = arguments
    write(rank, *arguments)
    try:
        results.put({p.name: manifest.describe(p) for p in sorted(directory.glob(f"__{rank}_*"))})
    except OSError as error:
        results.put(str(error))


def _request(content: dict, directory: Path, results: _Results):
    """Megatron's plan of a save, nothing of which but common.pt is written yet. Collective."""
    strategy = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        strategy = {"async_strategy": "mcore"}  # else 0.19 asks for another package
    # Megatron takes its queue from here when it plans. Left there, the next save by anyone else in
    # this process would take the results of this one for its own.
    before, filesystem_async._results_queue = filesystem_async._results_queue, results
    try:
        request = dist_checkpointing.save(
            content, str(directory), async_sharded_save=True, **strategy
        )
    finally:
        filesystem_async._results_queue = before
    if request.async_fn is None:  # this rank has nothing to write
        results.put({})
        results.put({})
        return request
    write_own = partial(_write_own, request.async_fn, directory, os.getpid())
    return request._replace(async_fn=write_own)


class Writing:
    """A checkpoint that is being written; it is in force when `publish` returns.

    Every method is collective, and raises SaveFailed, on every rank, where the file system does not
    take it: the checkpoint in force stays, and what is there of this one is removed.
    """

    def __init__(
        self,
        settings: CheckpointConfig,
        name: str,
        step: int,
        content: dict,
        notes: dict[str, Any],
        fill: Callable[[Path], dict[str, Any]],
        in_background: bool,
    ):
        """Writes `content`, or, in_background, begins to. See checkpoint.write for the rest."""
        self.settings, self.name, self.step = settings, name, step
        self.directory = Path(settings.dir)
        self.temporary: Path | None = None
        self._results, self._calls = _Results(), AsyncCallsQueue()
        with self._failing():
            heartbeat.enter("save: begin")
            self.temporary = store.begin(self.directory, name)
            heartbeat.enter("save: write")
            self.notes = {"step": step} | notes | fill(self.temporary)
            request = _request(content, self.temporary, self._results)
            if in_background:
                self._calls.schedule_async_request(request)
            else:
                request.execute_sync()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            free = shutil.disk_usage(self.directory).free / 1e9
            # torch's writer does not always say it: what the disk cut short, it calls inconsistent.
            full = "the disk is full; " if free < 1e-3 else ""
            if self.temporary is not None and groups.is_main():
                shutil.rmtree(self.temporary, ignore_errors=True)  # it may be what fills the disk
            raise SaveFailed(
                f"the checkpoint of step {self.step} could not be written to {self.directory}: "
                f"{full}{_reason(error)}; {free:.1f} GB were free. The checkpoints there are as "
                f"they were: make room (or mend the file system) and run again"
            ) from error

    def written(self, wait: bool) -> bool:
        """Whether every rank's part is on the disk. wait: until it is."""
        with self._failing():
            self._calls.maybe_finalize_async_calls(blocking=wait)
        return self._calls.get_num_unfinalized_calls() == 0

    def publish(self) -> Path:
        """Waits for what is not written yet, seals the checkpoint and puts it in force."""
        self.written(wait=True)
        with self._failing():
            heartbeat.enter("save: seal")
            digests = ranks.on_every_rank(self._results.digests)
            described = {name: entry for share in digests for name, entry in share.items()}
            manifest.seal(self.temporary, self.notes, described)
        return store.publish(
            self.temporary, self.directory / self.name, self.settings.keep, self.settings.keep_best
        )


def _reason(error: BaseException) -> str:
    """One line: what the file system said, by rank where ranks differ.

    Collective where Megatron made the ranks fail together: only its coordinator knows why.
    """
    if isinstance(error, CheckpointException):
        found = [f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items()]
        return ranks.gathered("; ".join(found))[0] or "another rank failed"
    return str(error).splitlines()[0]
