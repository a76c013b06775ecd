"""What the tools show: a progress bar and messages, on the first rank alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_rpp.parallel.ranks import rank


@contextlib.contextmanager
def counting_tensors(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of this rank's tensors on stderr; what it gives is told how many more are done."""
    columns = TextColumn("tensors"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=rank() != 0) as bar:
        task = bar.add_task("tensors", total=total)
        yield lambda done: bar.advance(task, done)


def say(text: str) -> None:
    """A line on stdout."""
    if rank() == 0:
        Console(highlight=False).print(text, soft_wrap=True)


def say_error(error: Exception) -> None:
    """A line on stderr."""
    if rank() == 0:
        print(f"error: {error}", file=sys.stderr)
