"""Components of a checkpoint, memory-mapped; projection of adapters on them, and its errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.dtypes import Float64, as_stored, narrowed, stacked, widened
from ..adapters.folder import tensor_records
from ..adapters.keys import SIDES, Side, group_id
from ..adapters.safetensors import TensorReader, TensorRecord
from ..adapters.scaling import Scaling
from ..errors import AdapterError
from ..linalg.delta import DeltaError, delta_errors, gram, projected_errors
from ..linalg.device import held_on, product
from ..plan.memory import keeps_components

_ORTHONORMAL = 1e-6  # of |(V'V - 1) w| / |w| for random w: rounding to float32 leaves some 1e-8
_PROBES = 4
Stack = NDArray[np.float32]  # tensors of one shape, (m, *shape)


@dataclass(frozen=True)
class Part:
    """Loadings of some tensors of one adapter, on bases of one (d, k).

    Attributes:
        groups: theirs.
        places: where they are in the stack that they come from.
        loadings: (m, k, r) float32, as they will be read back.
    """

    groups: list[str]
    places: slice | list[int]
    loadings: Stack


def projected(components: Components, groups: Sequence[str], stack: Stack, side: Side, storage: str) -> list[Part]:
    """Project a stack of tensors (m, *shape) on the bases of their groups, rounded to the storage dtype."""
    parts: list[Part] = []
    for some in components.alike(groups):
        places = slice(None) if len(some) == len(groups) else [groups.index(g) for g in some]
        vectors = stack[places].swapaxes(-1, -2) if side == "A" else stack[places]
        parts.append(Part(some, places, as_stored(product(components.stack(some).mT, vectors), storage)))
    return parts


def restored(components: Components, parts: Sequence[Part], stack: Stack, side: Side, storage: str) -> Stack:
    """Reconstruct a projected stack (m, *shape), rounded as `reconstruct` rounds it."""
    hats = np.empty_like(stack)
    for part in parts:
        vectors = product(components.stack(part.groups), part.loadings)
        hats[part.places] = vectors.swapaxes(-1, -2) if side == "A" else vectors
    return as_stored(hats, storage)


class Components:
    """Components of all groups, memory-mapped, stacked in float32 on demand.

    Stacks are kept, on the device where they are used, while they are no more than `memory` allows.
    """

    def __init__(self, path: Path, memory: int, device: str) -> None:
        self._device = device
        self._records = {r.name: r for r in tensor_records((path,))}
        self._bytes = np.memmap(path, np.uint8, "r").view(np.ndarray)  # whose slices are cheaper than a memmap's
        size = 4 * sum(math.prod(r.shape) for r in self._records.values())
        self._room = size if keeps_components(size, memory) else 0
        self._stacks: dict[tuple[str, ...], Any] = {}
        self._projects: dict[tuple[str, ...], bool] = {}

    def __contains__(self, group: str) -> bool:
        return group in self._records

    def shape(self, group: str) -> tuple[int, int]:
        """(d, k) of a group."""
        d, k = self._records[group].shape
        return d, k

    def __getitem__(self, group: str) -> NDArray[np.float32]:
        """V (d, k) of a group."""
        r = self._records[group]
        return widened(self._raw(r), r.dtype, r.shape)

    def projects_orthogonally(self, groups: Sequence[str]) -> bool:
        """Whether V V'x is an orthogonal projection in all of these groups, as far as float32 goes; looked at once.

        On a GPU that is not taken for granted, since torch's products may be in TF32.
        """
        key = tuple(groups)
        if key not in self._projects:
            self._projects[key] = self._device == "cpu" and all(_is_orthonormal(self[group]) for group in groups)
        return self._projects[key]

    def _raw(self, record: TensorRecord) -> NDArray[np.uint8]:
        return self._bytes[record.offset : record.offset + record.nbytes]

    def alike(self, groups: Sequence[str]) -> list[list[str]]:
        """The groups, those with the same d and k together."""
        found: dict[tuple[int, ...], list[str]] = {}
        for group in groups:
            found.setdefault(self._records[group].shape, []).append(group)
        return list(found.values())

    def stack(self, groups: Sequence[str]) -> Any:
        """V (m, d, k) of groups with the same d and k, as `device.product` takes it."""
        key = tuple(groups)
        kept = self._stacks.get(key)
        if kept is not None:
            return kept
        records = [self._records[group] for group in groups]
        made = stacked(self._bytes, [r.offset for r in records], records[0].dtype, records[0].shape)
        held = held_on(self._device, made)
        if made.nbytes <= self._room:  # of two threads that make it, one counts too much
            self._room -= made.nbytes
            self._stacks[key] = held
        return held


def _is_orthonormal(v: NDArray[np.float32]) -> bool:
    """Whether V'V is 1, tested on random vectors, at the cost of projecting a few adapters."""
    wide, w = v.astype(np.float64), np.random.default_rng(0).standard_normal((v.shape[1], _PROBES))
    return bool(np.linalg.norm(wide.T @ (wide @ w) - w) <= _ORTHONORMAL * np.linalg.norm(w))


def components_at(path: Path, digest: str, memory: int = 0, device: str = "cpu") -> Components:
    """Components to project on, mapped once per process and digest.

    Args:
        path, digest: of the components.
        memory: the budget, of which a part may keep them in float32.
        device: where they are used.
    """
    file = path.stat()  # another file of the same basis may have taken the place of one that was damaged
    return _mapped(path, digest, memory, device, file.st_ino, file.st_mtime_ns)


@lru_cache(maxsize=1)
def _mapped(path: Path, digest: str, memory: int, device: str, inode: int, mtime_ns: int) -> Components:
    return Components(path, memory, device)


def project_factors(
    components: Components, storage: str, adapter: Adapter, tensors: TensorReader
) -> tuple[dict[str, NDArray[Any]], dict[str, DeltaError]]:
    """Project the shared modules of an adapter.

    Returns:
        Loadings (k, r) by group, as they are stored, and the error of each module.

    Raises:
        AdapterError: if what comes back is beyond the range of the storage dtype.
    """
    loadings: dict[str, NDArray[Any]] = {}
    errors: dict[str, DeltaError] = {}
    for module_batch in adapter.module_batches:
        factors = module_batch.read(tensors)
        on: dict[Side, list[Part]] = {}
        for side, stack in factors.items():
            on[side] = projected(components, [group_id(m, side) for m in module_batch.names], stack, side, storage)
            for part in on[side]:
                loadings |= zip(part.groups, narrowed(part.loadings, storage), strict=True)
        found = projection_errors(components, factors, on, adapter.scalings_of(module_batch.names), storage)
        errors |= dict(zip(module_batch.names, found, strict=True))
    return loadings, errors


def projection_errors(
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
