"""A sample of a collection: which adapters and modules, and their factors, read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.keys import SIDES, Side
from ..linalg.types import Float64
from .measure import Blocks, Float32, factored

T = TypeVar("T")
ADAPTERS = 64  # of a sample, if nothing is said of it
ROWS = 1024  # of a group, which a sample that nothing is said of does not exceed
FEWEST = 8
WORK = 2e12  # flops, about half a minute on two cores


@dataclass(frozen=True)
class Part:
    """What one adapter brings to one module: see `Blocks`; arrays (E, r, d) and (E, r), and lora_A's rows (E r, d)."""

    rows: Mapping[Side, Float32]
    weights: Float64
    strengths: Float64
    initial: Float32


def spread(items: Sequence[T], count: int) -> list[T]:
    """So many of the items, all if they are fewer, at equal distances over all.

    >>> spread("abcdefgh", 3)
    ['b', 'e', 'g']
    """
    n = len(items)
    return list(items) if n <= count else [items[(2 * i + 1) * n // (2 * count)] for i in range(count)]


def sampled(adapters: Sequence[Adapter], count: int | None) -> list[Adapter]:
    """The adapters to look at: `count`, or as many as give `ROWS` vectors to a group, from `FEWEST` to `ADAPTERS`."""
    if count is not None:
        return spread(adapters, count)
    chosen = spread(adapters, ADAPTERS)
    while len(chosen) > FEWEST and max(_rows(chosen).values(), default=0) > ROWS:
        chosen = spread(adapters, max(FEWEST, 3 * len(chosen) // 4))
    return chosen


def _rows(adapters: Iterable[Adapter]) -> Counter[str]:
    """Vectors of every module, n."""
    count: Counter[str] = Counter()
    for adapter in adapters:
        for m in adapter.layout.modules:
            count[m.name] += m.rank
    return count


def rows_in(adapters: Iterable[Adapter], modules: Iterable[str]) -> int:
    """Vectors of some modules, n, summed over them."""
    rows = _rows(adapters)
    return sum(rows[m] for m in modules)


def kind_of(module: str) -> str:
    """The kind of a module: the last part of its path.

    >>> kind_of("model.layers.0.self_attn.q_proj")
    'q_proj'
    """
    return module.rpartition(".")[2]


def chosen_modules(adapters: Iterable[Adapter], work: float = WORK) -> tuple[list[str], int]:
    """The modules to look at, of every kind as large a part, spread over the depth; and how many there are."""
    adapters = list(adapters)
    rows, shapes = _rows(adapters), {m.name: m for e in adapters for m in e.layout.modules}
    total = sum(work_of(rows[name], m.dim(side)) for name, m in shapes.items() for side in SIDES)
    share = min(1.0, work / max(1.0, total))
    kinds: dict[str, list[str]] = {}
    for name in sorted(shapes, key=_by_depth):
        kinds.setdefault(kind_of(name), []).append(name)
    picked = [m for some in kinds.values() for m in spread(some, max(1, round(share * len(some))))]
    return sorted(picked, key=_by_depth), len(shapes)


def work_of(count: int, dim: int) -> float:
    """Flops of measuring one side of a module of n rows of length d: Gram matrices, and eigenvectors, twice."""
    small = min(count, dim)
    return 4.0 * count * count * dim + 40.0 * small**3 + 8.0 * count * count * small


def _by_depth(module: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", module)]


def read_parts(adapter: Adapter, modules: Iterable[str], objective: str, norm: float) -> dict[str, Part]:
    """What an adapter brings to some modules, of which it may lack some.

    Args:
        adapter: the adapter. modules: their names.
        objective: as for `factored`.
        norm: ||dW_i||, above 0.

    Raises:
        AdapterError: if its files are not what they were.
    """
    parts: dict[str, Part] = {}
    held = [m for m in modules if m in adapter.layout.by_name]
    with adapter.open() as tensors:
        for module_batch in adapter.batches_of(held):
            factors = module_batch.read(tensors)
            scalings = adapter.scalings_of(module_batch.names)
            rows, weights, strengths = factored(factors["A"], factors["B"], scalings, objective)
            weights = weights if objective == "factors" else weights / norm
            lengths = np.linalg.norm(factors["A"], axis=-1, keepdims=True)
            initial = factors["A"] / np.where(lengths > 0, lengths, 1.0)
            for i, name in enumerate(module_batch.names):
                own = {side: rows[side][i].copy() for side in SIDES}  # the files are unmapped
                parts[name] = Part(own, weights[i], strengths[i] / norm, initial[i])
    return parts


def blocks_of(parts: Mapping[int, Part]) -> Blocks:
    """One module of some adapters, by their numbers."""
    numbers = sorted(parts)
    some = [parts[i] for i in numbers]
    experts = [p.weights.shape[0] for p in some]
    places = [np.arange(len(p.initial)) for p in some]
    return Blocks(
        rows={side: np.concatenate([p.rows[side].reshape(-1, p.rows[side].shape[-1]) for p in some]) for side in SIDES},
        weights=np.concatenate([p.weights.ravel() for p in some]),
        strengths=np.concatenate([p.strengths.ravel() for p in some]),
        ranks=np.repeat([p.weights.shape[1] for p in some], experts),
        owners=np.repeat(numbers, experts),
        initial=np.concatenate([p.initial for p in some]),
        initial_owners=np.repeat(numbers, [len(p) for p in places]),
        initial_places=np.concatenate(places),
    )
