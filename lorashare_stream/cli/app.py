"""The command line: exit codes and signals. What a command does is in the module that `options` names.

Exit codes: 0 done; 1 permanent error; 2 usage; 3 done, but some adapters were left out;
75 stopped, and a rerun may help (signal, full disk, lost network).
"""

from __future__ import annotations

import atexit
import errno
import gc
import json
import logging
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

from ..errors import Stopped, StreamError, UsageError
from ..text import in_shell, printable
from .options import MODULES, PROGRAM, parsed
from .output import discard, open_streams, say, say_error, show

_RERUN_HELPS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENFILE, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ETIMEDOUT,
}  # fmt: skip
_REMEDIES = {errno.EMFILE: "Raise the limit, by ulimit -n, or use fewer --workers."}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    open_streams()
    try:
        with in_shell():
            code = _run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # the reader of our output has gone, before the work was done perhaps
        discard(sys.stdout)
        discard(sys.stderr)
        return Stopped.exit_code
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard(stream)
    return code


def _run(words: list[str]) -> int:
    args: dict[str, Any] = {"command": words[0]} if words and words[0] in MODULES else {}
    args |= {"json": True} if "--json" in words else {}
    before: dict[int, Any] = {}
    try:
        found = parsed(words)
        if isinstance(found, int):
            return found
        args = found
        level = logging.WARNING if args.get("quiet") else logging.DEBUG if args.get("verbose") else logging.INFO
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Notes()])
        logging.getLogger("lorashare_stream").setLevel(level)
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what it warns of is waited out, and said once
        if (encoding := sys.getfilesystemencoding()) != "utf-8":
            note = "this locale has names of files in %s: with others a checkpoint looks damaged; set PYTHONUTF8=1"
            logging.getLogger("lorashare_stream").warning(note, encoding)
        before = {number: signal.signal(number, partial(_stop, args)) for number in (signal.SIGTERM, signal.SIGINT)}
        return _dispatch(args)
    except BrokenPipeError:
        raise
    except (StreamError, OSError, UnicodeEncodeError, MemoryError) as e:
        return _failed(args, _error_of(e))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Notes(logging.Handler):
    """Writes where stderr is now: above a bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def _dispatch(args: dict[str, Any]) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tasks are parallel: threads of BLAS would only wait, and spin
    gc.disable()  # it would look through what is imported again and again, a tenth of the time, and find nothing
    module = import_module(f".{MODULES[args['command']]}", __package__)
    gc.enable()
    atexit.register(gc.freeze)  # what is left goes with the process: the interpreter would look through all of it first
    return int(getattr(module, args["command"])(args))


def _stop(args: dict[str, Any], number: int, frame: FrameType | None) -> NoReturn:
    """End the process at once, as a kill would: what is on disk is whole, and a task may run for minutes yet."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    error = Stopped(f"stopped by {name}", remedy="What is done is kept: run the same command again, and it goes on.")
    with suppress(OSError):  # a reader that has gone
        if args.get("json"):
            os.write(1, f"{_as_json(error)}\n".encode())
        os.write(2, f"\nlorashare-stream: {error}\n".encode())
    lock = sys.modules.get("lorashare_stream.workspace.lock")  # not loaded, it holds nothing
    if lock is not None:
        lock.let_go()
    os._exit(Stopped.exit_code)


def _error_of(e: Exception) -> StreamError:
    """An error of the machine as one of ours, with a remedy."""
    if isinstance(e, StreamError):
        return e
    if isinstance(e, MemoryError):
        remedy = "Give --memory what is really free, or fewer --workers."
        return StreamError("the machine ran out of memory", remedy=remedy)
    if isinstance(e, UnicodeEncodeError):  # of the name of a file, under a locale that is not that of its names
        return StreamError(
            "a name that no file can have under this locale", found=e.object, expected=f"characters of {e.encoding}",
            remedy="Run the same command again with PYTHONUTF8=1, or under a UTF-8 locale. What was done is kept.",
        )  # fmt: skip
    number, text, name = (getattr(e, part, None) for part in ("errno", "strerror", "filename"))
    text = f"{text or e}: {printable(name)}" if name else str(text or e)
    if number in _RERUN_HELPS or isinstance(e, ConnectionError):
        return Stopped(text, remedy="Mend that, and run the same command again: what is done is kept.")
    remedy = _REMEDIES.get(number or 0, "Mend that, and run the same command again.")
    return StreamError(text, remedy=f"{remedy} What was done is kept.")


def _failed(args: dict[str, Any], error: StreamError) -> int:
    if args.get("json"):
        with suppress(OSError):  # it may be stdout that failed
            show(_as_json(error))
    say_error(error)
    if isinstance(error, UsageError):
        say(f"Try: {PROGRAM} {args['command']} --help" if "command" in args else f"Try: {PROGRAM} --help")
    return error.exit_code


def _as_json(error: StreamError) -> str:
    problems = [str(p) for p in getattr(error, "problems", ())]
    details = {"problem": error.problem, **error.details()} | ({"problems": problems} if problems else {})
    return json.dumps({"error": details, "exit_code": error.exit_code})
