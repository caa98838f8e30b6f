"""Maps tasks over a `concurrent.futures.Executor`: serial, processes of this machine, a Dask cluster, anybody's own.

`SerialExecutor` defines what the others must do; none of them knows what a task is. `executor_for` makes the one of a
run, first of all; `mapper_for` gives what maps over it, once it is known where tasks read and write.
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
from threading import Event
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from ..errors import Stopped, StreamError
from ..files import read_sealed, write_sealed
from ..text import listed
from .lots import Call, Done, call_of, perform, perform_here
from .processes import Processes

T = TypeVar("T")
R = TypeVar("R")
TWICE = 2  # deaths of processes at the same task, of which a run does not go on any more


def nothing(task: object) -> None:
    """What is done after a task if nothing is asked for."""


class SerialExecutor(Executor):
    """One call after the other, in this thread: `submit` returns when it is done."""

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
        processes: how many tasks run at a time at most.
        threads: whether they must be of this process, as a GPU demands.
    """
    with threadpool_limits(1, user_api="blas"):
        if given is not None:
            yield given
        elif threads:
            with ThreadPoolExecutor(processes, thread_name_prefix="lorashare-stream") as executor:
                yield executor
        else:
            with local_executor(processes) as executor:
                yield executor


def local_executor(processes: int) -> Executor:
    """So many processes of this machine.

    Raises:
        Stopped: if they cannot be begun, as one was killed.
    """
    try:
        return Processes(processes)
    except BrokenExecutor as e:
        raise killed(0, []) from e


@dataclass(frozen=True)
class Places:
    """Where tasks read and write, all of it absolute: what other machines must see as this one does.

    Attributes:
        folder: of ours, in which a mapper may leave files while it maps.
        written: folders that tasks, or what they need, are written to; they exist.
        read: some files that are read, and their sizes.
        note: file of the workspace that tells at which tasks processes died; None without a workspace.
    """

    folder: Path
    written: tuple[Path, ...]
    read: tuple[tuple[Path, int], ...] = ()
    note: Path | None = None


@contextmanager
def mapper_for(executor: Any, places: Callable[[], Places]) -> Iterator[Mapper]:
    """What maps tasks at some places over an executor, or a `distributed.Client`.

    Raises:
        ClusterError: if a cluster cannot do them.
    """
    client = executor if hasattr(executor, "scheduler_info") else getattr(executor, "_client", None)
    if client is None:
        known = places()
        mapper = Mapper(executor, known.folder, known.note)
    else:
        from .dask import mapper_on

        mapper = mapper_on(client, places())
    yield mapper
    if mapper.note is not None:  # all went well
        mapper.note.unlink(missing_ok=True)


@contextmanager
def local_mapper(executor: Executor) -> Iterator[Mapper]:
    """What maps tasks that write nothing, on this machine."""
    with TemporaryDirectory(prefix="lorashare-stream-") as folder:
        yield Mapper(executor, Path(folder))


@dataclass
class Lot:
    """Tasks that are done together.

    Attributes:
        first: number of the first, of all tasks of the mapper.
        tasks: they.
        message: what goes to the worker: which of those in the file, or the tasks themselves.
        future: when it is submitted, of what comes of it.
        said: set when `after` has been told of them.
        label: of them, for people.
    """

    first: int
    tasks: Sequence[Any]
    message: Any
    future: Future[Done] = field(default_factory=Future)
    said: Event = field(default_factory=Event)
    label: str = ""

    def tell(self, after: Callable[[Any], object], future: Future[Done]) -> None:
        """Call `after` with each task that is done: those that were dropped will be done by another run."""
        try:
            if not future.cancelled() and future.exception() is None:
                done = future.result()
                for task in self.tasks[: len(done.results) + (done.error is not None)]:
                    after(task)
        finally:
            self.said.set()


@dataclass
class Mapper:
    """Maps tasks over an executor.

    Attributes:
        executor: of the run.
        folder: where what tasks share is kept while they are mapped.
        note: see `Places`.
    """

    executor: Executor
    folder: Path
    note: Path | None = None
    _next: int = 0  # number of the task that comes next
    _every: float | None = None  # seconds between two looks at the executor
    _durable: bool = False  # whether what tasks share is read by other hosts

    def width(self, at_once: int) -> int:
        """How many tasks run at a time, now, if a process runs `at_once`."""
        return at_once

    def map(
        self,
        fn: Callable[[T], R],
        tasks: Iterable[T],
        at_once: int,
        after: Callable[[T], object] = nothing,
        lot: int = 1,
    ) -> Iterator[R]:
        """Results in the order of `tasks`.

        After an exception, what has not begun is dropped, and what runs is waited for.

        Args:
            fn: with what all tasks share; a function of a module, or a `partial` of one, where processes do them.
            tasks: asked for one by one, unless it is a sequence.
            at_once: how many run at a time; results of a few times as many wait to be taken.
            after: called with each task when it is done, before its result is taken, by any thread.
            lot: how many are sent to a worker together at most, if they are known and enough for all.

        Raises:
            Stopped: if a process was killed, naming what it did.
            StreamError: if it was killed for the second time at the same.
        """
        at_once = max(1, at_once)
        if isinstance(self.executor, SerialExecutor | ThreadPoolExecutor):
            singles = (Lot(0, (task,), ()) for task in tasks)
            yield from self._in_order(
                lambda lot: self.executor.submit(perform_here, fn, lot.tasks), singles, at_once, after
            )
            return
        known = list(tasks) if isinstance(tasks, Sequence) else None
        with call_of(self.folder, self._shared(fn, known, at_once), durable=self._durable) as call:
            size = 1 if known is None else max(1, min(lot, len(known) // (4 * self.width(at_once))))
            lots = self._lots(tasks, size, sent=known is None)
            yield from self._in_order(partial(self._submit, call), lots, at_once, after, call.file)

    def _lots(self, tasks: Iterable[T], size: int, *, sent: bool) -> Iterator[Lot]:
        """Tasks, `size` at a time; `sent` if they are not in the file."""
        remaining = iter(tasks)
        start = self._next
        while some := tuple(islice(remaining, size)):
            first, self._next = self._next, self._next + len(some)
            yield Lot(first, some, some if sent else range(first - start, self._next - start))

    def _in_order(
        self,
        submit: Callable[[Lot], Future[Done]],
        lots: Iterable[Lot],
        at_once: int,
        after: Callable[[Any], object],
        sign: Path | None = None,
    ) -> Iterator[Any]:
        """Submit some lots before the first result is taken; `sign` is gone when nobody waits any more."""
        waiting: deque[Lot] = deque()
        try:
            for lot in lots:
                lot.future = submit(lot)
                waiting.append(lot)
                lot.future.add_done_callback(partial(lot.tell, after))
                while waiting and (waiting[0].future.done() or self._is_full(waiting, at_once)):
                    yield from self._first(waiting, any_of=True)
            while waiting:
                yield from self._first(waiting)
        except BrokenExecutor as e:
            raise self._killed(waiting) from e
        finally:
            if sign is not None:
                sign.unlink(missing_ok=True)
            wait([lot.future for lot in waiting if not lot.future.cancel()])

    def _is_full(self, waiting: Sequence[Lot], at_once: int) -> bool:
        most = self._ahead(at_once)
        return len(waiting) >= 2 * most or sum(not lot.future.done() for lot in waiting) >= most

    def _first(self, waiting: deque[Lot], *, any_of: bool = False) -> Iterator[Any]:
        """The results of the first lot, if it is done; else wait for it, or for any."""
        head = waiting[0]
        if not head.future.done():
            open_ = [lot.future for lot in waiting if not lot.future.done()] if any_of else [head.future]
            wait(open_, self._every, FIRST_COMPLETED)
            self._look()
            return
        done = self._done(head)
        head.said.wait()
        waiting.popleft().future = Future()  # Dask would do again what is lost of results that somebody still holds
        for record in done.records:
            logging.getLogger(record.name).handle(record)
        yield from done.results
        if done.error is not None:
            raise done.error

    # -- what executors differ in --------------------------------------------------------------------

    def _shared(self, fn: Any, tasks: list[Any] | None, at_once: int) -> tuple[Any, ...]:
        """What lies in the file of a map, the function and the tasks last."""
        return fn, tasks

    def _submit(self, call: Call, lot: Lot) -> Future[Done]:
        return self.executor.submit(perform, call, lot.first, lot.message)

    def _ahead(self, at_once: int) -> int:
        """How many lots may be submitted and not done: twice as many where the executor itself runs no more."""
        own = getattr(self.executor, "_max_workers", None)
        return 2 * at_once if own is not None and own <= at_once else at_once

    def _look(self) -> None:
        """Look after the executor, now and then."""

    def _done(self, lot: Lot) -> Done:
        """What came of a lot that is done."""
        return lot.future.result()

    def _killed(self, waiting: Iterable[Lot]) -> StreamError:
        """The error for a process that was killed, which is noted in the workspace."""
        deaths = self.executor.deaths() if isinstance(self.executor, Processes) else []
        in_work = {lot.first + i: task for lot in waiting for i, task in enumerate(lot.tasks)}
        names = [name for _, number in deaths if number in in_work for name in names_of(in_work[number])]
        before = {} if self.note is None else read_sealed(self.note)
        counts = {name: before.get(name, 0) + 1 for name in names}
        if self.note is not None and names:
            with suppress(OSError):
                write_sealed(self.note, {**before, **counts})
        code = deaths[0][0] if deaths else 0
        return killed(code, [n for n in names if counts[n] >= TWICE] or names, final=TWICE in counts.values())


def names_of(task: Any) -> list[str]:
    """The names of what a task is of: an adapter, a module, several modules."""
    if isinstance(task, tuple | list):
        return [str(name) for name in task]
    return [str(getattr(task, "name", task))]


def killed(code: int, names: Sequence[str], *, final: bool = False) -> StreamError:
    """The error for a process that was killed; `final` if it was killed at the same before.

    Args:
        code: its exit code; 0 if that is not known.
        names: of what it did.
    """
    found = f"signal {Signals(-code).name}" if code < 0 else f"exit code {code}" if code else "no exit code"
    found += f", in work: {listed(names, 5)}" if names else ""
    if final:
        return StreamError(
            "a process of this run was killed twice at the same",
            found=found,
            remedy="Leave it out, if it is an adapter; or mend what kills it: mostly its file is cut short, or the "
            "machine has less memory than --memory says. What is done is kept.",
        )
    if -code == SIGBUS:
        remedy = "Mostly a file was cut short while it was read, or its disk fails: look after that"
    else:
        remedy = "Mostly the machine has less memory than --memory says: give what is really free, or fewer --workers"
    return Stopped(
        "a process of this run was killed", found=found,
        remedy=f"{remedy}, and run the same command again. What is done is kept.",
    )  # fmt: skip
