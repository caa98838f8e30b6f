"""A plan, a mapper, who fetches and who watches: how tasks are mapped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..adapters.adapter import Adapter
from ..errors import AdapterError, BudgetError, refusal
from ..hub.client import Hub, cache_folder
from ..hub.fetch import Fetcher
from ..plan.memory import SAMPLE
from ..plan.plan import Plan
from ..runtime.executors import Mapper, Places
from ..runtime.progress import Progress
from ..text import bytes_shown
from ..workspace.workspace import IN_WORK

T = TypeVar("T")
R = TypeVar("R")
CHECKED_EVERY = 0.5  # seconds between two looks at the lock while tasks are done; what is published looks itself
LOT, LOT_BYTES = 16, 32 << 20  # adapters that go to a worker together, and what these read, at most
READ = 64  # files of sources that workers of a cluster are asked for, each in another folder


@dataclass(frozen=True)
class Run:
    """How the tasks of a plan are mapped; `check` raises if the workspace is no longer held."""

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
        """Results in the order of the tasks, as many at a time as the plan allows for this step."""
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
        """Modules in portions that are summed together; more and smaller ones than planned if a cluster is wider."""
        parts = self.plan.portions(modules)
        wide = self.mapper.width(self.plan.step("accumulate").concurrency)
        pieces = -(-wide // max(1, len(parts)))
        return [piece for part in parts for piece in _cut(part, -(-len(part) // pieces))]

    def sum(
        self, task: Callable[[Sequence[str]], Sequence[R]], modules: Sequence[str], done: Callable[[str, R], object]
    ) -> None:
        """Do a task for modules, in portions; `done` takes each module and what came of it; progress counts modules."""
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
        """Do all tasks, for what they leave on disk."""
        for _ in self.map(step, fn, tasks, len(tasks)):
            pass

    def arriving(self, adapters: Sequence[Adapter], lost: list[AdapterError]) -> Iterable[Adapter]:
        """Adapters as they come here, all at once if they are here already; why some cannot be had goes into `lost`."""
        return adapters if all(e.fetched for e in adapters) else self._arriving(adapters, lost)

    def _arriving(self, adapters: Sequence[Adapter], lost: list[AdapterError]) -> Iterator[Adapter]:
        for result in self.fetcher.arriving(adapters):
            if isinstance(result, AdapterError):
                lost.append(result)
            else:
                yield result

    def release(self, adapter: Adapter) -> None:
        """Say that the files of an adapter are not needed for now."""
        self.fetcher.release([adapter])

    @contextmanager
    def at_hand(self, adapters: Sequence[Adapter]) -> Iterator[dict[str, Adapter]]:
        """Adapters by name, all of them on this machine till the end of the block.

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
    """Some adapters, evenly spaced."""
    return [adapters[i * len(adapters) // SAMPLE] for i in range(SAMPLE)] if len(adapters) > SAMPLE else list(adapters)


def places_of(plan: Plan, folder: Path, out: Path, *, workspace: bool = True) -> Places:
    """Where the tasks of a plan read and write, which makes the folders to be written.

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
    """Whether adapters are fetched into the Hub's cache, or read from there, as under a disk budget what it has."""
    awaited = [(e.origin.hub, f.path.name) for e in plan.adapters if e.origin and not e.fetched for f in e.files]
    if not awaited or plan.settings.disk_budget is None:
        return bool(awaited)
    hub = Hub(offline=True)
    return any(hub.cached(hub_id, name) is not None for hub_id, name in awaited)


def check_none_lost(lost: Sequence[AdapterError]) -> None:
    """Demand adapters whose values are needed again.

    Raises:
        CollectionError: naming those that the Hub has no more.
    """
    if lost:
        raise refusal(
            f"{len(lost)} adapters were admitted before, their values are needed again, and the Hub does not give them",
            lost,
            "Take them out by lorashare-stream remove, or wait until it does, and run the same command again.",
        )
