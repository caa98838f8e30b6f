"""What a collection has to give, from a sample of it: before hours are spent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.copies import identical
from ..adapters.dtypes import ITEMSIZE
from ..errors import AdapterError, CollectionError
from ..hub.fetch import fetching
from ..hub.lookup import source_of
from ..machine import usable_cores
from ..pipeline import plan_for
from ..plan.plan import Plan
from ..runtime.executors import executor_for, local_mapper
from ..runtime.progress import Progress, silent
from ..stages.ingest import ingest_adapter
from ..workspace.journal import Admission
from .measurement import Subject, Totals, measured
from .outlook import Errors, Outlook, ladder, near_duplicates, recommended, with_common_initial
from .sample import chosen_modules, rows_in, sampled, spread
from .spectra import Spectrum, spectrum_of

LOUD = 20.0  # times the median of ||dW||, from which an adapter is named


@dataclass(frozen=True)
class Analysis:
    """What a sample says of a collection.

    Attributes:
        sample: names of the adapters that were measured. compressed: how many adapters there are to compress.
        modules, modules_in_all: how many modules were looked at, of how many.
        problems: adapters of the sample that cannot be compressed, by their values or otherwise.
        zero: those with dW = 0. loud: name -> ||dW|| by the median, where it is large.
        spectra: by side and kind.
        outlooks: by k, ascending.
        initial: groups of adapters of the sample whose lora_A began as the same matrix.
        duplicates: pairs of the sample with nearly the same dW: names, relative distance, cosine.
        identical: groups of adapters of the whole collection whose files are the same.
        recommended: what to do.
    """

    sample: tuple[str, ...]
    compressed: int
    modules: int
    modules_in_all: int
    problems: tuple[AdapterError, ...]
    zero: tuple[str, ...]
    loud: Mapping[str, float]
    spectra: tuple[Spectrum, ...]
    outlooks: tuple[Outlook, ...]
    initial: tuple[tuple[str, ...], ...]
    duplicates: tuple[tuple[str, str, float, float], ...]
    identical: tuple[tuple[str, ...], ...]
    recommended: str


def analyse(
    plan: Plan, sample: int | None = None, *, executor: Executor | None = None, progress: Progress = silent
) -> Analysis:
    """Measure a sample of the adapters of a plan. Adapters of the Hub are fetched for it.

    Args:
        plan: with the collection, and the settings. Its `memory` holds here too.
        sample: how many adapters; None for as many as are sensible.
        executor: does the tasks; processes of this machine if None. The result does not depend on it.
        progress: passes what is read and measured on as it comes.

    Raises:
        CollectionError: if there are not two adapters that can be measured.
        BudgetError: if memory does not hold one module of the sample.
        UnreachableError: if the Hub does not answer.
    """
    adapters = [e for e in plan.adapters if e.layout.modules]
    asked, at_once = sampled(adapters, sample), plan.settings.workers or usable_cores()
    with (
        executor_for(executor, at_once) as workers,
        local_mapper(workers) as mapper,
        at_hand(plan, asked) as (chosen, lost),
    ):
        results = list(progress("ingest", len(chosen), mapper.map(_ingested, chosen, at_once)))
        norms = {r.name: r.energy**0.5 for r in results if isinstance(r, Admission)}
        problems = (*lost, *(r for r in results if isinstance(r, AdapterError)))
        used = [e for e in chosen if norms.get(e.name, 0.0) > 0]
        if len(used) < 2:
            raise CollectionError(
                "nothing to analyse", problems=problems, found=len(used), expected="2 adapters with dW"
            )
        modules, in_all = chosen_modules(used)
        subjects = [Subject(i, e, norms[e.name]) for i, e in enumerate(used)]
        totals = measured(plan, subjects, modules, mapper, progress)
    names = [e.name for e in used]
    each = [norms[name] for name in names]
    middle = median(each)
    pairs = near_duplicates(totals.inner * np.outer(each, each))
    rest = rows_in(adapters, modules) - rows_in(asked, modules)
    share = rows_in(used, modules) / (rows_in(used, modules) + rest)  # what is wrong with some is not so with the rest
    outlooks = _outlooks(plan, totals, share)
    return Analysis(
        sample=tuple(names),
        compressed=len(adapters),
        modules=len(modules),
        modules_in_all=in_all,
        problems=problems,
        zero=tuple(name for name, norm in norms.items() if norm == 0),
        loud={name: norms[name] / middle for name in names if norms[name] > LOUD * middle},
        spectra=tuple(spectrum_of(*which, some, totals.ks) for which, some in sorted(totals.sides.items())),
        outlooks=outlooks,
        initial=tuple(tuple(names[i] for i in g) for g in with_common_initial(totals.parallel, totals.compared)),
        duplicates=tuple((names[i], names[j], d, c) for i, j, d, c in pairs),
        identical=identical(plan.adapters),
        recommended=recommended(outlooks),
    )


def _ingested(adapter: Adapter) -> Admission | AdapterError:
    """All values looked at, and ||dW||, which is of interest under `factors` too."""
    return ingest_adapter("delta", adapter)[1]


def _outlooks(plan: Plan, totals: Totals, share: float) -> tuple[Outlook, ...]:
    """What to expect of every k up to the first that saves nothing, and of the one that the settings ask for."""
    some = totals.norms > 0  # others have none of the modules that were looked at
    found, chance = (
        of.divided(totals.norms, some) for of in (totals.found, totals.chance)
    )  # fmt: skip
    dims, energies = zip(*totals.sizes, strict=True)
    errors = Errors(found, chance, totals.ks, share, np.array(dims, np.float64), np.array(energies))
    item, lora = ITEMSIZE[plan.storage], max(1, plan.sizes["lora"])
    asked, most = plan.settings.num_components, max(min(g.dim, g.count) for g in plan.groups)
    out: list[Outlook] = []
    for k in sorted({*ladder(most), *([min(asked, most)] if isinstance(asked, int) else [])}):
        cut = [(g, min(k, g.dim, g.count)) for g in plan.groups]
        size = item * sum(n * (g.dim + g.count) for g, n in cut)
        if size > lora and out and out[-1].bytes > lora and k != asked:
            continue
        low, expected, high, by_chance = errors.at(k)
        out.append(Outlook(k, size, lora / size, low, expected, high, by_chance))
    return tuple(out)


@contextmanager
def at_hand(plan: Plan, chosen: list[Adapter]) -> Iterator[tuple[list[Adapter], tuple[AdapterError, ...]]]:
    """The adapters of a sample, on this machine until the end of the block; and those that cannot be had.

    What a plan does not read of adapters of the Hub is read of these: their configurations, and files, which go into
    the Hub's cache for `compress` to find them; under a disk budget into a folder that is removed, as many as it holds.
    """
    s = plan.settings
    while s.disk_budget is not None and sum(e.hub_bytes for e in chosen) > s.disk_budget:
        chosen = spread(chosen, len(chosen) - 1)
    remote = [e for e in chosen if not e.fetched]
    if not remote:
        yield chosen, ()
        return
    sources = [source_of(e.source_id, e.name, e.origin.asked if e.origin else "") for e in remote]
    read = plan_for(sources, replace(s, base_model=plan.base_model or None, on_error="skip"))
    with ExitStack() as stack:
        folder = None if s.disk_budget is None else Path(stack.enter_context(TemporaryDirectory()))
        fetcher = stack.enter_context(fetching(s.offline, folder, s.disk_budget))
        come = list(fetcher.arriving([e for e in read.adapters if e.layout.modules]))
        here = {e.source_id: e for e in [*come, *(e for e in chosen if e.fetched)] if isinstance(e, Adapter)}
        lost = (*read.refused, *(e for e in come if isinstance(e, AdapterError)))
        yield [here[e.source_id] for e in chosen if e.source_id in here], lost
        fetcher.release(here.values())
