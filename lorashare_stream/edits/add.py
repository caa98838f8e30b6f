"""Add adapters to a checkpoint, with or without its workspace."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.folder import digest_files
from ..adapters.keys import group_id, split_group_id
from ..adapters.scaling import ModuleShape
from ..adapters.source import Source
from ..checkpoint.coded import metas_in
from ..checkpoint.config import SHAREConfig, read_share_config, record_of
from ..checkpoint.format import skipped_of
from ..checkpoint.records import admission_in
from ..errors import (
    AdapterError,
    CheckpointError,
    CollectionError,
    UsageError,
    WorkspaceError,
    refusal,
    skipped_as_json,
)
from ..hub.lookup import loose_ids, recalled, resolve_on_hub
from ..pipeline import Outcome, plan_for
from ..plan.catalog import Reader, Surveyed, make_plan
from ..plan.plan import Plan
from ..plan.sources import resolve
from ..report.text import beside_notes, double_notes, twin_notes
from ..settings import Settings
from ..stages import coding
from ..stages.adapt import demand_unchanged, grow, offer
from ..stages.ingest import ingested
from ..stages.job import Job, checkpoint_key_of
from ..stages.run import Run
from ..text import folded, listed, printable, spelled
from ..workspace.journal import Admission, Journal
from ..workspace.workspace import Workspace
from .options import RunOptions, check_same, opened

log = logging.getLogger(__name__)


def add(checkpoint: Path, sources: Sequence[Source], options: RunOptions, *, refit: bool = False) -> Outcome:
    """Add adapters to a checkpoint: project them on its bases if these keep enough of each, else fit bases anew.

    Without a workspace, adapters can only be projected. To a coded checkpoint they are added as they are coded: alone,
    by the limit or the step that it records.

    Args:
        checkpoint: one of ours.
        sources: the adapters; those that it has are passed over.
        options: with what, and what share of dW energy must be kept.
        refit: fit bases anew in any case, for which the workspace is needed; a coded checkpoint has none.

    Raises:
        BudgetError: if a limit on bytes does not hold them, and adapters cannot be coded again.
        CollectionError: if bases must be fitted anew, and cannot: it says what the bases that are there keep.
    """
    out, config = opened(checkpoint)
    try:
        outcome = _added(out, config, sources, options, refit=refit)
    except CollectionError:
        if (root := options.root_of(out, config)) is not None:  # it may be for these that bases do not do
            _note_twins(Workspace(root).journal().admissions, config)
        raise
    _note_twins(outcome.admissions, config)
    return outcome


def _note_twins(admissions: Sequence[Admission], config: SHAREConfig) -> None:
    for note in twin_notes(admissions, {r.name for r in admissions} - {*config.adapter_names}):
        log.warning("%s", note)


def add_one(checkpoint: Path, adapter: str | Mapping[str, str], options: RunOptions, *, refit: bool) -> dict[str, Any]:
    """Add one adapter, as lorashare's `add_adapter` does.

    Args:
        checkpoint: one of ours.
        adapter: its folder, or its name and its folder.
        options, refit: as for `add`.

    Returns:
        `adapter_name`; and `method`: `"projection"` if the adapters that were there stay as they are, `"recompute"` if
        all were projected on new bases, or coded again since the limit of bytes did not hold the new one. Of a SHARE
        checkpoint, where the new one was tried on the bases that were there, `min_explained_variance` and
        `mean_explained_variance`, both the share of its dW energy that these keep; of a coded one `relative_error`, the
        dW error that is certified of it.
    """
    sources = resolve(adapter if isinstance(adapter, Mapping) else [adapter])
    if len(sources) != 1:
        raise UsageError("one adapter can be added at a time", found=listed(s.wanted_name for s in sources))
    before = set(read_share_config(checkpoint).adapter_names)
    outcome = add(checkpoint, sources, options, refit=refit)
    config = read_share_config(checkpoint)
    added = [name for name in config.adapter_names if name not in before]
    if not added:
        raise UsageError("the checkpoint has this adapter already", found=sources[0].where)
    kept = dict.fromkeys(("min_explained_variance", "mean_explained_variance"), min(outcome.kept.values(), default=0.0))
    result: dict[str, Any] = {"method": outcome.method, "adapter_name": added[0]}
    if config.coded:
        return result | {"relative_error": next(metas_in(checkpoint, config, added)).ours.relative_error}
    return result | (kept if outcome.kept else {})


def _added(out: Path, config: SHAREConfig, sources: Sequence[Source], options: RunOptions, *, refit: bool) -> Outcome:
    settings, root = options.settings(config), options.root_of(out, config)
    loose = any(s.hub is not None and not s.hub.pinned for s in sources)
    pins = _pins_in(out, config) if loose else None
    sources, surveyed = resolve_on_hub(sources, settings, root, pins=pins, progress=options.progress)
    _check_names(config, out, sources)
    if config.coded and options.accept is not None:
        note = "--variance says nothing of a coded checkpoint: each adapter is coded within its limit"
        log.warning("%s", spelled(note))
    if root is None:
        if refit and not config.coded:
            raise WorkspaceError("no workspace to fit bases anew from", remedy="Compress the sources again.")
        return _add_alone(out, config, sources, surveyed, settings, options)
    check_same(out, config, root, adding={s.id for s in sources})
    held = recalled(root)
    fresh = _fresh(sources, [(s.id, s.name) for s in held])
    names = [str(s.name) for s in held]
    plan = plan_for([*held, *fresh], settings, root, recalled=names, progress=options.progress)
    _note(plan, {s.id for s in fresh})
    before = [e for e in skipped_of(out) if e.get("adapter") not in {x.name for x in plan.adapters}]
    return options.compress(
        plan, out, root, refit=refit and bool(fresh), accept=options.accept, there=config, also_left_out=before
    )


def _check_names(config: SHAREConfig, out: Path, sources: Sequence[Source]) -> None:
    """Refuse a given name that another adapter has."""
    taken = {folded(name): name for name in config.adapter_names}
    for source in sources:
        name = None if source.name is None else taken.get(folded(source.name))
        if name is not None and next(metas_in(out, config, [name])).ours.source_id != source.id:
            raise UsageError(
                f"there is an adapter named {printable(name)!r} already", found=source.path, remedy="Give another name."
            )


def _check_unchanged(there: Sequence[Admission], sources: Sequence[Source], settings: Settings) -> None:
    """Refuse sources that have changed since they came into the checkpoint."""
    known, reader = {r.source_id: r for r in there}, Reader(settings)
    for source in sources:
        admission = known.get(source.id) if source.hub is None else None  # what is pinned does not change
        found = None if admission is None else reader.read(source)
        if admission is None or not isinstance(found, Adapter):
            continue
        if found.config_digest != admission.config_digest or digest_files(found.paths) != admission.digest:
            raise AdapterError(
                "the adapter has changed since it was compressed",
                adapter=admission.name,
                remedy="Take it out by lorashare-stream remove, then add it again.",
            )


def _fresh(sources: Sequence[Source], held: Sequence[tuple[str, str | None]]) -> list[Source]:
    """Sources that are new, by id and given name."""
    ids = {source_id for source_id, _ in held}
    return [s for s in sources if s.id not in ids or (s.name is not None and (s.id, s.name) not in held)]


def _note(plan: Plan, fresh: Collection[str]) -> None:
    """Log what is not taken of the added sources."""
    beside = {e.name: e.beside for e in plan.adapters if e.source_id in fresh}
    for note in beside_notes(beside) + double_notes(plan):
        log.warning("%s", note)


def _pins_in(out: Path, config: SHAREConfig) -> dict[str, str]:
    """Pins of a checkpoint: Hub id without revision -> pinned id."""
    return loose_ids(meta.ours.source_id for meta in metas_in(out, config, config.adapter_names))


def _admissions_in(out: Path, config: SHAREConfig) -> list[Admission]:
    """Admissions as far as a checkpoint records them."""
    try:
        return [admission_in(meta) for meta in metas_in(out, config, config.adapter_names)]
    except CheckpointError:
        demand_unchanged(out, config)  # else another run is taking the adapter out
        raise


def _add_alone(
    out: Path,
    config: SHAREConfig,
    sources: Sequence[Source],
    surveyed: Surveyed,
    settings: Settings,
    options: RunOptions,
) -> Outcome:
    """Add adapters without a workspace."""
    if not config.coded:
        log.info("no workspace is named, nor beside the checkpoint: adapters are projected on its bases only")
    there = _admissions_in(out, config)
    fresh = _fresh(sources, [(r.source_id, r.name) for r in there])
    _check_unchanged(there, sources, settings)
    if not fresh:
        return Outcome([], "current")
    plan = make_plan(fresh, settings, surveyed=surveyed, journal=Journal(tuple(there)), known=_shapes_in(config))
    if settings.ratio is not None:  # of the whole checkpoint, and not of these adapters alone
        originals = sum(sum(r.sizes) for r in there) + plan.sizes["originals"]
        plan = replace(plan, settings=replace(settings, ratio=None, max_bytes=settings.byte_limit(originals)))
    _note(plan, {s.id for s in fresh})
    plan.validate()
    with options.running(plan, out, None) as (run, _):
        return _grown(out, config, there, run, options)


def _shapes_in(config: SHAREConfig) -> dict[str, ModuleShape]:
    """Shapes of the modules of a checkpoint, by its bases."""
    d = {group: basis.d for group, basis in record_of(config).groups.items()}
    modules = {split_group_id(group)[0] for group in d}
    return {m: ModuleShape(0, d[group_id(m, "A")], d[group_id(m, "B")], experts=0) for m in modules}


def _grown(out: Path, config: SHAREConfig, there: Sequence[Admission], run: Run, options: RunOptions) -> Outcome:
    """Add the adapters of a plan: projected on the bases of the checkpoint, or coded."""
    plan, settings = run.plan, run.plan.settings
    threshold = config.variance_threshold if options.accept is None else options.accept
    admissions = list(ingested(run, plan.adapters))
    refused = [*plan.refused, *(r for r in admissions if isinstance(r, AdapterError))]
    if refused and settings.on_error == "raise":
        raise refusal(
            f"{len(refused)} adapters cannot be added",
            refused,
            "Leave them out, or go on without them by --on-error skip.",
        )
    admitted = tuple(r for r in admissions if isinstance(r, Admission))
    if not admitted:
        return Outcome(refused, "current")
    shapes = {e.shapes_key: e.shapes for e in plan.adapters}
    journal, record = Journal((*there, *admitted)), record_of(config)
    job = Job(
        settings=settings,
        storage=record.dtype,
        adapters={e.name: e for e in plan.adapters},
        journal=journal,
        shapes={r.shapes: shapes[r.shapes] for r in admitted},
        workspace=out,
        bases=out,
        out=out,
        device="cpu",
        settings_key=record.choice,
        checkpoint_key=checkpoint_key_of(record.choice, journal.admissions),
    )
    left_out = [*skipped_of(out), *skipped_as_json(refused)]
    if config.coded:
        target = coding.target_there(out, config, journal.admissions, left_out)
        method = coding.code(run, job, None, target, lambda _: demand_unchanged(out, config))
        return Outcome(refused, method, admissions=journal.admissions)
    counts = {group: basis.n for group, basis in record.groups.items()}
    for group, n in replace(job, journal=Journal(admitted)).counts.items():
        counts[group] = counts.get(group, 0) + n
    published, kept = grow(run, job, config, left_out, threshold, counts)
    if not published:
        raise WorkspaceError(
            "bases must be fitted anew for these adapters, and there is no workspace with the moments",
            found=listed(name for name, share in kept.items() if share < threshold),
            remedy="Name it by --workspace, or compress all sources into a new checkpoint." + offer(kept, threshold),
        )
    return Outcome(refused, "projection", kept, journal.admissions)
