"""Writes a checkpoint, at once or in the background while the run goes on.

This is Megatron's own way to save asynchronously. The tensors are copied to the host, and each rank
forks a process that writes them (on the CPU the fork itself is the copy: later updates do not reach
it). When the processes of all ranks are done, the ranks finish the checkpoint together. A save in
the foreground runs the same functions in this process.

Left out: more than one save at a time; Megatron's persistent writer process, which needs CUDA.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_rpp.checkpoint import manifest, store
from megatron_rpp.config import CheckpointConfig
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.config_error import first_line
from megatron_rpp.lifecycle.exit_codes import SaveFailed
from megatron_rpp.lifecycle.parent_death import end_with
from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)
from megatron_rpp.parallel import groups, ranks

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)


class _Results:
    """What the writer of one rank returns: Megatron's results, and the digests of its files.

    It replaces Megatron's queue by an unnamed file that a forked process shares. Megatron would
    make the queue in a process of its own. That process imports the whole program again (seconds,
    in the first save of every rank), and a signal to the job would kill it.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 (as long as this object)

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
        """Digests of this rank's files, by name. Raises OSError if they could not be read."""
        found = self._read(1)
        if isinstance(found, str):
            raise OSError(found)
        return found


class _Errors(logging.Handler):
    """Lists the errors that Megatron's writer logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """The errors of Megatron's writer inside the context.

    Only its log says what failed: 0.19 asserts that nothing did, and reports or raises that assertion.
    """
    logger, errors = logging.getLogger(filesystem_async.__name__), _Errors()
    logger.addHandler(errors)
    try:
        yield errors.texts
    except AssertionError:
        if not errors.texts:
            raise
    finally:
        logger.removeHandler(errors)


def _write_own(rank: int, *arguments: Any, write: Callable, directory: Path, trainer: int) -> None:
    """Writes this rank's files with Megatron's function, then digests them while they are cached.

    trainer: the process that trains. If this is another process, it ends with the trainer.
    """
    if os.getpid() != trainer:
        end_with(trainer)
    *data, results = arguments
    outcome: SimpleQueue = SimpleQueue()
    with _logged_errors() as errors:
        write(rank, *data, outcome)
    results.put(OSError(errors[0]) if errors else outcome.get_nowait())
    try:
        results.put({p.name: manifest.describe(p) for p in sorted(directory.glob(f"__{rank}_*"))})
    except OSError as error:
        results.put(str(error))


def _request(content: dict, directory: Path, results: _Results) -> AsyncRequest:
    """Returns Megatron's plan of a save; so far at most common.pt is written. Collective.

    The data-parallel ranks, which hold the same weights, share the writing.
    """
    strategy = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        strategy = {"async_strategy": "mcore"}  # else 0.19 asks for another package
    # Megatron takes its queue from here when it plans. If ours stayed there, another save in this
    # process would take the results of this one for its own.
    before, filesystem_async._results_queue = filesystem_async._results_queue, results
    try:
        writer = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), groups.token_group()
        )
        request = dist_checkpointing.save(
            content, str(directory), writer, async_sharded_save=True, **strategy
        )
    finally:
        filesystem_async._results_queue = before
    if request.async_fn is None:  # this rank has nothing to write
        results.put({})
        results.put({})
        return request
    write_own = partial(
        _write_own, write=request.async_fn, directory=directory, trainer=os.getpid()
    )
    return request._replace(async_fn=write_own)


class PendingSave:
    """A checkpoint that is being written. It becomes current when `publish` returns.

    Every method is collective. If the file system fails on any rank, it raises SaveFailed on all:
    the current checkpoint stays as it is, and the files of this one are removed.
    """

    def __init__(self, settings: CheckpointConfig, name: str, step: int):
        self.settings, self.name, self.step = settings, name, step
        self.directory = Path(settings.dir)
        self._temporary: Path | None = None
        self._notes: dict[str, Any] = {}
        self._results: _Results | None = None
        self._calls = AsyncCallsQueue()

    def start(
        self,
        content: dict,
        notes: dict[str, Any],
        write_more: Callable[[Path], dict[str, Any]],
        *,
        in_background: bool,
    ) -> None:
        """Writes `content`, or starts a process of each rank that does. See `state.save`."""
        with self._failing():
            heartbeat.enter("save: begin")
            self._results = _Results()
            self._temporary = store.begin(self.directory, self.name)
            heartbeat.enter("save: write")
            self._notes = {"step": self.step} | notes | write_more(self._temporary)
            request = _request(content, self._temporary, self._results)
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
            # torch's writer does not always say so: it calls a file that was cut short inconsistent.
            full = "the disk is full; " if free < 1e-3 else ""
            if self._temporary is not None and groups.is_main():
                shutil.rmtree(self._temporary, ignore_errors=True)  # it may be what fills the disk
            raise SaveFailed(
                f"the checkpoint of step {self.step} could not be written to {self.directory}: "
                f"{full}{_reason(error)}; {free:.1f} GB were free. The checkpoints there are as "
                f"they were: make room (or mend the file system) and run again"
            ) from error

    def written(self, *, wait: bool) -> bool:
        """Whether the parts of all ranks are on the disk. wait: return when they are."""
        with self._failing():
            self._calls.maybe_finalize_async_calls(blocking=wait)
        return self._calls.get_num_unfinalized_calls() == 0

    def publish(self) -> Path:
        """Waits until all is written, adds the manifest and makes the checkpoint current."""
        assert self._temporary is not None and self._results is not None, "call start first"
        self.written(wait=True)
        with self._failing():
            heartbeat.enter("save: manifest")
            digests = ranks.on_every_rank(self._results.digests)
            described = {name: entry for share in digests for name, entry in share.items()}
            manifest.write_manifest(self._temporary, self._notes, described)
        return store.publish(
            self._temporary,
            self.directory / self.name,
            keep=self.settings.keep,
            keep_best=self.settings.keep_best,
        )


def _reason(error: BaseException) -> str:
    """One line: the message of the file system, by rank if Megatron reports several.

    Collective if Megatron made the ranks fail together: only its coordinator knows why.
    """
    if isinstance(error, CheckpointException):
        found = [f"rank {rank}: {first_line(parts[0])}" for rank, parts in error.failures.items()]
        return ranks.gathered("; ".join(found))[0] or "another rank failed"
    return first_line(error)
