"""Accumulate: add every admitted adapter to the moments of some modules."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.keys import SIDES, Side
from ..adapters.layout import ModuleBatch
from ..adapters.scaling import Scaling
from ..linalg.delta import gram
from ..linalg.device import sum_on
from ..linalg.moments import Accumulator, Lockstep, Moment, empty, of_columns, partner_root, stays_stacked
from ..text import printable
from ..workspace import moments as momentstore
from ..workspace.leases import Need
from ..workspace.moments import DamagedMoment, Rows
from ..workspace.records import Marker, MomentRecord
from ..workspace.workspace import Workspace
from .job import Job
from .status import ModuleStatus, status_of

log = logging.getLogger(__name__)


@dataclass
class _Sums:
    """Moments of one module while they are summed."""

    status: ModuleStatus
    sides: dict[Side, Accumulator] = field(default_factory=dict)
    rows: dict[Side, Rows] = field(default_factory=dict)
    records: dict[Side, MomentRecord] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """Its name."""
        return self.status.module

    def finish(self, side: Side) -> tuple[Moment, int]:
        """The moment of a side, and the checksum of its columns if these are already on disk, else 0."""
        moment, rows = self.sides.pop(side).finish(), self.rows.pop(side, None)
        return (moment, 0) if rows is None else (replace(moment, columns=rows.kept), rows.checksum)


def prepare(job: Job, work: Workspace, names: Sequence[str]) -> Job:
    """Allocate slots, in a new lease, for the moments whose arrays change; of other modules update the markers.

    A module whose marker does not go with the journal is forgotten, for `update.sum_up` to begin it again.
    """
    needs: dict[tuple[str, Side], Need] = {}
    for status in status_of(job, work, names):
        try:
            _demand_sound(status)
        except DamagedMoment as e:
            _warn(status.module, e)
            work.forget(status.module)
            continue
        if status.writes:
            needs |= {(status.module, side): _need(status, side) for side in SIDES}
        elif status.marker is not None:
            work.mark(status.marked(status.marker.sides))
    markers = {name: work.markers[name] for name in names if name in work.markers}
    return replace(job, slots=work.lease(needs), markers=markers)


def _demand_sound(status: ModuleStatus) -> None:
    """Check that the moments hold a known prefix of the journal."""
    if status.marker is None:
        return
    if not status.continues:
        raise DamagedMoment("a moment holds other adapters than the journal")
    if not status.job.knows(status.marker.entries):
        raise DamagedMoment("it is lost what an adapter has brought into a moment that was taken out since")


def _need(status: ModuleStatus, side: Side) -> Need:
    """Form and size of the moment after this step: columns while n <= 2d, but never again after a second moment."""
    job, name = status.job, status.module
    dim, gone = _dim(job, name, side), set(status.gone)
    count = job.vectors(name, [*(r for i, r in status.held.items() if i not in gone), *status.lacking.values()])
    summed = status.marker is not None and not status.marker.sides[side].stacked
    return Need("second", dim, dim) if summed or not stays_stacked(count, dim) else Need("columns", dim, count)


def _warn(name: str, error: DamagedMoment) -> None:
    log.warning("the moments of %s are summed again: %s", printable(name), error)


def accumulate_modules(job: Job, names: Sequence[str]) -> list[Marker | None]:
    """Add to the moments of some modules the adapters that they lack, in journal order; each adapter is opened once.

    All that modules lack must be at hand. Which of them are summed together changes no bit.

    Returns:
        The markers of those that the job has places for, whose arrays are durable; None of others, and where what was
        summed before is no longer what was written.
    """
    begun: list[_Sums] = []
    for name in names:
        try:
            begun += [_begin(ModuleStatus(job, name, job.markers.get(name)))] if name in job.slots else []
        except DamagedMoment as e:
            _warn(name, e)
    _add(job, begun)
    _save(job, begun)
    markers = {sums.module: sums.status.marked(sums.records) for sums in begun}
    return [markers.get(name) for name in names]


def _begin(status: ModuleStatus) -> _Sums:
    """Accumulators of a module, initialised with the moments on disk."""
    _demand_sound(status)
    job, name = status.job, status.module
    slots, sums = job.slots[name], _Sums(status)
    for side in SIDES:
        held = _held_moment(status, side)
        if slots[side].form == "second":
            sums.sides[side] = Accumulator(held, sum_on(job.device, held))
            continue
        count = held.count + job.vectors(name, status.lacking.values())
        sums.rows[side] = rows = Rows(Workspace(job.workspace).moments, slots[side], count)
        assert held.columns is not None
        if status.gone:  # in quanta of its own: as if what is gone had never been there, to the last bit
            sums.sides[side] = Accumulator(empty(held.dim, job.settings.moment_dtype, stacked=True), rows)
            sums.sides[side].add(held.columns)
        else:
            rows.add(held.columns)
            sums.sides[side] = Accumulator(held, rows)
    return sums


def _save(job: Job, begun: Sequence[_Sums]) -> None:
    """Write and sync the moments; their records go into the markers."""
    root = Workspace(job.workspace).moments
    for side in SIDES:
        places = {sums.module: job.slots[sums.module][side] for sums in begun}
        ordered = sorted(begun, key=lambda sums: (places[sums.module].array, places[sums.module].index))
        slots = [places[sums.module] for sums in ordered]
        records = momentstore.save(root, slots, (sums.finish(side) for sums in ordered))
        for sums, record in zip(ordered, records, strict=True):
            sums.records[side] = record
    momentstore.sync_moments(root, [record for sums in begun for record in sums.records.values()])


def _add(job: Job, begun: Sequence[_Sums]) -> None:
    """Add the missing adapters to several modules, one adapter at a time, in the order of admission."""
    by_name = {sums.module: sums for sums in begun}
    lacking: dict[int, list[str]] = {}
    for sums in begun:
        for number in sums.status.lacking:
            lacking.setdefault(number, []).append(sums.module)
    known: dict[tuple[str, tuple[str, ...], bool], list[tuple[ModuleBatch, dict[Side, Lockstep]]]] = {}
    for number in sorted(lacking):
        admission = by_name[lacking[number][0]].status.lacking[number]
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


def rows_of(
    adapter: Adapter, module_batches: Iterable[ModuleBatch], energy: float, objective: str
) -> Iterator[dict[Side, NDArray[np.floating[Any]]]]:
    """Read the weighted vectors of one adapter: rows (m, E r, d) of each module batch, by side."""
    with adapter.open() as tensors:
        for module_batch in module_batches:
            factors = module_batch.read(tensors)
            yield weighted_rows(factors["A"], factors["B"], adapter.scalings_of(module_batch.names), energy, objective)


def weighted_rows(
    a: NDArray[np.float32], b: NDArray[np.float32], scalings: Sequence[Scaling], energy: float, objective: str
) -> dict[Side, NDArray[np.floating[Any]]]:
    """Weighted vectors of modules of one shape, as rows (m, E r, d), by side.

    Under `factors` they are A and B' themselves. Under `delta` each side is weighted by the other and by
    1 / ||dW_i||^2 of the whole adapter: rows of sqrt(w) s (B'B)^(1/2) A and of sqrt(w) s (AA')^(1/2) B'; of
    stacked experts, each by its own other side.

    Args:
        a, b: (m, E r, d_in) and (m, d_out, E r). scalings: how dW comes of them, of each module; E is the same in all.
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
    """Product of order 1; in float64 where the root is so far from 1 that float32 could overflow."""
    largest = np.abs(root).max()
    return root.astype(np.float32) @ rows if largest == 0 or 1e-12 < largest < 1e12 else root @ rows


def _held_moment(status: ModuleStatus, side: Side) -> Moment:
    """The moment on disk of one side of a module; columns without those of removed adapters."""
    job, name = status.job, status.module
    if status.marker is None:
        return empty(_dim(job, name, side), job.settings.moment_dtype, stacked=True)
    held = momentstore.load(Workspace(job.workspace).moments, status.marker.sides[side])
    if status.gone and held.columns is not None:
        gone = set(status.gone)
        stay = [i not in gone for i in status.held]  # they lie in the order of admission
        return of_columns(held.columns[np.repeat(stay, [job.rank(r, name) for r in status.held.values()])])
    return held


def _dim(job: Job, name: str, side: Side) -> int:
    """d, the vector length of one side of a module."""
    shape = next(shapes[name] for shapes in job.shapes.values() if name in shapes)
    return shape.d_in if side == "A" else shape.d_out
