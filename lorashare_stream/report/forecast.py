"""What a coded checkpoint will take, and how far off it will be, foretold from a sample that is coded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from ..adapters.dtypes import ITEMSIZE
from ..adapters.safetensors import tensor_records_of
from ..checkpoint.index import canonical, deflated
from ..checkpoint.packs import ADAPTERS_MOST, VERBATIM_PART
from ..codec.rate import Estimate, estimated, step_for
from ..errors import skipped_as_json
from ..files import json_bytes
from ..plan.plan import Plan
from ..runtime.progress import Progress, silent
from ..stages.coding import ENOUGH
from .sample import Kind, Sample, mapping, sample_of, sampled

ERRORS = (0.02, 0.05, 0.1, 0.25, 0.4, 0.6)  # of the curve
_INDEXED = 1024  # adapters of the index that is made to see how large it will be
_PLANES = 0.85  # of its bytes, what a tensor may take of whose kind none is in the sample
_RECORD, _TENSOR, _HUB, _CONFIG = 70, 27, 60, 1400  # bytes of an adapter and a tensor in an index; of a configuration
_BETWEEN = 0.02  # of codes, how far a curve is off between the steps that were tried
_UNKNOWN = 0.2  # of metadata


@dataclass(frozen=True)
class Point:
    """A coded checkpoint whose adapters all have one error.

    Attributes:
        codes, total: bytes of codes, and of all files. margin: of both, half a 95 % interval.
        times, lora_times: how many times smaller than the originals: all files, and the codes than the LoRA tensors.
    """

    error: float
    codes: float
    margin: float
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
    chosen = sampled(candidates, sample)
    with mapping(plan, executor) as mapper:
        found = sample_of(plan, chosen, mapper, progress, fetches=fetches)
    return _forecast(plan, found, len(plan.adapters) - len(candidates))


def _forecast(plan: Plan, s: Sample, unfetched: int) -> Forecast:
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
    exact = sum(p.norm > 0 and not p.coded for p in s.probes)
    return Forecast(
        len(s.probes), s.count, unfetched, exact, tuple(skipped_as_json(s.problems)), total, codes, verbatim, metadata,
        error, max(s.errors_at(step), default=0.0), step, limit, originals / total.value,
        s.coded_lora / max(1.0, codes.value), points_of(plan, s, verbatim.value + metadata),
    )  # fmt: skip


def points_of(plan: Plan, s: Sample, beside: float | None = None) -> tuple[Point, ...]:
    """The rate curve: a coded checkpoint of all adapters at some errors, with so many bytes beside its codes."""
    if beside is None:
        verbatim, common = _verbatim(plan, s)
        beside = verbatim.value + _metadata(plan, s, s.codes_within(0.25).value, common=common)
    points = []
    for error in ERRORS:
        codes = s.codes_within(error)
        total = codes.value + beside
        times = plan.sizes["originals"] / total, s.coded_lora / max(1.0, codes.value)
        margin = math.hypot(codes.margin, _BETWEEN * codes.value)
        points.append(Point(error, codes.value, margin, total, *times))
    return tuple(points)


def _verbatim(plan: Plan, s: Sample) -> tuple[Estimate, set[Kind]]:
    """Bytes of what is verbatim; and the kinds of tensors that are the same in many adapters.

    Headers say what all adapters have, a sample which share of that is stored. A tensor that a quarter of those with
    one of its kind in the sample have is stored once for all.
    """
    every = [k for p in s.probes for k in p.kept]
    seen, kinds = Counter((k.kind, k.digest) for k in every), Counter(k.kind for k in every)
    common = {kind for (kind, _), n in seen.items() if n > 1 and 4 * n >= kinds[kind]}
    once = sum({(k.kind, k.digest): k.stored for k in every if k.kind in common}.values())
    own = [[k for k in p.kept if k.kind not in common] for p in s.probes]
    sizes = [float(sum(_nbytes(k.kind) for k in some)) for some in own]
    whole = sum(r.nbytes for e in plan.adapters for key, r in e.layout.extras if (key, r.dtype, r.shape) not in common)
    rest = Estimate(_PLANES * whole, (1 - _PLANES) * whole)
    if any(sizes):
        rest = estimated([sum(k.stored / seen[k.kind, k.digest] for k in some) for some in own], sizes, whole)
    lora = s.codes(p.lora for p in s.probes)
    return Estimate(once + rest.value + lora.value, math.hypot(rest.margin, lora.margin)), common


def _nbytes(kind: Kind) -> int:
    return ITEMSIZE[kind[1]] * math.prod(kind[2])


def _metadata(plan: Plan, s: Sample, codes: float, *, common: Collection[Kind]) -> int:
    """Bytes of what is neither code nor verbatim: headers; an index and a configuration by what they tell of each."""
    adapters, indexed = plan.adapters, plan.adapters[:_INDEXED]
    rows = [(e.name, "U8", (max(1, round(e.layout.lora_bytes * codes / max(1, s.lora))),)) for e in adapters]
    rest = [(VERBATIM_PART, "U8", (max(1, round(codes / max(1, len(adapters)))),))] if plan.sizes["verbatim"] else []
    parts = [tuple(rows[i : i + ADAPTERS_MOST] + rest) for i in range(0, len(rows), ADAPTERS_MOST)]
    headers = sum(tensor_records_of(part)[0].offset for part in parts)
    known = [e if e.fetched else s.adapters[0] for e in indexed]  # of what is not read, as another one
    texts = {text for e in known for text in (str(e.config), *e.layout.by_name)}
    told = canonical([sorted(texts), [[e.name, e.source_id] for e in indexed]])
    index = len(deflated(told.encode())) * len(adapters) // len(indexed)
    own = sum((key, r.dtype, r.shape) not in common for e in adapters for key, r in e.layout.extras) + len(common)
    index += _RECORD * len(adapters) + _TENSOR * own + _HUB * sum(e.origin is not None for e in adapters)
    names, skipped = sum(len(e.name) + 3 for e in adapters), skipped_as_json(plan.refused)
    config = _CONFIG + names + 8 * names // len(adapters)  # some are named once more, as the worst
    return headers + index + config + (json_bytes(skipped) if skipped else 0)
