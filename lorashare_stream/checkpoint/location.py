"""Where a SHARE checkpoint lies: a folder here, or what else gives its files one at a time (`hub.repository`)."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from .format import ADAPTERS
from .packs import opened
from .publish import settled


class Place(Protocol):
    """Gives the files of one checkpoint by their paths in it.

    Attributes:
        root: the folder that holds its configuration.
        mixed: what it means if parts of it belong to different bases.
        near: bytes between two parts of a file that it is cheaper to read along than to read the parts one by one.
    """

    mixed: str
    near: int
    root: Path

    def file(self, relative: str) -> Path:
        """The path of a file of it on this machine.

        Raises:
            FileNotFoundError: if it has no such file.
        """
        ...

    def read(self, relative: str, offset: int, count: int) -> bytes:
        """Bytes of a file of it; fewer at its end.

        Raises:
            FileNotFoundError: if it has no such file.
        """
        ...

    def adapters(self) -> Collection[str] | None:
        """Folder names of its adapters; None if they are not known without asking for each."""
        ...

    def fetch(self) -> None:
        """Have all files at once, sooner than one by one."""
        ...

    def is_closed(self) -> bool:
        """Whether not everybody may read it."""
        ...


class Folder:
    """A checkpoint in a folder.

    Attributes:
        root: the folder.
        mixed: what it means if parts of it belong to different bases.
        near: bytes that it is cheaper to read along: none.
    """

    mixed = "the checkpoint was replaced, open it again"
    near = 0

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def file(self, relative: str) -> Path:
        """Where a file of it is.

        Raises:
            FileNotFoundError: if it has no such file.
        """
        path = self.root / relative
        if not path.exists():
            settled(self.root)
        if not path.exists():
            raise FileNotFoundError(relative)
        return path

    def read(self, relative: str, offset: int, count: int) -> bytes:
        """Bytes of a file of it; fewer at its end.

        Raises:
            FileNotFoundError: if it has no such file.
        """
        with opened(self.file(relative)) as read:
            return bytes(read(offset, count))

    def adapters(self) -> Collection[str] | None:
        """The names of the folders of its adapters; None if they are not known without asking for each."""
        try:
            with os.scandir(self.root / ADAPTERS) as entries:
                return {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}
        except FileNotFoundError:
            return set()

    def fetch(self) -> None:
        """Have all files at once, sooner than one by one."""

    def is_closed(self) -> bool:
        """Whether not everybody may read it: of a folder it is not known."""
        return False
