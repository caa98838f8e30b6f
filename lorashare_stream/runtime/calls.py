"""What a worker of a cluster does with a task: the function comes from a file, the task by message.

The function has with it what all tasks of a map share, which may be megabytes, so that it goes neither with every task
nor through the scheduler. It lies in a file at a place that all workers see by demand, and every process reads it
once. Scattered data would be lost with the last worker that holds it, what another task returns would draw tasks to the
workers that hold it, and a plugin would come to workers that have nothing to do with us; a file is there for any
worker that joins or is started again. The file is also the sign that somebody still waits for the results.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import platform
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from threadpoolctl import OpenBLASController, threadpool_info, threadpool_limits

from ..errors import ClusterError, StreamError
from ..text import printable
from ..version import __version__
from .executors import Places

NOTES = 20  # lines of a task's log that come back with its result
SEEN_WITHIN = 3.0  # seconds in which a file that was just written must be seen elsewhere


@dataclass(frozen=True)
class Call:
    """A function that workers apply to tasks; this goes with every task.

    Attributes:
        file, digest: where it lies, with the places that a worker must see, and SHA-256 of that.
        version: of the package that wrote it.
        at_once: how many tasks a process may run at a time.
    """

    file: Path
    digest: str
    version: str
    at_once: int


@dataclass(frozen=True)
class Done:
    """What comes back of a task: its result, or an error of ours, which is final; who did it, in how many seconds."""

    result: Any
    error: StreamError | None
    worker: str
    seconds: float
    notes: tuple[tuple[int, str], ...]


def packed(task: Any) -> bytes:
    """A task as it goes to a worker: the header of an adapter repeats itself, and shrinks to an eighth."""
    return zlib.compress(pickle.dumps(task), 1)


def perform(call: Call, task: bytes) -> Done:
    """Do a task that was packed, with one thread. Errors of the machine are raised: elsewhere it may be done."""
    worker = _worker()
    notes: list[tuple[int, str]] = []
    result, error = None, None
    with _gate(call):
        begun = time.perf_counter()
        try:
            fn = _function(call, worker)
            with one_thread(), _heard(notes):
                result = fn(pickle.loads(zlib.decompress(task)))  # noqa: S301 - by our scheduler, from our run
        except StreamError as e:
            error = e
        seconds = time.perf_counter() - begun
    return Done(result, error, worker, seconds, tuple(notes))


def _worker() -> str:
    from distributed import get_worker

    try:
        return str(get_worker().address)
    except ValueError:
        return platform.node()


_lock = threading.Lock()


@lru_cache(maxsize=4)
def _gate_of(file: Path, at_once: int) -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(at_once)


def _gate(call: Call) -> threading.BoundedSemaphore:
    """Lets as many tasks of a call run in this process as its memory allows, if the process has more threads."""
    with _lock:  # two threads at once would be given a gate each
        return _gate_of(call.file, call.at_once)


def _function(call: Call, worker: str) -> Callable[[Any], Any]:
    """The function of a call, read and checked once in a process.

    Raises:
        ClusterError: if this worker has another version or does not see the places, or if nobody waits any more.
    """
    with _lock:
        fn = _loaded(call, worker)
    if not call.file.exists():
        raise ClusterError("the run that asked for a task has ended", found=worker)
    return fn


@lru_cache(maxsize=2)
def _loaded(call: Call, worker: str) -> Callable[[Any], Any]:
    check_version(worker, __version__, call.version)
    deadline = time.monotonic() + SEEN_WITHIN
    while not call.file.exists():
        if time.monotonic() > deadline:
            raise unseen(worker, [str(call.file)])
        time.sleep(0.1)
    data = call.file.read_bytes()
    if hashlib.sha256(data).hexdigest() != call.digest:
        raise ClusterError("what tasks share is not what was written", found=f"{call.file} on {worker}")
    places, fn = pickle.loads(data)  # noqa: S301 - by its digest, it is what the run has written
    missing = not_seen(places)
    if missing:
        raise unseen(worker, missing)
    known: Callable[[Any], Any] = fn
    return known


def check_version(worker: str, found: object, expected: str) -> None:
    """Demand that a worker has this version of the package.

    Raises:
        ClusterError: if it has another, or, `found` being an error, none.
    """
    if found != expected:
        what = f"{type(found).__name__}: {found}" if isinstance(found, BaseException) else f"version {printable(found)}"
        raise ClusterError(
            "a worker has another version of lorashare-stream", found=f"{what} on {worker}", expected=expected,
            remedy="Install the same version where workers run, and start them again.",
        )  # fmt: skip


def unseen(worker: str, missing: Sequence[str]) -> ClusterError:
    """The error for a worker that does not see what it must."""
    return ClusterError(
        "a worker does not see the same files, or may not write where it must",
        found=f"no {missing[0]} on {worker}",
        expected="sources, workspace and output on storage that all workers share, under the same paths",
        remedy="Put them there, or do without a cluster.",
    )


def not_seen(places: Places) -> list[str]:
    """The places that this process does not see, or cannot write to."""
    missing = [str(p) for p in places.written if not os.access(p, os.R_OK | os.W_OK | os.X_OK)]
    return missing + [str(path) for path, size in places.read if size_of(path) != size]


def size_of(path: Path) -> int | None:
    """Bytes of a file; None if it is not seen."""
    try:
        return path.stat().st_size
    except OSError:
        return None


async def look(places: Places, tokens: Sequence[Path], patience: float) -> dict[str, Any]:
    """What a worker is asked before any work: what it does not see, and what it computes with.

    A thread looks, since a file system that hangs must not stop the worker's event loop.

    Returns:
        `missing`, a list of paths, and `machine`, as `machine` has it.
    """
    import asyncio  # a worker of Dask has it; on its own it takes as long to import as NumPy

    try:
        missing = await asyncio.wait_for(asyncio.to_thread(_missing, places, tokens), patience)
    except TimeoutError:
        missing = [f"answer of the file system for {patience:.0f} s: {places.folder}"]
    return {"missing": missing, "machine": machine()}


def _missing(places: Places, tokens: Sequence[Path]) -> list[str]:
    deadline = time.monotonic() + SEEN_WITHIN
    waiting = [token for token in tokens if not token.exists()]
    while waiting and time.monotonic() < deadline:
        time.sleep(0.1)
        waiting = [token for token in waiting if not token.exists()]
    return [str(token.parent) for token in waiting] + not_seen(places)


def machine() -> dict[str, str]:
    """What decides the last bits of a result, on this machine."""
    import numpy as np
    import scipy
    import scipy.linalg.cython_blas  # loads its BLAS

    libraries = [lib for lib in threadpool_info() if lib["user_api"] == "blas"]
    kinds = {f"{lib['internal_api']} {lib['version']} {lib.get('architecture', '')}".strip() for lib in libraries}
    versions = {"Python": platform.python_version(), "NumPy": np.__version__, "SciPy": scipy.__version__}
    return {**versions, "BLAS": ", ".join(sorted(kinds)), "machine": platform.machine()}


@dataclass
class _Cap:
    """The limit on BLAS threads, which is of the whole process: set by the first task, lifted by the last one."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    limits: Any = None

    def enter(self) -> None:
        """A task begins."""
        with self.lock:
            self.users += 1
            if self.users == 1:
                with _control():
                    self.limits = threadpool_limits(1, user_api="blas")

    def leave(self) -> None:
        """A task has ended."""
        with self.lock:
            self.users -= 1
            if not self.users:
                with _control():
                    self.limits.restore_original_limits()


@contextmanager
def _control() -> Iterator[None]:
    """Set limits from any thread: since 3.8 threadpoolctl silently ignores all but the first that has set one."""
    give = getattr(OpenBLASController, "clear_controlling_thread", lambda force: None)
    give(force=True)
    yield
    give(force=True)


_cap = _Cap()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of BLAS, of OpenMP, and of torch if it is there: their number decides the last bits.

    The limit of BLAS holds for the process, so tasks that overlap share it; those of OpenMP, on which some builds of
    BLAS rest, and of torch hold for the calling thread.
    """
    torch = sys.modules.get("torch")  # not imported for this: what does not use it shall not pay for it
    before = None if torch is None else torch.get_num_threads()
    _cap.enter()
    try:
        with threadpool_limits(1, user_api="openmp"):
            if torch is not None:
                torch.set_num_threads(1)
            yield
    finally:
        if torch is not None:
            torch.set_num_threads(before)
        _cap.leave()


class _Ear(logging.Handler):
    """Hears what one thread logs."""

    def __init__(self, notes: list[tuple[int, str]]) -> None:
        super().__init__(logging.INFO)
        self._notes, self._thread = notes, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        if record.thread == self._thread and len(self._notes) < NOTES:
            self._notes.append((record.levelno, record.getMessage()))


@contextmanager
def _heard(notes: list[tuple[int, str]]) -> Iterator[None]:
    """Note what this thread logs, which nobody reads on a worker."""
    logger, ear = logging.getLogger("lorashare_stream"), _Ear(notes)
    logger.addHandler(ear)
    try:
        yield
    finally:
        logger.removeHandler(ear)
