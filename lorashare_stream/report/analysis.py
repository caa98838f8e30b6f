"""Analysis of a collection from a sample, before hours are spent: its rate curve, and bytes and error for each k.

Bytes of bases and loadings follow from shapes. Errors are means over the sample, m of N adapters: e(m) on bases fitted
to all of it, e(m/2) on those fitted to the half that an adapter is of, h on those fitted to the other half. Errors
approach their limit as 1/sqrt(n) where spectra have tails, so that the expected error of the whole collection is

    e(N) = e(m) + (e(m) - e(m/2)) (1 - sqrt(m/N)) / (sqrt(2) - 1)

but no less than e(m), since more adapters are fitted worse, and no more than h, since a larger fit holds better for
others. Of adapters with nothing in common, bases of others keep k^2 / (d_in d_out) of the energy of dW.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.dtypes import ITEMSIZE, Array, Float64
from ..adapters.keys import SIDES, kind_and_depth
from ..errors import AdapterError, CollectionError, problem_lines
from ..linalg.delta import gram
from ..linalg.eigen import leading
from ..linalg.moments import of_columns
from ..machine import usable_cores
from ..plan.memory import PROCESS_BYTES
from ..plan.plan import Plan
from ..runtime.progress import Progress, silent
from ..settings import DIRECTIONS
from ..text import bytes_shown, counted, listed
from .copies import COPY, SAME_DIRECTION, identical, near_duplicates
from .forecast import Point, curve_text, points_of
from .sample import Part, Sample, check_memory, mapping, sample_of, sampled, spread
from .text import Row, break_even_range, rows_text, table

LOUD = 20.0  # times the median of ||dW||, from which an adapter is named
ROWS = 1024  # of a group, in a sample of default size
_SHOWN = 14  # rows of the table of k, at most
WORK = 2e12  # flops, about half a minute on two cores
TARGETS = 0.1, 0.25  # mean relative dW errors: hardly to be told from the original, and what tasks mostly bear
WORTH, PLENTY = 1.2, 2.0  # times smaller, from which sharing is worth it; and worth more than a smaller error
COMMON, MANY = 0.12, 100  # beyond chance, of the energy of dW; and adapters: from which directions save bytes
LITTLE = 0.25  # of the energy of dW, beyond chance, that bases keep of others: less is too little


@dataclass(frozen=True)
class Outlook:
    """Expectation for one k.

    Attributes:
        bytes: of basis and loadings of the whole collection. ratio: how many times smaller than the LoRA tensors.
        low, expected, high: mean relative dW error.
        held: share of the energy of dW that bases of half of the sample keep of the other half. chance: by chance.
    """

    k: int
    bytes: int
    ratio: float
    low: float
    expected: float
    high: float
    held: float
    chance: float


@dataclass(frozen=True)
class Duplicate:
    """Two adapters with nearly the same dW: relative distance and cosine."""

    names: tuple[str, str]
    distance: float
    cosine: float


@dataclass(frozen=True)
class Analysis:
    """Analysis of a collection.

    Attributes:
        sample: names of the adapters that were measured. compressed: number of adapters to compress.
        modules, modules_in_all: number of modules that were looked at for bases, and of all.
        problems: adapters of the sample that cannot be compressed, by their values or otherwise.
        zero: those with dW = 0. loud: name -> ||dW|| by the median, where it is large.
        coded: the rate curve. outlooks: by k, ascending.
        duplicates: pairs of the sample. identical: groups of the whole collection whose files are the same.
        store, serve: advice for the smallest store, and for serving many at once.
    """

    sample: tuple[str, ...]
    compressed: int
    modules: int
    modules_in_all: int
    problems: tuple[AdapterError, ...]
    zero: tuple[str, ...]
    loud: Mapping[str, float]
    coded: tuple[Point, ...]
    outlooks: tuple[Outlook, ...]
    duplicates: tuple[Duplicate, ...]
    identical: tuple[tuple[str, ...], ...]
    store: str
    serve: str


class Measured(NamedTuple):
    """One module of a sample, or sums over several; relative to the norms of dW.

    Attributes:
        kept: (3, ks, adapters) ||U'dW V||^2 on bases fitted to all, to the adapter's half, to the other half.
        chance: (ks,) what chance keeps of others, of all. inner: (adapters, adapters) products of dW.
    """

    kept: Float64
    chance: Float64
    inner: Float64


def analyse(plan: Plan, sample: int | None = None, *, progress: Progress = silent) -> Analysis:
    """Measure a sample of the adapters of a plan without a limit. Adapters of the Hub are fetched for it.

    Args:
        plan: with the collection and the settings, whose `memory` bounds this too.
        sample: number of adapters; None for `SAMPLE`, fewer if they are large.

    Raises:
        CollectionError: if there are not two adapters that can be measured.
        BudgetError: if memory does not hold one adapter that is coded, or one module of the sample.
        UnreachableError: if the Hub does not answer.
    """
    adapters = [e for e in plan.adapters if e.layout.modules]
    chosen = sampled(adapters, sample, lambda some: max(_rows(some).values(), default=0) <= ROWS)
    wanted, in_all = chosen_modules(chosen, room=plan.settings.memory // 4)
    with mapping(plan) as mapper:
        found = sample_of(plan, chosen, mapper, progress, wanted)
        used = [p for p in found.probes if p.norm > 0]
        parts = [{i: p.parts[m] for i, p in enumerate(used) if m in p.parts} for m in wanted]
        parts = [some for some in parts if some]
        if len(used) < 2 or not parts:
            raise CollectionError(
                "nothing to analyse", problems=found.problems, found=len(used), expected="2 adapters with dW"
            )
        share = len(used) / (len(used) + len(adapters) - len(chosen))  # what is wrong with some is not so with the rest
        ks, at_once = _scope(plan, parts, whole=share == 1)
        look = partial(measure, adapters=len(used), ks=ks, center=plan.settings.center)
        each = progress("analyse", len(parts), mapper.map(look, parts, at_once))
        total = Measured(*(np.sum(part, axis=0) for part in zip(*each, strict=True)))
    norms, coded, outlooks = np.array([p.norm for p in used]), points_of(plan, found), _outlooks(plan, total, ks, share)
    pairs, middle = near_duplicates(total.inner * np.outer(norms, norms)), median(norms.tolist())
    at = next(p for p in coded if p.error == TARGETS[-1])
    return Analysis(
        sample=tuple(p.name for p in used),
        compressed=len(adapters),
        modules=len(parts),
        modules_in_all=in_all,
        problems=found.problems,
        zero=tuple(p.name for p in found.probes if not p.norm),
        loud={p.name: p.norm / middle for p in used if p.norm > LOUD * middle},
        coded=coded,
        outlooks=outlooks,
        duplicates=tuple(Duplicate((used[i].name, used[j].name), far, cosine) for i, j, far, cosine in pairs),
        identical=identical(plan.adapters),
        store=_to_store(at, outlooks, len(adapters)),
        serve=_to_serve(outlooks, found),
    )


def _rows(adapters: Iterable[Adapter]) -> Counter[str]:
    """Vectors of every module, n."""
    count: Counter[str] = Counter()
    for adapter in adapters:
        count.update({m.name: m.rank for m in adapter.layout.modules})
    return count


def chosen_modules(adapters: Sequence[Adapter], work: float = WORK, room: float = 1e15) -> tuple[list[str], int]:
    """Modules to look at, within flops and bytes, spread over kinds and in these over the depth; number of all."""
    shapes, flops, held = {m.name: m for e in adapters for m in e.layout.modules}, 1.0, 1.0
    for name, n in _rows(adapters).items():
        dims = [shapes[name].dim(side) for side in SIDES]
        flops += sum(6.0 * n * n * d + 20.0 * min(n, d) ** 3 for d in dims)
        held += 4 * n * sum(dims)
    places = {name: kind_and_depth(name) for name in shapes}
    count = max(len({kind for kind, _ in places.values()}), int(len(shapes) * min(1.0, work / flops, room / held)))
    ordered = sorted(shapes, key=lambda name: (places[name][0], places[name][1] or 0, name))
    return spread(ordered, count), len(shapes)


def ladder(most: int) -> list[int]:
    """Numbers of components to look at: up to `most`, which is the last, at most a quarter apart.

    >>> ladder(30)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 30]
    """
    steps = {quarters << octave >> 2 for octave in range(32) for quarters in (4, 5, 6, 7)}
    return [*sorted(k for k in steps if k < most), most]


def _scope(plan: Plan, parts: Sequence[Mapping[int, Part]], *, whole: bool) -> tuple[list[int], int]:
    """Each k to look at, as half of a sample spans unless it is the whole; modules that memory holds at a time."""
    s, held, shapes = plan.settings, 0, []
    for some in parts:
        n, first = sum(p.weights.size for p in some.values()), next(iter(some.values()))
        shapes.append((n, [first.rows[side].shape[-1] for side in SIDES]))
        held += 4 * n * sum(shapes[-1][1])
    most = max(min(n if whole else max(1, n // 2), max(dims)) for n, dims in shapes)
    work = max(sum(12 * n * d + 64 * n * min(n, d) + 32 * min(most, d) * (n + d) for d in dims) for n, dims in shapes)
    check_memory(plan, PROCESS_BYTES + held + work)
    asked = {min(s.num_components, most)} if isinstance(s.num_components, int) else set()
    return sorted({*ladder(most), *asked}), min(s.workers or usable_cores(), (s.memory - PROCESS_BYTES - held) // work)


def measure(parts: Mapping[int, Part], adapters: int, ks: Sequence[int], *, center: bool) -> Measured:
    """Measure one module of some adapters, given by number; halves are those of even and of odd number."""
    some = list(parts.values())
    counts = [p.weights.size for p in some]
    rows = {side: np.concatenate([p.rows[side].reshape(-1, p.rows[side].shape[-1]) for p in some]) for side in SIDES}
    weights, strengths = (np.concatenate([getattr(p, of).ravel() for p in some]) for of in ("weights", "strengths"))
    experts = np.concatenate([np.indices(p.weights.shape)[0].ravel() for p in some])
    owners = np.repeat(list(parts), counts)

    def kept(train: Array) -> Float64:
        """||U'dW V||^2 (ks, adapters) on bases of some rows, since U'dW V = sum_j p_j (U'b_j)(V'a_j)'."""
        a, b = (_loadings(rows[side], weights, train, ks[-1], center=center) for side in SIDES)
        both = [np.split(side, np.cumsum(counts)[:-1]) for side in (a, b * strengths[:, None])]
        found = np.zeros((len(ks), adapters))
        for number, part, *loadings in zip(parts, some, *both, strict=True):
            grams = [_grams(one.reshape(*part.weights.shape, -1), ks) for one in loadings]
            found[:, number] = np.sum(grams[0] * grams[1], axis=(1, 2, 3))
        return found

    odd, odd_adapters = owners % 2 == 1, np.arange(adapters) % 2 == 1
    on_odd, on_even = kept(odd), kept(~odd)
    seen, others = np.where(odd_adapters, on_odd, on_even), np.where(odd_adapters, on_even, on_odd)
    products = gram(rows["A"]) * gram(rows["B"]) * np.outer(strengths, strengths) * (experts[:, None] == experts)
    owned = (owners == np.arange(adapters)[:, None]).astype(np.float64)
    inner, dims = owned @ products @ owned.T, [rows[side].shape[1] for side in SIDES]
    chance = np.trace(inner) * np.prod([np.minimum(ks, d) / d for d in dims], axis=0)
    return Measured(np.stack([kept(np.ones(len(odd), bool)), seen, others]), chance, inner)


def _grams(loadings: Float64, ks: Sequence[int]) -> Float64:
    """Gram matrices (ks, E, r, r) of the first k loadings (E, r, k) of each vector."""
    pieces = np.split(loadings, ks[:-1], axis=-1)
    return np.cumsum([piece @ piece.swapaxes(-1, -2) for piece in pieces], axis=0)


def _loadings(rows: Array, weights: Float64, train: Array, most: int, *, center: bool) -> Float64:
    """Loadings (n, k) of all rows (n, d) on the basis of some, weighted; k is `most`, or what these span at most."""
    fitted = (weights[train, None] * rows[train]).astype(np.float32)
    fitted = fitted - fitted.mean(axis=0) if center and len(fitted) else fitted
    k = min(most, *fitted.shape)
    return np.asarray(rows @ leading(of_columns(fitted), k)[1] if k else np.zeros((len(rows), 0)), np.float64)


def _outlooks(plan: Plan, total: Measured, ks: Sequence[int], share: float) -> tuple[Outlook, ...]:
    """Expectations for every k up to the first that saves nothing, and for the one that the settings ask for."""
    norms = np.diag(total.inner)
    some = norms > 0  # others have none of the modules that were looked at
    kept = np.clip(total.kept[:, :, some] / norms[some], 0.0, 1.0)
    errors = np.sqrt(1 - kept)
    own, half, others = errors.mean(axis=2)
    most = np.maximum(own, others) if share < 1 else own
    expected = np.clip(own + (own - half) * (1 - share**0.5) / (2**0.5 - 1), own, most)
    doubt = 2 * errors[0].std(axis=1) * ((1 - share) / some.sum()) ** 0.5
    bounds = np.maximum(own - doubt, 0), expected, np.minimum(most + doubt, 1)
    columns = (*bounds, kept[2].mean(axis=1), total.chance / norms.sum())
    lora, asked, out = max(1, plan.sizes["lora"]), plan.settings.num_components, list[Outlook]()
    for k, *found in zip(ks, *(column.tolist() for column in columns), strict=True):
        size = ITEMSIZE[plan.storage] * sum(min(k, g.dim, g.count) * (g.dim + g.count) for g in plan.groups)
        if size <= lora or not out or out[-1].bytes <= lora or k == asked:
            out.append(Outlook(k, size, lora / size, *found))
    return tuple(out)


def _to_store(at: Point, outlooks: Iterable[Outlook], count: int) -> str:
    """Advice: what a limit gives, and whether adapters have so much in common that directions make it smaller."""
    than = f"codes {at.lora_times:.1f} times smaller than LoRA"
    text = f"--max-error {at.error:g} takes about {bytes_shown(at.total)}, {than}"
    common = max((o.held - o.chance for o in outlooks if o.k <= DIRECTIONS), default=0.0)
    if common < COMMON or count < MANY:
        return text
    why = f"{common:.0%} of the energy of dW is common to many"
    return f"{text}; --directions takes some percent off the codes, since {why}"


def _to_serve(outlooks: Sequence[Outlook], s: Sample) -> str:
    """Advice: which k SHARE may have, what that gives, and whether it gains by it.

    For each error of `TARGETS` there is a smallest k that is expected to have no more. The first target is taken of
    which that k is `PLENTY` times smaller, else the first of which it is `WORTH` times; else the largest k that is.
    """
    worth = [o for o in outlooks if o.ratio >= WORTH]
    if not worth:
        return "no k saves much: code them, or leave them as they are"
    small = [next((o for o in worth if o.expected <= target), None) for target in TARGETS]
    best = next((o for enough in (PLENTY, WORTH) for o in small if o is not None and o.ratio >= enough), None)
    o = best or worth[-1]
    shared = max(0.0, o.held - o.chance)
    times = s.coded_lora / max(1.0, s.codes_within(min(max(o.expected, 0.01), 0.9)).value)
    why = "" if best else f"no k that saves much has an error of {TARGETS[-1]:g}: "
    why = "they share too little to gain by it: " if shared < LITTLE else why
    return (
        f"{why}-k {o.k} has a mean dW error of about {o.expected:.3f} ({o.low:.3f} to {o.high:.3f}), LoRA "
        f"{o.ratio:.1f} times smaller, codes of that error {times:.0f} times; beyond chance, its bases keep "
        f"{shared:.0%} of dW of adapters that they are not fitted to"
    )


def analysis_text(a: Analysis, plan: Plan) -> str:
    """An analysis of a plan's adapters, what to do last."""
    outlooks = _outlook_table(a, plan.settings.num_components)
    parts = [
        rows_text(_looked_at(a)),
        *(["\n".join(["cannot be compressed:", *problem_lines(a.problems)])] if a.problems else []),
        f"coded, every adapter with one error\n{curve_text(a.coded)}",
        f"bases of k components, break-even k {break_even_range(plan)}\n{outlooks}",
        f"for the smallest store, code each alone: {a.store}\nto serve many at once, share bases: {a.serve}",
    ]
    return "\n\n".join(parts)


def _looked_at(a: Analysis) -> list[Row]:
    """Size of the sample, duplicates, and adapters that are odd."""
    pairs = [f"distance {p.distance:.2g}, cosine {p.cosine:.4f}: {', '.join(p.names)}" for p in a.duplicates]
    near = f"{len(pairs)} of {counted(len(a.sample) * (len(a.sample) - 1) // 2, 'pair')}: {'; '.join(pairs[:3])}"
    none = f"no pair nearer than {COPY:.0%}, or with a cosine above {SAME_DIRECTION:g}"
    of = f"{len(a.sample)} of {counted(a.compressed, 'adapter')}"
    lines: list[Row] = [
        ("analysed", f"{of}; for bases {a.modules} of {counted(a.modules_in_all, 'module')}"),
        ("near duplicates", near if pairs else none),
        ("identical files", listed([" = ".join(group) for group in a.identical], 3) or "none in the whole collection"),
    ]
    if a.zero:
        lines.append(("all zero", f"{counted(len(a.zero), 'adapter')}: {listed(a.zero)}"))
    if a.loud:
        loud = [f"{name} ({times:.3g} times)" for name, times in a.loud.items()]
        lines.append(("diverged?", f"||dW|| above {LOUD:g} times the median: {listed(loud)}"))
    return lines


def _outlook_table(a: Analysis, asked: int | str) -> str:
    some = [o for o in a.outlooks if o.k == asked or o.k & (o.k - 1) == 0 or o is a.outlooks[-1]][-_SHOWN:]
    header = ("k", "basis+loadings", "LoRA, times smaller", "dW error", "from", "to", "kept of others", "by chance")
    rows = [
        (
            f"{o.k}", bytes_shown(o.bytes), f"{o.ratio:.2f}", f"{o.expected:.3f}", f"{o.low:.3f}", f"{o.high:.3f}",
            f"{o.held:.1%}", f"{o.chance:.1%}",
        )
        for o in some
    ]  # fmt: skip
    return table(rows, header)
