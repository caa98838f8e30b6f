"""safetensors files: headers that the library has proved, memory maps, streaming atomic writes.

Who maps a file must know that it is still the one whose header was read, since beyond the end of a file that has
shrunk there is SIGBUS: `Adapter.open` asks for size and time first.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError
from ..text import printable
from .dtypes import ITEMSIZE, widened
from .foreign import AGAIN, START, disguised

CHUNK = 8 << 20  # bytes copied at once
MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_DIMS = 16  # of a tensor; the library has no limit, NumPy has


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where one tensor lies: `nbytes` at `offset` of file number `file` of its adapter."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: int = 0


@dataclass(frozen=True)
class _Origin:
    """The file of a header, or its name alone. Equal to any other: a header and a size prove the same of all files."""

    path: Path = field(compare=False)
    here: bool = field(compare=False)


class Header(NamedTuple):
    """The header of a safetensors file: its tensors, in file order, and its metadata."""

    records: tuple[TensorRecord, ...]
    metadata: Mapping[str, str]


def read_header(path: Path, file: int = 0) -> tuple[TensorRecord, ...]:
    """The tensors of a safetensors file, as `header_of`."""
    return header_of(path, file).records


def header_of(path: Path, file: int = 0) -> Header:
    """The header of a safetensors file, proved by safetensors; an AdapterError if it is not true of the file."""
    with path.open("rb", buffering=0) as f:  # a buffer would be filled with tensors
        size = os.fstat(f.fileno()).st_size
        head = f.read(8)
        head += f.read(_header_length(head, size) or START - 8)
    return _proved(head, size, file, _Origin(path, here=True))


def parse_header(head: bytes, size: int, path: Path, file: int = 0) -> tuple[TensorRecord, ...]:
    """The tensors of a safetensors file of `size` bytes, from its first bytes; `path` is its name in errors."""
    return _proved(head, size, file, _Origin(path, here=False)).records


def _proved(head: bytes, size: int, file: int, origin: _Origin) -> Header:
    length = _header_length(head, size)
    if length is None:
        announced = int.from_bytes(head[:8], "little") if len(head) >= 8 else 0
        wanted = f"8 bytes and a header of {announced or 'some'} bytes"
        fault = bad_file(origin.path, "not a safetensors file, or cut short", f"{size} bytes", wanted)
        raise disguised(origin.path, head[:START], size) or fault
    return _header(head[8 : 8 + length], size, file, origin)


@lru_cache(maxsize=64)  # adapters of one script have equal headers, which are parsed and proved once
def _header(raw: bytes, size: int, file: int, origin: _Origin) -> Header:
    path, data = origin.path, 8 + len(raw)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise bad_file(path, "the safetensors header is not valid JSON", str(e)) from e
    if not isinstance(header, dict):
        raise bad_file(path, "the safetensors header is not an object", type(header).__name__, "object")
    metadata = header.pop("__metadata__", None)
    records = [_record(path, name, entry, data, file) for name, entry in header.items()]
    records.sort(key=lambda r: (r.offset, r.nbytes))  # an empty tensor shares its offset with the next one
    end = max((r.offset + r.nbytes for r in records), default=data)
    if end != size:
        raise bad_file(path, "cut short or padded: the header and the file disagree", f"{size} bytes", f"{end} bytes")
    _prove(raw, size, origin)
    return Header(tuple(records), metadata or {})


def _prove(raw: bytes, size: int, origin: _Origin) -> None:
    """Have safetensors check every number of a header, by its file, or by one of that size with nothing else in it."""
    try:
        if origin.here:
            with suppress(OSError), safe_open(origin.path, framework="numpy"):  # of a disk that does not map files
                return
            origin.path.open("rb").close()  # safetensors calls a file missing where no more can be opened
        with tempfile.NamedTemporaryFile(prefix="lorashare-stream-") as hollow:
            hollow.write(struct.pack("<Q", len(raw)) + raw)
            hollow.truncate(size)
            hollow.flush()
            with safe_open(hollow.name, framework="numpy"):
                pass
    except SafetensorError as e:
        found = str(e).removeprefix("Error while deserializing header: ")
        raise bad_file(origin.path, "the safetensors header is not true of the file", found) from e


def _header_length(head: bytes, size: int) -> int | None:
    """The length of a header, from the 8 bytes before it; None if a file of `size` bytes has no such header."""
    length = int.from_bytes(head[:8], "little") if len(head) >= 8 else 0
    return length if 0 < length <= min(size - 8, MAX_HEADER) else None


def _record(path: Path, name: str, entry: Any, data: int, file: int) -> TensorRecord:
    """What a header says of a tensor; that the numbers fit the file and one another is proved later."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError) as e:
        raise bad_file(path, "a tensor is not described as safetensors demands", entry, key=name) from e
    if not name.isprintable():
        remedy = "Give its module a name that can be shown, or leave the adapter out."
        raise AdapterError(f"{printable(path.name)}: a key with unprintable characters", key=name, remedy=remedy)
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise bad_file(path, "a dtype that is not known", dtype, ", ".join(ITEMSIZE), key=name)
    if not whole or len(shape) > MAX_DIMS or math.prod(shape) * ITEMSIZE[dtype] != end - start:
        raise bad_file(path, "shape and byte range disagree", f"{end!r} - {start!r} bytes", f"{dtype} {[*shape]}", name)
    return TensorRecord(name, dtype, shape, data + start, end - start, file)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated(name for name, _ in pairs)
    if twice is not None:
        raise ValueError(f"duplicate key {printable(twice)!r}")
    return dict(pairs)


def repeated(names: Iterable[str]) -> str | None:
    """The first name that comes more than once, if one does."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def bad_file(
    path: Path, problem: str, found: object = None, expected: object = None, key: str | None = None
) -> AdapterError:
    """The error for a damaged weight file."""
    return AdapterError(f"{printable(path.name)}: {problem}", key=key, found=found, expected=expected, remedy=AGAIN)


class TensorReader:
    """The safetensors files of one adapter, each mapped once, while the `with` block lasts.

    All it gives are read-only views of the maps. A view that is left keeps its map, with no pages resident.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self._maps: dict[int, mmap.mmap | bytes] = {}

    def through(self, record: TensorRecord) -> NDArray[np.uint8]:
        """The bytes of a tensor's file, at least to the end of the tensor."""
        if record.file not in self._maps:
            self._maps[record.file] = _mapped(self._paths[record.file])
        data = np.frombuffer(self._maps[record.file], np.uint8)
        if record.offset + record.nbytes > len(data):
            raise bad_file(self._paths[record.file], "became shorter while it was read", key=record.name)
        return data

    def raw(self, record: TensorRecord) -> NDArray[np.uint8]:
        """The tensor's bytes, as stored."""
        return self.through(record)[record.offset : record.offset + record.nbytes]

    def chunks(self, record: TensorRecord) -> Iterator[memoryview]:
        """The tensor's bytes, a bounded number at a time."""
        raw = self.raw(record)
        return (raw[start : start + CHUNK].data for start in range(0, len(raw), CHUNK))

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        while self._maps:
            pages = self._maps.popitem()[1]
            if not isinstance(pages, bytes):
                try:
                    pages.close()
                except BufferError:  # a view is left, of a loop's last round perhaps; it may be read still
                    pages.madvise(mmap.MADV_DONTNEED)


def _mapped(path: Path) -> mmap.mmap | bytes:
    """The map of a file; its bytes where the disk does not map files."""
    with path.open("rb", buffering=0) as f:
        try:
            pages = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # an empty file is no value
            return f.read()
    pages.madvise(mmap.MADV_SEQUENTIAL)
    return pages


def float32(tensors: TensorReader, record: TensorRecord) -> NDArray[np.float32]:
    """A float tensor as float32, in its stored shape, in memory of its own."""
    raw = tensors.raw(record)
    return widened(raw.copy() if record.dtype == "F32" else raw, record.dtype, record.shape)


def write_arrays(
    out: IO[bytes], arrays: Mapping[str, NDArray[Any]], dtype: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays of one dtype, by key, C-contiguous and as they are stored, as a safetensors file."""
    shapes = [(key, dtype, array.shape) for key, array in arrays.items()]
    write_safetensors(out, shapes, (array.data.cast("B") for array in arrays.values()), metadata)


def write_safetensors(
    out: IO[bytes],
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    chunks: Iterable[bytes | memoryview],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors (key, dtype, shape), in file order, as their bytes stream in; none needs to be whole in memory."""
    head, end = _head(tuple(tensors), tuple((metadata or {}).items()))
    out.write(head)
    written = sum(out.write(chunk) for chunk in chunks)
    if written != end:
        raise RuntimeError(f"{written} bytes streamed, {end} announced")


@lru_cache(maxsize=64)  # as above
def tensor_records_of(tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> tuple[TensorRecord, ...]:
    """Where `write_safetensors` puts tensors (key, dtype, shape) that have no metadata."""
    sizes = [math.prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in tensors]
    starts = accumulate(sizes, initial=len(_head(tensors, ())[0]))
    return tuple(TensorRecord(*of, at, size) for of, at, size in zip(tensors, starts, sizes, strict=False))


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
