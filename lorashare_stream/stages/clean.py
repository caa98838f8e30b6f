"""Clean: free the sums of one module of the vectors of adapters that were taken out."""

from __future__ import annotations

from collections.abc import Mapping

from ..adapters.adapter import Adapter
from ..adapters.keys import SIDES, Side
from ..linalg.moments import Moment, downdate, of_columns
from ..workspace import moments as momentstore
from ..workspace.journal import Admission
from ..workspace.moments import DamagedMoment
from ..workspace.workspace import Workspace
from .accumulate import rows_of
from .job import Job

MOST_REMOVED = 10.0  # times the kept energy, up to which float32 leaves enough digits of what is kept


def clean_module(job: Job, gone: Mapping[int, Adapter], name: str) -> None:
    """Take away the vectors of removed adapters from a module's sums, at the cost of reading only these.

    Where they cannot be read, or dominate, and the adapters that stay can be read, the moments are forgotten: they are
    summed anew when bases are fitted. Where neither can be done they stay as they are.

    Args:
        job: of the adapters that stay.
        gone: those that were taken out and can be read, unchanged, by the number of their admission.
        name: of the module.
    """
    work = Workspace(job.workspace)
    marker = work.marker(name)
    if marker is None or not job.removed_in(marker):
        return
    try:
        cleaned = _cleaned(job, gone, name)
    except DamagedMoment:
        cleaned = None
    if cleaned is not None:
        with work.new_generation(name) as (folder, fresh):
            for side in SIDES:
                fresh[side] = momentstore.save(folder / side, cleaned[side]) | {"removed": []}
            fresh |= {k: marker[k] for k in ("entries", "admitted", "never") if k in marker}
    elif all(r.name in job.adapters for r in job.holders(name, len(job.journal.entries)).values()):
        work.forget(name)


def _cleaned(job: Job, gone: Mapping[int, Adapter], name: str) -> dict[Side, Moment] | None:
    """The moments without what was removed; None if that cannot be read, or dominates."""
    work = Workspace(job.workspace)
    marker = work.marker(name)
    assert marker is not None
    numbers = sorted({i for side in SIDES for i in marker[side]["removed"]})
    if not all(i in gone for i in numbers):
        return None
    cleaned: dict[Side, Moment] = {}
    for side in SIDES:
        moment = momentstore.load(work.generation(name, marker["generation"]) / side, marker[side])
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
