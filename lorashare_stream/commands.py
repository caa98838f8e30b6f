"""What each command does: choose settings, call the library, print the result."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from . import progress
from .errors import AdapterError, StreamError, UsageError
from .files import own_folder, read_json, tree_bytes, write_json
from .names import bytes_shown, listed, name_fault, shown
from .pipeline import Progress, default_workspace, plan_for, silent
from .pipeline import compress as run_plan
from .planning import Plan, plan_as_json
from .report import facts, notes_text, plan_text, plan_warnings, summary_text, table
from .settings import Settings
from .shareconfig import read_share_config
from .sources import Source, resolve
from .sources.manifest import read_yaml
from .workspace import Workspace, skipped_as_json

Args = Mapping[str, Any]
log = logging.getLogger(__name__)
SKIPPED = 3  # exit code: done, but adapters were left out
_SETTINGS = {f.name for f in fields(Settings)}
_DETAILS = ("adapter", "key", "found", "expected", "remedy")


def plan(args: Args) -> int:
    """`plan`: print it, write it, and fail for what it already shows to be impossible."""
    chosen = _with_config(args)
    made = _make_plan(chosen)
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
    chosen = _with_config(args)
    for flag in ("layer_by_layer", "chunk_size"):
        if flag in chosen:
            log.warning("--%s has no effect: adapters are always streamed", flag.replace("_", "-"))
    if "output" not in chosen:
        raise UsageError("no output", expected="-o OUT", remedy="Name the checkpoint's folder.")
    out = Path(chosen["output"])
    workspace = Path(chosen.get("workspace") or default_workspace(out))
    made = _planned(chosen, workspace) if "plan" in chosen else _make_plan(chosen, workspace)
    made.validate()
    log.debug("%s", plan_text(made))
    for note in plan_warnings(made):
        log.warning("%s", note)
    skipped = run_plan(
        made, out, workspace=workspace, overwrite=bool(chosen.get("overwrite")), progress=_progress(args)
    )
    for note in notes_text(Workspace(workspace).admissions()):
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
        print(f"left out {len(skipped)} adapters; the reasons are in {shown(out / 'skipped.json')}:", file=sys.stderr)
        print("\n".join(f"  - {e}" for e in skipped), file=sys.stderr)
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
    out.mkdir(parents=True, exist_ok=True)
    folders = {name: own_folder(out / name) if len(names) > 1 else out for name in names}
    for name in _progress(args)("reconstruct", len(names), iter(names)):
        model.reconstruct(name, output_dir=folders[name])
    _print(args, {"reconstructed": {n: str(f) for n, f in folders.items()}}, f"{len(names)} adapters in {shown(out)}")
    return 0


def verify(args: Args) -> int:
    """`verify`: measured errors, worst first; fails if one is not as certified, or an original is missing."""
    from .model import SHAREModel
    from .verification import originals_of, recorded_sources
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
    measured = [v.relative_error for v in verdicts if v.relative_error >= 0]
    mean = sum(measured) / len(measured) if measured else None
    rows = [
        (v.name, f"{v.relative_error:.6f}", "-" if v.certified is None else f"{v.certified:.6f}", v.worst_module or "-")
        for v in verdicts
    ]
    text = table(rows, ("adapter", "dW error", "certified", "worst module"))
    text += f"\nmean dW error {mean:.6f} over {len(measured)} adapters" if mean is not None else ""
    _print(args, {"mean": mean, "failed": len(bad), "adapters": [asdict(v) for v in verdicts]}, text)
    for v in bad:
        print(f"FAILED {shown(v.name)}: {shown(v.problem, 2000)}", file=sys.stderr)
    return 1 if bad else 0


# -- settings ----------------------------------------------------------------------------------------


def _with_config(args: Args) -> dict[str, Any]:
    """Arguments over what `--config` sets; paths in it are as on the command line."""
    chosen = dict(args)
    if not chosen.get("sources"):
        chosen.pop("sources", None)
    if "config" not in args:
        return chosen
    path = Path(args["config"])
    if not path.is_file():
        raise UsageError("no such configuration file", found=path)
    values = read_yaml(path, path.read_text(encoding="utf-8")) or {}
    allowed = _SETTINGS | {"sources", "output", "workspace", "overwrite"}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UsageError("the configuration is not a mapping of settings", found=shown(values))
    unknown = sorted(k for k in values if k not in allowed)
    if unknown:
        raise UsageError(
            f"unknown setting in {shown(path)}", found=listed(unknown), expected=listed(sorted(allowed), 20)
        )
    return values | chosen


def _settings(chosen: Args) -> Settings:
    return Settings.from_mapping({k: v for k, v in chosen.items() if k in _SETTINGS})


def _sources(chosen: Args) -> list[Source]:
    sources = chosen.get("sources")
    if not sources:
        raise UsageError("no sources", expected="adapter folders, folders of them, globs or manifests")
    if not isinstance(sources, list | dict) or not all(isinstance(s, str) for s in _paths(sources)):
        raise UsageError("sources must be a list of paths, or a mapping of names to paths", found=shown(sources))
    if "names" in chosen:
        names = chosen["names"]
        if isinstance(sources, dict) or len(names) != len(sources) or len(set(names)) != len(names):
            raise UsageError(
                "--names needs one name, no two alike, per source", found=len(names), expected=len(sources)
            )
        sources = dict(zip(names, sources, strict=True))
    return resolve(sources)


def _paths(sources: list[Any] | dict[Any, Any]) -> list[Any]:
    return list(sources.values()) if isinstance(sources, dict) else sources


def _make_plan(chosen: Args, workspace: Path | None = None) -> Plan:
    return plan_for(_sources(chosen), _settings(chosen), workspace)


def _planned(chosen: Args, workspace: Path) -> Plan:
    """The plan of a file, made again from the sources that it names, and equal to it."""
    if "sources" in chosen:
        raise UsageError("both sources and --plan", remedy="The plan names its sources.")
    try:
        saved = read_json(Path(chosen["plan"]))
        sources = [Source(a["source_id"], Path(a["path"]), a["name"]) for a in saved["adapters"]]
        settings, fingerprint = dict(saved["settings"]), saved["fingerprint"]
        refused = [AdapterError(r["problem"], **{k: r[k] for k in _DETAILS if k in r}) for r in saved["refused"]]
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{shown(chosen['plan'])} is not a plan", found=str(e)) from e
    made = plan_for(sources, _settings(settings | dict(chosen)), workspace)
    if made.fingerprint != fingerprint and not made.refused:
        raise UsageError(
            "the plan no longer holds: adapters or settings have changed since it was made",
            found=made.fingerprint,
            expected=fingerprint,
            remedy="Make it again by lorashare-stream plan.",
        )
    return replace(made, refused=(*refused, *made.refused))


# -- output ------------------------------------------------------------------------------------------


def _print(args: Args, value: Mapping[str, Any], text: str) -> None:
    print(json.dumps(_finite(value)) if "json" in args else text)


def _finite(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    if isinstance(value, float) and value != value:
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
        print(f"{len(made.refused)} adapters will be left out:", file=sys.stderr)
        print("\n".join(f"  - {e}" for e in made.refused), file=sys.stderr)
