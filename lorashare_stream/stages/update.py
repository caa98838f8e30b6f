"""Update: bring moments up to the journal, and fit bases to them; under a disk budget batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from ..adapters.adapter import Adapter
from ..errors import GoneError, WorkspaceError
from ..plan.plan import Plan, cut
from ..text import listed, printable
from ..workspace.records import Marker, read_record
from ..workspace.workspace import Workspace
from .accumulate import accumulate_modules, prepare
from .fit import Bases, fit_module, sum_and_fit_modules
from .job import Job
from .project import check_unchanged
from .run import Run
from .status import BasisRecord, removed_in, status_of, unfetched

ATTEMPTS = 3  # to sum and fit a module whose moments are found to be damaged
log = logging.getLogger(__name__)


def sum_batch(run: Run, job: Job, work: Workspace, names: Collection[str], after: Sequence[Adapter]) -> None:
    """Add the adapters of a batch to the moments while their files are local; discarded moments stay so.

    Args:
        run, job, work: of all that is admitted.
        names: of the batch. A run that was killed sums the same together when it goes on, and so gives the same bytes.
        after: the adapters of the next batch, which are fetched meanwhile.
    """
    count = 1 + max((i for i, r in job.journal.active.items() if r.name in names), default=-1)
    done = work.discarded(job.modules) | {s.module for s in status_of(job, work, job.modules) if s.has_seen(count)}
    job = job.up_to(count)
    modules = [m for m in job.modules if m not in done]
    run.fetcher.prefetch(unfetched(job, work, modules))
    run.fetcher.prefetch(after)
    sum_up(run, job, work, modules)


def is_complete(job: Job, work: Workspace) -> bool:
    """Whether every moment is up to the journal, or was discarded."""
    discarded = work.discarded(job.modules)
    return all(status.is_whole or status.module in discarded for status in status_of(job, work, job.modules))


def sum_and_fit(run: Run, job: Job, work: Workspace) -> Bases:
    """Bring the moments up to the journal, and fit the bases of all modules that are not fitted."""

    def fitted_now(module: str, is_whole: bool) -> None:
        if is_whole:
            work.discard(module)
        else:
            work.forget(module)

    forget_unused(job, work)
    todo = _unfitted(job, work, job.modules)
    for _ in range(ATTEMPTS):
        run.fetcher.cancel_except(())
        if job.settings.discard_moments and len(run.plan.batches) == 1:
            with run.at_hand(unfetched(job, work, todo)) as here:
                part = prepare(job.with_files(here), work, todo)
                run.sum(partial(sum_and_fit_modules, part), todo, fitted_now)
        else:
            sum_up(run, job, work, [status.module for status in status_of(job, work, todo) if not status.is_whole])
            summed = [status.module for status in status_of(job, work, todo) if status.is_whole]
            if summed:  # what is projected after it is fetched meanwhile; nothing of it is there yet
                run.fetcher.prefetch(job.adapters[r.name] for r in job.journal.admissions if r.name in job.adapters)
            bare = replace(job, adapters={}, markers=work.markers)  # it needs no adapters: half of what is sent
            fitted = run.map("fit", partial(fit_module, bare), summed, len(summed))
            for module in [m for m, whole in zip(summed, fitted, strict=True) if not whole]:
                work.forget(module)
        if job.settings.discard_moments:
            for module in job.modules:
                work.discard(module)
            work.sweep()
        todo = _unfitted(job, work, todo)
        if not todo:
            found = {module: read_record(BasisRecord, job.facts_file(module)) for module in job.modules}
            return {module: record for module, record in found.items() if record is not None}
    raise WorkspaceError(
        "moments are damaged as soon as they are written", found=listed(todo), remedy="Look after the disk."
    )


def _unfitted(job: Job, work: Workspace, modules: Sequence[str]) -> list[str]:
    return [status.module for status in status_of(job, work, modules) if status.basis() is None]


def sum_up(
    run: Run,
    job: Job,
    work: Workspace,
    modules: Sequence[str],
    task: Callable[[Job, Sequence[str]], list[Marker | None]] = accumulate_modules,
) -> None:
    """Bring the moments of modules up to the journal; a module whose moments are damaged is forgotten.

    With a disk budget it is done in several steps, each with adapters that are at hand together: where moments were
    cut before, so that a run that was killed gives the same bytes, and where the budget would be exceeded.
    """
    had = work.markers.keys() & set(modules)

    def done(module: str, marker: Marker | None) -> None:
        if marker is None:
            work.forget(module)
        else:
            work.mark(marker)

    for count in _cuts(run.plan, job, work):
        part = job.up_to(count)
        todo = [s.module for s in status_of(part, work, modules) if s.is_behind or (part is job and not s.is_whole)]
        todo = [m for m in todo if m not in had or m in work.markers]  # one that is damaged has its own cuts
        if not todo and part is not job:
            continue
        with run.at_hand(unfetched(part, work, todo)) as here:
            for adapter in here.values():
                check_unchanged(adapter, part.admission_of[adapter.name])
            run.check()
            part = prepare(part.with_files(here), work, todo)
            run.sum(partial(task, part), [m for m in todo if m in part.slots], done)
        if had:
            work.sweep()


def _cuts(plan: Plan, job: Job, work: Workspace) -> list[int]:
    """Numbers of journal entries at which the update is cut, ascending."""
    end = len(job.journal.entries)
    if len(plan.batches) == 1:
        return [end]
    seen = {work.markers[m].entries for m in job.modules if m in work.markers} | {end}
    cuts: list[int] = []
    for before, after in pairwise([0, *sorted(s for s in seen if 0 < s <= end)]):
        active = [i for i in job.journal.active if before <= i < after]
        sizes = [job.hub_bytes(job.journal.active[i].name) for i in active]
        batches = cut(active, sizes, (plan.settings.disk_budget or 0) // 2) or [[]]
        cuts += [batch[-1] + 1 for batch in batches[:-1]] + [after]
    return cuts


def forget_unused(job: Job, work: Workspace) -> None:
    """Forget modules that no adapter has any more."""
    for module in work.markers.keys() - set(job.modules):
        work.forget(module)


def forget_removed(job: Job, work: Workspace) -> None:
    """Forget modules whose moments hold removed adapters, so that they are summed again from the others' sources.

    Where a source of these is gone, they stay as they are.
    """
    for module in sorted({*work.markers, *job.modules}):
        marker = work.markers.get(module)
        if marker is not None:
            holds = bool(removed_in(job, marker))
            holds &= all(r.name in job.adapters for r in job.holders(module, len(job.journal.entries)).values())
        else:
            basis = read_record(BasisRecord, job.facts_file(module))
            holds = basis is not None and bool(basis.removed)
        if holds:
            work.forget(module)


def catch_up(run: Run, job: Job, work: Workspace) -> None:
    """Bring existing moments up to the journal; discarded ones stay so.

    Those that are found to be damaged, and cannot be summed again since sources are gone, are discarded.
    """
    stale = [s.module for s in status_of(job, work, job.modules) if s.marker is not None and not s.is_whole]
    if stale:
        sum_up(run, job, work, stale)
    damaged = [module for module in stale if module not in work.markers]
    if damaged:
        sum_up(run, job, work, damaged, _accumulate_or_leave)


def _accumulate_or_leave(job: Job, modules: Sequence[str]) -> list[Marker | None]:
    markers: list[Marker | None] = []
    for module in modules:
        try:
            markers += accumulate_modules(job, [module])
        except GoneError as e:
            log.warning("the moments of %s are damaged, and are dropped: %s", printable(module), e)
            markers.append(None)
    return markers
