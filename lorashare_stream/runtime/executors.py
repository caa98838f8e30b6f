"""Executors only map: `map(fn, tasks, at_once)` yields results in the order of the tasks.

`Serial` defines what the others must do. None of them knows what a task is. `after` is called with each task as soon as
it is done, which may be before its result is taken, and before the next task is asked for. `Local` is what is used if
nothing is said. A `Cluster` is asked first whether it can work at some places (`at`), and is an executor there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .forks import can_fork, map_forked

T = TypeVar("T")
R = TypeVar("R")


def nothing(task: object) -> None:
    """What is done after a task if nothing is asked for."""


class Executor(Protocol):
    """What the pipeline needs of an executor."""

    def map(
        self, fn: Callable[[T], R], tasks: Iterable[T], at_once: int, after: Callable[[T], object] = nothing
    ) -> Iterator[R]:
        """Results in the order of `tasks`; at most `at_once` tasks run, or wait to be taken, at a time."""
        ...


@dataclass(frozen=True)
class Places:
    """Where tasks read and write, all of it absolute: what other machines must see as this one does.

    Attributes:
        folder: of ours, in which an executor may leave files while it maps.
        written: folders that tasks, or what they need, are written to; they exist.
        read: some files that are read, and their sizes.
    """

    folder: Path
    written: tuple[Path, ...]
    read: tuple[tuple[Path, int], ...] = ()


class Cluster(Protocol):
    """Other processes, perhaps on other machines, that are executors where they see the same files."""

    def at(self, places: Places) -> AbstractContextManager[Executor]:
        """An executor for tasks at these places, until the end of the block.

        Raises:
            ClusterError: if the cluster cannot do them.
        """
        ...


def at(executor: Executor | Cluster, places: Callable[[], Places]) -> AbstractContextManager[Executor]:
    """The executor for tasks at some places, which only a cluster asks for."""
    return executor.at(places()) if hasattr(executor, "at") else nullcontext(executor)


def width(executor: Executor, at_once: int) -> int:
    """How many tasks an executor runs at a time, now, if a process runs `at_once`."""
    return int(executor.width(at_once)) if hasattr(executor, "width") else at_once


class Serial:
    """One task after the other, in this thread."""

    def map(
        self, fn: Callable[[T], R], tasks: Iterable[T], at_once: int = 1, after: Callable[[T], object] = nothing
    ) -> Iterator[R]:
        """See `Executor.map`."""
        for task in tasks:
            result = fn(task)
            after(task)
            yield result


class Threads:
    """Threads of this process. BLAS, hashing and reading release the interpreter's lock."""

    def map(
        self, fn: Callable[[T], R], tasks: Iterable[T], at_once: int, after: Callable[[T], object] = nothing
    ) -> Iterator[R]:
        """See `Executor.map`. After an exception, tasks that run are waited for, others are dropped.

        A single task at a time has a thread of its own too: the main one is free for signals.
        """
        with ThreadPoolExecutor(max(1, at_once), thread_name_prefix="lorashare-stream") as pool:
            ahead = 2 * max(1, at_once)
            yield from in_order(lambda task: pool.submit(fn, task), tasks, lambda: ahead, Future.result, after)


class Forks:
    """Processes of this machine, for tasks that are known beforehand; see `forks`."""

    def map(
        self, fn: Callable[[T], R], tasks: Iterable[T], at_once: int, after: Callable[[T], object] = nothing
    ) -> Iterator[R]:
        """See `Executor.map`."""
        return map_forked(fn, tasks if isinstance(tasks, Sequence) else list(tasks), at_once, after)


class Local:
    """This machine: processes for several tasks that are known, where they can be; else threads."""

    def map(
        self, fn: Callable[[T], R], tasks: Iterable[T], at_once: int, after: Callable[[T], object] = nothing
    ) -> Iterator[R]:
        """See `Executor.map`."""
        forks = isinstance(tasks, Sequence) and min(at_once, len(tasks)) > 1 and can_fork()
        return (Forks() if forks else Threads()).map(fn, tasks, at_once, after)


def in_order(
    submit: Callable[[T], Any],
    tasks: Iterable[T],
    ahead: Callable[[], int],
    taken: Callable[[Any], R],
    after: Callable[[T], object],
) -> Iterator[R]:
    """Submit some tasks before the first result is taken; cancel what has not begun on the way out.

    Args:
        submit: gives the future of a task.
        tasks: asked for one by one.
        ahead: how many are submitted, now.
        taken: waits for a future and gives its result.
        after: called with each task when its future is done.
    """
    waiting: deque[Any] = deque()
    try:
        for task in tasks:
            future = submit(task)
            future.add_done_callback(partial(_call, after, task))
            waiting.append(future)
            while len(waiting) >= ahead():
                yield taken(waiting.popleft())
        while waiting:
            yield taken(waiting.popleft())
    finally:
        for future in waiting:
            future.cancel()


def _call(after: Callable[[T], object], task: T, future: Any) -> None:
    if not future.cancelled():  # a task that was dropped will be done by another run
        after(task)
