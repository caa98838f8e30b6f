"""Accumulate: add every admitted adapter to the moments of one module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import momentstore
from ..adapterfiles import open_tensors
from ..deltas import Product, gram
from ..devices import sum_on
from ..entry import Entry
from ..keys import SIDES, Side
from ..moments import Accumulator, Array, empty, partner_root
from ..momentstore import DamagedMoment
from ..tensorfile import float32
from ..workspace import Workspace
from .job import Job


def accumulate_module(job: Job, name: str) -> None:
    """Add every admission that a module's moments lack, in the order of the journal; both sides at once."""
    try:
        _accumulate(job, name)
    except DamagedMoment:  # what was summed before is no longer what was written: sum it again
        Workspace(job.workspace).discard(name)
        _accumulate(job, name)


def _accumulate(job: Job, name: str) -> None:
    work = Workspace(job.workspace)
    old = work.marker(name)
    if old is not None and not job.continues(old):
        raise DamagedMoment("a moment holds other adapters than the journal")
    fresh = job.receipts[0 if old is None else old["entries"] :]
    parts = [(job.entries[r.name], r.energy) for r in fresh if job.shares(r.name)]
    parts = [(entry, energy) for entry, energy in parts if name in entry.layout.by_name]
    with work.new_generation(name) as (folder, marker):
        before = None if old is None else (work.generation(name, old["generation"]), old)
        sums = {side: _begin(job, name, side, folder / side, parts, before) for side in SIDES}
        for entry, energy in parts:
            module = entry.layout.by_name[name]
            with open_tensors(entry.paths) as tensors:
                a, b = float32(tensors, module.a), float32(tensors, module.b)
            rows = weighted_rows(a, b, entry.product_of[name], energy, job.settings.objective)
            for side in SIDES:
                sums[side].add(rows[side])
        for side in SIDES:
            marker[side] = momentstore.save(folder / side, sums[side].finish())
        marker["entries"] = len(job.receipts)
        marker["admitted"] = job.admitted(len(job.receipts))


def weighted_rows(
    a: NDArray[np.float32], b: NDArray[np.float32], product: Product, energy: float, objective: str
) -> dict[Side, NDArray[np.floating[Any]]]:
    """The vectors of one module that are summed, as rows (E r, d).

    Under `factors` they are A and B' themselves. Under `delta` each side is weighted by the other and by
    1 / ||dW_i||^2 of the whole adapter: rows of sqrt(w) s (B'B)^(1/2) A and of sqrt(w) s (AA')^(1/2) B'; of
    stacked experts, each by its own other side.

    Args:
        a, b: (E r, d_in) and (d_out, E r). product: how dW comes of them. energy: ||dW_i||^2, above 0 under `delta`.
    """
    if objective == "factors":
        return {"A": a, "B": b.T}
    factor = product.scale / np.sqrt(energy)
    rows: dict[Side, NDArray[Any]] = {"A": a, "B": b.T}
    blocks = {side: product.blocks(rows[side], side) for side in SIDES}
    return {
        side: np.concatenate(
            [
                _times(partner_root(gram(theirs), factor), own)
                for theirs, own in zip(blocks["B" if side == "A" else "A"], blocks[side], strict=True)
            ]
        )
        for side in SIDES
    }


def _times(root: NDArray[np.float64], rows: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
    """The product, which is of order 1; in float64 where the root, which undoes the rows' size, is far from it."""
    largest = np.abs(root).max()
    return root.astype(np.float32) @ rows if largest == 0 or 1e-12 < largest < 1e12 else root @ rows


def _begin(
    job: Job,
    name: str,
    side: Side,
    folder: Path,
    parts: list[tuple[Entry, float]],
    before: tuple[Path, Mapping[str, Any]] | None,
) -> Accumulator:
    """An accumulator that holds what was summed before, in the smaller of the two forms for all there will be."""
    dtype = job.settings.moment_dtype
    old = None if before is None else momentstore.load(before[0] / side, before[1][side])
    dim = old.dim if old is not None else next(_dims(job, name, side))
    count = sum(entry.layout.by_name[name].rank for entry, _ in parts) + (0 if old is None else old.count)
    old = empty(dim, dtype, stacked=True) if old is None else old
    if count > dim or old.second is not None:
        return Accumulator(old, sum_on(job.device, old))
    array = momentstore.create(folder / "columns", (count, dim), dtype)
    assert old.columns is not None
    momentstore.write_tiles(array, old.columns)
    return Accumulator(old, _Rows(array, old.count))


def _dims(job: Job, name: str, side: Side) -> Iterator[int]:
    return (e.layout.by_name[name].dim(side) for e in job.entries.values() if name in e.layout.by_name)


class _Rows:
    """Keeps blocks: writes them below each other into an array (n, d)."""

    def __init__(self, array: Any, first: int) -> None:
        self._array, self._next = array, first

    def add(self, block: Array) -> None:
        """Write a block (m, d)."""
        momentstore.write_tiles(self._array, block, self._next)
        self._next += len(block)

    def result(self) -> None:
        """Nothing is kept in memory."""
