"""Forked processes: as threads do, tasks are done in parallel, and nothing of them outlives the parent."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorashare_stream.errors import AdapterError, Stopped
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import Forks, Local, Serial, nothing
from lorashare_stream.runtime.forks import BEATING
from lorashare_stream.settings import Settings

from .conftest import tree_digest


def test_results_come_in_the_order_of_the_tasks_from_other_processes() -> None:
    def slow_at_first(n: int) -> tuple[int, int]:
        time.sleep(0.02 * (5 - n % 5))
        return n, os.getpid()

    done: list[int] = []
    found = list(Forks().map(slow_at_first, range(20), 3, done.append))
    assert [n for n, _ in found] == list(range(20))
    assert sorted(done) == list(range(20)) != done  # said as they are done
    assert len({pid for _, pid in found} - {os.getpid()}) == 3


def test_tasks_of_any_size_and_number() -> None:
    assert list(Forks().map(lambda n: bytes(n), [0, 1, 3 << 20, 5], 2)) == [b"", b"\0", bytes(3 << 20), bytes(5)]
    assert list(Forks().map(abs, (), 2)) == []
    assert list(Forks().map(abs, iter([-1, 2]), 4)) == [1, 2]


def test_results_do_not_pile_up(tmp_path: Path) -> None:
    def task(n: int) -> int:
        (tmp_path / f"{n:04}").touch()
        return n

    for taken, _ in enumerate(Forks().map(task, range(200), 2)):
        time.sleep(0.0005)
        assert len(os.listdir(tmp_path)) <= taken + 1 + 8 * 2 + 8 * 2


@pytest.mark.parametrize(
    "error", [AdapterError("broken", adapter="a", key="k", found=3), KeyError(7), OSError(28, "full", "/x")]
)
def test_an_error_comes_as_it_was_raised_and_what_runs_is_waited_for(tmp_path: Path, error: Exception) -> None:
    def task(n: int) -> int:
        if n == 3:
            raise error
        time.sleep(0.02)
        (tmp_path / f"{n}").touch()
        return n

    with pytest.raises(type(error)) as raised:
        list(Forks().map(task, range(100), 2))
    assert str(raised.value) == str(error)
    assert getattr(raised.value, "filename", None) == getattr(error, "filename", None)
    done = len(os.listdir(tmp_path))
    time.sleep(0.1)
    assert len(os.listdir(tmp_path)) == done < 20
    _demand_no_children()


def test_an_error_that_cannot_be_sent_is_told() -> None:
    class Strange(Exception):
        def __reduce__(self) -> str:
            raise TypeError("no pickle")

    def task(n: int) -> None:
        raise Strange("what happened")

    with pytest.raises(RuntimeError, match="Strange: what happened"):
        list(Forks().map(task, range(4), 2))


def test_a_result_that_cannot_be_sent_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"TypeError: cannot pickle '_thread.lock' object"):
        list(Forks().map(lambda n: threading.Lock(), range(4), 2))


def test_a_process_that_is_killed_ends_the_map_and_is_told() -> None:
    def task(n: int) -> int:
        if n == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    with pytest.raises(Stopped, match=r"a process of this run was killed \(found signal SIGKILL\)"):
        list(Forks().map(task, range(100), 2))
    _demand_no_children()


def test_what_is_not_taken_any_more_is_dropped() -> None:
    results = Forks().map(lambda n: bytes(1 << 20), range(100), 2)  # larger than a pipe
    next(results)
    results.close()  # type: ignore[attr-defined]
    _demand_no_children()


def _demand_no_children() -> None:
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_processes_that_cannot_all_be_made_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, made = os.fork, []

    def fails_the_third_time() -> int:
        made.append(1)
        if len(made) == 3:
            raise OSError(errno.EAGAIN, "no more processes")
        return fork()

    monkeypatch.setattr(os, "fork", fails_the_third_time)
    with pytest.raises(OSError, match="no more processes"):
        list(Forks().map(abs, range(9), 4))
    _demand_no_children()


def test_what_tasks_log_is_logged_here(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("lorashare_stream.stages.fit")
    with caplog.at_level(logging.INFO, "lorashare_stream"):
        list(Forks().map(lambda n: log.warning("module %s", n), range(3), 2))
    assert sorted(r.getMessage() for r in caplog.records) == ["module 0", "module 1", "module 2"]


def test_a_child_holds_no_file_of_the_parent(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = list(Forks().map(lambda n: [os.path.realpath(f"/proc/self/fd/{f}") for f in range(3, 64)], range(2), 2))
    assert not any(str(tmp_path) in path for paths in found for path in paths)


PARENT = """
import os, sys, time
from lorashare_stream.runtime.executors import Forks
def task(n):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(60)
list(Forks().map(task, range(2), 2))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_child_outlives_its_parent(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(number)
        parent.wait()
    _wait(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_this_machine_forks_only_where_that_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    def pids(tasks: Any, at_once: int) -> set[int]:
        return set(Local().map(lambda _: os.getpid(), tasks, at_once, nothing))

    here, threads = {os.getpid()}, [threading.current_thread()]
    monkeypatch.setattr(threading, "enumerate", lambda: threads)
    monkeypatch.setitem(sys.modules, "torch", os)
    assert pids(range(8), 2) == here
    monkeypatch.delitem(sys.modules, "torch")
    assert not pids(range(8), 2) & here
    assert pids(range(8), 1) == pids(range(1), 2) == pids(iter(range(8)), 2) == here
    threads.append(threading.Thread(name=BEATING))
    assert not pids(range(8), 2) & here
    threads.append(threading.Thread())  # it may hold a lock
    assert pids(range(8), 2) == here
    threads.pop()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert pids(range(8), 2) == here


@pytest.mark.parametrize("options", [{}, {"objective": "factors"}, {"max_error": 0.3}, {"discard_moments": True}])
def test_forked_processes_give_the_same_bytes(
    tmp_path: Path, collection: list[str], options: dict[str, object]
) -> None:
    settings = Settings.from_mapping({"num_components": 4, "device": "cpu", "workers": 3, "memory": "4GiB"} | options)
    for name, executor in (("serial", Serial()), ("forks", Forks())):
        compress(plan_for(resolve(collection), settings), tmp_path / name, executor=executor)
    assert tree_digest(tmp_path / "forks") == tree_digest(tmp_path / "serial")
