"""Where a checkpoint lies: a folder here, or what else gives its files one at a time (`hub.repository`)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

from .format import ADAPTERS
from .publish import settled


class Place(ABC):
    """Where one checkpoint lies; its files are named by their paths in it.

    Attributes:
        root: the folder that holds its configuration.
        mixed: what it means if parts of it belong to different bases.
        near: bytes between two parts of a file that it is cheaper to read along than to read the parts one by one.
    """

    root: Path
    mixed: str
    near = 0

    @abstractmethod
    def file(self, relative: str) -> Path:
        """The path of a file on this machine.

        Raises:
            FileNotFoundError: if there is no such file.
        """

    def read(self, relative: str, offset: int, count: int) -> bytes:
        """Bytes of a file, fewer at its end.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        with self.file(relative).open("rb", buffering=0) as f:  # no map: a file that is cut short meanwhile is an error
            size = os.fstat(f.fileno()).st_size
            return os.pread(f.fileno(), max(0, min(count, size - offset)), offset)

    def adapters(self) -> Collection[str] | None:
        """Folder names of the adapters; None if they are not known without asking for each."""
        return None

    @abstractmethod
    def fetch(self) -> None:
        """Have all files at once, sooner than one by one."""

    def is_closed(self) -> bool:
        """Whether it is known that not everybody may read it."""
        return False


class Folder(Place):
    """A checkpoint in a folder."""

    mixed = "the checkpoint was replaced, open it again"

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

    def adapters(self) -> Collection[str] | None:
        """Folder names of the adapters."""
        try:
            with os.scandir(self.root / ADAPTERS) as entries:
                return {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}
        except FileNotFoundError:
            return set()

    def fetch(self) -> None:
        """Nothing: all files are there."""
