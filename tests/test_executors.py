from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.dask import DaskClient
from lorashare_stream.runtime.executors import Serial, Threads
from lorashare_stream.settings import Settings

from .conftest import tree_digest


@pytest.mark.parametrize("executor", [Serial(), Threads()])
@pytest.mark.parametrize("at_once", [1, 3])
def test_results_come_in_the_order_of_the_tasks(executor: Serial | Threads, at_once: int) -> None:
    def slow_at_first(n: int) -> int:
        time.sleep(0.02 * (5 - n))
        return n * n

    assert list(executor.map(slow_at_first, range(5), at_once)) == [0, 1, 4, 9, 16]


def test_no_more_tasks_run_at_once_than_asked_and_results_do_not_pile_up() -> None:
    running, most, begun = 0, 0, 0
    lock = threading.Lock()

    def task(n: int) -> int:
        nonlocal running, most, begun
        with lock:
            running, begun = running + 1, begun + 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1
        return n

    for taken, _ in enumerate(Threads().map(task, range(40), 3)):
        assert begun <= taken + 2 * 3 + 1
    assert most == 3


def test_after_an_error_what_runs_is_waited_for_and_the_rest_is_dropped() -> None:
    done: list[int] = []

    def task(n: int) -> None:
        if n == 1:
            raise KeyError(n)
        time.sleep(0.02)
        done.append(n)

    with pytest.raises(KeyError):
        list(Threads().map(task, range(100), 2))
    before = len(done)
    time.sleep(0.05)
    assert len(done) == before < 10


@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_gives_the_same_bytes(tmp_path: Path, collection: list[str]) -> None:
    from distributed import Client, LocalCluster

    settings = Settings(num_components=4, device="cpu")
    compress(plan_for(resolve(collection), settings), tmp_path / "serial", executor=Serial())
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        compress(plan_for(resolve(collection), settings), tmp_path / "dask", executor=DaskClient(client))
    assert tree_digest(tmp_path / "dask") == tree_digest(tmp_path / "serial")
