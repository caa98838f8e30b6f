"""A running Dask cluster as an executor: nothing but tasks goes to it, and nothing but receipts comes back."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from ..errors import ClusterError, UnreachableClusterError
from ..files import naming
from ..text import counted, listed, printable
from ..version import __version__
from .calls import Call, Done, packed, perform, size_of
from .executors import Cluster, Executor, Places, in_order, nothing
from .probing import cannot_run, check_some, check_workers, lost

T = TypeVar("T")
R = TypeVar("R")
EVERY = 1.0  # seconds between two looks at who is there
STALE = 86400.0  # seconds after which what a killed run has left for workers is removed
DESERTED = 300.0  # seconds without any worker after which a run ends
RETRIES = 2  # of a task that failed for the machine's sake; all of ours may be done again
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DaskClient:
    """A running Dask cluster, whose workers see the same storage.

    Attributes:
        client: a `distributed.Client`, made and closed by the caller.
    """

    client: Any

    @contextmanager
    def at(self, places: Places) -> Iterator[Executor]:
        """See `Cluster.at`. All workers are asked now; those that come later, with their first task."""
        places = replace(places, read=tuple(file for file in places.read if size_of(file[0]) == file[1]))
        check_workers(self.client, places)
        yield _DaskMap(self.client, places, _Watch(self.client))

    def widest(self) -> int:
        """Threads of the worker process that has most.

        Raises:
            UnreachableClusterError: if there are no workers.
        """
        check_some(self.client)
        return max(self.client.nthreads().values(), default=1)


def workers_of(executor: Executor | Cluster | None) -> dict[str, int]:
    """The setting `workers` for a cluster, if nothing is said of it: as many as a process has threads."""
    return {"workers": executor.widest()} if isinstance(executor, DaskClient) else {}


def executor_of(given: Any) -> Executor | Cluster | None:
    """A `distributed.Client`, or what is an executor already."""
    return DaskClient(given) if hasattr(given, "submit") and hasattr(given, "scheduler") else given


@dataclass(frozen=True)
class _DaskMap:
    """The executor that a cluster is at some places."""

    client: Any
    places: Places
    watch: _Watch

    def width(self, at_once: int) -> int:
        """See `executors.width`."""
        return max(1, self.watch.width(at_once))

    def map(
        self, fn: Callable[[T], R], tasks: Iterable[T], at_once: int, after: Callable[[T], object] = nothing
    ) -> Iterator[R]:
        """See `Executor.map`; `at_once` is for each worker process. All tasks may be redone, elsewhere too.

        Tasks are impure (they write files), so equal ones are not merged.

        Raises:
            UnreachableClusterError: if the scheduler is lost, or all workers stay away.
            ClusterError: if workers die of a task.
        """
        name = _name(fn)
        labels: dict[str, str] = {}

        def submit(task: T) -> Any:
            key = f"{name}-{uuid.uuid4().hex}"  # Dask keeps the mean time of what has the same name
            labels[key] = listed(task, 3) if isinstance(task, tuple) else printable(getattr(task, "name", task), 80)
            return self.client.submit(perform, call, packed(task), key=key, pure=False, retries=RETRIES)

        def taken(future: Any) -> R:
            done = _result(future, labels[future.key], self.watch)
            _tell(name, labels.pop(future.key), done)
            if done.error is not None:
                raise done.error
            result: R = done.result
            return result

        with _shared(self.places, fn, max(1, at_once)) as call:
            yield from in_order(submit, tasks, lambda: self.watch.ahead(at_once), taken, after)


def _name(fn: Any) -> str:
    while isinstance(fn, partial):
        fn = fn.func
    return str(getattr(fn, "__name__", type(fn).__name__))


def _tell(name: str, label: str, done: Done) -> None:
    log.info("%s %s: %.2f s on %s", name, label, done.seconds, done.worker)
    for level, text in done.notes:
        log.log(level, "%s: %s", done.worker, text)


def _result(future: Any, label: str, watch: _Watch) -> Done:
    """What a task gives, however long it takes, as long as there is somebody to do it."""
    from distributed import KilledWorker

    try:
        while not future.done():
            with suppress(TimeoutError):  # one of the task itself is raised below
                future.result(timeout=EVERY)
            watch.look()
        done: Done = future.result()
    except CancelledError as e:
        raise lost(e) from e
    except (ImportError, AttributeError) as e:  # of one that came later
        raise cannot_run("one that came later", e) from e
    except KilledWorker as e:
        raise ClusterError(
            "several workers died one after the other while they did the same task",
            found=f"task {label}, at last on {e.last_worker.address}",
            remedy="Mostly they exceed their memory limit: give workers more, or this command less by --memory, which "
            "is for each worker process; their logs tell. What is done is kept.",
        ) from e
    return done


@dataclass
class _Watch:
    """Who is there, looked at now and then."""

    client: Any
    threads: dict[str, int] = field(default_factory=dict)
    looked: float = 0.0
    deserted: float | None = None
    told: set[int] = field(default_factory=set)

    def ahead(self, at_once: int) -> int:
        """How many tasks are to be with the scheduler: two for each that can run, so that no worker waits for us."""
        return max(2, 2 * self.width(at_once))

    def width(self, at_once: int) -> int:
        """How many tasks can run at a time, if a process runs `at_once`."""
        self.look()
        if at_once not in self.told and any(n > at_once for n in self.threads.values()):
            self.told.add(at_once)
            log.info("workers have more threads than the %d tasks that --memory and --workers allow a process", at_once)
        return sum(min(n, at_once) for n in self.threads.values())

    def look(self) -> None:
        """See who is there, and say it when it changes.

        Raises:
            UnreachableClusterError: if nobody has been there for long.
        """
        now = time.monotonic()
        if now - self.looked < EVERY:
            return
        try:
            found = dict(self.client.nthreads())
        except (OSError, CancelledError) as e:
            raise lost(e) from e
        self.looked = time.monotonic()
        if len(found) != len(self.threads):
            log.info("the cluster has %s", counted(len(found), "worker"))
        self.threads = found
        if found:
            self.deserted = None
            return
        if self.deserted is None:
            self.deserted = now
            log.warning("the cluster has no workers any more: waiting %.0f s for some to come", DESERTED)
        if now - self.deserted > DESERTED:
            raise UnreachableClusterError(
                "the cluster has no workers any more", found=f"none for {DESERTED:.0f} s",
                remedy="What is done is kept: start some, and run the same command again.",
            )  # fmt: skip


# -- what the tasks of a map share, in a file ------------------------------------------------------------

_files: dict[Path, IO[bytes]] = {}  # of this process


@contextmanager
def _shared(places: Places, fn: Callable[..., Any], at_once: int) -> Iterator[Call]:
    """The function of a map in a file that workers see, till the end of the block; see `calls`.

    Its writer holds the kernel's lock on it, so that a file whose writer was killed is known.
    """
    from distributed.protocol.pickle import dumps

    _sweep(places.folder)
    data: bytes = dumps((places, fn))  # type: ignore[no-untyped-call]
    path = places.folder / f".{uuid.uuid4().hex}.call"
    with naming(path), path.open("xb") as file:
        _files[path] = file
        try:
            with suppress(OSError):  # a file system without: nothing is swept there
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # other hosts may read it
            yield Call(path, hashlib.sha256(data).hexdigest(), __version__, at_once)
        finally:
            _files.pop(path, None)
            path.unlink(missing_ok=True)


def let_go() -> None:
    """Take away what this process has left for workers: it is about to end."""
    for path in list(_files):
        with suppress(OSError):
            path.unlink()


def _sweep(folder: Path) -> None:
    """Remove what killed runs have left."""
    for path in folder.glob(".*.call"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(file.fileno()).st_mtime > STALE:  # this kernel may not know of other hosts' locks
                path.unlink()
