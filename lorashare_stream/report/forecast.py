"""What a coded checkpoint will take, and how far off it will be, foretold from a sample that is coded."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.config import rank_and_alpha
from ..adapters.dtypes import ITEMSIZE
from ..adapters.safetensors import TensorReader, TensorRecord, tensor_records_of
from ..checkpoint.coded import VERSION
from ..checkpoint.config import config_bytes
from ..checkpoint.index import PLANES, CodedAdapter, Index, Location, Pack, StoredTensor, index_bytes
from ..checkpoint.packs import ADAPTERS_MOST, GAIN, VERBATIM_PART, digest_of_tensor
from ..checkpoint.planes import BLOCK, encoded
from ..checkpoint.summary import CheckpointRecord, Statistics, share_config
from ..codec.rate import Curve, Estimate, curve_of, estimated, step_for
from ..errors import AdapterError, CollectionError, skipped_as_json
from ..files import json_bytes
from ..linalg.delta import relative_error
from ..plan.memory import SAMPLE
from ..plan.plan import Plan
from ..runtime.executors import executor_for, local_mapper
from ..runtime.progress import Progress, silent
from ..stages.coding import ENOUGH
from ..stages.encode import subject_of
from ..stages.ingest import ingest_adapter
from .analysis import at_hand
from .sample import spread

ERRORS = (0.02, 0.05, 0.1, 0.25, 0.4, 0.6)  # of the curve
FEWEST = 8  # adapters of a sample, however large they are
NUMBERS = 100_000_000  # of a sample: about half a minute on two cores
_INDEXED = 1024  # adapters of the index that is made to see how large it will be
_PLANES = 0.85  # of its bytes, what a tensor may take of whose kind none is in the sample
_NONE_SEEN = (
    3.0  # over n: the share, at 95 %, that adapters with copies of a tensor may have if a sample of n shows none
)
_UNKNOWN = 0.1  # of the index: what is not known of it is the digests and lengths in it


Kind = tuple[str, str, tuple[int, ...]]  # key, dtype and shape of a tensor that is not LoRA


@dataclass(frozen=True)
class Kept:
    """A verbatim tensor of a sample: which one it is, a digest, and the bytes that are stored."""

    kind: Kind
    digest: str
    stored: float


@dataclass(frozen=True)
class Probe:
    """One adapter of a sample, coded.

    Attributes:
        code: bytes within the limit on its error, if that is what is asked for; else 0.
        error: certified of these.
        curve: None if its dW is zero, or nothing of it can be coded.
        kept: tensors that are not LoRA. lora: bytes of LoRA tensors that are kept exact, as they are stored.
        coded: whether it is. exact: whether it is not, since no code within the limit is smaller than its tensors.
    """

    name: str
    code: int
    error: float
    curve: Curve | None
    kept: tuple[Kept, ...]
    lora: float
    coded: bool
    exact: bool


@dataclass(frozen=True)
class Point:
    """A checkpoint whose adapters all have one error: bytes of codes, and of all; times smaller, all files and LoRA."""

    error: float
    codes: float
    total: float
    times: float
    lora_times: float


@dataclass(frozen=True)
class Forecast:
    """What is foretold of a coded checkpoint.

    Attributes:
        sample: adapters that were coded. adapters: of the plan. unfetched: those of the Hub that were no candidates.
        exact: of the sample, those that no code within the limit makes smaller; they are kept exact.
        problems: adapters of the sample that cannot be compressed.
        total: bytes of all files; codes, verbatim and metadata are its parts. Margins are half 95 % intervals.
        error: mean relative dW error. worst: the largest of the sample.
        step: of the quantiser, where a limit on bytes decides, which is `wanted`.
        times, lora_times: how many times smaller than the originals: all files, and the codes than the LoRA tensors.
        curve: of other errors.
    """

    sample: int
    adapters: int
    unfetched: int
    exact: int
    problems: tuple[dict[str, Any], ...]
    total: Estimate
    codes: Estimate
    verbatim: Estimate
    metadata: int
    error: Estimate
    worst: float
    step: float | None
    wanted: int | None
    times: float
    lora_times: float
    curve: tuple[Point, ...]


def forecast_of(
    plan: Plan,
    sample: int | None = None,
    *,
    fetches: bool = False,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> Forecast:
    """Code a sample of a plan's adapters, evenly spaced, and estimate the whole by its ratios to bytes that are known.

    Args:
        plan: with a limit.
        sample: how many adapters; None for `SAMPLE`, fewer if they are large.
        fetches: whether adapters of the Hub are fetched for it; else those that are here are candidates.
        executor: does the tasks; processes of this machine if None. The result does not depend on it.
        progress: passes what is coded on as it comes.

    Raises:
        CollectionError: if there is no adapter that can be coded.
        UnreachableError: if the Hub does not answer.
    """
    candidates = [e for e in plan.adapters if fetches or e.fetched]
    chosen, at_once = _chosen(candidates, sample), plan.step("encode").concurrency
    with (
        executor_for(executor, at_once) as workers,
        local_mapper(workers) as mapper,
        _here(plan, chosen, fetches=fetches) as (here, lost),
    ):
        tasks = mapper.map(partial(probe, plan.settings.max_error), here, at_once)
        results = list(progress("code a sample", len(here), tasks))
    problems = (*lost, *(r for r in results if isinstance(r, AdapterError)))
    probes = {r.name: r for r in results if isinstance(r, Probe)}
    if not probes:
        raise CollectionError(
            "nothing to foretell from", problems=problems, found="no adapter that can be coded", expected="one or more"
        )
    some = [e for e in here if e.name in probes]
    found = _Sample(some, [probes[e.name] for e in some], len(plan.adapters), plan.sizes["lora"])
    return _forecast(plan, found, len(plan.adapters) - len(candidates), problems)


def _chosen(adapters: Sequence[Adapter], count: int | None) -> list[Adapter]:
    """The adapters of a sample: as many as asked for, or `SAMPLE` at most, with `NUMBERS` at most."""
    if count is not None:
        return spread(adapters, count)
    chosen = spread(adapters, SAMPLE)
    while len(chosen) > FEWEST and sum(m.bytes for e in chosen for m in e.layout.modules) > 4 * NUMBERS:
        chosen = spread(adapters, max(FEWEST, 3 * len(chosen) // 4))
    return chosen


@contextmanager
def _here(
    plan: Plan, chosen: list[Adapter], *, fetches: bool
) -> Iterator[tuple[list[Adapter], tuple[AdapterError, ...]]]:
    if not fetches:
        yield chosen, ()
        return
    with at_hand(plan, chosen) as found:
        yield found


def probe(limit: float | None, adapter: Adapter) -> Probe | AdapterError:
    """An adapter, coded within a limit on its error, if there is one, and at some steps."""
    found = ingest_adapter("delta", adapter)[1]
    if isinstance(found, AdapterError):
        return found
    with adapter.open() as tensors:
        subject = subject_of(adapter, tensors)
        coded = subject.within(limit) if limit is not None and subject.norm else None
        smaller = limit is None or (coded is not None and len(coded.code) < adapter.layout.lora_bytes)
        names = {m.name for m in subject.modules} if subject.norm and smaller else set()
        exactly = [r for m in adapter.layout.modules if m.name not in names for r in (m.a, m.b)]
        kept = tuple(_kept(tensors, key, record) for key, record in adapter.layout.extras)
        lora = sum(_kept(tensors, "", record).stored for record in exactly)
        curve = curve_of(subject)
    is_coded, exact = bool(names), bool(subject.norm) and not smaller
    if coded is None or exact:
        return Probe(adapter.name, 0, 0.0, curve, kept, lora, is_coded, exact)
    error = relative_error(*(sum(getattr(e, part) for e in coded.errors.values()) for part in ("error", "norm")))
    return Probe(adapter.name, len(coded.code), error, curve, kept, lora, is_coded, exact)


def _kept(tensors: TensorReader, key: str, record: TensorRecord) -> Kept:
    """A verbatim tensor, by its first block: what is larger than that is like it."""
    size, nbytes = ITEMSIZE[record.dtype], record.nbytes
    block = bytes(next(iter(tensors.chunks(record)), b""))[:BLOCK]
    share = min(1.0, sum(map(len, encoded([block], size))) / len(block)) if block else 1.0
    digest = digest_of_tensor(record.dtype, record.shape, [block])
    return Kept((key, record.dtype, record.shape), digest, nbytes * (share if share <= GAIN else 1.0))


@dataclass(frozen=True)
class _Sample:
    """A sample, coded, of `count` adapters with `lora` LoRA bytes."""

    adapters: Sequence[Adapter]
    probes: Sequence[Probe]
    count: int
    lora: int

    def codes(self, values: Iterable[float]) -> Estimate:
        """Bytes of all codes, from those of the sample."""
        sizes = [e.layout.lora_bytes for e in self.adapters]
        return estimated([min(v, size) for v, size in zip(values, sizes, strict=True)], sizes, self.lora)

    def codes_at(self, step: float) -> Estimate:
        """The same at a step."""
        return self.codes(p.curve.bytes_at(step) if p.curve else 0.0 for p in self.probes)

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


def _forecast(plan: Plan, s: _Sample, away: int, problems: Sequence[AdapterError]) -> Forecast:
    verbatim, common = _verbatim(plan, s)
    limit, originals, step = plan.settings.byte_limit(plan.sizes["originals"]), plan.sizes["originals"], None
    if limit is None:
        codes, error = s.codes(p.code for p in s.probes), s.mean_error(None)
    else:
        room = max(1.0, limit - verbatim.value - _metadata(plan, s, s.codes_at(1.0).value, common=common))
        step = step_for(lambda at: s.codes_at(at).value, room)
        codes, mean = s.codes_at(step), s.mean_error(step)
        unused = math.hypot(codes.margin, (1 - ENOUGH) * limit)  # that much of the limit may be left
        ends = [step_for(lambda at: s.codes_at(at).value, max(1.0, room + side * unused)) for side in (-1, 1)]
        unsure = abs(s.mean_error(ends[0]).value - s.mean_error(ends[1]).value) / 2  # the step may be another
        error, codes = Estimate(mean.value, math.hypot(mean.margin, unsure)), Estimate(codes.value, 0.0)
    metadata = _metadata(plan, s, codes.value, common=common)
    margin = codes.margin + math.hypot(verbatim.margin, _UNKNOWN * metadata)
    total = Estimate(codes.value + verbatim.value + metadata, margin)

    def point(error: float) -> Point:
        size = s.codes(p.curve.bytes_within(error) if p.curve else 0.0 for p in s.probes).value
        both = size + verbatim.value + metadata
        return Point(error, size, both, originals / both, s.lora / max(1.0, size))

    return Forecast(
        len(s.probes), s.count, away, sum(p.exact for p in s.probes), tuple(skipped_as_json(problems)), total, codes,
        verbatim, metadata, error, max(s.errors_at(step), default=0.0), step, limit, originals / total.value,
        s.lora / max(1.0, codes.value), tuple(map(point, ERRORS)),
    )  # fmt: skip


def _verbatim(plan: Plan, s: _Sample) -> tuple[Estimate, set[Kind]]:
    """Bytes of what is verbatim; and the kinds of tensors that are the same in many adapters.

    Headers say which adapters have which tensors. What one of a kind takes, a sample tells. One that a quarter of those
    in the sample have is stored once for all.
    """
    kinds, seen = Counter[Kind](), Counter((k.kind, k.digest) for p in s.probes for k in set(p.kept))
    for e in plan.adapters:
        kinds.update((key, r.dtype, r.shape) for key, r in e.layout.extras)
    found: dict[Kind, list[Kept]] = {}
    for kept in (k for p in s.probes for k in p.kept):
        found.setdefault(kept.kind, []).append(kept)
    common = {kind for (kind, _), n in seen.items() if n > 1 and 4 * n >= len(found[kind])}
    lora = s.codes(p.lora for p in s.probes)
    total, square = lora.value, lora.margin**2
    for kind, count in kinds.items():
        some, nbytes = found.get(kind, []), ITEMSIZE[kind[1]] * math.prod(kind[2])
        if kind in common and len(some) < count:
            total += sum({k.digest: k.stored for k in some}.values())
        elif some:
            parts = [k.stored / seen[kind, k.digest] for k in some]
            each = estimated(parts, [1.0] * len(parts), count)
            unseen = each.value * min(1.0, _NONE_SEEN / len(some)) if len(some) < count else 0.0
            total, square = total + each.value, square + each.margin**2 + unseen**2
        else:
            total, square = total + _PLANES * count * nbytes, square + ((1 - _PLANES) * count * nbytes) ** 2
    return Estimate(total, math.sqrt(square)), common


def _metadata(plan: Plan, s: _Sample, codes: float, *, common: Collection[Kind]) -> int:
    """Bytes of what is neither code nor verbatim: of an index and a configuration that are made up, and of headers."""
    adapters, share = plan.adapters, codes / max(1, plan.sizes["lora"])
    length = max(1, round(codes / max(1, len(adapters))))
    rows = {e.name: (e.name, "U8", (max(1, round(e.layout.lora_bytes * share)),)) for e in adapters}
    headers = 0
    for first in range(0, len(adapters), ADAPTERS_MOST):
        some = [rows[e.name] for e in adapters[first : first + ADAPTERS_MOST]]
        some += [(VERBATIM_PART, "U8", (length,))] if plan.sizes["verbatim"] else []
        headers += tensor_records_of(tuple(some))[0].offset
    indexed = adapters[:_INDEXED]
    index = len(index_bytes(_index(indexed, s.adapters[0], length, common=common))) * len(adapters) // len(indexed)
    skipped = skipped_as_json(plan.refused)
    statistics = [_statistics(e) for e in adapters]
    record = CheckpointRecord(
        plan.base_model, plan.settings.chosen(), plan.storage, plan.settings_key, plan.binding, "", "", {}
    )
    config = share_config(
        record, statistics, {}, digest="0" * 64, skipped=skipped,
        sizes={"codes": round(codes), "verbatim": round(codes), "metadata": headers + index},
        coded={"version": VERSION, "step": 0.0, "index": "0" * 64},
        modules={m.name for e in {e.layout.digest: e for e in adapters}.values() for m in e.layout.modules},
    )  # fmt: skip
    return headers + index + len(config_bytes(config)) + (json_bytes(skipped) if skipped else 0)


def _statistics(adapter: Adapter) -> Statistics:
    config = json.loads(str(adapter.config)) if adapter.config is not None else {}
    sizes, digest = sum(f.size for f in adapter.files), int(_digest(adapter.name)[:6], 16)
    lora = adapter.layout.lora_bytes
    return Statistics(adapter.name, digest / 2**24, sizes, lora, True, *rank_and_alpha(config))


def _index(adapters: Sequence[Adapter], other: Adapter, length: int, *, common: Collection[Kind]) -> Index:
    """An index of adapters as it may become; of those that are not read, with the modules of another one."""
    pack = Pack(_digest("pack"), 1, 1)
    configs: dict[Any, Any] = {}
    layouts: dict[Any, Any] = {}
    found: dict[str, CodedAdapter] = {}
    tensors: dict[str, StoredTensor] = {}
    for e in adapters:
        known = e if e.fetched else other
        config = configs.setdefault(e.config_digest, json.loads(str(known.config)))
        layout = layouts.setdefault((known.layout.digest, tuple(known.scalings)), _layout(known))
        digest, verbatim = _digest(e.name), {}
        for key, record in e.layout.extras:
            shared = (key, record.dtype, record.shape) in common
            verbatim[key] = _digest(key if shared else f"{e.name} {key}")[:32]
            at = Location(pack, 0, record.nbytes - int(digest[:2], 16) % max(1, record.nbytes // 8), verbatim[key])
            tensors[verbatim[key]] = StoredTensor(record.dtype, record.shape, PLANES, at)
        code = Location(pack, 0, length + int(digest[:3], 16) % max(1, length // 4), digest[:32])
        found[e.name] = CodedAdapter(e.name, config, layout, _record(e, digest), code, verbatim)
    return Index((pack,), found, tensors)


def _layout(adapter: Adapter) -> list[Any]:
    scaled = zip(adapter.layout.modules, adapter.scalings, strict=True)
    return [[m.name, m.rank, m.dim("B"), m.dim("A"), p.scale, p.experts, m.b.dtype, m.a.dtype] for m, p in scaled]


def _record(adapter: Adapter, digest: str) -> dict[str, Any]:
    """What may be recorded of an adapter: as many digits as there will be."""
    names, number = list(adapter.layout.by_name), int(digest[:6], 16)
    record: dict[str, Any] = {
        "source_id": adapter.source_id, "sha256": _digest(digest), "source_bytes": sum(f.size for f in adapter.files),
        "lora_bytes": adapter.layout.lora_bytes, "relative_error": round(number / 2**24, 7),
        "worst_module": names[number % len(names)] if names else None, "worst_module_error": number % 9999991 / 1e7,
    }  # fmt: skip
    if adapter.origin is not None:
        hub, told = adapter.origin.hub, adapter.origin.listing
        record["hub"] = [hub.repo, hub.revision, hub.subfolder, told.gated, told.private, told.license]
    return record


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
