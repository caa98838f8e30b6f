"""Run: maps the tasks of a plan on an executor, with prefetch, progress and the lock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..adapters.adapter import Adapter
from ..checkpoint.publish import staging_folder
from ..errors import AdapterError, BudgetError, DiskError, refusal
from ..files import free_bytes, tree_bytes
from ..hub.client import cache_folder, cached
from ..hub.fetch import Fetcher
from ..plan.memory import SAMPLE
from ..plan.plan import Plan
from ..runtime.executors import Mapper, Places
from ..runtime.progress import Progress
from ..text import bytes_shown
from ..workspace.workspace import FILES, HUB, IN_WORK, Workspace

T = TypeVar("T")
R = TypeVar("R")
CHECKED_EVERY = 0.5  # seconds between two looks at the lock while tasks are done; what is published looks itself
LOT, LOT_BYTES = 16, 32 << 20  # adapters that go to a worker together, and what these read, at most
READ = 64  # files of sources that workers of a cluster are asked for, each in another folder


@dataclass(frozen=True)
class Run:
    """Mapper, progress, fetcher and lock of a run; `check` raises if the workspace is no longer held."""

    plan: Plan
    mapper: Mapper
    progress: Progress
    fetcher: Fetcher
    check: Callable[[], None] = lambda: None

    def map(
        self,
        step: str,
        fn: Callable[[T], R],
        tasks: Iterable[T],
        total: int,
        after: Callable[[T], object] | None = None,
    ) -> Iterator[R]:
        """Map a task, with the plan's concurrency for this step; results in the order of the tasks."""
        planned = self.plan.step(step)
        lot = min(LOT, LOT_BYTES * planned.tasks // max(1, planned.read_bytes)) if planned.read_bytes else 1
        results = self.mapper.map(fn, tasks, planned.concurrency, after, lot)
        checked = 0.0
        for result in self.progress(step, total, results):
            if time.monotonic() - checked > CHECKED_EVERY:
                self.check()
                checked = time.monotonic()
            yield result

    def portions(self, modules: Sequence[str]) -> list[tuple[str, ...]]:
        """Portions of modules that are summed together, cut smaller if a cluster has more workers than planned."""
        parts = self.plan.portions(modules)
        wide = self.mapper.width(self.plan.step("accumulate").concurrency)
        pieces = -(-wide // max(1, len(parts)))
        return [piece for part in parts for piece in _cut(part, -(-len(part) // pieces))]

    def sum(
        self, task: Callable[[Sequence[str]], Sequence[R]], modules: Sequence[str], done: Callable[[str, R], object]
    ) -> None:
        """Map a task over portions of modules; `done` takes each module and its result; progress counts modules."""
        portions = self.portions(modules)
        results = self.mapper.map(task, portions, self.plan.step("accumulate").concurrency)

        def each() -> Iterator[str]:
            for portion, found in zip(portions, results, strict=True):
                for module, result in zip(portion, found, strict=True):
                    self.check()
                    done(module, result)
                    yield module

        for _ in self.progress("accumulate", len(modules), each()):
            pass

    def all(self, step: str, fn: Callable[[T], Any], tasks: Sequence[T]) -> None:
        """Map a task for its side effects."""
        for _ in self.map(step, fn, tasks, len(tasks)):
            pass

    def arriving(self, adapters: Sequence[Adapter], lost: list[AdapterError]) -> Iterable[Adapter]:
        """Adapters as they are fetched, all at once if they are local; errors go into `lost`."""
        return adapters if all(e.fetched for e in adapters) else self._arriving(adapters, lost)

    def _arriving(self, adapters: Sequence[Adapter], lost: list[AdapterError]) -> Iterator[Adapter]:
        for result in self.fetcher.arriving(adapters):
            if isinstance(result, AdapterError):
                lost.append(result)
            else:
                yield result

    def release(self, adapter: Adapter) -> None:
        """Evict the files of an adapter."""
        self.fetcher.release([adapter])

    @contextmanager
    def at_hand(self, adapters: Sequence[Adapter]) -> Iterator[dict[str, Adapter]]:
        """Adapters by name, all of them local until the end of the block.

        Raises:
            CollectionError: naming those that the Hub has no more.
            BudgetError: if the disk budget does not hold them together.
        """
        budget = self.plan.settings.disk_budget
        size = sum({e.source_id: e.hub_bytes for e in adapters if not e.fetched}.values())
        if budget is not None and size > budget:
            raise BudgetError(
                "the disk budget does not hold what is needed at a time", found=bytes_shown(budget),
                expected=bytes_shown(size), remedy=f"Use --disk-budget {-(-size >> 20)}MiB or more.",
            )  # fmt: skip
        lost: list[AdapterError] = []
        here = {adapter.name: adapter for adapter in self.arriving(adapters, lost)}
        check_none_lost(lost)
        yield here
        self.fetcher.release(here.values())


def _cut(part: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    return (part[i : i + size] for i in range(0, len(part), size))


def sample_of(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Sample of adapters, evenly spaced."""
    return [adapters[i * len(adapters) // SAMPLE] for i in range(SAMPLE)] if len(adapters) > SAMPLE else list(adapters)


def places_of(plan: Plan, folder: Path, out: Path, *, workspace: bool = True) -> Places:
    """Folders that the tasks of a plan read and write; those to be written are made.

    Args:
        plan: of the run.
        folder: of ours, where a mapper may leave files: the workspace, if there is one.
        out: the checkpoint.
        workspace: whether it is the workspace.
    """
    written = {folder.absolute(), out.absolute().parent}
    if _uses_cache(plan):
        written.add(cache_folder().absolute())
    for path in written:
        path.mkdir(parents=True, exist_ok=True)
    roots = {e.folder.parent: e.files[0] for e in plan.adapters if e.fetched and e.files}
    read = tuple((file.path, file.size) for file in list(roots.values())[:READ])
    note = folder.absolute() / IN_WORK if workspace else None
    return Places(folder.absolute(), tuple(sorted(written)), read, note)


def _uses_cache(plan: Plan) -> bool:
    """Whether adapters are fetched into the Hub's cache, or, under a disk budget, read from it."""
    awaited = [(e.origin.hub, f.path.name) for e in plan.adapters if e.origin and not e.fetched for f in e.files]
    if not awaited or plan.settings.disk_budget is None:
        return bool(awaited)
    return any(cached(hub_id, name) is not None for hub_id, name in awaited)


def check_none_lost(lost: Sequence[AdapterError]) -> None:
    """Check that no admitted adapter was lost on the Hub.

    Raises:
        CollectionError: naming those that the Hub has no more.
    """
    if lost:
        raise refusal(
            f"{len(lost)} adapters were admitted before, their values are needed again, and the Hub does not give them",
            lost,
            "Take them out by lorashare-stream remove, or wait until it does, and run the same command again.",
        )


def check_disk(plan: Plan, workspace: Path, out: Path, *, adds: bool = False, fetch: int = 0) -> None:
    """Check that the disks have room for a run, less what its folders hold already.

    Args:
        plan: of the run.
        workspace, out: its folders. A checkpoint that is replaced stays until another takes its place.
        adds: whether adapters may be added to the checkpoint that is there, which takes less.
        fetch: bytes that are fetched from the Hub.

    Raises:
        DiskError: with what is free and what is needed.
    """
    disks = _needs(plan, workspace, out, plan.sizes["moments"], adds=adds, fetch=fetch)
    if plan.grows and any(needed > free for needed, free in disks):  # less, perhaps, after a run that was killed
        disks = _needs(plan, workspace, out, _moments_left(plan, Workspace(workspace)), adds=adds, fetch=fetch)
    moments = "; or free moments when they are fitted, by --discard-moments" if plan.groups else ""
    budget_too = "; or free adapters after they are added, by --disk-budget" if fetch else ""
    for needed, free in disks:
        if needed > free:
            raise DiskError(
                "not enough disk for the workspace and the checkpoint" + (", and what is fetched" if fetch else ""),
                found=f"{bytes_shown(free)} free",
                expected=f"about {bytes_shown(needed)} more",
                remedy=f"Free some; put --workspace on another disk{moments}{budget_too}.",
            )


def _needs(plan: Plan, workspace: Path, out: Path, moments: int, *, adds: bool, fetch: int) -> list[tuple[int, int]]:
    """Bytes that are needed on each disk, and that are free there."""
    held = tree_bytes(workspace) - tree_bytes(workspace / HUB)
    needs = [(workspace, moments + plan.sizes["basis"] + plan.sizes["converted"] - held)]
    if not adds:
        needs.append((staging_folder(out), plan.sizes["checkpoint"] - tree_bytes(staging_folder(out))))
    budget = plan.settings.disk_budget
    if budget is not None:
        needs.append((workspace / FILES, min(budget, fetch) - tree_bytes(workspace / FILES)))
    elif fetch:
        needs.append((cache_folder(), fetch))
    free: dict[int, int] = {}
    needed: dict[int, int] = {}
    for folder, size in needs:
        disk, free[disk] = free_bytes(folder)
        needed[disk] = needed.get(disk, 0) + max(0, size)
    return [(size, free[disk]) for disk, size in needed.items()]


def _moments_left(plan: Plan, work: Workspace) -> int:
    """Bytes of moments at a time, by what a workspace has: none is replaced that is whole, or was never finished."""
    journal = work.journal()
    new = {e.name for e in plan.adapters} - {r.name for r in journal.admissions}
    stale = {module for module, marker in work.markers.items() if new or marker.entries < len(journal.entries)}
    modules = {group.module for group in plan.groups}
    if not stale and modules <= work.markers.keys() | work.discarded(modules):
        return tree_bytes(work.moments)
    return plan.sizes["moments"] - (0 if stale else plan.replaced_bytes)
