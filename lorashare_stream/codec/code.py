"""Code: one adapter as bytes, within a limit on its error or at a given step, and what comes back of them.

The search finds the coarsest step whose error is within the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import TypeVar

import numpy as np

from ..adapters.dtypes import Array
from ..adapters.scaling import Scaling
from ..linalg.delta import DeltaError
from .directions import ALONE, Directions, Shared, joined
from .factors import CodedModule, both_sides, errors, factors, layouts_of
from .pairs import Pairs, Quantised, norm_of, pairs_of, quantise
from .stream import Group, Shape, decode, encode

T = TypeVar("T")
Trial = Sequence[Quantised]
FINEST, COARSEST = 2.0**-21, 1.0  # steps: integers stay exact in float32; no coefficient is larger
WIDTH = 0.01  # of the bracket, relative
_TRIALS = 40
_PER_STEP = 1 / 11  # of a squared step, the error of a coefficient that has bits, nearly
ROUGH = 0.01  # the least error that float32 products tell to 1 %


@dataclass(frozen=True)
class Batch:
    """Modules of one shape: lora_A (m, E r, d_in), lora_B (m, d_out, E r), and how dW comes of them."""

    modules: Sequence[CodedModule]
    a: Array
    b: Array
    scalings: Sequence[Scaling]


@dataclass(frozen=True)
class AdapterCode:
    """The code of an adapter, and the certified error of each of its modules."""

    code: bytes
    step: float
    errors: Mapping[str, DeltaError]


@dataclass(frozen=True)
class Subject:
    """An adapter that is to be coded.

    Attributes:
        modules: in the order of the adapter's.
        batches: of the same modules. pairs: of each batch. on: directions of each, left and right.
        norm: ||dW||.
        shared: the directions of the checkpoint.
    """

    modules: Sequence[CodedModule]
    batches: Sequence[Batch]
    pairs: Sequence[Pairs]
    on: Sequence[tuple[Directions, Directions]]
    norm: float
    shared: Shared

    @classmethod
    def of(cls, modules: Sequence[CodedModule], batches: Sequence[Batch], shared: Shared = ALONE) -> Subject:
        """An adapter in the gauge in which it is quantised."""
        pairs = [pairs_of(batch.a, batch.b, batch.scalings) for batch in batches]
        on = [both_sides(Directions, batch.modules, shared) for batch in batches]
        return cls(modules, batches, pairs, on, norm_of(pairs), shared)

    def within(self, limit: float) -> AdapterCode | None:
        """The code of fewest bytes whose certified relative error is at most `limit`; None if there is none."""
        if self.norm == 0:
            return self.at(1.0)
        certificate: dict[str, DeltaError] = {}

        def certify(trial: Trial, step: float) -> float:
            certificate.update(self.certified(trial, step))
            return sqrt(sum(e.error for e in certificate.values()) / sum(e.norm for e in certificate.values()))

        def attempt(step: float) -> tuple[Trial, float]:
            trial, error = self.attempt(step)
            return trial, error if error > ROUGH else certify(trial, step)

        found = search(limit, likely_step(self.pairs, self.norm, limit), attempt, certify)
        return None if found is None else AdapterCode(self._code(*found), found[1], certificate)

    def at(self, step: float) -> AdapterCode:
        """The code at a step, which is of coefficients divided by ||dW||."""
        trial = self._quantised(self.norm or 1.0, step)
        return AdapterCode(self._code(trial, step), step, self.certified(trial, step))

    def attempt(self, step: float) -> tuple[Trial, float]:
        """The integers at a step, and their relative error."""
        trial = self._quantised(self.norm, step)
        return trial, sqrt(max(0.0, sum(part.error for part in trial)))

    def _quantised(self, norm: float, step: float) -> Trial:
        return [quantise(pairs, on, norm, step) for pairs, on in zip(self.pairs, self.on, strict=True)]

    def certified(self, trial: Trial, step: float) -> dict[str, DeltaError]:
        """The error of each module, in the tensors that come back."""
        every = factors(self.modules, self._groups(trial), step * self.norm, self.shared)
        back = {m.name: (a, b) for m, a, b in every}
        found: dict[str, DeltaError] = {}
        for batch, pairs in zip(self.batches, self.pairs, strict=True):
            names = [m.name for m in batch.modules]
            a_hat, b_hat = (np.stack([back[name][side] for name in names]) for side in (0, 1))
            found |= zip(names, errors(pairs, a_hat, b_hat, batch.scalings), strict=True)
        return found

    def _code(self, trial: Trial, step: float) -> bytes:
        return encode(self._groups(trial), layouts_of(self.modules, self.shared), step * self.norm)

    def _groups(self, trial: Trial) -> list[Group]:
        """The integers in the order of the stream: shapes ascending, pairs in the order of the modules."""
        found: dict[str, Group] = {}
        for batch, part in zip(self.batches, trial, strict=True):
            experts = batch.scalings[0].experts
            for i, m in enumerate(batch.modules):
                own = slice(i * experts, (i + 1) * experts)
                found[m.name] = Group(part.left[own], part.right[own])
        alike: dict[Shape, list[Group]] = {}
        for m in self.modules:
            alike.setdefault(m.shape, []).append(found[m.name])
        return [Group(*map(joined, zip(*alike[shape], strict=True))) for shape in sorted(alike)]


def decoded(
    code: bytes, modules: Sequence[CodedModule], shared: Shared = ALONE
) -> Iterator[tuple[CodedModule, Array, Array]]:
    """Each module with its lora_A and lora_B, as `factors` gives them, of a code whose digest was found right.

    Raises:
        CheckpointError: if it is no code of such modules.
    """
    groups, step = decode(code, layouts_of(modules, shared))
    return factors(modules, groups, step, shared)


def search(
    limit: float, first: float, attempt: Callable[[float], tuple[T, float]], certify: Callable[[T, float], float]
) -> tuple[T, float] | None:
    """The coarsest step whose certified relative error is at most `limit`; None if none of FINEST or more is.

    Errors grow almost like a power of the step, so that few trials find it: the secant in logarithms, kept between the
    finest step that was too coarse and the coarsest that was not, until these are 1 % apart. What is measured in a
    trial is the error of integers; what is certified is that of the tensors that come back, which rounding to bfloat16
    adds to.

    Args:
        first: a step that may be near.
        attempt: what is tried at a step, and its measured error.
        certify: the error of the tensors that come back of it.

    Returns:
        What was tried at the step, and the step.
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
                return best[0], low
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
