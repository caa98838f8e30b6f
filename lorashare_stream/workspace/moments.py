"""Moments on disk, in slots of Zarr arrays, verified by checksum when they are read.

The marker of a module says where its moments are, with checksums of their numbers: a chunk that is missing is read as
zeros, and "all chunks present" is no test. Zarr syncs nothing: `sync_moments` does, before a marker is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ..adapters.dtypes import Array
from ..errors import WorkspaceError
from ..files import naming, sync
from ..linalg.moments import Moment
from .leases import wait_for
from .records import SUM, MomentRecord, Slot

_TOGETHER = 4 << 20  # bytes of moments that are written by one call
_MOST_OPEN = 256  # arrays that a process keeps open: each is what its metadata say, and no file
_OPEN: dict[tuple[Path, str], Any] = {}


class DamagedMoment(WorkspaceError):
    """Moment whose chunks are missing or changed; it is summed again."""


async def _opened(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, mode: str) -> Any:
    """An array, which is kept open: an `AsyncArray`, that writes zeros too."""
    import zarr
    from zarr.api.asynchronous import open_array

    key = path, mode
    if key not in _OPEN:
        # one thing after the other, in as few threads as can be; small chunks of a call are encoded together
        zarr.config.set({"async.concurrency": 1, "codec_pipeline.batch_size": 64})
        array = (await open_array(store=path, mode=mode, zarr_format=3)).with_config({"write_empty_chunks": True})
        if (array.shape, array.chunks, array.dtype) != (shape, chunks, np.dtype(dtype)):
            raise ValueError("the metadata of an array have changed")
        if len(_OPEN) >= _MOST_OPEN:
            _OPEN.clear()
        _OPEN[key] = array
    return _OPEN[key]


async def _arrays(root: Path, slot: Slot, mode: str) -> tuple[Any, Any]:
    """The array of a place, and that of its sum."""
    (m, _, d), lease = slot.shape, root / slot.lease
    return (
        await _opened(lease / slot.array, slot.shape, (1, slot.height, d), slot.dtype, mode),
        await _opened(lease / f"{SUM}{slot.array}", (m, d), (1, d), "float64", mode),
    )


class Rows:
    """Sink of blocks of vectors: written a chunk at a time, or kept in memory if all fit one chunk.

    Args:
        root: the folder of all leases.
        slot: the place, of columns.
        count: how many vectors there will be.

    Attributes:
        checksum: of what is written.
    """

    def __init__(self, root: Path, slot: Slot, count: int) -> None:
        self._root, self._slot, self._count = root, slot, count
        self._held: Array = np.empty((0, slot.shape[2]), slot.dtype)
        self._filled = self._written = self.checksum = 0

    def add(self, block: Array) -> None:
        """Take a block (m, d)."""
        if len(block) == self._count <= self._slot.height:
            self._held, self._filled = block, len(block)  # the only one: nobody overwrites it
            return
        while len(block):
            most = min(self._slot.height, self._count - self._written)
            if not self._filled and len(block) >= most == self._slot.height < self._count:
                self._write(block[:most])
                block = block[most:]
                continue
            if not self._filled and len(self._held) != most:
                self._held = np.empty((most, self._slot.shape[2]), self._slot.dtype)
            part = block[: most - self._filled]
            self._held[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            block = block[len(part) :]
            if self._filled == most and self._count > self._slot.height:
                self._write(self._held)
                self._filled = 0

    def _write(self, rows: Array) -> None:
        wait_for(_put, self._root, self._slot, rows, self._written)
        self.checksum = _checksum(rows, self.checksum)
        self._written += len(rows)

    def result(self) -> None:
        """None: columns are kept, not a second moment."""

    @property
    def kept(self) -> Array | None:
        """Vectors (n, d) in memory; None if they are written."""
        return None if self._written else self._held[: self._filled]


async def _put(root: Path, slot: Slot, rows: Array, first: int) -> None:
    """Write rows that are a chunk, or the last of a module, from row `first` on."""
    array, _ = await _arrays(root, slot, "r+")
    height, block = min(slot.height, slot.shape[1] - first), rows[None]
    if len(rows) < height:  # the whole chunk, so that zarr does not look what is there
        block = np.zeros((1, height, rows.shape[1]), rows.dtype)
        block[0, : len(rows)] = rows
    where = slice(slot.index, slot.index + 1), slice(first, first + height), slice(None)
    with naming(root / slot.lease / slot.array):
        await array.setitem(where, block)
        _write_back(root / slot.lease / slot.array / slot.chunk(first // slot.height))


def _write_back(chunk: Path) -> None:
    """Have the kernel begin to write a chunk to the disk, so that there is less to wait for when it is synced."""
    if hasattr(os, "posix_fadvise"):  # Linux begins to write dirty pages that it is told to drop, and keeps them
        with chunk.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def save(root: Path, slots: Sequence[Slot], moments: Iterable[tuple[Moment, int]]) -> list[MomentRecord]:
    """Write moments into their slots, and return the records by which `load` verifies them.

    Args:
        root: the folder of all leases.
        slots: the places, best in the order in which they lie in their arrays.
        moments: of the forms of the places, asked for as they are written; columns that are written already are not
            among them, but their checksum is, which is not looked at otherwise.

    Raises:
        OSError: of the machine, naming an array or a chunk.
    """
    return wait_for(_save, root, slots, iter(moments))


async def _save(root: Path, slots: Sequence[Slot], moments: Iterator[tuple[Moment, int]]) -> list[MomentRecord]:
    records: list[MomentRecord] = []
    for part in _together(slots):
        first, some = slots[part.start], [next(moments) for _ in slots[part]]
        forms = [m.columns if m.second is None else m.second.T for m, _ in some]  # symmetric, and column-major
        where = slice(first.index, first.index + len(some))
        array, sums = await _arrays(root, first, "r+")
        if len(some) > 1:
            block = np.zeros((len(some), *first.shape[1:]), first.dtype)
            for place, form in zip(block, forms, strict=True):
                assert form is not None
                place[: len(form)] = form
            with naming(root / first.lease / first.array):
                await array.setitem(where, block)
        elif forms[0] is not None:
            for top in first.tops(len(forms[0])):
                await _put(root, first, forms[0][top : top + first.height], top)
        with naming(root / first.lease / f"{SUM}{first.array}"):
            await sums.setitem(where, np.stack([m.sum for m, _ in some]))
        for slot, (moment, written), form in zip(slots[part], some, forms, strict=True):
            checksum = written if form is None else _checksum(form)
            records.append(
                MomentRecord(
                    slot=slot,
                    count=moment.count,
                    energy=moment.energy,
                    checksum=checksum,
                    sum_checksum=_checksum(moment.sum),
                )
            )
    return records


def _together(slots: Sequence[Slot]) -> Iterator[slice]:
    """Runs of neighbouring slots that one call writes: a chunk each, a few MiB in all."""
    start = 0
    for i, slot in enumerate(slots):
        after = slots[i + 1] if i + 1 < len(slots) else None
        joins = after is not None and (after.array, after.index) == (slot.array, slot.index + 1)
        if not joins or slot.shape[1] > slot.height or (i + 2 - start) * slot.bytes > _TOGETHER:
            yield slice(start, i + 1)
            start = i + 1


def sync_moments(root: Path, records: Iterable[MomentRecord]) -> None:
    """Sync the chunks of moments and their folders, which zarr does not."""
    paths = [path for record in records for path in record.files(root)]
    for path in paths:
        sync(path)
    for folder in sorted({path.parent for path in paths}):
        sync(folder)


def load(root: Path, record: MomentRecord) -> Moment:
    """Read a moment.

    Raises:
        DamagedMoment: if a chunk is missing, or fails its checksum; or if the trace of S is not the energy of what was
            summed.
        OSError: of the machine: what cannot be read now may be whole.
    """
    slot = record.slot
    try:
        with naming(root / slot.lease / slot.array):
            total, form, checksum = wait_for(_load, root, slot, record.rows)
        if (checksum, _checksum(total)) != (record.checksum, record.sum_checksum):
            raise ValueError("the numbers fail their checksum")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as e:
        raise DamagedMoment("a moment is damaged", found=f"{type(e).__name__}: {e}") from e
    if record.stacked:
        return Moment(None, form, total, record.count, record.energy)
    trace = float(np.trace(form, dtype=float))
    vanishing = form.size * float(np.finfo(form.dtype).tiny)  # squares below it became zero
    if not abs(trace - record.energy) <= 1e-4 * record.energy + vanishing:
        raise DamagedMoment(
            "a moment is not what was written", found=f"trace {trace}", expected=f"energy {record.energy}"
        )
    return Moment(form.T, None, total, record.count, record.energy)


async def _load(root: Path, slot: Slot, rows: int) -> tuple[NDArray[np.float64], Array, int]:
    """The sum and the rows of a module, and the checksum of these."""
    from zarr.buffer.cpu import NDBuffer

    array, sums = await _arrays(root, slot, "r")
    out, checksum = np.empty((rows, slot.shape[2]), slot.dtype), 0
    for top in slot.tops(rows):
        part: Any = out[top : top + slot.height]
        where = slice(slot.index, slot.index + 1), slice(top, top + len(part)), slice(None)
        await array.get_orthogonal_selection(where, out=NDBuffer(part[None]))
        checksum = _checksum(part, checksum)
    return np.asarray(await sums.getitem(slot.index), np.float64), out, checksum


def _checksum(rows: Array, before: int = 0) -> int:
    """crc32c of an array as it lies on disk, continued from `before`."""
    return int(google_crc32c.extend(before, np.ascontiguousarray(rows).reshape(-1).view(np.uint8)))
