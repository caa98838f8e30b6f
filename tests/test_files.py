from __future__ import annotations

import ctypes
import errno
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorashare_stream import files
from lorashare_stream.checkpoint.staging import MANY, Staging
from lorashare_stream.errors import UsageError
from lorashare_stream.files import atomic_file, own_folder, read_json, remove_tree, sync_all, write_json

SHM = Path("/dev/shm")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def fails() -> None:
        with atomic_file(path) as f:
            f.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    with atomic_file(path) as f:
        f.write(b"new")
        f.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_follow_the_umask_also_from_threads(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: write_json(tmp_path / str(i), i), range(200)))
        assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}
    finally:
        assert os.umask(before) == 0o027


def test_folders_that_are_links_or_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "broken"):
        with pytest.raises(UsageError, match="through a link, or over a file"):
            own_folder(tmp_path / name)
    assert own_folder(tmp_path / "new" / "er").is_dir()


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "never was")
    assert [p.name for p in tmp_path.iterdir()] == ["real"]


def test_json_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "large").write_text("1" * 100)
    with pytest.raises(ValueError, match=r"nested too deeply|larger than"):
        read_json(tmp_path / "deep")
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_json(tmp_path / "large", limit=10)


@pytest.mark.skipif(sys.platform != "linux", reason="syncfs is a call of Linux")
def test_all_is_synced_at_once_only_where_that_can_be_relied_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(SHM if os.access(SHM, os.W_OK) else tmp_path, os.O_RDONLY)  # where nobody is waited for
    try:
        with monkeypatch.context() as patched:
            patched.setattr(files, "_SYNCED_WHOLE", _Everything())
            for release, told in (("5.16.9", False), ("4.18.0-el8", False), ("unknown", False), ("6.9-rc3", True)):
                patched.setattr(os, "uname", lambda release=release: SimpleNamespace(release=release))
                assert sync_all(fd) == told
        monkeypatch.setattr(files, "_SYNCED_WHOLE", set())
        assert not sync_all(fd)
    finally:
        os.close(fd)


@pytest.mark.skipif(sys.platform != "linux", reason="syncfs is a call of Linux")
def test_that_the_disk_fails_is_said_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def fstatfs(self, fd: int, kind: Any) -> int:
            kind[0] = next(iter(files._SYNCED_WHOLE))
            return 0

        def syncfs(self, fd: int) -> int:
            ctypes.set_errno(errno.EIO)
            return -1

    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release="6.1.0"))
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: Failing())
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=f"error on the disk that holds: '{tmp_path}'") as caught:
            Staging(tmp_path, fd).sync([str(i) for i in range(MANY)])
        assert caught.value.errno == errno.EIO
    finally:
        os.close(fd)


class _Everything(set[int]):
    def __contains__(self, kind: object) -> bool:
        return isinstance(kind, int)
