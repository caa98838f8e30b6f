"""Moments on disk: Zarr arrays, uncompressed (they are incompressible), with a checksum on every chunk.

A side of a module is a folder with the arrays `second` (d, d) or `columns` (n, d), and `sum` (d,), which
`zarr.open_array(folder / "columns", mode="r")` opens for whoever wants to look at them. A moment is only believed if
the metadata are those that were written, every chunk is there and whole, and its trace is the energy that was noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import WorkspaceError
from ..linalg.moments import Moment
from ..linalg.types import Array
from ..text import digest_of
from ..workspace import zarrfile
from .zarrfile import ZarrFile

_TILE, _WIDE = 1024, 4096  # rows and columns of a chunk of S, and columns of a chunk of X'; 4 MiB in float32
_STRIP = 1 << 17  # numbers squared at once, of which float64 copies stay in the cache


class DamagedMoment(WorkspaceError):
    """A moment whose chunks are missing or changed: it is computed anew."""


def create(path: Path, shape: tuple[int, ...], dtype: str) -> ZarrFile:
    """A new array to write, in chunks as its name demands: `sum` (d,), `second` (d, d) or `columns` (n, d).

    Raises:
        OSError: of the machine, or FileExistsError.
    """
    most = (_TILE,) * len(shape)
    if path.name == "columns":  # whole rows, which are written as they lie; their number divides a quantum
        width = min(shape[1], _WIDE)
        most = (1 << (_TILE * _TILE // width).bit_length() - 1, width)
    chunk = tuple(max(1, min(n, m, _TILE if i == 0 else m)) for i, (n, m) in enumerate(zip(shape, most, strict=True)))
    return zarrfile.create(path, shape, chunk, dtype)


def save(folder: Path, moment: Moment) -> dict[str, Any]:
    """Write a moment, whose columns may be written already, and return the facts by which `load` believes it.

    Raises:
        OSError: of the machine, naming a file.
    """
    if moment.columns is not None:
        create(folder / "columns", moment.columns.shape, moment.columns.dtype.name).write(moment.columns)
    elif moment.second is not None:  # symmetric, and column-major: its columns are rows that lie as on disk
        create(folder / "second", moment.second.shape, moment.second.dtype.name).write(moment.second.T)
    create(folder / "sum", moment.sum.shape, "float64").write(moment.sum)
    form = "columns" if moment.second is None else "second"
    return {
        "count": moment.count,
        "energy": moment.energy,
        "form": form,
        "dim": moment.dim,
        "metadata": _metadata(folder, form),
    }


def _metadata(folder: Path, form: str) -> str:
    """Digest of what says how the arrays of a moment are read."""
    return digest_of([(folder / name / zarrfile.METADATA).read_text() for name in (form, "sum")])


def load(folder: Path, facts: Mapping[str, Any]) -> Moment:
    """Read a moment.

    Raises:
        DamagedMoment: if a chunk is missing, fails its checksum, or the trace is not what it was.
        OSError: of the machine: what cannot be read now may be whole.
    """
    stacked, traces = facts["form"] == "columns", [0.0]
    try:
        if _metadata(folder, facts["form"]) != facts["metadata"]:
            raise ValueError("the metadata of an array have changed")
        total = zarrfile.opened(folder / "sum").read()
        array = zarrfile.opened(folder / facts["form"])
        form = array.read(lambda rows: traces.append(_energy(rows))) if stacked else array.read().T
    except (FileNotFoundError, ValueError) as e:
        raise DamagedMoment("a moment is damaged", found=f"{type(e).__name__}: {e}") from e
    trace = sum(traces) if stacked else float(np.trace(form, dtype=float))
    energy, count = float(facts["energy"]), int(facts["count"])
    vanishing = form.size * float(np.finfo(form.dtype).tiny)  # squares below it became zero
    if not abs(trace - energy) <= 1e-4 * energy + vanishing or (stacked and len(form) != count):
        raise DamagedMoment("a moment is not what was written", found=f"trace {trace}", expected=f"energy {energy}")
    sums = total.astype(np.float64, copy=False)
    return Moment(None if stacked else form, form if stacked else None, sums, count, energy)


def _energy(rows: Array) -> float:
    """The sum of squares of rows (m, d), C-contiguous, in float64."""
    flat = rows.reshape(-1)
    strips = (flat[i : i + _STRIP].astype(np.float64) for i in range(0, len(flat), _STRIP))
    return sum(float(np.vdot(strip, strip)) for strip in strips)
