"""A forecast of a coded checkpoint, bytes and errors, from a coded sample; the rate curve; both as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..adapters.dtypes import ITEMSIZE
from ..adapters.safetensors import tensor_records_of
from ..checkpoint.index import canonical, deflated
from ..checkpoint.packs import ADAPTERS_MOST, VERBATIM_PART
from ..codec.rate import Estimate, estimated, step_for
from ..errors import AdapterError, problem_lines, skipped_as_json
from ..files import json_bytes
from ..plan.plan import Plan
from ..runtime.progress import Progress, silent
from ..stages.coding import ENOUGH
from ..text import bytes_shown, counted
from .sample import Kind, Sample, mapping, sample_of, sampled
from .text import Row, rows_text, table

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
    """A forecast of a coded checkpoint.

    Attributes:
        sample: adapters that were coded. adapters: of the plan. unfetched: those of the Hub that were no candidates.
        exact: of the sample, those that no code within the limit makes smaller; they are kept exact.
        problems: adapters of the sample that cannot be compressed.
        total: bytes of all files; codes, verbatim and metadata are its parts. Margins are half 95 % intervals.
        error: mean relative dW error. worst: the largest of the sample.
        step: of the quantiser, where a limit on bytes decides, which is `wanted`.
        times, lora_times: as those of a `Point`. curve: of other errors.
    """

    sample: int
    adapters: int
    unfetched: int
    exact: int
    problems: tuple[AdapterError, ...]
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
    plan: Plan, sample: int | None = None, *, fetches: bool = False, progress: Progress = silent
) -> Forecast:
    """Code a sample of a plan's adapters, evenly spaced, and estimate the whole by its ratios to bytes that are known.

    Args:
        plan: with a limit.
        sample: number of adapters; None for `SAMPLE`, fewer if they are large.
        fetches: whether adapters of the Hub are fetched for it; else those that are here are candidates.

    Raises:
        CollectionError: if there is no adapter that can be coded.
        UnreachableError: if the Hub does not answer.
    """
    candidates = [e for e in plan.adapters if fetches or e.fetched]
    with mapping(plan) as mapper:
        found = sample_of(plan, sampled(candidates, sample), mapper, progress)
    return _forecast(plan, found, len(plan.adapters) - len(candidates))


def _forecast(plan: Plan, s: Sample, unfetched: int) -> Forecast:
    verbatim, common = _verbatim(plan, s)
    originals, step = plan.sizes["originals"], None
    limit = plan.settings.byte_limit(originals)
    if limit is None:
        codes, error = s.total(lambda p: p.code), s.mean_error(None)
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
        len(s.probes), s.count, unfetched, exact, s.problems, total, codes, verbatim, metadata, error,
        max(s.errors(step), default=0.0), step, limit, originals / total.value,
        s.coded_lora / max(1.0, codes.value), _points(plan, s, verbatim.value + metadata),
    )  # fmt: skip


def points_of(plan: Plan, s: Sample) -> tuple[Point, ...]:
    """The rate curve: a coded checkpoint of all adapters at some errors."""
    verbatim, common = _verbatim(plan, s)
    return _points(plan, s, verbatim.value + _metadata(plan, s, s.codes_within(0.25).value, common=common))


def _points(plan: Plan, s: Sample, beside: float) -> tuple[Point, ...]:
    """The rate curve, with a number of bytes beside the codes."""
    points = []
    for error in ERRORS:
        codes = s.codes_within(error)
        total = codes.value + beside
        times = plan.sizes["originals"] / total, s.coded_lora / max(1.0, codes.value)
        points.append(Point(error, codes.value, math.hypot(codes.margin, _BETWEEN * codes.value), total, *times))
    return tuple(points)


def _verbatim(plan: Plan, s: Sample) -> tuple[Estimate, set[Kind]]:
    """Bytes of verbatim tensors; and the kinds of those that are the same in many adapters.

    Headers say what all adapters have, a sample which share of that is stored. A tensor that a quarter of those with
    one of its kind in the sample have is stored once for all.
    """
    every = [k for p in s.probes for k in p.kept]
    seen, kinds = Counter((k.kind, k.digest) for k in every), Counter(k.kind for k in every)
    common = {kind for (kind, _), n in seen.items() if n > 1 and 4 * n >= kinds[kind]}
    once = sum({(k.kind, k.digest): k.stored for k in every if k.kind in common}.values())
    own = [[k for k in p.kept if k.kind not in common] for p in s.probes]
    sizes = [float(sum(ITEMSIZE[k.kind[1]] * math.prod(k.kind[2]) for k in some)) for some in own]
    whole = sum(r.nbytes for e in plan.adapters for key, r in e.layout.extras if (key, r.dtype, r.shape) not in common)
    rest = Estimate(_PLANES * whole, (1 - _PLANES) * whole)
    if any(sizes):
        rest = estimated([sum(k.stored / seen[k.kind, k.digest] for k in some) for some in own], sizes, whole)
    exact = s.total(lambda p: p.exact)
    return Estimate(once + rest.value + exact.value, math.hypot(rest.margin, exact.margin)), common


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


def forecast_text(f: Forecast) -> str:
    """A forecast, and the curve: bytes against error."""
    pairs: list[Row] = [
        ("foretold from", f"{counted(f.sample, 'adapter')} of {f.adapters}, which were read and coded"),
        ("checkpoint", f"{_interval(f.total)}, {_times(f.times)}"),
        ("  codes", f"{_interval(f.codes)}, {_times(f.lora_times)} than the LoRA tensors"),
        ("  verbatim", _interval(f.verbatim)),
        ("  metadata", f"about {bytes_shown(f.metadata)}"),
        ("relative dW error", _errors(f)),
    ]
    if f.exact:
        pairs.append(("kept exact", f"{f.exact} of the sample: no code within the limit is smaller than the tensors"))
    if f.unfetched:
        pairs.append(("not looked at", f"{counted(f.unfetched, 'adapter')} of the Hub: --analyze fetches a sample"))
    parts = [rows_text(pairs), curve_text(f.curve)]
    if f.problems:
        parts.append("\n".join(["of the sample cannot be compressed:", *problem_lines(f.problems)]))
    return "\n\n".join(parts)


def curve_text(points: Sequence[Point]) -> str:
    """The rate curve; codes with half of their 95 % interval, which is that of the checkpoint too."""
    header = ("dW error of each", "codes", "95 %", "checkpoint", "times smaller", "codes, times smaller")
    rows = [
        (
            f"{p.error:g}", bytes_shown(p.codes), f"+- {p.margin / max(1.0, p.codes):.1%}", bytes_shown(p.total),
            f"{p.times:.1f}", f"{p.lora_times:.1f}",
        )
        for p in points
    ]  # fmt: skip
    return table(rows, header)


def _interval(e: Estimate) -> str:
    about, low, high = (bytes_shown(max(0.0, size)) for size in (e.value, e.value - e.margin, e.value + e.margin))
    return f"about {about}" + (f" ({low} to {high} at 95 %)" if e.margin > 0.005 * e.value else "")


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times smaller" if ratio >= 1 else "no smaller"


def _errors(f: Forecast) -> str:
    low, high = max(0.0, f.error.value - f.error.margin), f.error.value + f.error.margin
    between = "" if f.error.margin < 5e-4 else f" ({low:.3f} to {high:.3f} at 95 %)"
    text = f"mean about {f.error.value:.3f}{between}, {f.worst:.3f} at worst in the sample"
    if f.wanted is not None and f.total.value > 1.01 * f.wanted:
        text = f"cannot be as small: {bytes_shown(f.total.value - f.codes.value)} of it are not codes; {text}"
    return text
