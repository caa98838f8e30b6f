"""The command line: arguments, exit codes, signals. What the commands do is in `commands`.

Exit codes: 0 done; 1 permanent error; 2 usage; 3 done, but some adapters were left out;
75 stopped, and a rerun may help (signal, full disk, lost network).
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from .errors import Stopped, StreamError, UsageError
from .names import shown
from .version import __version__

_RERUN_HELPS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENFILE, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ETIMEDOUT,
}  # fmt: skip
_REMEDIES = {errno.EMFILE: "Raise the limit, by ulimit -n, or use fewer --workers."}
_EPILOG = "Exit codes: 0 done, 1 permanent error, 2 usage, 3 done but adapters were left out, 75 stopped: run it again."


class Parser(argparse.ArgumentParser):
    """Shows foreign arguments escaped."""

    def error(self, message: str) -> NoReturn:
        """Print usage and a message, and exit with 2."""
        super().error(shown(message, 1000))


def parser() -> argparse.ArgumentParser:
    """All commands and their options. Options that were not given are absent from the result."""
    top = Parser(prog="lorashare-stream", epilog=_EPILOG)
    top.description = "Compress thousands of LoRA adapters of one base model into a SHARE checkpoint."
    top.add_argument("--version", action="version", version=f"lorashare-stream {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else")
        loud = p.add_mutually_exclusive_group()
        loud.add_argument(
            "-q", "--quiet", action="store_true", help="no progress and no notes; results, warnings and errors remain"
        )
        loud.add_argument("-v", "--verbose", action="store_true", help="say more")
        return p

    p = command("plan", "Read headers only: what will be read, computed and written, and what is refused.")
    _add_sources(p)
    p.add_argument("-o", "--output", metavar="PLAN.json", help="write the plan, for compress --plan")
    p = command("compress", "Compress adapters into a SHARE checkpoint. The same command again goes on where it was.")
    _add_sources(p)
    p.add_argument("-o", "--output", metavar="OUT", help="the checkpoint's folder")
    p.add_argument("--plan", metavar="PLAN.json", help="run this plan")
    p.add_argument("--overwrite", action=argparse.BooleanOptionalAction, help="replace a checkpoint of another run")
    p.add_argument("--layer-by-layer", action="store_true", help="no effect: adapters are always streamed")
    p.add_argument("--chunk-size", type=int, metavar="N", help="no effect: adapters are always streamed")
    p.add_argument("--discard-moments", action="store_true", help="free moments as soon as bases are fitted: less disk")
    _add_lock(p)
    _add_edits(command)
    _add_readers(command)
    return top


def _add_edits(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    p = command("add", "Add adapters to a checkpoint: on its bases if these hold them well enough, else on new ones.")
    p.add_argument("checkpoint")
    p.add_argument("sources", nargs="+", metavar="SOURCE", help="as for compress")
    p.add_argument("--names", nargs="+", metavar="NAME", help="names of the sources, which are then adapter folders")
    p.add_argument(
        "--variance", type=float, metavar="T", dest="accept",
        help="share of an adapter's dW energy that the bases must keep, else all are fitted again (0.95)",
    )  # fmt: skip
    _add_on_error(p)
    _add_base(p)
    _add_means(p)
    p = command("remove", "Take adapters out of a checkpoint, and say where their trace is left.")
    p.add_argument("checkpoint")
    p.add_argument("adapters", nargs="*", metavar="NAME", help="none is for --refit of what was taken out before")
    p.add_argument("--refit", action="store_true", help="compute moments and bases anew without them")
    _add_means(p)
    p = command("refit", "Another k from the same moments; or bases for all that was added and taken out since.")
    p.add_argument("place", metavar="CHECKPOINT|WORKSPACE")
    p.add_argument("-k", "--num-components", metavar="K", help="components per group, or auto (default: as it was)")
    p.add_argument(
        "--variance", type=float, metavar="T", dest="variance_threshold", help="share that auto keeps (0.95)"
    )
    p.add_argument("-o", "--output", metavar="OUT", required=True, help="the new checkpoint; may be the old one")
    p.add_argument("--overwrite", action="store_true", help="replace a checkpoint of another run")
    p.add_argument("--discard-moments", action="store_true", help="free moments as soon as bases are fitted: less disk")
    _add_means(p)


def _add_readers(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    p = command("info", "What a checkpoint holds, how large it is, how far off.")
    p.add_argument("checkpoint")
    p = command("reconstruct", "Write adapters of a checkpoint as PEFT adapter folders.")
    p.add_argument("checkpoint")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--adapter", nargs="+", metavar="NAME", help="one adapter is written into DIR, several into DIR/NAME"
    )
    which.add_argument("--all", action="store_true", help="all adapters")
    p.add_argument("-o", "--output", metavar="DIR", required=True)
    p = command("verify", "Measure errors against the originals, per adapter, worst first.")
    p.add_argument("checkpoint")
    p.add_argument(
        "--sources", nargs="+", metavar="SOURCE", help="the originals; else those of the workspace beside it"
    )


def _add_sources(p: argparse.ArgumentParser) -> None:
    p.add_argument("sources", nargs="*", metavar="SOURCE", help="adapter folder, folder of them, glob, or manifest")
    p.add_argument("--names", nargs="+", metavar="NAME", help="names of the sources, which are then adapter folders")
    p.add_argument("-k", "--num-components", metavar="K", help="components per group, or auto (default: 32)")
    p.add_argument(
        "--variance", type=float, metavar="T", dest="variance_threshold", help="share that auto keeps (0.95)"
    )
    p.add_argument("--objective", help="delta: least error of dW (default); factors: A and B on their own")
    p.add_argument(
        "--center",
        action=argparse.BooleanOptionalAction,
        help="subtract the mean, as the published method does; factors only",
    )
    p.add_argument("--moment-dtype", help="float32 (default) or float64")
    _add_resources(p)
    _add_on_error(p)
    p.add_argument("--dtype", help="of what is stored: auto (default), float32, bfloat16, float16")
    p.add_argument("--base-model", metavar="ID", help="what the adapters are adapters of (default: what most name)")
    _add_base(p)
    p.add_argument(
        "--share-initial",
        action=argparse.BooleanOptionalAction,
        help="compress adapters whose factors hold a part of the base (PiSSA, OLoRA, ...), else kept exact",
    )
    p.add_argument("--config", metavar="FILE.yaml", help="the same settings from a file; flags win")


def _add_on_error(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--on-error",
        help="raise (default), or skip: go on without adapters that cannot be compressed, or are not there",
    )


def _add_base(p: argparse.ArgumentParser) -> None:
    p.add_argument("--base-alias", nargs="+", metavar="ID", dest="base_aliases", help="other names of the base model")
    p.add_argument("--any-base", action=argparse.BooleanOptionalAction, help="accept adapters that name any base model")


def _add_resources(p: argparse.ArgumentParser) -> None:
    p.add_argument("--workspace", metavar="DIR", help="folder of resumable state (default: beside the checkpoint)")
    p.add_argument("--memory", metavar="SIZE", help="what the process may use (default: 4GiB)")
    p.add_argument("--workers", type=int, metavar="N", help="tasks at a time (default: one per core)")
    p.add_argument("--device", help="auto (default), cpu or cuda")


def _add_lock(p: argparse.ArgumentParser) -> None:
    p.add_argument("--take-lock", action="store_true", help="take over the lock of another host, known to be dead")


def _add_means(p: argparse.ArgumentParser) -> None:
    _add_resources(p)
    _add_lock(p)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        return _run(argv)
    except BrokenPipeError:  # the reader of our output has gone, before the work was done perhaps
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        return Stopped.exit_code


def _run(argv: list[str] | None) -> int:
    args = vars(parser().parse_args(argv))
    level = logging.WARNING if args.get("quiet") else logging.DEBUG if args.get("verbose") else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("lorashare_stream").setLevel(level)
    before = {number: signal.signal(number, partial(_stop, args)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _dispatch(args)
    except StreamError as e:
        return _failed(args, e, e.exit_code)
    except BrokenPipeError:
        raise
    except OSError as e:
        return _failed(args, *_of_the_machine(e))
    except MemoryError:
        error = StreamError(
            "the machine ran out of memory", remedy="Give --memory what is really free, or fewer --workers."
        )
        return _failed(args, error, 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _dispatch(args: dict[str, Any]) -> int:
    from . import commands, edits

    module = edits if args["command"] in edits.COMMANDS else commands
    return int(getattr(module, args["command"])(args))


def _stop(args: dict[str, Any], number: int, frame: FrameType | None) -> NoReturn:
    """End the process at once, as a kill would: what is on disk is whole, and a task may run for minutes yet."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    error = Stopped(f"stopped by {name}", remedy="What is done is kept: run the same command again, and it goes on.")
    with suppress(OSError):  # a reader that has gone
        if args.get("json"):
            os.write(1, f"{_as_json(error, Stopped.exit_code)}\n".encode())
        os.write(2, f"\nlorashare-stream: {error}\n".encode())
    locks = sys.modules.get("lorashare_stream.locks")  # not loaded, it holds none
    if locks is not None:
        locks.let_go()
    os._exit(Stopped.exit_code)


def _of_the_machine(e: OSError) -> tuple[StreamError, int]:
    where = f" {shown(e.filename)}" if e.filename else ""
    text = f"{e.strerror or e}:{where}" if where else str(e.strerror or e)
    if e.errno in _RERUN_HELPS or isinstance(e, ConnectionError):
        return Stopped(text, remedy="Mend that, and run the same command again: what is done is kept."), 75
    remedy = _REMEDIES.get(e.errno or 0, "Mend that, and run the same command again.")
    return StreamError(text, remedy=f"{remedy} What was done is kept."), 1


def _failed(args: dict[str, Any], error: StreamError, code: int) -> int:
    if args.get("json"):
        print(_as_json(error, code))
    print(f"lorashare-stream: {error}", file=sys.stderr)
    if isinstance(error, UsageError):
        print(f"Try: lorashare-stream {args['command']} --help", file=sys.stderr)
    return code


def _as_json(error: StreamError, code: int) -> str:
    problems = [str(p) for p in getattr(error, "problems", ())]
    details = {"problem": error.problem, **error.details()} | ({"problems": problems} if problems else {})
    return json.dumps({"error": details, "exit_code": code})
