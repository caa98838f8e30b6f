"""A sample of a plan's adapters, each read and coded once: rate curves, verbatim tensors, vectors of some modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.dtypes import ITEMSIZE, Array, Float64
from ..adapters.keys import Side
from ..adapters.safetensors import TensorReader, TensorRecord
from ..checkpoint.packs import GAIN, digest_of_tensor
from ..checkpoint.planes import BLOCK, encoded
from ..codec.code import Batch, Subject
from ..codec.pairs import Pairs
from ..codec.rate import Curve, Estimate, curve_of, estimated
from ..errors import AdapterError, BudgetError, CollectionError
from ..hub.fetch import fetching_for
from ..hub.lookup import source_of
from ..linalg.delta import relative_error
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
    """One adapter's vectors of one module: dW_e = ||dW|| sum_j strength_j b_j a_j' of each of E experts.

    Attributes:
        rows: by side, (E, r, d): singular vectors of dW under `delta`, else those of the factors.
        weights: (E, r) by which they count in the moments. strengths: (E, r).
    """

    rows: Mapping[Side, Array]
    weights: Float64
    strengths: Float64


class Kept(NamedTuple):
    """A verbatim tensor: which one it is, its digest, and the bytes that are stored."""

    kind: Kind
    digest: str
    stored: float


@dataclass(frozen=True)
class Probe:
    """One adapter of a sample, coded.

    Attributes:
        norm: ||dW||. size: bytes of its LoRA tensors.
        coded: whether dW is not zero, and a code within the limit, if there is one, is smaller than these tensors.
        code, error: bytes of that code, and its certified error; 0 without a limit on errors.
        curve: rate curve; None if dW is zero.
        kept: tensors that are not LoRA. exact: stored bytes of LoRA tensors that are kept exact.
        parts: of the modules whose vectors are asked for.
    """

    name: str
    norm: float
    size: int
    coded: bool
    code: int
    error: float
    curve: Curve | None
    kept: tuple[Kept, ...]
    exact: float
    parts: Mapping[str, Part]


@dataclass(frozen=True)
class Sample:
    """A coded sample.

    Attributes:
        adapters, probes: of the sample. problems: adapters of it that cannot be compressed.
        count, lora: adapters of the plan, and their LoRA bytes.
    """

    adapters: Sequence[Adapter]
    probes: Sequence[Probe]
    problems: tuple[AdapterError, ...]
    count: int
    lora: int

    def total(self, value: Callable[[Probe], float]) -> Estimate:
        """The sum over all adapters of a number of bytes, which none has more of than its LoRA tensors."""
        sizes = [probe.size for probe in self.probes]
        return estimated([min(value(p), p.size) for p in self.probes], sizes, self.lora)

    @property
    def coded_lora(self) -> float:
        """LoRA bytes of all adapters that are coded."""
        return self.total(lambda p: p.size * p.coded).value

    def codes_at(self, step: float) -> Estimate:
        """Bytes of all codes at a step."""
        return self.total(lambda p: p.curve.bytes_at(step) if p.curve else 0.0)

    def codes_within(self, error: float) -> Estimate:
        """Bytes of all codes where every adapter has one error."""
        return self.total(lambda p: p.curve.bytes_within(error) if p.curve else 0.0)

    def errors(self, step: float | None) -> list[float]:
        """Errors of the coded adapters of the sample: at a step, or within the limit if None."""
        return [p.curve.error_at(step) if step and p.curve else p.error for p in self.probes if p.coded]

    def mean_error(self, step: float | None) -> Estimate:
        """The mean of these errors over all adapters."""
        errors = self.errors(step)
        count = self.count * len(errors) / len(self.probes)
        total = estimated(errors, [1.0] * len(errors), count)
        return Estimate(total.value / max(1.0, count), total.margin / max(1.0, count))


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, all if they are fewer, at equal distances.

    >>> spread("abcdefgh", 3)
    ['b', 'e', 'g']
    """
    n = len(items)
    return list(items) if n <= count else [items[(2 * i + 1) * n // (2 * count)] for i in range(count)]


def sampled(
    adapters: Sequence[Adapter], count: int | None, fits: Callable[[list[Adapter]], bool] = lambda _: True
) -> list[Adapter]:
    """Adapters of a sample: `count`, or `SAMPLE` at most, of `NUMBERS` at most, that fit, but for `FEWEST`."""
    chosen = spread(adapters, SAMPLE if count is None else count)
    while count is None and len(chosen) > FEWEST:
        if sum(e.layout.lora_bytes for e in chosen) // 4 <= NUMBERS and fits(chosen):
            break
        chosen = spread(adapters, max(FEWEST, 3 * len(chosen) // 4))
    return chosen


@contextmanager
def mapping(plan: Plan) -> Iterator[Mapper]:
    """The map of a sample's tasks over processes of this machine."""
    with executor_for(None, coding_step(plan).concurrency) as workers, local_mapper(workers) as mapper:
        yield mapper


def coding_step(plan: Plan) -> Step:
    """The step of coding, whether or not the plan has one."""
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
    plan: Plan, chosen: list[Adapter], mapper: Mapper, progress: Progress, modules: Sequence[str] = ()
) -> Sample:
    """Read and code some of a plan's adapters, once, with their parts of some modules; those of the Hub are fetched.

    Raises:
        CollectionError: if none can be coded.
        BudgetError: if memory does not hold one of them while it is coded.
        UnreachableError: if the Hub does not answer.
    """
    step = coding_step(plan)
    check_memory(plan, step.least_bytes)
    look = partial(probe, plan.settings.max_error, plan.settings.objective, frozenset(modules))
    with at_hand(plan, chosen) as (here, lost):
        results = list(progress("code a sample", len(here), mapper.map(look, here, step.concurrency)))
    problems = (*lost, *(r for r in results if isinstance(r, AdapterError)))
    coded = [(e, r) for e, r in zip(here, results, strict=True) if isinstance(r, Probe)]
    if not coded:
        raise CollectionError(
            "nothing to foretell from", problems=problems, found="no adapter that can be coded", expected="one or more"
        )
    adapters, probes = zip(*coded, strict=True)
    return Sample(adapters, probes, problems, len(plan.adapters), plan.sizes["lora"])


def probe(limit: float | None, objective: str, modules: frozenset[str], adapter: Adapter) -> Probe | AdapterError:
    """An adapter, coded at some steps, and within a limit on its error if there is one; its parts of some modules."""
    found, layout = ingest_adapter("delta", adapter)[1], adapter.layout
    if isinstance(found, AdapterError):
        return found
    code, error = 0, 0.0
    with adapter.open() as tensors:
        subject = subject_of(adapter, tensors)
        coded = subject.norm > 0
        if coded and limit is not None:
            within = subject.within(limit)
            coded = within is not None and len(within.code) < layout.lora_bytes
            if within is not None and coded:
                squares = (sum(getattr(e, of) for e in within.errors.values()) for of in ("error", "norm"))
                code, error = len(within.code), relative_error(*squares)
        kept = tuple(_kept(tensors, key, record) for key, record in layout.extras)
        exactly = [] if coded else [record for m in layout.modules for record in (m.a, m.b)]
        exact = sum(_kept(tensors, "", record).stored for record in exactly)
        curve, parts = curve_of(subject), _parts(subject, objective, modules)
    return Probe(adapter.name, subject.norm, layout.lora_bytes, coded, code, error, curve, kept, exact, parts)


def _kept(tensors: TensorReader, key: str, record: TensorRecord) -> Kept:
    """A verbatim tensor, by its first block: what is larger than that is like it."""
    size, nbytes = ITEMSIZE[record.dtype], record.nbytes
    block = bytes(next(iter(tensors.chunks(record)), b""))[:BLOCK]
    share = min(1.0, sum(map(len, encoded([block], size))) / len(block)) if block else 1.0
    digest = digest_of_tensor(record.dtype, record.shape, [block])
    return Kept((key, record.dtype, record.shape), digest, nbytes * (share if share <= GAIN else 1.0))


def _parts(subject: Subject, objective: str, modules: frozenset[str]) -> dict[str, Part]:
    """An adapter's parts of some modules, of which it may lack some."""
    return {
        module.name: _part(batch, pairs, i, objective, subject.norm or 1.0)
        for batch, pairs in zip(subject.batches, subject.pairs, strict=True)
        for i, module in enumerate(batch.modules)
        if module.name in modules
    }


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
def at_hand(plan: Plan, chosen: list[Adapter]) -> Iterator[tuple[list[Adapter], tuple[AdapterError, ...]]]:
    """The adapters of a sample, on this machine until the end of the block; and those that cannot be had.

    What a plan does not read of adapters of the Hub is read of these: their configurations, and files, which go into
    the Hub's cache for `compress` to find them; under a disk budget into a folder that is removed, as many as it holds.
    """
    s = plan.settings
    while s.disk_budget is not None and sum(e.hub_bytes for e in chosen if not e.fetched) > s.disk_budget:
        chosen = spread(chosen, len(chosen) - 1)
    remote = [e for e in chosen if not e.fetched]
    if not remote:
        yield chosen, ()
        return
    sources = [source_of(e.source_id, e.name, e.origin.asked if e.origin else "") for e in remote]
    read = plan_for(sources, replace(s, base_model=plan.base_model or None, on_error="skip"))
    with TemporaryDirectory() as folder, fetching_for(s, Path(folder)) as fetcher:
        come = list(fetcher.arriving([e for e in read.adapters if e.layout.modules]))
        here = {e.source_id: e for e in [*come, *(e for e in chosen if e.fetched)] if isinstance(e, Adapter)}
        lost = (*read.refused, *(e for e in come if isinstance(e, AdapterError)))
        yield [here[e.source_id] for e in chosen if e.source_id in here], lost
        fetcher.release(here.values())
