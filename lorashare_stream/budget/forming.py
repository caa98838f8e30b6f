"""Form: what is stored of the shared modules of one adapter, and how far off that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.dtypes import alone_as, as_stored, narrowed, restored_as
from ..adapters.keys import SIDES, Side, group_id
from ..adapters.safetensors import TensorReader
from ..adapters.scaling import Scaling
from ..adapters.stacks import ModuleBatch
from ..errors import AdapterError
from ..linalg.delta import (
    DeltaError,
    changed_errors,
    delta_errors,
    gram,
    grams,
    projected_errors,
    relative_error,
)
from ..linalg.types import Float64
from ..stages.components import Components, Part, Stack, components_at, loadings_on, projected, restored
from ..stages.job import Job
from .forms import Ints, Kept, Options, Rule, aimed, chosen, core_values, options, padded, reduced

_NARROWINGS = 4  # of the limit of an adapter, before all of it is kept verbatim


@dataclass(frozen=True)
class Formed:
    """An adapter as it is stored.

    Attributes:
        loadings: (k, r) by group, as they are stored.
        errors: of every module that is shared among adapters' bases, or could be.
        own: module -> lora_A and lora_B, as they are stored, of those with factors of their own.
        exact: modules that are kept verbatim though they could be shared.
        ranks: modules with another rank than they came with -> that rank.
    """

    loadings: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    errors: Mapping[str, DeltaError] = field(default_factory=dict)
    own: Mapping[str, Mapping[Side, NDArray[Any]]] = field(default_factory=dict)
    exact: Sequence[str] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)


def formed(job: Job, adapter: Adapter, tensors: TensorReader) -> Formed:
    """The modules of an adapter as the job wants them stored, with the errors of what is stored.

    An adapter whose dW is zero takes no part in bases, but is stored as others are if its dW is exactly zero then, as
    it is where A or B or the scale is; else, or if there are no bases for it, all of it is kept verbatim.
    """
    vanishes = not job.shares(job.admission_of[adapter.name])
    exact = Formed(exact=list(adapter.layout.by_name))
    needs_bases = job.rule is None or not job.rule.own
    if not adapter.layout.modules or (vanishes and needs_bases and not _has_bases(job, adapter)):
        return exact
    found = _all_shared(job, adapter, tensors) if job.rule is None else _by_rule(job, adapter, tensors, job.rule)
    return exact if vanishes and any(e.error > 0 for e in found.errors.values()) else found


def _has_bases(job: Job, adapter: Adapter) -> bool:
    components = components_at(job.components, job.basis_key, job.settings.memory, job.device)
    groups = [(group_id(m.name, side), m.dim(side)) for m in adapter.layout.modules for side in SIDES]
    return all(group in components and components.shape(group)[0] == d for group, d in groups)


def _all_shared(job: Job, adapter: Adapter, tensors: TensorReader) -> Formed:
    components = components_at(job.components, job.basis_key, job.settings.memory, job.device)
    loadings: dict[str, NDArray[Any]] = {}
    errors: dict[str, DeltaError] = {}
    for module_batch in adapter.module_batches:
        factors = module_batch.read(tensors)
        on: dict[Side, list[Part]] = {}
        for side, stack in factors.items():
            on[side] = projected(components, [group_id(m, side) for m in module_batch.names], stack, side, job.storage)
            for part in on[side]:
                loadings |= zip(part.groups, narrowed(part.loadings, job.storage), strict=True)
        found = _projection_errors(components, factors, on, adapter.scalings_of(module_batch.names), job.storage)
        errors |= dict(zip(module_batch.names, found, strict=True))
    return Formed(loadings, errors)


def _projection_errors(
    components: Components,
    factors: Mapping[Side, Stack],
    on: Mapping[Side, Sequence[Part]],
    scalings: Sequence[Scaling],
    storage: str,
) -> list[DeltaError]:
    """Errors of modules of one shape that are projected. What comes back is formed only where it must be.

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
    each = [grams(scalings[0], part.loadings.swapaxes(-1, -2), side) for part in parts]
    found = np.empty((len(scalings), *each[0].shape[1:]))
    for part, own in zip(parts, each, strict=True):
        found[part.places] = own
    return found


def _by_rule(job: Job, adapter: Adapter, tensors: TensorReader, rule: Rule) -> Formed:
    """Each module in the form that a rule chooses; where rounding takes an adapter over a limit, it is narrowed."""
    appraised = _appraised(job, adapter, tensors)
    given, wanted = appraised.given, rule
    if rule.limit is not None:
        wanted = replace(rule, limit=aimed(rule.limit, job.storage))
    for _ in range(_NARROWINGS):
        found = _stored(job, adapter, tensors, appraised, chosen(given, wanted))
        if rule.limit is None or wanted.limit is None:
            return found
        error = relative_error(sum(e.error for e in found.errors.values()), sum(e.norm for e in found.errors.values()))
        if error <= rule.limit:
            return found
        wanted = replace(wanted, limit=wanted.limit * 0.99 * rule.limit / error)
    exact = np.full(len(adapter.layout.modules), given.sizes.shape[-1] - 1)
    return _stored(job, adapter, tensors, appraised, exact)


@dataclass(frozen=True)
class _Appraised:
    """Of the modules of an adapter: the forms that are open, loadings (k, r) by group, and ||dW||^2 (m,)."""

    given: Options
    loadings: Mapping[str, Stack]
    norms: Float64


def _appraised(job: Job, adapter: Adapter, tensors: TensorReader) -> _Appraised:
    components = components_at(job.components, job.basis_key, job.settings.memory, job.device)
    loadings: dict[str, Stack] = {}
    own: dict[str, Float64] = {}
    core: dict[str, Float64] = {}
    k: dict[str, int] = {}
    for module_batch in adapter.module_batches:
        factors = module_batch.read(tensors)
        scalings = adapter.scalings_of(module_batch.names)
        for side, stack in factors.items():
            loadings |= loadings_on(components, [group_id(m, side) for m in module_batch.names], stack, side)
        own |= dict(zip(module_batch.names, own_values(factors, scalings), strict=True))
        for name, scaling in zip(module_batch.names, scalings, strict=True):
            both = [loadings.get(group_id(name, side)) for side in SIDES]
            k[name] = sum(0 if rows is None else len(rows) for rows in both)
            core[name] = np.zeros_like(own[name])
            if both[0] is not None and both[1] is not None:
                grams = [rows.T.astype(np.float64) @ rows for rows in both if rows is not None]
                core[name] = core_values(grams[0], grams[1], np.array(scaling.scale), scaling.experts)
    names = [m.name for m in adapter.layout.modules]
    most = max(len(values) for values in own.values())
    each, cores = (np.stack([padded(found[m], most) for m in names]) for found in (own, core))
    energy = float(each.sum())
    counts = np.array([k[m] for m in names])
    given = options(kept_of(adapter), each, cores, counts, job.storage, energy)
    return _Appraised(given, loadings, each.sum(axis=-1))


def own_values(factors: Mapping[Side, Stack], scalings: Sequence[Scaling]) -> Float64:
    """Squared singular values of s B A (m, r), of A (m, r, d_in) and B (m, d_out, r); E is the same in all."""
    grams = gram(factors["A"]), gram(np.swapaxes(factors["B"], -1, -2))
    return core_values(*grams, np.array([p.scale for p in scalings]), scalings[0].experts)


def kept_of(adapter: Adapter) -> Kept:
    """The modules of an adapter, as far as storing them goes."""
    modules = adapter.layout.modules
    return Kept(
        [m.name for m in modules],
        np.array([m.rank for m in modules]),
        np.array([m.dim("A") + m.dim("B") for m in modules]),
        np.array([m.a.nbytes + m.b.nbytes for m in modules]),
        np.array([not p.bound for p in adapter.scalings]),
    )


def _stored(job: Job, adapter: Adapter, tensors: TensorReader, appraised: _Appraised, columns: Ints) -> Formed:
    """Every module in the form of its column, rounded, and how far off it then is."""
    most = appraised.given.sizes.shape[-1] // 2
    column = {m.name: int(c) for m, c in zip(adapter.layout.modules, columns, strict=True)}
    exact = {m for m in column if column[m] == 2 * most}
    errors = {m.name: DeltaError(0.0, float(n)) for m, n in zip(adapter.layout.modules, appraised.norms, strict=True)}
    loadings: dict[str, NDArray[Any]] = {}
    own: dict[str, dict[Side, NDArray[Any]]] = {}
    ranks = {m.name: column[m.name] % most + 1 for m in adapter.layout.modules if m.name not in exact}
    ranks = {m: rank for m, rank in ranks.items() if rank != adapter.layout.by_name[m].rank}
    components = components_at(job.components, job.basis_key, job.settings.memory, job.device)
    for module_batch in adapter.module_batches:
        if exact.issuperset(module_batch.names):
            continue
        factors = module_batch.read(tensors)
        hats: dict[Side, Stack] = {side: np.zeros_like(stack) for side, stack in factors.items()}
        for i, module in enumerate(module_batch.names):
            if module in exact:
                continue
            alone, rank = column[module] >= most, ranks.get(module)
            pair = _factors(factors, i, appraised.loadings, module, alone=alone)
            if alone or rank is not None:
                rank = column[module] % most + 1
                pair = dict(zip(SIDES, reduced(pair["A"], pair["B"], adapter.scaling(module).scale, rank), strict=True))
            storage = alone_as(job.storage) if alone else job.storage
            stored = {side: as_stored(factor, storage) for side, factor in pair.items()}
            if alone:
                own[module] = {side: narrowed(_as_tensor(f, side), storage) for side, f in stored.items()}
            else:
                loadings |= {group_id(module, side): narrowed(f, storage) for side, f in stored.items()}
                scalings = {s: components[group_id(module, s)] @ f for s, f in stored.items()}
                stored = {s: as_stored(vectors, restored_as(storage)) for s, vectors in scalings.items()}
            hats["A"][i, : stored["A"].shape[1]] = stored["A"].T
            hats["B"][i, :, : stored["B"].shape[1]] = stored["B"]
        for side in SIDES:
            _demand_finite(hats[side], [group_id(m, side) for m in module_batch.names], job.storage)
        alike = {m for m in module_batch.names if column[m] < most and m not in ranks}
        errors |= {m: e for m, e in _errors_of(adapter, module_batch, factors, hats, alike).items() if m not in exact}
    return Formed(loadings, errors, own, [m for m in column if m in exact], ranks)


def _factors(
    factors: Mapping[Side, Stack], i: int, loadings: Mapping[str, Stack], module: str, *, alone: bool
) -> dict[Side, NDArray[Any]]:
    """The vectors (d, r) of a module's own, or its loadings (k, r), in float64."""
    if alone:
        return {"A": factors["A"][i].T.astype(np.float64), "B": factors["B"][i].astype(np.float64)}
    return {side: loadings[group_id(module, side)].astype(np.float64) for side in SIDES}


def _as_tensor(vectors: NDArray[np.float32], side: Side) -> NDArray[np.float32]:
    return np.ascontiguousarray(vectors.T if side == "A" else vectors)


def _errors_of(
    adapter: Adapter,
    module_batch: ModuleBatch,
    factors: Mapping[Side, Stack],
    hats: Mapping[Side, Stack],
    alike: set[str],
) -> dict[str, DeltaError]:
    """Errors of the modules of a batch, of which some are `alike`: factors that come near those before them."""
    found: dict[str, DeltaError] = {}
    for names, measure in ((alike, delta_errors), (set(module_batch.names) - alike, changed_errors)):
        at = [i for i, m in enumerate(module_batch.names) if m in names]
        if at:
            a, b, a_hat, b_hat = (stack[at] for stack in (factors["A"], factors["B"], hats["A"], hats["B"]))
            some = [module_batch.names[i] for i in at]
            found |= zip(some, measure(a, b, a_hat, b_hat, adapter.scalings_of(some)), strict=True)
    return found


def _demand_finite(hats: Stack, groups: Sequence[str], storage: str) -> None:
    """Demand that what is restored is finite, and with it what is stored."""
    if np.isfinite(hats.sum()):
        return
    for group, hat in zip(groups, hats, strict=True):
        if not np.isfinite(hat).all():
            raise AdapterError(f"values beyond the range of {storage}", key=group, remedy="Use dtype float32.")
