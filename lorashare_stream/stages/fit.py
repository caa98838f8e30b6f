"""Fit: the bases of one module from its moments."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
from ..workspace import leases
from ..workspace import moments as momentstore
from ..workspace.moments import DamagedMoment
from ..workspace.workspace import Workspace
from .accumulate import accumulate_modules
from .job import Job

log = logging.getLogger(__name__)


def fit_module(job: Job, name: str, marker: Mapping[str, Any] | None = None) -> bool:
    """Fit the bases of a module's two groups and write them, rounded to the storage dtype.

    Args:
        job, name: the module.
        marker: of its moments; the one in the workspace if None.

    Returns:
        Whether its moments are whole; else it is to be forgotten, for `update.sum_and_fit` to begin it again.
    """
    try:
        sides, origin = _fit_sides(job, marker or Workspace(job.workspace).marker(name))
    except DamagedMoment as e:  # found by its checksum: only this module is summed again
        log.warning("the moments of %s are summed again: %s", printable(name), e)
        return False
    path = job.basis_file(name)
    arrays: dict[str, NDArray[Any]] = {
        side: narrowed(components, job.storage) for side, (components, _) in sides.items()
    }
    with atomic_file(path) as f:
        write_arrays(f, arrays, job.storage)
    facts: dict[str, Any] = {side: facts for side, (_, facts) in sides.items()}
    write_sealed(job.facts_file(name), facts | origin | {"module": name, "digest": digest_files([path])})
    return True


def sum_and_fit_modules(job: Job, names: Sequence[str]) -> list[bool]:
    """Sum modules, fit them, and free their moments, so that never more than those in work take disk.

    Returns:
        Whether each is fitted; else it is to be forgotten.
    """
    fitted: list[bool] = []
    for name, marker in zip(names, accumulate_modules(job, names), strict=True):
        fitted.append((marker is not None or name not in job.slots) and fit_module(job, name, marker))
        if marker is not None:
            leases.remove(Workspace(job.workspace).moments, marker)
    return fitted


def _fit_sides(
    job: Job, marker: Mapping[str, Any] | None
) -> tuple[dict[Side, tuple[NDArray[np.float32], dict[str, Any]]], dict[str, Any]]:
    """Components and facts by side; and which moments they are of, with the names of removed adapters in these."""
    if marker is None or not job.holds_all(marker):
        raise DamagedMoment("a moment is not complete")
    root, s = Workspace(job.workspace).moments, job.settings
    sides: dict[Side, tuple[NDArray[np.float32], dict[str, Any]]] = {}
    for side in SIDES:
        moment = momentstore.load(root, marker, side)
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
    return sides, {"lease": marker["lease"], "removed": job.removed_in(marker)}
