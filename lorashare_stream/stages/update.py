"""Moments brought up to the journal, and bases fitted to them; under a disk budget batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import GoneError, WorkspaceError
from ..files import read_sealed
from ..plan.plan import Plan, cut
from ..text import listed, printable
from ..workspace.workspace import Workspace
from .accumulate import Marker, accumulate_modules, prepare
from .fit import fit_module, sum_and_fit_modules
from .job import Job
from .project import check_unchanged
from .run import Run

ATTEMPTS = 3  # to sum and fit a module whose moments are found to be damaged
log = logging.getLogger(__name__)


def sum_batch(run: Run, job: Job, names: Collection[str], after: Sequence[Adapter]) -> None:
    """Bring the moments up to the adapters of a batch while these are at hand; discarded ones stay so.

    Args:
        run, job: of all that is admitted.
        after: the adapters of the next batch, which are fetched meanwhile.
        names: of the batch. A run that was killed sums the same together when it goes on, and so gives the same bytes.
    """
    work = Workspace(job.workspace)
    last = max((i for i, r in job.journal.active.items() if r.name in names), default=-1)
    job = job.up_to(last + 1)
    modules = [m for m in job.modules if work.marker(m) is not None or not work.has_fitted(m)]
    run.fetcher.prefetch(job.unfetched(modules))
    run.fetcher.prefetch(after)
    sum_up(run, job, modules)


def is_complete(job: Job) -> bool:
    """Whether no moment that is there, or was not discarded, lacks an admission."""
    work = Workspace(job.workspace)
    return all(job.holds_all(work.marker(m)) or (work.marker(m) is None and work.has_fitted(m)) for m in job.modules)


def sum_and_fit(run: Run, job: Job) -> dict[str, dict[str, Any]]:
    """Bring the moments up to the journal and fit what is not fitted; the facts of all bases, by module."""
    work = Workspace(job.workspace)
    forget_unused(job)
    todo = [m for m in job.modules if not job.has_basis(m, work.marker(m))]
    for _ in range(ATTEMPTS):
        run.fetcher.cancel_except(())
        if job.settings.discard_moments and len(run.plan.batches) == 1:
            with run.at_hand(job.unfetched(todo)) as here:
                part = prepare(job.with_files(here), work, todo)
                run.sum(
                    partial(sum_and_fit_modules, part), todo, lambda m, ok: (work.discard if ok else work.forget)(m)
                )
        else:
            sum_up(run, job, [m for m in todo if not job.holds_all(work.marker(m))])
            summed = [m for m in todo if job.holds_all(work.marker(m))]
            if summed:  # what is projected after it is fetched meanwhile; nothing of it is there yet
                run.fetcher.prefetch(job.adapters[r.name] for r in job.journal.admissions if r.name in job.adapters)
            task = partial(fit_module, replace(job, adapters={}))  # of which it needs none: half of what is sent
            fitted = run.map("fit", task, summed, len(summed))
            for module in [m for m, whole in zip(summed, fitted, strict=True) if not whole]:
                work.forget(module)
        if job.settings.discard_moments:
            for module in job.modules:
                work.discard(module)
            work.sweep()
        todo = [m for m in todo if not job.has_basis(m, work.marker(m))]
        if not todo:
            return {m: read_sealed(job.facts_file(m)) for m in job.modules}
    raise WorkspaceError(
        "moments are damaged as soon as they are written", found=listed(todo), remedy="Look after the disk."
    )


def sum_up(
    run: Run,
    job: Job,
    modules: Sequence[str],
    task: Callable[[Job, Sequence[str]], list[Marker | None]] = accumulate_modules,
) -> None:
    """Bring the moments of modules up to the journal, once; a module that is found to be damaged is forgotten.

    With a disk budget it is done in several steps, each with adapters that are at hand together: where moments were
    cut before, so that a run that was killed gives the same bytes, and where the budget would be exceeded.
    """
    work = Workspace(job.workspace)
    had = {m for m in modules if work.marker(m) is not None}

    def done(module: str, marker: Marker | None) -> None:
        if marker is None:
            work.forget(module)
        else:
            work.mark(marker)

    for count in _cuts(run.plan, job):
        part = job.up_to(count)
        todo = [m for m in modules if part.lacks(m, work.marker(m)) or (part is job and not work.marker(m))]
        todo = [m for m in todo if m not in had or work.marker(m) is not None]  # one that is damaged has its own cuts
        if not todo and part is not job:
            continue
        with run.at_hand(part.unfetched(todo)) as here:
            for adapter in here.values():
                check_unchanged(adapter, part.admission_of[adapter.name])
            run.check()
            part = prepare(part.with_files(here), work, todo)
            run.sum(partial(task, part), [m for m in todo if m in part.slots], done)
        if had:
            work.sweep()


def _cuts(plan: Plan, job: Job) -> list[int]:
    """Numbers of journal entries up to which moments are brought, one after the other."""
    end = len(job.journal.entries)
    if len(plan.batches) == 1:
        return [end]
    work = Workspace(job.workspace)
    seen = {marker["entries"] for m in job.modules if (marker := work.marker(m)) is not None} | {end}
    cuts: list[int] = []
    for before, after in pairwise([0, *sorted(s for s in seen if 0 < s <= end)]):
        active = [i for i in job.journal.active if before <= i < after]
        sizes = [job.hub_bytes(job.journal.active[i].name) for i in active]
        batches = cut(active, sizes, (plan.settings.disk_budget or 0) // 2) or [[]]
        cuts += [batch[-1] + 1 for batch in batches[:-1]] + [after]
    return cuts


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
        sum_up(run, job, stale)
    damaged = [m for m in stale if work.marker(m) is None]
    if damaged:
        sum_up(run, job, damaged, _accumulate_or_leave)


def _accumulate_or_leave(job: Job, modules: Sequence[str]) -> list[Marker | None]:
    markers: list[Marker | None] = []
    for module in modules:
        try:
            markers += accumulate_modules(job, [module])
        except GoneError as e:
            log.warning("the moments of %s are damaged, and are dropped: %s", printable(module), e)
            markers.append(None)
    return markers
