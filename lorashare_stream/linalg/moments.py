"""The additive statistic of a group.

A moment of oriented vectors X (d, n), one column a vector, is what a basis is fitted to:

    second  S = X X'   (d, d)        or, while n <= 2d,       columns  X' (n, d), one vector a row
    sum     s = X 1    (d,)  float64
    count   n
    energy  tr S             float64, summed from the vectors themselves

Both forms are exact and hold the same. Columns are kept up to n = 2d: S would save half of them at most, and costs
n d^2 flops, while few components of columns cost a fraction of that (`eigen`). Blocks of any size give the same moment
up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.linalg import blas

from ..adapters.dtypes import Array, Float64
from ..settings import QUANTUM

_STRIP = 1 << 17  # numbers that are turned into float64 at once


@dataclass(frozen=True)
class Moment:
    """The statistic in one form.

    Attributes:
        second: S (d, d), symmetric, column-major, float32 or float64; or None.
        columns: X' (n, d), float32 or float64; or None. One of the two is there, unless it is on disk.
        sum: s (d,) float64.
        count: n.
        energy: tr S, float64.
    """

    second: Array | None
    columns: Array | None
    sum: Float64
    count: int
    energy: float

    @property
    def dim(self) -> int:
        """d, the length of a vector."""
        return len(self.sum)

    @property
    def rows(self) -> Array:
        """X' (n, d) or S (d, d), row-major, whichever is kept."""
        if self.columns is not None:
            return self.columns
        assert self.second is not None
        return self.second.T


def stays_stacked(count: int, dim: int) -> bool:
    """Whether n vectors of length d are kept as columns."""
    return count <= 2 * dim


def empty(dim: int, dtype: str = "float32", *, stacked: bool = False) -> Moment:
    """The moment of no vectors."""
    return Moment(
        None if stacked else np.zeros((dim, dim), dtype, order="F"),
        np.zeros((0, dim), dtype) if stacked else None,
        np.zeros(dim),
        0,
        0.0,
    )


def of_columns(rows: Array) -> Moment:
    """The stacked moment of vectors given as rows (n, d)."""
    wide = rows.astype(np.float64, copy=False)
    return Moment(None, rows, wide.sum(axis=0), len(rows), float(np.einsum("ij,ij->", wide, wide)))


def mirror(second: Array, tile: int = 256) -> None:
    """Copy the lower triangle of S (d, d) onto the upper one, in place, tile by tile."""
    for i in range(0, len(second), tile):
        rows = second[i : i + tile]
        for j in range(0, i, tile):
            second[j : j + tile, i : i + tile] = rows[:, j : j + tile].T
        middle = rows[:, i : i + tile]
        np.copyto(middle, middle.T.copy(), where=~np.tri(len(middle), dtype=bool))


def add_block(second: Array, rows: Array) -> None:
    """S += X X' in place, lower triangle only: BLAS syrk, half the flops of a product.

    Args:
        second: S (d, d), column-major, float32 or float64.
        rows: X' (m, d), row-major, of the same dtype.

    Raises:
        ValueError: for other arrays, of which SciPy would make copies.
    """
    if not second.flags.f_contiguous or not rows.flags.c_contiguous or second.dtype != rows.dtype:
        raise ValueError("syrk needs column-major S and row-major X' of one dtype")
    syrk = blas.dsyrk if second.dtype == np.float64 else blas.ssyrk
    syrk(1.0, rows.T, beta=1.0, c=second, overwrite_c=True, lower=True)


class Sum(Protocol):
    """A sum of blocks of vectors (m, d), each of which is overwritten afterwards."""

    def add(self, block: Array) -> None:
        """Add a block (m, d)."""

    def result(self) -> Array | None:
        """S (d, d), or None where the columns are kept."""


class HostSum:
    """S += X X' on the CPU. `start` is added to: its `second` in place, its `columns` summed."""

    def __init__(self, start: Moment) -> None:
        if start.second is not None:
            self._second = start.second
        else:
            self._second = np.empty((start.dim, start.dim), start.rows.dtype, order="F")
            self._second.fill(0)  # written, not mapped to the page of zeros: syrk would fault on every page once more
            if len(start.rows):
                add_block(self._second, np.ascontiguousarray(start.rows))

    def add(self, block: Array) -> None:
        """Add a block (m, d)."""
        add_block(self._second, block)

    def result(self) -> Array:
        """S (d, d)."""
        mirror(self._second)
        return self._second


class Accumulator:
    """Adds vectors to the moment `start` in blocks of exactly `quantum`, counted from the first vector that is added.

    Sums depend on the grouping in their last bits. Quanta make them depend on what is added to what, in
    the order of admission, and not on memory, workers or interruptions. Growing in two steps is another
    grouping than adding all at once.

    Args:
        start: the moment to add to.
        into: the sum of the blocks, in which `start` is already.

    Attributes:
        block: vectors that are not summed yet (quantum, d), as far as it is `filled`.
    """

    def __init__(self, start: Moment, into: Sum, quantum: int = QUANTUM) -> None:
        self._into = into
        self._sum, self._count, self._energy = start.sum.copy(), start.count, start.energy
        self.block: Array = np.empty((quantum, start.dim), start.rows.dtype)
        self.filled = 0

    def add(self, rows: Array) -> None:
        """Add vectors, given as rows (m, d)."""
        start = 0
        while start < len(rows):
            take = min(len(self.block) - self.filled, len(rows) - start)
            self.block[self.filled : self.filled + take] = rows[start : start + take]
            start += take
            self.fill(self.filled + take)

    def fill(self, end: int) -> None:
        """Say that the block holds `end` vectors."""
        self.filled = end
        if end == len(self.block):
            self._flush()

    def _flush(self) -> None:
        block = self.block[: self.filled]
        self.filled = 0
        height = max(1, _STRIP // block.shape[1])
        wide = np.empty((min(height, len(block)), block.shape[1]))  # which stays in the cache
        ones = np.ones(len(wide))
        for start in range(0, len(block), height):
            strip = wide[: len(block) - start]
            strip[...] = block[start : start + height]
            self._sum += ones[: len(strip)] @ strip
            self._energy += float(np.vdot(strip, strip))
        self._count += len(block)
        self._into.add(block)

    def finish(self) -> Moment:
        """The moment; if its columns were kept elsewhere, neither form is in memory."""
        if self.filled:
            self._flush()
        return Moment(self._into.result(), None, self._sum, self._count, self._energy)


class Lockstep:
    """Accumulators of one d to which the same numbers of vectors are mostly added: their blocks lie in one array.

    A block for each costs a call for each, which for small vectors takes longer than the arithmetic.
    """

    def __init__(self, accumulators: Sequence[Accumulator]) -> None:
        self._each = accumulators
        first = accumulators[0]
        self._blocks: Array | None = None
        if len(accumulators) > 1 and all(a.filled == 0 and a.block.dtype == first.block.dtype for a in accumulators):
            self._blocks = np.empty((len(accumulators), *first.block.shape), first.block.dtype)
            for accumulator, block in zip(accumulators, self._blocks, strict=True):
                accumulator.block = block

    def add(self, rows: Array) -> None:
        """Add vectors to each, given as rows (m, r, d)."""
        start = self._each[0].filled
        end = start + rows.shape[1]
        if self._blocks is not None and any(a.block.base is not self._blocks for a in self._each):
            self._blocks = None  # some go in step with others since
        if self._blocks is None or end > self._blocks.shape[1] or not all(a.filled == start for a in self._each):
            for accumulator, own in zip(self._each, rows, strict=True):
                accumulator.add(own)
            return
        self._blocks[:, start:end] = rows
        for accumulator in self._each:
            accumulator.fill(end)


def partner_root(gram: Float64, factor: float | Float64) -> Float64:
    """Factor * M^(1/2) of the partner's Gram matrices M (..., r, r): what weights a side under `delta`.

    With R this root, (W R)(W R)' = factor^2 W M W'. Symmetric, so (A, B) -> (QA, BQ') leaves W R a
    rotation of itself.
    """
    values, vectors = np.linalg.eigh(gram)
    halves = np.sqrt(np.clip(values, 0.0, None))[..., None, :]
    root: Float64 = factor * (vectors * halves) @ np.swapaxes(vectors, -1, -2)
    return root
