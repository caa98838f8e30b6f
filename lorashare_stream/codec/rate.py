"""Rate: how many bytes an adapter takes, and how far off it is, by the step; and sums over a collection, from a sample.

With one step for all adapters the error is the least that so many bytes allow: a bit is spent where it lowers the
squared error most, whosever it is. Bytes and squared errors are sums over adapters, so that a sample tells them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np

from ..adapters.dtypes import Float64
from .code import FINEST, Subject, likely_step
from .directions import Directions, Integers
from .pairs import Quantised
from .stream import columns_of

ERRORS = (0.02, 0.05, 0.1, 0.25, 0.41, 0.62, 0.85)  # near which an adapter is tried
_COLUMN_BITS, _PAIR_BITS, _BYTES = 3.5, 3, 12  # of classes, of counts, and what a stream takes beside
_HALVINGS = 40


@dataclass(frozen=True)
class Curve:
    """One adapter at some steps, ascending: bytes of its code, and relative errors."""

    steps: tuple[float, ...]
    nbytes: tuple[float, ...]
    errors: tuple[float, ...]

    def bytes_at(self, step: float) -> float:
        """Bytes at a step, by interpolation in logarithms; beyond the end by the slope there, finer by bytes a bit."""
        if step >= self.steps[0] or len(self.steps) < 2:
            return _between(self.steps, self.nbytes, step)
        slope = (self.nbytes[0] - self.nbytes[1]) / log(self.steps[1] / self.steps[0])
        return self.nbytes[0] + slope * log(self.steps[0] / step)

    def error_at(self, step: float) -> float:
        """The relative error at a step, likewise; dW itself at most."""
        return min(1.0, _between(self.steps, self.errors, step))

    def bytes_within(self, error: float) -> float:
        """Bytes at a relative error; between those that were tried by a monotone cubic, 1 to 2 % off."""
        errors, order = np.unique(self.errors, return_index=True)
        if len(errors) < 3 or not errors[0] < error < errors[-1]:
            return _between(self.errors, self.nbytes, error)
        from scipy.interpolate import pchip_interpolate

        sizes = np.log(np.maximum(np.asarray(self.nbytes)[order], 1e-9))
        return exp(float(pchip_interpolate(np.log(errors), sizes, log(error))))


def _between(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Y at a place among increasing x."""
    logs, values = np.log(x), np.log(np.maximum(y, 1e-9))
    place = int(np.clip(np.searchsorted(logs, log(at)), 1, len(logs) - 1))
    slope = (values[place] - values[place - 1]) / max(1e-9, logs[place] - logs[place - 1])
    return exp(min(700.0, values[place - 1] + slope * (log(at) - logs[place - 1])))


def curve_of(subject: Subject) -> Curve | None:
    """The curve of an adapter; None if its dW is zero."""
    if subject.norm == 0:
        return None
    steps = sorted({likely_step(subject.pairs, subject.norm, error) for error in ERRORS})
    trials = [subject.attempt(step) for step in steps]
    sizes = [sum(_pair_bits(*each) for each in zip(t, subject.on, strict=True)) / 8 + _BYTES for t, _ in trials]
    return Curve(tuple(steps), tuple(sizes), tuple(max(e, 1e-6) for _, e in trials))


def _pair_bits(found: Quantised, on: tuple[Directions, Directions]) -> float:
    """Bits of pairs in a code, nearly."""
    sides = zip((found.left, found.right), on, strict=True)
    return sum(float(side_bits(side, d).sum()) for side, d in sides) + _PAIR_BITS * len(found.left.rest)


def side_bits(side: Integers, on: Directions) -> Float64:
    """Bits (n,) of the integers of each pair on one side, nearly."""
    live = side.live
    bits = np.zeros(live.shape)
    bits[live] = columns_of(side, on.axes, live)[1] + _COLUMN_BITS
    found: Float64 = bits.sum(axis=-1)
    return found


def step_for(total: Callable[[float], float], size: float) -> float:
    """The step at which bytes, which fall as it grows, are `size`; from FINEST to 1."""
    low, high = log(FINEST), 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(exp(middle)) > size else (low, middle)
    return exp(high)


@dataclass(frozen=True)
class Estimate:
    """A sum over a collection, from a sample: what it is likely to be, and half the width of its 95 % interval."""

    value: float
    margin: float


def estimated(values: Sequence[float], weights: Sequence[float], whole: float) -> Estimate:
    """The sum over all adapters of what is known of some, by its ratio to a weight that is known of all.

    The ratio estimator and its variance (Cochran 1977, 6.3 and 6.4), with Student's t; exact if the sample is all.

    Args:
        values: of the sample, say bytes of codes.
        weights: of the sample, say LoRA bytes.
        whole: the sum of the weights over the collection.
    """
    total, n = sum(weights), len(values)
    ratio = sum(values) / total if total else 0.0
    if n < 2 or not total or total >= whole:
        return Estimate(ratio * whole, 0.0 if total >= whole else ratio * whole)
    from scipy.special import stdtrit

    rest = np.asarray(values) - ratio * np.asarray(weights)
    spread = sqrt(float(np.square(rest).sum()) / (n - 1) / n * (1 - total / whole)) * whole / (total / n)
    return Estimate(ratio * whole, float(stdtrit(n - 1, 0.975)) * spread)
