"""What a run does to a workspace and an output, stage by stage; `pipeline` puts them in order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.folder import digest_files
from ..adapters.keys import SIDES, group_id
from ..adapters.scaling import Shapes
from ..checkpoint.config import CheckpointRecord, Group
from ..checkpoint.format import COMPONENTS
from ..checkpoint.publish import staging_folder
from ..checkpoint.records import metas_of
from ..checkpoint.staging import Staging
from ..checkpoint.summary import Statistics, statistics_of
from ..errors import AdapterError, DamagedFetchError, DiskError, LockedError, ValuesError, WorkspaceError, refusal
from ..files import free_bytes, tree_bytes
from ..hub.client import cache_folder
from ..hub.ledger import note_refusal
from ..hub.lookup import loose_id
from ..plan.plan import Plan, check_enough
from ..text import bytes_shown, digest_of, listed
from ..workspace.journal import Admission, Journal, Removal
from ..workspace.workspace import FACTS, FILES, HUB, Workspace
from .bases import Bases
from .ingest import ingest_adapter
from .job import Admitted, Job
from .project import check_unchanged, project_adapter
from .run import Run, check_none_lost
from .update import is_complete, sum_batch

SYNC_EVERY = 64  # admissions that are made durable at once
log = logging.getLogger(__name__)


def check_disk(plan: Plan, workspace: Path, out: Path, *, adds: bool = False, fetch: int = 0) -> None:
    """Refuse a run for which a disk has no room, what its folders hold already being taken into account.

    Args:
        plan: of the run.
        workspace, out: its folders. A checkpoint that is replaced stays until another takes its place.
        adds: whether adapters may be added to the checkpoint that is there, which takes less.
        fetch: bytes that are fetched from the Hub.

    Raises:
        DiskError: with what is free and what is needed.
    """
    work = tree_bytes(workspace) - tree_bytes(workspace / HUB)
    needs = [(workspace, sum(plan.sizes[part] for part in ("moments", "basis", "converted")) - work)]
    if not adds:
        needs.append((staging_folder(out), plan.sizes["checkpoint"] - tree_bytes(staging_folder(out))))
    budget = plan.settings.disk_budget
    if budget is not None:
        needs.append((workspace / FILES, min(budget, fetch) - tree_bytes(workspace / FILES)))
    elif fetch:
        needs.append((cache_folder(), fetch))
    moments = "; or free moments when they are fitted, by --discard-moments" if plan.groups else ""
    budget_too = "; or free adapters after they are added, by --disk-budget" if fetch else ""
    free: dict[int, int] = {}
    needed: dict[int, int] = {}
    for folder, size in needs:
        disk, free[disk] = free_bytes(folder)
        needed[disk] = needed.get(disk, 0) + max(0, size)
    for disk, size in needed.items():
        if size > free[disk]:
            raise DiskError(
                "not enough disk for the workspace and the checkpoint" + (", and what is fetched" if fetch else ""),
                found=f"{bytes_shown(free[disk])} free",
                expected=f"about {bytes_shown(size)} more",
                remedy=f"Free some; put --workspace on another disk{moments}{budget_too}.",
            )


def ingest(run: Run, work: Workspace, out: Path, device: str) -> list[AdapterError]:
    """Admit every adapter of the plan that is not yet in the journal, in the order of the plan.

    If a disk budget does not hold them all, the adapters of a batch are added to the moments before the next comes.

    Returns:
        Those whose values show that they must not touch a moment.
    """
    plan, before = run.plan, _check_journal(run.plan, work)
    fresh = [[e for e in batch if e.name not in before] for batch in plan.batches]
    again = {e.name for e in work.journal().entries if isinstance(e, Removal)} & {e.name for b in fresh for e in b}
    if again:
        log.warning("taken out before, and added again since their sources are named: %s", listed(sorted(again)))
    refused: list[AdapterError] = []
    several, done, sums = len(plan.batches) > 1, 0, plan.settings.fits
    complete = several and sums and is_complete(make_job(plan, work, out, device, begins=True))
    for number, (batch, after) in enumerate(zip(fresh, [*fresh[1:], []], strict=True)):
        if complete and not batch:
            done += len(plan.batches[number])
            continue
        if batch and several:
            log.info("batch %d of %d: %d of %d adapters", number + 1, len(plan.batches), done, len(plan.adapters))
        refused += admit(run, work, batch)
        done += len(plan.batches[number])
        if several and sums:
            names = {e.name for e in plan.batches[number]}
            sum_batch(run, make_job(plan, work, out, device, begins=True), names, _unrefused(after))
        run.fetcher.release(batch)
    if refused and plan.settings.on_error == "raise":
        raise refusal(
            f"{len(refused)} of {len(plan.adapters)} adapters cannot be compressed; the others are ingested",
            refused,
            "Leave them out, or go on without them by --on-error skip.",
        )
    check_enough(len(plan.adapters) + len(plan.absent) - len(refused), refused, plan.fewest)
    return refused


def _check_journal(plan: Plan, work: Workspace) -> set[str]:
    """The names of admitted adapters, all of which the plan must have, unchanged."""
    adapters = {e.name: e for e in plan.adapters}
    journal = journal_of_plan(plan, work)
    absent = {e.adapter for e in plan.absent}
    gone = [r for r in journal.admissions if r.name not in adapters and r.name not in absent]
    if gone:
        raise _gone([r.name for r in gone], plan.refused, _moved(gone, plan))
    for admission in (r for r in journal.admissions if r.name in adapters):
        check_unchanged(adapters[admission.name], admission)
    return {r.name for r in journal.admissions}


def admit(run: Run, work: Workspace, adapters: Sequence[Adapter]) -> list[AdapterError]:
    """Ingest adapters, as they come, and admit them in order; those that cannot be are given."""
    refused: list[AdapterError] = []
    shapes = {e.shapes_key: e.shapes for e in adapters}
    remote = {e.name: e.source_id for e in adapters if e.origin is not None and e.origin.refused is None}
    for count, result in enumerate(ingested(run, adapters), 1):
        if isinstance(result, Admission):
            work.admit(result, shapes[result.shapes], durable=count % SYNC_EVERY == 0 or count == len(adapters))
            continue
        refused.append(result)
        if isinstance(result, DamagedFetchError):
            run.fetcher.evict(next(e for e in adapters if e.name == result.adapter))
        if isinstance(result, ValuesError) and result.adapter in remote:  # it is not fetched for that again
            note_refusal(work.root / FACTS, remote[result.adapter], result)
    work.sync_journal()
    return refused


def ingested(run: Run, adapters: Sequence[Adapter]) -> Iterator[Admission | AdapterError]:
    """What ingest finds of adapters, in their order, though they may come in another one."""
    done: dict[str, Admission | AdapterError] = {}
    waiting = deque(e.name for e in adapters)
    lost = [e for adapter in adapters if (e := _refused_before(adapter)) is not None]
    fresh, task = _unrefused(adapters), partial(ingest_adapter, run.plan.settings.objective)
    for name, result in run.map("ingest", task, run.arriving(fresh, lost), len(fresh)):
        done |= {name: result} | {str(e.adapter): e for e in lost}
        while waiting and waiting[0] in done:
            yield done.pop(waiting.popleft())
    done |= {str(e.adapter): e for e in lost}
    yield from (done[name] for name in waiting)


def _unrefused(adapters: Sequence[Adapter]) -> list[Adapter]:
    return [e for e in adapters if e.origin is None or e.origin.refused is None]


def _refused_before(adapter: Adapter) -> AdapterError | None:
    """Why the values of a pinned adapter must not touch a moment, if it was fetched for that before."""
    if adapter.origin is None or adapter.origin.refused is None:
        return None
    error = copy(adapter.origin.refused)
    error.adapter, error.source = adapter.name, adapter.where
    return error


def journal_of_plan(plan: Plan, work: Workspace) -> Journal:
    """The journal, mended, of a workspace that is held now, and was not when the plan was made.

    Raises:
        LockedError: if another run has changed it since.
    """
    journal = work.recover_journal()
    if plan.journal not in (None, journal.digest(len(journal.entries))):
        raise LockedError(
            "another run has changed the workspace meanwhile", found=work.root, remedy="Run the same command again."
        )
    return journal


def _moved(gone: Sequence[Admission], plan: Plan) -> dict[str, str]:
    """Admitted adapters whose repository is named at another commit: name -> the id now."""
    now = {loose_id(e.source_id): e.source_id for e in plan.adapters if e.origin is not None}
    return {r.name: now[loose_id(r.source_id)] for r in gone if loose_id(r.source_id) in now}


def _gone(names: Sequence[str], refused: Sequence[AdapterError], moved: Mapping[str, str]) -> WorkspaceError:
    now = [error for error in refused if error.adapter in names]
    newer = [f"{old} is now {new}" for old, new in moved.items()]
    if newer:
        raise WorkspaceError(
            "adapters of the Hub are named at another commit than the one that is in the workspace",
            found=listed(newer, 3),
            remedy="Take the old ones out by lorashare-stream remove, then the same command adds the new ones; or name "
            "the commits that are there.",
        )
    return WorkspaceError(
        "the workspace holds adapters that the sources no longer give",
        found=listed(names),
        remedy=f"One of them is refused now: {now[0]}"
        if now
        else "Name them again; or add what is new alone, by lorashare-stream add; or take them out by lorashare-stream "
        "remove, or compress into another --workspace.",
    )


def make_job(plan: Plan, work: Workspace, out: Path, device: str, *, begins: bool = False) -> Job:
    """What the tasks need to know, after ingest; `begins` is before all are ingested, when no basis can be fitted."""
    journal, adapters = work.journal(), {e.name: e for e in plan.adapters}
    digest = checkpoint_key_of(plan.settings_key, journal.admissions)
    return Job(
        settings=plan.settings,
        storage=plan.storage,
        adapters=adapters,
        journal=journal,
        shapes=work.shapes_of(journal, _shapes(journal, adapters)),
        workspace=work.root.absolute(),
        bases=work.bases.absolute() if begins else work.bases_for(digest).absolute(),
        out=out.absolute(),
        device=device,
        settings_key=plan.settings_key,
        checkpoint_key=digest,
    )


def _shapes(journal: Journal, adapters: Mapping[str, Adapter]) -> dict[str, Shapes]:
    """Shapes of the modules of one adapter of each kind, of those that can be read."""
    kinds = {r.shapes: r.name for r in journal.admissions if r.name in adapters}
    return {name: adapters[name].shapes for name in kinds.values()}


def checkpoint_key_of(settings_key: str, admissions: Sequence[Admission]) -> str:
    """Digest of all that decides a checkpoint: settings and adapters."""
    return digest_of([settings_key, [[r.name, r.digest, r.config_digest] for r in admissions]])


def project(run: Run, job: Job, staging: Staging, admissions: Sequence[Admission]) -> dict[str, Statistics]:
    """Project adapters into the staged checkpoint: `write_adapters`."""
    return write_adapters(run, job, staging, admissions, "project", project_adapter)


def write_adapters(
    run: Run,
    job: Job,
    staging: Staging,
    admissions: Sequence[Admission],
    step: str,
    task: Callable[[Job, Admitted], Statistics],
) -> dict[str, Statistics]:
    """Write adapters into the staged checkpoint by a task, as they come, unless they are there; all are durable then.

    Returns:
        Their figures, by name.

    Raises:
        CollectionError: at the end, naming those that the Hub has no more.
    """
    there = [r.name for r in admissions if staging.done(r, job.basis_key)]
    staging.sync(there)  # a run that was killed may not have come to it
    statistics = {f.name: f for f in map(statistics_of, metas_of(staging.root, there))}
    adapters = [job.adapter(r.name) for r in admissions if r.name not in statistics]
    run.fetcher.cancel_except(adapters)
    lost: list[AdapterError] = []
    arriving = run.arriving(adapters, lost)
    with staging.syncing() as written:
        bare = replace(job, adapters={}, journal=Journal())  # each task has its own
        admitted = (Admitted(adapter, job.admission_of[adapter.name]) for adapter in arriving)
        tasks = list(admitted) if isinstance(arriving, Sequence) else admitted
        for each in run.map(step, partial(task, bare), tasks, len(adapters), lambda task: run.release(task.adapter)):
            statistics[each.name] = each
            written(each.name)
    check_none_lost(lost)
    return statistics


def record_of_job(plan: Plan, job: Job, bases: Bases, staging: Staging) -> CheckpointRecord:
    """What the checkpoint of a job is of, whose bases are staged."""
    groups = {group_id(m, side): facts[side] for m, facts in bases.items() for side in SIDES if side in facts}
    removed = sorted({name for facts in bases.values() for name in facts["removed"]})
    return record_of_plan(
        plan,
        basis_digest=job.basis_key,
        components=digest_files([staging.root / COMPONENTS]),
        groups={g: Group(**{k: facts[k] for k in Group.model_fields}) for g, facts in groups.items()},
        removed=removed,
    ).counting(job.counts)


def record_of_plan(plan: Plan, **more: Any) -> CheckpointRecord:
    """What the checkpoint of a plan is of, and more that is known of it."""
    facts: dict[str, Any] = {"settings": plan.settings, "dtype": plan.storage, "choice": plan.settings_key}
    return CheckpointRecord(**facts, binding=plan.binding, base_model=plan.base_model, **more)
