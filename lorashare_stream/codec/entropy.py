"""Entropy coding: integers by the range coder of `constriction`, with the fixed tables of `quantiser`.

Probabilities go to it in float64, `perfect=False`: float32 ones give another stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from ..adapters.dtypes import Array, Float64
from .quantiser import LOWEST, PER_OCTAVE, TOTAL, Ints, classes_of, low_bits, reach, table

Rows = tuple[NDArray[Any], Ints]  # integers (n, ...), and the class of each of the n
Categorical, Uniform = constriction.stream.model.Categorical, constriction.stream.model.Uniform
_COUNTED = 12  # classes up to which code lengths are compared; of wider ones a column's own deviation tells the best
_PART, _LENGTHS = 16, 64  # bits of an escaped integer that are coded at once; more than all its bits


@lru_cache(maxsize=256)
def _model(kind: int) -> Any:
    return Categorical(table(kind), perfect=False)


@lru_cache(maxsize=64)
def differences(most: int, rise: float, fall: float, center: int = 0) -> Any:
    """A model of differences from -`most` to `most`, as symbols from 0: geometric on both sides of `center`."""
    away = np.arange(-most, most + 1) - center
    likely = np.where(away > 0, rise, fall) ** np.abs(away)
    weights = np.maximum(np.rint(likely / likely.sum() * TOTAL), 1)  # whole: the same, whoever computes powers
    return Categorical(weights / weights.sum(), perfect=False)


@lru_cache(maxsize=1)
def _lengths() -> Float64:
    """Bits of magnitudes from 0 to K of the widest class that is compared, sign included, in each class (c, K + 1)."""
    magnitudes = np.arange(reach(_COUNTED) + 1)
    found = []
    for kind in range(LOWEST, _COUNTED + 1):
        bits, k = -np.log2(table(kind)), reach(kind)
        beyond = bits[-1] + 7 + 2 * np.log2(np.maximum(magnitudes - k, 1))
        found.append(np.where(magnitudes <= k, bits[np.minimum(k + magnitudes, 2 * k)], beyond))
    return np.stack(found)


def kinds_of(rows: Array, beside: Callable[[NDArray[np.intp], Ints], Float64] | None = None) -> tuple[Ints, Float64]:
    """The class (n,) in which each row of integers (n, d) takes the fewest bits, and how many these are.

    `beside` tells what else takes bits by the class of a row: (m, c), of rows (m,) in classes (c,).
    """
    d = rows.shape[-1]
    sigmas = np.sqrt(np.einsum("nd,nd->n", rows, rows) / np.float32(d)).astype(np.float64)
    kinds = classes_of(sigmas)
    bits = d * (np.log2(np.maximum(sigmas, 1.0)) + np.log2(2 * np.pi * np.e) / 2)
    few = np.flatnonzero(kinds <= _COUNTED)
    if len(few):
        lengths = _lengths()
        most = lengths.shape[-1]
        places = np.minimum(np.abs(rows[few]), most - 1).astype(np.int64) + most * np.arange(len(few))[:, None]
        counts = np.bincount(places.ravel(), minlength=most * len(few)).reshape(len(few), most)
        costs = counts @ lengths.T
        if beside is not None:
            costs = costs + beside(few, np.arange(LOWEST, _COUNTED + 1))
        kinds[few], bits[few] = costs.argmin(axis=-1) + LOWEST, costs.min(axis=-1)
    return kinds, bits


def bits_in(values: Array, kinds: Ints) -> Float64:
    """Bits of integers, each of a class of its own, nearly."""
    octaves = np.maximum(0, -(-(kinds - _COUNTED) // PER_OCTAVE))  # of wider classes the low bits take one each
    lengths = _lengths()
    high = np.abs(np.rint(np.ldexp(values.astype(np.float64), -octaves))).astype(np.int64)
    found: Float64 = lengths[kinds - PER_OCTAVE * octaves - LOWEST, np.minimum(high, lengths.shape[-1] - 1)] + octaves
    return found


def _present(parts: Sequence[Rows]) -> list[int]:
    """The classes that some rows have, ascending."""
    found: list[int] = np.unique(np.concatenate([np.zeros(0, np.int64), *(kinds for _, kinds in parts)])).tolist()
    return found


class Encoder:
    """Writes symbols of several models into one stream."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()
        self._escaped: list[Ints] = []

    def put(self, symbols: NDArray[Any], model: Any) -> None:
        """Encode symbols from 0 of a model."""
        if len(symbols):
            self._coder.encode(np.ascontiguousarray(symbols, np.int32), model)

    def integers(self, values: Ints, kind: int) -> None:
        """Encode integers of a class."""
        bits, k = low_bits(kind), reach(kind)
        values = values + (1 << bits >> 1)  # the high part is the nearest
        high = values >> bits
        outside = np.abs(high) > k
        self.put(np.where(outside, 2 * k + 1, high + k), _model(kind))
        self._escaped.append(high[outside])
        if bits:
            self.put(values & ((1 << bits) - 1), Uniform(1 << bits))

    def rows(self, parts: Sequence[Rows]) -> None:
        """Encode rows of integers, class by class, those of all parts together."""
        for kind in _present(parts):
            every = np.concatenate([rows[kinds == kind].ravel() for rows, kinds in parts])
            self.integers(every.astype(np.int64), kind)

    def finish(self) -> bytes:
        """Encode what has escaped, and give the stream: words of 32 bits, little-endian."""
        escaped = np.concatenate([np.zeros(0, np.int64), *self._escaped])
        lengths = np.frexp(np.abs(escaped).astype(np.float64))[1].astype(np.int64)
        self.put(lengths, Uniform(_LENGTHS))
        self.put(escaped < 0, Uniform(2))
        for value, length in zip(np.abs(escaped).tolist(), lengths.tolist(), strict=True):
            for low in range(0, length - 1, _PART):  # the highest bit is 1
                width = min(_PART, length - 1 - low)
                self.put(np.array([value >> low & ((1 << width) - 1)]), Uniform(1 << width))
        found: bytes = self._coder.get_compressed().astype("<u4").tobytes()
        return found


class Decoder:
    """Reads what `Encoder` has written, with the same models in the same order; random bytes give numbers too."""

    def __init__(self, stream: bytes) -> None:
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(stream, "<u4").astype(np.uint32))
        self._escaped: list[tuple[Ints, NDArray[np.intp], int]] = []

    def get(self, count: int, model: Any) -> Ints:
        """Decode symbols of a model."""
        found: Ints = self._coder.decode(model, count).astype(np.int64) if count else np.zeros(0, np.int64)
        return found

    def integers(self, count: int, kind: int) -> Ints:
        """Decode integers of a class, which are right when the stream is at its end: after `finish`."""
        bits, k = low_bits(kind), reach(kind)
        values = self.get(count, _model(kind)) - k
        outside = np.flatnonzero(values > k)
        values <<= bits
        if bits:
            values += self.get(count, Uniform(1 << bits))
        self._escaped.append((values, outside, bits))
        return values

    def rows(self, parts: Sequence[Rows]) -> None:
        """Decode what `Encoder.rows` has written, and all that has escaped, into rows of that shape."""
        pending = []
        for kind in _present(parts):
            places = [kinds == kind for _, kinds in parts]
            sizes = [int(at.sum()) * prod(rows.shape[1:]) for at, (rows, _) in zip(places, parts, strict=True)]
            pending.append((places, sizes, self.integers(sum(sizes), kind)))
        self.finish()
        for places, sizes, values in pending:
            split = np.split(values, np.cumsum(sizes)[:-1])
            for at, (rows, _), own in zip(places, parts, split, strict=True):
                rows[at] = own.reshape(-1, *rows.shape[1:])

    def finish(self) -> None:
        """Decode what has escaped, and finish the arrays that were given."""
        count = sum(len(places) for _, places, _ in self._escaped)
        lengths, negative = self.get(count, Uniform(_LENGTHS)).tolist(), self.get(count, Uniform(2)).tolist()
        at = 0
        for values, places, bits in self._escaped:
            for place in places.tolist():
                high = self._magnitude(lengths[at])
                low = int(values[place]) & ((1 << bits) - 1)
                values[place] = ((-high if negative[at] else high) << bits) + low
                at += 1
            values -= 1 << bits >> 1

    def _magnitude(self, length: int) -> int:
        value = 1 << max(0, length - 1) if length else 0
        for low in range(0, length - 1, _PART):
            width = min(_PART, length - 1 - low)
            value |= int(self.get(1, Uniform(1 << width))[0]) << low
        return value
