"""Tensors of equal shape, read and computed together: a call for each tensor costs more than its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .dtypes import stacked
from .keys import SIDES, Side
from .safetensors import TensorReader, TensorRecord

STACK_BYTES = 2 << 20  # of what is handled at once, in float32; threads wait for each other at every call
Float32 = NDArray[np.float32]
FileItem = tuple[TensorRecord, str | None, Side | None]  # a tensor; module and side if it is shared


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted layer that is shared: lora_A (r, d_in) and lora_B (d_out, r), both 2-D and of float type."""

    name: str
    a: TensorRecord
    b: TensorRecord

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[0]

    def record(self, side: Side) -> TensorRecord:
        """The tensor of one side."""
        return self.a if side == "A" else self.b

    def dim(self, side: Side) -> int:
        """The length d of the vectors of one side: d_in for A, d_out for B."""
        return self.a.shape[1] if side == "A" else self.b.shape[0]

    @property
    def bytes(self) -> int:
        """Bytes of both sides in float32."""
        return 4 * self.rank * (self.dim("A") + self.dim("B"))


@dataclass(frozen=True)
class ModuleBatch:
    """Modules of one shape and dtype on each side: A is (m, r, d_in), B (m, d_out, r)."""

    modules: tuple[Module, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the modules."""
        return tuple(m.name for m in self.modules)

    @cached_property
    def _places(self) -> dict[Side, tuple[TensorRecord, list[int]]]:
        """By side, the last tensor in the file, and the offsets of all."""
        records = {side: [m.record(side) for m in self.modules] for side in SIDES}
        return {side: (max(some, key=lambda r: r.offset), [r.offset for r in some]) for side, some in records.items()}

    def read(self, tensors: TensorReader) -> dict[Side, Float32]:
        """The tensors, in their stored shapes: A (m, r, d_in), B (m, d_out, r); views where there can be."""
        return {
            side: stacked(tensors.through(last), offsets, last.dtype, last.shape)
            for side, (last, offsets) in self._places.items()
        }


def module_batches(modules: Iterable[Module], *, alone: bool = False) -> tuple[ModuleBatch, ...]:
    """Modules in batches of bounded size, in file order; each in one of its own if it is to be `alone`."""
    alike: dict[object, list[Module]] = {}
    for i, m in enumerate(sorted(modules, key=lambda m: (m.a.file, m.a.offset))):
        kind = m.a.file, m.b.file, m.a.shape, m.b.shape, m.a.dtype, m.b.dtype
        alike.setdefault((kind, alone and i), []).append(m)
    found = []
    for some in alike.values():
        size = max(1, STACK_BYTES // max(1, some[0].bytes))
        found += [ModuleBatch(tuple(some[i : i + size])) for i in range(0, len(some), size)]
    return tuple(found)


@dataclass(frozen=True)
class Chunk:
    """Neighbours in a file, and which of them are stacked: those of one side, shape and dtype, by number."""

    records: tuple[TensorRecord, ...]
    stacks: tuple[tuple[Side, tuple[str, ...], tuple[int, ...]], ...]

    def stacks_of(self, data: NDArray[np.uint8]) -> Iterator[tuple[Side, tuple[str, ...], Float32]]:
        """Side, names of the modules, and the tensors (m, *shape), of the bytes of their file."""
        for side, names, numbers in self.stacks:
            some = [self.records[i] for i in numbers]
            yield side, names, stacked(data, [r.offset for r in some], some[0].dtype, some[0].shape)


def chunks(items: Iterable[FileItem], *, alone: bool = False) -> tuple[Chunk, ...]:
    """All tensors of an adapter, in file order, in chunks of bounded size; what is not shared in chunks of its own."""
    parts: list[list[FileItem]] = []
    held = 0
    for item in items:
        record, module, _ = item
        size = 4 * math.prod(record.shape)
        last = parts[-1][-1] if parts else None
        fits = last is not None and last[0].file == record.file and None not in (last[1], module)
        if not fits or held + size > STACK_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(item)
        held += size
    return tuple(_chunk(part, alone=alone) for part in parts)


def _chunk(items: Sequence[FileItem], *, alone: bool) -> Chunk:
    alike: dict[tuple[Side, object], list[tuple[str, int]]] = {}
    for i, (record, module, side) in enumerate(items):
        if module is not None and side is not None:
            alike.setdefault((side, (record.shape, record.dtype, alone and i)), []).append((module, i))
    stacks = tuple((side, tuple(m for m, _ in some), tuple(i for _, i in some)) for (side, _), some in alike.items())
    return Chunk(tuple(record for record, _, _ in items), stacks)
