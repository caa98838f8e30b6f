"""Progress on stderr: bars on a terminal, a line every so often in a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TypeVar

from ..text import counted
from .streams import say

T = TypeVar("T")
EVERY = 15.0  # seconds between lines
_UNITS = {
    "look": "adapter",
    "push": "file",
    "ingest": "adapter",
    "analyse": "module",
    "accumulate": "module",
    "fit": "module",
    "project": "adapter",
    "verify": "adapter",
    "reconstruct": "adapter",
}


def bars(step: str, total: int, results: Iterator[T]) -> Iterator[T]:
    """A bar with rate and time left."""
    from tqdm import tqdm

    if not total:
        yield from results
        return
    tqdm.monitor_interval = 0  # no thread that watches bars: what has other threads is not forked
    yield from tqdm(results, desc=f"{step:10}", total=total, unit=_UNITS.get(step, "adapter"), file=sys.stderr)


def lines(step: str, total: int, results: Iterator[T]) -> Iterator[T]:
    """A line every 15 seconds, and one at the end of the step."""
    begun = said = time.monotonic()
    done = 0
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - said >= EVERY and done < total:
            said, rate = now, done / (now - begun)
            left = _clock((total - done) / rate)
            say(f"{step}: {done} of {counted(total, _UNITS.get(step, 'adapter'))}, {rate:.2f}/s, {left} left")
    if done:
        say(f"{step}: {counted(done, _UNITS.get(step, 'adapter'))} in {_clock(time.monotonic() - begun)}")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )
