"""The commands that ask the Hub for more than adapters: `discover`, `push`."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from ..checkpoint.publish import demand_folder
from ..errors import AdapterError, UsageError, problem_lines
from ..hub.discover import discover as listed_by_hub
from ..hub.discover import write_manifest
from ..text import bytes_shown, counted, listed, printable
from .choices import Args
from .output import print_result, progress_of, say


def discover(args: Args) -> int:
    """`discover`: a manifest of the adapters of a base model."""
    out = Path(args["output"])
    if out.suffix != ".jsonl":
        raise UsageError("a discovered manifest is a .jsonl file", found=out, expected="a name that ends in .jsonl")
    for name, least in (("limit", 1), ("min_downloads", 0)):
        if args.get(name, least) < least:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} cannot be {args[name]}", expected=f"a whole number from {least}")
    base, aliases = args["base_model"], args.get("base_aliases", [])
    if not out.absolute().parent.is_dir():
        raise UsageError("no folder for the manifest", found=out.parent, remedy="Make it, or name another.")
    items, left_out = listed_by_hub(
        [base, *aliases],
        author=args.get("author"),
        search=args.get("search"),
        limit=args.get("limit"),
        min_downloads=args.get("min_downloads", 0),
        offline=bool(args.get("offline")),
    )
    write_manifest(out, items)
    if left_out:
        say(f"left out {counted(len(left_out), 'adapter')} that the Hub lists:")
        say("\n".join(problem_lines(AdapterError(item["reason"], adapter=item["repo"]) for item in left_out)))
    size = sum({item["repo"]: item.get("size") or 0 for item in items}.values())
    gated = sum(bool(item.get("gated")) for item in items)
    others = Counter(item["base_model"] for item in items if item["base_model"] not in (base, *aliases))
    names = f"--base-model {shlex.quote(printable(base))}"
    names += f" --base-alias {' '.join(shlex.quote(printable(a)) for a in aliases)}" if aliases else ""
    text = f"{counted(len(items), 'adapter')} in {printable(out)}, in repositories of {bytes_shown(size)}"
    text += f"; {gated} gated" if gated else ""
    if others:
        some = listed(f"{name} by {n}" for name, n in others.most_common(5))
        text += f"\nOther names of the base, which compress takes for other models unless --base-alias has them: {some}"
    skip = " --on-error skip" if gated or others else ""
    text += f"\nCompress them: lorashare-stream compress {shlex.quote(printable(out))} -o OUT {names}{skip}"
    print_result(args, {"manifest": str(out), "adapters": len(items), "left_out": left_out}, text)
    return 0


def push(args: Args) -> int:
    """`push`: a checkpoint to the Hub; run again, it goes on where it was."""
    from ..hub.push import push as pushed_to

    demand_folder(Path(args["checkpoint"]))
    done = pushed_to(
        Path(args["checkpoint"]),
        args["repo_id"],
        private=False if "public" in args else args.get("private"),
        commit_message=args.get("message"),
        revision=args.get("revision"),
        create_pr="create_pr" in args,
        overwrite="overwrite" in args,
        progress=progress_of(args),
    )
    to = f" at {printable(args['revision'])}" if "revision" in args else ""
    text = f"pushed to {done.repo}{to} ({'private' if done.private else 'public'}): {printable(done.url)}"
    text += f"\n{counted(done.files, 'file')} uploaded, {done.deleted} deleted, {done.present} there already"
    text += "" if done.files or done.deleted else ": nothing had changed"
    result = {"repo": done.repo, "url": done.url, "revision": done.revision, "uploaded": done.files}
    print_result(args, {**result, "deleted": done.deleted, "present": done.present, "private": done.private}, text)
    return 0
