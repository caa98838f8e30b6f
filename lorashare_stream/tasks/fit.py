"""Fit: the bases of one module from its moments."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import momentstore
from ..adapterfiles import digest_files
from ..devices import solver_on
from ..dtypes import narrowed
from ..files import atomic_file, write_json
from ..keys import SIDES, Side
from ..momentstore import DamagedMoment
from ..subspace import fit
from ..tensorfile import write_safetensors
from ..workspace import Workspace
from .accumulate import accumulate_module
from .job import Job


def fit_module(job: Job, name: str) -> None:
    """Fit the bases of a module's two groups and write them, rounded to the storage dtype."""
    try:
        sides = _fit_sides(job, name)
    except DamagedMoment:  # found by its checksum: only this module is summed again
        Workspace(job.workspace).discard(name)
        accumulate_module(job, name)
        sides = _fit_sides(job, name)
    path = job.basis_file(name)
    arrays = {side: narrowed(components, job.storage) for side, (components, _) in sides.items()}
    with atomic_file(path) as f:
        shapes = [(side, job.storage, array.shape) for side, array in arrays.items()]
        write_safetensors(f, shapes, (array.data.cast("B") for array in arrays.values()))
    facts: dict[str, Any] = {side: facts for side, (_, facts) in sides.items()}
    write_json(job.facts_file(name), facts | {"module": name, "digest": digest_files([path])})


def _fit_sides(job: Job, name: str) -> dict[Side, tuple[NDArray[np.float32], dict[str, Any]]]:
    work, s = Workspace(job.workspace), job.settings
    marker = work.marker(name)
    if marker is None or not job.holds_all(marker):
        raise DamagedMoment("a moment is not complete")
    sides: dict[Side, tuple[NDArray[np.float32], dict[str, Any]]] = {}
    for side in SIDES:
        moment = momentstore.load(work.generation(name, marker["generation"]) / side, marker[side])
        if moment.count == 0:  # every adapter that has the module is kept verbatim
            continue
        count = moment.count
        basis = fit(
            moment,
            s.num_components,
            s.variance_threshold,
            center=s.center,
            dtype=job.storage,
            solver=solver_on(job.device),
        )
        d, k = basis.components.shape
        facts = {"d": d, "n": count, "k": k, "energy": basis.energy, "explained": basis.explained}
        sides[side] = basis.components, facts | {"eigenvalues": basis.eigenvalues.tolist()}
    return sides
