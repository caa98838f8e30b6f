"""What each command does: choose settings, call the library, print the result."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import progress
from .choices import Args, make_plan, planned, recorded_sources, with_config
from .errors import StreamError, UsageError, problem_lines
from .files import own_folder, tree_bytes, write_json
from .names import bytes_shown, counted, listed, name_fault, shown
from .pipeline import Progress, default_workspace, silent
from .pipeline import compress as run_plan
from .planning import Plan, plan_as_json
from .report import facts, notes_text, plan_text, plan_warnings, summary_text, table
from .shareconfig import read_share_config
from .shareformat import ours_of
from .sources import resolve
from .workspace import Workspace, skipped_as_json

log = logging.getLogger(__name__)
SKIPPED = 3  # exit code: done, but adapters were left out


def plan(args: Args) -> int:
    """`plan`: print it, write it, and fail for what it already shows to be impossible."""
    chosen = with_config(args)
    made = make_plan(chosen, Path(chosen["workspace"]) if "workspace" in chosen else None)
    if "output" in args:
        write_json(Path(args["output"]), plan_as_json(made))
    fault = _fault(made)
    _print(args, plan_as_json(made) | ({"error": fault.problem} if fault else {}), plan_text(made))
    _say_left_out(made)
    if fault is not None:
        print(f"lorashare-stream: {fault}", file=sys.stderr)
        return fault.exit_code
    return SKIPPED if made.refused else 0


def _fault(made: Plan) -> StreamError | None:
    try:
        made.validate()
    except StreamError as e:
        return e
    return None


def compress(args: Args) -> int:
    """`compress`: run a plan, then print what came of it."""
    chosen = with_config(args)
    for flag in ("layer_by_layer", "chunk_size"):
        if flag in chosen:
            log.warning("--%s has no effect: adapters are always streamed", flag.replace("_", "-"))
    if "output" not in chosen:
        raise UsageError("no output", expected="-o OUT", remedy="Name the checkpoint's folder.")
    out = Path(chosen["output"])
    named = Path(chosen["workspace"]) if "workspace" in chosen else None
    workspace = named or default_workspace(out)
    made = planned(chosen, workspace) if "plan" in chosen else make_plan(chosen, workspace)
    made.validate()
    log.debug("%s", plan_text(made))
    before = ours_of(out)
    for note in plan_warnings(made):
        log.warning("%s", note)
    skipped = run_plan(made, out, workspace=named, overwrite=bool(chosen.get("overwrite")), progress=_progress(args))
    if before is not None:
        same = (ours_of(out) or {}).get("digest") == before.get("digest")
        log.info("%s %s", shown(out), "is up to date" if same else "has replaced the checkpoint that was there")
    told = {note for entry in made.entries for note in entry.layout.notes}
    for note in notes_text(Workspace(workspace).admissions(), told):
        log.info("%s", note)
    config = read_share_config(out)
    used = tree_bytes(workspace)
    result = {
        "checkpoint": str(out),
        "workspace": str(workspace),
        "workspace_bytes": used,
        "skipped": skipped_as_json(skipped),
        **_info(config),
    }
    drop = f"{bytes_shown(used)}, kept for growing and refitting; drop it by: rm -r {shlex.quote(shown(workspace))}"
    _print(args, result, f"{summary_text(config)}\n{facts([('workspace', drop)])}")
    if skipped:
        print(
            f"left out {counted(len(skipped), 'adapter')}; the reasons are in {shown(out / 'skipped.json')}:",
            file=sys.stderr,
        )
        print("\n".join(problem_lines(skipped)), file=sys.stderr)
    return SKIPPED if skipped else 0


def info(args: Args) -> int:
    """`info`: what a checkpoint says of itself."""
    config = read_share_config(Path(args["checkpoint"]))
    _print(args, _info(config), summary_text(config))
    return 0


def _info(config: Any) -> dict[str, Any]:
    stats = {k: v for k, v in config.compression_stats.items() if k != "lorashare_stream"}
    ours = {k: v for k, v in config.ours.items() if k != "groups"}
    return {**{k: v for k, v in config.to_dict().items() if k != "compression_stats"}, **stats, **ours}


def reconstruct(args: Args) -> int:
    """`reconstruct`: one adapter into DIR, several into DIR/NAME."""
    from .model import SHAREModel

    model, out = SHAREModel.from_pretrained(args["checkpoint"]), Path(args["output"])
    names = model.adapter_names if "all" in args else list(dict.fromkeys(args["adapter"]))
    unknown = [n for n in names if n not in model.all_loadings]
    if unknown:
        model.reconstruct(unknown[0])  # raises, naming what is near
    unsafe = [f"{shown(n)} ({fault})" for n in names if (fault := name_fault(n))]
    if unsafe and len(names) > 1:
        raise UsageError("names that cannot be folders", found=listed(unsafe), remedy="Reconstruct them one by one.")
    if out.exists() and not out.is_dir():
        raise UsageError("the output is no folder", found=out, remedy="Choose another.")
    out.mkdir(parents=True, exist_ok=True)
    folders = {name: own_folder(out / name) if len(names) > 1 else out for name in names}
    for name in _progress(args)("reconstruct", len(names), iter(names)):
        model.reconstruct(name, output_dir=folders[name])
    _print(
        args,
        {"reconstructed": {n: str(f) for n, f in folders.items()}},
        f"{counted(len(names), 'adapter')} in {shown(out)}",
    )
    return 0


def verify(args: Args) -> int:
    """`verify`: measured errors, worst first; fails if one is not as certified, or an original is missing."""
    from .model import SHAREModel
    from .verification import originals_of
    from .verification import verify as verdicts_of

    root = Path(args["checkpoint"])
    model = SHAREModel.from_pretrained(root)
    beside = default_workspace(root.absolute())
    if "sources" in args:
        sources = resolve(args["sources"])
    elif (beside / "plan.json").exists():
        sources = recorded_sources(beside)
    else:
        raise UsageError("no originals to compare with", found=f"no {shown(beside)}", remedy="Name them by --sources.")
    verdicts = list(
        _progress(args)("verify", len(model.adapter_names), verdicts_of(model, originals_of(model, sources)))
    )
    verdicts.sort(key=lambda v: (v.problem is None, -v.relative_error if v.relative_error >= 0 else 0, v.name))
    bad = [v for v in verdicts if v.problem is not None]
    measured = [v.relative_error for v in verdicts if v.worst_module is not None]  # not of what is kept exact
    mean = sum(measured) / len(measured) if measured else None
    rows = [
        (
            v.name,
            _figure(v.relative_error),
            _figure(v.certified),
            _figure(v.worst_module_error if v.worst_module else None),
            v.worst_module or "-",
        )
        for v in verdicts
    ]
    text = table(rows, ("adapter", "dW error", "certified", "at worst", "in module"))
    text += f"\nmean dW error {mean:.6f} of {counted(len(measured), 'compressed adapter')}" if mean is not None else ""
    _print(args, {"mean": mean, "failed": len(bad), "adapters": [asdict(v) for v in verdicts]}, text)
    for problem in dict.fromkeys(v.problem for v in bad):
        names = [v.name for v in bad if v.problem == problem]
        print(f"FAILED {listed(names)}: {shown(problem, 2000)}", file=sys.stderr)
    return 1 if bad else 0


def _figure(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.6f}"


# -- output ------------------------------------------------------------------------------------------


def _print(args: Args, value: Mapping[str, Any], text: str) -> None:
    print(json.dumps(_finite(value)) if "json" in args else text)


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: what could not be measured is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _progress(args: Args) -> Progress:
    if "quiet" in args:
        return silent
    return progress.bars if sys.stderr.isatty() else progress.lines


def _say_left_out(made: Plan) -> None:
    if made.refused and made.settings.on_error == "skip":
        print(f"{counted(len(made.refused), 'adapter')} will be left out:", file=sys.stderr)
        print("\n".join(problem_lines(made.refused)), file=sys.stderr)
