"""A Dask cluster of real processes on loopback: same bytes, dead workers, and all that is said clearly."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lorashare_stream.checkpoint.staging import Staging
from lorashare_stream.cli.app import main
from lorashare_stream.errors import ClusterError, UnreachableClusterError
from lorashare_stream.hub.fetch import Fetcher
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime import dask as cluster
from lorashare_stream.runtime.dask import connected, not_seen, workers_of
from lorashare_stream.runtime.executors import Mapper, Places, SerialExecutor, mapper_for
from lorashare_stream.runtime.progress import silent
from lorashare_stream.settings import Settings
from lorashare_stream.stages.run import Run
from lorashare_stream.version import __version__

from . import tasks
from .conftest import make_akin, make_collection, tree_digest
from .tiers import slow

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
SETTINGS = Settings(num_components=4, device="cpu")


class Processes:
    """A scheduler and workers, each a process with a log of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address, self.running = folder, "", dict[str, subprocess.Popen[bytes]]()

    def start(self, name: str, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                words,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            )  # a folder of its own: paths of tasks must be absolute
        return self.running[name]

    def scheduler(self) -> None:
        file = self.folder / "scheduler.json"
        python = (sys.executable, "-m", "distributed.cli.dask_scheduler")
        self.start(
            "scheduler", *python, "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)
        )
        wait_until(lambda: file.exists() and file.stat().st_size > 0)
        self.address = json.loads(file.read_text())["address"]

    def worker(self, name: str, *options: str, env: dict[str, str] | None = None, via: tuple[str, ...] = ()) -> None:
        python = (sys.executable, "-m", "distributed.cli.dask_worker", self.address, "--name", name)
        own = (
            "--no-nanny",
            "--no-dashboard",
            "--host",
            "127.0.0.1",
            "--nthreads",
            "1",
            "--local-directory",
            f"{name}.d",
        )
        self.start(name, *via, *python, *own, *options, env=env)

    def end(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()


def wait_until(holds: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(tmp_path_factory.mktemp("cluster"))
    found.scheduler()
    yield found
    for name in list(found.running):
        found.end(name)


@pytest.fixture(scope="module")
def dask(processes: Processes) -> Iterator[Any]:
    with connected(processes.address) as found:
        yield found


@pytest.fixture
def workers(processes: Processes, dask: Any) -> Iterator[Callable[..., dict[str, str]]]:
    """Start workers, wait for them, give name -> address; they end with the test."""
    begun: list[str] = []

    def addresses() -> dict[str, str]:
        info = dask.scheduler_info(n_workers=-1)["workers"]
        return {str(facts["name"]): address for address, facts in info.items()}

    def run(*names: str, **options: Any) -> dict[str, str]:
        for name in names:
            processes.worker(name, *options.get("words", ()), env=options.get("env"), via=options.get("via", ()))
            begun.append(name)
        wait_until(lambda: set(names) <= addresses().keys())
        return addresses()

    yield run
    for name in begun:
        if name in processes.running:
            processes.end(name)
    wait_until(lambda: not addresses())


def mapper_at(client: Any, *folders: Path) -> AbstractContextManager[Mapper]:
    return mapper_for(client, Places(folders[0], folders))


def serial(collection: list[str], out: Path) -> dict[str, str]:
    compress(plan_for(resolve(collection), SETTINGS), out, executor=SerialExecutor())
    return tree_digest(out)


@contextmanager
def said() -> Iterator[list[str]]:
    """What our code logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lorashare_stream")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


# -- same bytes, whoever dies ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_worker_costs_its_task_only(
    tmp_path: Path, workers: Callable[..., dict[str, str]], processes: Processes, dask: Any
) -> None:
    workers("a", "b")
    victim = processes.running["a"].pid

    def kill() -> None:
        wait_until(lambda: list(tmp_path.glob(f"*.begun.{victim}")))
        time.sleep(0.1)
        processes.end("a")

    killer = threading.Thread(target=kill)
    killer.start()
    with mapper_at(dask, tmp_path) as over, said() as lines:
        results = list(over.map(partial(tasks.noted, tmp_path, 0.3), range(8), 1))
    killer.join()
    assert results == [n * n for n in range(8)]
    assert len(list(tmp_path.glob("*.begun.*"))) == 9  # one was done again
    assert not list(tmp_path.glob(".*"))
    assert sum(line.startswith("noted") and " s on tcp://127" in line for line in lines) == 8
    assert "the cluster has 1 worker" in lines


def test_a_checkpoint_is_the_same_byte_for_byte_though_workers_are_killed_and_others_come(
    tmp_path: Path,
    collection: list[str],
    workers: Callable[..., dict[str, str]],
    processes: Processes,
    dask: Any,
) -> None:
    workers("a", "b")
    happened: list[str] = []

    def progress(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for number, result in enumerate(results):
            yield result
            if (step, number) == ("ingest", 1):
                processes.end("a")
                happened.append("killed")
            if (step, number) == ("project", 1):
                processes.end("b")
                workers("c")  # it has read nothing of the job yet
                happened.append("another")

    relative = [os.path.relpath(folder) for folder in collection]
    compress(plan_for(resolve(relative), SETTINGS), tmp_path / "dask", executor=dask, progress=progress)
    assert happened == ["killed", "another"]
    assert tree_digest(tmp_path / "dask") == serial(relative, tmp_path / "serial")
    assert not list(default_workspace(tmp_path / "dask").glob(".*"))


@pytest.mark.parametrize("directions", [False, slow(True)])
def test_a_coded_checkpoint_is_the_same_byte_for_byte_though_a_worker_is_killed(
    tmp_path: Path,
    directions: bool,
    workers: Callable[..., dict[str, str]],
    processes: Processes,
    dask: Any,
) -> None:
    workers("a", "b")
    happened: list[str] = []

    def progress(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for number, result in enumerate(results):
            yield result
            if (step, number) == ("encode", 1):
                processes.end("a")
                happened.append("killed")

    chosen = Settings(max_error=0.2, device="cpu", directions=directions)
    collection = make_akin(tmp_path / "in", 8)
    compress(plan_for(resolve(collection), chosen), tmp_path / "dask", executor=dask, progress=progress)
    compress(plan_for(resolve(collection), chosen), tmp_path / "serial", executor=SerialExecutor())
    assert happened == ["killed"]
    assert tree_digest(tmp_path / "dask") == tree_digest(tmp_path / "serial")


def test_a_stopped_driver_goes_on_alone(
    tmp_path: Path, collection: list[str], workers: Callable[..., dict[str, str]], processes: Processes
) -> None:
    workers("a")
    words = ["compress", *collection, "-o", str(tmp_path / "out"), "-k", "4", "--device", "cpu"]
    module = [sys.executable, "-m", "lorashare_stream", *words, "--dask-scheduler", processes.address, "--json"]
    driver = subprocess.Popen(module, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    journal = default_workspace(tmp_path / "out") / "journal.jsonl"
    wait_until(lambda: journal.exists() and journal.stat().st_size > 0)
    driver.send_signal(signal.SIGTERM)
    printed = driver.communicate(timeout=20)[0]
    assert driver.returncode == 75, printed
    assert json.loads(printed)["exit_code"] == 75
    assert main([*words, "-q"]) == 0
    assert tree_digest(tmp_path / "out") == serial(collection, tmp_path / "serial")


@pytest.mark.slow
def test_dask_local_gives_the_same_bytes_and_every_command_that_maps_takes_it(
    tmp_path: Path, collection: list[str], workers: Callable[..., dict[str, str]], processes: Processes
) -> None:
    outs = {name: tmp_path / name / "out" for name in ("dask", "serial")}
    workers("a")
    running = ["--dask-scheduler", str(processes.folder / "scheduler.json")]
    for name, out in outs.items():
        flags = ["-q", "--device", "cpu", *(running if name == "dask" else [])]
        local = ["-q", "--device", "cpu", *(["--dask-local", "2"] if name == "dask" else [])]
        first = [
            sys.executable,
            "-m",
            "lorashare_stream",
            "compress",
            *collection[:6],
            "-o",
            str(out),
            "-k",
            "8",
            *local,
        ]
        subprocess.run(first, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
        assert main(["add", str(out), *collection[6:], "--variance", "0.999999", *flags]) == 0
        assert main(["remove", str(out), "a02", "--refit", *flags]) == 0
        assert main(["refit", str(out), "-k", "4", "-o", str(out.parent / "smaller"), *flags]) == 0
        shutil.move(default_workspace(out), tmp_path / f"{name}.workspace")
        assert main(["add", str(out), collection[2], "--variance", "0.01", *flags]) == 0  # without a workspace
        assert not list(out.parent.glob(".*"))
    assert tree_digest(outs["dask"].parent) == tree_digest(outs["serial"].parent)


def test_python_takes_a_client(
    tmp_path: Path, collection: list[str], workers: Callable[..., dict[str, str]], dask: Any
) -> None:
    from lorashare_stream.model import SHAREModel

    workers("a")
    with said() as lines:
        SHAREModel.from_adapters(collection, 4, device="cpu", output_dir=tmp_path / "dask", executor=dask)
    assert any(line.startswith("project_adapter a02, a03: ") for line in lines)
    assert tree_digest(tmp_path / "dask") == serial(collection, tmp_path / "serial")


def test_the_two_flags_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["compress", "x", "-o", "y"], ["add", "x", "y"], ["remove", "x"], ["refit", "x", "-o", "y"]):
        assert main([*words, "--dask-local", "2", "--dask-scheduler", "tcp://127.0.0.1:1"]) == 2
        assert "not allowed with" in capsys.readouterr().err


# -- said clearly, within seconds ------------------------------------------------------------------------


def test_an_unreachable_scheduler_is_said_within_seconds(
    tmp_path: Path, collection: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    begun = time.monotonic()
    code = main(["compress", *collection, "-o", str(tmp_path / "out"), "--dask-scheduler", "tcp://127.0.0.1:1"])
    assert code == 75
    assert time.monotonic() - begun < 60
    assert "the scheduler does not answer (found tcp://127.0.0.1:1" in capsys.readouterr().err
    assert not (tmp_path / "out.workspace").exists()


@pytest.mark.parametrize(
    "words", [["--dask-scheduler", "nonsense://x"], ["--dask-scheduler", ""], ["--dask-local", "0"], None]
)
def test_what_is_no_cluster_is_a_usage_error(tmp_path: Path, collection: list[str], words: list[str] | None) -> None:
    (tmp_path / "scheduler.json").write_text('{"address"')
    words = words or ["--dask-scheduler", str(tmp_path / "scheduler.json")]
    assert main(["compress", *collection, "-o", str(tmp_path / "out"), *words]) == 2


def test_a_cluster_without_workers(
    tmp_path: Path, collection: list[str], processes: Processes, dask: Any,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cluster, "PATIENCE", 0.5)
    code = main(["compress", *collection, "-o", str(tmp_path / "out"), "--dask-scheduler", processes.address])
    assert code == 75
    assert "the cluster has no workers (found none in" in capsys.readouterr().err


def stub(folder: Path, version: str) -> dict[str, str]:
    package = folder / "lorashare_stream"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = {version!r}\n")
    return {"PYTHONPATH": str(folder)}


def test_a_worker_with_another_version(tmp_path: Path, workers: Callable[..., dict[str, str]], dask: Any) -> None:
    workers("a")
    old = workers("old", env=stub(tmp_path, "0.0.1"))["old"]
    with pytest.raises(ClusterError, match="another version") as raised, mapper_at(dask, tmp_path):
        pass
    assert str(raised.value.found) == f"version 0.0.1 on {old}"
    assert raised.value.expected == __version__
    assert raised.value.exit_code == 1


def test_a_worker_without_the_package_that_comes_later(
    tmp_path: Path, workers: Callable[..., dict[str, str]], processes: Processes, dask: Any
) -> None:
    workers("a")
    (tmp_path / "stub").mkdir()
    with mapper_at(dask, tmp_path) as over:
        workers("old", env=stub(tmp_path / "stub", "0.0.1"))
        with pytest.raises(ClusterError, match=r"a worker cannot run this package|another version"):
            list(over.map(partial(tasks.noted, tmp_path, 0.2), range(8), 1))


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_storage(
    tmp_path: Path, workers: Callable[..., dict[str, str]], dask: Any
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    over = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*over, "true"], capture_output=True).returncode:
        pytest.skip("no name spaces here")
    workers("a")
    blind = workers("blind", via=over)["blind"]
    begun = time.monotonic()
    with pytest.raises(ClusterError, match="does not see the same files") as raised, mapper_at(dask, hidden):
        pass
    assert time.monotonic() - begun < 60
    assert raised.value.found == f"no {hidden} on {blind}"
    assert not list(hidden.iterdir())


def test_a_worker_is_asked_again_with_the_first_task_of_a_map(
    tmp_path: Path, workers: Callable[..., dict[str, str]], dask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that came later is."""
    file = tmp_path / "source"
    file.write_bytes(b"1234")
    monkeypatch.setattr(cluster, "SEEN_WITHIN", 0.1)
    places = Places(tmp_path, (tmp_path, tmp_path / "none"), ((file, 4), (file, 5)))
    assert not_seen(places) == [str(tmp_path / "none"), str(file)]
    workers("a")
    with mapper_for(dask, Places(tmp_path, (tmp_path,), ((file, 4),))) as over:
        assert list(over.map(len, ["four"], 1)) == [4]
        file.write_bytes(b"12345")
        with pytest.raises(ClusterError, match="does not see the same files") as raised:
            list(over.map(len, ["four"], 1))
    assert str(raised.value.found).startswith(f"no {file} on tcp://")


@pytest.mark.slow
def test_a_worker_that_does_not_answer(
    tmp_path: Path, workers: Callable[..., dict[str, str]], processes: Processes, dask: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cluster, "PATIENCE", 2.0)
    stuck = workers("a", "stuck")["stuck"]
    os.kill(processes.running["stuck"].pid, signal.SIGSTOP)
    time.sleep(1.5)
    with pytest.raises(UnreachableClusterError, match="does not answer") as raised, mapper_at(dask, tmp_path):
        pass
    assert stuck in str(raised.value.found)


def test_a_task_that_kills_every_worker_is_named(
    tmp_path: Path, workers: Callable[..., dict[str, str]], dask: Any
) -> None:
    workers("a", words=("--nanny",))
    dask.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
    with pytest.raises(ClusterError, match="several workers died") as raised, mapper_at(dask, tmp_path) as over:
        list(over.map(os._exit, [7], 1))
    dask.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 3))
    assert str(raised.value.found).startswith("task _exit 7, at last on tcp://127")
    assert "memory" in str(raised.value)


def test_a_scheduler_that_dies_ends_the_run(tmp_path: Path) -> None:
    own = Processes(tmp_path)
    own.scheduler()
    own.worker("a")
    try:
        with connected(own.address) as found, mapper_at(found, tmp_path) as over:
            threading.Timer(0.5, own.running["scheduler"].kill).start()
            with pytest.raises(UnreachableClusterError, match="does not answer any more"):
                list(over.map(partial(tasks.noted, tmp_path, 5.0), range(4), 1))
    finally:
        own.end("scheduler")
        own.end("a")


def test_a_deserted_cluster_ends_the_run(
    tmp_path: Path, workers: Callable[..., dict[str, str]], processes: Processes, dask: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cluster, "DESERTED", 1.0)
    workers("a")
    with mapper_at(dask, tmp_path) as over:
        threading.Timer(0.5, partial(processes.end, "a")).start()
        with pytest.raises(UnreachableClusterError, match="no workers any more"):
            list(over.map(partial(tasks.noted, tmp_path, 5.0), range(4), 1))


# -- what goes through the scheduler, and how many threads ------------------------------------------------


def test_what_a_worker_gets_does_not_grow_with_the_number_of_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, list[int]] = {}
    mapped = Mapper.map

    def seen(self: Mapper, fn: Any, tasks: Any, *options: Any) -> Iterator[Any]:
        sizes.setdefault(fn.func.__name__, []).append(len(pickle.dumps((fn, tasks[:2]))))
        return mapped(self, fn, tasks, *options)

    monkeypatch.setattr(Mapper, "map", seen)
    for n in (4, 40):
        sources = resolve(make_collection(tmp_path / str(n), n))
        for settings in (SETTINGS, Settings(max_error=0.3, device="cpu")):
            out = tmp_path / f"{n}-{settings.max_error}"
            compress(plan_for(sources, settings), out, executor=SerialExecutor())
    for step in ("ingest_adapter", "project_adapter", "encode_adapter"):
        few, many = sizes[step][:: len(sizes[step]) // 2]
        assert many < few + 100 < 8000


def threads_within(n: int) -> tuple[set[int], int]:
    import torch

    time.sleep(0.1)
    return tasks.threads_of_blas(n), torch.get_num_threads()


@pytest.mark.slow
def test_tasks_have_one_thread_of_blas_and_torch_and_no_more_run_than_memory_allows(
    tmp_path: Path, workers: Callable[..., dict[str, str]], dask: Any
) -> None:
    env = {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    workers("wide", words=("--nthreads", "4"), env=env)
    assert workers_of(dask) == {"workers": 4}
    dask.run(lambda: __import__("torch"))
    with mapper_at(dask, tmp_path) as over:
        assert set(map(str, over.map(threads_within, range(8), 4))) == {"({1}, 1)"}
        begun = time.monotonic()
        assert list(over.map(partial(tasks.noted, tmp_path, 0.2), range(4), 1)) == [0, 1, 4, 9]
        assert time.monotonic() - begun > 0.8  # one at a time, though there are four threads


def test_an_adapter_that_is_written_twice_at_a_time_is_whole(tmp_path: Path) -> None:
    """A worker that was given up may still do its task while another does it again."""
    (tmp_path / "adapters").mkdir()
    staging = Staging(tmp_path)
    with staging.adapter("a") as first, staging.adapter("a") as second:
        for folder in (first, second):
            for file in ("loadings.safetensors", "adapter_meta.json"):
                (folder / file).write_text(file)
    assert [p.name for p in (tmp_path / "adapters").iterdir()] == ["a"]
    with staging.adapter("a") as other:
        (other / "adapter_meta.json").write_text("of another run")
    assert [p.name for p in (tmp_path / "adapters" / "a").iterdir()] == ["adapter_meta.json"]
    assert [p.name for p in (tmp_path / "adapters").iterdir()] == ["a"]


def test_modules_are_cut_into_as_many_portions_as_a_cluster_can_sum_at_a_time(
    tmp_path: Path, collection: list[str], workers: Callable[..., dict[str, str]], dask: Any
) -> None:
    plan = plan_for(resolve(collection), replace(SETTINGS, workers=1))
    workers("a", "b", "c")
    modules = sorted({group.module for group in plan.groups})
    with mapper_at(dask, tmp_path) as over, Fetcher(offline=True) as fetcher:
        wide = Run(plan, over, silent, fetcher).portions(modules)
        alone = Run(plan, Mapper(SerialExecutor(), Places(tmp_path)), silent, fetcher).portions(modules)
    assert alone == [tuple(modules)]
    assert wide == [(module,) for module in modules]
