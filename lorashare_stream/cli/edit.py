"""The commands that change a checkpoint: `add`, `remove`, `refit`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.config import SHAREConfig, read_share_config, record_of
from ..checkpoint.format import ADAPTERS, total_bytes
from ..edits import add as adding
from ..edits import refit as refitting
from ..edits import remove as shrinking
from ..edits.options import RunOptions, opened
from ..edits.remove import Removed
from ..errors import StreamError, skipped_as_json
from ..files import tree_bytes
from ..report.text import rows_text, summary_text
from ..settings import SIZES, TYPES
from ..text import bytes_shown, counted, listed, printable
from .choices import Args, cluster_of, named_sources, names_meant, with_workers
from .output import SKIPPED, print_result, progress_of, say_error, say_left_out

log = logging.getLogger(__name__)
_ASKED = (*SIZES, "directions")  # of a refit


@contextmanager
def _run_options(args: Args) -> Iterator[RunOptions]:
    own = TYPES.keys() - {*_ASKED}
    with cluster_of(args) as cluster:
        yield RunOptions(
            workspace=Path(args["workspace"]) if "workspace" in args else None,
            changes={k: v for k, v in with_workers(args, cluster).items() if k in own},
            accept=args.get("accept"),
            executor=cluster,
            take_lock="take_lock" in args,
            progress=progress_of(args),
        )


def add(args: Args) -> int:
    """`add`: adapters into a checkpoint."""
    out, config = opened(Path(args["checkpoint"]))
    before, bytes_before = set(config.adapter_names), total_bytes(record_of(config).bytes)
    sources = named_sources(args, skipping=args.get("on_error") == "skip")
    with _run_options(args) as options:
        outcome = adding.add(out, sources, options)
    config = read_share_config(out)
    tried = list(outcome.kept.items())[:20]
    added = [name for name in config.adapter_names if name not in before]
    how, again = "on the bases that were there", "bases were fitted again, and all adapters projected on them"
    size = sum(tree_bytes(out / ADAPTERS / name) for name in added)
    if config.coded:
        how = "coded on the directions that were there" if "basis" in record_of(config).bytes else "coded alone"
        again = "all adapters were coded again, since the limit did not hold the new ones"
        size = total_bytes(record_of(config).bytes) - bytes_before
    text = {
        "current": "nothing to add" + ("" if outcome.skipped else ": the checkpoint has these adapters"),
        "projection": f"added {listed(added)}{', ' if config.coded else ' '}{how}, for {bytes_shown(size)}"
        if added
        else "nothing to add",
        "recompute": f"added {listed(added)}; {again}",
    }[outcome.method]
    kept = [(name, f"keeps {share:.4f} of its dW energy on the bases that were there") for name, share in tried]
    result: dict[str, Any] = {"added": added, "method": outcome.method, "kept": outcome.kept}
    result["skipped"] = skipped_as_json(outcome.skipped)
    print_result(args, result, "\n".join([text, *([rows_text(kept)] if kept else [])]))
    say_left_out(outcome.skipped, out)
    return SKIPPED if outcome.skipped else 0


def remove(args: Args) -> int:
    """`remove`: adapters out of a checkpoint; fails if their trace was to go, and could not."""
    out = Path(args["checkpoint"])
    config = opened(out)[1]
    names = names_meant(args.get("adapters", ()), config.adapter_names)
    with _run_options(args) as options:
        done = shrinking.remove(out, names, options, refit="refit" in args)
    left = sorted({*done.in_bases, *(done.in_moments or {})})
    result = {
        "removed": list(done.names),
        "removed_before": list(done.before),
        "in_bases": list(done.in_bases),
        "in_moments": done.in_moments,
        "absent": list(done.absent),
    }
    freed = _freed(config, done) if "refit" in args else []
    told = [f"took out {listed(done.names) or 'nothing more'}"] if done.names or not freed else []
    told += [f"fitted {'directions' if done.coded else 'bases'} again, without {listed(freed)}"] if freed else []
    told += [f"taken out before: {listed(done.before)}"] if done.before else []
    print_result(args, result, "\n".join([*told, *_traces(done, "refit" in args)]))
    if "refit" not in args or not left:
        return 0
    fault = StreamError(
        "adapters were taken out, but their trace could not be",
        found=listed(left),
        remedy=f"Restore the sources of {listed(done.absent) or 'others'}, or take them out too, and run it again.",
    )
    say_error(fault)
    return fault.exit_code


def _freed(config: SHAREConfig, done: Removed) -> list[str]:
    """Adapters whose trace went with bases, or directions, that were fitted again."""
    before = record_of(config)
    if done.coded and not before.settings.directions:
        return []
    fitted = {*config.adapter_names} - {*before.projected, *before.verbatim_adapters}
    held = {*before.removed, *(fitted & {*done.names})}
    return sorted(held - {*done.in_bases})


def _traces(done: Removed, refit: bool) -> list[str]:
    """Traces of the adapters that were taken out, in words."""
    if done.coded and done.in_bases:
        trace = f"directions were fitted to {listed(done.in_bases)} too, and still contain their trace; "
        if done.in_moments is None:
            return [f"{trace}there is no workspace here, from which to fit them anew"]
        return [f"{trace}lorashare-stream refit CHECKPOINT -o CHECKPOINT fits them anew"]
    if done.coded and done.in_moments is None:
        return ["nothing of them is left in the checkpoint; there is no workspace here, whose journal would name them"]
    if done.coded:
        return ["nothing of them is left in the checkpoint; the workspace's journal keeps their names and digests"]
    lines = []
    if done.in_bases:
        lines.append(f"the bases were fitted to {listed(done.in_bases)} too, and still contain their trace")
    if done.in_moments:
        most = [f"{name} ({counted(n, 'module')})" for name, n in sorted(done.in_moments.items())]
        lines.append(f"the moments in the workspace still contain {listed(most)}")
    if done.in_moments is None:
        lines.append("there is no workspace: moments kept elsewhere still contain them")
    if not done.in_bases and not done.in_moments:
        lines.append("neither the bases nor the moments that are here contain them")
    elif not refit and done.in_moments is not None:
        lines.append("remove --refit computes moments and bases anew from the sources of the others")
    return lines


def refit(args: Args) -> int:
    """`refit`: another k or limit, or bases anew."""
    asked = {name: args[name] for name in _ASKED if name in args}
    out = Path(args["output"])
    with _run_options(args) as options:
        method = refitting.refit(Path(args["place"]), asked, out, options, overwrite="overwrite" in args)
    config = read_share_config(out)
    note = {
        "sliced": "cut from what was stored; errors follow from those of the larger k, and are not measured",
        "recompute": "all adapters coded from their sources"
        if config.coded
        else "bases fitted, and all adapters projected from their sources",
        "projection": "what was coded so stays; the rest was coded from the sources",
        "current": "nothing to do",
    }[method]
    log.info("%s: %s", printable(out), note)
    if record_of(config).removed:
        what = "directions" if config.coded else "bases"
        log.warning("removed adapters are in the %s until remove --refit frees them", what)
    result: dict[str, Any] = {"checkpoint": str(out), "method": method, "k": config.num_components}
    print_result(args, result, summary_text(config))
    return 0
