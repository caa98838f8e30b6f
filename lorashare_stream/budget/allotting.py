"""Allot: which bases, and which forms, meet a budget. Adapters are read once for it, whatever is tried after that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np

from ..adapters.dtypes import ITEMSIZE, stored_shape
from ..adapters.keys import SIDES, group_id
from ..adapters.safetensors import write_safetensors
from ..errors import AdapterError, BudgetError
from ..files import atomic_file, own_folder
from ..stages.bases import Bases, raw_components, shapes_of
from ..stages.job import Job
from ..stages.run import Run, check_none_lost
from ..stages.update import sum_and_fit
from ..text import bytes_shown, digest_of
from .allotment import at_many_prices, frontier, largest_within, smallest_with, told, touches
from .appraise import appraise_adapter, has_core, weigh_adapter
from .forms import Rule
from .offers import Allotted, Candidates, Spectra, Weigh, Weighed, uniform_bytes

Points = Sequence[tuple[int, float]]  # bytes of a checkpoint, rms relative dW error
FIRST = 64  # components with which the search for a limit on errors begins
_CONFIG, _GROUP, _NAME = 3700, 300, 12  # bytes of share_config.json, of a group in it beside names, and of an adapter
_SPARE = 400  # of a budget, one part is left for what was predicted too small
log = logging.getLogger(__name__)


def based(run: Run, job: Job, spare: int = 0) -> tuple[Job, Bases, Points]:
    """The job with the bases on which adapters are projected, and by what rule; the facts of these, by module; and what
    else was weighed under a budget.

    Args:
        run, job: all that is admitted.
        spare: bytes of a budget that are left unused, since what was predicted was too little by them.

    Raises:
        BudgetError: if a checkpoint cannot be as small as is asked.
    """
    s = job.settings
    if s.budget is not None:
        return _allotted(run, job, spare)
    bases = sum_and_fit(run, job)
    rule = Rule(price_of(bases, ITEMSIZE[job.storage]), own=False) if s.trim_rank else None
    return replace(job, rule=rule, basis_key=_digest(bases, rule)), bases, []


def byte_limit(job: Job) -> int | None:
    """The bytes that the checkpoint of a job may have, if there is a budget of bytes."""
    return job.settings.byte_limit(_originals(job))


def _originals(job: Job) -> int:
    return sum(sum(r.sizes) for r in job.journal.admissions)


def price_of(bases: Bases, item: int) -> float:
    """What the last component that a fixed k has bought gains a byte: ranks that gain less are not worth it."""
    sides = [facts[side] for facts in bases.values() for side in SIDES if side in facts]
    gained = sum(f["eigenvalues"][-1] for f in sides)
    return float(gained / max(1, item * sum(f["d"] + f["n"] for f in sides)))


def _digest(bases: Bases, rule: Rule | None) -> str:
    own = [[m, facts["digest"]] for m, facts in bases.items()]
    if rule is None:
        return digest_of(own)
    k = [[facts[side]["k"] for side in SIDES if side in facts] for facts in bases.values()]
    return digest_of([own, k, rule.price, rule.limit, rule.own])


def _allotted(run: Run, job: Job, spare: int) -> tuple[Job, Bases, Points]:
    limit = byte_limit(job)
    shapes = {m: shape for shapes in job.shapes.values() for m, shape in shapes.items()}
    dims = np.array([[shapes[m].d_in, shapes[m].d_out] for m in job.modules], np.int64).reshape(-1, 2)
    counts = np.array([job.counts.get(group_id(m, "A"), 0) for m in job.modules], np.int64)
    most = np.minimum(dims, counts[:, None])
    item, top = ITEMSIZE[job.storage], int(most.max(initial=1))
    even = (limit or 0) / max(1, item * int((dims + counts[:, None]).sum()))  # the k that all could have
    k = FIRST if limit is None else 1 << max(4, int(2 * even).bit_length())
    while True:
        k = min(k, top)
        wide, bases = _widened(run, job, k)
        spectra = _spectra(wide, bases, dims, counts, most)
        _appraise(run, wide, bases)
        found, least, points = _searched(run, wide, spectra, bases, limit, spare)
        short = limit is None and least > k and uniform_bytes(spectra, k) < found.total
        if k == top or not (short or touches(spectra, found)):
            break
        k *= 2
    log.info("%s: %s", job.settings.budget, told(found, len(job.journal.admissions)))
    rule = Rule(found.price, own=found.own) if limit is not None else Rule(limit=job.settings.max_error)
    cut = {m: _cut(facts, found.k[i].tolist()) for i, (m, facts) in enumerate(bases.items())}
    return replace(wide, settings=job.settings, rule=rule, basis_key=_digest(cut, rule)), cut, points


def _widened(run: Run, job: Job, k: int) -> tuple[Job, Bases]:
    """The job of fitting k components to every group, which it is then.

    Those of other k stay: which one a budget takes must not depend on what was asked before.
    """
    name = f"{job.bases.name}.{k}"
    cores = job.workspace / "cores" / name
    settings = replace(job.settings, num_components=k)
    wide = replace(job, settings=settings, bases=own_folder(job.bases.parent / name), cores=own_folder(cores))
    return wide, sum_and_fit(run, wide)


def _spectra(job: Job, bases: Bases, dims: Any, counts: Any, most: Any) -> Spectra:
    none = np.zeros(0)
    values = [
        tuple(np.array(bases[m][side]["eigenvalues"]) if side in bases[m] else none for side in SIDES)
        for m in job.modules
    ]
    stored = dims + stored_shape((0, 0), job.storage)[0]
    return Spectra(tuple(job.modules), [(a, b) for a, b in values], stored, counts, most, ITEMSIZE[job.storage])


def _appraise(run: Run, job: Job, bases: Bases) -> None:
    """Keep what every adapter is on wide bases; what is there stays."""
    entries = [job.adapter(r.name) for r in job.journal.admissions if job.shares(r)]
    there = [e.name for e in entries if e.layout.modules and job.core_file(e.name).exists()]
    whole = dict(zip(there, run.map("weigh", partial(has_core, job), there, len(there)), strict=True))
    todo = [e for e in entries if e.layout.modules and not whole.get(e.name)]
    if not todo:
        return
    assert job.cores is not None
    path = job.cores / "components.safetensors"
    with atomic_file(path) as f:
        shapes = [(group, job.storage, stored_shape(shape, job.storage)) for group, shape in shapes_of(bases).items()]
        write_safetensors(f, shapes, raw_components(job, bases))
    run.fetcher.cancel_except(todo)
    lost: list[AdapterError] = []
    arriving = run.arriving(todo, lost)
    for _ in run.map("appraise", partial(appraise_adapter, job), arriving, len(todo), run.release):
        pass
    check_none_lost(lost)
    path.unlink()


def _searched(
    run: Run, job: Job, spectra: Spectra, bases: Bases, limit: int | None, spare: int
) -> tuple[Allotted, int, Points]:
    """The best allotment; the least uniform k that meets a limit on errors; and errors against bytes, as weighed."""
    names, adapters = [r.name for r in job.journal.admissions], sum(job.shares(r) for r in job.journal.admissions)
    overhead, weigh = _overhead(names, bases), _weigher(run, job, spectra, names)
    if limit is None:  # what was weighed has the error of the limit: other errors are weighed to be shown
        freely = replace(job, settings=replace(job.settings, max_error=None))
        others = at_many_prices(spectra, _weigher(run, freely, spectra, names), overhead)
        return *smallest_with(spectra, weigh, overhead), frontier(others, adapters)
    found, tried = largest_within(spectra, weigh, limit - limit // _SPARE - spare, overhead)
    if found is None:
        extras = sum(job.adapter(name).layout.extra_bytes for name in names)
        nearest = int(1.01 * (min(a.total for a in tried) + spare)) + 1
        raise BudgetError(
            f"no checkpoint of these adapters is as small as {job.settings.budget} asks",
            found=f"{bytes_shown(limit)} asked for", remedy=_remedy(job, nearest),
            expected=f"about {bytes_shown(nearest)} or more, of which {bytes_shown(extras)} are not LoRA",
        )  # fmt: skip
    return found, 0, frontier(tried, adapters)


def _weigher(run: Run, job: Job, spectra: Spectra, names: list[str]) -> Weigh:
    """What weighs candidates, by the cores of a job."""

    def weigh(candidates: Candidates) -> Weighed:
        task = partial(weigh_adapter, job, spectra.modules, candidates)
        return reduce(add, run.map("weigh", task, names, len(names)))  # one by one: of thousands they are large

    return weigh


def _remedy(job: Job, size: int) -> str:
    ratio = _originals(job) / size * 0.999
    if job.settings.ratio is not None and ratio >= 1.01:
        return f"Use --ratio {ratio - 0.005:.2f} or less."
    return f"Use --max-bytes {size + 1} or more."


def _overhead(names: list[str], bases: Bases) -> int:
    """Bytes of what is neither components nor of one adapter: headers, configuration."""
    groups = [(m, facts[side]) for m, facts in bases.items() for side in SIDES if side in facts]
    of_groups = sum(3.5 * len(m) + _GROUP for m, _ in groups)
    return _CONFIG + int(of_groups) + sum(len(name) + _NAME for name in names)


def _cut(facts: Mapping[str, Any], k: list[int]) -> dict[str, Any]:
    """Facts of the first k components of A and of B."""
    cut = dict(facts)
    for side, count in zip(SIDES, k, strict=True):
        if side in facts:
            lost = sum(facts[side]["eigenvalues"][count:]) / facts[side]["energy"] if facts[side]["energy"] > 0 else 0.0
            explained = facts[side]["explained"] - lost if count else 0.0
            values = facts[side]["eigenvalues"][:count]
            cut[side] = {**facts[side], "k": count, "eigenvalues": values, "explained": explained}
    return cut
