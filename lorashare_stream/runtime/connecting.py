"""A Dask cluster, found at its address or started here."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UnreachableClusterError, UsageError
from ..files import read_json
from .dask import DaskClient

PATIENCE = 10.0  # seconds for a scheduler to answer


@contextmanager
def connected(address: str) -> Iterator[DaskClient]:
    """A running cluster.

    Args:
        address: of its scheduler, or the file that `dask scheduler --scheduler-file` writes.

    Raises:
        UnreachableClusterError: if the scheduler does not answer.
        UsageError: if it is no address.
    """
    _quiet()
    from distributed import Client

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other versions: what matters of them is looked at by `probing`
            client = Client(_address(address), timeout=PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
    except OSError as e:
        raise UnreachableClusterError(
            "the scheduler does not answer", found=address, expected="a dask scheduler that runs there",
            remedy="Start it, and workers, and run the same command again.",
        ) from e  # fmt: skip
    except (ValueError, TypeError, KeyError) as e:  # of Dask's, or of the file
        raise UsageError(
            "no address of a scheduler", found=repr(address), expected="tcp://HOST:PORT, or its --scheduler-file"
        ) from e
    with client:
        yield DaskClient(client)


def _address(given: str) -> str:
    """What is given, or what is in the file of that name; Dask would wait for a damaged one to be mended."""
    address = read_json(Path(given))["address"] if os.path.isfile(given) else given
    if not isinstance(address, str) or not address:  # for which Dask would start a cluster of its own
        raise ValueError("not an address")
    return address


@contextmanager
def started(workers: int) -> Iterator[DaskClient]:
    """A cluster on this machine, of so many processes, which end with this one however it ends.

    They have a thread each, and no memory limit of Dask's, which counts mapped files and kills: what a task may take
    is planned.

    Raises:
        UsageError: if that is no number of processes.
    """
    if workers < 1:
        raise UsageError("no number of worker processes", found=workers, expected="1 or more")
    _quiet()
    from distributed import Client, LocalCluster

    cluster = LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None,
        memory_limit=0, silence_logs=logging.ERROR,
    )  # fmt: skip
    with cluster, Client(cluster, timeout=PATIENCE, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        yield DaskClient(client)


def _quiet() -> None:
    """Let Dask say only what we do not say ourselves; it sets up its own logging when it is imported."""
    import distributed  # noqa: F401

    for name in ("distributed", "tornado"):
        logging.getLogger(name).setLevel(logging.ERROR)
