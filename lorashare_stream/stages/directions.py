"""Choice of directions for a coded checkpoint, from the bases fitted to the moments of its adapters.

Of each group the first k components are taken that make the codes of a sample the shortest, those of k itself counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.dtypes import Array, Float64, widened
from ..adapters.folder import digest_files, open_tensors, tensor_records
from ..adapters.keys import Side, group_id, split_group_id
from ..checkpoint.format import SHARED
from ..codec.code import likely_step
from ..codec.directions import ALONE, Basis, Directions, Shared, as_bytes
from ..codec.quantiser import LAMBDA
from ..codec.rate import side_bits
from ..errors import AdapterError
from ..files import atomic_file, read_sealed, write_sealed
from ..plan.plan import NUMBER_BITS
from ..settings import DIRECTIONS
from ..text import counted
from ..workspace.journal import Journal
from ..workspace.records import read_record
from ..workspace.workspace import Workspace
from .encode import directions_at, subject_of
from .fit import basis_key_of, groups_of
from .job import Job
from .run import Run, check_none_lost, sample_of
from .status import BasisOfSide, BasisRecord
from .update import sum_and_fit

T = TypeVar("T")
KS = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, DIRECTIONS)  # how many are tried
DIRECTION_BITS = 16  # of a direction beside its numbers
TYPICAL = 0.25  # a dW error by which is chosen if a limit on bytes is set
log = logging.getLogger(__name__)
Costs = Mapping[str, Float64]  # of a group with each number of directions, bits


def fitted(run: Run, job: Job, work: Workspace) -> bytes:
    """Fit directions of all groups, serialized as in a checkpoint; none where they do not pay.

    They are kept in the workspace, beside the bases: a run that was killed goes on with the same.
    """
    bases = sum_and_fit(run, job, work)
    file, facts = job.bases / SHARED, job.bases / f"{SHARED}.json"
    of = basis_key_of(bases)
    known = read_sealed(facts)
    if known.get("of") == of and file.exists() and digest_files([file]) == known["digest"]:
        return file.read_bytes()
    some = sample_of([job.adapter(r.name) for r in job.journal.admissions if job.shares(r)])
    groups = groups_of(bases)
    chosen = _chosen(job, groups, _costs(run, job, some))
    with atomic_file(file) as f:
        f.write(as_bytes({g: _basis(groups[g], _components(job, g), k) for g, k in sorted(chosen.items()) if k}))
    if not _pay(run, replace(job, directions=file), some):
        with atomic_file(file) as f:
            f.write(as_bytes(ALONE))
    write_sealed(facts, {"of": of, "digest": digest_files([file])})
    return file.read_bytes()


def _tried(run: Run, job: Job, some: Sequence[Adapter], task: Callable[[Job, Adapter], T]) -> Iterator[T]:
    """Map a task over a sample of adapters."""
    lost: list[AdapterError] = []
    bare = partial(task, replace(job, adapters={}, journal=Journal()))
    yield from run.map("rate", bare, run.arriving(some, lost), len(some), run.release)
    check_none_lost(lost)


def _costs(run: Run, job: Job, some: Sequence[Adapter]) -> Costs:
    """Mean cost in bits over a sample of adapters, by group."""
    total: dict[str, Float64] = {}
    counts: Counter[str] = Counter()
    for found in _tried(run, job, some, costs_of):
        counts.update(found.keys())
        total |= {group: total.get(group, 0.0) + costs for group, costs in found.items()}
    return {group: costs / counts[group] for group, costs in total.items()}


def _pay(run: Run, job: Job, some: Sequence[Adapter]) -> bool:
    """Whether directions save more bytes of the codes of a sample than they take; logs the saving."""
    assert job.directions is not None
    alone, on = np.sum([*_tried(run, job, some, lengths_of)], axis=0) if some else (0, 0)
    own = job.directions.stat().st_size * len(some) / len(job.journal.admissions)
    pay = bool(on + own < alone)
    log.info(
        "directions: the codes of %s are %.3g %% %s on them, their own bytes counted%s",
        counted(len(some), "adapter"), 100 * abs(alone - on - own) / max(1, alone),
        "smaller" if pay else "larger", "" if pay else ": none are used",
    )  # fmt: skip
    return pay


def lengths_of(job: Job, adapter: Adapter) -> tuple[int, int]:
    """Code length in bytes of one adapter without and with directions."""
    alone, on = (_code_of(job, adapter, shared) for shared in (ALONE, directions_at(job.directions)))
    return alone, on


def _code_of(job: Job, adapter: Adapter, shared: Shared) -> int:
    """Code length in bytes; the bytes of its tensors if an adapter is kept verbatim."""
    with adapter.open() as tensors:
        code = subject_of(adapter, tensors, shared).within(job.settings.max_error or TYPICAL)
    return adapter.layout.lora_bytes if code is None else len(code.code)


def costs_of(job: Job, adapter: Adapter) -> dict[str, Float64]:
    """Rate-distortion cost of one adapter in bits, by group, for each number of directions."""
    with adapter.open() as tensors:
        subject = subject_of(adapter, tensors)
    step = likely_step(subject.pairs, subject.norm, job.settings.max_error or TYPICAL)
    found: dict[str, Float64] = {}
    for batch, pairs in zip(subject.batches, subject.pairs, strict=True):
        weights = (pairs.values / subject.norm).astype(np.float32)[..., None]
        modules = [m.name for m in batch.modules for _ in range(m.experts)]
        sides: tuple[tuple[Side, Array], ...] = (("B", pairs.left * weights), ("A", pairs.right * weights))
        for side, rows in sides:
            each = _costs_of_side(job, modules, side, rows, step)
            for module, costs in zip(modules, each.T, strict=True):
                group = group_id(module, side)
                found[group] = found.get(group, 0.0) + costs
    return found


def _costs_of_side(job: Job, modules: Sequence[str], side: Side, rows: Array, step: float) -> Float64:
    """Rate-distortion cost (len(KS), n) in bits of one side of n modules."""
    groups = [group_id(module, side) for module in modules]
    records = [read_record(BasisRecord, job.facts_file(module)) for module in modules]
    bases = {group: basis for record in records if record is not None for group, basis in record.groups.items()}
    components = {group: _components(job, group) for group in groups}
    costs = []
    for k in KS:
        shared = {group: _basis(bases[group], components[group], k) for group in groups} if k else ALONE
        on = Directions.of(shared, groups, rows.shape[-1])
        found = on.quantised(rows, step)
        off = np.square(rows / np.float32(step) - on.sums(found)).sum(axis=(-2, -1))
        costs.append(side_bits(found, on) + off / LAMBDA)
    return np.stack(costs)


def _components(job: Job, group: str) -> Array:
    """Components (d, k) of a group."""
    module, side = split_group_id(group)
    path = (job.basis_file(module),)
    record = next(r for r in tensor_records(path) if r.name == side)
    with open_tensors(path) as reader:
        return widened(reader.raw(record), record.dtype, record.shape)


def _basis(basis: BasisOfSide, components: Array, k: int) -> Basis:
    """The first k components of a group as directions."""
    return Basis.of(components, basis.eigenvalues[:k], basis.energy)


def _chosen(job: Job, bases: Mapping[str, BasisOfSide], costs: Costs) -> dict[str, int]:
    """Number of directions of each group that makes the total cost least."""
    uses = Counter(m for r in job.journal.admissions if job.shares(r) for m in job.shapes[r.shapes])
    ks = np.array(KS)
    found = {}
    for group, each in costs.items():
        own = ks * (NUMBER_BITS * bases[group].d + DIRECTION_BITS)
        found[group] = int(ks[np.argmin(uses[split_group_id(group)[0]] * each + own)])
    return found
