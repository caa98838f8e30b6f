"""Worker processes: what each does with a lot of tasks, and those of this machine, which tell what they died of.

The function that all tasks of a map share may have megabytes with it. It lies in one file, which every worker process
reads once; tasks come with their lots, so that a worker holds no others. What Dask scatters is lost with its last
holder; a file is there for any worker that joins or is started again. It is also the sign that somebody waits for the
results.

Processes of this machine are forked while this one has one thread and no torch, which takes 0.08 s; else by a server,
which is started once and has imported what tasks need, 0.55 s. All begin at once: one that were made later would be
forked beside threads, or would import a script that has no main guard.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import logging
import multiprocessing
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from logging.handlers import QueueHandler
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

from ..errors import ClusterError, StreamError
from ..files import naming, sync

PACKAGE = logging.getLogger("lorashare_stream")
ENDED = "the run that asked for a task has ended"
_VARIABLES = [f"{name}_NUM_THREADS" for name in ("OPENBLAS", "OMP", "MKL", "BLIS")] + ["VECLIB_MAXIMUM_THREADS"]
_LIBRARY = "zarr"  # what tasks import late, and a worker would have to for itself
_STOPPING = {signal.SIGINT, signal.SIGTERM}
_KEPT_BYTES = 16 << 20  # of freed memory; the C library keeps twice as much

# -- a lot of tasks ------------------------------------------------------------------------------------

_in_work: Any = {}  # slot of a worker process -> number of its task, -1 if there is none
_slot = 0
_barrier: Any = None
_thread = threading.local()


@dataclass(frozen=True)
class Call:
    """What goes with every lot of a map: a function's name, and the file, its size and SHA-256, of what tasks share."""

    name: str
    file: Path
    size: int
    digest: str


@dataclass(frozen=True)
class Done:
    """What came of a lot: results up to the first error, that error, log records, seconds, and the worker."""

    results: list[Any]
    error: Exception | None = None
    records: list[logging.LogRecord] = field(default_factory=list)
    seconds: float = 0.0
    worker: str = ""


@contextmanager
def call_of(folder: Path, shared: tuple[Any, ...], *, durable: bool) -> Iterator[Call]:
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
    """What a call shares, read once in a process; raises ClusterError if it is damaged, or nobody waits any more."""
    try:
        data = call.file.read_bytes()
    except FileNotFoundError:
        raise ClusterError(ENDED) from None
    if hashlib.sha256(data).hexdigest() != call.digest:
        raise ClusterError("what tasks share is not what was written", found=call.file)
    return pickle.loads(data)  # noqa: S301 - by its digest, it is what the run has written


def perform(call: Call, first: int, lot: Sequence[Any]) -> Done:
    """Do a lot of tasks, with one thread of BLAS; `first` is the number of the first of them."""
    _limit_threads()
    begun, results, error = time.perf_counter(), list[Any](), None
    with _heard() as records:
        try:
            *_, fn = loaded(call)
            for number, task in enumerate(lot, first):
                if not call.file.exists():
                    raise ClusterError(ENDED)
                _in_work[_slot] = number
                results.append(fn(task))
        except Exception as e:
            error = _sendable(e)
        finally:
            _in_work[_slot] = -1
    return Done(results, error, records, time.perf_counter() - begun)


def perform_here(fn: Callable[[Any], Any], lot: Sequence[Any]) -> Done:
    """Do a lot of tasks in the process that asks for it."""
    results: list[Any] = []
    try:
        results.extend(map(fn, lot))
    except Exception as e:
        return Done(results, e)
    return Done(results)


def _limit_threads() -> None:
    """Limit this thread, and BLAS, OpenMP and torch of its process, to one: their number decides the last bits."""
    torch = sys.modules.get("torch")  # not imported for this: what does not use it shall not pay for it
    if torch is not None:
        torch.set_num_threads(1)
    if getattr(_thread, "limited", False):
        return
    os.environ.update(dict.fromkeys(_VARIABLES, "1"))
    import scipy.linalg.cython_blas  # noqa: F401 - loads its BLAS
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
    _thread.limited = True


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


# -- processes of this machine -------------------------------------------------------------------------


class Processes(ProcessPoolExecutor):
    """Worker processes, all of them ready."""

    def __init__(self, count: int) -> None:
        context = _context()
        self._numbers = context.RawArray("q", [-1] * count)
        super().__init__(
            count, context, _begin, (self._numbers, context.Barrier(count), PACKAGE.getEffectiveLevel())
        )  # fmt: skip
        try:
            gc.freeze()  # here and in the workers: a look through what they share would copy it
            with _starting(context):
                slots = dict(f.result() for f in [self.submit(_ready) for _ in range(count)])
        except BaseException:
            for process in [*self._processes.values()]:
                process.kill()
                process.join()
            self.shutdown(cancel_futures=True)
            raise
        self._slots = {process: slots[pid] for pid, process in self._processes.items()}

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor.shutdown`."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        gc.unfreeze()

    def deaths(self) -> list[tuple[int, int]]:
        """Exit codes of the processes that were killed, by others than us, and the numbers of the tasks in work."""
        self.shutdown()
        found = [(process.exitcode or 0, self._numbers[slot]) for process, slot in self._slots.items()]
        return [(code, number) for code, number in found if code not in (0, -signal.SIGTERM)]


def _context() -> BaseContext:
    """Fork where nothing is lost by it, else a server of forks; either has imported what workers need."""
    if sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1 and "torch" not in sys.modules:
        import_module(_LIBRARY)
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    stages = f"{PACKAGE.name}.stages."  # whoever asks for tasks has imported the modules that do them
    context.set_forkserver_preload([*(name for name in sys.modules if name.startswith(stages)), _LIBRARY])
    return context


@contextmanager
def _starting(context: BaseContext) -> Iterator[None]:
    """While processes begin: a forked one must not run our handlers of signals, a served one not our script."""
    if context.get_start_method() == "fork":
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    main, environment = sys.modules["__main__"], {name: os.environ.get(name) for name in _VARIABLES}
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ.update(dict.fromkeys(_VARIABLES, "1"))  # of the server, which imports NumPy
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name in _VARIABLES:
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if value is not None})


def _begin(numbers: Any, barrier: Any, level: int) -> None:
    """Be a worker process: signals are the parent's affair, what is logged is its to show."""
    global _in_work, _barrier
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    die_with_parent()
    _limit_threads()
    bytes(_KEPT_BYTES)  # freed, the C library maps no smaller piece anew: the next adapter needs as much again
    gc.freeze()
    PACKAGE.handlers, PACKAGE.propagate = [logging.NullHandler()], False
    PACKAGE.setLevel(level)
    _in_work, _barrier = numbers, barrier


def _ready() -> tuple[int, int]:
    """The process, and its slot, once all of them wait: each does this once."""
    global _slot
    _slot = _barrier.wait()
    return os.getpid(), _slot


def die_with_parent() -> None:
    """End this process when the one that made it ends, however that ends.

    A thread that watched would be deaf while SciPy holds the interpreter's lock, so the kernel watches: it signals that
    the pipe, of which only the parent has the other end, is closed.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    end = parent.sentinel
    if sys.platform != "linux":
        threading.Thread(target=lambda: (connection.wait([end]), os._exit(1)), daemon=True).start()
        return
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([end], [], [], 0)[0]:  # before that
        os._exit(1)
