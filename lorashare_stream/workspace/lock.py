"""Who holds a folder: one process at a time, named, alive, and found out when it is not.

The lock is a file that says who holds it, under the kernel's own lock (`flock`) where there is one. The kernel
lets go of it however a process ends, so that on one host a dead process never stands in the way. Across hosts a
shared file system may know nothing of the other host's `flock`: there the file's age tells, which the holder renews.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from ..errors import LockedError
from ..files import naming
from ..runtime.forks import BEATING
from ..text import printable

HEARTBEAT = 30.0  # seconds between two signs of life
SILENCE = 300.0  # seconds without one after which another host's lock is taken over
_NO_KERNEL_LOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a lock.

    Attributes:
        host, pid: which it is.
        started: when it was started, in seconds of the epoch: a later process may have the same pid.
        since: when it took the lock, for people.
        token: of this hold; another one in the file means that the lock was taken over.
    """

    host: str
    pid: int
    started: float
    since: str
    token: str

    def is_here(self) -> bool:
        """Whether it runs, or ran, on this host."""
        return self.host == platform.node()

    def is_alive(self) -> bool:
        """Whether it runs, on this host; clocks may be set, so that its start is known to two seconds."""
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.started) < 2)
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:  # it is there, and not ours to look at
            return True


_held: dict[Path, tuple[IO[str], Holder]] = {}  # by this process


@contextmanager
def held(path: Path, *, take: bool = False) -> Iterator[Callable[[], None]]:
    """Hold the lock file at `path` until the end of the block.

    Args:
        path: the file; its folder exists.
        take: take over the lock of another host, whatever its age.

    Yields:
        A check that raises if the lock was taken over since.

    Raises:
        LockedError: saying who holds it.
    """
    file = _locked(path, take)
    mine = Holder(
        platform.node(), os.getpid(), psutil.Process().create_time(), time.strftime("%Y-%m-%d %H:%M:%S %z"),
        uuid.uuid4().hex,
    )  # fmt: skip
    done = threading.Event()
    try:
        with naming(path):
            file.seek(0)
            file.truncate()
            file.write(json.dumps(asdict(mine)))
            file.flush()

        def check() -> None:
            if not _is_mine(path, mine):
                raise LockedError(
                    f"the lock of {printable(path.parent)} was taken over",
                    found=_holder(path) or "no holder",
                    expected=f"pid {mine.pid} on {mine.host}",
                    remedy="Two runs wrote to it: let the other one finish, then run the same command again.",
                )

        check()
        _held[path] = file, mine
        threading.Thread(target=_beat, args=(path, mine, done), name=BEATING, daemon=True).start()
        yield check
    finally:
        done.set()
        _held.pop(path, None)
        _let_go(path, file, mine)
        file.close()


def let_go() -> None:
    """Let go of all locks of this process, which is about to end: another host need not wait for its silence."""
    for path, (file, mine) in list(_held.items()):
        _let_go(path, file, mine)


def _let_go(path: Path, file: IO[str], mine: Holder) -> None:
    if _is_mine(path, mine):
        with suppress(OSError):
            file.truncate(0)


def _locked(path: Path, take: bool) -> IO[str]:
    """The lock file, open, under the kernel's lock, held by nobody else."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            kernel_says_free = _flock(file)
            holder = _holder(path)
            if holder is not None and _stands(holder, path, take):
                raise _held_by(path, holder)
            if not kernel_says_free:
                if not (take and holder is not None):
                    raise _held_by(path, holder)
                path.unlink(missing_ok=True)  # its holder keeps a file without a name
            elif _same_file(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _flock(file: IO[str]) -> bool:
    """Whether the kernel gives us the lock, or knows of none on this file system."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in _NO_KERNEL_LOCK:
            raise
    return True


def _stands(holder: Holder, path: Path, take: bool) -> bool:
    """Whether what the file says of its holder keeps others out."""
    return holder.is_alive() if holder.is_here() else not take and _silence(path) < SILENCE


def _silence(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system."""
    probe = path.parent / f".{uuid.uuid4().hex}.tmp"
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


def _held_by(path: Path, holder: Holder | None) -> LockedError:
    who = "a process that has just started" if holder is None else ""
    remedy = "Wait for it, or choose another --workspace."
    if holder is not None:
        who = f"host {holder.host}, pid {holder.pid}, since {holder.since}"
        if not holder.is_here():
            remedy += f" If it is dead, its lock falls after {SILENCE / 60:.0f} minutes of silence, or by --take-lock."
    return LockedError(f"another run holds {printable(path.parent)}", found=who, remedy=remedy)


def _holder(path: Path) -> Holder | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        holder = Holder(**values)
        whole = isinstance(holder.pid, int) and holder.pid > 0 and isinstance(holder.started, float)
        return holder if whole and isinstance(holder.host, str) else None
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None


def _is_mine(path: Path, mine: Holder) -> bool:
    """Whether the file still names this hold; a file that cannot be read now is not one that was taken."""
    try:
        return _holder(path) == mine
    except OSError:
        return True


def _same_file(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _beat(path: Path, mine: Holder, done: threading.Event) -> None:
    """Show that the holder lives, until it is done or its lock is taken."""
    while not done.wait(HEARTBEAT) and _is_mine(path, mine):
        with suppress(OSError):
            os.utime(path)
