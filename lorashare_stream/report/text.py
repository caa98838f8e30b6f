"""Text for people: tables, plans and their warnings, summaries of checkpoints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from ..adapters.hubid import cached_id
from ..checkpoint.config import Recorded, SHAREConfig, record_of
from ..checkpoint.format import PARTS, next_bytes, total_bytes
from ..plan.plan import Plan
from ..settings import Settings
from ..text import bytes_shown, counted, few, figure, listed, printable
from ..workspace.journal import Admission

Row = tuple[str, object]
_SHARD = re.compile(r"\d+-of-\d+")
_UNUSED = {
    "dtype": "its adapters come back in the dtypes of their sources",
    "moment_dtype": "it has no moments",
    "discard_moments": "it has no moments",
}
_OFTEN = {1: "once", 2: "twice"}


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Columns padded to equal width; foreign strings escaped. The first column is text, others numbers.

    >>> print(table([("a", "1"), ("bcd", "22")], ("name", "n")))
    name   n
    a      1
    bcd   22
    """
    clean = [[printable(cell, 90) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    form = "  ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(form.format(*row).rstrip() for row in clean)


def rows_text(pairs: Sequence[Row]) -> str:
    """Aligned `name  value` lines."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {printable(value)}" for name, value in pairs)


# -- a plan ----------------------------------------------------------------------------------------------


def plan_text(plan: Plan) -> str:
    """A plan: adapters, groups, bytes on disk, memory by step, and warnings."""
    notes, size = [f"note: {text}" for text in plan_notes(plan)], plan.sizes
    if not plan.adapters:  # there is nothing to say of what is not done
        return "\n".join([rows_text([("adapters", f"0, and {len(plan.refused)} refused")]), *notes])
    pairs: list[Row] = [
        ("base model", plan.base_model or "not named"),
        *[("  also named", text) for text in few(_other_names(plan), "name")],
        ("adapters", f"{len(plan.adapters)}" + (f", and {len(plan.refused)} refused" if plan.refused else "")),
        *(_group_rows(plan) if plan.settings.limit is None else [("asked for", plan.settings.asked[0])]),
        ("originals", f"{bytes_shown(size['originals'])}, of which LoRA {bytes_shown(size['lora'])}"),
        *_hub_rows(plan),
        ("workspace", f"{bytes_shown(size['workspace'])} on disk, in {counted(size['workspace_files'], 'file')}"),
        *(_stored_rows(plan) if plan.settings.limit is None else []),  # a forecast tells of a coded one
    ]
    steps = [
        (t.name, f"{t.tasks}", bytes_shown(t.read_bytes), f"{t.concurrency}", bytes_shown(t.peak_bytes))
        for t in plan.steps
    ]
    header = ("step", "tasks", "reads", "at a time", "peak memory")
    return "\n".join([rows_text(pairs), "", table(steps, header), *notes])


def _group_rows(plan: Plan) -> list[Row]:
    s, stacked = plan.settings, sum(g.stacked for g in plan.groups)
    auto = f"auto, to {s.variance_threshold:.4g} of the energy"
    return [
        ("groups", f"{len(plan.groups)}: {stacked} as stacked columns, {len(plan.groups) - stacked} as second moments"),
        ("objective", s.objective + (", centred" if s.center else "")),
        ("components k", auto if s.num_components == "auto" else s.num_components),
    ]


def _stored_rows(plan: Plan) -> list[Row]:
    """Bytes of a SHARE checkpoint."""
    size, most = plan.sizes, "up to " if plan.settings.num_components == "auto" else ""
    return [
        ("checkpoint", f"{most}about {bytes_shown(size['checkpoint'])} ({plan.storage})"),
        *[(f"  {part}", bytes_shown(size[part])) for part in PARTS if size.get(part)],
        ("break-even k", break_even_range(plan)),
    ]


def _hub_rows(plan: Plan) -> list[Row]:
    """Bytes that are fetched, and number of times."""
    remote = [e for e in plan.adapters if e.origin is not None]
    if not remote:
        return []
    total = bytes_shown(sum(e.hub_bytes for e in remote))
    times = Counter(plan.fetches(e) for e in remote)
    often = listed(f"{n} {_OFTEN.get(count, f'{count} times')} at most" for count, n in sorted(times.items()))
    batches = f"in {len(plan.batches)} batches: " if len(plan.batches) > 1 else ""
    kept = "" if plan.settings.disk_budget is not None else ", and kept in the Hub's cache"
    return [("from the Hub", f"{counted(len(remote), 'adapter')}, {total}; fetched {batches}{often}{kept}")]


def break_even_range(plan: Plan) -> str:
    """The range over the groups of the k above which sharing saves nothing."""
    values = [g.break_even for g in plan.groups]
    ends = sorted({f"{min(values):.0f}", f"{max(values):.0f}"}, key=int) if values else ["no groups"]
    return " to ".join(ends)


def plan_notes(plan: Plan) -> list[str]:
    """Warnings of a plan, and a note of what it does not forecast."""
    unknown = "what directions save is not forecast: up to a fifth of the codes, from some hundred adapters on"
    return [*plan_warnings(plan), *([unknown] if plan.settings.directions else [])]


def plan_warnings(plan: Plan) -> list[str]:
    """Warnings of a plan before the work begins."""
    out = _k_notes(plan)
    if plan.adapters and not any(e.layout.modules for e in plan.adapters):
        out = ["no LoRA matrix can be compressed: everything is kept verbatim"]
    whole = [e.name for e in plan.adapters if e.layout.modules and e.layout.extra_bytes > 10 * e.layout.lora_bytes]
    if whole:
        extra = sum(e.layout.extra_bytes for e in plan.adapters)
        out.append(
            f"tensors that are not LoRA are most of {counted(len(whole), 'adapter')} ({listed(whole, 3)}), embeddings "
            f"or whole layers perhaps; they are kept verbatim, {bytes_shown(extra)} in all"
        )
    return [*out, *adapter_notes(plan)]


def _k_notes(plan: Plan) -> list[str]:
    """Warnings of groups of which k is more than they have, or more than pays."""
    s, size, out = plan.settings, plan.sizes, []
    if s.limit is not None or s.num_components == "auto":
        return []
    clamped = sum(g.components < s.num_components for g in plan.groups)
    if clamped:
        out.append(f"k is clamped to min(d, n) in {clamped} of {len(plan.groups)} groups")
    if size["basis"] + size["loadings"] > size["lora"]:
        out.append(
            f"the shared form, {bytes_shown(size['basis'] + size['loadings'])}, is larger than the LoRA tensors, "
            f"{bytes_shown(size['lora'])}: add adapters, or take k below the break-even"
        )
    above = [g for g in plan.groups if g.count and g.components > g.break_even]
    large = [f"{g.module}:{g.side} (break-even k = {g.break_even:.1f})" for g in above]
    if 0 < len(large) < len(plan.groups):
        out.append(
            f"{len(large)} of {len(plan.groups)} groups are larger shared than not: {listed(large, 3)}; take a smaller "
            "k, or a limit (--max-error, --ratio, --max-bytes), which no group exceeds"
        )
    return out


def adapter_notes(plan: Plan) -> list[str]:
    """Warnings of single adapters before the work begins."""
    s = plan.settings
    presumed = sum(e.config is None for e in plan.adapters)
    names = Counter(e.base_model for e in plan.adapters)
    unused = [name for name in _UNUSED if s.limit and getattr(s, name) != getattr(Settings, name)]
    unused = [name for name in unused if name == "dtype" or not s.directions]  # which have moments
    out = [f"{name} says nothing of a coded checkpoint: {_UNUSED[name]}" for name in unused]
    if presumed:
        out.append(f"configurations on the Hub are read when the plan is run: those of {counted(presumed, 'adapter')}")
    unnamed = [e.name for e in plan.adapters if e.base_model is None]
    if unnamed and plan.base_model:
        base = printable(plan.base_model)
        out.append(
            f"no base model is named by {counted(len(unnamed), 'adapter')} ({listed(unnamed)}); taken to be {base}"
        )
    idle = [name for name in ((s.base_model,) if s.base_model else ()) + s.base_aliases if not names[name]]
    if idle:
        out.append(f"no adapter names the base model {listed(idle)}: is it written as the adapters write it?")
    if s.any_base and (others := _other_names(plan)):
        out.append(f"whatever base model they name, adapters are accepted: {listed(others)}")
    alone = _alone(plan) if s.limit is None else []  # what is coded shares nothing
    if alone:
        out.append(f"no module is shared with any other adapter by {counted(len(alone), 'adapter')} ({listed(alone)})")
    out += _by_kind((e.name, note) for e in plan.adapters for note in e.layout.notes)
    out += _commits_notes(plan)
    out += beside_notes({e.name: e.beside for e in plan.adapters}) + double_notes(plan)
    if plan.inner:
        where = listed([f"{name}/{sub}" for name, subs in sorted(plan.inner.items()) for sub in subs], 3)
        out.append(f"adapters in subfolders of adapters are not taken: {where}; name them as sources to take them")
    return out


def beside_notes(beside: Mapping[str, Iterable[str]]) -> list[str]:
    """Warning of files of weights beside adapters (name -> paths), which a checkpoint does not hold."""
    of_file: dict[str, dict[str, None]] = {}
    for name, paths in beside.items():
        for path in paths:
            of_file.setdefault(_SHARD.sub("*-of-*", path), {})[name] = None
    if not of_file:
        return []
    files = listed(f"{path} ({counted(len(names), 'adapter')})" for path, names in sorted(of_file.items()))
    names = {name for some in of_file.values() for name in some}
    who = f"{counted(len(names), 'adapter')} ({listed(sorted(names), 3)})"
    return [
        f"files of weights beside {who} are not taken into the checkpoint: {files}; keep those that were trained, "
        "and copy them beside what reconstruct writes"
    ]


def _commits_notes(plan: Plan) -> list[str]:
    """Warning of repositories of the Hub, or of its cache, with several commits among the adapters."""
    of_repo: dict[str, dict[str, str]] = {}
    for e in plan.adapters:
        hub = cached_id(str(e.folder)) if e.origin is None else e.origin.hub
        if hub is not None:
            of_repo.setdefault(str(replace(hub, revision="")), {})[e.name] = hub.revision[:8]
    several = {repo: names for repo, names in of_repo.items() if len(names) > 1}
    each = [f"{repo} ({listed((f'{n} at {sha}' for n, sha in some.items()), 3)})" for repo, some in several.items()]
    return [f"several commits of one repository are taken, each as an adapter: {listed(each, 3)}"] if each else []


def double_notes(plan: Plan) -> list[str]:
    """Warnings of reconstructions that are not taken, and of those that are."""
    out = []
    if plan.doubles:
        out.append(
            f"reconstructions are not taken, since their originals are there: {listed(plan.doubles, 3)}; to take one, "
            "give it a name in a manifest or by --names"
        )
    again = [e.name for e in plan.adapters if e.reconstructs is not None]
    if again:
        out.append(
            f"{counted(len(again), 'adapter')} ({listed(again, 3)}) came out of a checkpoint by reconstruct: what was "
            "lost there is lost, and errors are relative to what is left"
        )
    return out


def _alone(plan: Plan) -> list[str]:
    """Adapters that have groups, but none with another adapter in it."""
    common = {g.module for g in plan.groups if g.adapters > 1}
    lonely = {e.layout.digest: e.layout for e in plan.adapters}
    digests = {d for d, layout in lonely.items() if layout.modules and not common & layout.by_name.keys()}
    return [e.name for e in plan.adapters if e.layout.digest in digests]


def _other_names(plan: Plan) -> list[str]:
    """Names of the base model that adapters give beside the one that is taken, those of most adapters first."""
    counts = sorted(plan.base_models.items(), key=lambda item: (-item[1], item[0]))
    return [f"{name} by {counted(n, 'adapter')}" for name, n in counts if name != plan.base_model]


def notes_text(admissions: Sequence[Admission], told: Collection[str] = ()) -> list[str]:
    """The notes of ingest, a line for each kind; `told` are those that the plan has shown before."""
    return _by_kind((admission.name, note) for admission in admissions for note in admission.notes if note not in told)


def twin_notes(admissions: Sequence[Admission], names: Collection[str]) -> list[str]:
    """Warning of named adapters that have the weights and the configuration of an earlier one."""
    first: dict[tuple[str, str], str] = {}
    for r in admissions:
        first.setdefault((r.digest, r.config_digest), r.name)
    twins = [(r.name, of) for r in admissions if r.name in names and (of := first[r.digest, r.config_digest]) != r.name]
    if not twins:
        return []
    which = listed((f"{name} = {of}" for name, of in twins), 3)
    return [
        f"{counted(len(twins), 'adapter')} {'has' if len(twins) == 1 else 'have'} the weights and the configuration of "
        f"another one: {which}; what is there twice is taken out by lorashare-stream remove"
    ]


def _by_kind(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Notes of named adapters, which may begin with a key: a line for each kind, those of most adapters first."""
    by_kind: dict[str, dict[str, None]] = {}
    for name, note in notes:
        by_kind.setdefault(note.rpartition(": ")[2], {})[name] = None
    lines = [
        printable(f"{kind}: in {counted(len(names), 'adapter')} ({listed(names, 3)})")
        for kind, names in sorted(by_kind.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return few(lines, "kind")


# -- a checkpoint ----------------------------------------------------------------------------------------


def summary_text(config: SHAREConfig) -> str:
    """Summary of a checkpoint: adapters, bases or codes, bytes on disk, errors."""
    rows: list[Row] = [
        ("base model", config.base_model_name_or_path or "not named"),
        ("adapters", f"{config.num_adapters}: {listed(config.adapter_names, 5)}"),
        *(_coded_rows(config, record_of(config)) if config.coded else _shared_rows(config)),
    ]
    if config.record:
        rows += _recorded_rows(config, config.record)
    else:
        rows.append(("LoRA parameters", f"{figure(config.compression_stats.get('compression_ratio'))} times fewer"))
    return rows_text(rows)


def _coded_rows(config: SHAREConfig, ours: Recorded) -> list[Row]:
    modules, step = config.coded["modules"], config.coded["step"]
    rows: list[Row] = [
        ("form", "coded: each adapter " + ("on directions that they share" if "basis" in ours.bytes else "alone")),
        ("coded modules", f"{modules} ({listed(config.target_modules, 12)})" if modules else "none"),
        *[("asked for", text) for text in ours.settings.asked],
    ]
    return [*rows, ("step", f"{float(step):.4g} of ||dW||, of every adapter")] if step else rows


def _shared_rows(config: SHAREConfig) -> list[Row]:
    rows: list[Row] = [("shared modules", "none")]
    if config.layer_keys:
        auto = ", the most of any group" if config.component_selection == "auto" else ""
        stats = config.compression_stats
        mean, least = (figure(stats.get(f"{which}_explained_variance")) for which in ("mean", "min"))
        rows = [
            ("shared modules", f"{len(config.layer_keys)} ({listed(config.target_modules, 12)})"),
            ("components k", f"{config.num_components}{auto}"),
            ("explained variance", f"mean {mean}, least {least}"),
        ]
    if ours := config.record:
        rows.append(("objective", ours.objective + (", centred" if ours.center else "")))
    return rows


def _recorded_rows(config: SHAREConfig, ours: Recorded) -> list[Row]:
    """Record of this package: bytes on disk, certified errors, adapters that are not compressed or not in the fit."""
    size, e = ours.bytes, ours.errors
    rows: list[Row] = _bytes_rows(ours, config.num_adapters)
    rows.append(("relative dW error", f"mean {e.mean:.4f}, median {e.median:.4f}, p95 {e.p95:.4f}, max {e.max:.4f}"))
    if ours.cut_from:
        rows.append(("  cut", f"from k = {ours.cut_from}: these errors follow from its, and are not measured"))
    low, high = (min(1.0, bound**0.5) for bound in e.mean_square_bounds or (0.0, 0.0))
    if high > 1e-3:  # below it they are rounding of float32 moments
        rows.append(("  bounds of its rms", f"{low:.4f} to {high:.4f}, known from the bases"))
    worst = [f"{w.name} {w.relative_error:.4f}" for w in e.worst[:3]]
    rows.append(("worst adapters", listed(worst) or "none is compressed"))
    if ours.verbatim_adapters:
        rows.append(("kept exact", f"{len(ours.verbatim_adapters)}: {listed(ours.verbatim_adapters)}"))
    if kept := ours.verbatim_factors:
        each = [f"of {name} in {counted(n, 'adapter')}" for name, n in kept.items()]
        rows.append(("kept verbatim", f"LoRA tensors {listed(each)}, which are compressed but for these"))
    if ours.num_skipped:
        rows.append(("left out", f"{ours.num_skipped}, with reasons in skipped.json"))
    what = "directions" if config.coded else "bases"
    if ours.projected:
        rows.append(("added since", f"{len(ours.projected)}, on {what} not fitted to them: {listed(ours.projected)}"))
    if ours.removed:
        told = f"still in the {what} (remove --refit frees them, with the workspace)"
        rows.append(("removed", f"{len(ours.removed)}, {told}: {listed(ours.removed)}"))
    if e.mean > 0.5 and config.coded:
        rows.append(("note", "the mean error is large: these adapters need more bytes, or a smaller --max-error"))
    elif e.mean > 0.5:
        remedy = "take more components, or code each alone by --max-error"
        rows.append(("note", f"the mean error is large: these adapters share little at this k; {remedy}"))
    if size["lora_ratio"] < 1 and not config.coded:
        rows.append(("note", "the shared form is larger than the LoRA tensors: add adapters, or take a smaller k"))
    return rows


def _bytes_rows(ours: Recorded, adapters: int) -> list[Row]:
    size = ours.bytes
    total, more = total_bytes(size), " on these bases" if "loadings" in size else ""
    rows: list[Row] = [
        ("originals", bytes_shown(size["originals"])),
        ("checkpoint", f"{bytes_shown(total)}, {_times(size['originals'] / max(total, 1))}"),
        *[(f"  {part}", bytes_shown(size[part])) for part in PARTS if part in size],
        ("  next adapter", f"about {bytes_shown(next_bytes(size, adapters))}{more}"),
    ]
    lora = f"{bytes_shown(size['lora'])} in the originals, {_times(size['lora_ratio'])}"
    return [*rows, ("LoRA bytes", lora)] if size["lora"] else rows


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger" if ratio > 0 else "nothing"
