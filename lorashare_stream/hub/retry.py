"""Waiting for the Hub: rate limits, errors of the server, and connections that fail are waited out, with a cap."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ..errors import AdapterError, StreamError, UnreachableError
from ..text import printable
from .errors import CUT_SHORT, passing, permanent

T = TypeVar("T")
PATIENCE = 15 * 60.0  # seconds of waiting for one answer, outages of some minutes included
ANSWER = 120.0  # seconds of a request that failed which count as waiting: one that took longer had an answer
LONGEST = 330.0  # seconds waited at once: the Hub counts requests in windows of 5 minutes
UNHEARD = 60.0  # of the first answer to what may be a mistyped path
FIRST_PAUSE = 1.0  # seconds; doubled each time, up to a minute
MOST_CUTS = 4  # of a transfer that ends too early, by what was announced
SAY_EVERY = 60.0  # seconds
log = logging.getLogger(__name__)

_heard = [0.0]  # when the Hub has last answered
_said: dict[str, float] = {}  # when which kind of message was last given
_SAY = threading.Lock()


def retry(
    call: Callable[[], T], what: str, stopped: threading.Event, *, offline: bool = False, most: float | None = None
) -> T:
    """The result of a request; what may pass is waited out.

    Args:
        call: makes the request.
        what: it is for, in messages.
        stopped: set when a run ends, so that nobody waits on.
        offline: whether a missing file is no fault of the Hub.
        most: seconds of waiting, requests that fail included; those of `PATIENCE` if None.

    Raises:
        AdapterError: if it cannot be had, whenever it is asked for; or fails again and again while others are answered.
        UnreachableError: if the Hub did not answer for so long.
    """
    most = PATIENCE if most is None else most
    pause, waited, begun, cuts = FIRST_PAUSE, 0.0, time.monotonic(), 0
    while True:
        asked = time.monotonic()
        try:
            result = call()
        except Exception as e:
            took = min(ANSWER, time.monotonic() - asked)
            why, told = passing(e)
            if why is None:
                error = permanent(e, what, offline=offline)
                if error is e:
                    raise
                raise error from e
            cuts += why == CUT_SHORT
            waited += took
            left = most - waited - took  # another request takes as long
            seconds = min(pause, left) if told is None else min(LONGEST, told)
            if cuts >= MOST_CUTS or not FIRST_PAUSE <= seconds <= left:
                others = cuts >= MOST_CUTS or _heard[0] > begun + waited / 2
                raise _given_up(why, what, waited, others=others) from e
        else:
            _heard[0] = time.monotonic()
            if waited:
                _say_once(f"the Hub answers again ({what})", "answers")
            return result
        _say_once(f"the Hub: {why}; waiting, {most / 60:.0f} min at most; what is done is kept ({what})", "waiting")
        if stopped.wait(seconds):
            raise UnreachableError("stopped while waiting for the Hub", found=why)
        waited, pause = waited + seconds, min(2 * pause, 60.0)


def unheard() -> float | None:
    """The patience for what somebody waits for before the terminal, if nothing was heard of the Hub yet."""
    return None if _heard[0] else UNHEARD


def _given_up(why: str, what: str, waited: float, *, others: bool) -> StreamError:
    """The error for what was waited for in vain; `others` if the Hub has answered other requests meanwhile."""
    if others and "429" not in why:
        return AdapterError(
            f"the Hub fails for it, and not for others: {why}", found=f"{what}, for {waited:.0f} s",
            remedy="Run the same command again another day, or leave it out.",
        )  # fmt: skip
    return UnreachableError(
        "the Hub cannot be reached", found=f"{why}, for {waited:.0f} s",
        remedy="What is done is kept: run the same command again when it can be.",
    )  # fmt: skip


def _say_once(text: str, kind: str) -> None:
    """Of the many requests that wait for the same, one says so, once a minute; and one that it is over."""
    with _SAY:
        now = time.monotonic()
        if kind == "answers":
            if "waiting" not in _said:
                return
            _said.clear()
        elif now - _said.get(kind, -SAY_EVERY) < SAY_EVERY:
            return
        else:
            _said[kind] = now
        log.warning("%s", printable(text))
