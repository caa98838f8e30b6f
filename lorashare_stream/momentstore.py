"""Moments on disk: Zarr arrays, uncompressed (they are incompressible), with a checksum on every chunk.

A side of a module is a folder with the arrays `second` (d, d) or `columns` (n, d), and `sum` (d,).
Zarr reads a missing chunk as zeros, and believes the metadata whatever they say; so a moment is only believed if the
metadata are those that were written, every chunk is there, and its trace is the energy that was noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from .errors import WorkspaceError
from .files import naming
from .lapack import Array
from .moments import Moment
from .names import digest_of

_TILE, _WIDE = 1024, 4096  # rows and columns of a chunk of S, and columns of a chunk of X'; 4 MiB in float32


class DamagedMoment(WorkspaceError):
    """A moment whose chunks are missing or changed: it is computed anew."""


def create(path: Path, shape: tuple[int, ...], dtype: str) -> zarr.Array[Any]:
    """A new array of checksummed chunks; zero chunks are written too, so that a missing one is a fault."""
    most = (_TILE,) * len(shape)
    if path.name == "columns":  # whole rows, which are written as they lie; their number divides a quantum
        width = min(shape[1], _WIDE)
        most = (1 << (_TILE * _TILE // width).bit_length() - 1, width)
    chunks = tuple(max(1, min(n, m, _TILE if i == 0 else m)) for i, (n, m) in enumerate(zip(shape, most, strict=True)))
    with naming(path):
        return zarr.create_array(
            str(path),
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            compressors=[Crc32cCodec()],
            fill_value=0,
            config={"write_empty_chunks": True},
        )


def write_tiles(array: zarr.Array[Any], rows: Array, first: int = 0) -> None:
    """Write rows into an array chunk by chunk, so that no more than one chunk is copied at a time."""
    height, width = array.chunks
    for i in range(0, len(rows), height):
        for j in range(0, rows.shape[1], width):
            tile = rows[i : i + height, j : j + width]
            with naming(Path(str(array.store_path).removeprefix("file://"))):
                array[first + i : first + i + len(tile), j : j + width] = np.ascontiguousarray(tile)


def save(folder: Path, moment: Moment) -> dict[str, Any]:
    """Write a moment, whose columns may be written already, and return the facts by which `load` believes it."""
    if moment.columns is not None:
        write_tiles(create(folder / "columns", moment.columns.shape, moment.columns.dtype.name), moment.columns)
    elif moment.second is not None:
        write_tiles(create(folder / "second", moment.second.shape, moment.second.dtype.name), moment.second)
    sums = create(folder / "sum", moment.sum.shape, "float64")
    with naming(folder / "sum"):
        sums[:] = moment.sum
    form = "columns" if moment.second is None else "second"
    return {
        "count": moment.count,
        "energy": moment.energy,
        "form": form,
        "dim": moment.dim,
        "metadata": _metadata(folder, form),
    }


def _metadata(folder: Path, form: str) -> str:
    """Digest of what tells Zarr how to read the arrays of a moment."""
    return digest_of([(folder / name / "zarr.json").read_text() for name in (form, "sum")])


def load(folder: Path, facts: Mapping[str, Any]) -> Moment:
    """Read a moment.

    Raises:
        DamagedMoment: if a chunk is missing, fails its checksum, or the trace is not what it was.
    """
    try:
        if _metadata(folder, facts["form"]) != facts["metadata"]:
            raise ValueError("the metadata of an array have changed")
        total = _read(folder / "sum")
        form = _read(folder / facts["form"])
    except Exception as e:  # Zarr's codecs raise ValueError, and others still
        if isinstance(e, OSError) and not isinstance(e, FileNotFoundError):
            raise  # of the machine: what cannot be read now may be whole
        raise DamagedMoment("a moment is damaged", found=f"{type(e).__name__}: {e}") from e
    stacked = facts["form"] == "columns"
    trace = float(np.einsum("ij,ij->", form, form, dtype=np.float64)) if stacked else float(np.trace(form, dtype=float))
    energy, count = float(facts["energy"]), int(facts["count"])
    vanishing = form.size * float(np.finfo(form.dtype).tiny)  # squares below it became zero
    if not abs(trace - energy) <= 1e-4 * energy + vanishing or (stacked and len(form) != count):
        raise DamagedMoment("a moment is not what was written", found=f"trace {trace}", expected=f"energy {energy}")
    return Moment(None if stacked else form, form if stacked else None, total.astype(np.float64), count, energy)


def _read(path: Path) -> Array:
    array = zarr.open_array(str(path), mode="r")
    if array.nchunks_initialized != array.nchunks:
        raise ValueError(f"{array.nchunks - array.nchunks_initialized} of {array.nchunks} chunks are missing")
    out = np.empty(array.shape, array.dtype, order="F" if path.name == "second" else "C")
    if out.ndim == 1:
        out[:] = np.asarray(array[:])
        return out
    height, width = array.chunks
    for i in range(0, out.shape[0], height):
        for j in range(0, out.shape[1], width):
            out[i : i + height, j : j + width] = np.asarray(array[i : i + height, j : j + width])
    return out
