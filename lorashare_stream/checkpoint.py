"""The SHARE checkpoint, written: staged beside the output, then published by one rename.

    share_config.json                     what lorashare's SHAREConfig knows, and `compression_stats`
    shared_components.safetensors         module:side -> V (d, k)
    adapters/<name>/loadings.safetensors  module:side -> V'W (k, r)
    adapters/<name>/classifier_head.safetensors   tensors kept verbatim, under their PEFT keys
    adapters/<name>/adapter_meta.json     original_config, source, certified error, digest of the basis
    skipped.json                          adapters that were left out, with reasons; only if there are some

lorashare 0.1.3 refuses unknown fields of share_config.json, so everything of ours is in
`compression_stats["lorashare_stream"]`, in adapter_meta.json, or in files of its own.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .adapterfiles import digest_files, tensor_records
from .errors import WorkspaceError
from .files import atomic_file, own_folder, read_json, remove_tree, sync_tree, write_json
from .publishing import drop, publish, staging_folder
from .shareformat import ADAPTERS, COMPONENTS, CONFIG, META, OURS, SKIPPED, STAGING
from .tensorfile import SafetensorsReader, write_safetensors


class Staging:
    """A checkpoint in the making."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    @contextmanager
    def open(cls, out: Path, digest: str) -> Iterator[Staging]:
        """Go on with the staged checkpoint of this digest, or begin it; the staged one of another is dropped.

        Raises:
            WorkspaceError: if another run is writing the same output.
        """
        root = own_folder(staging_folder(out))
        fd = os.open(root, os.O_RDONLY)
        try:
            _lock(fd, out)
            if not _is_of(root, digest):
                drop(root, keep=True)
                write_json(root / STAGING, digest)
            own_folder(root / ADAPTERS)
            for path in (*root.glob(".*.tmp"), *(root / ADAPTERS).glob(".*")):  # of a run that was killed
                remove_tree(path)
            yield cls(root)
        finally:
            os.close(fd)

    def write_components(
        self, bases: Sequence[Path], shapes: Mapping[str, tuple[int, int]], dtype: str, digest: str
    ) -> None:
        """Stream all bases into shared_components.safetensors.

        Args:
            bases: files with the components `A` and `B` of one module each.
            shapes: group id -> (d, k), in the order of the files, A before B.
            dtype: as safetensors names it.
            digest: of the basis, stored in the header.
        """
        metadata = {"format": "pt", "basis_digest": digest}
        with atomic_file(self.root / COMPONENTS) as f:
            write_safetensors(f, ((g, dtype, shape) for g, shape in shapes.items()), _raw_tensors(bases), metadata)

    def done(self, name: str) -> bool:
        """Whether an adapter is written, whole; what is not is removed. A power cut may leave names without content."""
        folder = self.root / ADAPTERS / name
        try:
            digests = read_json(folder / META)[OURS]["files"]
            whole = not folder.is_symlink() and all(
                digest_files([folder / file]) == digest for file, digest in digests.items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            remove_tree(folder)
        return whole

    @contextmanager
    def adapter(self, name: str) -> Iterator[Path]:
        """A folder to write one adapter into, which takes its place at the end of the block."""
        folder = self.root / ADAPTERS / f".{name}"
        remove_tree(folder)
        folder.mkdir()
        yield folder
        os.rename(folder, self.root / ADAPTERS / name)

    def metas(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """What is recorded of each adapter."""
        for name in names:
            yield read_json(self.root / ADAPTERS / name / META)

    def commit(self, out: Path, config: Mapping[str, Any], skipped: list[dict[str, Any]]) -> None:
        """Write what is left, share_config.json last, and rename the folder into place."""
        (self.root / SKIPPED).unlink(missing_ok=True)  # of an earlier attempt
        if skipped:
            write_json(self.root / SKIPPED, skipped)
        sync_tree(self.root / ADAPTERS)  # once for all, since every adapter can be checked by its digests
        write_json(self.root / CONFIG, config)
        (self.root / STAGING).unlink()
        publish(self.root, out)


def _lock(fd: int, out: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkspaceError(
            "another run is writing the same output", found=out, remedy="Wait for it, or choose another output."
        ) from None


def _is_of(root: Path, digest: str) -> bool:
    try:
        return bool(read_json(root / STAGING) == digest)
    except (OSError, ValueError):
        return False


def _raw_tensors(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with SafetensorsReader((path,)) as reader:
            for record in tensor_records((path,)):
                yield from reader.chunks(record)
