"""Adding adapters to a checkpoint, with its workspace or without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from threadpoolctl import threadpool_limits

from .catalog import catalog
from .checkpoint import metas_of, receipt_in
from .errors import AdapterError, WorkspaceError, refusal
from .growing import grow, offer
from .journal import Journal, Receipt
from .means import Means, opened, recalled
from .names import listed
from .pipeline import Outcome, plan_for
from .planning import make_plan
from .settings import Settings
from .shareconfig import SHAREConfig
from .shareformat import skipped_of
from .sources import Source
from .stages import digest_of_job
from .summary import counts_of, head_of
from .tasks import Job, ingest_adapter
from .workspace import skipped_as_json


def add(checkpoint: Path, sources: Sequence[Source], means: Means) -> Outcome:
    """Add adapters to a checkpoint: project them on its bases if these keep enough of each, else fit bases anew.

    Without a workspace, adapters can only be projected.

    Args:
        checkpoint: one of ours.
        sources: the adapters; those that it has are passed over.
        means: with `variance_threshold` among the changes, the share of dW energy that must be kept.

    Raises:
        CollectionError: if bases must be fitted anew, and cannot: it says what the bases that are there keep.
    """
    out, config = opened(checkpoint)
    settings, root = means.settings(config), means.root_of(out)
    if root is None:
        return _add_by_projection(out, config, sources, settings, means)
    held = recalled(root)
    fresh = _fresh(sources, {s.id: str(s.name) for s in held})
    names = [str(s.name) for s in held]
    return means.compress(plan_for([*held, *fresh], settings, root, recalled=names), out, root)


def _fresh(sources: Sequence[Source], held: Mapping[str, str]) -> list[Source]:
    """The sources that are not there yet; one under another name is another adapter."""
    return [s for s in sources if s.id not in held or s.name not in (None, held[s.id])]


def _add_by_projection(
    out: Path, config: SHAREConfig, sources: Sequence[Source], settings: Settings, means: Means
) -> Outcome:
    there = [receipt_in(meta) for meta in metas_of(out, config.adapter_names)]
    fresh = _fresh(sources, {r.source_id: r.name for r in there})
    if not fresh:
        return Outcome([], "current")
    plan = make_plan(catalog(fresh, settings, receipts=there), settings, grows=True)
    plan.validate()
    run = means.run(plan)
    receipts = list(run.map("ingest", ingest_adapter, plan.entries))
    refused = [*plan.refused, *(r for r in receipts if isinstance(r, AdapterError))]
    if refused and settings.on_error == "raise":
        raise refusal(f"{len(refused)} adapters cannot be added", refused, "Leave them out, or use --on-error skip.")
    admitted = tuple(r for r in receipts if isinstance(r, Receipt))
    if not admitted:
        return Outcome(refused, "current")
    shapes = {e.name: e.shapes for e in plan.entries}
    journal, choice = Journal((*there, *admitted)), head_of(config).choice
    job = Job(
        settings=settings,
        storage=config.ours["dtype"],
        entries={e.name: e for e in plan.entries},
        journal=journal,
        shapes={r.shapes: shapes[r.name] for r in admitted},
        workspace=out,
        bases=out,
        out=out,
        device="cpu",
        choice=choice,
        digest=digest_of_job(choice, journal.receipts),
    )
    counts = counts_of(config)
    for group, n in replace(job, journal=Journal(admitted)).counts.items():
        counts[group] = counts.get(group, 0) + n
    with threadpool_limits(1, user_api="blas"):
        published, kept = grow(run, job, out, config, [*skipped_of(out), *skipped_as_json(refused)], counts)
    if not published:
        raise WorkspaceError(
            "bases must be fitted anew for these adapters, and there is no workspace with the moments",
            found=listed(name for name, share in kept.items() if share < settings.variance_threshold),
            remedy="Name it by --workspace, or compress all sources into a new checkpoint."
            + offer(kept, settings.variance_threshold),
        )
    return Outcome(refused, "projection", kept)
