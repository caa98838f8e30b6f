"""Text for people: tables, and what a plan will do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..adapters.hubid import cached_id
from ..checkpoint.format import PARTS
from ..settings import Settings
from ..text import bytes_shown, counted, few, listed, printable

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..workspace.journal import Admission

Row = tuple[str, object]
_SHARD = re.compile(r"\d+-of-\d+")
_UNUSED = {
    "dtype": "its adapters come back in the dtypes of their sources",
    "moment_dtype": "it has no moments",
    "discard_moments": "it has no moments",
}
_OFTEN = {1: "once", 2: "twice"}


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> str:
    """Columns padded to equal width; foreign strings escaped. The first column is text, others numbers.

    >>> print(table([("a", "1"), ("bcd", "22")], ("name", "n")))
    name   n
    a      1
    bcd   22
    """
    clean = [tuple(printable(cell, 90) for cell in row) for row in [*([header] if header else []), *rows]]
    widths = [max(len(row[i]) for row in clean) for i in range(len(clean[0]))] if clean else []
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in clean
    )


def rows_text(pairs: Sequence[Row]) -> str:
    """Aligned `name  value` lines."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {printable(value)}" for name, value in pairs)


def plan_text(plan: Plan) -> str:
    """What a plan will do: adapters, groups, bytes on disk, memory by step, and warnings."""
    s, size = plan.settings, plan.sizes
    auto = s.num_components == "auto"
    stacked = sum(g.stacked for g in plan.groups)
    groups = f"{len(plan.groups)}: {stacked} as stacked columns, {len(plan.groups) - stacked} as second moments"
    pairs: list[Row] = [
        ("base model", plan.base_model or "not named"),
        *[("  also named", text) for text in few(_other_names(plan), "name")],
        ("adapters", f"{len(plan.adapters)}" + (f", and {len(plan.refused)} refused" if plan.refused else "")),
        *([("groups", groups)] if s.limit is None else []),
        *([("objective", s.objective + (", centred" if s.center else ""))] if s.limit is None else []),
        ("components k", f"auto, to {s.variance_threshold:.4g} of the energy" if auto else s.num_components)
        if s.limit is None
        else ("asked for", s.asked[0]),
        ("originals", f"{bytes_shown(size['originals'])}, of which LoRA {bytes_shown(size['lora'])}"),
        *_of_the_hub(plan),
        ("workspace", f"{bytes_shown(size['workspace'])} on disk, in {counted(size['workspace_files'], 'file')}"),
        *(_stored_rows(plan) if s.limit is None else []),  # a forecast tells of a coded one
    ]
    steps = [
        (t.name, f"{t.tasks}", bytes_shown(t.read_bytes), f"{t.concurrency}", bytes_shown(t.peak_bytes))
        for t in plan.steps
    ]
    notes = [f"note: {text}" for text in plan_notes(plan)]
    return "\n".join(
        [rows_text(pairs), "", table(steps, ("step", "tasks", "reads", "at a time", "peak memory")), *notes]
    )


def _stored_rows(plan: Plan) -> list[Row]:
    """Bytes of a SHARE checkpoint."""
    size, most = plan.sizes, "up to " if plan.settings.num_components == "auto" else ""
    return [
        ("checkpoint", f"{most}about {bytes_shown(size['checkpoint'])} ({plan.storage})"),
        *[(f"  {part}", bytes_shown(size[part])) for part in PARTS if size.get(part)],
        ("break-even k", break_even_range(plan)),
    ]


def _of_the_hub(plan: Plan) -> list[Row]:
    """How much is fetched, and how often."""
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
    """The warnings of a plan, and what it cannot foretell."""
    unknown = "what directions save is not forecast: up to a fifth of the codes, from some hundred adapters on"
    return [*plan_warnings(plan), *([unknown] if plan.settings.directions else [])]


def plan_warnings(plan: Plan) -> list[str]:
    """What a user should know before the work begins."""
    return [*_of_sizes(plan), *adapter_notes(plan)]


def _of_sizes(plan: Plan) -> list[str]:
    size, s = plan.sizes, plan.settings
    out = []
    if plan.adapters and not any(e.layout.modules for e in plan.adapters):
        out.append("no LoRA matrix can be compressed: everything is kept verbatim")
    elif plan.groups and s.num_components != "auto" and s.limit is None:
        clamped = sum(g.components < s.num_components for g in plan.groups)
        if clamped:
            out.append(f"k is clamped to min(d, n) in {clamped} of {len(plan.groups)} groups")
        if size["basis"] + size["loadings"] > size["lora"]:
            out.append(
                f"the shared form, {bytes_shown(size['basis'] + size['loadings'])}, is larger than the LoRA tensors, "
                f"{bytes_shown(size['lora'])}: add adapters, or take k below the break-even"
            )
    if s.limit is None and s.num_components != "auto":
        out += _of_large_groups(plan)
    whole = [e.name for e in plan.adapters if e.layout.modules and e.layout.extra_bytes > 10 * e.layout.lora_bytes]
    if whole:
        extra = sum(e.layout.extra_bytes for e in plan.adapters)
        out.append(
            f"tensors that are not LoRA are most of {counted(len(whole), 'adapter')} ({listed(whole, 3)}), embeddings "
            f"or whole layers perhaps; they are kept verbatim, {bytes_shown(extra)} in all"
        )
    return out


def _of_large_groups(plan: Plan) -> list[str]:
    """Which groups are larger shared than not, where not all are."""
    large = [g for g in plan.groups if g.components > g.break_even]
    if not large or len(large) == len(plan.groups):
        return []
    some = [f"{g.module}:{g.side} (break-even k = {g.break_even:.1f})" for g in large]
    return [
        f"{len(large)} of {len(plan.groups)} groups are larger shared than not: {listed(some, 3)}; take a smaller "
        "k, or a limit (--max-error, --ratio, --max-bytes), which no group exceeds"
    ]


def adapter_notes(plan: Plan) -> list[str]:
    """What a user should know of single adapters before the work begins."""
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
    """Which files of weights beside adapters (name -> paths) a checkpoint does not hold, and what to do."""
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
    """Which repositories of the Hub, or of its cache, have several commits among the adapters."""
    of_repo: dict[str, dict[str, str]] = {}
    for e in plan.adapters:
        hub = cached_id(str(e.folder)) if e.origin is None else e.origin.hub
        if hub is not None:
            of_repo.setdefault(str(replace(hub, revision="")), {})[e.name] = hub.revision[:8]
    several = {repo: names for repo, names in of_repo.items() if len(names) > 1}
    each = [f"{repo} ({listed((f'{n} at {sha}' for n, sha in some.items()), 3)})" for repo, some in several.items()]
    return [f"several commits of one repository are taken, each as an adapter: {listed(each, 3)}"] if each else []


def double_notes(plan: Plan) -> list[str]:
    """Which reconstructions are not taken, and which are."""
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
    """What ingest noted of adapters, a line for each kind of note.

    Args:
        admissions: the admissions.
        told: notes that the plan has shown before.
    """
    return _by_kind((admission.name, note) for admission in admissions for note in admission.notes if note not in told)


def _by_kind(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Notes of adapters, given with their names, a line for each kind, those of most adapters first.

    A note may begin with the key that it is of.
    """
    by_kind: dict[str, dict[str, None]] = {}
    for name, note in notes:
        by_kind.setdefault(note.rpartition(": ")[2], {})[name] = None
    lines = [
        printable(f"{kind}: in {counted(len(names), 'adapter')} ({listed(names, 3)})")
        for kind, names in sorted(by_kind.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return few(lines, "kind")
