"""The plan: what will be read, computed and written, in bytes, before anything is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .catalog import Catalog
from .dtypes import ITEMSIZE, STORAGE, widest
from .entry import Entry
from .errors import AdapterError, BudgetError, CollectionError, refusal
from .keys import SIDES, Side, group_id
from .layout import Module
from .names import bytes_shown
from .settings import QUANTUM, Settings
from .subspace import break_even
from .tensorfile import CHUNK
from .workspace import digest_of, skipped_as_json

# Resident bytes of the process before any work: interpreter, numpy, scipy, zarr; torch where a .bin is read.
PROCESS_BYTES = 192 << 20
TORCH_BYTES = 224 << 20
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


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        settings: as asked.
        entries: the adapters, in the order in which they will be admitted.
        refused: those left out, with the reason.
        groups: all groups, sorted by module, A before B.
        storage: dtype of components and loadings as safetensors names it: F32, BF16 or F16.
        steps: the passes.
        base_model: the base model that the adapters are taken to be of; empty if nothing names it.
        inner: name -> subfolders of an adapter's folder that hold adapters too, which are not taken.
        bound_base: the name of it to which the workspace is bound.
    """

    settings: Settings
    entries: tuple[Entry, ...]
    refused: tuple[AdapterError, ...]
    groups: tuple[Group, ...]
    storage: str
    steps: tuple[Step, ...]
    base_model: str
    inner: Mapping[str, tuple[str, ...]]
    bound_base: str

    @cached_property
    def binding(self) -> dict[str, Any]:
        """What the numbers of a workspace depend on."""
        return self.settings.binding() | {"base_model": self.bound_base}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that decides the checkpoint: settings that change numbers, and the adapters."""
        s = self.settings
        adapters = [(e.name, e.source_id, e.layout.digest, e.config_digest) for e in self.entries]
        sizes = [[f.size for f in e.files] for e in self.entries]
        return digest_of(
            [self.binding, self.base_model, s.num_components, s.variance_threshold, self.storage, adapters, sizes]
        )

    def step(self, name: str) -> Step:
        """A step by name."""
        return next(s for s in self.steps if s.name == name)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes on disk: of the originals, their LoRA part, the workspace and the checkpoint (an estimate
        where k is `auto`).
        """
        item = ITEMSIZE[self.storage]
        k = {(g.module, g.side): g.components(self.settings) for g in self.groups}
        moment = {"float32": 4, "float64": 8}[self.settings.moment_dtype]
        basis = sum(k[g.module, g.side] * g.dim for g in self.groups) * item
        loadings = sum(k[g.module, g.side] * g.count for g in self.groups) * item
        return {
            "originals": sum(f.size for e in self.entries for f in e.files),
            "lora": sum(e.layout.lora_bytes for e in self.entries),
            "verbatim": sum(e.layout.extra_bytes for e in self.entries),
            "moments": sum(g.dim * min(g.dim, g.count) for g in self.groups) * moment,
            "basis": basis,
            "loadings": loadings,
            "checkpoint": basis + loadings + sum(e.layout.extra_bytes for e in self.entries),
        }

    def validate(self) -> None:
        """Refuse what headers and arithmetic already show to be impossible.

        Raises:
            CollectionError: naming every adapter that is refused (unless they may be skipped), or if
                fewer than two are left.
            BudgetError: with the smallest memory that suffices.
        """
        if self.refused and self.settings.on_error == "raise":
            raise refusal(
                f"{len(self.refused)} of {len(self.refused) + len(self.entries)} adapters cannot be compressed",
                self.refused,
                "Leave them out, or go on without them by --on-error skip.",
            )
        check_enough(len(self.entries), self.refused)
        least = max((s.shared_bytes + s.task_bytes for s in self.steps), default=0)
        if least > self.settings.memory:
            step = max(self.steps, key=lambda s: s.shared_bytes + s.task_bytes)
            raise BudgetError(
                f"the memory budget cannot hold one task of the step {step.name!r}",
                found=bytes_shown(self.settings.memory),
                expected=f"at least {bytes_shown(least)} ({least} bytes)",
                remedy=f"Use --memory {-(-least >> 20) + 1}MiB or more.",
            )


def check_enough(count: int, refused: Iterable[AdapterError]) -> None:
    """Demand two adapters, as lorashare does.

    Raises:
        CollectionError: if there are fewer.
    """
    if count < 2:
        raise CollectionError(
            "sharing needs at least two adapters",
            problems=tuple(refused),
            found=count,
            expected="2 or more",
            remedy="Add adapters of the same base model.",
        )


def make_plan(found: Catalog, settings: Settings, bound_base: str | None = None) -> Plan:
    """Arithmetic on a catalog: groups, statistics, bytes of every step, tasks at a time."""
    bound = bound_base if bound_base is not None and bound_base in settings.base_aliases else found.base_model
    groups = _groups(found.entries)
    dtypes = {r.dtype for e in _examples(found.entries) for m in e.layout.modules for r in (m.a, m.b)}
    storage = widest(dtypes) if settings.dtype == "auto" else STORAGE[settings.dtype]
    steps = _steps(found.entries, groups, settings, storage)
    return Plan(settings, found.entries, found.refused, groups, storage, steps, found.base_model, found.inner, bound)


def _examples(entries: Iterable[Entry]) -> list[Entry]:
    """One entry of each layout."""
    return list({e.layout.digest: e for e in entries}.values())


def _groups(entries: Iterable[Entry]) -> tuple[Group, ...]:
    uses = Counter(e.layout.digest for e in entries)
    modules: dict[str, list[tuple[Module, int]]] = {}
    for entry in _examples(entries):
        for module in entry.layout.modules:
            modules.setdefault(module.name, []).append((module, uses[entry.layout.digest]))
    return tuple(
        Group(name, side, found[0][0].dim(side), sum(m.rank * n for m, n in found), sum(n for _, n in found))
        for name, found in sorted(modules.items())
        for side in SIDES
    )


def _steps(entries: tuple[Entry, ...], groups: tuple[Group, ...], s: Settings, storage: str) -> tuple[Step, ...]:
    pickled = max((f.size for e in entries for f in e.files if f.path.suffix == ".bin"), default=0)
    tensors = sum(len(e.layout.in_file_order) for e in _examples(entries))
    process = PROCESS_BYTES + BYTES_PER_ADAPTER * len(entries) + BYTES_PER_RECORD * tensors
    process += TORCH_BYTES if pickled or s.device != "cpu" else 0
    total = sum(f.size for e in entries for f in e.files)
    lora = sum(e.layout.lora_bytes for e in entries)
    pair = max(
        (4 * m.rank * (m.dim("A") + m.dim("B")) for e in _examples(entries) for m in e.layout.modules), default=0
    )
    components = sum(4 * g.dim * g.components(s) for g in groups)
    by_module: dict[str, list[Group]] = {}
    for g in groups:
        by_module.setdefault(g.module, []).append(g)
    sums = max((sum(_sum_bytes(g, s) for g in both) for both in by_module.values()), default=0)
    fits = max((_fit_bytes(g, s) for g in groups), default=0)
    widest_pair = max((sum(8 * g.dim * g.components(s) for g in both) for both in by_module.values()), default=0)
    k = {g.module: sum(h.components(s) for h in by_module[g.module]) for g in groups}
    loadings = 4 * max((sum(k[m.name] * m.rank for m in e.layout.modules) for e in _examples(entries)), default=0)
    mapped = storage == "F32"  # other components are widened when they are used
    buffers = 2 * CHUNK + pickled  # a chunk being hashed or copied; a .bin is read whole
    modules, adapters = len(by_module), len(entries)

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


def _fit_bytes(g: Group, s: Settings) -> int:
    item = {"float32": 4, "float64": 8}[s.moment_dtype]
    most = max(1, min(g.dim, g.count))
    k = most if s.num_components == "auto" else g.components(s)
    polish = 8 * (6 * g.dim * k + 3 * k * k)  # the solver's vectors, those of QR and Ritz, the rounded ones
    if g.stacked:
        return g.count * g.dim * item + 8 * (3 * g.count * g.count + 2 * 1024 * g.count) + polish
    solver = item * g.dim * (2 * k + 20) if 16 * k <= g.dim else 3 * 8 * g.dim * g.dim
    return g.dim * g.dim * item + solver + polish


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: what `plan -o` writes and `compress --plan` reads back."""
    s = plan.settings
    return {
        "fingerprint": plan.fingerprint,
        "settings": s.as_dict(),
        "base_model": plan.base_model,
        "storage_dtype": plan.storage,
        "sizes": plan.sizes,
        "steps": [
            {
                "name": t.name, "tasks": t.tasks, "read_bytes": t.read_bytes, "peak_bytes": t.peak_bytes,
                "concurrency": t.concurrency,
            }
            for t in plan.steps
        ],
        "groups": [
            {
                "group": group_id(g.module, g.side), "d": g.dim, "n": g.count, "adapters": g.adapters,
                "statistic": "columns" if g.stacked else "second moment", "break_even_k": break_even(g.dim, g.count),
            }
            for g in plan.groups
        ],
        "adapters": [
            {"name": e.name, "path": str(e.folder.absolute()), "source_id": e.source_id} for e in plan.entries
        ],
        "refused": skipped_as_json(plan.refused),
    }  # fmt: skip
