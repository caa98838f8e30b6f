"""The commands that compress, look, check and restore: settings from arguments, one call, a result that is printed."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.folder import CONFIG as ADAPTER_CONFIG
from ..checkpoint.config import SHAREConfig, read_share_config
from ..checkpoint.format import ours_of, total_bytes
from ..checkpoint.publish import check_output, output_folder
from ..errors import (
    BudgetError,
    CheckpointError,
    CollectionError,
    RefusedAdapterError,
    StreamError,
    UsageError,
    problem_lines,
    skipped_as_json,
)
from ..files import atomic_file, own_path, read_json, tree_bytes, write_json
from ..hub.lookup import pinned, recalled, source_of
from ..hub.repository import place_of
from ..pipeline import Outcome, default_workspace
from ..pipeline import compress as run_plan
from ..plan.file import plan_as_json
from ..plan.plan import Plan
from ..plan.sources import resolve
from ..report.text import (
    beside_notes,
    notes_text,
    plan_notes,
    plan_text,
    plan_warnings,
    rows_text,
    summary_text,
    twin_notes,
)
from ..settings import LIMITS
from ..text import bytes_shown, counted, listed, name_fault, printable
from ..workspace.workspace import Workspace
from .choices import Args, cluster_of, make_plan, names_meant, planned, with_config, with_workers
from .output import (
    SKIPPED,
    print_result,
    progress_of,
    say,
    say_error,
    say_left_out,
    say_what_will_be_left_out,
    table_text,
)

if TYPE_CHECKING:
    from ..adapters.source import Source
    from ..model import SHAREModel

log = logging.getLogger(__name__)


def plan(args: Args) -> int:
    """`plan`: print it, write it, and fail for what it already shows to be impossible; with `--analyze`, measure."""
    chosen, sample = with_config(args), args.get("sample")
    limited = any(chosen.get(name) is not None for name in LIMITS)
    if sample is not None and (not ("analyze" in args or limited) or sample < 2):
        raise UsageError("--sample needs --analyze or a limit, and two adapters or more", found=sample)
    workspace = Path(chosen["workspace"]) if "workspace" in chosen else None
    made = make_plan(chosen, workspace, runs=False, progress=progress_of(args))
    value, text, fault = plan_as_json(made) | {"notes": plan_notes(made)}, plan_text(made), _fault(made)
    if fault is None or ("analyze" in args and not limited):
        try:
            more, told = _looked_into(args, made, sample)
        except (CollectionError, BudgetError) as e:
            fault = fault or e
        else:
            value, text = value | more, "\n\n".join([text, *told])
    if "output" in args:
        write_json(Path(args["output"]), value)
    print_result(args, value | ({"error": fault.problem} if fault else {}), text)
    say_what_will_be_left_out(made)
    if fault is not None:
        say_error(fault)
        return fault.exit_code
    return SKIPPED if made.refused else 0


def _looked_into(args: Args, made: Plan, sample: int | None) -> tuple[dict[str, Any], list[str]]:
    """A sample as plain values and as text: a forecast where a limit is set, else the analysis that is asked for."""
    if made.settings.limit:
        from ..report.forecast import forecast_of, forecast_text

        if "analyze" not in args and not any(e.fetched for e in made.adapters):
            note = "nothing is foretold: adapters on the Hub are not fetched for it; --analyze fetches a sample"
            return {}, [f"note: {note}"]
        forecast = forecast_of(made, sample, fetches="analyze" in args, progress=progress_of(args))
        plain = asdict(forecast) | {"problems": skipped_as_json(forecast.problems)}
        return {"forecast": plain}, [forecast_text(forecast)]
    if "analyze" not in args:
        return {}, []
    from ..report.analysis import analyse, analysis_text

    found = analyse(made, sample, progress=progress_of(args))
    return {"analysis": asdict(found) | {"problems": skipped_as_json(found.problems)}}, [analysis_text(found, made)]


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
    out, named = Path(chosen["output"]), Path(chosen["workspace"]) if "workspace" in chosen else None
    workspace = named or default_workspace(out)
    overwrite = bool(chosen.get("overwrite"))
    published = Workspace(workspace).published()
    check_output(output_folder(out), own=published, overwrite=overwrite)  # before the Hub is asked
    with cluster_of(args) as cluster:
        chosen = with_workers(chosen, cluster)
        make = planned if "plan" in chosen else make_plan
        made = make(chosen, workspace, progress=progress_of(args))
        made.validate()
        log.debug("%s", plan_text(made))
        before = ours_of(out)
        for note in plan_warnings(made):
            log.warning("%s", note)
        outcome = run_plan(
            made,
            out,
            workspace=named,
            executor=cluster,
            overwrite=overwrite,
            take_lock=bool(chosen.get("take_lock")),
            progress=progress_of(args),
        )
    if before is not None:
        what = {"current": "is up to date", "projection": "has grown", "recompute": "has replaced what was there"}
        log.info("%s %s", printable(out), what[outcome.method])
    told = {note for adapter in made.adapters for note in adapter.layout.notes}
    every = {r.name for r in outcome.admissions}
    for note in (*notes_text(outcome.admissions, told), *twin_notes(outcome.admissions, every)):
        log.info("%s", note)
    return _print_compressed(args, out, workspace, outcome)


def _print_compressed(args: Args, out: Path, workspace: Path, outcome: Outcome) -> int:
    config, used = read_share_config(out), tree_bytes(workspace)
    result = {
        "checkpoint": str(out),
        "workspace": str(workspace),
        "workspace_bytes": used,
        "method": outcome.method,
        "skipped": skipped_as_json(outcome.skipped),
        **info_of(config),
    }
    drop = f"{bytes_shown(used)}, kept for growing and refitting; drop it by: rm -r {shlex.quote(printable(workspace))}"
    print_result(args, result, f"{summary_text(config)}\n{rows_text([('workspace', drop)])}")
    say_left_out(outcome.skipped, out)
    return SKIPPED if outcome.skipped else 0


def info(args: Args) -> int:
    """`info`: what a checkpoint says of itself."""
    config = read_share_config(place_of(args["checkpoint"], local_files_only="offline" in args).root)
    print_result(args, info_of(config), summary_text(config))
    return 0


def report(args: Args) -> int:
    """`report`: a page of pictures of what a checkpoint says of itself."""
    out = Path(args["output"])
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError("a report is an .html file", found=out, expected="a name that ends in .html")
    if not out.absolute().parent.is_dir():
        raise UsageError("no folder for the report", found=out.parent, remedy="Make it, or name another.")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it does without a folder of its own
    try:
        from ..report.page import findings_of, page
    except ModuleNotFoundError as e:
        if e.name != "matplotlib":
            raise
        remedy = "Install it by: pip install matplotlib (the extra `report` of this package)."
        raise UsageError("a report is drawn by matplotlib, and there is none", remedy=remedy) from e
    content = page(findings_of(place_of(args["checkpoint"], local_files_only="offline" in args))).encode()
    with atomic_file(out) as f:
        f.write(content)
    print_result(args, {"report": str(out), "bytes": len(content)}, f"{bytes_shown(len(content))} in {printable(out)}")
    return 0


def info_of(config: SHAREConfig) -> dict[str, Any]:
    """The result of `info` as plain values."""
    stats = {k: v for k, v in config.compression_stats.items() if k != "lorashare_stream"}
    ours = {k: v for k, v in config.ours.items() if k != "groups"}
    whole = {}
    if ours:
        total = total_bytes(ours["bytes"])
        whole = {"checkpoint_bytes": total, "times_smaller": ours["bytes"]["originals"] / max(1, total)}
    return {**{k: v for k, v in config.to_dict().items() if k != "compression_stats"}, **stats, **ours, **whole}


def reconstruct(args: Args) -> int:
    """`reconstruct`: one adapter into DIR, several into DIR/NAME."""
    from ..model import SHAREModel

    if "all" not in args and "adapter" not in args:
        raise UsageError("no adapters", expected="--adapter NAME ..., or --all")
    how = {name: args[name] for name in ("uniform", "rank", "engine") if name in args}
    model = SHAREModel.from_pretrained(args["checkpoint"], local_files_only="offline" in args)
    out = Path(args["output"])
    names = model.adapter_names if "all" in args else names_meant(args["adapter"], model.adapter_names)
    unknown = [n for n in names if n not in model.adapter_names]
    if unknown:
        model.reconstruct(unknown[0])  # raises, naming what is near
    unsafe = [f"{printable(n)} ({fault})" for n in names if (fault := name_fault(n))]
    if unsafe and len(names) > 1:
        raise UsageError("names that cannot be folders", found=listed(unsafe), remedy="Reconstruct them one by one.")
    if out.exists() and not out.is_dir():
        raise UsageError("the output is no folder", found=out, remedy="Choose another.")
    folders = {name: own_path(out / name) if len(names) > 1 else out for name in names}
    faults: dict[str, CheckpointError] = {}
    notes = Counter[str]()
    for name in progress_of(args)("reconstruct", len(names), iter(names)):
        try:
            model.reconstruct(name, output_dir=folders[name], notes=notes, **how)
        except CheckpointError as e:  # a damaged one keeps nobody from the others
            e.adapter, faults[name] = name, e
    for note, count in notes.items():
        log.info("%s (in %s)", note, counted(count, "adapter"))
    written = {n: str(f) for n, f in folders.items() if n not in faults}
    failed = {n: str(e) for n, e in faults.items()}
    result = {"reconstructed": written} | ({"failed": failed} if failed else {})
    text = f"{counted(len(written), 'adapter')} in {printable(out)}"
    if how and written:
        result["rank"] = max(read_json(folders[name] / ADAPTER_CONFIG)["r"] for name in written)
        text += f", uniform, of rank {result['rank']} at most"
    print_result(args, result, text)
    for line in problem_lines(faults.values(), "FAILED "):
        say(line)
    refused = written and all(isinstance(e, RefusedAdapterError) for e in faults.values())
    return (SKIPPED if refused else 1) if faults else 0


def verify(args: Args) -> int:
    """`verify`: measured errors, worst first; fails if one is not as certified, or an original is missing."""
    from ..model import SHAREModel
    from ..stages.verify import originals_of
    from ..stages.verify import verify as verdicts_of

    offline = "offline" in args
    model = SHAREModel.from_pretrained(args["checkpoint"], local_files_only=offline)
    beside = Path(args.get("workspace", default_workspace(Path(args["checkpoint"]).absolute())))
    sources = _originals(args, model, beside, offline=offline)
    damaged = model.damaged_files()
    found = verdicts_of(model, originals_of(model, sources), workspace=beside, offline=offline)
    verdicts = list(progress_of(args)("verify", len(model.adapter_names), found))
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
    text = table_text(rows, ("adapter", "dW error", "certified", "at worst", "in module"))
    text += f"\nmean dW error {mean:.6f} of {counted(len(measured), 'compressed adapter')}" if mean is not None else ""
    result = {"mean": mean, "failed": len(bad), "damaged": [e.problem for e in damaged]}
    each = [asdict(v) | {"problem": v.problem and v.problem.text("")} for v in verdicts]
    print_result(args, result | {"adapters": each}, text)
    for note in beside_notes({v.name: v.beside for v in verdicts}):
        log.warning("%s", note)
    for line in problem_lines([*damaged, *(v.problem for v in bad if v.problem)], "FAILED "):
        say(line)
    return 1 if bad or damaged else 0


def _originals(args: Args, model: SHAREModel, beside: Path, *, offline: bool) -> list[Source]:
    """The originals to compare a checkpoint with: as they are named, of its workspace, or of the Hub."""
    from ..stages.verify import pins_in

    if "sources" in args:
        return pinned(resolve(args["sources"]), pins_in(model), offline=offline)
    if Workspace(beside).exists():
        return [replace(source, name=None) for source in recalled(beside)]  # matched by their ids
    ids = [str(model.certified(name).get("source_id", "")) for name in model.adapter_names]
    sources = [source for source in (source_of(i, None) for i in ids) if source.hub is not None]
    if not sources:
        missing = f"no {printable(beside)}, and no adapter of the Hub"
        remedy = "Name them by --sources, or their --workspace."
        raise UsageError("no originals to compare with", found=missing, remedy=remedy)
    return sources


def _figure(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.6f}"
