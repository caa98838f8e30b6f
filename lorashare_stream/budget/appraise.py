"""Appraise: what an adapter is on wide bases, read once and kept small; and what allotments would make of it.

A core file holds, in float32, the loadings on the wide bases (K, r) of every group, and the squared singular values
of every dW. A narrower basis is a prefix of a wide one, so whatever k and ranks are tried needs only this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.folder import digest_files, open_tensors, tensor_records
from ..adapters.keys import SIDES, group_id
from ..adapters.safetensors import float32, write_arrays
from ..files import atomic_file, read_sealed, write_sealed
from ..linalg.types import Float64
from ..stages.components import components_at, loadings_on
from ..stages.job import Job
from ..stages.project import check_unchanged
from .forming import kept_of, own_values
from .forms import Kept, Options, aimed, at_price, core_values, options, padded, pattern_bytes, within, without_own
from .offers import Candidates, Weighed

_OWN = "own"  # key of the squared singular values of dW (m, R), as shares of ||dW||^2 of the adapter
_META, _HUB, _HEADER = 620, 250, 76  # bytes of adapter_meta.json beside the configuration and names; of a header


def appraise_adapter(job: Job, adapter: Adapter) -> str:
    """Write the core of one adapter, unless it is there. Returns its name."""
    name = adapter.name
    path = job.core_file(name)
    if has_core(job, name):
        return name
    check_unchanged(adapter, job.admission_of[name])
    assert job.cores is not None
    wide = components_at(job.cores / "components.safetensors", job.cores.name, job.settings.memory, job.device)
    arrays: dict[str, NDArray[np.float32]] = {}
    own: dict[str, Float64] = {}
    with adapter.open() as tensors:
        for module_batch in adapter.module_batches:
            factors = module_batch.read(tensors)
            for side, stack in factors.items():
                arrays |= loadings_on(wide, [group_id(m, side) for m in module_batch.names], stack, side)
            found = own_values(factors, adapter.scalings_of(module_batch.names))
            own |= dict(zip(module_batch.names, found, strict=True))
    most = max((len(values) for values in own.values()), default=1)
    values = np.stack([padded(own[m.name], most) for m in adapter.layout.modules])
    arrays[_OWN] = (values / (values.sum() or 1.0)).astype(np.float32)  # squares are beyond the range of float32
    with atomic_file(path) as f:
        write_arrays(f, {key: np.ascontiguousarray(array) for key, array in arrays.items()}, "F32")
    write_sealed(job.core_marker(name), {"digest": digest_files([path])})
    return name


def has_core(job: Job, name: str) -> bool:
    """Whether the core of an adapter is there, and whole."""
    try:
        return bool(read_sealed(job.core_marker(name)).get("digest") == digest_files([job.core_file(name)]))
    except FileNotFoundError:
        return False


def weigh_adapter(job: Job, modules: tuple[str, ...], candidates: Candidates, name: str) -> Weighed:
    """What allotments would make of one adapter.

    Args:
        job: whose cores are there.
        modules: of the candidates, in order.
        candidates: of which each chooses forms at its price, or within the limit of the settings.
        name: of the adapter.
    """
    adapter, admission = job.adapter(name), job.admission_of[name]
    q = len(candidates.prices)
    sizes, losses, ranks = (np.zeros((q, len(modules))) for _ in range(3))
    fixed, config = fixed_bytes(adapter, admission.notes)
    if not adapter.layout.modules:
        return Weighed(sizes, losses, ranks, np.full(q, fixed), 0)
    position = {m: i for i, m in enumerate(modules)}
    places = np.array([position[m.name] for m in adapter.layout.modules])
    kept = kept_of(adapter)
    if not job.shares(admission):  # its dW is zero: whatever the form, one rank holds it
        nothing = np.zeros((q, len(places), int(kept.ranks.max())))
        k = candidates.k[:, places].sum(axis=-1)
        given = options(kept, nothing[0], nothing, k, job.storage, 0.0)
        sizes[:, places] = given.sizes.min(axis=-1)
        return Weighed(sizes, losses, ranks, np.full(q, fixed + config), 0)
    loadings, own = _core(job.core_file(name), admission.energy)
    k = candidates.k[:, places]
    core = _cores_at(adapter, loadings, k, own.shape[1])
    given = options(kept, own, core, k.sum(axis=-1), job.storage, admission.energy)
    asked = job.settings.max_error
    limit = None if asked is None else aimed(asked, job.storage)
    columns = _chosen(given, candidates) if limit is None else within(given, limit**2)
    sizes[:, places], losses[:, places] = given.of(columns)
    most = own.shape[1]
    ranks[:, places] = np.where(columns < most, columns + 1, 0)
    least = 0 if limit is None else _least(job, adapter, kept, loadings, own, limit**2)
    patterns = pattern_bytes(kept, columns, most)
    own_names = ((columns >= most) * np.array([len(n) + 4 for n in kept.names])).sum(axis=-1)
    return Weighed(sizes, losses, ranks, fixed + config + patterns + own_names, least)


def _chosen(given: Options, candidates: Candidates) -> NDArray[np.int64]:
    """The forms (q, m) at the price of each candidate."""
    any_form, shared = at_price(given, candidates.prices), at_price(without_own(given), candidates.prices)
    found: NDArray[np.int64] = np.where(candidates.own[:, None], any_form, shared)
    return found


def fixed_bytes(adapter: Adapter, notes: Sequence[str]) -> tuple[int, int]:
    """Bytes on disk of an adapter that no form changes; and of its configuration, kept beside one with other ranks."""
    config = len(str(adapter.config))
    names = sum(2 * len(key) + _HEADER for key, _ in adapter.layout.extras)
    worst = max((len(m.name) for m in adapter.layout.modules), default=0)
    hub = _HUB if adapter.origin is not None else 0
    told = len(adapter.name) + 2 * len(adapter.source_id) + worst + sum(len(note) + 4 for note in notes)
    return adapter.layout.extra_bytes + names + told + config + hub + _META, config


def _core(path: Path, energy: float) -> tuple[dict[str, NDArray[np.float32]], Float64]:
    with open_tensors((path,)) as tensors:
        found = {r.name: float32(tensors, r) for r in tensor_records((path,))}
    return found, energy * found.pop(_OWN).astype(np.float64)


def _cores_at(adapter: Adapter, loadings: dict[str, NDArray[np.float32]], k: NDArray[np.int64], most: int) -> Float64:
    """Squared singular values of the cores (q, m, most) at the first k (q, m, 2) components; zero without any."""
    found = np.zeros((*k.shape[:-1], most))
    alike: dict[tuple[int, object], list[int]] = {}
    for i, m in enumerate(adapter.layout.modules):
        shapes = tuple(loadings[group_id(m.name, side)].shape for side in SIDES)
        alike.setdefault((adapter.scalings[i].experts, shapes), []).append(i)
    for (experts, _), some in alike.items():
        names = [adapter.layout.modules[i].name for i in some]
        stacks = [np.stack([loadings[group_id(m, side)] for m in names]).astype(np.float64) for side in SIDES]
        wanted = k[:, some]  # (q, |some|, 2)
        module = np.broadcast_to(np.arange(len(some)), wanted.shape[:-1])
        cases, where = np.unique(
            np.concatenate((module[..., None], wanted), -1).reshape(-1, 3), axis=0, return_inverse=True
        )
        grams = [_prefix_grams(stack, cases[:, 0], cases[:, 1 + s]) for s, stack in enumerate(stacks)]
        scales = np.array([adapter.scalings[i].scale for i in some])[cases[:, 0]]
        values = np.zeros((len(cases), stacks[0].shape[-1]))
        known = (cases[:, 1:] > 0).all(axis=-1)
        values[known] = core_values(grams[0][known], grams[1][known], scales[known], experts)
        found[:, some] = padded(values, most)[where].reshape(*wanted.shape[:-1], most)
    return found


def _prefix_grams(stack: Float64, modules: NDArray[np.int64], k: NDArray[np.int64]) -> Float64:
    """L'L (c, r, r) of the first k (c,) rows of L (m, K, r) of some modules (c,): sums between the k that occur."""
    out = np.zeros((len(k), stack.shape[-1], stack.shape[-1]))
    total, start = np.zeros((len(stack), *out.shape[1:])), 0
    for end in np.unique(k):
        part = stack[:, start:end]
        total = total + np.swapaxes(part, -1, -2) @ part
        at = k == end
        out[at] = total[modules[at]]
        start = end
    return out


def _least(
    job: Job, adapter: Adapter, kept: Kept, loadings: dict[str, NDArray[np.float32]], own: Float64, limit: float
) -> int:
    """The smallest uniform k at which all modules are shared within a limit; one more than there is if none is."""
    fitted = np.array([[len(loadings[group_id(m.name, side)]) for side in SIDES] for m in adapter.layout.modules])
    energy = job.admission_of[adapter.name].energy
    low, high = 0, int(fitted.max()) + 1  # fails, holds
    while high - low > 1:
        middle = (low + high) // 2
        k = np.minimum(middle, fitted)[None]
        core = _cores_at(adapter, loadings, k, own.shape[1])
        given: Options = options(kept, own, core, k.sum(axis=-1), job.storage, energy)
        error = given.of(np.broadcast_to(given.shared, (1, len(kept.names))))[1].sum()
        low, high = (low, middle) if error <= limit else (middle, high)
    return high
