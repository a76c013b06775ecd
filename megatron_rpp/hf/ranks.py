"""The ranks that convert a model together, of torchrun, or one process alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron_rpp import sealing

Made = TypeVar("Made")
# The ranks wait for the one with the largest share; one that dies is noticed at once.
_PATIENCE = timedelta(days=1)


def rank() -> int:
    """Of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
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


def agreed(make: Callable[[], Made]) -> Made:
    """What `make` gives, unless it is refused on any rank: then that refusal on every one.

    Collective where there is a process group. Raises ValueError.
    """
    made, refusal = None, None
    try:
        made = make()
    except ValueError as error:
        refusal = str(error)
    for text in sealing.gathered(refusal):
        if text is not None:
            raise ValueError(text)
    return made
