"""The ranks that convert a model together, of torchrun, or one process alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel import groups

Made = TypeVar("Made")
# The ranks wait for the one with the largest share; one that dies is noticed at once.
_PATIENCE = timedelta(days=1)


def rank() -> int:
    """Of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The process group of torchrun's ranks; none where torchrun did not start this process."""
    own = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        if own:
            dist.destroy_process_group()


def raise_on_all_ranks(make: Callable[[], Made]) -> Made:
    """What `make` gives, unless it is refused on any rank: then that refusal on every one.

    Collective where there is a process group. Raises ConfigError.
    """
    made, refusal = None, None
    try:
        made = make()
    except ValueError as error:
        refusal = str(error)
    for text in gathered(refusal):
        if text is not None:
            raise ConfigError(text)
    return made


def gathered(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order."""
    return groups.gather_objects(value, dist.group.WORLD) if dist.is_initialized() else [value]


def on_every_rank(task: Callable[[], Made]) -> list[Made]:
    """What `task` returned on every rank, in rank order. Collective; the task itself must not be.

    Raises OSError, on every rank, where the task raised one on any: nobody waits for a rank whose
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


def on_main_rank(task: Callable[[], Made]) -> Made:
    """What `task` returned on the main rank, which alone runs it. Collective; the task must not be.

    Raises OSError, on every rank, where the task raised one.
    """
    return on_every_rank(lambda: task() if is_main() else None)[0]


def is_main() -> bool:
    return not dist.is_initialized() or groups.is_main()
