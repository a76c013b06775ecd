"""Output of the tools: a progress bar and messages, on the first rank only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_rpp.parallel.ranks import rank


@contextlib.contextmanager
def counting_tensors(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar of the tensors of this rank on stderr. Yields the function that advances it."""
    columns = TextColumn("tensors"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=rank() != 0) as bar:
        task = bar.add_task("tensors", total=total)
        yield lambda done: bar.advance(task, done)


def log(text: str) -> None:
    """Prints a line on stdout."""
    if rank() == 0:
        Console(highlight=False).print(text, soft_wrap=True)


def log_error(error: Exception) -> None:
    """Prints an error on stderr."""
    if rank() == 0:
        print(f"error: {error}", file=sys.stderr)
