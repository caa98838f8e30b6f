"""Where a checkpoint lies: a folder here, or what else gives its files one at a time (`hub.repository`)."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from .format import ADAPTERS
from .publish import settled


class Place(Protocol):
    """Where one checkpoint lies; its files are named by their paths in it.

    Attributes:
        root: the folder that holds its configuration.
        mixed: what it means if parts of it belong to different bases.
        near: bytes between two parts of a file that it is cheaper to read along than to read the parts one by one.
    """

    mixed: str
    near: int
    root: Path

    def file(self, relative: str) -> Path:
        """The path of a file on this machine.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        ...

    def read(self, relative: str, offset: int, count: int) -> bytes:
        """Bytes of a file; fewer at its end.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        ...

    def adapters(self) -> Collection[str] | None:
        """Folder names of the adapters; None if they are not known without asking for each."""
        ...

    def fetch(self) -> None:
        """Have all files at once, sooner than one by one."""
        ...

    def is_closed(self) -> bool:
        """Whether not everybody may read it."""
        ...


class Folder(Place):
    """A checkpoint in a folder."""

    mixed = "the checkpoint was replaced, open it again"
    near = 0

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def file(self, relative: str) -> Path:
        """The path of a file; a checkpoint that is replaced meanwhile is waited for."""
        path = self.root / relative
        if not path.exists():
            settled(self.root)
        if not path.exists():
            raise FileNotFoundError(relative)
        return path

    def read(self, relative: str, offset: int, count: int) -> bytes:
        """Bytes of a file."""
        return read_part(self.file(relative), offset, count)

    def adapters(self) -> Collection[str] | None:
        """Names of the adapters' folders."""
        try:
            with os.scandir(self.root / ADAPTERS) as entries:
                return {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}
        except FileNotFoundError:
            return set()

    def fetch(self) -> None:
        """Nothing: all files are there."""

    def is_closed(self) -> bool:
        """False: of a folder it is not known."""
        return False


def read_part(path: Path, offset: int, count: int) -> bytes:
    """Bytes of a file, fewer at its end; it is not mapped, so that one which is cut short meanwhile is no signal."""
    with path.open("rb", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        return os.pread(f.fileno(), max(0, min(count, size - offset)), offset)
