"""The modules of a sample, read and measured, as many at a time as memory holds."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.keys import SIDES, Side
from ..errors import BudgetError
from ..linalg.types import Float64
from ..machine import usable_cores
from ..plan.memory import PROCESS_BYTES, TORCH_BYTES
from ..plan.plan import Plan, cut
from ..runtime.executors import Mapper
from ..runtime.progress import Progress
from ..text import bytes_shown
from .measure import Capture, Measured, measure
from .outlook import ladder
from .sample import Part, blocks_of, kind_of, read_parts

SEED = 0  # of what chance gives


@dataclass
class Totals:
    """Sums over modules of what `Measured` has; adapters by number.

    Attributes:
        ks: the numbers of components.
        norms, found, chance, inner, parallel, compared: see `Measured`.
        sides: by side and kind, d and the measures of each module.
        sizes: of each module, d_in and d_out, and the energy of dW in it.
    """

    ks: list[int]
    norms: Float64
    found: Capture
    chance: Capture
    inner: Float64
    parallel: Float64
    compared: Float64
    sides: dict[tuple[Side, str], list[tuple[int, Measured]]]
    sizes: list[tuple[list[int], float]]

    def add(self, name: str, parts: Mapping[int, Part], one: Measured) -> None:
        """Add a module, measured, of some adapters."""
        self.norms += one.norms
        self.found, self.chance = self.found + one.found, self.chance + one.chance
        self.inner += one.inner
        self.parallel += one.parallel
        self.compared += one.compared
        dims = [next(iter(parts.values())).rows[side].shape[-1] for side in SIDES]
        self.sizes.append((dims, float(one.norms.sum())))
        for side, dim in zip(SIDES, dims, strict=True):
            self.sides.setdefault((side, kind_of(name)), []).append((dim, one))


@dataclass(frozen=True)
class Subject:
    """An adapter that is measured, its number, and its ||dW||, above 0."""

    number: int
    adapter: Adapter
    norm: float


def measured(
    plan: Plan, subjects: Sequence[Subject], modules: Sequence[str], mapper: Mapper, progress: Progress
) -> Totals:
    """Read and measure modules of some adapters; neither memory nor the mapper changes a bit.

    Raises:
        AdapterError: if files have changed.
        BudgetError: if memory does not hold one module.
    """
    count, objective = len(subjects), plan.settings.objective
    shapes = {m.name: (m.dim("A"), m.dim("B")) for s in subjects for m in s.adapter.layout.modules}
    rows = {name: sum(s.adapter.layout.by_name[name].rank for s in subjects if name in s.adapter.layout.by_name)
            for name in modules}  # fmt: skip
    held = {m: 4 * rows[m] * (2 * shapes[m][0] + shapes[m][1]) for m in modules}
    work = max(5 * held[m] + 12 * 8 * rows[m] ** 2 for m in modules)  # copies, noise, and a dozen Gram matrices
    room, at_once = _room(plan, subjects, max(held.values()), work)
    ks = ladder(max(min(rows[m], max(shapes[m])) for m in modules))
    zero, square = Capture(*(np.zeros((len(ks), count)) for _ in range(3))), (count, count)
    totals = Totals(ks, np.zeros(count), zero, zero, np.zeros(square), np.zeros(square), np.zeros(square), {}, [])

    def by_portion() -> Iterator[tuple[str, Mapping[int, Part], Measured]]:
        for portion in cut(modules, [held[m] for m in modules], room):
            read = partial(_read, modules=portion, objective=objective)
            every = list(mapper.map(read, subjects, at_once))
            parts = [{i: some.pop(m) for i, some in enumerate(every) if m in some} for m in portion]
            look = partial(_measure, adapters=count, ks=ks, center=plan.settings.center)
            yield from zip(portion, parts, mapper.map(look, zip(portion, parts, strict=True), at_once), strict=True)

    for name, parts, one in progress("analyse", len(modules), by_portion()):
        totals.add(name, parts, one)
    return totals


def _read(subject: Subject, modules: Sequence[str], objective: str) -> dict[str, Part]:
    return read_parts(subject.adapter, modules, objective, subject.norm)


def _measure(task: tuple[str, Mapping[int, Part]], adapters: int, ks: Sequence[int], *, center: bool) -> Measured:
    name, parts = task
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode("utf-8", "surrogatepass"))])
    return measure(blocks_of(parts), adapters, ks, rng, center=center)


def _room(plan: Plan, subjects: Sequence[Subject], held: int, work: int) -> tuple[int, int]:
    """Bytes for what is read at a time, and how many modules are measured at a time, which take `work` each.

    Raises:
        BudgetError: if memory does not hold one.
    """
    s = plan.settings
    pickled = max((f.size for e in subjects for f in e.adapter.files if f.path.suffix == ".bin"), default=0)
    process = PROCESS_BYTES + (TORCH_BYTES + pickled if pickled else 0)
    least = process + held + work
    if least > s.memory:
        raise BudgetError(
            "the memory budget cannot hold one module of the sample", found=bytes_shown(s.memory),
            expected=f"at least {bytes_shown(least)}",
            remedy=f"Use --memory {-(-least >> 20) + 1}MiB or more, or fewer adapters by --sample.",
        )  # fmt: skip
    room = s.memory - process
    at_once = max(1, min(s.workers or usable_cores(), room // 2 // work))
    return max(held, room - at_once * work), at_once
