"""A sample of a plan's adapters, each read once: its rate curve, what is verbatim, vectors of some modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.dtypes import ITEMSIZE
from ..adapters.keys import Side
from ..adapters.safetensors import TensorReader, TensorRecord
from ..checkpoint.packs import GAIN, digest_of_tensor
from ..checkpoint.planes import BLOCK, encoded
from ..codec.code import Batch, Subject
from ..codec.gauge import Pairs
from ..codec.rate import Curve, Estimate, curve_of, estimated
from ..errors import AdapterError, BudgetError, CollectionError
from ..hub.fetch import fetching
from ..hub.lookup import source_of
from ..linalg.delta import relative_error
from ..linalg.types import Array, Float64
from ..pipeline import plan_for
from ..plan.memory import SAMPLE, Step
from ..plan.plan import Plan
from ..runtime.executors import Mapper, executor_for, local_mapper
from ..runtime.progress import Progress
from ..stages.encode import subject_of
from ..stages.ingest import ingest_adapter
from ..text import bytes_shown

T = TypeVar("T")
FEWEST = 8  # adapters of a sample, however large they are
NUMBERS = 100_000_000  # of a sample: about half a minute on two cores
Kind = tuple[str, str, tuple[int, ...]]  # key, dtype and shape of a tensor that is not LoRA


@dataclass(frozen=True)
class Part:
    """What one adapter brings to one module: dW_e = ||dW|| sum_j strength_j b_j a_j' of each expert.

    Attributes:
        rows: by side, (E, r, d): singular vectors of dW under `delta`, else those of the factors.
        weights: (E, r) by which they count in the moments. strengths: (E, r).
    """

    rows: Mapping[Side, Array]
    weights: Float64
    strengths: Float64


class Kept(NamedTuple):
    """A verbatim tensor of a sample: which one it is, a digest, and the bytes that are stored."""

    kind: Kind
    digest: str
    stored: float


@dataclass(frozen=True)
class Probe:
    """One adapter of a sample, coded.

    Attributes:
        norm: ||dW||.
        code: bytes within the limit on its error, if that is what is asked for; else 0.
        error: certified of these.
        curve: None if its dW is zero, or nothing of it can be coded.
        kept: tensors that are not LoRA. lora: bytes of LoRA tensors that are kept exact, as they are stored.
        coded: whether it is: dW is not zero, and there is a code within the limit that is smaller than its tensors.
        parts: of the modules whose vectors are asked for.
    """

    name: str
    norm: float
    code: int
    error: float
    curve: Curve | None
    kept: tuple[Kept, ...]
    lora: float
    coded: bool
    parts: Mapping[str, Part]


@dataclass(frozen=True)
class Sample:
    """A sample, coded.

    Attributes:
        adapters, probes: of the sample. problems: adapters of it that cannot be compressed.
        count, lora: adapters of the plan, and their LoRA bytes.
    """

    adapters: Sequence[Adapter]
    probes: Sequence[Probe]
    problems: tuple[AdapterError, ...]
    count: int
    lora: int

    @property
    def coded_lora(self) -> float:
        """LoRA bytes of all adapters that are coded, from those of the sample."""
        return self.codes(e.layout.lora_bytes * p.coded for e, p in zip(self.adapters, self.probes, strict=True)).value

    def codes(self, values: Iterable[float]) -> Estimate:
        """Bytes of all codes, from those of the sample."""
        sizes = [e.layout.lora_bytes for e in self.adapters]
        return estimated([min(v, size) for v, size in zip(values, sizes, strict=True)], sizes, self.lora)

    def codes_at(self, step: float) -> Estimate:
        """The same at a step."""
        return self.codes(p.curve.bytes_at(step) if p.curve else 0.0 for p in self.probes)

    def codes_within(self, error: float) -> Estimate:
        """The same where every adapter has one error."""
        return self.codes(p.curve.bytes_within(error) if p.curve else 0.0 for p in self.probes)

    def errors_at(self, step: float | None) -> list[float]:
        """Errors of those that are coded, at a step or within the limit."""
        coded = [p for p in self.probes if p.coded]
        return [p.error if step is None else p.curve.error_at(step) if p.curve else 0.0 for p in coded]

    def mean_error(self, step: float | None) -> Estimate:
        """The mean of these over all adapters."""
        errors = self.errors_at(step)
        count = self.count * len(errors) / len(self.probes)
        total = estimated(errors, [1.0] * len(errors), count)
        return Estimate(total.value / max(1.0, count), total.margin / max(1.0, count))


def spread(items: Sequence[T], count: int) -> list[T]:
    """So many of the items, all if they are fewer, at equal distances over all.

    >>> spread("abcdefgh", 3)
    ['b', 'e', 'g']
    """
    n = len(items)
    return list(items) if n <= count else [items[(2 * i + 1) * n // (2 * count)] for i in range(count)]


def sampled(
    adapters: Sequence[Adapter], count: int | None, fits: Callable[[list[Adapter]], bool] = lambda _: True
) -> list[Adapter]:
    """The adapters of a sample: `count`, or `SAMPLE` at most, of `NUMBERS` at most, that fit, but for `FEWEST`."""
    if count is not None:
        return spread(adapters, count)
    chosen = spread(adapters, SAMPLE)
    while len(chosen) > FEWEST and not (_numbers(chosen) <= NUMBERS and fits(chosen)):
        chosen = spread(adapters, max(FEWEST, 3 * len(chosen) // 4))
    return chosen


def _numbers(adapters: Iterable[Adapter]) -> int:
    return sum(m.bytes for e in adapters for m in e.layout.modules) // 4


@contextmanager
def mapping(plan: Plan, executor: Executor | None) -> Iterator[Mapper]:
    """What maps the tasks of a sample: over an executor, or processes of this machine; the result does not depend."""
    with executor_for(executor, coding_step(plan).concurrency) as workers, local_mapper(workers) as mapper:
        yield mapper


def coding_step(plan: Plan) -> Step:
    """What coding takes, whether or not that is what the plan is to do."""
    s = plan.settings
    coded = replace(s, directions=False) if s.limit else replace(s, objective="delta", center=False, max_error=0.25)
    return replace(plan, settings=coded).step("encode")


def check_memory(plan: Plan, least: int) -> None:
    """Demand memory for a sample; raises BudgetError."""
    if least > plan.settings.memory:
        raise BudgetError(
            "the memory budget cannot hold what is looked at together", found=bytes_shown(plan.settings.memory),
            expected=f"at least {bytes_shown(least)}",
            remedy=f"Use --memory {-(-least >> 20) + 1}MiB or more, or fewer adapters by --sample.",
        )  # fmt: skip


def sample_of(
    plan: Plan,
    chosen: list[Adapter],
    mapper: Mapper,
    progress: Progress,
    *,
    fetches: bool,
    modules: Sequence[str] = (),
) -> Sample:
    """Read and code some of a plan's adapters, once.

    Args:
        plan: of the collection. chosen: the adapters of it.
        mapper: of `mapping`. progress: passes what is coded on as it comes.
        fetches: whether adapters of the Hub are fetched; else the chosen are here.
        modules: whose vectors are wanted too.

    Raises:
        CollectionError: if none can be coded.
        BudgetError: if memory does not hold one of them while it is coded.
        UnreachableError: if the Hub does not answer.
    """
    step = coding_step(plan)
    check_memory(plan, step.least_bytes)
    look = partial(probe, plan.settings.max_error, plan.settings.objective, frozenset(modules))
    with at_hand(plan, chosen, fetches=fetches) as (here, lost):
        results = list(progress("code a sample", len(here), mapper.map(look, here, step.concurrency)))
    problems = (*lost, *(r for r in results if isinstance(r, AdapterError)))
    probes = {r.name: r for r in results if isinstance(r, Probe)}
    if not probes:
        raise CollectionError(
            "nothing to foretell from", problems=problems, found="no adapter that can be coded", expected="one or more"
        )
    some = [e for e in here if e.name in probes]
    return Sample(some, [probes[e.name] for e in some], problems, len(plan.adapters), plan.sizes["lora"])


def probe(limit: float | None, objective: str, modules: frozenset[str], adapter: Adapter) -> Probe | AdapterError:
    """An adapter, coded within a limit on its error, if there is one, and at some steps; parts of some modules."""
    found = ingest_adapter("delta", adapter)[1]
    if isinstance(found, AdapterError):
        return found
    with adapter.open() as tensors:
        subject = subject_of(adapter, tensors)
        within = subject.within(limit) if limit is not None and subject.norm else None
        smaller = limit is None or (within is not None and len(within.code) < adapter.layout.lora_bytes)
        coded = smaller and subject.norm > 0
        exactly = [] if coded else [r for m in adapter.layout.modules for r in (m.a, m.b)]
        kept = tuple(_kept(tensors, key, record) for key, record in adapter.layout.extras)
        lora = sum(_kept(tensors, "", record).stored for record in exactly)
        curve, parts, code, error = curve_of(subject), _parts(subject, objective, modules), 0, 0.0
    if within is not None and coded:
        squares = (sum(getattr(e, of) for e in within.errors.values()) for of in ("error", "norm"))
        code, error = len(within.code), relative_error(*squares)
    return Probe(adapter.name, subject.norm, code, error, curve, kept, lora, coded, parts)


def _kept(tensors: TensorReader, key: str, record: TensorRecord) -> Kept:
    """A verbatim tensor, by its first block: what is larger than that is like it."""
    size, nbytes = ITEMSIZE[record.dtype], record.nbytes
    block = bytes(next(iter(tensors.chunks(record)), b""))[:BLOCK]
    share = min(1.0, sum(map(len, encoded([block], size))) / len(block)) if block else 1.0
    digest = digest_of_tensor(record.dtype, record.shape, [block])
    return Kept((key, record.dtype, record.shape), digest, nbytes * (share if share <= GAIN else 1.0))


def _parts(subject: Subject, objective: str, modules: frozenset[str]) -> dict[str, Part]:
    """What an adapter brings to some modules, of which it may lack some."""
    found = {}
    for batch, pairs in zip(subject.batches, subject.pairs, strict=True):
        for i, module in enumerate(batch.modules):
            if module.name in modules:
                found[module.name] = _part(batch, pairs, i, objective, subject.norm or 1.0)
    return found


def _part(batch: Batch, pairs: Pairs, i: int, objective: str, norm: float) -> Part:
    scaling = batch.scalings[i]
    own = slice(i * scaling.experts, (i + 1) * scaling.experts)
    if objective == "delta":
        strengths = pairs.values[own] / norm
        return Part({"A": pairs.right[own].copy(), "B": pairs.left[own].copy()}, strengths, strengths)
    both: dict[Side, Array] = {"A": batch.a[i], "B": batch.b[i].T}
    rows = {side: scaling.blocks(values, side).copy() for side, values in both.items()}  # files are unmapped
    ones = np.ones(rows["A"].shape[:-1])
    return Part(rows, ones, scaling.scale / norm * ones)


@contextmanager
def at_hand(
    plan: Plan, chosen: list[Adapter], *, fetches: bool = True
) -> Iterator[tuple[list[Adapter], tuple[AdapterError, ...]]]:
    """The adapters of a sample, on this machine until the end of the block; and those that cannot be had.

    What a plan does not read of adapters of the Hub is read of these: their configurations, and files, which go into
    the Hub's cache for `compress` to find them; under a disk budget into a folder that is removed, as many as it holds.
    """
    s = plan.settings
    while fetches and s.disk_budget is not None and sum(e.hub_bytes for e in chosen) > s.disk_budget:
        chosen = spread(chosen, len(chosen) - 1)
    remote = [e for e in chosen if not e.fetched]
    if not remote or not fetches:
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
