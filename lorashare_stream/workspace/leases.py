"""Leases: Zarr arrays that a step writes moments into, one for all modules of a side, a shape and a form.

    <lease>/second_A_768              S of some modules (m, d, d): a chunk of each, or several of 64 MiB
    <lease>/columns_B_768_1200        X' of some modules (m, n, d): a chunk of each, or several of 16 MiB
    <lease>/sum_of_second_A_768, ...  s of the same modules (m, d), float64

The process that holds the workspace makes and removes them, and nobody writes into one but the tasks of the step that
it was made for: a task that outlives its run writes where no marker points. They are not compressed (they are
incompressible), and every chunk ends in its crc32c.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..adapters.keys import Side
from ..files import remove_tree, sync, write_json
from ..settings import QUANTUM
from ..text import digest_of
from .records import SUM, Marker, Slot

T = TypeVar("T")
METADATA = "zarr.json"
SECOND_CHUNK, COLUMNS_CHUNK = 64 << 20, 16 << 20  # bytes of a chunk at most, unless a quantum of columns has more
_ALIKE = 8  # steps an octave to which numbers of columns are rounded up, where modules have different ones
_WORDS = {
    "second": "second moments S = sum of x x', a matrix a module",
    "columns": "vectors x as rows, in the order of admission; rows beyond those of a module are zeros",
    "sum": "sums of x, a vector a module",
}


def height_of(form: str, rows: int, dim: int, itemsize: int) -> int:
    """Rows of a chunk: all, or an even part within the limit; zarr pads the last chunk with zeros.

    Columns come in quanta, and chunks of whole ones are written as they come, unless that would fill up more than 1/8.
    """
    if form == "columns":
        most = QUANTUM * max(1, COLUMNS_CHUNK // (QUANTUM * dim * itemsize))
        if rows > most and 8 * (-rows % most) <= rows:
            return most
    else:
        most = max(1, SECOND_CHUNK // (dim * itemsize))
    return max(1, -(-rows // -(-rows // most))) if rows else 1


@dataclass(frozen=True, slots=True)
class Need:
    """Moment to be written: form, d, and rows (d of a second moment, else n)."""

    form: str
    dim: int
    rows: int


def arrange(lease: str, needs: Mapping[tuple[str, Side], Need], dtype: str) -> dict[str, dict[Side, Slot]]:
    """Allocate slots for moments, in as few arrays as possible; modules of one array in their order.

    Columns of modules that have nearly as many are in one array, so that there are never many arrays.
    """
    arrays: dict[tuple[str, Side, int, int], list[tuple[str, int]]] = {}
    for (module, side), need in needs.items():
        kind = need.form, side, need.dim, _rounded(need.rows) if need.form == "columns" else 0
        arrays.setdefault(kind, []).append((module, need.rows))
    found: dict[str, dict[Side, Slot]] = {}
    for (form, side, dim, _), members in arrays.items():
        rows = max(1, *(n for _, n in members))
        name = f"{form}_{side}_{dim}" + (f"_{rows}" if form == "columns" else "")
        shape, height = (len(members), rows, dim), height_of(form, rows, dim, np.dtype(dtype).itemsize)
        for index, (module, _) in enumerate(members):
            slot = Slot(lease=lease, array=name, index=index, form=form, shape=shape, height=height, dtype=dtype)
            found.setdefault(module, {})[side] = slot
    return found


def _rounded(count: int) -> int:
    """Logarithmic bin of a count; counts of one bin differ by a tenth at most."""
    return math.ceil(math.log2(max(1, count)) * _ALIKE)


def make_groups(root: Path, groups: Mapping[str, str]) -> None:
    """Make folders Zarr groups, those that are none yet: path under `root` -> its description."""
    for path, words in groups.items():
        if not _is_group(root / path, words):
            write_json(root / path / METADATA, _group(words))


def make_arrays(root: Path, slots: Mapping[str, Mapping[Side, Slot]], words: str) -> dict[str, dict[Side, Slot]]:
    """Create and sync the group and the arrays of a new lease; returns the slots with the digest of their metadata."""
    members = _members((module, slot) for module, both in slots.items() for slot in both.values())
    leases = {lease for lease, _ in members}
    for lease in leases:
        (root / lease).mkdir()
    make_groups(root, dict.fromkeys(leases, words))
    wait_for(_write, root, members)
    for folder in {root / lease / f"{sums}{array}" for lease, array in members for sums in ("", SUM)}:
        sync(folder / METADATA)
        sync(folder)
    for lease in leases:
        sync(root / lease)
    sync(root)
    digests = {key: _metadata(root / key[0], key[1]) for key in members}
    return {
        module: {
            side: slot.model_copy(update={"metadata": digests[slot.lease, slot.array]}) for side, slot in both.items()
        }
        for module, both in slots.items()
    }


def _members(slots: Iterable[tuple[str, Slot]]) -> dict[tuple[str, str], dict[str, Slot]]:
    """Slots by lease and array, then by module."""
    found: dict[tuple[str, str], dict[str, Slot]] = {}
    for module, slot in slots:
        found.setdefault((slot.lease, slot.array), {})[module] = slot
    return found


def _metadata(lease: Path, array: str) -> str:
    return digest_of([(lease / f"{sums}{array}" / METADATA).read_bytes().decode() for sums in ("", SUM)])


def wait_for(function: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
    """Run a coroutine of zarr in an event loop of its own, in a thread that ends with it.

    A process that is forked later must have no other thread. And after a fault nothing of it goes on: in zarr's own
    loop the other chunks of a call would still be written, and complain of it.
    """

    def run() -> T:
        with asyncio.Runner() as runner:
            return runner.run(function(*arguments))

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


async def _write(root: Path, members: Mapping[tuple[str, str], Mapping[str, Slot]]) -> None:
    """Write what says how arrays are read, and what is in them."""
    from zarr.api.asynchronous import create_array
    from zarr.codecs import Crc32cCodec

    for (lease, array), places in members.items():
        slot = next(iter(places.values()))
        names: list[str | None] = [None] * slot.shape[0]
        for module, place in places.items():
            names[place.index] = module
        m, n, d = slot.shape
        side = array.split("_")[1]
        for sums, shape, chunks, dtype in (
            ("", (m, n, d), (1, slot.height, d), slot.dtype),
            (SUM, (m, d), (1, d), "float64"),
        ):
            await create_array(
                root / lease / f"{sums}{array}",
                shape=shape,
                chunks=chunks,
                dtype=dtype,
                compressors=[Crc32cCodec()],
                fill_value=0,
                chunk_key_encoding={"name": "default", "separator": "."},
                config={"write_empty_chunks": True},
                attributes={"what": _WORDS["sum" if sums else slot.form], "side": side, "modules": names},
            )


def _group(words: str) -> dict[str, Any]:
    """Metadata of a Zarr 3 group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {"what": words}}


def _is_group(folder: Path, words: str) -> bool:
    try:
        found = json.loads((folder / METADATA).read_bytes())
        return all(found[key] == value for key, value in _group(words).items())
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def sweep(root: Path, markers: Mapping[str, Marker], words: str) -> None:
    """Remove leases, arrays and chunks that no marker names; repair the metadata of the others.

    Args:
        root: the folder of all leases.
        markers: of all modules that have one.
        words: that say what is in a lease.
    """
    members = _members((m, moment.slot) for m, marker in markers.items() for moment in marker.sides.values())
    leases = {lease for lease, _ in members}
    for path in root.iterdir():
        if path.name in leases:
            _sweep_lease(path, {array: places for (lease, array), places in members.items() if lease == path.name})
        elif path.name != METADATA:
            remove_tree(path)
    for (name, array), places in members.items():
        if not _describes(root / name, array, next(iter(places.values())).metadata):
            for sums in ("", SUM):
                (root / name / f"{sums}{array}" / METADATA).unlink(missing_ok=True)
            wait_for(_write, root, {(name, array): places})
    make_groups(root, dict.fromkeys(sorted(leases), words))


def _sweep_lease(lease: Path, members: Mapping[str, Mapping[str, Slot]]) -> None:
    for folder in [path for path in lease.iterdir() if path.name != METADATA]:
        places = members.get(folder.name.removeprefix(SUM))
        if places is None:
            remove_tree(folder)
            continue
        indexes = {str(slot.index) for slot in places.values()}
        for path in [path for path in folder.iterdir() if path.name != METADATA]:
            if path.name.endswith(".partial") or path.name.split(".")[1] not in indexes:
                path.unlink()


def _describes(lease: Path, array: str, digest: str) -> bool:
    try:
        return _metadata(lease, array) == digest
    except (FileNotFoundError, ValueError):
        return False


def remove(root: Path, marker: Marker) -> None:
    """Remove the chunks of a module's moments that its marker names no more."""
    for moment in marker.sides.values():
        for path in moment.files(root):
            path.unlink(missing_ok=True)
