"""Clean: free the sums of one module of the vectors of adapters that were taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..adapters.adapter import Adapter
from ..adapters.keys import SIDES, Side
from ..linalg.moments import Moment, downdate, of_columns
from ..workspace import moments as momentstore
from ..workspace.journal import Admission
from ..workspace.leases import Need, Slot
from ..workspace.moments import DamagedMoment
from ..workspace.workspace import Workspace
from .accumulate import rows_of
from .job import Job

MOST_REMOVED = 10.0  # times the kept energy, up to which float32 leaves enough digits of what is kept


def places_to_clean(job: Job, work: Workspace, names: Sequence[str]) -> dict[str, dict[Side, Slot]]:
    """Places for the moments of those modules that hold vectors of removed adapters."""
    markers = {name: marker for name in names if (marker := work.marker(name)) is not None and job.removed_in(marker)}
    dims = {(name, side): int(marker[side]["dim"]) for name, marker in markers.items() for side in SIDES}
    return work.lease({key: Need("second", dim, dim) for key, dim in dims.items()})


def clean_module(job: Job, gone: Mapping[int, Adapter], name: str) -> dict[str, Any] | Literal["forget"] | None:
    """Take away the vectors of removed adapters from a module's sums, at the cost of reading only these.

    Args:
        job: of the adapters that stay, with places for the modules that are cleaned.
        gone: those that were taken out and can be read, unchanged, by the number of their admission.
        name: of the module.

    Returns:
        The marker of the sums, which are durable. Or, where the vectors cannot be read, or dominate, and the adapters
        that stay can be read, that the moments are to be forgotten: they are summed anew when bases are fitted. Where
        neither can be done they stay as they are.
    """
    marker = Workspace(job.workspace).marker(name)
    if marker is None or name not in job.slots:
        return None
    try:
        cleaned = _cleaned(job, gone, name, marker)
    except DamagedMoment:
        cleaned = None
    if cleaned is None:
        able = all(r.name in job.adapters for r in job.holders(name, len(job.journal.entries)).values())
        return "forget" if able else None
    root, slots = Workspace(job.workspace).moments, job.slots[name]
    fresh = {**marker, "lease": slots["A"].lease}
    for side in SIDES:
        (facts,) = momentstore.save(root, [slots[side]], [(cleaned[side], 0)])
        fresh[side] = facts | {"removed": []}
    momentstore.sync_moments(root, [fresh])
    return fresh


def _cleaned(job: Job, gone: Mapping[int, Adapter], name: str, marker: Mapping[str, Any]) -> dict[Side, Moment] | None:
    """The moments without what was removed; None if that cannot be read, or dominates."""
    numbers = sorted({i for side in SIDES for i in marker[side]["removed"]})
    if not all(i in gone for i in numbers):
        return None
    cleaned: dict[Side, Moment] = {}
    for side in SIDES:
        moment = momentstore.load(Workspace(job.workspace).moments, marker, side)
        energy = moment.energy
        for i in marker[side]["removed"]:
            admission = job.journal.entries[i]
            assert isinstance(admission, Admission)
            (rows,) = rows_of(gone[i], gone[i].batches_of([name]), admission.energy, job.settings.objective)
            moment = downdate(moment, of_columns(rows[side][0]))
        if energy - moment.energy > MOST_REMOVED * moment.energy:
            return None
        cleaned[side] = moment
    return cleaned
