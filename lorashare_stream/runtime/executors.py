"""Executors: maps of tasks, in order, over a `concurrent.futures.Executor`.

`SerialExecutor` defines what processes of this machine, a Dask cluster or a caller's own executor must do; none of them
knows what a task is. `executor_for` makes the executor of a run, before anything else; `mapper_for` maps over it, once
the places of tasks are known.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from signal import SIGBUS, Signals
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

from threadpoolctl import threadpool_limits

from ..errors import Stopped, StreamError
from ..files import read_sealed, write_sealed
from ..text import listed
from .processes import Call, Done, Processes, call_of, perform, perform_here

T = TypeVar("T")
R = TypeVar("R")
TWICE = 2  # deaths of processes at one task, after which a rerun would not help
EVERY = 1.0  # seconds between two counts of workers


class SerialExecutor(Executor):
    """Executor of one call after the other, in this thread: `submit` returns when the call is done."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """See `Executor.submit`."""
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as e:
            future.set_exception(e)
        return future


@contextmanager
def executor_for(given: Any, processes: int, *, threads: bool = False) -> Iterator[Executor]:
    """The executor of a run, till the end of the block, in which BLAS has one thread.

    Args:
        given: an `Executor` or a `distributed.Client`, the caller's to close; None for one of this machine.
        processes: tasks at a time, at most.
        threads: whether they must be of this process, as a GPU demands.
    """
    with threadpool_limits(1, user_api="blas"):
        if given is not None:
            yield given
            return
        with ThreadPoolExecutor(processes, "lorashare-stream") if threads else local_executor(processes) as executor:
            yield executor


def local_executor(processes: int) -> Executor:
    """Processes of this machine; raises Stopped if one is killed while they begin."""
    try:
        return Processes(processes)
    except BrokenExecutor as e:
        raise killed(0, []) from e


@dataclass(frozen=True)
class Places:
    """Paths of tasks, all absolute: other machines must see them as this one does.

    Attributes:
        folder: of ours, for files of a mapper while it maps.
        written: folders that tasks, or what they need, are written to; they exist.
        read: some files that are read, and their sizes.
        note: file of the workspace with the tasks at which processes died; None without a workspace.
    """

    folder: Path
    written: tuple[Path, ...] = ()
    read: tuple[tuple[Path, int], ...] = ()
    note: Path | None = None


@contextmanager
def mapper_for(executor: Any, places: Places) -> Iterator[Mapper]:
    """A mapper over an executor, or a `distributed.Client`; raises ClusterError if a cluster cannot do the work."""
    client = executor if hasattr(executor, "scheduler_info") else getattr(executor, "_client", None)
    if client is None:
        mapper = Mapper(executor, places)
    else:
        from .dask import mapper_on

        mapper = mapper_on(client, places)
    yield mapper
    if places.note is not None:  # all went well
        places.note.unlink(missing_ok=True)


@contextmanager
def local_mapper(executor: Executor) -> Iterator[Mapper]:
    """A mapper of tasks that write nothing, on this machine."""
    with TemporaryDirectory(prefix="lorashare-stream-") as folder:
        yield Mapper(executor, Places(Path(folder)))


@dataclass
class Lot:
    """Tasks that are done together.

    Attributes:
        first: number of the first, of all tasks of the map.
        told: done when `future` is, and `after` was called.
    """

    first: int
    tasks: Sequence[Any]
    future: Future[Done] = field(default_factory=Future)
    told: Future[None] = field(default_factory=Future)
    label: str = ""

    def tell(self, after: Callable[[Any], object] | None, future: Future[Done]) -> None:
        """Call `after` with each task that is done: those that were dropped will be done by another run."""
        try:
            if after is not None and not future.cancelled() and future.exception() is None:
                done = future.result()
                for task in self.tasks[: len(done.results) + (done.error is not None)]:
                    after(task)
        finally:
            self.told.set_result(None)


def _lots(tasks: Iterable[Any], size: int) -> Iterator[Lot]:
    remaining, first = iter(tasks), 0
    while some := tuple(islice(remaining, size)):
        yield Lot(first, some)
        first += len(some)


@dataclass
class Mapper:
    """A map of tasks over an executor; `cluster` tells whether other machines do them."""

    cluster: ClassVar[bool] = False
    executor: Executor
    places: Places

    def width(self, at_once: int) -> int:
        """Tasks at a time, now, if a process runs `at_once`."""
        return at_once

    def map(
        self, fn: Callable[[T], R], tasks: Iterable[T], at_once: int,
        after: Callable[[T], object] | None = None, lot: int = 1,
    ) -> Iterator[R]:  # fmt: skip
        """Results in the order of `tasks`.

        After an exception, what has not begun is dropped, and what runs is waited for.

        Args:
            fn: with what all tasks share; a function of a module, or a `partial` of one, where processes do them.
            tasks: asked for one by one, unless it is a sequence.
            at_once: tasks at a time; results of a few times as many wait to be taken.
            after: called with each task when it is done, before its result is taken, by any thread.
            lot: tasks that go to a worker together, at most, if they are a sequence that is long enough for all.

        Raises:
            Stopped: if a process was killed, naming what it did.
            StreamError: if it was killed for the second time at the same.
        """
        at_once = max(1, at_once)
        if isinstance(self.executor, SerialExecutor | ThreadPoolExecutor):
            here = partial(self.executor.submit, perform_here, fn)
            yield from self._in_order(lambda lot: here(lot.tasks), _lots(tasks, 1), at_once, after)
            return
        size = max(1, min(lot, len(tasks) // (4 * self.width(at_once)))) if isinstance(tasks, Sequence) else 1
        with call_of(self.places.folder, (self.places, at_once, fn), durable=self.cluster) as call:
            yield from self._in_order(partial(self._submit, call), _lots(tasks, size), at_once, after, call.file)

    def _in_order(
        self, submit: Callable[[Lot], Future[Done]], lots: Iterator[Lot], at_once: int,
        after: Callable[[Any], object] | None, sign: Path | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """Submit some lots before the first result is taken; `sign` is gone when nobody waits any more."""
        waiting, more = deque[Lot](), True
        own = getattr(self.executor, "_max_workers", None)  # it may itself run no more, as workers of a cluster do
        ahead = 2 if self.cluster or (own is not None and own <= at_once) else 1
        try:
            while more or waiting:
                most = ahead * self.width(at_once)
                open_lots = [lot.told for lot in waiting if not lot.told.done()]
                if waiting and waiting[0].told.done():
                    yield from self._results(waiting)
                elif more and len(waiting) < 2 * most and len(open_lots) < most:
                    if more := (lot := next(lots, None)) is not None:
                        lot.future = submit(lot)
                        waiting.append(lot)
                        lot.future.add_done_callback(partial(lot.tell, after))
                else:
                    wait(open_lots, EVERY, FIRST_COMPLETED)
        except BrokenExecutor as e:
            raise self._killed(waiting) from e
        finally:
            if sign is not None:
                sign.unlink(missing_ok=True)
            wait([lot.future for lot in waiting if not lot.future.cancel()])

    def _results(self, waiting: deque[Lot]) -> Iterator[Any]:
        """The results of the first lot, which is done."""
        done = self._done(waiting[0])
        waiting.popleft().future = Future()  # Dask would do again what is lost of results that somebody still holds
        for record in done.records:
            logging.getLogger(record.name).handle(record)
        yield from done.results
        if done.error is not None:
            raise done.error

    def _submit(self, call: Call, lot: Lot) -> Future[Done]:
        return self.executor.submit(perform, call, lot.first, lot.tasks)

    def _done(self, lot: Lot) -> Done:
        return lot.future.result()

    def _killed(self, waiting: Iterable[Lot]) -> StreamError:
        """The error for a process that was killed, which is noted in the workspace."""
        note = self.places.note
        deaths = self.executor.deaths() if isinstance(self.executor, Processes) else []
        in_work = {lot.first + i: task for lot in waiting for i, task in enumerate(lot.tasks)}
        names = [name for _, number in deaths if number in in_work for name in names_of(in_work[number])]
        before = {} if note is None else read_sealed(note)
        counts = {name: before.get(name, 0) + 1 for name in names}
        if note is not None and names:
            with suppress(OSError):
                write_sealed(note, {**before, **counts})
        again = [name for name in names if counts[name] >= TWICE]
        return killed(deaths[0][0] if deaths else 0, again or names, final=bool(again))


def names_of(task: Any) -> list[str]:
    """Names of a task's adapter, module, or several modules."""
    return [str(n) for n in task] if isinstance(task, tuple | list) else [str(getattr(task, "name", task))]


def killed(code: int, names: Sequence[str], *, final: bool = False) -> StreamError:
    """The error for a process that ended with a code, 0 if unknown, in work on names; `final` at the second time."""
    found = f"signal {Signals(-code).name}" if code < 0 else f"exit code {code}" if code else "no exit code"
    found += f", in work: {listed(names, 5)}" if names else ""
    kept = "What is done is kept."
    if final:
        return StreamError(
            "a process of this run was killed twice at the same", found=found,
            remedy="Leave it out, if it is an adapter; or mend what kills it: mostly its file is cut short, or the "
            f"machine has less memory than --memory says. {kept}",
        )  # fmt: skip
    remedy = "Mostly the machine has less memory than --memory says: give what is really free, or fewer --workers"
    if -code == SIGBUS:
        remedy = "Mostly a file was cut short while it was read, or its disk fails: look after that"
    remedy += f", and run the same command again. {kept}"
    return Stopped("a process of this run was killed", found=found, remedy=remedy)
