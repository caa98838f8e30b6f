"""What every executor must do: serial, processes that are forked, processes of a server, a Dask cluster."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from lorashare_stream.errors import AdapterError, Stopped, StreamError
from lorashare_stream.files import read_sealed
from lorashare_stream.machine import memory_limit, usable_cores
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime import dask, processes
from lorashare_stream.runtime.executors import Mapper, Places, SerialExecutor, mapper_for
from lorashare_stream.runtime.processes import Processes
from lorashare_stream.settings import Settings
from lorashare_stream.workspace.workspace import IN_WORK

from . import tasks
from .conftest import tree_digest

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
KINDS = ["serial", "threads", "fork", "forkserver", "dask"]
LOCAL = ["fork", "forkserver"]
APART = [*LOCAL, "dask"]  # of processes of their own


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with dask.started(2) as found:
        yield found


@pytest.fixture
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], Any]]:
    """Make an executor of a kind, with so many workers."""
    with ExitStack() as stack:

        def made(kind: str, workers: int = 2) -> Any:
            if kind == "dask":
                return request.getfixturevalue("client")
            if kind in LOCAL:  # which of the two is not a matter of this process, of many threads
                context = processes.multiprocessing.get_context(kind)
                monkeypatch.setattr(processes, "_context", lambda: context)
                return stack.enter_context(Processes(workers))
            return stack.enter_context(SerialExecutor() if kind == "serial" else ThreadPoolExecutor(workers))

        yield made


@pytest.fixture
def mapper(make: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Mapper]]:
    """Make a mapper over an executor of a kind."""
    with ExitStack() as stack:
        folder = tmp_path / "shared"
        folder.mkdir()
        places = Places(folder, (folder,), note=folder / IN_WORK)
        yield lambda kind, workers=2: stack.enter_context(mapper_for(make(kind, workers), places))
        assert not list(folder.glob(".*"))


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    folder = tmp_path / "noted"
    folder.mkdir()
    return folder


# -- what a map is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lot", [1, 4])
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_results_come_in_the_order_of_the_tasks_each_said_before(
    mapper: Callable[..., Mapper], kind: str, at_once: int, lot: int
) -> None:
    over, said = mapper(kind), list[int]()
    for numbers in (range(20), iter(range(7)), (), [3]):
        said.clear()
        for n, result in enumerate(over.map(tasks.slow_at_first, numbers, at_once, said.append, lot)):
            number = 3 if numbers == [3] else n
            assert (result, number in said) == (number * number, True)
    assert list(over.map(tasks.sized, [0, 1, 3 << 20, 5], at_once)) == [b"", b"\0", bytes(3 << 20), bytes(5)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_tasks_run_at_once_than_asked_and_results_do_not_pile_up(
    mapper: Callable[..., Mapper], noted: Path, kind: str
) -> None:
    numbers = range(24)
    for taken, _ in enumerate(mapper(kind, 4).map(partial(tasks.noted, noted, 0.01), iter(numbers), 2)):
        begun = {p.name.split(".")[0] for p in noted.glob("*.begun.*")}
        ended = {p.name.split(".")[0] for p in noted.glob("*.ended")}
        assert len(begun - ended) <= (2 if kind != "dask" else 4)
        assert len(begun) <= taken + 1 + 4 * 2


@pytest.mark.parametrize(
    "error", [AdapterError("broken", adapter="a", key="k", found=3), KeyError(7), OSError(28, "full", "/x")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_as_it_was_raised_and_what_runs_is_waited_for(
    mapper: Callable[..., Mapper], noted: Path, error: Exception, kind: str
) -> None:
    said = list[int]()
    with pytest.raises(type(error)) as raised:
        list(mapper(kind).map(partial(tasks.failing, noted, 3, error), range(100), 2, said.append))
    assert str(raised.value) == str(error)
    for name in ("filename", "errno", "adapter", "key", "found"):
        assert str(getattr(raised.value, name, None)) == str(getattr(error, name, None))
    if kind == "dask":
        return  # what runs there runs to its end
    done = len(list(noted.glob("*.ended")))
    time.sleep(0.1)
    assert len(list(noted.glob("*.ended"))) == done == len(list(noted.glob("*.begun.*"))) < 20
    assert set(range(3)) <= {*said} <= set(range(20))


@pytest.mark.parametrize("kind", LOCAL)
def test_what_cannot_be_sent_back_is_told(mapper: Callable[..., Mapper], kind: str) -> None:
    over = mapper(kind)
    with pytest.raises(RuntimeError, match="StrangeError: what happened"):
        list(over.map(tasks.strange, range(4), 2))
    with pytest.raises(TypeError, match=r"cannot pickle '_thread.lock' object"):
        list(over.map(tasks.unsendable, range(4), 2))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_taken_any_more_is_dropped(mapper: Callable[..., Mapper], noted: Path, kind: str) -> None:
    results = mapper(kind).map(partial(tasks.noted, noted, 0.02), range(100), 2, lot=16)
    next(results)
    results.close()  # type: ignore[attr-defined]
    time.sleep(0.1)
    assert len(list(noted.glob("*.ended"))) < 60


@pytest.mark.parametrize("kind", KINDS)
def test_what_tasks_log_is_logged_here(
    mapper: Callable[..., Mapper], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with caplog.at_level(logging.WARNING, "lorashare_stream"):
        list(mapper(kind).map(tasks.warned, range(3), 2))
    assert sorted(r.getMessage().split(": ")[-1] for r in caplog.records) == ["module 0", "module 1", "module 2"]


@pytest.mark.parametrize("kind", APART)
def test_a_worker_has_one_thread_of_blas(mapper: Callable[..., Mapper], kind: str) -> None:
    assert list(mapper(kind).map(tasks.threads_of_blas, range(4), 2)) == [{1}] * 4


@pytest.mark.parametrize("kind", LOCAL)
def test_a_worker_holds_no_file_that_is_opened_later(mapper: Callable[..., Mapper], tmp_path: Path, kind: str) -> None:
    over = mapper(kind)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        paths = over.map(os.path.realpath, [f"/proc/self/fd/{n}" for n in range(3, 64)], 2)
        assert str(tmp_path / "lock") not in list(paths)


# -- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"objective": "factors"}, {"discard_moments": True}])
def test_every_executor_gives_the_same_bytes(
    tmp_path: Path, collection: list[str], make: Callable[..., Any], options: dict[str, object]
) -> None:
    settings = Settings.from_mapping({"num_components": 4, "device": "cpu", "workers": 2, "memory": "4GiB"} | options)
    for kind in KINDS:
        compress(plan_for(resolve(collection), settings), tmp_path / kind, executor=make(kind))
        assert tree_digest(tmp_path / kind) == tree_digest(tmp_path / "serial")
        assert not list(default_workspace(tmp_path / kind).glob(".*"))


# -- processes that are killed ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOCAL)
def test_a_process_that_is_killed_is_told_with_what_it_did_and_at_the_second_time_for_good(
    tmp_path: Path, make: Callable[..., Any], kind: str
) -> None:
    places = Places(tmp_path, (tmp_path,), note=tmp_path / IN_WORK)

    def run(*at: int) -> list[int]:
        with mapper_for(make(kind), places) as over:
            return list(over.map(partial(tasks.killed_at, at), range(40), 2, lot=4))

    with pytest.raises(Stopped, match=r"was killed \(found signal SIGKILL, in work: 7\)") as raised:
        run(7)
    assert raised.value.exit_code == 75
    assert read_sealed(tmp_path / IN_WORK) == {"7": 1}
    with pytest.raises(Stopped, match="in work: 9"):  # another one: perhaps the machine's fault
        run(9)
    for _ in range(2):
        with pytest.raises(StreamError, match=r"killed twice at the same \(found signal SIGKILL, in work: 7\)") as last:
            run(7)
        assert last.value.exit_code == 1
    assert run() == list(range(40))
    assert not (tmp_path / IN_WORK).exists()


COMPRESS = """
import os, sys, time
from lorashare_stream.cli.app import main
from lorashare_stream.stages import ingest
from lorashare_stream.stages.ingest import ingest_adapter
def deadly(objective, adapter):
    if adapter.name == "a03":
        time.sleep(0.2)
        os.kill(os.getpid(), int(os.environ["DEADLY"]))
    return ingest_adapter(objective, adapter)
if len(sys.argv) > 1 and sys.argv[1] == "deadly":
    ingest.ingest_adapter = deadly
    del sys.argv[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("workers", "number", "why"),
    [
        ("1", signal.SIGBUS, "a file was cut short while it was read"),
        pytest.param("2", signal.SIGKILL, "has less memory than", marks=pytest.mark.slow),
    ],
)
def test_the_command_line_names_what_kills_a_process_and_goes_on(
    tmp_path: Path, collection: list[str], workers: str, number: signal.Signals, why: str
) -> None:
    words = ["compress", *collection, "-k", "4", "--device", "cpu", "-q", "--workers", workers, "-o"]

    def run(out: str, *deadly: str) -> tuple[int, str]:
        command = [sys.executable, "-c", COMPRESS, *deadly, *words, str(tmp_path / out)]
        environment = os.environ | {"DEADLY": str(int(number))}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        return done.returncode, done.stderr

    code, said = run("out", "deadly")
    assert code == 75, said
    assert f"a process of this run was killed (found signal {number.name}, in work: a03)" in said
    assert why in said
    assert len(said.splitlines()) == 1
    code, said = run("out", "deadly")
    assert code == 1
    assert f"twice at the same (found signal {number.name}, in work: a03)" in said
    assert run("out") == (0, "")
    settings = Settings(num_components=4, device="cpu")
    compress(plan_for(resolve(collection), settings), tmp_path / "whole", executor=SerialExecutor())
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


# -- a parent that is killed ---------------------------------------------------------------------------

PARENT = """
import sys
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from lorashare_stream.cli import app
from lorashare_stream.runtime import dask, processes
from lorashare_stream.runtime.executors import Places, executor_for, mapper_for
from tests import tasks
folder, kind = Path(sys.argv[1]), sys.argv[2]
def command(args):
    with ExitStack() as stack:
        if kind == "forkserver":
            import torch
        given = stack.enter_context(dask.started(2)) if kind == "dask" else None
        workers = stack.enter_context(executor_for(given, 2))
        over = stack.enter_context(mapper_for(workers, Places(folder, (folder,))))
        list(over.map(partial(tasks.eigenproblem, folder), range(2), 1 if kind == "dask" else 2))
app._dispatch = command
if __name__ == "__main__":
    sys.exit(app.main(["info", "x"]))
"""


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("kind", "number"), [*product(APART, [signal.SIGKILL, signal.SIGTERM]), ("fork", signal.SIGINT)]
)
def test_no_process_outlives_a_parent_that_is_stopped_in_an_eigenproblem(
    tmp_path: Path, noted: Path, kind: str, number: signal.Signals
) -> None:
    script = tmp_path / "script.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(noted), kind]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, start_new_session=True, env=environment) as parent:
        _wait(lambda: len(list(noted.glob("*.begun.*"))) == 2)
        time.sleep(0.2)  # they are in LAPACK now
        begun = time.monotonic()
        parent.send_signal(number)
        assert parent.wait(timeout=10) == (-number if number == signal.SIGKILL else 75)
        heard = time.monotonic() - begun
    _wait(lambda: not _session(parent.pid), 2.0)
    assert not list(noted.glob("*.ended"))
    assert heard < 1.0


def _session(leader: int) -> list[int]:
    """Processes of a session that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *_, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def _wait(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


# -- how processes begin -------------------------------------------------------------------------------

SCRIPT = """
import sys
print("script", flush=True)
from lorashare_stream import SHAREModel
model = SHAREModel.from_adapters(sys.argv[2:], 4, device="cpu", workers=2, output_dir=sys.argv[1])
print(len(model.adapter_names))
"""


def test_a_script_without_a_main_guard_works(tmp_path: Path, collection: list[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "out"), *collection]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.stdout, done.returncode) == ("script\n8\n", 0), done.stderr
    settings = Settings(num_components=4, device="cpu")
    compress(plan_for(resolve(collection), settings), tmp_path / "serial", executor=SerialExecutor())
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "serial")


def test_processes_are_forked_only_where_that_is_safe() -> None:
    code = """
import os, sys, threading
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from lorashare_stream import pipeline
from lorashare_stream.runtime import processes
def method(): return processes._context().get_start_method()
found = [method()]
done = threading.Event()
thread = threading.Thread(target=done.wait)
thread.start()
found.append(method())
done.set()
thread.join()
while len(os.listdir("/proc/self/task")) > 1:  # the kernel's part of it may end later
    pass
found.append(method())
sys.modules["torch"] = os
found.append(method())
print(found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['fork', 'forkserver', 'fork', 'forkserver']", done.stderr


def test_processes_that_cannot_all_be_made_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    context, made = processes.multiprocessing.get_context("fork"), list[int]()
    start = context.Process.start

    def fails_the_third_time(process: Any) -> None:
        made.append(1)
        if len(made) == 3:
            raise OSError(11, "no more processes")
        start(process)

    monkeypatch.setattr(processes, "_context", lambda: context)
    monkeypatch.setattr(context.Process, "start", fails_the_third_time)
    before = set(processes.multiprocessing.active_children())
    with pytest.raises(OSError, match="no more processes"):
        Processes(4)
    assert set(processes.multiprocessing.active_children()) == before


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, 99, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2, None),
        (
            {
                "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000",
                "sys/fs/cgroup/memory.max": "max",
            },
            99,
            None,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "50000 100000",
                "sys/fs/cgroup/a/b/memory.max": "2000000000", "sys/fs/cgroup/a/memory.max": "1000000000",
            },
            1,
            1000000000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912",
            },
            3,
            536870912,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n3:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            99,
            None,
        ),
    ],
)  # fmt: skip
def test_cores_and_memory_are_those_that_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int, memory: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(99)))
    assert (usable_cores(tmp_path), memory_limit(tmp_path)) == (cores, memory)


def test_the_defaults_follow_them(tmp_path: Path, collection: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import lorashare_stream.plan.memory as memory
    import lorashare_stream.settings as settings

    monkeypatch.setattr(settings, "memory_limit", lambda: 1 << 30)
    monkeypatch.setattr(memory, "usable_cores", lambda: 3)
    made = plan_for(resolve(collection), Settings(device="cpu"))
    assert (made.settings.memory, made.processes) == (1 << 30, 3)
    assert max(step.peak_bytes for step in made.steps) <= 1 << 30
