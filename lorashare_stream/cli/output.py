"""What commands print: results on stdout, as text or as one JSON object; progress and notes on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterError, problem_lines
from ..plan.plan import Plan
from ..report.text import table
from ..runtime.progress import Progress, silent
from ..text import counted, printable
from . import progress
from .choices import Args
from .streams import say, show

FOLDED = 1000  # rows; rich takes half a second for so many


def print_result(args: Args, value: Mapping[str, Any], text: str) -> None:
    """The result of a command, as it was asked for."""
    show(json.dumps(finite(value)) if "json" in args else text)


def table_text(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """A table; on a terminal as wide as that, with long names folded, unless it is too long to be read there."""
    if not sys.stdout.isatty() or len(rows) > FOLDED:
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


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: what could not be measured is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def progress_of(args: Args) -> Progress:
    """A bar on a terminal, lines in a log, nothing if quiet."""
    if "quiet" in args:
        return silent
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return progress.lines
    from .bars import bars

    return bars


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
