"""The arithmetic of a plan: groups, and what each step reads and holds, in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
WORKER_BYTES = 64 << 20  # of a worker process: what is its own before any work, and what it keeps of freed memory
TORCH_BYTES = 224 << 20
HUB_BYTES = 112 << 20  # its client, and 8 downloads that read 10 MiB at a time
CODED_TIMES = 12  # times the LoRA bytes of an adapter, in memory while it is coded: 11.6 where all is of one class
SAMPLE = 64  # adapters whose rates tell the step for a limit on bytes
BYTES_PER_ADAPTER = 4 << 10  # of a adapter in the catalog and its admission
BYTES_PER_RECORD = 1 << 10  # of a tensor in a layout; equal layouts are kept once
ITEM = {"float32": 4, "float64": 8}  # bytes of a number of a moment
PORTION_BYTES, PORTION_READS = 128 << 20, 4 << 30  # of sums, and of what is read for them; see `portions`
OWN_FILES = 10  # of a workspace: settings twice, plan, journal, lock, what was skipped, is published, and groups
MARKER_BYTES, FACTS_BYTES, EIGENVALUE_BYTES = 1000, 800, 24  # of a module, of its bases, and of each number of these
METADATA_BYTES, ARRAY_NAME_BYTES = 1000, 12  # of an array, and of a name in it
PLANNED_BYTES, ADMITTED_BYTES = 180, 600  # of a group in the plan, and of an adapter there and in the journal
TILE_BYTES = 16 << 20  # small moments that are written together, copied twice, and strips that are squared


@dataclass(frozen=True, slots=True)
class Group:
    """One (module, side): what shares a basis.

    Attributes:
        module, side: of the group.
        dim: d.
        count: n, the sum of ranks over the adapters that have the module.
        adapters: how many have it.
    """

    module: str
    side: Side
    dim: int
    count: int
    adapters: int

    @property
    def stacked(self) -> bool:
        """Whether the stacked columns (n, d) are kept, not the second moment (d, d)."""
        return stays_stacked(self.count, self.dim)

    def components(self, settings: Settings) -> int:
        """k: as asked, clamped to min(d, n); for `auto`, which only the moment knows, the break-even."""
        most = max(1, min(self.dim, self.count))
        if settings.num_components == "auto":
            return max(1, min(most, round(break_even(self.dim, self.count))))
        return min(settings.num_components, most)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the pipeline.

    Attributes:
        name, tasks, read_bytes: what it is, how many tasks it has, what these read together.
        concurrency: how many tasks run at a time.
        shared_bytes: of all processes, those that have no task among them.
        process_bytes: of a process that has tasks of this step, for all that it does.
        task_bytes: of each; of as many modules as are summed together in one.
        least_bytes: of the step with one task at a time, and that of one module.
    """

    name: str
    tasks: int
    read_bytes: int
    concurrency: int
    shared_bytes: int
    process_bytes: int
    task_bytes: int
    least_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Resident bytes at the peak of this step."""
        return self.shared_bytes + max(1, self.concurrency) * (self.process_bytes + self.task_bytes)


def examples(adapters: Iterable[Adapter]) -> list[Adapter]:
    """One entry of each layout."""
    return list({e.layout.digest: e for e in adapters}.values())


def groups_of(adapters: Iterable[Adapter]) -> tuple[Group, ...]:
    """The groups that some adapters form, sorted by module, A before B."""
    uses = Counter(e.layout.digest for e in adapters)
    modules: dict[str, list[tuple[Module, int]]] = {}
    for adapter in examples(adapters):
        for module in adapter.layout.modules:
            modules.setdefault(module.name, []).append((module, uses[adapter.layout.digest]))
    return tuple(
        Group(name, side, found[0][0].dim(side), sum(m.rank * n for m, n in found), sum(n for _, n in found))
        for name, found in sorted(modules.items())
        for side in SIDES
    )


def steps_of(
    adapters: tuple[Adapter, ...], groups: tuple[Group, ...], s: Settings, storage: str, *, grows: bool
) -> tuple[Step, ...]:
    """What the passes over these adapters and groups cost; `grows` if there may be moments to add to."""
    largest, pickled = _largest_file(adapters), _largest_file(e for e in adapters if e.pickled)
    tensors = sum(len(e.layout.in_file_order) for e in examples(adapters))
    catalog = BYTES_PER_ADAPTER * len(adapters) + BYTES_PER_RECORD * tensors
    catalog += sum(len(text) for text in {e.config for e in adapters} if text is not None)
    process = PROCESS_BYTES + catalog
    process += TORCH_BYTES if pickled or s.device != "cpu" else 0
    process += HUB_BYTES if any(e.origin is not None for e in adapters) else 0
    total = sum(f.size for e in adapters for f in e.files)
    lora = sum(e.layout.lora_bytes for e in adapters)
    pair = max((m.bytes for e in examples(adapters) for m in e.layout.modules), default=0)
    pair = max(pair, STACK_BYTES)
    buffers = CHUNK + largest + pickled  # a chunk being copied, a file's pages; a `.bin` is read whole
    count, idle = len(adapters), WORKER_BYTES + catalog + (TORCH_BYTES if pickled else 0)
    components = sum(4 * g.dim * g.components(s) for g in groups)
    ingest = ("ingest", count, total, 4 * pair + buffers, 0)
    coding = CODED_TIMES * max((e.layout.lora_bytes for e in adapters), default=0) + 4 * pair + buffers + components
    sample = total * SAMPLE // max(count, SAMPLE)
    rate = ("rate", min(count, SAMPLE), sample, coding + components, 0)
    encode = ("encode", count, total, coding, components // 2)
    if not s.fits:
        return _steps((ingest, encode) if s.max_error is not None else (ingest, rate, encode), s, process, idle, 0)
    by_module = modules_of(groups)
    sums = max((held_bytes(both, s, grows=grows) for both in by_module.values()), default=0)
    fits, chunk = (max((size(g, s) for g in groups), default=0) for size in (_fit_bytes, _chunk_bytes))
    widest_pair = max((sum(8 * g.dim * g.components(s) for g in both) for both in by_module.values()), default=0)
    k = {g.module: sum(h.components(s) for h in by_module[g.module]) for g in groups}
    loadings = 4 * max((sum(k[m.name] * m.rank for m in e.layout.modules) for e in examples(adapters)), default=0)
    kept = components if keeps_components(components, s.memory) else 0
    mapped = components * ITEMSIZE[storage] // 4  # pages that are resident
    modules = len(by_module)

    reading = max(4 * pair + largest + pickled, 2 * chunk) + TILE_BYTES  # adapters, then what zarr copies of a chunk
    project = ("project", count, total, 9 * pair + widest_pair + loadings + buffers, kept + mapped)
    return _steps(
        (
            ingest,
            ("accumulate", modules, lora, sums + reading, 0),
            ("fit", modules, 0, fits + TILE_BYTES, 0),
            *((project,) if s.limit is None else (rate, encode)),
        ),
        s,
        process,
        idle,
        PORTION_BYTES + reading,
    )


def _steps(
    costs: Sequence[tuple[str, int, int, int, int]], s: Settings, process: int, idle: int, portion: int
) -> tuple[Step, ...]:
    """Steps, in as many processes as leave memory for the most tasks at a time in the step that takes most.

    Args:
        costs: of each step, name, number of tasks, bytes that these read, bytes that each holds, and bytes that its
            process holds for them.
        s: the settings.
        process, idle: bytes of this process, and of one that has no task, for there are as many in every step.
        portion: bytes of a task of `accumulate` at most.
    """
    room = s.memory - process

    def at_once(count: int, each: int) -> int:
        return min(count, (room - count * idle) // max(1, each))

    each = [task + shared for *_, task, shared in costs]
    most = range(1, (s.workers or usable_cores()) + 1)
    count = max(most, key=lambda n: (min(at_once(n, e) for e in each), n))
    count = count if at_once(count, max(each)) > 0 else 1
    steps = []
    for (name, tasks, read, task, shared), e in zip(costs, each, strict=True):
        n = max(1, at_once(count, e))
        whole = max(task, min(portion, (room - count * idle) // n - shared)) if name == "accumulate" else task
        steps.append(Step(name, tasks, read, n, process + count * idle, shared, whole, process + idle + e))
    return tuple(steps)


def _largest_file(adapters: Iterable[Adapter]) -> int:
    """Bytes of the largest file of some adapters: it is mapped, and resident while it is read."""
    return max((e.mapped_bytes for e in adapters), default=0)


def modules_of(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """The groups of each module."""
    found: dict[str, list[Group]] = {}
    for g in groups:
        found.setdefault(g.module, []).append(g)
    return found


def keeps_components(size: int, memory: int) -> bool:
    """Whether components, `size` bytes in float32, are kept stacked while adapters are projected; else they are read
    from the page cache, stacked and widened, for each adapter anew.
    """
    return size <= memory // 4


def portions(
    modules: Sequence[str], groups: Mapping[str, Sequence[Group]], s: Settings, step: Step, *, grows: bool
) -> list[tuple[str, ...]]:
    """Modules in portions that are summed together, so that each adapter is opened once for all of a portion.

    As few as keep the workers busy and hold in `step.task_bytes`, but no more than `PORTION_READS` are read for one: a
    portion is what is lost if the run is killed. Each alone if moments are freed at once, since disk is short then.
    """
    if s.discard_moments:
        return [(m,) for m in modules]
    held = {m: held_bytes(groups[m], s, grows=grows) if m in groups else step.task_bytes for m in modules}
    reads = {m: sum(4 * g.dim * g.count for g in groups.get(m, ())) for m in modules}
    alone = max((held_bytes(both, s, grows=grows) for both in groups.values()), default=0)
    most = step.task_bytes - (step.least_bytes - step.shared_bytes - alone)  # beside what reading takes
    for count in range(step.concurrency, len(modules), step.concurrency):
        parts = _split(modules, [held[m] + reads[m] for m in modules], count)
        if all(sum(held[m] for m in p) <= most and sum(reads[m] for m in p) <= PORTION_READS for p in parts):
            return parts
    return [(m,) for m in modules]


def _split(items: Sequence[str], costs: Sequence[int], count: int) -> list[tuple[str, ...]]:
    """Items, in order, in `count` parts of nearly the same cost; none is empty."""
    total, done = max(1, sum(costs)), 0
    parts: list[list[str]] = [[] for _ in range(count)]
    for item, cost in zip(items, costs, strict=True):
        parts[min(count - 1, (done + cost // 2) * count // total)].append(item)
        done += cost
    return [tuple(part) for part in parts if part]


def held_bytes(both: Iterable[Group], s: Settings, *, grows: bool) -> int:
    """What is in memory of a module while it is summed, and fitted if moments are freed at once."""
    both = list(both)
    sums = sum(_sum_bytes(g, s) + (_kept_bytes(g, s) if grows else 0) for g in both)
    return max(sums, *(_fit_bytes(g, s) for g in both)) if s.discard_moments else sums


def _sum_bytes(g: Group, s: Settings) -> int:
    height = _height(g, s)
    part = min(height, g.count) if g.count > QUANTUM and (g.count <= height or height % QUANTUM) else 0
    rows = min(QUANTUM, g.count) + (part if g.stacked else g.dim)  # the block; and what is written at once, or S
    return rows * g.dim * ITEM[s.moment_dtype]


def _kept_bytes(g: Group, s: Settings) -> int:
    """Of stacked columns that are there already, and go into new ones or into a sum."""
    return g.dim * min(g.count, 2 * g.dim) * (ITEM[s.moment_dtype] + 8) if g.stacked else 0


def _fit_bytes(g: Group, s: Settings) -> int:
    item, most = ITEM[s.moment_dtype], max(1, min(g.dim, g.count))
    k = most if s.num_components == "auto" else g.components(s)
    polish = 8 * (6 * g.dim * k + 3 * k * k)  # the solver's vectors, those of QR and Ritz, the rounded ones
    return moment_bytes(g, s) + max(_chunk_bytes(g, s), polish, _solver_bytes(g, k, item))  # one after the other


def _solver_bytes(g: Group, k: int, item: int) -> int:
    """What `eigen.leading` needs beside the moment, by its table; `eigen.spectrum` needs no more."""
    size = min(g.dim, g.count) if g.stacked else g.dim
    if suits_krylov(size, k):
        b, most = width(k), capacity(k)
        space = item * g.dim * (most + (k + most) // 2 + 6 * b) + 8 * g.dim * b  # and what it is cut to; blocks
        return space + 8 * 6 * most**2 + (item + 1) * max(g.count if g.stacked else g.dim, STRIP) * b
    wide = 8 if g.stacked and g.count <= g.dim else item
    strips = 8 * (1024 * g.count if g.stacked else 0) + 8 * STRIP * g.dim
    return strips + wide * size * (3 * size + 40)  # of syevd, where syevr, whose size + k is less, finds too few


def moment_bytes(g: Group, s: Settings) -> int:
    """Bytes of the moment of a group."""
    return g.dim * _rows(g) * ITEM[s.moment_dtype]


def stored_moment(g: Group, s: Settings) -> tuple[int, int]:
    """Bytes and files of the moment of a group on disk: its chunks, and its sum."""
    chunks = -(-_rows(g) // _height(g, s))
    return chunks * (_chunk_bytes(g, s) + 4) + 8 * g.dim + 4, chunks + 1


def beside_moments(groups: Sequence[Group], adapters: Sequence[Adapter], s: Settings) -> tuple[int, int]:
    """Bytes and files of a workspace beside moments and the numbers of bases: what says what they are, and are of."""
    arrays = {(g.side, g.dim, g.stacked, g.count if g.stacked else 0) for g in groups}
    kinds, modules = len(examples(adapters)), len(groups) // 2
    of_group = sum(ARRAY_NAME_BYTES * 2 + 2 * len(g.module) + EIGENVALUE_BYTES * g.components(s) for g in groups)
    size = of_group + (MARKER_BYTES + FACTS_BYTES) * modules + METADATA_BYTES * (1 + 2 * len(arrays))
    size += PLANNED_BYTES * len(groups) + ADMITTED_BYTES * len(adapters)
    markers = 0 if s.discard_moments else modules
    return size, OWN_FILES + kinds + 2 * len(arrays) + markers + 2 * modules


def _rows(g: Group) -> int:
    return g.count if g.stacked else g.dim


def _height(g: Group, s: Settings) -> int:
    """Rows of a chunk of the moment of a group."""
    return height_of("columns" if g.stacked else "second", _rows(g), g.dim, ITEM[s.moment_dtype])


def _chunk_bytes(g: Group, s: Settings) -> int:
    return _height(g, s) * g.dim * ITEM[s.moment_dtype]
