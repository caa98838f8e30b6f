"""The arithmetic of a plan: groups, and what each step reads and holds, in bytes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .entry import Entry
from .keys import SIDES, Side
from .layout import Module
from .settings import QUANTUM, Settings
from .subspace import break_even
from .tensorfile import CHUNK

# Resident bytes of the process before any work: interpreter, numpy, scipy, zarr; torch where a .bin is read.
PROCESS_BYTES = 192 << 20
TORCH_BYTES = 224 << 20
HUB_BYTES = 112 << 20  # its client, and 8 downloads that read 10 MiB at a time
BYTES_PER_ADAPTER = 4 << 10  # of a catalog entry and its receipt
BYTES_PER_RECORD = 1 << 10  # of a tensor in a layout; equal layouts are kept once
TILE_BYTES = 32 << 20  # tiles on their way into or out of Zarr


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
        """Whether the stacked columns (n, d) are kept, being no larger than the second moment (d, d)."""
        return self.count <= self.dim

    def components(self, settings: Settings) -> int:
        """k: as asked, clamped to min(d, n); for `auto`, which only the moment knows, the break-even."""
        most = max(1, min(self.dim, self.count))
        if settings.num_components == "auto":
            return max(1, min(most, round(break_even(self.dim, self.count))))
        return min(settings.num_components, most)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the pipeline: `tasks` tasks that need `task_bytes` each beside `shared_bytes` for all."""

    name: str
    tasks: int
    read_bytes: int
    task_bytes: int
    shared_bytes: int
    concurrency: int

    @property
    def peak_bytes(self) -> int:
        """Resident bytes at the peak of this step."""
        return self.shared_bytes + max(1, self.concurrency) * self.task_bytes


def examples(entries: Iterable[Entry]) -> list[Entry]:
    """One entry of each layout."""
    return list({e.layout.digest: e for e in entries}.values())


def groups_of(entries: Iterable[Entry]) -> tuple[Group, ...]:
    """The groups that some adapters form, sorted by module, A before B."""
    uses = Counter(e.layout.digest for e in entries)
    modules: dict[str, list[tuple[Module, int]]] = {}
    for entry in examples(entries):
        for module in entry.layout.modules:
            modules.setdefault(module.name, []).append((module, uses[entry.layout.digest]))
    return tuple(
        Group(name, side, found[0][0].dim(side), sum(m.rank * n for m, n in found), sum(n for _, n in found))
        for name, found in sorted(modules.items())
        for side in SIDES
    )


def steps_of(
    entries: tuple[Entry, ...], groups: tuple[Group, ...], s: Settings, storage: str, *, grows: bool
) -> tuple[Step, ...]:
    """What the passes over these adapters and groups cost; `grows` if there may be moments to add to."""
    pickled = max((f.size for e in entries for f in e.files if f.path.suffix == ".bin"), default=0)
    tensors = sum(len(e.layout.in_file_order) for e in examples(entries))
    process = PROCESS_BYTES + BYTES_PER_ADAPTER * len(entries) + BYTES_PER_RECORD * tensors
    process += TORCH_BYTES if pickled or s.device != "cpu" else 0
    process += HUB_BYTES if any(e.origin is not None for e in entries) else 0
    total = sum(f.size for e in entries for f in e.files)
    lora = sum(e.layout.lora_bytes for e in entries)
    pair = max((4 * m.rank * (m.dim("A") + m.dim("B")) for e in examples(entries) for m in e.layout.modules), default=0)
    components = sum(4 * g.dim * g.components(s) for g in groups)
    by_module: dict[str, list[Group]] = {}
    for g in groups:
        by_module.setdefault(g.module, []).append(g)
    sums = max((sum(_sum_bytes(g, s) for g in both) for both in by_module.values()), default=0)
    fits = max((_fit_bytes(g, s) for g in groups), default=0)
    widest_pair = max((sum(8 * g.dim * g.components(s) for g in both) for both in by_module.values()), default=0)
    k = {g.module: sum(h.components(s) for h in by_module[g.module]) for g in groups}
    loadings = 4 * max((sum(k[m.name] * m.rank for m in e.layout.modules) for e in examples(entries)), default=0)
    mapped = storage == "F32"  # other components are widened when they are used
    buffers = 2 * CHUNK + pickled  # a chunk being hashed or copied; a .bin is read whole
    modules, adapters = len(by_module), len(entries)
    sums += max((sum(_kept_bytes(g, s) for g in both) for both in by_module.values()), default=0) if grows else 0
    sums = max(sums, fits) if s.discard_moments else sums  # a module is fitted as soon as it is summed

    def step(name: str, tasks: int, read: int, task: int, shared: int = 0) -> Step:
        room = (s.memory - process - shared) // max(task, 1)
        at_once = max(1, min(s.workers or os.cpu_count() or 1, room))
        return Step(name, tasks, read, task, process + shared, at_once)

    return (
        step("ingest", adapters, total, 4 * pair + buffers),
        step("accumulate", modules, lora, sums + 4 * pair + TILE_BYTES + pickled),
        step("fit", modules, 0, fits + TILE_BYTES),
        step("project", adapters, total, 7 * pair + widest_pair + loadings + buffers, components if mapped else 0),
    )


def _sum_bytes(g: Group, s: Settings) -> int:
    item = {"float32": 4, "float64": 8}[s.moment_dtype]
    second = 0 if g.stacked else g.dim * g.dim * item
    return second + QUANTUM * g.dim * item + (8 << 20)  # the block, and strips of it in float64


def _kept_bytes(g: Group, s: Settings) -> int:
    """Of stacked columns that are there already, and go into new ones or into a sum."""
    return g.dim * min(g.count, g.dim) * ({"float32": 4, "float64": 8}[s.moment_dtype] + 8) if g.stacked else 0


def _fit_bytes(g: Group, s: Settings) -> int:
    item = {"float32": 4, "float64": 8}[s.moment_dtype]
    most = max(1, min(g.dim, g.count))
    k = most if s.num_components == "auto" else g.components(s)
    polish = 8 * (6 * g.dim * k + 3 * k * k)  # the solver's vectors, those of QR and Ritz, the rounded ones
    if g.stacked:
        return g.count * g.dim * item + 8 * (3 * g.count * g.count + 2 * 1024 * g.count) + polish
    solver = item * g.dim * (2 * k + 20) if 16 * k <= g.dim else 3 * 8 * g.dim * g.dim
    return g.dim * g.dim * item + solver + polish
