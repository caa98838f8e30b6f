"""Search: the coarsest step whose measured error is within a limit.

Errors grow almost like a power of the step, so that few trials find it: the secant in logarithms, kept between the
finest step that was too coarse and the coarsest that was not. What is measured in a trial is the error of integers;
what is certified is that of the tensors that come back, which rounding to bfloat16 adds to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Generic, TypeVar

import numpy as np

from .gauge import Pairs

T = TypeVar("T")
FINEST, COARSEST = 2.0**-21, 1.0  # steps: integers stay exact in float32; no coefficient is larger
WIDTH = 0.01  # of the bracket, relative
_TRIALS = 40
_PER_STEP = 1 / 11  # of a squared step, the error of a coefficient that has bits, nearly


@dataclass(frozen=True)
class Found(Generic[T]):
    """A step within a limit.

    Attributes:
        step: the coarsest that was found. error: certified at it.
        above: a step at most 1 % coarser whose error was measured above the limit; infinite if none is that coarse.
        trial: what was tried at `step`.
    """

    step: float
    error: float
    above: float
    trial: T


def search(
    limit: float, first: float, attempt: Callable[[float], tuple[T, float]], certify: Callable[[T, float], float]
) -> Found[T] | None:
    """The coarsest step whose certified error is at most `limit`; None if none of FINEST or more is.

    Args:
        limit: on the relative error.
        first: a step that may be near.
        attempt: what is tried at a step, and its measured error.
        certify: the error of the tensors that come back of it.
    """
    low, high, best, rounding = 0.0, float("inf"), None, 0.0
    known: list[tuple[float, float]] = []  # logarithms of steps and errors
    step = first
    for _ in range(_TRIALS):
        trial, measured = attempt(step)
        error = sqrt(measured**2 + rounding)
        known.append((log(step), log(max(error, 1e-12))))
        if error <= limit:
            low, best = step, (trial, measured)
        else:
            high = step
        if best is not None and (high <= (1 + WIDTH) * low or low >= COARSEST):
            exact = certify(best[0], low)
            if exact <= limit:
                return Found(low, exact, high, best[0])
            if exact == float("inf"):  # beyond the range of a dtype, at any step
                return None
            rounding = max(rounding, exact**2 - best[1] ** 2)  # of a trial that was thought to be within the limit
            low, high, best = 0.0, low, None
        if high <= FINEST:
            return None
        step = _next(known, low, high, limit)
    return None


def _next(known: Sequence[tuple[float, float]], low: float, high: float, limit: float) -> float:
    """The step for the next trial: by the secant, a little on that side of the limit of which nothing near is known."""
    (x, y), slope = known[-1], 1 - limit / 2  # of a power of the step, at high rates 1
    if len(known) > 1:
        slope = min(max((y - known[-2][1]) / (x - known[-2][0]), 0.3), 1.5)
    step = exp(x + (log(limit) + (WIDTH / 3 if low else -WIDTH / 5) - y) / slope)
    least, most = max(low * (1 + WIDTH / 4), FINEST / 2), min(high / (1 + WIDTH / 4), COARSEST)
    if least <= step <= most:
        return step
    return sqrt(low * high) if low and high <= COARSEST else min(max(step, least), most)


def likely_step(batches: Sequence[Pairs], norm: float, limit: float) -> float:
    """A step whose error may be near `limit`, by reverse water-filling (Cover & Thomas, 10.3.3)."""
    parts = [(np.square(p.values / norm).ravel(), d) for p in batches for d in (p.left.shape[-1], p.right.shape[-1])]
    low, high = log(FINEST), 0.0
    for _ in range(20):
        step = exp((low + high) / 2)
        error = sum(np.minimum(energy, d * step**2 * _PER_STEP).sum() for energy, d in parts)
        low, high = (log(step), high) if error <= limit**2 else (low, log(step))
    return exp(low)
