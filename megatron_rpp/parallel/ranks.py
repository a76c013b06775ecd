"""Exchanges between ranks that also work in one process without a process group.

Conversion runs under torchrun or alone; checkpoints and step progress use the same functions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import groups, progress_wait

Result = TypeVar("Result")
# Ranks wait for the one with the most work. A rank that dies is noticed at once, timeout or not.
_TIMEOUT = timedelta(days=1)


def rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the process group of torchrun's ranks; does nothing without torchrun."""
    joins = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        if joins:
            dist.destroy_process_group()


def raise_on_all_ranks(task: Callable[[], Result]) -> Result:
    """Returns what `task` returns, or raises on every rank if it raises ValueError on any.

    Collective if there is a process group.

    Raises ConfigError with the message of the first rank that failed.
    """
    result: Result
    problem = None
    try:
        result = task()
    except ValueError as error:
        problem = str(error)
    for text in gathered(problem):
        if text is not None:
            raise ConfigError(text)
    return result


def gathered(value: Any) -> list[Any]:
    """Returns every rank's `value`, in rank order; waits for the slowest rank while it progresses."""
    if not dist.is_initialized():
        return [value]
    progress_wait.wait_for_all()
    return groups.gather_objects(value, dist.group.WORLD)


def on_every_rank(task: Callable[[], Result]) -> list[Result]:
    """Runs `task` on every rank and returns all results in rank order.

    Collective; the task itself must not be.

    Raises OSError on every rank if the task raised one on any, so that no rank waits for one whose
    disk is full.
    """
    result, problem = None, None
    try:
        result = task()
    except OSError as error:
        problem = str(error)
    outcomes = gathered((result, problem))
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    if problems:
        raise OSError("; ".join(problems[:3]))
    return [value for value, _ in outcomes]


def on_main_rank(task: Callable[[], Result]) -> Result:
    """Runs `task` on the main rank only and returns its result on every rank.

    Collective; the task itself must not be.

    Raises OSError on every rank if the task raised one.
    """
    return on_every_rank(lambda: [task()] if is_main() else [])[0][0]


def is_main() -> bool:
    return not dist.is_initialized() or groups.is_main()
