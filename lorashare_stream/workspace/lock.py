"""Lock of a folder, held by one process at a time, whose name stands beside it.

    lock          under the kernel's lock (flock), which the kernel releases however the process ends
    holder.json   the process that holds it: host, pid, since when

A file system that is shared by hosts may not know of another host's flock. So a holder of another host stands until its
own process removes `holder.json`, or a user who knows that it is dead takes the lock over.
"""

from __future__ import annotations

import errno
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from ..errors import LockedError, WorkspaceError
from ..files import read_json, write_json
from ..text import printable

LOCK, HOLDER = "lock", "holder.json"
_NO_FLOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a lock."""

    host: Annotated[str, "where it runs"]
    pid: Annotated[int, "its number there"]
    since: Annotated[str, "for people"]
    token: Annotated[str, "of this hold"]

    def is_here(self) -> bool:
        """Whether the process is one of this host."""
        return self.host == platform.node()


_HOLDER = TypeAdapter(Holder)
_held: dict[Path, Holder] = {}  # by this process


@contextmanager
def held(folder: Path, *, take: bool = False) -> Iterator[Callable[[], None]]:
    """Hold the lock of a folder, which exists, until the end of the block.

    Args:
        folder: what is locked.
        take: take over the lock of another host.

    Yields:
        A check that raises if the lock was taken over since.

    Raises:
        LockedError: if another process holds it; names that.
        WorkspaceError: if the file system has no locks.
    """
    with _flock(folder, take):
        there = _holder(folder)
        if there is not None and not there.is_here() and not take:
            raise _held_by(folder, there)
        mine = Holder(platform.node(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z"), uuid.uuid4().hex)
        write_json(folder / HOLDER, asdict(mine))
        _held[folder] = mine

        def check() -> None:
            if _holder(folder) != mine:
                raise LockedError(
                    f"the lock of {printable(folder)} was taken over",
                    found=_holder(folder) or "no holder",
                    expected=f"pid {mine.pid} on {mine.host}",
                    remedy="Two runs wrote to it: let the other one finish, then run the same command again.",
                )

        try:
            yield check
        finally:
            _held.pop(folder, None)
            _remove(folder, mine)


def let_go() -> None:
    """Remove the name of this process, which is about to end, from all locks."""
    for folder, mine in list(_held.items()):
        _remove(folder, mine)


def _remove(folder: Path, mine: Holder) -> None:
    with suppress(OSError):
        if _holder(folder) == mine:
            (folder / HOLDER).unlink()


@contextmanager
def _flock(folder: Path, take: bool) -> Iterator[None]:
    """Hold the kernel's lock; to take over that of another host, a new file takes its place."""
    path = folder / LOCK
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    for attempt in (0, 1):
        try:
            lock.acquire()
            break
        except Timeout:
            there = _holder(folder)
            if attempt or not take or there is None or there.is_here():
                raise _held_by(folder, there) from None
            path.unlink(missing_ok=True)
        except OSError as e:
            if e.errno not in _NO_FLOCK:
                raise
            raise WorkspaceError(
                "the file system has no locks (flock)", found=folder, remedy="Put it on a local disk by --workspace."
            ) from e
    try:
        yield
    finally:
        lock.release()


def _held_by(folder: Path, holder: Holder | None) -> LockedError:
    who = "a process that has just started" if holder is None else ""
    remedy = "Wait for it, or choose another --workspace."
    if holder is not None:
        who = f"host {holder.host}, pid {holder.pid}, since {holder.since}"
        if not holder.is_here():
            remedy += " If you know that it is dead, take its lock over by --take-lock."
    return LockedError(f"another run holds {printable(folder)}", found=who, remedy=remedy)


def _holder(folder: Path) -> Holder | None:
    """Holder that the folder names, if any."""
    try:
        return _HOLDER.validate_python(read_json(folder / HOLDER))
    except (FileNotFoundError, ValueError):
        return None
