"""The commands that ask the Hub for more than adapters: `discover`, `push`."""

from __future__ import annotations

import logging
import shlex
import sys
from collections import Counter
from pathlib import Path

from .choices import Args
from .discovery import discover as listed_by_hub
from .discovery import write_manifest
from .errors import UsageError
from .names import bytes_shown, counted, shown
from .output import print_result, progress_of
from .sources.manifest import SUFFIXES

COMMANDS = {"discover", "push"}
log = logging.getLogger(__name__)


def discover(args: Args) -> int:
    """`discover`: a manifest of the adapters of a base model."""
    out = Path(args["output"])
    if out.suffix != ".jsonl":
        raise UsageError("a manifest is a .jsonl file", found=out, expected=f"one of {', '.join(SUFFIXES)}: .jsonl")
    for name in ("limit", "min_downloads"):
        if args.get(name, 1) < (1 if name == "limit" else 0):
            raise UsageError(f"--{name.replace('_', '-')} cannot be {args[name]}", expected="a whole number from 1")
    base, aliases = args["base_model"], args.get("base_aliases", [])
    found = listed_by_hub(
        [base, *aliases],
        author=args.get("author"),
        search=args.get("search"),
        limit=args.get("limit"),
        min_downloads=args.get("min_downloads", 0),
        offline=bool(args.get("offline")),
    )
    write_manifest(out, found.items)
    reasons = Counter(reason for _, reason in found.left_out)
    for reason, number in reasons.most_common(8):
        print(f"left out {counted(number, 'repository').replace('ys', 'ies')}: {shown(reason)}", file=sys.stderr)
    size = sum(item.get("size") or 0 for item in found.items)
    gated = sum(bool(item["gated"]) for item in found.items)
    names = f"--base-model {shlex.quote(shown(base))}"
    names += f" --base-alias {' '.join(shlex.quote(shown(a)) for a in aliases)}" if aliases else ""
    text = f"{counted(len(found.items), 'adapter')} in {shown(out)}, in repositories of {bytes_shown(size)}"
    text += f"; {gated} gated" if gated else ""
    text += f"\nCompress them: lorashare-stream compress {shlex.quote(shown(out))} -o OUT {names}"
    left_out = [{"repo": repo, "reason": reason} for repo, reason in found.left_out]
    print_result(args, {"manifest": str(out), "adapters": len(found.items), "left_out": left_out}, text)
    return 0


def push(args: Args) -> int:
    """`push`: a checkpoint to the Hub; run again, it goes on where it was."""
    from .pushing import push as pushed_to

    done = pushed_to(
        Path(args["checkpoint"]),
        args["repo_id"],
        private=args.get("private"),
        commit_message=args.get("message"),
        revision=args.get("revision"),
        create_pr="create_pr" in args,
        progress=progress_of(args),
    )
    text = f"{shown(done.url)}\n{counted(done.files, 'file')} uploaded, {done.present} there already"
    text += "; the repository is private" if done.private else ""
    result = {"repo": done.repo, "url": done.url, "revision": done.revision, "uploaded": done.files}
    print_result(args, {**result, "present": done.present, "private": done.private}, text)
    return 0
