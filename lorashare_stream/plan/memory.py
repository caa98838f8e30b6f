"""Arithmetic of a plan: groups, the steps, and the bytes that each reads and holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..adapters.adapter import Adapter
from ..adapters.dtypes import ITEMSIZE
from ..adapters.keys import SIDES, Side
from ..adapters.layout import STACK_BYTES, Module
from ..adapters.safetensors import CHUNK
from ..linalg.basis import break_even
from ..linalg.eigen import STRIP, suits_krylov
from ..linalg.krylov import capacity, width
from ..linalg.moments import stays_stacked
from ..machine import usable_cores
from ..settings import QUANTUM, Settings
from ..workspace.leases import height_of

# Resident bytes of the process before any work: interpreter, numpy, scipy; torch in those that convert a `.bin`.
PROCESS_BYTES = 192 << 20
WORKER_BYTES = 64 << 20  # of a worker process: its own pages before any work, and freed memory that it keeps
TORCH_BYTES = 224 << 20
HUB_BYTES = 112 << 20  # its client, and 8 downloads that read 10 MiB at a time
CODED_TIMES = 13  # times the LoRA bytes of an adapter, in memory while it is coded: 12.7 where all is of one class
SAMPLE = 64  # adapters whose rates tell the step for a limit on bytes
BYTES_PER_ADAPTER = 4 << 10  # of an adapter in the catalog and its admission
BYTES_PER_RECORD = 1 << 10  # of a tensor in a layout; equal layouts are kept once
ITEM = {"float32": 4, "float64": 8}  # bytes of a number of a moment
PORTION_BYTES, PORTION_READS = 128 << 20, 4 << 30  # of sums, and of their sources; see `portions`
OWN_FILES = 10  # of a workspace: settings twice, plan, journal, lock, what was skipped, is published, and groups
MARKER_BYTES, FACTS_BYTES, EIGENVALUE_BYTES = 1000, 800, 24  # of a module, of its bases, and of each number of these
METADATA_BYTES, ARRAY_NAME_BYTES = 1000, 12  # of an array, and of a name in it
PLANNED_BYTES, ADMITTED_BYTES = 180, 600  # of a group in the plan, and of an adapter there and in the journal
TILE_BYTES = 16 << 20  # small moments that are written together, copied twice, and strips that are squared


@dataclass(frozen=True, slots=True)
class Group:
    """One (module, side): the tensors that share a basis.

    Attributes:
        module, side: of the group.
        dim: d.
        count: n, the sum of ranks over the adapters that have the module.
        adapters: how many have it.
        asked: k of the settings; None if it is `auto`.
        item: bytes of a number of its moment.
    """

    module: str
    side: Side
    dim: int
    count: int
    adapters: int
    asked: int | None = None
    item: int = 4

    @property
    def stacked(self) -> bool:
        """Whether the stacked columns (n, d) are kept, not the second moment (d, d)."""
        return stays_stacked(self.count, self.dim)

    @property
    def break_even(self) -> float:
        """The k above which sharing saves nothing."""
        return break_even(self.dim, self.count)

    @property
    def _most(self) -> int:
        return max(1, min(self.dim, self.count))

    @property
    def components(self) -> int:
        """k: as asked, clamped to min(d, n); for `auto`, which only the moment knows, the break-even."""
        return min(self.asked or max(1, round(self.break_even)), self._most)

    @property
    def _rows(self) -> int:
        return self.count if self.stacked else self.dim

    @property
    def _height(self) -> int:
        """Rows of a chunk of the moment on disk."""
        return height_of("columns" if self.stacked else "second", self._rows, self.dim, self.item)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""
        return self._height * self.dim * self.item

    @property
    def moment_bytes(self) -> int:
        """Bytes of the moment."""
        return self.dim * self._rows * self.item

    @property
    def stored_moment(self) -> tuple[int, int]:
        """Bytes and files of the moment on disk: its chunks, and its sum."""
        chunks = -(-self._rows // self._height)
        return chunks * (self.chunk_bytes + 4) + 8 * self.dim + 4, chunks + 1

    @property
    def sum_bytes(self) -> int:
        """Bytes held while the group is summed: the block; and the rows that are written at once, or S."""
        ragged = self.count <= self._height or self._height % QUANTUM
        part = min(self._height, self.count) if self.count > QUANTUM and ragged else 0
        return (min(QUANTUM, self.count) + (part if self.stacked else self.dim)) * self.dim * self.item

    @property
    def kept_bytes(self) -> int:
        """Bytes of stacked columns that exist already, and go into new ones or into a sum."""
        return self.dim * min(self.count, 2 * self.dim) * (self.item + 8) if self.stacked else 0

    @property
    def fit_bytes(self) -> int:
        """Bytes held while the basis is fitted."""
        k = self._most if self.asked is None else self.components
        polish = 8 * (6 * self.dim * k + 3 * k * k)  # the solver's vectors, those of QR and Ritz, the rounded ones
        return self.moment_bytes + max(self.chunk_bytes, polish, self._solver_bytes(k))  # one after the other

    def _solver_bytes(self, k: int) -> int:
        """Bytes of `eigen.leading` beside the moment, by its table; `eigen.spectrum` needs no more."""
        size = self._most if self.stacked else self.dim
        if suits_krylov(size, k):
            b, most = width(k), capacity(k)
            space = self.item * self.dim * (most + (k + most) // 2 + 6 * b)  # and what it is cut to; blocks
            product = (self.item + 1) * max(self._rows, STRIP) * b
            return space + 8 * self.dim * b + 8 * 6 * most**2 + product
        wide = 8 if self.stacked and self.count <= self.dim else self.item
        strips = 8 * (1024 * self.count if self.stacked else 0) + 8 * STRIP * self.dim
        return strips + wide * size * (3 * size + 40)  # of syevd, where syevr, whose size + k is less, finds too few


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the pipeline.

    Attributes:
        name, tasks: of the step, and how many tasks it has.
        read_bytes: bytes that all tasks read.
        task_bytes: bytes of a task, and of what its process holds for it.
        spare_bytes: further bytes of a task of `accumulate`, for more modules than the largest.
        concurrency: how many tasks run at a time.
        peak_bytes: resident bytes of all processes at the peak.
        least_bytes: the same with one task at a time, of one module.
    """

    name: str
    tasks: int
    read_bytes: int
    task_bytes: int
    spare_bytes: int = 0
    concurrency: int = 1
    peak_bytes: int = 0
    least_bytes: int = 0


def examples(adapters: Iterable[Adapter]) -> list[Adapter]:
    """One adapter of each layout."""
    return list({e.layout.digest: e for e in adapters}.values())


def groups_of(adapters: Iterable[Adapter], settings: Settings) -> tuple[Group, ...]:
    """The groups that some adapters form, sorted by module, A before B."""
    uses = Counter(e.layout.digest for e in adapters)
    modules: dict[str, list[tuple[Module, int]]] = {}
    for adapter in examples(adapters):
        for module in adapter.layout.modules:
            modules.setdefault(module.name, []).append((module, uses[adapter.layout.digest]))
    asked = None if settings.num_components == "auto" else settings.num_components
    return tuple(
        Group(
            name, side, found[0][0].dim(side), sum(m.rank * n for m, n in found), sum(n for _, n in found),
            asked, ITEM[settings.moment_dtype],
        )
        for name, found in sorted(modules.items())
        for side in SIDES
    )  # fmt: skip


def modules_of(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """The groups of each module."""
    found: dict[str, list[Group]] = {}
    for g in groups:
        found.setdefault(g.module, []).append(g)
    return found


def steps_of(
    adapters: tuple[Adapter, ...], groups: tuple[Group, ...], s: Settings, storage: str, *, grows: bool
) -> tuple[Step, ...]:
    """The passes over some adapters and groups; `grows` if moments may exist that are added to."""
    kinds, count = examples(adapters), len(adapters)
    largest = max((e.mapped_bytes for e in adapters), default=0)  # a file is mapped, and resident while it is read
    pickled = max((e.mapped_bytes for e in adapters if e.pickled), default=0)
    catalog = BYTES_PER_ADAPTER * count + BYTES_PER_RECORD * sum(len(e.layout.in_file_order) for e in kinds)
    catalog += sum(len(text) for text in {e.config for e in adapters} if text is not None)
    process = PROCESS_BYTES + catalog
    process += TORCH_BYTES if pickled or s.device != "cpu" else 0
    process += HUB_BYTES if any(e.origin is not None for e in adapters) else 0
    idle = WORKER_BYTES + catalog + (TORCH_BYTES if pickled else 0)
    total = sum(f.size for e in adapters for f in e.files)
    pair = max([STACK_BYTES, *(m.bytes for e in kinds for m in e.layout.modules)])
    buffers = CHUNK + largest + pickled  # a chunk being copied, a file's pages; a `.bin` is read whole
    components = sum(4 * g.dim * g.components for g in groups)

    ingest = Step("ingest", count, total, 4 * pair + buffers)
    coding = CODED_TIMES * max((e.layout.lora_bytes for e in adapters), default=0) + 4 * pair + buffers + components
    rate = Step("rate", min(count, SAMPLE), total * SAMPLE // max(count, SAMPLE), coding + components)
    encode = Step("encode", count, total, coding + components // 2)
    if not s.fits:
        return _concurrent((ingest, encode) if s.max_error is not None else (ingest, rate, encode), s, process, idle, 0)
    by_module = modules_of(groups)
    sums = max((held_bytes(both, s, grows=grows) for both in by_module.values()), default=0)
    # Adapters, then zarr's copies of a chunk.
    reading = max(4 * pair + largest + pickled, 2 * max((g.chunk_bytes for g in groups), default=0)) + TILE_BYTES
    accumulate = Step("accumulate", len(by_module), sum(e.layout.lora_bytes for e in adapters), sums + reading)
    fit = Step("fit", len(by_module), 0, max((g.fit_bytes for g in groups), default=0) + TILE_BYTES)
    k = {m: sum(g.components for g in both) for m, both in by_module.items()}
    loadings = 4 * max((sum(k[m.name] * m.rank for m in e.layout.modules) for e in kinds), default=0)
    widest_pair = max((sum(8 * g.dim * g.components for g in both) for both in by_module.values()), default=0)
    kept = components if keeps_components(components, s.memory) else 0
    mapped = components * ITEMSIZE[storage] // 4  # pages that are resident
    project = Step("project", count, total, 9 * pair + widest_pair + loadings + buffers + kept + mapped)
    last = (project,) if s.limit is None else (rate, encode)
    return _concurrent((ingest, accumulate, fit, *last), s, process, idle, PORTION_BYTES - sums)


def _concurrent(steps: Sequence[Step], s: Settings, process: int, idle: int, spare: int) -> tuple[Step, ...]:
    """Steps in as many processes as leave memory for the most tasks at a time in the most expensive step.

    All steps have as many: `process` bytes are of this one, `idle` of each other without a task; a task of
    `accumulate` has at most `spare` for more modules than the largest.
    """
    room = s.memory - process

    def at_once(count: int, each: int) -> int:
        return min(count, (room - count * idle) // max(1, each))

    each = [step.task_bytes for step in steps]
    most = range(1, (s.workers or usable_cores()) + 1)
    count = max(most, key=lambda n: (min(at_once(n, e) for e in each), n))
    count = count if at_once(count, max(each)) > 0 else 1
    planned = []
    for step in steps:
        n = max(1, at_once(count, step.task_bytes))
        left = (room - count * idle) // n - step.task_bytes
        more = max(0, min(spare, left)) if step.name == "accumulate" else 0
        peak = process + count * idle + n * (step.task_bytes + more)
        least = process + idle + step.task_bytes
        planned.append(replace(step, spare_bytes=more, concurrency=n, peak_bytes=peak, least_bytes=least))
    return tuple(planned)


def keeps_components(size: int, memory: int) -> bool:
    """Whether components, `size` bytes in float32, are kept stacked for all adapters; else each projection reads,
    stacks and widens them anew.
    """
    return size <= memory // 4


def held_bytes(both: Sequence[Group], s: Settings, *, grows: bool) -> int:
    """Bytes of a module while it is summed, and fitted if moments are freed at once."""
    sums = sum(g.sum_bytes + (g.kept_bytes if grows else 0) for g in both)
    return max(sums, *(g.fit_bytes for g in both)) if s.discard_moments else sums


def portions(
    modules: Sequence[str], groups: Mapping[str, Sequence[Group]], s: Settings, step: Step, *, grows: bool
) -> list[tuple[str, ...]]:
    """Modules in portions that are summed together, so that each adapter is opened once for all of a portion.

    As few as keep the workers busy and fit in the memory of a task, and so that no more than `PORTION_READS` are read
    for one: a portion is what is lost if the run is killed. Each alone if moments are freed at once, since disk is
    short then, or if a module is unknown.
    """
    alone: list[tuple[str, ...]] = [(m,) for m in modules]
    if s.discard_moments or not groups.keys() >= set(modules):
        return alone
    held = {m: held_bytes(both, s, grows=grows) for m, both in groups.items()}
    reads = {m: sum(4 * g.dim * g.count for g in both) for m, both in groups.items()}
    most = max(held.values(), default=0) + step.spare_bytes
    for count in range(step.concurrency, len(modules), step.concurrency):
        parts = _split(modules, [held[m] + reads[m] for m in modules], count)
        if all(sum(held[m] for m in p) <= most and sum(reads[m] for m in p) <= PORTION_READS for p in parts):
            return parts
    return alone


def _split(items: Sequence[str], costs: Sequence[int], count: int) -> list[tuple[str, ...]]:
    """Items, in order, in `count` parts of nearly the same cost; none is empty."""
    total, done = max(1, sum(costs)), 0
    parts: list[list[str]] = [[] for _ in range(count)]
    for item, cost in zip(items, costs, strict=True):
        parts[min(count - 1, (done + cost // 2) * count // total)].append(item)
        done += cost
    return [tuple(part) for part in parts if part]


def beside_moments(groups: Sequence[Group], adapters: Sequence[Adapter], s: Settings) -> tuple[int, int]:
    """Bytes and files of a workspace beside moments and the numbers of bases: markers, facts, metadata, the journal."""
    arrays = {(g.side, g.dim, g.stacked, g.count if g.stacked else 0) for g in groups}
    kinds, modules = len(examples(adapters)), len(groups) // 2
    of_group = sum(ARRAY_NAME_BYTES * 2 + 2 * len(g.module) + EIGENVALUE_BYTES * g.components for g in groups)
    size = of_group + (MARKER_BYTES + FACTS_BYTES) * modules + METADATA_BYTES * (1 + 2 * len(arrays))
    size += PLANNED_BYTES * len(groups) + ADMITTED_BYTES * len(adapters)
    markers = 0 if s.discard_moments else modules
    return size, OWN_FILES + kinds + 2 * len(arrays) + markers + 2 * modules
