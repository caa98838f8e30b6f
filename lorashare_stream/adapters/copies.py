"""Adapters whose files are the same, in a whole collection, without reading more of it than a page of each file."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from .adapter import Adapter
from .folder import FileFact, digest_files

_PROBE = 4 << 10  # bytes from the middle of a file


def identical(adapters: Iterable[Adapter]) -> tuple[tuple[str, ...], ...]:
    """Groups of names, the largest first: same configuration and same bytes; of the Hub, by the digests it lists.

    Files of one size are told apart by a page from the middle, and those that this leaves by their digests.
    """
    local = [e for e in adapters if e.fetched]
    remote = [e for e in adapters if not e.fetched and e.origin is not None and e.origin.sha256 is not None]
    same = [list(local)]
    for key in (_sizes, _pages, lambda e: digest_files(e.paths)):
        same = [part for some in same for part in _alike(some, key)]
    same += _alike(remote, lambda e: e.origin.sha256 if e.origin else None)
    return tuple(sorted((tuple(e.name for e in some) for some in same), key=lambda names: (-len(names), names)))


def _alike(adapters: list[Adapter], key: Callable[[Adapter], Hashable]) -> list[list[Adapter]]:
    """Those of equal key, if they are two or more; what cannot be read has none."""
    found: dict[Hashable, list[Adapter]] = {}
    for adapter in adapters:
        try:
            found.setdefault(key(adapter), []).append(adapter)
        except OSError:
            continue
    return [some for some in found.values() if len(some) > 1]


def _sizes(adapter: Adapter) -> Hashable:
    return adapter.config_digest, tuple(f.size for f in adapter.files)


def _pages(adapter: Adapter) -> Hashable:
    return tuple(_page(f) for f in adapter.files)


def _page(file: FileFact) -> bytes:
    descriptor = os.open(Path(file.path), os.O_RDONLY)
    try:
        return os.pread(descriptor, _PROBE, file.size // 2)
    finally:
        os.close(descriptor)
