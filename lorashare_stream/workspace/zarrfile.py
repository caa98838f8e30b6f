"""Zarr v3 arrays of numbers, uncompressed, a checksum on every chunk: what `zarr` would write, by plain system calls.

    zarr.json    shape, dtype and shape of a chunk
    c/I/J        chunk (I, J), c/I if the array has one axis: the numbers in C order, little-endian, zeros where it
                 reaches beyond the array, then the crc32c of these bytes in 4 bytes, little-endian

`zarr.open_array(path, mode="r")` reads them, where `zarr` is installed. It is not used here: it copies every chunk
several times, by an event loop and threads, and reads a missing chunk as zeros, where `read` finds a fault.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ..files import naming
from ..linalg.types import Array

METADATA = "zarr.json"


@dataclass(frozen=True)
class ZarrFile:
    """An array (n,) or (n, d) on disk, which is cut into chunks of one shape.

    Attributes:
        path: its folder.
        shape: (n,) or (n, d).
        chunk: the shape of a chunk, as many axes.
        dtype: of its numbers, little-endian float32 or float64.
    """

    path: Path
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype[np.floating[Any]]

    def write(self, rows: Array, first: int = 0) -> None:
        """Write rows (m,) or (m, d) from row `first` on; a chunk is copied only if it does not lie as on disk.

        Of a chunk that has other rows too, these are kept, or zeros until they are written.

        Raises:
            ValueError: if they do not fit into the array.
            OSError: naming the chunk, which EIO says reads otherwise than it was written.
        """
        end = first + len(rows)
        if rows.shape[1:] != self.shape[1:] or not 0 <= first <= end <= self.shape[0]:
            raise ValueError(f"rows {rows.shape} from {first} on do not fit into {self.shape}")
        table, tile = _table(rows), np.empty(self._tile, self.dtype)
        height, width = self._tile
        for i in range(first // height, -(-end // height)):
            top, bottom = i * height, min((i + 1) * height, self.shape[0])
            start, stop = max(first, top), min(end, bottom)
            for j, left in enumerate(range(0, table.shape[1], width)):
                part, path = table[start - first : stop - first, left : left + width], self._path(i, j)
                if not _lies_as(part, tile):
                    if (start, stop) != (top, bottom):
                        _resume(path, tile)
                    elif part.shape != tile.shape:
                        tile.fill(0)
                    tile[start - top : stop - top, : part.shape[1]] = part
                    part = tile
                data = _bytes_of(part)
                _write(path, [data.data, memoryview(_checksum(data))])

    def read(self, seen: Callable[[Array], object] = lambda rows: None) -> Array:
        """The array, row-major; at most one chunk is copied at a time.

        Args:
            seen: is called with all rows, in turn, that were read together, while they are in the cache.

        Raises:
            FileNotFoundError: if a chunk is missing.
            ValueError: if a chunk is longer or shorter than it was, or its checksum is not of its bytes.
            OSError: of the machine, naming the chunk.
        """
        out, tile = np.empty(self.shape, self.dtype), np.empty(self._tile, self.dtype)
        table, (height, width) = _table(out), self._tile
        for i, top in enumerate(range(0, len(table), height)):
            for j, left in enumerate(range(0, table.shape[1], width)):
                part = table[top : top + height, left : left + width]
                if _lies_as(part, tile):
                    _read(self._path(i, j), part)
                else:
                    _read(self._path(i, j), tile)
                    part[...] = tile[: part.shape[0], : part.shape[1]]
            seen(out[top : top + height])
        return out

    @property
    def _tile(self) -> tuple[int, int]:
        """The shape of a chunk, of an array of one axis as of one with a single column."""
        return self.chunk[0], math.prod(self.chunk[1:])

    def _path(self, i: int, j: int) -> Path:
        return self.path.joinpath("c", *map(str, (i, j)[: len(self.shape)]))


def create(path: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str) -> ZarrFile:
    """An array of which nothing is written yet, in a new folder.

    Raises:
        OSError: FileExistsError if there is something at `path`, or of the machine.
    """
    array = ZarrFile(path, shape, chunk, _little(dtype))
    path.mkdir(parents=True)
    text = json.dumps(_described(array), indent=2).encode()
    _write(path / METADATA, [memoryview(text)])
    for i in range(-(-shape[0] // chunk[0])):
        array._path(i, 0).parent.mkdir(parents=True, exist_ok=True)
    return array


def opened(path: Path) -> ZarrFile:
    """An array that `create` made; its metadata are believed."""
    described = json.loads((path / METADATA).read_text())
    chunk = described["chunk_grid"]["configuration"]["chunk_shape"]
    return ZarrFile(path, tuple(described["shape"]), tuple(chunk), _little(described["data_type"]))


def _described(array: ZarrFile) -> dict[str, Any]:
    return {
        "shape": array.shape,
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _little(name: str) -> np.dtype[np.floating[Any]]:
    return np.dtype(name).newbyteorder("<")


def _table(array: Array) -> Array:
    return array[:, None] if array.ndim == 1 else array


def _lies_as(part: Array, tile: Array) -> bool:
    """Whether a part of an array lies in memory as a whole chunk lies on disk."""
    return part.shape == tile.shape and part.dtype == tile.dtype and part.flags.c_contiguous


def _bytes_of(chunk: Array) -> NDArray[np.uint8]:
    return chunk.reshape(-1).view(np.uint8)


def _checksum(data: NDArray[np.uint8]) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _read(path: Path, chunk: Array) -> None:
    """Read a file into an array that lies as it does; see `ZarrFile.read` for errors."""
    data, tail = _bytes_of(chunk), bytearray(5)  # the checksum, and a byte that must not be there
    fd = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            size = _transfer(lambda views, done: os.preadv(fd, views, done), [data.data, memoryview(tail)])
    finally:
        os.close(fd)
    if size != len(data) + 4:
        raise ValueError(f"the chunk {path} has not {len(data) + 4} bytes")
    if tail[:4] != _checksum(data):
        raise ValueError(f"the chunk {path} fails its checksum")


def _resume(path: Path, tile: Array) -> None:
    """Read a chunk that is to be written again with more rows; zeros if nothing of it was written yet."""
    try:
        _read(path, tile)
    except FileNotFoundError:
        tile.fill(0)
    except ValueError as e:  # this run has just written it: a fault of the machine
        raise OSError(errno.EIO, str(e), str(path)) from e


def _write(path: Path, views: Sequence[memoryview]) -> None:
    """Make a file of some buffers. It is synced, and gets its last name, with the folder of all that belongs to it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with naming(path):
            _transfer(lambda views, _: os.writev(fd, views), views)
    finally:
        os.close(fd)


def _transfer(step: Callable[[list[memoryview], int], int], views: Sequence[memoryview]) -> int:
    """Fill or write buffers by system calls that may do a part of it: a full disk has an error only for the rest.

    Args:
        step: the call, of what is left and of the bytes before it; gives how many it did, 0 at the end of a file.
        views: the buffers, of bytes.

    Returns:
        how many bytes were read or written.
    """
    left, done = list(views), 0
    while left and (count := step(left, done)):
        done += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]
    return done
