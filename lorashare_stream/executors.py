"""Executors only map: `map(fn, tasks, at_once)` yields results in the order of the tasks.

`Serial` defines what the others must do. None of them knows what a task is. `after` is called with each task as soon as
it is done, which may be before its result is taken, and before the next task is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

from threadpoolctl import threadpool_limits

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
            yield from _in_order(pool.submit, fn, tasks, 2 * max(1, at_once), after)


class DaskClient:
    """A running Dask cluster. Tasks and what they refer to must be picklable, and all storage shared.

    Args:
        client: a `distributed.Client`, made and closed by the caller.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def map(
        self, fn: Callable[[T], R], tasks: Iterable[T], at_once: int, after: Callable[[T], object] = nothing
    ) -> Iterator[R]:
        """See `Executor.map`. Tasks are impure (they write files), so equal ones are not merged; all may be redone."""
        one_thread = partial(_with_one_blas_thread, fn)
        submit = partial(self._client.submit, pure=False, retries=2)
        yield from _in_order(submit, one_thread, tasks, at_once, after)


def executor_of(given: Any) -> Executor | None:
    """A `distributed.Client`, or what is an executor already."""
    return DaskClient(given) if hasattr(given, "submit") and hasattr(given, "scheduler") else given


def _with_one_blas_thread(fn: Callable[[T], R], task: T) -> R:
    """The thread count of BLAS decides the last bits; `pipeline.compress` sets it in its own process only."""
    with threadpool_limits(1, user_api="blas"):
        return fn(task)


def _in_order(
    submit: Callable[[Callable[[T], R], T], Future[R]],
    fn: Callable[[T], R],
    tasks: Iterable[T],
    ahead: int,
    after: Callable[[T], object],
) -> Iterator[R]:
    """Submit up to `ahead` tasks before the first result is taken; cancel what has not begun on the way out."""
    waiting: deque[Future[R]] = deque()
    try:
        for task in tasks:
            future = submit(fn, task)
            future.add_done_callback(partial(_call, after, task))
            waiting.append(future)
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _call(after: Callable[[T], object], task: T, future: Future[R]) -> None:
    if not future.cancelled():  # a task that was dropped will be done by another run
        after(task)
