"""What a worker does: a lot of tasks, by a function that all tasks of a map share.

The function has with it what tasks share, which may be megabytes. It lies in one file, which every worker process reads
once; tasks come with their lots, so that a worker holds no others. What Dask scatters is lost with the last worker that
holds it; a file is there for any worker that joins or is started again. It is also the sign that somebody waits for the
results.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..errors import ClusterError, StreamError
from ..files import naming, sync

PACKAGE = logging.getLogger("lorashare_stream")
VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
ENDED = "the run that asked for a task has ended"
in_work: Any = {}  # slot -> number of the task in work, -1 if there is none; see `processes`
slot = 0
_thread = threading.local()


def one_thread() -> None:
    """Limit this thread, and BLAS, OpenMP and torch of its process, to one: their number decides the last bits."""
    torch = sys.modules.get("torch")  # not imported for this: what does not use it shall not pay for it
    if torch is not None:
        torch.set_num_threads(1)
    if getattr(_thread, "limited", False):
        return
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    import scipy.linalg.cython_blas  # noqa: F401 - loads its BLAS
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
    _thread.limited = True


@dataclass(frozen=True)
class Call:
    """What goes with every lot of a map: a function's name, and the file, its size and SHA-256, of what tasks share."""

    name: str
    file: Path
    size: int
    digest: str


@dataclass(frozen=True)
class Done:
    """What came of a lot: results up to the first error, that error, what was logged, seconds, and who did it."""

    results: list[Any]
    error: Exception | None = None
    records: list[logging.LogRecord] = field(default_factory=list)
    seconds: float = 0.0
    worker: str = ""


@contextmanager
def call_of(folder: Path, shared: Any, *, durable: bool = False) -> Iterator[Call]:
    """Write what tasks share, `(..., function)`, into a file of `folder` till the end of the block.

    Opening the workspace sweeps the file of a run that was killed, by its name.
    """
    data, fn = pickle.dumps(shared, pickle.HIGHEST_PROTOCOL), shared[-1]
    while isinstance(fn, partial):
        fn = fn.func
    name, path = getattr(fn, "__name__", type(fn).__name__), folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with naming(path):
            path.write_bytes(data)
        if durable:  # other hosts may read it
            sync(path)
        yield Call(name, path, len(data), hashlib.sha256(data).hexdigest())
    finally:
        path.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def loaded(call: Call) -> Any:
    """What a call shares, read and checked once in a process.

    Raises:
        ClusterError: if it is not what was written, or nobody waits any more.
    """
    try:
        data = call.file.read_bytes()
    except FileNotFoundError:
        raise ClusterError(ENDED) from None
    if hashlib.sha256(data).hexdigest() != call.digest:
        raise ClusterError("what tasks share is not what was written", found=call.file)
    return pickle.loads(data)  # noqa: S301 - by its digest, it is what the run has written


def perform(call: Call, first: int, lot: Sequence[Any]) -> Done:
    """Do a lot of tasks, with one thread of BLAS; `first` is the number of the first of them, for `in_work`."""
    one_thread()
    begun, results, error = time.perf_counter(), list[Any](), None
    with _heard() as records:
        try:
            *_, fn = loaded(call)
            for number, task in enumerate(lot, first):
                if not call.file.exists():
                    raise ClusterError(ENDED)
                in_work[slot] = number
                results.append(fn(task))
        except Exception as e:
            error = _sendable(e)
        finally:
            in_work[slot] = -1
    return Done(results, error, records, time.perf_counter() - begun)


def perform_here(fn: Callable[[Any], Any], lot: Sequence[Any]) -> Done:
    """Do a lot of tasks in the process that asks for it."""
    results: list[Any] = []
    try:
        results.extend(map(fn, lot))
    except Exception as e:
        return Done(results, e)
    return Done(results)


def _sendable(error: Exception) -> Exception:
    """An error as it comes out of a pickle; if that fails, which runs code of its own, what it says."""
    if not isinstance(error, StreamError):
        error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _heard() -> Iterator[list[logging.LogRecord]]:
    """What this thread logs, for the process that asks for a task to log."""
    records: list[logging.LogRecord] = []
    ear, thread = QueueHandler(SimpleQueue()), threading.get_ident()  # which makes records that can be sent
    ear.enqueue = records.append  # type: ignore[method-assign, assignment]
    ear.addFilter(lambda record: record.thread == thread)
    PACKAGE.addHandler(ear)
    try:
        yield records
    finally:
        PACKAGE.removeHandler(ear)
