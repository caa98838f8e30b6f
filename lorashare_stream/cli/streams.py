"""The standard streams, which may be closed, full, unread, or of an encoding that cannot hold a name."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from ..errors import TOLD, CollectionError, StreamError
from ..text import encodable


def open_streams() -> None:
    """Open those that are closed: else the next file that is opened takes their numbers, and what is printed."""
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
