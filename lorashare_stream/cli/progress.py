"""Progress in a job's log: a line every so often on stderr. Bars on a terminal are in `bars`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

from ..text import counted
from .streams import say

T = TypeVar("T")
EVERY = 15.0  # seconds between lines
_UNITS = {"push": "file", **dict.fromkeys(("analyse", "accumulate", "fit"), "module")}  # others count adapters


def unit_of(step: str) -> str:
    """What a step counts."""
    return _UNITS.get(step, "adapter")


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
            say(f"{step}: {done} of {counted(total, unit_of(step))}, {rate:.2f}/s, {left} left")
    if done:
        say(f"{step}: {counted(done, unit_of(step))} in {_clock(time.monotonic() - begun)}")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )
