"""Worker processes for reward functions, with a time limit for each sample.

A worker has one sample at a time. If it exceeds the limit, it is killed together with all processes
it has started; if it dies, it is replaced. Either way the sample gets the default score and is
counted. It does not matter which worker scores a sample, so the result depends neither on the
number of workers nor on their speed. Workers see no GPU. Left out: limits on the memory of a worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_rpp.rewards.validation import SampleError

_START_SECONDS = 300.0
"""Time limit for a worker to start and import the functions."""

Sample = tuple[str, str, str | None, dict[str, Any]]
"""Prompt, response, label, metadata."""


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    ready: bool = False
    index: int | None = None
    """The sample that the worker has; None = it is idle."""
    deadline: float = 0.0

    def kill(self) -> None:
        self.connection.close()
        with suppress(ProcessLookupError):  # the process and all its children are gone
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class _Work:
    """A batch of samples on its way through the workers."""

    name: str
    samples: Sequence[Sample]
    scores: list[float]
    problems: dict[int, str] = field(default_factory=dict)
    unscored: int = 0
    following: int = 0

    def is_left(self) -> bool:
        """Whether a sample is left to hand out. After a problem, no more are."""
        return not self.problems and self.following < len(self.samples)


class WorkerPool:
    """Scores samples in up to ``count`` processes, which start with the first sample."""

    def __init__(
        self,
        functions: Sequence[tuple[str, dict[str, Any]]],
        count: int,
        *,
        timeout: float,
        default: float,
    ) -> None:
        """
        Args:
            functions: (name, options) of the functions that the workers load.
            timeout: time limit in seconds for one sample.
            default: score of a sample whose scorer hangs or dies.
        """
        self._functions = list(functions)
        self._count = count
        self._timeout = timeout
        self._default = default
        self._workers: list[_Worker] = []
        weakref.finalize(self, _kill, self._workers)

    def score(
        self, name: str, samples: Sequence[Sample], alive: Callable[[], None] = lambda: None
    ) -> tuple[list[float], int]:
        """The scores of the function ``name``, and how many of them are the default.

        Args:
            alive: called after every answer, and after every sample that is given up.

        Raises:
            SampleError: the function raised or did not return a finite number (of several such
                samples, the first is named), or a worker could not start.
        """
        work = _Work(name, samples, [self._default] * len(samples))
        self._start(min(self._count, len(samples)))
        try:
            while self._assign(work):
                for worker in self._finished():
                    self._take(worker, work)
                    alive()
        except BaseException:
            _kill(self._workers)
            raise
        if work.problems:
            index = min(work.problems)
            raise SampleError(index, work.problems[index])
        return work.scores, work.unscored

    def _assign(self, work: _Work) -> bool:
        """Hands idle workers the next samples. False if all samples are scored."""
        for worker in self._workers:
            if worker.ready and worker.index is None and work.is_left():
                self._give(
                    worker,
                    name=work.name,
                    index=work.following,
                    sample=work.samples[work.following],
                )
                work.following += 1
        return work.is_left() or any(worker.index is not None for worker in self._workers)

    def _take(self, worker: _Worker, work: _Work) -> None:
        """Handles a worker of `_finished`: it is ready, has answered, or is late or dead."""
        index, answer = worker.index, _answer(worker)
        if not worker.ready:
            if answer is not None:
                reason = "it died or took too long" if answer is _NONE else answer
                raise SampleError(None, f"cannot start in a worker process: {reason}")
            worker.ready = True
        elif answer is _NONE:
            worker.kill()
            self._workers[self._workers.index(worker)] = self._launch()
            work.unscored += 1
        else:
            assert index is not None
            worker.index = None
            score, problem = answer
            if problem is None:
                work.scores[index] = score
            else:
                work.problems[index] = problem

    def _start(self, count: int) -> None:
        self._workers[:] = [w for w in self._workers if w.process.poll() is None]
        while len(self._workers) < count:
            self._workers.append(self._launch())

    def _launch(self) -> _Worker:
        ours, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "megatron_rpp.rewards.worker"]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # The GPUs are the ranks': a context of each worker would take memory from them.
                env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # so that what a scorer starts can be killed with it
            )
        ours.send(self._functions)
        return _Worker(process, ours, deadline=time.monotonic() + _START_SECONDS)

    def _give(self, worker: _Worker, *, name: str, index: int, sample: Sample) -> None:
        worker.index, worker.deadline = index, time.monotonic() + self._timeout
        # If the worker died between two samples, `_finished` finds out.
        with suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send((name, sample))

    def _finished(self) -> list[_Worker]:
        """Waits for the first worker that answers, dies or exceeds its limit; returns all that
        have."""
        busy = [w for w in self._workers if not w.ready or w.index is not None]
        left = min(worker.deadline for worker in busy) - time.monotonic()
        answered = wait([worker.connection for worker in busy], max(0.0, left))
        now = time.monotonic()
        return [w for w in busy if w.connection in answered or now >= w.deadline]


_NONE = object()
"""Stands for a missing answer."""


def _answer(worker: _Worker) -> Any:
    """What the worker sent; _NONE if it is late or dead."""
    try:
        return worker.connection.recv() if worker.connection.poll() else _NONE
    except (EOFError, ConnectionResetError):
        return _NONE


def _kill(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    workers.clear()
