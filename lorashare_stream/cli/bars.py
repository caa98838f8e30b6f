"""Progress on a terminal: a bar with rate and time left, by rich, which is not imported elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .progress import unit_of

T = TypeVar("T")
EVERY = 0.1  # seconds between drawings


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave it as it is: a process that a signal ends could not show it again."""
        return False


class _Terminal:
    """A stream whose terminal may go: then nothing is shown, and the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2f}/s")


def bars(step: str, total: int, results: Iterator[T]) -> Iterator[T]:
    """A bar, drawn between results: a thread that draws would keep the process from forking."""
    if not total:
        yield from results
        return
    count = TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False)
    name = TextColumn("{task.description:10}", markup=False)
    left = TextColumn("left,", markup=False)
    columns = (name, BarColumn(), count, _Rate(), TimeRemainingColumn(compact=True), left, TimeElapsedColumn())
    console = _Console(file=cast(TextIO, _Terminal(sys.stderr)), highlight=False, markup=False)
    drawn = time.monotonic()
    with Progress(*columns, console=console, auto_refresh=False, redirect_stdout=False) as progress:
        task = progress.add_task(step, total=total, unit=f"{unit_of(step)}s")
        progress.refresh()
        for result in results:
            yield result
            now = time.monotonic()
            progress.update(task, advance=1, refresh=now - drawn >= EVERY)
            drawn = now if now - drawn >= EVERY else drawn
