from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorashare_stream.checkpoint import staging
from lorashare_stream.checkpoint.staging import MANY, Staging
from lorashare_stream.errors import UsageError
from lorashare_stream.files import atomic_file, own_folder, read_json, remove_tree, write_json


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


def test_staged_adapters_are_synced_in_lots_while_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    begun = threading.Event()
    monkeypatch.setattr(staging, "sync_tree", lambda path: (begun.set(), synced.append(path.name)))
    (tmp_path / "adapters").mkdir()
    names = [f"a{i}" for i in range(MANY + 3)]
    with Staging(tmp_path).syncing() as written:
        for name in names[:MANY]:
            written(name)
        assert begun.wait(60)
        for name in names[MANY:]:
            written(name)
    assert sorted(synced) == sorted(names)
