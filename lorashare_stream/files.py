"""Files that are whole or absent: atomic writes, synced folders, folders that do not lead elsewhere."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import UsageError
from .text import digest_of, printable

_SEAL = "checksum"


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file in an OSError: those of `write` and `fsync` have no name."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno is not None:
            e.filename = str(path)
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, synced and renamed over it at the end of the block; a link there is replaced."""
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)  # less the user's umask
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e  # the name that the user knows
    try:
        with naming(path):
            yield temporary
            os.fsync(fd)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(fd)
    sync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which appears under `path` whole and synced, or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as f:
        yield f


def link_or_copy(source: Path, path: Path) -> None:
    """Hard link to a file, durable with its folder; on a disk without links a copy, whole and synced."""
    try:
        os.link(source, path)
    except OSError:
        with atomic_path(path) as temporary:
            shutil.copyfile(source, temporary)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically; JSON escapes foreign strings."""
    with atomic_file(path) as f:
        f.write(_json(value))


def json_bytes(value: Any) -> int:
    """The size of what `write_json` writes."""
    return len(_json(value))


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def sync(path: str | Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(root: str | Path) -> None:
    """Make every file and folder under `root` durable (arrays are written without); a link is its folder's."""
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                sync_tree(entry.path)
            elif not entry.is_symlink():
                sync(entry.path)
    sync(root)


def own_path(path: Path) -> Path:
    """A path for a folder inside one that the user named; raises UsageError for a file, or a link out of it."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(
            "refusing to write through a link, or over a file, where a folder is expected", found=path,
            remedy="Remove it, or choose another output folder.",
        )  # fmt: skip
    return path


def own_folder(path: Path) -> Path:
    """The folder at `own_path`, made if it is not there."""
    own_path(path).mkdir(parents=True, exist_ok=True)
    return path


def refuse_links(root: Path, depth: int) -> None:
    """Refuse links in a folder of ours, which could lead a write or a removal out of it; raises UsageError."""
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise UsageError("refusing to write through a link", found=entry.path, remedy="Remove it.")
            if depth > 1 and entry.is_dir():
                refuse_links(Path(entry.path), depth - 1)


def tree_bytes(root: Path) -> int:
    """Bytes of all files under `root`; 0 if it is not there."""
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(root) for name in names)


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, that may be gone already; a link is not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    for attempt in range(10):  # a worker of a cluster may still write into it for a run that has ended
        try:
            if path.exists():
                shutil.rmtree(path)
            return
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.ENOENT) or attempt == 9:
                raise
            time.sleep(0.1)


def free_bytes(path: Path) -> tuple[int, int]:
    """Device number and free bytes of the disk that holds, or will hold, `path`."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing.stat().st_dev, shutil.disk_usage(existing).free


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a file of bounded size; raises ValueError if it is larger."""
    with open(path, "rb", buffering=0) as f:
        if os.fstat(f.fileno()).st_size > limit:
            raise ValueError(f"{printable(path.name)} is larger than {limit} bytes")
        return f.read(limit + 1)


def read_json(path: Path, limit: int = 64 << 20) -> Any:
    """Read a JSON file of bounded size; raises ValueError if it is larger, or no JSON."""
    try:
        return json.loads(read_bounded(path, limit))
    except RecursionError as e:
        raise ValueError(f"{printable(path.name)} is nested too deeply") from e


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum of its own, atomically."""
    write_json(path, sealed(values))


def read_sealed(path: Path) -> dict[str, Any]:
    """A sealed JSON object; empty if there is none, or a bit of it is not what was written."""
    try:
        return unsealed(read_json(path)) or {}
    except (FileNotFoundError, ValueError):
        return {}


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum."""
    return {**values, _SEAL: digest_of(values)}


def unsealed(found: Any) -> dict[str, Any] | None:
    """The object that was sealed; None if it is not what was written."""
    if not isinstance(found, dict):
        return None
    values = {k: v for k, v in found.items() if k != _SEAL}
    return values if found.get(_SEAL) == digest_of(values) else None
