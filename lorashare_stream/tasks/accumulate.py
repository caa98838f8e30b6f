"""Accumulate: add every admitted adapter to the moments of one module."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import momentstore
from ..adapterfiles import check_still, open_tensors
from ..deltas import Product, gram
from ..devices import sum_on
from ..entry import Entry
from ..errors import AdapterError
from ..keys import SIDES, Side
from ..lapack import Array
from ..moments import Accumulator, empty, of_columns, partner_root
from ..momentstore import DamagedMoment
from ..names import shown
from ..tensorfile import float32
from ..workspace import Workspace
from .job import Job

log = logging.getLogger(__name__)


def accumulate_module(job: Job, name: str) -> None:
    """Bring a module's moments up to the journal: what they lack is added, in its order; both sides at once.

    Where what was summed before is no longer what was written, the module is forgotten, for `summing.sum_up` to begin
    it again; all that it holds must be at hand then.
    """
    try:
        _accumulate(job, name)
    except DamagedMoment as e:
        log.warning("the moments of %s are summed again: %s", shown(name), e)
        Workspace(job.workspace).forget(name)


def _accumulate(job: Job, name: str) -> None:
    work = Workspace(job.workspace)
    old = work.marker(name)
    if old is not None and not job.continues(old):
        raise DamagedMoment("a moment holds other adapters than the journal")
    if old is not None and not job.knows(old["entries"]):
        raise DamagedMoment("it is lost what an adapter has brought into a moment that was taken out since")
    held = job.held(name, old)
    now = job.holders(name, len(job.journal.entries))
    never = [i for i in now if i not in held and (i in job.later or (old is not None and i < old["entries"]))]
    added = [(job.entry(r.name), r.energy) for i, r in now.items() if i not in held and i not in never]
    gone = [i for i in held if i not in now]
    seen = {
        "entries": len(job.journal.entries),
        "admitted": job.journal.digest(len(job.journal.entries)),
        "never": never,
    }
    if old is not None and not added and not (gone and any(old[side]["form"] == "columns" for side in SIDES)):
        removed: dict[str, Any] = {side: {**old[side], "removed": _removed(old, side, gone)} for side in SIDES}
        work.mark(name, {**old, **seen, **removed})  # the arrays stay
        return
    with work.new_generation(name) as (folder, marker):
        sums = {side: _begin(job, name, side, folder / side, added, old, gone) for side in SIDES}
        for entry, energy in added:
            rows = rows_of(entry, name, energy, job.settings.objective)
            for side in SIDES:
                sums[side].add(rows[side])
        for side in SIDES:
            facts = momentstore.save(folder / side, sums[side].finish())
            marker[side] = facts | {"removed": _removed(old, side, gone)}
        marker |= seen


def _removed(marker: Mapping[str, Any] | None, side: Side, gone: Sequence[int]) -> list[int]:
    """Admissions that were taken out, and whose vectors stay in a sum; stacked columns are taken out themselves."""
    if marker is None or marker[side]["form"] == "columns":
        return []
    return [*marker[side]["removed"], *gone]


def rows_of(entry: Entry, name: str, energy: float, objective: str) -> dict[Side, NDArray[np.floating[Any]]]:
    """The vectors of one adapter that are summed in a module, read from its files."""
    module = entry.layout.by_name[name]
    with open_tensors(entry.paths) as tensors:
        a, b = float32(tensors, module.a), float32(tensors, module.b)
    try:
        check_still(entry.files)
    except AdapterError as e:
        e.adapter = entry.name
        raise
    return weighted_rows(a, b, entry.product(name), energy, objective)


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
    added: Sequence[tuple[Entry, float]],
    marker: Mapping[str, Any] | None,
    gone: Sequence[int],
) -> Accumulator:
    """An accumulator that holds what was summed before, in the smaller of the two forms for all there will be."""
    dtype = job.settings.moment_dtype
    if marker is None:
        old = empty(_dim(job, name, side), dtype, stacked=True)
    else:
        old = momentstore.load(Workspace(job.workspace).generation(name, marker["generation"]) / side, marker[side])
        if gone and old.columns is not None:
            old = of_columns(old.columns[_rows_that_stay(job, name, marker, gone)])
    count = sum(entry.layout.by_name[name].rank for entry, _ in added) + old.count
    if count > old.dim or old.second is not None:
        return Accumulator(old, sum_on(job.device, old))
    array = momentstore.create(folder / "columns", (count, old.dim), dtype)
    assert old.columns is not None
    if gone:  # as if they had never been there, to the last bit of what is summed of the others
        columns = Accumulator(empty(old.dim, dtype, stacked=True), _Rows(array, 0))
        columns.add(old.columns)
        return columns
    momentstore.write_tiles(array, old.columns)
    return Accumulator(old, _Rows(array, old.count))


def _rows_that_stay(job: Job, name: str, marker: Mapping[str, Any], gone: Sequence[int]) -> NDArray[np.bool_]:
    """Which stacked columns are not those of adapters that were taken out; they lie in the order of admission."""
    held = job.held(name, marker)
    return np.repeat([i not in gone for i in held], [job.rank(r, name) for r in held.values()])


def _dim(job: Job, name: str, side: Side) -> int:
    """The length d of the vectors of one side, on which all adapters agree."""
    shape = next(shapes[name] for shapes in job.shapes.values() if name in shapes)
    return shape.d_in if side == "A" else shape.d_out


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
