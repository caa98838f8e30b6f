"""Stream: the integers of one adapter as bytes, and back.

    step     float64, little-endian: of the coefficients of dW itself
    words    of the range coder, 32 bits each, little-endian:
             for each group (the pairs of one shape r, d_out, d_in; shapes ascending, pairs in the order of the modules)
                 how many columns each pair has, as differences
                 the classes of the first column of each pair, of the others, and of all on the right, as differences
             the integers, class by class: all columns on the left, then all on the right; last, what has escaped

There are no bytes for an adapter whose dW is zero. A pair is the sum of qB_j qA_j' step / |qB_j| over its columns, of
which those that are zero are left out; the others come in the order of the singular values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, log2

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..linalg.types import Array
from .entropy import Decoder, Encoder, differences, kinds_of
from .quantiser import HIGHEST, LOWEST, PER_OCTAVE, Ints

Shape = tuple[int, int, int]  # r, d_out, d_in
Columns = list[tuple[Ints, Array]]  # of each group on one side: classes (n,), and integers (n, d)
_STEP = struct.Struct("<d")
_RANGE = HIGHEST - LOWEST  # of differences of classes
_COUNTS = (0.45, 0.45)  # of a difference: how much rarer the next higher, and the next lower one is
_FIRST, _NEXT, _RIGHT = (_RANGE, 0.6, 0.6), (_RANGE, 0.35, 0.65, -1), (_RANGE, 0.1, 0.3)


@dataclass(frozen=True)
class Group:
    """The pairs of one shape: integers left (n, r, d_out) and right (n, r, d_in)."""

    left: Array
    right: Array

    @property
    def shape(self) -> Shape:
        """r, d_out, d_in."""
        return self.left.shape[1], self.left.shape[2], self.right.shape[2]


def encode(groups: Sequence[Group], step: float) -> bytes:
    """The code of an adapter.

    Args:
        groups: of ascending shapes, none twice. A column is zero on both sides or on none.
        step: of the coefficients of dW itself.
    """
    coder = Encoder()
    sides: tuple[Columns, Columns] = ([], [])
    for group in groups:
        (r, d_out, d_in), live = group.shape, group.left.any(axis=-1)
        counts, begins = live.sum(axis=-1), _begins(live.sum(axis=-1))
        rows = group.left[live], group.right[live]
        left, right = (kinds_of(side)[0] for side in rows)
        coder.put(np.diff(counts, prepend=0) + r, differences(r, *_COUNTS))
        coder.put(np.diff(left[begins], prepend=0) + _RANGE, differences(*_FIRST))
        coder.put(np.diff(left, prepend=0)[~begins] + _RANGE, differences(*_NEXT))
        coder.put(right - _expected(left, d_out, d_in) + _RANGE, differences(*_RIGHT))
        for side, kinds, values in zip(sides, (left, right), rows, strict=True):
            side.append((kinds, values))
    every = [*sides[0], *sides[1]]
    for kind in _present(kinds for kinds, _ in every):
        coder.integers(np.concatenate([rows[kinds == kind].ravel() for kinds, rows in every]).astype(np.int64), kind)
    return _STEP.pack(step) + coder.finish() if any(len(rows) for _, rows in every) else b""


def decode(code: bytes, shapes: Sequence[tuple[Shape, int]]) -> tuple[list[Group], float]:
    """The integers and the step of a code whose digest was found right.

    Args:
        code: of an adapter.
        shapes: of its groups, ascending, and how many pairs each has.

    Raises:
        CheckpointError: if it is no code of such groups.
    """
    if not code:
        return [Group(*(np.zeros((n, r, d), np.float32) for d in (d_out, d_in))) for (r, d_out, d_in), n in shapes], 0.0
    if len(code) % 4 or len(code) < _STEP.size or not isfinite(step := _STEP.unpack_from(code)[0]) or step <= 0:
        raise _no_code(f"{len(code)} bytes")
    try:
        return _decoded(Decoder(code[_STEP.size :]), shapes), step
    except (AssertionError, OverflowError) as e:  # of constriction: words that no encoder writes; of an escape
        raise _no_code(str(e)) from e


def _decoded(coder: Decoder, shapes: Sequence[tuple[Shape, int]]) -> list[Group]:
    found: list[tuple[NDArray[np.bool_], tuple[int, int, int, int]]] = []
    sides: tuple[Columns, Columns] = ([], [])
    for (r, d_out, d_in), n in shapes:
        counts = np.cumsum(coder.get(n, differences(r, *_COUNTS)) - r)
        if counts.min(initial=0) < 0 or counts.max(initial=0) > r:
            raise _no_code(f"{counts.max(initial=0)} columns of {r}")
        total, begins = int(counts.sum()), _begins(counts)
        steps = np.empty(total, np.int64)
        steps[begins] = np.cumsum(coder.get(int(begins.sum()), differences(*_FIRST)) - _RANGE)
        steps[~begins] = coder.get(int((~begins).sum()), differences(*_NEXT)) - _RANGE
        left = np.cumsum(steps)
        left -= np.repeat((left - steps)[begins], counts[counts > 0])
        right = _expected(left, d_out, d_in) + coder.get(total, differences(*_RIGHT)) - _RANGE
        live = np.arange(r) < counts[:, None]
        for side, kinds, d in zip(sides, (left, right), (d_out, d_in), strict=True):
            if kinds.min(initial=LOWEST) < LOWEST or kinds.max(initial=LOWEST) > HIGHEST:
                raise _no_code("an unknown class")
            side.append((kinds, np.zeros((total, d), np.float32)))
        found.append((live, (n, r, d_out, d_in)))
    every = [*sides[0], *sides[1]]
    pending = []
    for kind in _present(kinds for kinds, _ in every):
        places = [(rows, kinds == kind) for kinds, rows in every]
        sizes = [int(at.sum()) * rows.shape[1] for rows, at in places]
        pending.append((places, sizes, coder.integers(sum(sizes), kind)))
    coder.finish()
    for places, sizes, values in pending:
        for (rows, at), part in zip(places, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
            rows[at] = part.reshape(-1, rows.shape[1])
    return [_spread(live, shape, a[1], b[1]) for (live, shape), a, b in zip(found, *sides, strict=True)]


def _begins(counts: Ints) -> NDArray[np.bool_]:
    """Which columns are the first of their pair, given how many each pair has."""
    found = np.zeros(int(counts.sum()), bool)
    found[(np.cumsum(counts) - counts)[counts > 0]] = True
    return found


def _expected(left: Ints, d_out: int, d_in: int) -> Ints:
    """The class on the right of columns that have the same length as on the left."""
    return np.clip(left + round(PER_OCTAVE / 2 * log2(d_out / d_in)), LOWEST, HIGHEST)


def _present(kinds: Iterator[Ints]) -> list[int]:
    """The classes that some columns have, ascending."""
    found: list[int] = np.unique(np.concatenate([np.zeros(0, np.int64), *kinds])).tolist()
    return found


def _spread(live: NDArray[np.bool_], shape: tuple[int, int, int, int], left: Array, right: Array) -> Group:
    n, r, d_out, d_in = shape
    group = Group(np.zeros((n, r, d_out), np.float32), np.zeros((n, r, d_in), np.float32))
    group.left[live], group.right[live] = left, right
    return group


def _no_code(found: str) -> CheckpointError:
    return CheckpointError("the code of an adapter is none that belongs to its shapes", found=found,
                           remedy="Fetch the checkpoint again, or compress its sources again.")  # fmt: skip
