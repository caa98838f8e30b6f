"""Cache of adapter folders for vLLM, which loads adapters by path: each is written once and stays."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..adapters.folder import digest_files
from ..adapters.hubid import cached_id
from ..checkpoint.config import SHAREConfig
from ..checkpoint.format import ADAPTERS, COMPONENTS, CONFIG, LOADINGS, OURS
from ..checkpoint.location import Folder, Place
from ..checkpoint.reader import CheckpointReader, open_checkpoint
from ..checkpoint.records import REPAIR
from ..checkpoint.restore import save_adapter
from ..errors import CheckpointError, DiskError
from ..files import naming, remove_tree, sync
from ..hub.repository import place_of
from ..settings import Settings
from ..text import digest_of, printable
from .engines import check_engine
from .uniform import uniform

FORM = 1  # of the folders: another one gives them other paths
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class FolderCache:
    """Cache of uniform adapter folders, CACHE/<digest of the adapter>/<name>, of one checkpoint.

    A folder appears whole, by one rename, and is neither changed nor removed: vLLM reads it again after it has evicted
    the adapter. Processes and threads may share a cache. An adapter of another content has another path.

    Args:
        checkpoint: a folder, whose replacement by another checkpoint is seen at the next call; or an id of the Hub,
            of which one commit is served.
        cache: the folder of the cache.
    """

    def __init__(self, checkpoint: str, cache: Path) -> None:
        self.checkpoint, self.cache = checkpoint, cache
        self._lock = threading.Lock()
        self._open: tuple[CheckpointReader, object] | None = None

    def reader(self) -> CheckpointReader:
        """The checkpoint that is there now; raises CheckpointError if there is none."""
        with self._lock:
            if self._open is None or _stamp(self._open[0].place) != self._open[1]:
                place = place_of(self.checkpoint)
                stamp = _stamp(place)  # before it is read: what replaces it meanwhile has another
                self._open = open_checkpoint(place), stamp
            return self._open[0]

    def folder(self, name: str) -> Path | None:
        """The folder of an adapter, written if it is not there; None if the checkpoint has no such adapter.

        Raises:
            CheckpointError: if the adapter is damaged, or vLLM does not take it.
            DiskError: if the disk of the cache is full; what was there stays.
        """
        reader = self.reader()
        try:
            return self._folder(reader, name)
        except CheckpointError:
            now = self.reader()
            if now is reader:
                raise
            return self._folder(now, name)  # the checkpoint was replaced while it was read

    def _folder(self, reader: CheckpointReader, name: str) -> Path | None:
        if name not in reader.names:
            return None
        folder = self.cache / _digest(reader, name) / name
        if not folder.is_dir():
            config, ours = reader.adapter_config(name), reader.meta(name).ours
            _check_files(reader, name, ours.files if ours else {})
            tensors, config = uniform(reader.tensors(name), config, adapter=name)
            check_engine("vllm", tensors, config, adapter=name)
            try:
                _write(folder, tensors, config, ours.source_id if ours else None)
            except OSError as e:
                if e.errno not in _FULL:
                    raise
                raise DiskError(
                    "the disk of the cache is full", adapter=name, found=self.cache,
                    remedy="Make room, or name another folder by LORASHARE_CACHE.",
                ) from e  # fmt: skip
        return folder


def names_base(config: SHAREConfig, name: str, aliases: tuple[str, ...] = ()) -> bool:
    """Whether a name, a path or an id, is that of the base model of a checkpoint, as far as names tell.

    The names that `--base-alias` gave when it was made count, and `aliases`.
    """
    made = config.record.settings if config.record else Settings()
    known = {config.base_model_name_or_path, *aliases, *made.base_aliases}
    cached = cached_id(name)
    if name in known or (cached is not None and cached.repo in known) or made.any_base:
        return True
    return any(os.path.isdir(other) and os.path.isdir(name) and os.path.samefile(other, name) for other in known)


def _stamp(place: Place) -> object:
    """Inode, time and size of a checkpoint's configuration; None on the Hub, of which one commit stays open."""
    if not isinstance(place, Folder):
        return None
    try:
        stat = os.stat(place.root / CONFIG)
    except FileNotFoundError:
        return object()  # between two renames
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _digest(reader: CheckpointReader, name: str) -> str:
    """Digest of what decides the tensors of an adapter."""
    meta = reader.meta(name)
    plain = meta.plain()
    if reader.config.coded:  # the digest of its source and its exact error; the key of the checkpoint is of all
        return digest_of([FORM, meta.original_config, {**plain[OURS], "basis_digest": None}])
    if meta.ours is not None:  # digests of its loadings and of the bases
        return digest_of([FORM, plain])
    files = [reader.place.file(file) for file in (COMPONENTS, f"{ADAPTERS}/{name}/{LOADINGS}")]
    return digest_of([FORM, plain, digest_files(files)])


def _check_files(reader: CheckpointReader, name: str, files: Mapping[str, str]) -> None:
    """Demand that the files of an adapter are those that its record names; codes have checksums of their own."""
    for file, digest in files.items():
        found = digest_files([reader.place.file(f"{ADAPTERS}/{name}/{file}")])
        if found != digest:
            raise CheckpointError(
                f"{printable(file)} is damaged", adapter=name, found=found, expected=digest, remedy=REPAIR
            )


def _write(folder: Path, tensors: Any, config: Any, source: str | None) -> None:
    """Write an adapter folder under a temporary name and rename it, unless another process was sooner."""
    temporary = folder.with_name(f".{uuid4().hex}")
    try:
        with naming(temporary):
            temporary.mkdir(parents=True)
            save_adapter(temporary, tensors, config, source)
            os.rename(temporary, folder)
            sync(folder.parent)
    except OSError as e:
        if e.errno not in _TAKEN or not folder.is_dir():
            raise
    finally:
        remove_tree(temporary)
