"""What a person sees of long work: a bar on a terminal, a line now and then in a log, tables with whole words.

Knows: the terminal. Refuses to know: what the work is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

LINE_EVERY_S = 30.0  # where there is no terminal


class Progress:
    """Of `total` pieces of work, `done` of which were there before; on standard error, as results go to the other.

    On a terminal a bar. Into a file (nohup, Slurm) a line every `LINE_EVERY_S` seconds, so that whoever looks sees how
    far it is. `print` works beside it."""

    def __init__(self, what: str, total: int, done: int = 0, quiet: bool = False):
        console = Console(stderr=True)
        self._what, self._total, self._before, self._done = what, total, done, float(done)
        self._quiet, self._terminal = quiet, console.is_terminal
        self._began = self._told = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        off = quiet or not self._terminal
        self._bar = Bar(*columns, console=console, disable=off, redirect_stdout=sys.stdout.isatty())
        self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, what: str) -> None:
        """What is under way now."""
        self._what = what
        self._bar.update(self._task, description=what)
        self._tell()

    def advance(self, pieces: float = 1.0) -> None:
        self._done += pieces
        self._bar.advance(self._task, pieces)
        self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if not self._quiet and not self._terminal and now - self._told >= LINE_EVERY_S:
            self._told = now
            print(self.line(now - self._began), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """After so many seconds: 3 of 12 in 0:01:05, about 0:03:15 left: HumanEval/3 pearl"""
        made, left = self._done - self._before, self._total - self._done
        rest = f", about {_clock(seconds * left / made)} left" if made > 0 else ""
        return f"{self._done:.0f} of {self._total:.0f} in {_clock(seconds)}{rest}: {self._what}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def show_table(head: Sequence[str], rows: Iterable[Sequence[str]], labels: int = 1) -> None:
    """Prints a table; the first columns, `labels`, are words and the others numbers. A terminal that is too narrow
    breaks its lines, and no cell is cut."""
    table = Table(header_style="bold")
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number < labels else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table, highlight=False)
