"""Accumulate: add every admitted adapter to the moments of some modules."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.keys import SIDES, Side
from ..adapters.scaling import Scaling
from ..adapters.stacks import ModuleBatch
from ..linalg.delta import gram
from ..linalg.device import sum_on
from ..linalg.moments import Accumulator, Lockstep, Moment, empty, of_columns, partner_root, stays_stacked
from ..linalg.types import Array
from ..text import printable
from ..workspace import moments as momentstore
from ..workspace.journal import Admission
from ..workspace.moments import DamagedMoment
from ..workspace.workspace import Workspace
from ..workspace.zarrfile import ZarrFile
from .job import Job

log = logging.getLogger(__name__)


@dataclass
class _Sums:
    """The moments of one module in the making: what is added to them, and where they go when they are whole."""

    name: str
    sides: dict[Side, Accumulator]
    added: Mapping[int, Admission]
    removed: Mapping[Side, list[int]]
    folder: Path
    marker: dict[str, Any]

    def save(self) -> None:
        """Write the arrays, and in the marker by what they are believed."""
        for side in SIDES:
            facts = momentstore.save(self.folder / side, self.sides.pop(side).finish())
            self.marker[side] = facts | {"removed": self.removed[side]}


def accumulate_modules(job: Job, names: Sequence[str]) -> None:
    """Bring modules' moments up to the journal: what they lack is added, in its order; each adapter is opened once.

    Where what was summed before is no longer what was written, the module is forgotten, for `summing.sum_up` to begin
    it again; all that it holds must be at hand then. Which modules are summed together changes no bit.
    """
    with ExitStack() as generations:
        begun: list[_Sums] = []
        for name in names:
            try:
                sums = _begin(job, name, generations)
            except DamagedMoment as e:
                log.warning("the moments of %s are summed again: %s", printable(name), e)
                Workspace(job.workspace).forget(name)
            else:
                begun += [] if sums is None else [sums]
        _add(job, begun)
        for sums in begun:
            sums.save()


def _begin(job: Job, name: str, generations: ExitStack) -> _Sums | None:
    """A module's sums as they were, in a generation to come; None if no values are needed to bring them up."""
    work = Workspace(job.workspace)
    old = work.marker(name)
    if old is not None and not job.continues(old):
        raise DamagedMoment("a moment holds other adapters than the journal")
    if old is not None and not job.knows(old["entries"]):
        raise DamagedMoment("it is lost what an adapter has brought into a moment that was taken out since")
    held = job.held(name, old)
    now = job.holders(name, len(job.journal.entries))
    never = [i for i in now if i not in held and (i in job.later or (old is not None and i < old["entries"]))]
    passed = set(never)
    added = {i: r for i, r in now.items() if i not in held and i not in passed}
    gone = [i for i in held if i not in now]
    seen = {
        "entries": len(job.journal.entries),
        "admitted": job.journal.digest(len(job.journal.entries)),
        "never": never,
    }
    removed: dict[Side, list[int]] = {side: _removed(old, side, gone) for side in SIDES}
    if old is not None and not added and not (gone and any(old[side]["form"] == "columns" for side in SIDES)):
        work.mark(name, {**old, **seen, **{side: {**old[side], "removed": removed[side]} for side in SIDES}})
        return None  # the arrays stay
    moments = {side: _held_moment(job, name, side, old, gone) for side in SIDES}
    folder, marker = generations.enter_context(work.new_generation(name))
    marker |= seen
    sides = {
        side: _accumulator(job, name, folder / side, added.values(), moments[side], anew=bool(gone)) for side in SIDES
    }
    return _Sums(name, sides, added, removed, folder, marker)


def _add(job: Job, begun: Sequence[_Sums]) -> None:
    """Add to several modules what they lack, adapter by adapter in the order of admission."""
    by_name = {sums.name: sums for sums in begun}
    lacking: dict[int, list[str]] = {}
    for sums in begun:
        for number in sums.added:
            lacking.setdefault(number, []).append(sums.name)
    known: dict[tuple[str, tuple[str, ...], bool], list[tuple[ModuleBatch, dict[Side, Lockstep]]]] = {}
    for number in sorted(lacking):
        admission = by_name[lacking[number][0]].added[number]
        adapter, modules = job.adapter(admission.name), tuple(lacking[number])
        kind = adapter.layout.digest, modules, adapter.plain  # adapters of one kind are cut alike
        if kind not in known:
            known[kind] = [
                (b, {side: Lockstep([by_name[m].sides[side] for m in b.names]) for side in SIDES})
                for b in adapter.batches_of(modules)
            ]
        every = rows_of(adapter, [b for b, _ in known[kind]], admission.energy, job.settings.objective)
        for (_, lockstep), rows in zip(known[kind], every, strict=True):
            for side in SIDES:
                lockstep[side].add(rows[side])


def _removed(marker: Mapping[str, Any] | None, side: Side, gone: Sequence[int]) -> list[int]:
    """Admissions that were taken out, and whose vectors stay in a sum; stacked columns are taken out themselves."""
    if marker is None or marker[side]["form"] == "columns":
        return []
    return [*marker[side]["removed"], *gone]


def rows_of(
    adapter: Adapter, module_batches: Iterable[ModuleBatch], energy: float, objective: str
) -> Iterator[dict[Side, NDArray[np.floating[Any]]]]:
    """The vectors of one adapter that are summed, read from its files: rows (m, E r, d) of each bundle."""
    with adapter.open() as tensors:
        for module_batch in module_batches:
            factors = module_batch.read(tensors)
            yield weighted_rows(factors["A"], factors["B"], adapter.scalings_of(module_batch.names), energy, objective)


def weighted_rows(
    a: NDArray[np.float32], b: NDArray[np.float32], scalings: Sequence[Scaling], energy: float, objective: str
) -> dict[Side, NDArray[np.floating[Any]]]:
    """The vectors of modules of one shape that are summed, as rows (m, E r, d).

    Under `factors` they are A and B' themselves. Under `delta` each side is weighted by the other and by
    1 / ||dW_i||^2 of the whole adapter: rows of sqrt(w) s (B'B)^(1/2) A and of sqrt(w) s (AA')^(1/2) B'; of
    stacked experts, each by its own other side.

    Args:
        a, b: (m, E r, d_in) and (m, d_out, E r). products: how dW comes of them, of each module; E is the same in all.
        energy: ||dW_i||^2, above 0 under `delta`.
    """
    rows: dict[Side, NDArray[Any]] = {"A": a, "B": np.swapaxes(b, -1, -2)}
    if objective == "factors":
        return rows
    factors = np.array([p.scale for p in scalings]) / np.sqrt(energy)
    blocks = {side: scalings[0].blocks(rows[side], side) for side in SIDES}  # (m, E, r, d)
    roots = {side: partner_root(gram(blocks[side]), factors[:, None, None, None]) for side in SIDES}
    return {
        side: np.stack(
            [_times(*pair) for pair in zip(roots["B" if side == "A" else "A"], blocks[side], strict=True)]
        ).reshape(rows[side].shape)
        for side in SIDES
    }


def _times(root: NDArray[np.float64], rows: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
    """The product, which is of order 1; in float64 where the root, which undoes the rows' size, is far from it."""
    largest = np.abs(root).max()
    return root.astype(np.float32) @ rows if largest == 0 or 1e-12 < largest < 1e12 else root @ rows


def _held_moment(job: Job, name: str, side: Side, marker: Mapping[str, Any] | None, gone: Sequence[int]) -> Moment:
    """What was summed before, of a side of a module; columns without those of adapters that are gone."""
    if marker is None:
        return empty(_dim(job, name, side), job.settings.moment_dtype, stacked=True)
    held = momentstore.load(Workspace(job.workspace).generation(name, marker["generation"]) / side, marker[side])
    if gone and held.columns is not None:
        return of_columns(held.columns[_rows_that_stay(job, name, marker, gone)])
    return held


def _accumulator(
    job: Job, name: str, folder: Path, added: Iterable[Admission], held: Moment, *, anew: bool
) -> Accumulator:
    """An accumulator that holds what was summed before, in the form for all there will be.

    Args:
        job, name: the module.
        folder: where columns are written to.
        added: what is to be added.
        held: what was summed before.
        anew: whether it is summed in quanta of its own: as if what is gone had never been there, to the last bit.
    """
    count = sum(job.rank(r, name) for r in added) + held.count
    if held.second is not None or not stays_stacked(count, held.dim):
        return Accumulator(held, sum_on(job.device, held))
    dtype = job.settings.moment_dtype
    array = momentstore.create(folder / "columns", (count, held.dim), dtype)
    assert held.columns is not None
    if anew:
        columns = Accumulator(empty(held.dim, dtype, stacked=True), _Rows(array, 0))
        columns.add(held.columns)
        return columns
    array.write(held.columns)
    return Accumulator(held, _Rows(array, held.count))


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

    def __init__(self, array: ZarrFile, first: int) -> None:
        self._array, self._next = array, first

    def add(self, block: Array) -> None:
        """Write a block (m, d)."""
        self._array.write(block, self._next)
        self._next += len(block)

    def result(self) -> None:
        """Nothing is kept in memory."""
