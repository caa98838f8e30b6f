"""Processes of this machine that end with the one that asked for them, and tell what they died of.

They are forked while this process has one thread and no torch, which takes 0.08 s; else a server forks them, which is
started once and has imported what tasks need, 0.55 s. All of them begin at once: a process that were made later would
be forked beside threads, or would import a script that has no main guard.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import connection
from multiprocessing.context import BaseContext
from types import ModuleType
from typing import Any

from . import lots
from .lots import VARIABLES, one_thread

LIBRARY = "zarr"  # what tasks import late, and a worker would have to for itself
_STOPPING = {signal.SIGINT, signal.SIGTERM}
_KEPT_BYTES = 16 << 20  # of freed memory; the C library keeps twice as much


class Processes(ProcessPoolExecutor):
    """Worker processes, all of them ready."""

    def __init__(self, count: int) -> None:
        context = _context()
        self._numbers = context.RawArray("q", [-1] * count)
        barrier = context.Barrier(count)
        super().__init__(count, context, _begin, (self._numbers, barrier, lots.PACKAGE.getEffectiveLevel()))
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
        import_module(LIBRARY)
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    package = lots.PACKAGE.name  # whoever asks for tasks has imported the modules that do them
    context.set_forkserver_preload([*(name for name in sys.modules if name.startswith(f"{package}.stages.")), LIBRARY])
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
    main, environment = sys.modules["__main__"], {name: os.environ[name] for name in VARIABLES if name in os.environ}
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ.update(dict.fromkeys(VARIABLES, "1"))  # of the server, which imports NumPy
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name in VARIABLES:
            del os.environ[name]
        os.environ.update(environment)


# -- in a worker -------------------------------------------------------------------------------------

_barrier: Any = None


def _begin(numbers: Any, barrier: Any, level: int) -> None:
    """Be a worker process: signals are the parent's affair, what is logged is its to show."""
    global _barrier
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    die_with_parent()
    one_thread()
    bytes(_KEPT_BYTES)  # freed, the C library maps no smaller piece anew: the next adapter needs as much again
    gc.freeze()
    lots.PACKAGE.handlers, lots.PACKAGE.propagate = [logging.NullHandler()], False
    lots.PACKAGE.setLevel(level)
    _barrier = barrier, numbers


def _ready() -> tuple[int, int]:
    """The process, and its slot among the numbers of tasks in work, once all are there."""
    barrier, numbers = _barrier
    lots.in_work, lots.slot = numbers, barrier.wait()
    return os.getpid(), lots.slot


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
