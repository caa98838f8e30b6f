"""Fit: the bases of each module from its moments; the components of all of them, as one file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ..adapters.dtypes import narrowed
from ..adapters.folder import digest_files, open_tensors, tensor_records
from ..adapters.keys import Side
from ..adapters.safetensors import write_arrays
from ..checkpoint.config import CheckpointRecord, Group
from ..checkpoint.format import COMPONENTS
from ..checkpoint.staging import Staging
from ..files import atomic_file, write_sealed
from ..linalg.basis import Basis, fit
from ..linalg.device import solver_on
from ..plan.plan import Plan
from ..text import digest_of, printable
from ..workspace import leases
from ..workspace import moments as momentstore
from ..workspace.moments import DamagedMoment
from ..workspace.records import Marker, MomentRecord
from ..workspace.workspace import Workspace
from .accumulate import accumulate_modules
from .job import Job, record_of_plan
from .status import BasisOfSide, BasisRecord, ModuleStatus, removed_in

Bases = Mapping[str, BasisRecord]  # by module
log = logging.getLogger(__name__)


def fit_module(job: Job, name: str) -> bool:
    """Fit and write the bases of a module's two groups, rounded to the storage dtype.

    Returns:
        Whether its moments are whole; else it is to be forgotten, for `update.sum_and_fit` to begin it again.
    """
    return _fitted(job, job.markers[name])


def sum_and_fit_modules(job: Job, names: Sequence[str]) -> list[bool]:
    """Sum, fit and free the moments of modules, so that only those in work take disk.

    Returns:
        Whether each is fitted; else it is to be forgotten.
    """
    fitted: list[bool] = []
    for name, marker in zip(names, accumulate_modules(job, names), strict=True):
        there = marker if name in job.slots else job.markers.get(name)
        fitted.append(there is not None and _fitted(job, there))
        if marker is not None:
            leases.remove(Workspace(job.workspace).moments, marker)
    return fitted


def _fitted(job: Job, marker: Marker) -> bool:
    name = marker.module
    arrays: dict[str, NDArray[Any]] = {}
    sides: dict[Side, BasisOfSide] = {}
    try:
        if not ModuleStatus(job, name, marker).is_whole:
            raise DamagedMoment("a moment is not complete")
        for side, moment in marker.sides.items():
            if moment.count:  # else every adapter that has the module is kept verbatim
                basis = _fit(job, moment)
                arrays[side], sides[side] = narrowed(basis.components, job.storage), _record(basis, moment.count)
    except DamagedMoment as e:  # only this module is summed again
        log.warning("the moments of %s are summed again: %s", printable(name), e)
        return False
    path = job.basis_file(name)
    with atomic_file(path) as f:
        write_arrays(f, arrays, job.storage)
    of, removed, digest = marker.lease, removed_in(job, marker), digest_files([path])
    record = BasisRecord(module=name, lease=of, removed=removed, digest=digest, **sides)
    write_sealed(job.facts_file(name), record.model_dump(exclude_none=True))
    return True


def _fit(job: Job, record: MomentRecord) -> Basis:
    return fit(
        momentstore.load(Workspace(job.workspace).moments, record),
        job.settings.num_components,
        job.settings.variance_threshold,
        center=job.settings.center,
        dtype=job.storage,
        solver=solver_on(job.device),
    )


def _record(basis: Basis, count: int) -> BasisOfSide:
    (d, k), eigenvalues = basis.components.shape, basis.eigenvalues.tolist()
    return BasisOfSide(n=count, d=d, k=k, energy=basis.energy, explained=basis.explained, eigenvalues=eigenvalues)


def basis_key_of(bases: Bases) -> str:
    """Digest of the bases of all modules."""
    return digest_of([[module, record.digest] for module, record in bases.items()])


def groups_of(bases: Bases) -> dict[str, BasisOfSide]:
    """The bases by group, of each module A before B."""
    return {group: basis for record in bases.values() for group, basis in record.groups.items()}


def write_bases(staging: Staging, job: Job, bases: Bases) -> None:
    """Stream the components of all bases, and their eigenvalues, into the staged checkpoint."""
    groups = groups_of(bases)
    shapes = {group: (basis.d, basis.k) for group, basis in groups.items()}
    staging.write_components(_raw_components(job, bases), shapes, job.storage, job.basis_key)
    staging.write_spectrum({group: basis.eigenvalues for group, basis in groups.items()})


def _raw_components(job: Job, bases: Bases) -> Iterator[bytes | memoryview]:
    """The components, as they are stored, in the order of `groups_of`."""
    for module in bases:
        path = (job.basis_file(module),)
        with open_tensors(path) as reader:
            for record in tensor_records(path):
                yield from reader.chunks(record)


def record_of_bases(plan: Plan, job: Job, bases: Bases, staging: Staging) -> CheckpointRecord:
    """Checkpoint record of a job whose bases are staged."""
    fields = {*Group.model_fields}
    return record_of_plan(
        plan,
        basis_digest=job.basis_key,
        components=digest_files([staging.root / COMPONENTS]),
        groups={group: Group(**basis.model_dump(include=fields)) for group, basis in groups_of(bases).items()},
        removed=sorted({name for record in bases.values() for name in record.removed}),
    ).counting(job.counts)
