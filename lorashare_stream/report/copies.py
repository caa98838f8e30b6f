"""Adapters whose files are the same, by a page of each file; and those with nearly the same dW, by their products."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.folder import FileFact, digest_files

SAME_DIRECTION, COPY = 0.99, 0.01  # cosine of two dW; their distance, relative to the larger
_PROBE = 4 << 10  # bytes from the middle of a file


def identical(adapters: Iterable[Adapter]) -> tuple[tuple[str, ...], ...]:
    """Groups of names, the largest first: same configuration and same bytes; of the Hub, by the digests it lists.

    Files of one size are told apart by a page from the middle, and those that this leaves by their digests.
    """
    local = [e for e in adapters if e.fetched]
    remote = [e for e in adapters if not e.fetched and e.origin is not None and e.origin.sha256 is not None]
    same = [list(local)]
    for key in (
        lambda e: (e.config_digest, *(f.size for f in e.files)),
        lambda e: tuple(map(_page, e.files)),
        lambda e: digest_files(e.paths),
    ):
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


def _page(file: FileFact) -> bytes:
    with file.path.open("rb", buffering=0) as f:
        f.seek(file.size // 2)
        return f.read(_PROBE)


def near_duplicates(inner: NDArray[np.float64]) -> list[tuple[int, int, float, float]]:
    """Pairs of adapters with nearly the same dW, the nearest first: numbers, relative distance, cosine.

    Args:
        inner: (m, m) products of dW.
    """
    squares = np.maximum(np.diag(inner), 1e-300)
    larger = np.sqrt(np.maximum(squares[:, None], squares))
    relative = np.sqrt(np.maximum(squares[:, None] + squares - 2 * inner, 0.0)) / larger
    cosine = inner / np.sqrt(np.outer(squares, squares))
    pairs = np.argwhere(np.triu((cosine > SAME_DIRECTION) | (relative < COPY), 1)).tolist()
    return sorted(((i, j, float(relative[i, j]), float(cosine[i, j])) for i, j in pairs), key=lambda p: (p[2], p[:2]))
