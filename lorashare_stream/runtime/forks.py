"""Processes of this machine, forked for each map: threads wait for each other at the interpreter's lock.

A child has the function, the tasks and all that they share without being sent anything. It takes the number of its next
task from a pipe that all children read, so that none waits for the parent, and sends back what came of it. It has no
file of the parent's open, locks among them, and the kernel ends it when the parent ends, however that ends.

A lock that another thread holds while the process is forked is held for ever in a child, and libraries take locks when
they are told of a fork, huggingface_hub among them. So there must be no other thread that holds any.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import pickle
import select
import signal
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from ..errors import Stopped

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 8  # tasks a child that may be begun before the first result is taken: small ones take less than a switch
BEATING = "heartbeat"  # the thread that shows that a holder lives; it touches a file, and nothing else
_NUMBER = struct.Struct("<Q")
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_MAPPED_FROM, _TRIMMED_FROM = (-3, 16 << 20), (-1, 32 << 20)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PACKAGE = logging.getLogger("lorashare_stream")


def can_fork() -> bool:
    """Whether children can do what this process can: not where torch has threads of its own, or there are others."""
    own = (BEATING, "zarr_")  # zarr begins anew in a child
    others = {t for t in threading.enumerate() if t is not threading.current_thread() and not t.name.startswith(own)}
    return sys.platform == "linux" and "torch" not in sys.modules and not others


def map_forked(fn: Callable[[T], R], tasks: Sequence[T], at_once: int, after: Callable[[T], object]) -> Iterator[R]:
    """See `executors.Executor.map`. After an exception, tasks that run are waited for, others are dropped.

    Raises:
        Stopped: if a child was killed.
    """
    with _Children(fn, tasks, min(at_once, len(tasks))) as children:
        done: dict[int, R] = {}
        for number in range(len(tasks)):
            while number not in done:
                for finished, result in children.finished():
                    after(tasks[finished])
                    done[finished] = result
            yield done.pop(number)
            children.give(number + 1 + AHEAD * children.count)


@dataclass
class _Children:
    """Children that do tasks: numbers of tasks go to them by one pipe, results come back by one pipe each."""

    fn: Callable[[Any], Any]
    tasks: Sequence[Any]
    count: int
    _given: int = 0
    _results: dict[int, Connection[Any, Any]] = field(default_factory=dict)  # by their file descriptors
    _pids: dict[int, int] = field(default_factory=dict)  # likewise
    _ready: select.poll = field(default_factory=select.poll)

    def __enter__(self) -> _Children:
        self._numbers, self._to_do = os.pipe()
        try:
            self.give(AHEAD * self.count)
            for _ in range(self.count):
                self._fork()
        except BaseException as e:  # too many files or processes: those that are there must not stay
            self.__exit__(type(e), e, e.__traceback__)
            raise
        return self

    def _fork(self) -> None:
        results, sending = Pipe(duplex=False)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # the parent's handlers are not for a child
        try:
            with warnings.catch_warnings(), sending:
                warnings.simplefilter("ignore", DeprecationWarning)  # a thread that beats: see `can_fork`
                parent, pid = os.getpid(), os.fork()
                if not pid:
                    _live(self.fn, self.tasks, self._numbers, sending, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._results[results.fileno()], self._pids[results.fileno()] = results, pid
        self._ready.register(results, select.POLLIN)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the children end when they have done what they do now."""
        os.set_blocking(self._numbers, False)
        with suppress(BlockingIOError):
            while os.read(self._numbers, 1 << 16):  # what nobody has begun
                pass
        os.close(self._numbers)
        os.close(self._to_do)
        for results in self._results.values():
            results.close()  # a child does not wait to be heard
        for pid in self._pids.values():
            os.waitpid(pid, 0)

    def give(self, end: int) -> None:
        """Let tasks be begun up to number `end`."""
        end = min(end, len(self.tasks))
        if end > self._given:
            os.write(self._to_do, b"".join(map(_NUMBER.pack, range(self._given, end))))
            self._given = end

    def finished(self) -> Iterator[tuple[int, Any]]:
        """Wait for tasks to be done; their numbers, and what came of them."""
        for descriptor, _ in self._ready.poll():
            results = self._results[descriptor]
            try:
                number, result, error, records = pickle.loads(results.recv_bytes())  # noqa: S301 - by our child
            except EOFError:
                raise self._killed(descriptor) from None
            for record in records:
                logging.getLogger(record.name).handle(record)
            if error is not None:
                raise error
            yield number, result

    def _killed(self, descriptor: int) -> Stopped:
        status = os.waitpid(self._pids.pop(descriptor), 0)[1]
        code = os.waitstatus_to_exitcode(status)
        return Stopped(
            "a process of this run was killed",
            found=f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}",
            remedy="Mostly the machine has less memory than --memory says: give what is really free, or fewer "
            "--workers, and run the same command again. What is done is kept.",
        )


def _live(
    fn: Callable[[Any], Any], tasks: Sequence[Any], numbers: int, results: Connection[Any, Any], parent: int
) -> NoReturn:
    """Be a child: do tasks until there are no more numbers."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal: the parent decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        libc = ctypes.CDLL(None)
        libc.prctl(_DIES_WITH_PARENT, signal.SIGKILL)
        if hasattr(libc, "mallopt"):  # what is freed stays with the process: the next adapter needs as much again
            libc.mallopt(*_MAPPED_FROM)
            libc.mallopt(*_TRIMMED_FROM)
        if os.getppid() != parent:
            os._exit(1)
        _close_all_but(numbers, results.fileno())
        gc.freeze()  # to look at what is shared would copy it
        logged: SimpleQueue[logging.LogRecord] = SimpleQueue()
        _PACKAGE.handlers, _PACKAGE.propagate = [QueueHandler(logged)], False
        while number := os.read(numbers, _NUMBER.size):
            results.send_bytes(_done(fn, tasks, _NUMBER.unpack(number)[0], logged))
        code = 0
    except BrokenPipeError:  # nobody wants the result any more
        code = 0
    finally:
        os._exit(code)


def _done(fn: Callable[[Any], Any], tasks: Sequence[Any], number: int, logged: SimpleQueue[logging.LogRecord]) -> bytes:
    """Do a task: its number, its result, its error, and what it logged, as a pickle."""
    result, error = None, None
    try:
        result = fn(tasks[number])
    except BaseException as e:
        error = e
    records = [logged.get() for _ in range(logged.qsize())]
    try:
        return pickle.dumps((number, result, error, records), pickle.HIGHEST_PROTOCOL)
    except Exception as e:  # pickling runs code of a result's or an error's own, which may raise anything
        told = e if error is None else error
        return pickle.dumps((number, None, RuntimeError(f"{type(told).__name__}: {told}"), records))


def _close_all_but(*kept: int) -> None:
    """Close all files but the standard ones and some: locks of the parent must not outlive it."""
    first = 3
    for fd in sorted(kept):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
