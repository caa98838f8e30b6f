"""Directions: what the columns of many adapters have in common, coded once.

A column x of a side of a module is V c + e: loadings c on k directions of unit length, common to the adapters of a
checkpoint, and a rest. Both are quantised at the one step, the rest after the loadings (closed loop), so that the error
is that of the rest alone. The class of a loading is that of the rest of its column, and an offset: it costs no bits.

Directions are eigenvectors of the second moment of the columns (the KLT), which is what `delta` sums; their numbers are
integers times a power of two, so that V q is exact in float64 on every machine.

As bytes they are

    length   of the header, uint32 little-endian
    header   a zlib stream of JSON: of each group, in order of their names, d, and of each direction offset and class
    words    of the range coder: the numbers, class by class
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from ..adapters.dtypes import Array, Float64
from ..errors import CheckpointError
from .entropy import Decoder, Encoder, kinds_of
from .quantiser import HIGHEST, LOWEST, Ints, classes_of, quantised, quantised_in

FINE = 2  # bits of a number of a direction under its rms
DIGITS = 21  # at most, of a number of a column that comes back, under its largest


@dataclass(frozen=True)
class Basis:
    """The directions of one side of a module.

    Attributes:
        numbers: (k, d) int16; times `unit` they are the directions.
        offsets: (k,): the class of a loading over that of the rest of its column.
    """

    numbers: NDArray[np.int16]
    offsets: Ints

    @classmethod
    def of(cls, components: Array, eigenvalues: Sequence[float], trace: float) -> Basis:
        """The first k = len(eigenvalues) of components (d, k or more), orthonormal columns.

        Args:
            components: eigenvectors of the second moment.
            eigenvalues: of those that are taken. trace: of the second moment.
        """
        k, d = len(eigenvalues), len(components)
        rest = max(trace - float(np.sum(eigenvalues)), 1e-9 * trace) / d
        over = classes_of(np.sqrt(np.maximum(eigenvalues, 0.0) / rest))
        return cls(np.rint(components[:, :k].T.astype(np.float64) / unit(d)).astype(np.int16), over)

    @property
    def vectors(self) -> Array:
        """The directions (k, d) as float32."""
        return self.numbers.astype(np.float32) * np.float32(unit(self.numbers.shape[1]))


def unit(d: int) -> float:
    """What the numbers of directions of d numbers are multiples of: a power of two, under their rms by FINE bits."""
    return 2.0 ** -(FINE + ceil(log2(d) / 2))


Shared = Mapping[str, Basis]  # of each group that has directions
ALONE: Shared = {}
_LENGTH = struct.Struct("<I")
_Class = Annotated[int, Field(ge=LOWEST, le=HIGHEST)]
_HEADER = TypeAdapter(dict[str, tuple[Annotated[int, Field(ge=1, le=1 << 24)], list[tuple[_Class, _Class]]]])


def as_bytes(shared: Shared) -> bytes:
    """Directions as they are stored; none are no bytes."""
    if not shared:
        return b""
    kinds = {group: kinds_of(shared[group].numbers.astype(np.float32))[0] for group in sorted(shared)}
    facts = {
        g: [basis.numbers.shape[1], np.stack([basis.offsets, kinds[g]], 1).tolist()] for g, basis in shared.items()
    }
    header, coder = zlib.compress(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode(), 9), Encoder()
    coder.rows([(shared[group].numbers, own) for group, own in kinds.items()])
    return _LENGTH.pack(len(header)) + header + coder.finish()


def from_bytes(stored: bytes, most: int) -> Shared:
    """Directions that `as_bytes` gave, of `most` numbers at most; the digest of what is stored was found right.

    Raises:
        CheckpointError: if these are none.
    """
    if not stored:
        return ALONE
    try:
        (length,) = _LENGTH.unpack_from(stored)
        z = zlib.decompressobj()
        facts = _HEADER.validate_json(z.decompress(stored[_LENGTH.size : _LENGTH.size + length], 1 << 28))
        if any(len(rows) > d for d, rows in facts.values()):
            raise ValueError("more directions than there are numbers in one")
        if (numbers := sum(d * len(rows) for d, rows in facts.values())) > most:
            raise ValueError(f"{numbers} numbers, which this machine's memory does not hold")
        return _decoded(facts, Decoder(stored[_LENGTH.size + length :]))
    except (ValueError, AssertionError, OverflowError, struct.error, zlib.error) as e:
        raise CheckpointError("the directions of a checkpoint are none", found=str(e), remedy="Fetch it again.") from e


def _decoded(facts: Mapping[str, tuple[int, list[tuple[int, int]]]], coder: Decoder) -> Shared:
    found, parts = {}, []
    for group in sorted(facts):
        d, rows = facts[group]
        offsets, kinds = np.array(rows, np.int64).reshape(-1, 2).T
        found[group] = Basis(np.zeros((len(rows), d), np.int16), offsets)
        parts.append((found[group].numbers, kinds))
    coder.rows(parts)
    return found


@dataclass(frozen=True)
class Integers:
    """The integers of n pairs on one side, as float32: loadings (n, r, K) on directions, and the rest (n, r, d)."""

    loadings: Array
    rest: Array

    @property
    def live(self) -> NDArray[np.bool_]:
        """Which columns (n, r) are not zero."""
        return np.asarray(self.rest.any(axis=-1) | self.loadings.any(axis=-1))

    def __getitem__(self, pairs: slice) -> Integers:
        """Some of the pairs."""
        return Integers(self.loadings[pairs], self.rest[pairs])

    def only(self, live: NDArray[np.bool_]) -> Integers:
        """The same with all other columns zero."""
        return Integers(self.loadings * live[..., None], self.rest * live[..., None])


def joined(sides: Sequence[Integers]) -> Integers:
    """The pairs of several, which have the same r, d and K."""
    return Integers(np.concatenate([s.loadings for s in sides]), np.concatenate([s.rest for s in sides]))


def _present(shared: Shared, groups: Sequence[str], d: int) -> Iterator[tuple[int, Basis]]:
    """The places of pairs that have directions, and these."""
    if not shared:
        return
    for i, basis in enumerate(map(shared.get, groups)):
        if basis is not None and basis.numbers.shape[1] == d:
            yield i, basis


@dataclass(frozen=True)
class Axes:
    """How many directions n pairs have on one side, filled up to the most of the checkpoint, and how they are coded.

    Attributes:
        offsets: (n, K), as in `Basis`. own: (n, K), which are no fill.
    """

    offsets: Ints
    own: NDArray[np.bool_]

    @classmethod
    def of(cls, shared: Shared, groups: Sequence[str], d: int) -> Axes:
        """Of pairs of these groups, with d numbers a column; directions of other d are none of theirs."""
        shape = len(groups), max((len(basis.offsets) for basis in shared.values()), default=0)
        found = cls(np.zeros(shape, np.int64), np.zeros(shape, bool))
        for i, basis in _present(shared, groups, d):
            k = len(basis.offsets)
            found.offsets[i, :k], found.own[i, :k] = basis.offsets, True
        return found

    def classes(self, kinds: Ints) -> Ints:
        """Classes (n, r, K) of the loadings of columns whose rest is of classes (n, r)."""
        return np.asarray(np.clip(kinds[..., None] + self.offsets[:, None], LOWEST, HIGHEST))


@dataclass(frozen=True)
class Directions:
    """The directions of n pairs on one side: V' (n, K, d) float32, with zeros as `axes` tells."""

    axes: Axes
    vectors: Array

    @classmethod
    def of(cls, shared: Shared, groups: Sequence[str], d: int) -> Directions:
        """Of pairs of these groups, with d numbers a column."""
        axes = Axes.of(shared, groups, d)
        vectors = np.zeros((*axes.own.shape, d), np.float32)
        for i, basis in _present(shared, groups, d):
            vectors[i, : len(basis.offsets)] = basis.vectors
        return cls(axes, vectors)

    def quantised(self, rows: Array, step: float) -> Integers:
        """The integers of columns (n, r, d)."""
        if not self.axes.own.size:
            return Integers(np.zeros((*rows.shape[:2], 0), np.float32), quantised(rows, step))
        loadings = rows @ self.vectors.swapaxes(-1, -2)
        rest = rows - loadings @ self.vectors
        sigmas = np.sqrt(np.einsum("...d,...d->...", rest, rest) / np.float32(rows.shape[-1])) / step
        kinds = self.axes.classes(classes_of(sigmas))
        found = quantised_in(kinds, loadings / np.float32(step)) * self.axes.own[:, None]
        return Integers(found, quantised(rows - np.float32(step) * (found @ self.vectors), step))

    def sums(self, side: Integers) -> Array:
        """The columns (n, r, d) that integers stand for, in steps, as float32."""
        return side.rest + side.loadings @ self.vectors if self.axes.own.size else side.rest

    def exactly(self, side: Integers) -> Float64:
        """The same in float64, with so many binary digits of a column that sums of d squares are exact."""
        found = side.rest.astype(np.float64)
        if self.axes.own.size:
            found += side.loadings.astype(np.float64) @ self.vectors.astype(np.float64)
            digits = min(DIGITS, (53 - ceil(log2(found.shape[-1]))) // 2)
            units = np.frexp(np.abs(found).max(axis=-1, keepdims=True, initial=0.0))[1] - digits
            found = np.ldexp(np.rint(np.ldexp(found, -units)), units)
        return found
