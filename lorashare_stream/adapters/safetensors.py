"""safetensors files: strict headers, positioned reads, streaming atomic writes.

Reads are positioned (`pread`), not memory-mapped: a file that shrinks while it is read gives an error
instead of SIGBUS, no page of it stays resident, and one descriptor at a time suffices for any number of
adapters (`scripts/bench_read.py` compares the two).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import AdapterError
from ..text import printable
from .dtypes import ITEMSIZE, widened

CHUNK = 8 << 20  # bytes read or hashed at once
MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where one tensor lies: `nbytes` at `offset` of file number `file` of its adapter."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: int = 0


def read_header(path: Path, file: int = 0) -> tuple[TensorRecord, ...]:
    """The tensors of a safetensors file, in file order.

    Every number in the header is checked against the size of the file before it is used.

    Raises:
        AdapterError: if the header is not valid, lies about the data, or the file is cut short.
    """
    with path.open("rb", buffering=0) as f:  # a buffer would be filled with tensors
        size = os.fstat(f.fileno()).st_size
        prefix = os.pread(f.fileno(), 8, 0)
        return parse_header(prefix + os.pread(f.fileno(), _header_length(path, prefix, size), 8), size, path, file)


def parse_header(head: bytes, size: int, path: Path, file: int = 0) -> tuple[TensorRecord, ...]:
    """The tensors of a safetensors file of `size` bytes, from its first bytes; `path` is its name in errors."""
    length = _header_length(path, head[:8], size)
    return _records(head[8 : 8 + length], size, path.name, file)


@lru_cache(maxsize=64)  # adapters of one script have equal headers, which are parsed once
def _records(raw: bytes, size: int, file_name: str, file: int) -> tuple[TensorRecord, ...]:
    path, data = Path(file_name), 8 + len(raw)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise bad_file(path, "the safetensors header is not valid JSON", str(e)) from e
    if not isinstance(header, dict):
        raise bad_file(path, "the safetensors header is not an object", type(header).__name__, "object")
    header.pop("__metadata__", None)
    records = sorted((_record(path, name, entry, data, file) for name, entry in header.items()), key=_by_offset)
    end = data
    for record in records:
        if record.offset != end:
            raise bad_file(path, "tensors overlap or leave holes", record.offset, end, key=record.name)
        end += record.nbytes
    if end != size:
        raise bad_file(path, "cut short or padded: the header and the file disagree", f"{size} bytes", f"{end} bytes")
    return tuple(records)


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    length: int = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if length > min(size - 8, MAX_HEADER) or not length:
        wanted = f"8 bytes and a header of {length or 'some'} bytes"
        raise bad_file(path, "not a safetensors file, or cut short", f"{size} bytes", wanted)
    return length


def _by_offset(record: TensorRecord) -> tuple[int, int]:
    return record.offset, record.nbytes  # an empty tensor shares its offset with the next one


def _record(path: Path, name: str, entry: Any, data: int, file: int) -> TensorRecord:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError) as e:
        raise bad_file(path, "a tensor is not described as safetensors demands", entry, key=name) from e
    if not name.isprintable():
        raise AdapterError(
            f"{printable(path.name)}: a key with unprintable characters",
            key=name,
            remedy="Give its module a name that can be shown, or leave the adapter out.",
        )
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise bad_file(path, "a dtype that is not known", dtype, ", ".join(ITEMSIZE), key=name)
    if not whole or len(shape) > 16 or math.prod(shape) * ITEMSIZE[dtype] != end - start:
        raise bad_file(
            path, "shape and byte range disagree", f"{end!r} - {start!r} bytes", f"{dtype} {list(shape)}", key=name
        )
    return TensorRecord(name, dtype, shape, data + start, end - start, file)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated(name for name, _ in pairs)
    if twice is not None:
        raise ValueError(f"duplicate key {printable(twice)!r}")
    return dict(pairs)


def repeated(names: Iterable[str]) -> str | None:
    """The first name that comes a second time, if one does."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def bad_file(
    path: Path, problem: str, found: object = None, expected: object = None, key: str | None = None
) -> AdapterError:
    """The error for a damaged weight file."""
    return AdapterError(
        f"{printable(path.name)}: {problem}",
        key=key,
        found=found,
        expected=expected,
        remedy="Fetch or save the adapter again, or leave it out.",
    )


def runs(records: Sequence[TensorRecord]) -> list[list[TensorRecord]]:
    """Records, in order, in lists of those that follow one another in a file without a gap."""
    found: list[list[TensorRecord]] = []
    end = None
    for record in records:
        if end != (record.file, record.offset):
            found.append([])
        found[-1].append(record)
        end = record.file, record.offset + record.nbytes
    return found


class TensorReader(Protocol):
    """An open adapter. `raw` gives the bytes of one tensor as stored, `chunks` a bounded number of them
    at a time, `block` those of several.
    """

    def raw(self, record: TensorRecord) -> NDArray[np.uint8]:
        """The tensor's bytes, as stored."""
        ...

    def block(self, records: Sequence[TensorRecord]) -> NDArray[np.uint8]:
        """The bytes of several tensors, as stored, one after the other."""
        ...

    def chunks(self, record: TensorRecord) -> Iterator[bytes]:
        """The tensor's bytes, a bounded number at a time."""
        ...

    def __enter__(self) -> TensorReader: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def float32(tensors: TensorReader, record: TensorRecord) -> NDArray[np.float32]:
    """A float tensor as float32, in its stored shape."""
    return widened(tensors.raw(record), record.dtype, record.shape)


class SafetensorsReader:
    """Positioned reads from the safetensors files of one adapter."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self._fds: dict[int, int] = {}

    def raw(self, record: TensorRecord) -> NDArray[np.uint8]:
        """The tensor's bytes, as stored."""
        return self.block([record])

    def block(self, records: Sequence[TensorRecord]) -> NDArray[np.uint8]:
        """The bytes of several tensors, as stored, one after the other; neighbours in a file are read at once."""
        found = np.empty(sum(r.nbytes for r in records), np.uint8)
        start = 0
        for run in runs(records):
            end = start + run[-1].offset + run[-1].nbytes - run[0].offset
            self._read_into(found[start:end].data, run[0], 0)
            start = end
        return found

    def head(self, first: TensorRecord) -> bytes:
        """What lies before the first tensor of a file: its header, for the digest."""
        return os.pread(self._fd(first.file), first.offset, 0)

    def chunks(self, record: TensorRecord) -> Iterator[bytes]:
        """The tensor's bytes, a bounded number at a time."""
        for start in range(0, record.nbytes, CHUNK):
            chunk = bytearray(min(CHUNK, record.nbytes - start))
            self._read_into(memoryview(chunk), record, start)
            yield bytes(chunk)

    def _read_into(self, view: memoryview, record: TensorRecord, start: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._fd(record.file), [view[done:]], record.offset + start + done)
            if count == 0:
                raise bad_file(self._paths[record.file], "became shorter while it was read", key=record.name)
            done += count

    def _fd(self, file: int) -> int:
        if file not in self._fds:
            self._fds[file] = os.open(self._paths[file], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._fds[file]

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


def write_arrays(
    out: IO[bytes], arrays: Mapping[str, NDArray[Any]], dtype: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays, C-contiguous and as they are stored, as a safetensors file.

    Args:
        out: an open file.
        arrays: by key, in file order.
        dtype: of all of them, as safetensors names it.
        metadata: the `__metadata__` of the header.
    """
    out.writelines(array_parts(arrays, dtype, metadata))


def array_parts(
    arrays: Mapping[str, NDArray[Any]], dtype: str, metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """What `write_arrays` writes, part by part."""
    shapes = tuple((key, dtype, array.shape) for key, array in arrays.items())
    head, _ = _head(shapes, tuple((metadata or {}).items()))
    return [head, *(array.data.cast("B") for array in arrays.values())]


def write_safetensors(
    out: IO[bytes],
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    chunks: Iterable[bytes | memoryview],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file as it streams in; no tensor needs to be whole in memory.

    Args:
        out: an open file.
        tensors: (key, dtype, shape) of each tensor, in file order.
        chunks: their bytes, in the same order.
        metadata: the `__metadata__` of the header.
    """
    head, end = _head(tuple(tensors), tuple((metadata or {}).items()))
    out.write(head)
    written = sum(out.write(chunk) for chunk in chunks)
    if written != end:
        raise RuntimeError(f"{written} bytes streamed, {end} announced")


@lru_cache(maxsize=64)  # adapters of one script have equal ones
def _head(
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...], metadata: tuple[tuple[str, str], ...]
) -> tuple[bytes, int]:
    """What a safetensors file begins with, and how many bytes of tensors follow."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # tensors start at a multiple of 8, as safetensors has it
    return struct.pack("<Q", len(raw)) + raw, end
