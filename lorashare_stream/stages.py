"""What a run does to a workspace and an output, stage by stage; `pipeline` puts them in order."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .adapterfiles import digest_files, open_tensors, tensor_records
from .checkpoint import Staging
from .entry import Entry
from .errors import AdapterError, DiskError, GoneError, LockedError, WorkspaceError, refusal
from .files import free_bytes, read_sealed, tree_bytes
from .journal import Journal, Receipt, Removal, Shapes
from .keys import SIDES, group_id
from .names import bytes_shown, digest_of, listed, shown
from .planning import Plan, check_enough
from .publishing import staging_folder
from .running import Run
from .shareformat import COMPONENTS
from .summary import Head
from .tasks import (
    Job,
    accumulate_module,
    check_unchanged,
    fit_module,
    ingest_adapter,
    project_adapter,
    settle_module,
)
from .workspace import Workspace

SYNC_EVERY = 64  # admissions, or adapters of the checkpoint, that are made durable at once
log = logging.getLogger(__name__)


def check_disk(plan: Plan, workspace: Path, out: Path, *, adds: bool = False) -> None:
    """Refuse a run for which a disk has no room, what its folders hold already being taken into account.

    Args:
        plan: of the run.
        workspace, out: its folders. A checkpoint that is replaced stays until another takes its place.
        adds: whether adapters may be added to the checkpoint that is there, which takes less.

    Raises:
        DiskError: with what is free and what is needed.
    """
    needs = [(workspace, plan.sizes["moments"] + plan.sizes["basis"])]
    needs += [] if adds else [(staging_folder(out), plan.sizes["checkpoint"])]
    free: dict[int, int] = {}
    needed: dict[int, int] = {}
    for folder, size in needs:
        disk, free[disk] = free_bytes(folder)
        needed[disk] = needed.get(disk, 0) + max(0, size - tree_bytes(folder))
    for disk, size in needed.items():
        if size > free[disk]:
            raise DiskError(
                "not enough disk for the workspace and the checkpoint",
                found=f"{bytes_shown(free[disk])} free",
                expected=f"about {bytes_shown(size)} more",
                remedy="Free some; put --workspace on another disk; or free moments when they are fitted, "
                "by --discard-moments.",
            )


def ingest(run: Run, work: Workspace) -> list[AdapterError]:
    """Admit every adapter of the plan that is not yet in the journal, in the order of the plan.

    Returns:
        Those whose values show that they must not touch a moment.
    """
    entries = {e.name: e for e in run.plan.entries}
    journal = journal_of_plan(run.plan, work)
    absent = {e.adapter for e in run.plan.absent}
    gone = [r.name for r in journal.receipts if r.name not in entries and r.name not in absent]
    if gone:
        raise _gone(gone, run.plan.refused)
    for receipt in (r for r in journal.receipts if r.name in entries):
        check_unchanged(entries[receipt.name], receipt)
    known = {r.name for r in journal.receipts}
    fresh = [e for e in run.plan.entries if e.name not in known]
    again = {e.name for e in journal.entries if isinstance(e, Removal)} & {e.name for e in fresh}
    if again:
        log.warning("taken out before, and added again since their sources are named: %s", listed(sorted(again)))
    refused: list[AdapterError] = []
    for count, (entry, result) in enumerate(zip(fresh, run.map("ingest", ingest_adapter, fresh), strict=True), 1):
        if isinstance(result, Receipt):
            work.admit(result, entry.shapes, durable=count % SYNC_EVERY == 0 or count == len(fresh))
        else:
            refused.append(result)
    work.sync_journal()
    if refused and run.plan.settings.on_error == "raise":
        raise refusal(
            f"{len(refused)} of {len(entries)} adapters cannot be compressed; the others are ingested",
            refused,
            "Leave them out, or go on without them by --on-error skip.",
        )
    check_enough(len(entries) + len(absent) - len(refused), refused, run.plan.fewest)
    return refused


def journal_of_plan(plan: Plan, work: Workspace) -> Journal:
    """The journal, mended, of a workspace that is held now, and was not when the plan was made.

    Raises:
        LockedError: if another run has changed it since.
    """
    journal = work.mended_journal()
    if plan.journal not in (None, journal.digest(len(journal.entries))):
        raise LockedError(
            "another run has changed the workspace meanwhile", found=work.root, remedy="Run the same command again."
        )
    return journal


def _gone(names: Sequence[str], refused: Sequence[AdapterError]) -> WorkspaceError:
    now = [error for error in refused if error.adapter in names]
    return WorkspaceError(
        "the workspace holds adapters that the sources no longer give, and its moments contain them",
        found=listed(names),
        remedy=f"One of them is refused now: {now[0]}"
        if now
        else "Name them again, take them out by lorashare-stream remove, or compress into another --workspace.",
    )


def make_job(plan: Plan, work: Workspace, out: Path, device: str) -> Job:
    """What the tasks need to know, after ingest."""
    journal, entries = work.journal(), {e.name: e for e in plan.entries}
    digest = digest_of_job(plan.choice, journal.receipts)
    return Job(
        settings=plan.settings,
        storage=plan.storage,
        entries=entries,
        journal=journal,
        shapes=work.shapes_of(journal, _shapes(journal, entries)),
        workspace=work.root.absolute(),
        bases=work.bases_for(digest).absolute(),
        out=out.absolute(),
        device=device,
        choice=plan.choice,
        digest=digest,
    )


def _shapes(journal: Journal, entries: Mapping[str, Entry]) -> dict[str, Shapes]:
    """Shapes of the modules of one adapter of each kind, of those that can be read."""
    kinds = {r.shapes: r.name for r in journal.receipts if r.name in entries}
    return {name: entries[name].shapes for name in kinds.values()}


def digest_of_job(choice: str, receipts: Sequence[Receipt]) -> str:
    """Digest of all that decides a checkpoint: settings and adapters."""
    return digest_of([choice, [[r.name, r.digest, r.config_digest] for r in receipts]])


def settle(run: Run, job: Job) -> dict[str, dict[str, Any]]:
    """Bring the moments up to the journal and fit what is not fitted; the facts of all bases, by module."""
    work = Workspace(job.workspace)
    forget_unused(job)
    markers = {m: work.marker(m) for m in job.modules}
    todo = [m for m in job.modules if not job.has_basis(m, markers[m])]
    if job.settings.discard_moments:
        run.all("accumulate", partial(settle_module, job), todo)
        for module in job.modules:
            work.discard(module)
    else:
        run.all("accumulate", partial(accumulate_module, job), [m for m in todo if not job.holds_all(markers[m])])
        run.all("fit", partial(fit_module, job), todo)
    return {m: read_sealed(job.facts_file(m)) for m in job.modules}


def forget_unused(job: Job) -> None:
    """Remove the moments of modules that no adapter has any more."""
    work = Workspace(job.workspace)
    for module in work.modules() - set(job.modules):
        work.forget(module)


def catch_up(run: Run, job: Job) -> None:
    """Bring the moments that are there up to the journal; those that were discarded stay so.

    Those that are found to be damaged, and cannot be summed again since sources are gone, are discarded.
    """
    work = Workspace(job.workspace)
    markers = {m: work.marker(m) for m in job.modules}
    stale = [m for m, marker in markers.items() if marker is not None and not job.holds_all(marker)]
    if stale:
        run.all("accumulate", partial(_accumulate_or_forget, job), stale)


def _accumulate_or_forget(job: Job, module: str) -> None:
    try:
        accumulate_module(job, module)
    except GoneError as e:
        if Workspace(job.workspace).marker(module) is not None:
            raise  # it is whole, and a new adapter is gone before it was added
        log.warning("the moments of %s are damaged, and are dropped: %s", shown(module), e)


def write_bases(staging: Staging, job: Job, bases: Mapping[str, Mapping[str, Any]]) -> None:
    """Stream the bases, and their eigenvalues, into the staged checkpoint."""
    sides = {(m, side): facts[side] for m, facts in bases.items() for side in SIDES if side in facts}
    shapes = {group_id(m, side): (facts["d"], facts["k"]) for (m, side), facts in sides.items()}
    components = _raw_tensors([job.basis_file(m) for m in bases])  # of each module A before B
    staging.write_components(components, shapes, job.storage, job.basis_digest)
    staging.write_spectrum({group_id(m, side): facts["eigenvalues"] for (m, side), facts in sides.items()})


def _raw_tensors(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with open_tensors((path,)) as reader:
            for record in tensor_records((path,)):
                yield from reader.chunks(record)


def project(run: Run, job: Job, staging: Staging, receipts: Sequence[Receipt]) -> None:
    """Project adapters into the staged checkpoint, and make them durable, some at a time."""
    names = [receipt.name for receipt in receipts]
    done: list[str] = []
    for name, _ in zip(names, run.map("project", partial(project_adapter, job), names), strict=True):
        done.append(name)
        if len(done) == SYNC_EVERY:
            staging.sync(done)
            done.clear()
    staging.sync(done)


def head_of_job(plan: Plan, job: Job, bases: Mapping[str, Mapping[str, Any]], staging: Staging) -> Head:
    """What the checkpoint of a job is of, whose bases are staged."""
    groups = {group_id(m, side): facts[side] for m, facts in bases.items() for side in SIDES if side in facts}
    removed = sorted({name for facts in bases.values() for name in facts["removed"]})
    return Head(
        plan.base_model,
        plan.settings.chosen(),
        plan.storage,
        plan.choice,
        plan.binding,
        job.basis_digest,
        digest_files([staging.root / COMPONENTS]),
        {group: {k: facts[k] for k in ("d", "k", "energy", "explained")} for group, facts in groups.items()},
        removed=tuple(removed),
    )
