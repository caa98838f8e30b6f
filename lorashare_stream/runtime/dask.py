"""Dask clusters: found or started, asked before any work, mapped over by their own executor.

Only tasks go to a cluster, and only small results come back.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import pkgutil
import platform
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ClusterError, StreamError, UnreachableClusterError, UsageError
from ..files import read_json
from ..text import counted, listed, printable
from ..version import __version__
from .executors import EVERY, Lot, Mapper, Places, names_of
from .processes import Call, Done, die_with_parent, loaded, perform

PATIENCE = 10.0  # seconds for a scheduler or a worker to come, and for an answer
SEEN_WITHIN = 3.0  # seconds in which a file that was just written must be seen elsewhere
DESERTED = 300.0  # seconds without any worker after which a run ends
RETRIES = 2  # of a lot that failed for the machine's sake; all of ours may be done again
log = logging.getLogger(__name__)


# -- a cluster, found or started -----------------------------------------------------------------------


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """A client of a running cluster, by the address of its scheduler, or the file of `dask scheduler --scheduler-file`.

    Raises:
        UnreachableClusterError: if the scheduler does not answer.
        UsageError: if it is no address.
    """
    dask = _distributed()
    try:
        if os.path.isfile(address):  # Dask would wait for a damaged one to be mended
            address = read_json(Path(address))["address"]
        if not isinstance(address, str) or not address:  # for which Dask would start a cluster of its own
            raise ValueError("not an address")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other versions: what matters of them is asked for
            client = dask.Client(address, timeout=PATIENCE, set_as_default=False)
    except OSError as e:
        expected, remedy = "a dask scheduler that runs there", "Start it, and workers"
        raise _unreachable("the scheduler does not answer", address, remedy, expected) from e
    except (ValueError, TypeError, KeyError) as e:  # of Dask's, or of the file
        raise UsageError(
            "no address of a scheduler", found=repr(address), expected="tcp://HOST:PORT, or its --scheduler-file"
        ) from e
    with client:
        yield client


@contextmanager
def started(workers: int) -> Iterator[Any]:
    """A client of a cluster on this machine, of so many processes, which end with this one however it ends.

    They have a thread each, and no memory limit of Dask's, which counts mapped files and kills: memory is planned.
    """
    if workers < 1:
        raise UsageError("no number of worker processes", found=workers, expected="1 or more")
    dask = _distributed()
    cluster = dask.LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None,
        memory_limit=0, silence_logs=logging.ERROR, preload=__name__,
    )  # fmt: skip
    with cluster, dask.Client(cluster, timeout=PATIENCE, set_as_default=False) as client:
        yield client


def dask_setup(worker: Any) -> None:
    """Dask calls this in a worker that we started, whose own watch over its parent is a thread."""
    die_with_parent()


def _distributed() -> Any:
    """The library, whose own logging, which it sets up when it is imported, is of errors only.

    A client that could not connect closes itself when it is collected; while another starts, that waits for ever for a
    lock of the library.
    """
    import distributed

    gc.collect()
    for name in ("distributed", "tornado"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return distributed


def workers_of(client: Any) -> dict[str, int]:
    """The default of the setting `workers` for a cluster, the threads of a process; empty for an executor."""
    if not hasattr(client, "nthreads"):
        return {}
    _demand_some(client)
    return {"workers": max(client.nthreads().values(), default=1)}


# -- whether it can do the work ------------------------------------------------------------------------


def mapper_on(client: Any, places: Places) -> Mapper:
    """A mapper over a cluster. All workers are asked now; those that come later, with their first task.

    Raises:
        UnreachableClusterError: if there are no workers, or one does not answer.
        ClusterError: if one has another version or does not see the places, naming it.
    """
    places = replace(places, read=tuple(f for f in places.read if _size(f[0]) == f[1]))
    _demand_some(client)
    for worker, version in _asked(client, pkgutil.resolve_name, "lorashare_stream.version:__version__").items():
        _check_version(worker, version)
    # a folder of the same name on another disk has not the same new file; a killed run's are swept as its others
    tokens = {folder / f".{uuid.uuid4().hex}.tmp": folder for folder in places.written}
    try:
        for token in tokens:
            token.touch()
        known = replace(places, read=(*places.read, *((token, 0) for token in tokens)))
        found = _asked(client, pickle.loads, pickle.dumps(_There(look, known)))
    finally:
        for token in tokens:
            token.unlink(missing_ok=True)
    for worker, answer in found.items():
        if isinstance(answer, BaseException):
            raise _unfit(worker, answer, "cannot run this package")
        _check_seen(worker, [str(tokens.get(Path(missing), missing)) for missing in answer[0]])
    _warn_of_others({worker: answer[1] for worker, answer in found.items()})
    return _DaskMapper(client.get_executor(pure=False, retries=RETRIES), places, client)


def _demand_some(client: Any) -> None:
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError:
        found = f"none in {PATIENCE:.0f} s at {client.scheduler.address}"
        raise _unreachable("the cluster has no workers", found, "Start some, by dask worker ADDRESS") from None
    except OSError as e:
        raise _lost(e) from e


def _asked(client: Any, fn: Any, *args: Any) -> dict[str, Any]:
    """Worker -> its answer, or its exception; of those that left meanwhile, nothing."""
    from distributed.comm.core import CommClosedError

    silent = "a worker does not answer"
    try:
        answers = client.sync(client.run, fn, *args, on_error="return", callback_timeout=PATIENCE)
        there = client.nthreads()
    except TimeoutError:  # those that showed no sign of life for some time; all, if that tells nothing
        workers = client.scheduler_info(n_workers=-1)["workers"]
        seen = {worker: facts["last_seen"] for worker, facts in workers.items()}
        stuck = [w for w, at in seen.items() if at < max(seen.values()) - PATIENCE / 2] or [*seen]
        found = f"none in {PATIENCE:.0f} s by {listed(stuck)}"
        raise _unreachable(silent, found, "End it, or wait until it does") from None
    except (OSError, CancelledError) as e:
        raise _lost(e) from e
    answers = {worker: answer for worker, answer in answers.items() if worker in there}
    for worker, answer in answers.items():
        if isinstance(answer, ConnectionError | TimeoutError | CommClosedError):
            raise _unreachable(silent, f"{_text(answer)} on {worker}")
    return answers


def look(places: Places) -> tuple[list[str], dict[str, str]]:
    """What is not seen here, and what decides the last bits of results."""
    return not_seen(places), machine()


def not_seen(places: Places) -> list[str]:
    """The places that this process does not see, or cannot write to; what is new is waited for."""
    deadline = time.monotonic() + SEEN_WITHIN
    while True:
        missing = [str(p) for p in places.written if not os.access(p, os.R_OK | os.W_OK | os.X_OK)]
        missing += [str(path) for path, size in places.read if _size(path) != size]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def _size(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_size
    return None


def machine() -> dict[str, str]:
    """What decides the last bits of a result, on this machine."""
    import numpy as np
    import scipy
    import scipy.linalg.cython_blas  # loads its BLAS
    from threadpoolctl import threadpool_info

    libraries = [lib for lib in threadpool_info() if lib["user_api"] == "blas"]
    kinds = {f"{lib['internal_api']} {lib['version']} {lib.get('architecture', '')}".strip() for lib in libraries}
    versions = {"Python": platform.python_version(), "NumPy": np.__version__, "SciPy": scipy.__version__}
    return {**versions, "BLAS": ", ".join(sorted(kinds)), "machine": platform.machine()}


def _warn_of_others(machines: dict[str, dict[str, str]]) -> None:
    here, others = machine(), dict[str, list[str]]()
    for worker, facts in machines.items():
        if differing := [f"{k} {facts.get(k)} for {here[k]}" for k in here if facts.get(k) != here[k]]:
            others.setdefault(", ".join(differing), []).append(worker)
    for what, workers in others.items():
        log.warning(
            "%s of %d (%s) with %s here: the last bits may be others than those of a run on this machine alone",
            counted(len(workers), "worker"), len(machines), listed(workers, 3), printable(what),
        )  # fmt: skip


# -- on a worker ---------------------------------------------------------------------------------------


class _There(partial[Any]):
    """A call of a function of ours that is made by who unpickles it, by `pickle.loads` as a task of Dask.

    A worker without this package, or with another one, could not even read a task that names a function of ours: Dask
    ends that worker, and says nothing to us.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return self.func, self.args


def perform_there(call: Call, version: str, first: int, lot: Sequence[Any]) -> Done:
    """Do a lot of tasks on a worker.

    Errors of ours are final, and come back; those of the machine are raised: elsewhere it may be done.
    """
    from distributed import get_worker

    worker = str(get_worker().address)
    try:
        with _lock:  # two threads at once would be given a gate each, and read what is shared twice
            gate = _gate(call, worker, version)
        with gate:
            done = perform(call, first, lot)
    except ClusterError as e:
        return Done([], e, worker=worker)
    if done.error is not None and not isinstance(done.error, StreamError):
        raise done.error
    return replace(done, worker=worker)


_lock = threading.Lock()


@lru_cache(maxsize=2)
def _gate(call: Call, worker: str, version: str) -> threading.BoundedSemaphore:
    """Lets as many lots of a call, which this worker can do, be done in this process as its memory allows."""
    _check_version(worker, __version__, version)
    _check_seen(worker, not_seen(Places(call.file.parent, read=((call.file, call.size),))))
    places, at_once, *_ = loaded(call)
    _check_seen(worker, not_seen(places))
    return threading.BoundedSemaphore(at_once)


# -- errors --------------------------------------------------------------------------------------------


def _unfit(worker: str, found: object, problem: str, expected: str = f"version {__version__}") -> ClusterError:
    """The error for a worker with another package, or none: `found` says which, or is what came of it."""
    what = _text(found) if isinstance(found, BaseException) else f"version {printable(found)}"
    return ClusterError(
        f"a worker {problem}", found=f"{what} on {worker}", expected=expected,
        remedy="Install the same version where workers run, and start them again.",
    )  # fmt: skip


def _check_version(worker: str, found: object, expected: str = __version__) -> None:
    if found != expected:
        raise _unfit(worker, found, "has another version of lorashare-stream", expected)


def _check_seen(worker: str, missing: Sequence[str]) -> None:
    if missing:
        raise ClusterError(
            "a worker does not see the same files, or may not write where it must",
            found=f"no {missing[0]} on {worker}",
            expected="sources, workspace and output on storage that all workers share, under the same paths",
            remedy="Put them there, or do without a cluster.",
        )  # fmt: skip


def _unreachable(
    problem: str, found: str, remedy: str | None = None, expected: str | None = None
) -> UnreachableClusterError:
    remedy = remedy and f"{remedy}, and run the same command again."
    return UnreachableClusterError(problem, found=found, expected=expected, remedy=remedy)


def _lost(error: BaseException) -> UnreachableClusterError:
    return _unreachable("the scheduler does not answer any more", _text(error), "What is done is kept: look after it")


def _text(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}")


# -- on the driver -------------------------------------------------------------------------------------


@dataclass
class _DaskMapper(Mapper):
    """A map over a cluster. `at_once` is for each worker process; all lots may be redone, elsewhere too."""

    cluster: ClassVar[bool] = True
    client: Any
    _threads: dict[str, int] = field(default_factory=dict)  # of each worker, at the last look
    _looked: float = 0.0
    _deserted: float | None = None

    def width(self, at_once: int) -> int:
        """See `Mapper.width`; raises UnreachableClusterError if nobody has been there for long."""
        if time.monotonic() - self._looked >= EVERY:
            self._look()
        return max(1, sum(min(n, at_once) for n in self._threads.values()))

    def _submit(self, call: Call, lot: Lot) -> Future[Done]:
        lot.label = f"{call.name} {listed([name for task in lot.tasks for name in names_of(task)], 3)}"
        key = f"{call.name}-{uuid.uuid4().hex}"  # Dask keeps the mean time of what has the same name
        there = pickle.dumps(_There(perform_there, call, __version__, lot.first, lot.tasks))
        submit: Callable[..., Future[Done]] = self.executor.submit
        return submit(pickle.loads, there, key=key)

    def _done(self, lot: Lot) -> Done:
        from distributed import KilledWorker

        try:
            done = lot.future.result()
        except CancelledError as e:
            raise _lost(e) from e
        except (ImportError, AttributeError) as e:
            raise _unfit("one that came later", e, "cannot run this package") from e
        except KilledWorker as e:
            raise ClusterError(
                "several workers died one after the other while they did the same task",
                found=f"task {lot.label}, at last on {e.last_worker.address}",
                remedy="Mostly they exceed their memory limit: give workers more, or this command less by --memory, "
                "which is for each worker process; their logs tell. What is done is kept.",
            ) from e
        log.info("%s: %.2f s on %s", lot.label, done.seconds, done.worker)
        for record in done.records:
            record.msg = f"{done.worker}: {record.msg}"
        return done

    def _look(self) -> None:
        """See who is there, and say it when it changes."""
        try:
            found = dict(self.client.nthreads())
        except (OSError, CancelledError) as e:
            raise _lost(e) from e
        self._looked = now = time.monotonic()
        if len(found) != len(self._threads):
            log.info("the cluster has %s", counted(len(found), "worker"))
        self._threads, nobody = found, "the cluster has no workers any more"
        if found:
            self._deserted = None
        elif self._deserted is None:
            self._deserted = now
            log.warning("%s: waiting %.0f s for some to come", nobody, DESERTED)
        elif now - self._deserted > DESERTED:
            raise _unreachable(nobody, f"none for {DESERTED:.0f} s", "What is done is kept: start some")
