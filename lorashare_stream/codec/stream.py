"""Stream: the integers of one adapter as bytes, and back.

    step     float64, little-endian: of the coefficients of dW itself
    words    of the range coder, 32 bits each, little-endian:
             for each group (the pairs of one shape r, d_out, d_in; shapes ascending, pairs in the order of the modules)
                 how many columns each pair has, as differences
                 the classes of the first column of each pair, of the others, and of all on the right, as differences
             the integers, class by class: of all columns on the left, then on the right; of the loadings of all columns
             on the left, then on the right; last, what has escaped

There are no bytes for an adapter whose dW is zero. A pair is the sum of qB_j qA_j' step / |qB_j| over its columns, of
which those that are zero are left out; the others come in the order of the singular values. In a checkpoint with common
directions the class of a column is that of its rest, and tells those of its loadings (`directions`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import isfinite, log2
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..adapters.dtypes import Array, Float64
from ..errors import CheckpointError
from .directions import Axes, Integers
from .entropy import Decoder, Encoder, bits_in, differences, kinds_of
from .quantiser import HIGHEST, LOWEST, PER_OCTAVE, Ints

Shape = tuple[int, int, int]  # r, d_out, d_in
Part = tuple[Array, NDArray[np.bool_], Ints]  # integers, where they are coded, and the class of each or of each row
_STEP = struct.Struct("<d")
_RANGE = HIGHEST - LOWEST  # of differences of classes
_COUNTS = (0.45, 0.45)  # of a difference: how much rarer the next higher, and the next lower one is
_FIRST, _NEXT, _RIGHT = (_RANGE, 0.6, 0.6), (_RANGE, 0.35, 0.65, -1), (_RANGE, 0.1, 0.3)


class Group(NamedTuple):
    """The integers of the pairs of one shape."""

    left: Integers
    right: Integers


class Layout(NamedTuple):
    """What a decoder must know of a group: its shape, and the directions of its pairs, left and right."""

    shape: Shape
    axes: tuple[Axes, Axes]


class _Head(NamedTuple):
    """What is coded of a group before its integers: which columns (n, r) are not zero, and their classes."""

    live: NDArray[np.bool_]
    left: Ints
    right: Ints


def encode(groups: Sequence[Group], layouts: Sequence[Layout], step: float) -> bytes:
    """The code of an adapter: groups of ascending shapes, none twice; a column is zero on both sides or on none.

    The step is that of the coefficients of dW itself.
    """
    coder = Encoder()
    heads = [_encoded_head(coder, *each) for each in zip(groups, layouts, strict=True)]
    coder.rows([(x[at], kinds) for x, at, kinds in _parts(groups, layouts, heads)])
    return _STEP.pack(step) + coder.finish() if any(head.live.any() for head in heads) else b""


def _encoded_head(coder: Encoder, group: Group, layout: Layout) -> _Head:
    (r, d_out, d_in), live = layout.shape, group.left.live
    counts, begins = live.sum(axis=-1), _begins(live.sum(axis=-1))
    left, right = (columns_of(side, axes, live)[0] for side, axes in zip(group, layout.axes, strict=True))
    coder.put(np.diff(counts, prepend=0) + r, differences(r, *_COUNTS))
    coder.put(np.diff(left[begins], prepend=0) + _RANGE, differences(*_FIRST))
    coder.put(np.diff(left, prepend=0)[~begins] + _RANGE, differences(*_NEXT))
    coder.put(right - _expected(left, d_out, d_in) + _RANGE, differences(*_RIGHT))
    return _Head(live, left, right)


def columns_of(side: Integers, axes: Axes, live: NDArray[np.bool_]) -> tuple[Ints, Float64]:
    """The classes of columns that are not zero, in which they take the fewest bits, and how many these are."""
    if not axes.own.size:
        return kinds_of(side.rest[live])
    pairs, loadings = np.nonzero(live)[0], side.loadings[live]

    def beside(rows: NDArray[np.intp], kinds: Ints) -> Float64:
        on = np.clip(kinds[:, None] + axes.offsets[pairs[rows], None], LOWEST, HIGHEST)
        found: Float64 = (bits_in(loadings[rows, None], on) * axes.own[pairs[rows], None]).sum(axis=-1)
        return found

    return kinds_of(side.rest[live], beside)


def decode(code: bytes, layouts: Sequence[Layout]) -> tuple[list[Group], float]:
    """The integers and the step of a code whose digest was found right; the layouts are of ascending shapes.

    Raises:
        CheckpointError: if it is no code of such groups.
    """
    groups = [_zeros(layout) for layout in layouts]
    if not code:
        return groups, 0.0
    if len(code) % 4 or len(code) < _STEP.size or not isfinite(step := _STEP.unpack_from(code)[0]) or step <= 0:
        raise _no_code(f"{len(code)} bytes")
    try:
        _decode(Decoder(code[_STEP.size :]), layouts, groups)
    except (AssertionError, OverflowError) as e:  # of constriction: words that no encoder writes; of an escape
        raise _no_code(str(e)) from e
    return groups, step


def _decode(coder: Decoder, layouts: Sequence[Layout], groups: Sequence[Group]) -> None:
    """Fill in the integers of groups of zeros."""
    parts = _parts(groups, layouts, [_decoded_head(coder, layout) for layout in layouts])
    rows = [(x[at], kinds) for x, at, kinds in parts]
    coder.rows(rows)
    for (x, at, _), (own, _) in zip(parts, rows, strict=True):
        x[at] = own


def _decoded_head(coder: Decoder, layout: Layout) -> _Head:
    r, d_out, d_in = layout.shape
    counts = np.cumsum(coder.get(len(layout.axes[0].own), differences(r, *_COUNTS)) - r)
    if counts.min(initial=0) < 0 or counts.max(initial=0) > r:
        raise _no_code(f"{counts.max(initial=0)} columns of {r}")
    total, begins = int(counts.sum()), _begins(counts)
    steps = np.empty(total, np.int64)
    steps[begins] = np.cumsum(coder.get(int(begins.sum()), differences(*_FIRST)) - _RANGE)
    steps[~begins] = coder.get(int((~begins).sum()), differences(*_NEXT)) - _RANGE
    left = np.cumsum(steps)
    left -= np.repeat((left - steps)[begins], counts[counts > 0])
    right = _expected(left, d_out, d_in) + coder.get(total, differences(*_RIGHT)) - _RANGE
    for kinds in (left, right):
        if kinds.min(initial=LOWEST) < LOWEST or kinds.max(initial=LOWEST) > HIGHEST:
            raise _no_code("an unknown class")
    return _Head(np.arange(r) < counts[:, None], left, right)


def _parts(groups: Sequence[Group], layouts: Sequence[Layout], heads: Sequence[_Head]) -> list[Part]:
    """What is coded class by class, in this order: rests on the left, on the right, loadings on the left, the right."""
    rests: list[Part] = []
    loadings: list[Part] = []
    for i in range(2):
        for group, layout, (live, *kinds) in zip(groups, layouts, heads, strict=True):
            rests.append((group[i].rest, live, kinds[i]))
            of_columns = np.zeros(live.shape, np.int64)
            of_columns[live] = kinds[i]
            at = live[..., None] & layout.axes[i].own[:, None]
            loadings.append((group[i].loadings, at, layout.axes[i].classes(of_columns)[at]))
    return rests + loadings


def _zeros(layout: Layout) -> Group:
    r, *dims = layout.shape
    shapes = [
        ((*axes.own.shape[:1], r, axes.own.shape[1]), (len(axes.own), r, d))
        for axes, d in zip(layout.axes, dims, strict=True)
    ]
    return Group(*(Integers(*(np.zeros(shape, np.float32) for shape in both)) for both in shapes))


def _begins(counts: Ints) -> NDArray[np.bool_]:
    """Which columns are the first of their pair, given how many each pair has."""
    found = np.zeros(int(counts.sum()), bool)
    found[(np.cumsum(counts) - counts)[counts > 0]] = True
    return found


def _expected(left: Ints, d_out: int, d_in: int) -> Ints:
    """The class on the right of columns that have the same length as on the left."""
    return np.clip(left + round(PER_OCTAVE / 2 * log2(d_out / d_in)), LOWEST, HIGHEST)


def _no_code(found: str) -> CheckpointError:
    return CheckpointError("the code of an adapter is none that belongs to its shapes", found=found,
                           remedy="Fetch the checkpoint again, or compress its sources again.")  # fmt: skip
