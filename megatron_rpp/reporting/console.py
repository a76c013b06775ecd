"""The console: a progress bar for the current stage, and a line of a table for each step.

Only the main rank prints. Bars are shown on terminals only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HEADER_EVERY = 20


class Console:
    """Prints on the main rank and is silent on the others."""

    def __init__(self, main: bool):
        self.rich = RichConsole(quiet=not main, highlight=False, soft_wrap=True)
        self.rows = 0

    def log(self, text: str) -> None:
        self.rich.print(text, markup=False)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Shows a bar while a stage runs; yields the function that advances it."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        bar = Progress(*columns, TimeElapsedColumn(), console=self.rich, transient=True)
        if not self.rich.is_terminal:
            yield lambda done: None
            return
        with bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.advance(task, done)

    def row(self, cells: dict[str, str]) -> None:
        """Prints one line of the run's table; every HEADER_EVERY lines the header comes again."""
        widths = {name: max(len(name), 9) for name in cells}
        if self.rows % HEADER_EVERY == 0:
            self.log("  ".join(name.rjust(widths[name]) for name in cells))
        self.log("  ".join(text.rjust(widths[name]) for name, text in cells.items()))
        self.rows += 1

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        self.rich.print(table)
