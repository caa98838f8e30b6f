"""Staging: a checkpoint is written beside the output, then published by a rename.

docs/format.md has its files. lorashare 0.1.3 refuses unknown fields of share_config.json, so everything of ours is in
`compression_stats["lorashare_stream"]`, in adapter_meta.json, or in files of its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.safetensors import write_arrays, write_safetensors
from ..errors import LockedError
from ..files import atomic_file, link_or_copy, own_folder, read_json, remove_tree, sync, sync_tree, write_json
from ..workspace.journal import Admission
from .config import config_bytes
from .format import ADAPTERS, COMPONENTS, CONFIG, META, SKIPPED, SPECTRUM, STAGING, ours_of
from .publish import drop, publish, recover_output, replaced_folder, staging_folder
from .records import is_whole

MANY, SYNCS = 128, 8  # adapters in a lot, and threads that sync one: one alone takes ten times as long on ext4


class Staging:
    """Staged checkpoint in the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    @contextmanager
    def open(cls, out: Path, digest: str) -> Iterator[Staging]:
        """Resume the staged checkpoint of this digest, or begin it; that of another digest is removed.

        Raises:
            LockedError: if another run is writing the same output.
        """
        root = own_folder(staging_folder(out))
        fd = os.open(root, os.O_RDONLY)
        try:
            _lock(fd, out)
            if not _is_of(root, digest):
                drop(root, keep=True)
            if _marker(root) != digest:
                write_json(root / STAGING, digest)
                sync(root.parent)
            own_folder(root / ADAPTERS)
            for path in (*root.glob(".*.tmp"), *(root / ADAPTERS).glob(".*")):  # of a run that was killed
                remove_tree(path)
            yield cls(root)
        finally:
            os.close(fd)

    def write_components(
        self,
        components: Iterable[bytes | memoryview],
        shapes: Mapping[str, tuple[int, int]],
        dtype: str,
        basis_key: str,
    ) -> None:
        """Stream all bases into shared_components.safetensors.

        Args:
            components: of the groups, as stored, in the order of `shapes`.
            shapes: group id -> (d, k).
            dtype: as safetensors names it.
            basis_key: stored in the header.
        """
        metadata = {"format": "pt", "basis_digest": basis_key}
        with atomic_file(self.root / COMPONENTS) as f:
            stored = ((g, dtype, shape) for g, shape in shapes.items())
            write_safetensors(f, stored, components, metadata)

    def write_spectrum(self, eigenvalues: Mapping[str, Sequence[float]]) -> None:
        """Write the eigenvalues (k,) of every group, which tell what a smaller k would explain."""
        arrays = {group: np.asarray(values, "<f8") for group, values in eigenvalues.items()}
        with atomic_file(self.root / SPECTRUM) as f:
            write_arrays(f, arrays, "F64", {"format": "pt"})

    def done(self, admission: Admission, basis_key: str) -> bool:
        """Whether an adapter is staged, whole, and of these components; one that is not is removed."""
        folder = self.root / ADAPTERS / admission.name
        if not os.path.lexists(folder):
            return False
        whole = not folder.is_symlink() and is_whole(self.root, admission, basis_key)
        if not whole:
            remove_tree(folder)
        return whole

    @contextmanager
    def adapter(self, name: str) -> Iterator[Path]:
        """Temporary folder of one adapter, renamed into its place at the end of the block.

        Its name is used once: a cluster may do a task again while the worker that it has lost still does it. Both
        write the same bytes, of which the first stay, being read perhaps.
        """
        folder, place = self.root / ADAPTERS / f".{uuid.uuid4().hex}", self.root / ADAPTERS / name
        folder.mkdir()
        yield folder
        try:
            os.rename(folder, place)
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            aside = folder
            if (place / META).read_bytes() != (folder / META).read_bytes():  # which has the digests of the others
                aside = folder.with_name(f"{folder.name}.replaced")
                os.rename(place, aside)
                os.rename(folder, place)
            remove_tree(aside)

    def link(self, out: Path, names: Iterable[str]) -> None:
        """Link bases and adapters from a checkpoint; copies them on a disk without hard links."""
        for file in (COMPONENTS, SPECTRUM):
            if (out / file).exists():
                link_or_copy(out / file, self.root / file)
        folders = [self.root / ADAPTERS / name for name in names]
        for folder in folders:
            folder.mkdir(exist_ok=True)
            with os.scandir(out / ADAPTERS / folder.name) as entries:
                for entry in entries:
                    if entry.is_file() and not os.path.lexists(folder / entry.name):
                        link_or_copy(Path(entry.path), folder / entry.name)
        self._sync_each(folders, sync)  # the files are durable

    @contextmanager
    def syncing(self) -> Iterator[Callable[[str], None]]:
        """Sync written adapters in the background; yields a function that takes their names.

        A sync begins when the last has ended, and takes all that has come since.
        """
        names: list[str] = []
        last: Future[None] = Future()
        last.set_result(None)

        def written(name: str) -> None:
            nonlocal names, last
            names.append(name)
            if len(names) >= MANY and last.done():
                last.result()
                last, names = pool.submit(self.sync, names), []

        with ThreadPoolExecutor(1) as pool:
            yield written
            last.result()
        self.sync(names)

    def sync(self, names: Collection[str]) -> None:
        """Sync adapters; concurrent syncs share a commit of the file system's journal."""
        self._sync_each([self.root / ADAPTERS / name for name in names], sync_tree)

    def _sync_each(self, folders: Collection[Path], how: Callable[[Path], None]) -> None:
        with ThreadPoolExecutor(SYNCS) as pool:
            for _ in pool.map(how, folders):
                pass
        if folders:
            sync(self.root / ADAPTERS)

    def commit(self, out: Path, config: Mapping[str, Any], skipped: list[dict[str, Any]]) -> None:
        """Write skipped.json and, last, share_config.json, and publish the folder."""
        _write_skipped(self.root, skipped)
        for path in (self.root / ADAPTERS).glob(".*"):  # of a worker of a cluster that was killed
            remove_tree(path)
        with atomic_file(self.root / CONFIG) as f:
            f.write(config_bytes(config))
        (self.root / STAGING).unlink()
        sync(self.root)
        publish(self.root, out)

    def clear(self) -> None:
        """Remove the staging folder."""
        drop(self.root)


def recover(out: Path) -> None:
    """Recover an output from a kill between two renames, unless a run is between them now.

    Raises:
        LockedError: if it is.
    """
    staging = staging_folder(out)
    if not (replaced_folder(out).exists() and staging.exists()):
        recover_output(out)
        return
    fd = os.open(staging, os.O_RDONLY)
    try:
        _lock(fd, out)
        recover_output(out)
    finally:
        os.close(fd)


def _write_skipped(root: Path, skipped: list[dict[str, Any]]) -> None:
    """Write skipped.json, if any adapter was left out."""
    (root / SKIPPED).unlink(missing_ok=True)
    if skipped:
        write_json(root / SKIPPED, skipped)


def _lock(fd: int, out: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(
            "another run is writing the same output", found=out, remedy="Wait for it, or choose another output."
        ) from None


def _is_of(root: Path, digest: str) -> bool:
    """Whether the staged checkpoint is of this digest: by its marker, or, once it is whole, by its configuration."""
    if (root / STAGING).exists():
        return bool(_marker(root) == digest)
    return (ours_of(root) or {}).get("digest") == digest


def _marker(root: Path) -> Any:
    try:
        return read_json(root / STAGING)
    except (FileNotFoundError, ValueError):
        return None
