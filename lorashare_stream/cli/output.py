"""Output of commands: results on stdout, as text or as one JSON object; progress, notes and errors on stderr.

A stream may be closed, full, unread, or of an encoding that cannot hold a name. Rich is imported on a terminal only.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

from ..errors import TOLD, AdapterError, CollectionError, StreamError, problem_lines
from ..runtime.progress import Progress, silent
from ..text import counted, encodable, printable

if TYPE_CHECKING:
    from ..plan.plan import Plan

SKIPPED = 3  # exit code: done, but adapters were left out
T = TypeVar("T")
FOLDED = 1000  # rows of a table; rich takes half a second for so many
LINES, DRAWINGS = 15.0, 0.1  # seconds between lines of progress in a log, between drawings of a bar
_UNITS = {"push": "file", **dict.fromkeys(("analyse", "accumulate", "fit"), "module")}  # others count adapters


def open_streams() -> None:
    """Open the standard streams that are closed: else the next file that is opened takes their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115


def show(text: str) -> None:
    """Print a result on stdout."""
    try:
        print(encodable(text, sys.stdout.encoding), flush=True)
    except BrokenPipeError:  # the reader has gone; the work is done
        discard(sys.stdout)


def say(text: str) -> None:
    """Print on stderr; where nobody can read it the work goes on."""
    with suppress(OSError):
        print(encodable(text, sys.stderr.encoding), file=sys.stderr, flush=True)


def say_error(error: StreamError) -> None:
    """Print why a command fails on stderr."""
    say(f"lorashare-stream: {error}")
    if isinstance(error, CollectionError) and len(error.problems) > TOLD:
        say("With --json each of them is told, with its reason.")


def discard(stream: TextIO) -> None:
    """Let what a stream holds, and cannot write, go nowhere: Python would fail to flush it, and exit with 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_result(args: Mapping[str, Any], value: Mapping[str, Any], text: str) -> None:
    """The result of a command, as it was asked for."""
    show(json.dumps(finite(value)) if "json" in args else text)


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: what could not be measured is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def table_text(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """A table; on a terminal as wide as that, with long names folded, unless it is too long to be read there."""
    if not sys.stdout.isatty() or len(rows) > FOLDED:
        from ..report.text import table

        return table(rows, header)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False)
    for i, name in enumerate(header):
        drawn.add_column(Text(name), overflow="fold", justify="right" if i else "left")
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(file=sys.stdout)
    with console.capture() as capture:
        console.print(drawn)
    return capture.get().rstrip("\n")


def say_what_will_be_left_out(made: Plan) -> None:
    """Adapters that a plan leaves out, with the reasons."""
    if made.refused and made.settings.on_error == "skip":
        say(f"{counted(len(made.refused), 'adapter')} will be left out, each of which --json tells:")
        say("\n".join(problem_lines(made.refused)))


def say_left_out(skipped: Sequence[AdapterError], out: Path) -> None:
    """Adapters that were left out, with the reasons."""
    if skipped:
        where = printable(out / "skipped.json")
        say(f"left out {counted(len(skipped), 'adapter')}; the reasons are in {where}:")
        say("\n".join(problem_lines(skipped)))


def progress_of(args: Mapping[str, Any]) -> Progress:
    """A bar on a terminal, lines in a log, nothing if quiet."""
    if "quiet" in args:
        return silent
    return bars if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else lines


def lines(step: str, total: int, results: Iterator[T]) -> Iterator[T]:
    """Progress in a log: a line every 15 seconds, and one at the end of the step."""
    begun = said = time.monotonic()
    done, unit = 0, _unit_of(step)
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - said >= LINES and done < total:
            said, rate = now, done / (now - begun)
            say(f"{step}: {done} of {counted(total, unit)}, {rate:.2f}/s, {_clock((total - done) / rate)} left")
    if done:
        say(f"{step}: {counted(done, unit)} in {_clock(time.monotonic() - begun)}")


def bars(step: str, total: int, results: Iterator[T]) -> Iterator[T]:
    """Progress on a terminal, drawn between results: a thread that draws would keep the process from forking."""
    if not total:
        yield from results
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    class Still(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Leave it as it is: a process that a signal ends could not show it again."""
            return False

    def text(form: str) -> TextColumn:
        return TextColumn(form, markup=False)

    name, count = text("{task.description:10}"), text("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}")
    left = (TimeRemainingColumn(compact=True), text("left,"), TimeElapsedColumn())
    console = Still(file=cast(TextIO, _Terminal(sys.stderr)), highlight=False, markup=False)
    columns = (name, BarColumn(), count, text("{task.fields[rate]}"), *left)
    begun = drawn = time.monotonic()
    with Progress(*columns, console=console, auto_refresh=False, redirect_stdout=False) as progress:
        task = progress.add_task(step, total=total, unit=f"{_unit_of(step)}s", rate="")
        progress.refresh()
        for done, result in enumerate(results, 1):
            yield result
            now = time.monotonic()
            due = now - drawn >= DRAWINGS
            progress.update(task, advance=1, rate=f"{done / max(now - begun, 1e-9):.2f}/s", refresh=due)
            drawn = now if due else drawn


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


def _unit_of(step: str) -> str:
    return _UNITS.get(step, "adapter")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
