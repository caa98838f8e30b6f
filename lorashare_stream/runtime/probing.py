"""Whether a cluster can do the work, asked of all its workers before any of it."""

from __future__ import annotations

import logging
import pkgutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ClusterError, UnreachableClusterError
from ..text import counted, listed, printable
from ..version import __version__
from .calls import check_version, look, machine, unseen
from .executors import Places

PATIENCE = 10.0  # seconds for a worker to come, and for what is asked to be answered
log = logging.getLogger(__name__)


def check_workers(client: Any, places: Places) -> None:
    """Demand that all workers have this version and see the same files; warn where last bits may differ.

    Args:
        client: a `distributed.Client`.
        places: what must be seen.

    Raises:
        UnreachableClusterError: if there are no workers, or one does not answer.
        ClusterError: if one cannot do the work, naming it.
    """
    check_some(client)
    # A function of ours could not be unpickled by a worker that has none of it, or another.
    for worker, version in _asked(client, pkgutil.resolve_name, "lorashare_stream.version:__version__").items():
        check_version(worker, version, __version__)
    with _tokens(places.written) as tokens:
        found = _asked(client, look, places, tokens, PATIENCE / 2)
    for worker, answer in found.items():
        if isinstance(answer, BaseException):
            raise cannot_run(worker, answer)
        if answer["missing"]:
            raise unseen(worker, answer["missing"])
    _warn_of_others({worker: answer["machine"] for worker, answer in found.items()})


def check_some(client: Any) -> None:
    """Demand workers, for which is waited a little.

    Raises:
        UnreachableClusterError: if there are none.
    """
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError:
        raise UnreachableClusterError(
            "the cluster has no workers",
            found=f"none in {PATIENCE:.0f} s at {client.scheduler.address}",
            remedy="Start some, by dask worker ADDRESS, and run the same command again.",
        ) from None
    except OSError as e:
        raise lost(e) from e


def lost(error: BaseException) -> UnreachableClusterError:
    """The error for a scheduler that was there, and is gone."""
    return UnreachableClusterError(
        "the scheduler does not answer any more", found=_text(error),
        remedy="What is done is kept: look after it, and run the same command again.",
    )  # fmt: skip


def cannot_run(worker: str, error: BaseException) -> ClusterError:
    """The error for a worker on which something of this package cannot be imported."""
    return ClusterError(
        "a worker cannot run this package", found=f"{_text(error)} on {worker}", expected=f"version {__version__}",
        remedy="Install the same version where workers run, and start them again.",
    )  # fmt: skip


def _text(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}")


def _asked(client: Any, fn: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Worker -> what it answers, or the exception; of those that left meanwhile, nothing."""
    from distributed.comm.core import CommClosedError

    answers: dict[str, Any] = {}
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            answers.update(client.run(fn, *args, on_error="return"))
        except BaseException as e:
            failed.append(e)

    asking = threading.Thread(target=ask, name="probe", daemon=True)  # `run` knows of no time limit
    asking.start()
    asking.join(PATIENCE)
    if asking.is_alive():
        raise UnreachableClusterError(
            "a worker does not answer", found=f"none in {PATIENCE:.0f} s by {listed(_silent(client))}",
            remedy="End it, or wait until it does, and run the same command again.",
        )  # fmt: skip
    if failed:
        raise lost(failed[0]) from failed[0]
    there = client.nthreads()
    answers = {worker: answer for worker, answer in answers.items() if worker in there}
    for worker, answer in answers.items():
        if isinstance(answer, ConnectionError | TimeoutError | CommClosedError):
            raise UnreachableClusterError("a worker does not answer", found=f"{_text(answer)} on {worker}")
    return answers


def _silent(client: Any) -> list[str]:
    """The workers that have shown no sign of life for some time; all, if that tells nothing."""
    seen = {worker: facts["last_seen"] for worker, facts in client.scheduler_info(n_workers=-1)["workers"].items()}
    return [w for w, at in seen.items() if at < max(seen.values()) - PATIENCE / 2] or [*seen]


@contextmanager
def _tokens(folders: Sequence[Path]) -> Iterator[list[Path]]:
    """A new file in each folder, of a name that no other storage has; a killed run's are swept as its others."""
    tokens = [folder / f".{uuid.uuid4().hex}.tmp" for folder in folders]
    try:
        for token in tokens:
            token.touch()
        yield tokens
    finally:
        for token in tokens:
            with suppress(OSError):
                token.unlink()


def _warn_of_others(machines: Mapping[str, Mapping[str, str]]) -> None:
    here = machine()
    others: dict[str, list[str]] = {}
    for worker, facts in machines.items():
        differing = [f"{k} {facts.get(k)} for {here[k]}" for k in here if facts.get(k) != here[k]]
        if differing:
            others.setdefault(", ".join(differing), []).append(worker)
    for what, workers in others.items():
        log.warning(
            "%s of %d (%s) with %s here: the last bits may be others than those of a run on this machine alone",
            counted(len(workers), "worker"), len(machines), listed(workers, 3), printable(what),
        )  # fmt: skip
