"""Form: loadings of the shared modules of one adapter, and their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.dtypes import Float64, narrowed
from ..adapters.keys import SIDES, Side, group_id
from ..adapters.safetensors import TensorReader
from ..adapters.scaling import Scaling
from ..errors import AdapterError
from ..linalg.delta import DeltaError, delta_errors, gram, projected_errors
from .components import Components, Part, Stack, components_at, projected, restored
from .job import Admitted, Job


@dataclass(frozen=True)
class Formed:
    """Stored form of an adapter: all of its modules on the bases, or none.

    Attributes:
        loadings: (k, r) by group, as they are stored.
        errors: of every module that is on the bases.
        exact: modules that are kept verbatim though they could be shared.
    """

    loadings: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    errors: Mapping[str, DeltaError] = field(default_factory=dict)
    exact: Sequence[str] = ()


def formed(job: Job, task: Admitted, tensors: TensorReader) -> Formed:
    """Project the modules of an adapter, and measure the errors of what is stored.

    An adapter whose dW is zero takes no part in bases, and dW tells nothing of its factors: they are kept verbatim.

    Raises:
        AdapterError: if what comes back is beyond the range of the storage dtype.
    """
    adapter = task.adapter
    if not adapter.layout.modules or not job.shares(task.admission):
        return Formed(exact=list(adapter.layout.by_name))
    components = components_at(job.components, job.basis_key, job.settings.memory, job.device)
    return _on_bases(components, job.storage, adapter, tensors)


def _on_bases(components: Components, storage: str, adapter: Adapter, tensors: TensorReader) -> Formed:
    loadings: dict[str, NDArray[Any]] = {}
    errors: dict[str, DeltaError] = {}
    for module_batch in adapter.module_batches:
        factors = module_batch.read(tensors)
        on: dict[Side, list[Part]] = {}
        for side, stack in factors.items():
            on[side] = projected(components, [group_id(m, side) for m in module_batch.names], stack, side, storage)
            for part in on[side]:
                loadings |= zip(part.groups, narrowed(part.loadings, storage), strict=True)
        found = _projection_errors(components, factors, on, adapter.scalings_of(module_batch.names), storage)
        errors |= dict(zip(module_batch.names, found, strict=True))
    return Formed(loadings, errors)


def _projection_errors(
    components: Components,
    factors: Mapping[Side, Stack],
    on: Mapping[Side, Sequence[Part]],
    scalings: Sequence[Scaling],
    storage: str,
) -> list[DeltaError]:
    """Errors of projected modules of one shape; tensors are reconstructed only where no identity gives the error.

    Args:
        components: the bases.
        factors: A (m, E r, d_in) and B (m, d_out, E r). on: what they are on the bases.
        scalings: how dW comes of them, of each module.
        storage: dtype of components and loadings.

    Raises:
        AdapterError: if what comes back is beyond the range of the storage dtype.
    """
    found: list[DeltaError | None] = [None] * len(scalings)
    orthogonal = (components.projects_orthogonally(part.groups) for parts in on.values() for part in parts)
    if storage == "F32" and all(orthogonal):
        kept: dict[Side, Float64] = {side: _grams(on[side], scalings, side) for side in SIDES}
        found = projected_errors(factors["A"], factors["B"], kept, scalings)
    known = [e for e in found if e is not None]
    if len(known) == len(found):
        return known
    hats = {side: restored(components, on[side], stack, side, storage) for side, stack in factors.items()}
    for side, parts in on.items():
        for part in parts:
            _demand_finite(hats[side][part.places], part.groups, storage)
    exact = delta_errors(factors["A"], factors["B"], hats["A"], hats["B"], scalings)
    return [e if f is None else f for f, e in zip(found, exact, strict=True)]


def _grams(parts: Sequence[Part], scalings: Sequence[Scaling], side: Side) -> Float64:
    """Gram matrices (m, E, r, r) of the loadings of modules of one shape."""
    each = [gram(scalings[0].blocks(part.loadings.swapaxes(-1, -2), side)) for part in parts]
    found = np.empty((len(scalings), *each[0].shape[1:]))
    for part, own in zip(parts, each, strict=True):
        found[part.places] = own
    return found


def _demand_finite(hats: Stack, groups: Sequence[str], storage: str) -> None:
    """Check that reconstructed tensors, and with them the loadings, are finite."""
    if np.isfinite(hats.sum()):
        return
    for group, hat in zip(groups, hats, strict=True):
        if not np.isfinite(hat).all():
            raise AdapterError(f"values beyond the range of {storage}", key=group, remedy="Use dtype float32.")
