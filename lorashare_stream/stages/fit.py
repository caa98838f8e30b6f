"""Fit: the bases of one module from its moments."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.dtypes import narrowed
from ..adapters.folder import digest_files
from ..adapters.keys import SIDES, Side
from ..adapters.safetensors import write_arrays
from ..files import atomic_file, write_sealed
from ..linalg.basis import fit
from ..linalg.device import solver_on
from ..text import printable
from ..workspace import moments as momentstore
from ..workspace.moments import DamagedMoment
from ..workspace.workspace import Workspace
from .accumulate import accumulate_modules
from .job import Job

log = logging.getLogger(__name__)


def fit_module(job: Job, name: str) -> None:
    """Fit the bases of a module's two groups and write them, rounded to the storage dtype.

    A module whose moments are found to be damaged is forgotten, for `summing.sum_and_fit` to begin it again.
    """
    try:
        sides, origin = _fit_sides(job, name)
    except DamagedMoment as e:  # found by its checksum: only this module is summed again
        log.warning("the moments of %s are summed again: %s", printable(name), e)
        Workspace(job.workspace).forget(name)
        return
    path = job.basis_file(name)
    arrays: dict[str, NDArray[Any]] = {
        side: narrowed(components, job.storage) for side, (components, _) in sides.items()
    }
    with atomic_file(path) as f:
        write_arrays(f, arrays, job.storage)
    facts: dict[str, Any] = {side: facts for side, (_, facts) in sides.items()}
    write_sealed(job.facts_file(name), facts | origin | {"module": name, "digest": digest_files([path])})


def sum_and_fit_modules(job: Job, names: Sequence[str]) -> None:
    """Sum modules, fit them, and free their moments, so that never more than those in work take disk."""
    accumulate_modules(job, names)
    for name in names:
        fit_module(job, name)
        Workspace(job.workspace).discard(name)


def _fit_sides(job: Job, name: str) -> tuple[dict[Side, tuple[NDArray[np.float32], dict[str, Any]]], dict[str, Any]]:
    """Components and facts by side; and which moments they are of, with the names of removed adapters in these."""
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
    return sides, {"generation": marker["generation"], "removed": job.removed_in(marker)}
