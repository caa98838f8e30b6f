"""Rate: how many bytes, and what error, a step gives; one step for a limit on bytes.

Bytes and squared errors of a collection are sums over its adapters, so that those of a sample, times their number, are
estimates without bias. With one step for all, the error is the least that so many bytes allow: a bit is spent where it
lowers the squared error most, whosever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
from scipy.special import stdtrit

from ..linalg.types import Float64
from .entropy import kinds_of
from .refit import Quantised

POINTS = 6  # steps at which a sample is tried
_SIDE_BITS = 7  # of a column: its classes, and its share of what a pair takes


@dataclass(frozen=True)
class Curve:
    """Bytes and squared relative errors of one adapter at the steps of a sample (POINTS,), ascending."""

    nbytes: Float64
    errors: Float64


def code_bytes(found: Sequence[Quantised]) -> float:
    """Bytes of a code of these integers, nearly."""
    bits = 0.0
    for pairs in found:
        live = pairs.left.any(axis=-1)
        bits += sum(float(kinds_of(side[live])[1].sum()) for side in (pairs.left, pairs.right))
        bits += _SIDE_BITS * int(live.sum()) + 3 * len(live)
    return bits / 8 + 12 if bits else 0.0


def grid(finest: float, coarsest: float) -> list[float]:
    """The steps at which the adapters of a sample are tried."""
    return np.geomspace(finest, coarsest, POINTS).tolist()


def step_of(steps: Sequence[float], totals: Float64, size: float) -> float:
    """The step at which bytes (POINTS,), which fall with it, are `size`: by interpolation in logarithms, or beyond.

    Beyond the grid a factor of two of the step is a bit a number on the fine side, and the last slope on the other.
    """
    x, y = np.log(steps), np.log(np.maximum(totals, 1e-9))
    goal = log(max(size, 1e-9))
    if goal >= y[0]:  # finer
        return exp(x[0] - max(0.0, (goal - y[0]) / max(1e-6, (y[0] - y[1]) / (x[1] - x[0]))))
    if goal <= y[-1]:
        return exp(x[-1] + (y[-1] - goal) / max(1e-6, (y[-2] - y[-1]) / (x[-1] - x[-2])))
    return exp(float(np.interp(-goal, -y, x)))


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
    rest = np.asarray(values) - ratio * np.asarray(weights)
    spread = sqrt(float(np.square(rest).sum()) / (n - 1) / n * (1 - total / whole)) * whole / (total / n)
    return Estimate(ratio * whole, float(stdtrit(n - 1, 0.975)) * spread)
