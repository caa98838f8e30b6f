"""Who holds a workspace: one process at a time, named, alive, and found out when it is not."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorashare_stream.checkpoint.config import read_share_config
from lorashare_stream.cli.app import main
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.edits.remove import remove
from lorashare_stream.errors import LockedError, UsageError, WorkspaceError
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings
from lorashare_stream.workspace import lock as locks
from lorashare_stream.workspace.lock import SILENCE, held
from lorashare_stream.workspace.workspace import Workspace

from .conftest import make_collection

Capture = pytest.CaptureFixture[str]


def holder(**changes: Any) -> str:
    """What a lock file says of this process, but for the changes."""
    started = psutil.Process().create_time()
    values = {"host": platform.node(), "pid": os.getpid(), "started": started, "since": "once", "token": "t"}
    return json.dumps(values | changes)


def dead_pid() -> bytes:
    return subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout.strip()


def silent_for(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_lock_says_who_holds_it_and_since_when(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock) as check:
        check()
        values = json.loads(lock.read_text())
        assert (values["host"], values["pid"]) == (platform.node(), os.getpid())
        assert abs(values["started"] - psutil.Process().create_time()) < 1
        message = rf"holds .*host {platform.node()}, pid {os.getpid()}, since {values['since'][:10]}"
        with pytest.raises(LockedError, match=message) as caught, held(lock):
            pass
        assert caught.value.exit_code == 75
    assert lock.read_text() == ""
    with held(lock):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


def test_a_live_process_keeps_others_out_even_where_the_kernel_has_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(locks.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "lock").write_text(holder())
    for take in (False, True):  # a live process of this host is stopped, not overruled
        with pytest.raises(LockedError, match=f"pid {os.getpid()}"), held(tmp_path / "lock", take=take):
            pass


@pytest.mark.parametrize("changes", [{"pid": dead_pid}, {"started": lambda: 1.0}], ids=["dead", "another of that pid"])
def test_the_lock_of_a_dead_process_of_this_host_is_taken_at_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "lock").write_text(holder(**{k: (int if k == "pid" else float)(v()) for k, v in changes.items()}))
    with held(tmp_path / "lock") as check:
        check()


def test_the_lock_of_another_host_stands_until_it_has_been_silent(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text(holder(host="elsewhere"))
    silent_for(lock, SILENCE - 20)
    with pytest.raises(LockedError, match=r"host elsewhere.*5 minutes of silence, or by --take-lock"), held(lock):
        pass
    silent_for(lock, SILENCE + 20)
    with held(lock):
        pass
    lock.write_text(holder(host="elsewhere"))
    with held(lock, take=True) as check:
        check()


def test_a_kernel_lock_of_another_host_is_broken_only_by_taking_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(holder(host="elsewhere"))
        other.flush()
        silent_for(lock, SILENCE + 20)
        with pytest.raises(LockedError), held(lock):
            pass
        with held(lock, take=True) as check:
            check()


def test_a_holder_shows_that_it_lives_and_learns_that_it_was_overruled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.01)
    lock = tmp_path / "lock"
    with held(lock) as check:
        silent_for(lock, 1000)
        until = time.monotonic() + 10
        while lock.stat().st_mtime < time.time() - 500 and time.monotonic() < until:
            time.sleep(0.01)
        assert lock.stat().st_mtime > time.time() - 500
        lock.write_text(holder(host="elsewhere"))
        with pytest.raises(WorkspaceError, match=r"was taken over .*elsewhere"):
            check()
    assert "elsewhere" in lock.read_text()  # not let go of by the one that lost it


def test_a_run_whose_lock_was_taken_writes_nothing_more(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    arguments = ["compress", *collection, "-o", str(tmp_path / "out"), "-k", "3", "-q"]
    assert main(arguments) == 0
    with Workspace.open(tmp_path / "out.workspace", None) as work:
        (module,) = list(work.modules())[:1]
        marker = work.marker(module)
        (work.root / "lock").write_text(holder(host="elsewhere"))
        with pytest.raises(WorkspaceError, match="was taken over"):
            work.mark(module, marker)
        with pytest.raises(WorkspaceError, match="was taken over"):
            work.take_out([])


def test_a_run_that_is_overruled_stops_at_its_next_step(tmp_path: Path, collection: list[str]) -> None:
    def overrule(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for result in results:
            (tmp_path / "out.workspace" / "lock").write_text(holder(host="elsewhere"))
            yield result

    plan = plan_for(resolve(collection), Settings(num_components=3, device="cpu"))
    with pytest.raises(WorkspaceError, match="was taken over"):
        compress(plan, tmp_path / "out", progress=overrule)
    assert not (tmp_path / "out").exists()


def test_the_second_run_of_the_command_exits_with_75(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    arguments = ["compress", *collection, "-o", str(tmp_path / "out"), "-k", "3", "-q"]
    assert main(arguments) == 0
    (tmp_path / "out.workspace" / "lock").write_text(holder(host="elsewhere"))
    capsys.readouterr()
    assert main(arguments) == 75
    assert "host elsewhere" in capsys.readouterr().err
    assert main([*arguments, "--take-lock"]) == 0


@pytest.mark.parametrize("with_workspace", [True, False])
@pytest.mark.parametrize("mine", ["add", "remove"])
def test_what_another_run_has_changed_meanwhile_is_not_undone(
    tmp_path: Path, collection: list[str], monkeypatch: pytest.MonkeyPatch, mine: str, with_workspace: bool
) -> None:
    """A command reads, and then takes the lock: what was changed between is asked for again, under the lock."""
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)
    compress(plan_for(resolve(collection), Settings(num_components=5, device="cpu")), out)
    if not with_workspace:
        shutil.rmtree(default_workspace(out))
    options = RunOptions(accept=1e-6)

    def change(what: str) -> None:
        if what == "add":
            add(out, resolve({"new": fresh[0]}), options)
        else:
            remove(out, ["a01"], options)

    real = RunOptions.root_of

    def another_run_comes_first(self: RunOptions, *arguments: Any) -> Path | None:
        monkeypatch.setattr(RunOptions, "root_of", real)
        change("remove" if mine == "add" else "add")
        return real(self, *arguments)

    monkeypatch.setattr(RunOptions, "root_of", another_run_comes_first)
    with pytest.raises(LockedError, match=r"another run has changed the (checkpoint|workspace) meanwhile"):
        change(mine)
    change(mine)
    assert read_share_config(out).adapter_names == ["a00", *(f"a{i:02}" for i in range(2, 8)), "new"]


def test_an_output_that_another_run_has_published_meanwhile_is_not_replaced(
    tmp_path: Path, collection: list[str]
) -> None:
    other = make_collection(tmp_path / "others", 3, seed=1)
    settings = Settings(num_components=3, device="cpu")

    def publish(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        yield from results
        if step == "fit":
            compress(plan_for(resolve(other), settings), tmp_path / "out", workspace=tmp_path / "w2")

    plan = plan_for(resolve(collection), settings)
    with pytest.raises(UsageError, match="another run"):
        compress(plan, tmp_path / "out", workspace=tmp_path / "w1", progress=publish)
    assert read_share_config(tmp_path / "out").num_adapters == 3


def test_a_stopped_process_lets_go_of_its_locks(tmp_path: Path) -> None:
    code = f"""
from lorashare_stream.workspace import lock as locks
with locks.held(locks.Path({str(tmp_path / "lock")!r})):
    locks.let_go()
    print(open({str(tmp_path / "lock")!r}).read() == "")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("junk", ['{"pid": -5}', "[" * 100_000, "null", '{"host": 3}', "\0"])
def test_junk_in_a_lock_is_nobody(tmp_path: Path, junk: str) -> None:
    values = json.loads(holder())
    text = json.dumps(values | json.loads(junk)) if junk.startswith("{") else junk
    (tmp_path / "lock").write_text(text)
    with held(tmp_path / "lock") as check:
        check()
