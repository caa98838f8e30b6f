"""Who holds a workspace: one process at a time, named, alive, and found out when it is not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from lorashare_stream.workspace.lock import HOLDER, held
from lorashare_stream.workspace.workspace import Workspace

from .conftest import make_collection

Capture = pytest.CaptureFixture[str]


def name_holder(folder: Path, **changes: Any) -> None:
    """Say that this process holds a folder, but for the changes."""
    values = {"host": platform.node(), "pid": os.getpid(), "since": "once", "token": "t"}
    (folder / HOLDER).write_text(json.dumps(values | changes))


def test_a_lock_says_who_holds_it_and_since_when(tmp_path: Path) -> None:
    with held(tmp_path) as check:
        check()
        values = json.loads((tmp_path / HOLDER).read_text())
        assert (values["host"], values["pid"]) == (platform.node(), os.getpid())
        message = rf"holds .*host {platform.node()}, pid {os.getpid()}, since {values['since'][:10]}"
        for take in (False, True):  # a live process of this host is stopped, not overruled
            with pytest.raises(LockedError, match=message) as caught, held(tmp_path, take=take):
                pass
            assert caught.value.exit_code == 75
    with held(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_an_error_that_names_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(WorkspaceError, match=r"no locks .*by workspace") as caught, held(tmp_path):
        pass
    assert caught.value.exit_code == 1


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from lorashare_stream.workspace.lock import held
with held(Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / HOLDER).exists()
    with held(tmp_path) as check:
        check()


def test_the_lock_of_another_host_stands_until_it_is_taken_over(tmp_path: Path) -> None:
    name_holder(tmp_path, host="elsewhere")
    with pytest.raises(LockedError, match=r"host elsewhere.*by take_lock=True"), held(tmp_path):
        pass
    with held(tmp_path, take=True) as check:
        check()


def test_a_kernel_lock_of_another_host_is_broken_only_by_taking_it(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        name_holder(tmp_path, host="elsewhere")
        with pytest.raises(LockedError), held(tmp_path):
            pass
        with held(tmp_path, take=True) as check:
            check()


def test_a_holder_learns_that_it_was_overruled(tmp_path: Path) -> None:
    with held(tmp_path) as check:
        name_holder(tmp_path, host="elsewhere")
        with pytest.raises(WorkspaceError, match=r"was taken over .*elsewhere"):
            check()
    assert "elsewhere" in (tmp_path / HOLDER).read_text()  # not removed by the one that lost it


def test_a_run_whose_lock_was_taken_writes_nothing_more(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    arguments = ["compress", *collection, "-o", str(tmp_path / "out"), "-k", "3", "-q"]
    assert main(arguments) == 0
    with Workspace.open(tmp_path / "out.workspace", None) as work:
        marker = next(iter(work.markers.values()))
        name_holder(work.root, host="elsewhere")
        with pytest.raises(WorkspaceError, match="was taken over"):
            work.mark(marker)
        with pytest.raises(WorkspaceError, match="was taken over"):
            work.take_out([])


def test_a_run_that_is_overruled_stops_at_its_next_step(tmp_path: Path, collection: list[str]) -> None:
    def overrule(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for result in results:
            name_holder(tmp_path / "out.workspace", host="elsewhere")
            yield result

    plan = plan_for(resolve(collection), Settings(num_components=3, device="cpu"))
    with pytest.raises(WorkspaceError, match="was taken over"):
        compress(plan, tmp_path / "out", progress=overrule)
    assert not (tmp_path / "out").exists()


def test_the_second_run_of_the_command_exits_with_75(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    arguments = ["compress", *collection, "-o", str(tmp_path / "out"), "-k", "3", "-q"]
    assert main(arguments) == 0
    name_holder(tmp_path / "out.workspace", host="elsewhere")
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
from pathlib import Path
from lorashare_stream.workspace import lock
with lock.held(Path({str(tmp_path)!r})):
    lock.let_go()
    print(Path({str(tmp_path / HOLDER)!r}).exists())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("junk", ['{"pid": -5}', "[" * 100_000, "null", '{"host": 3}', "\0"])
def test_junk_in_the_name_of_a_holder_is_nobody(tmp_path: Path, junk: str) -> None:
    (tmp_path / HOLDER).write_text(junk)
    with held(tmp_path) as check:
        check()
