"""Bases: fit one to a moment, choose k, restore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..adapters.dtypes import Array, Float32, Float64, as_stored
from .eigen import compressed, leading, prefers_partial, spectrum
from .moments import Moment

Solver = Callable[[Moment, int], tuple[Float64, Float64]]


@dataclass(frozen=True)
class Basis:
    """The components of one group, as they are stored.

    Attributes:
        components: V (d, k) float32 values, already rounded to the storage dtype.
        eigenvalues: (k,) float64, descending, of the moment.
        energy: tr S, float64.
        explained: 1 - ||X - V V'X||^2 / ||X||^2 for the stored V; 1 if the group has no energy.
    """

    components: Float32
    eigenvalues: Float64
    energy: float
    explained: float


def fit(
    moment: Moment,
    num_components: int | Literal["auto"],
    threshold: float = 0.95,
    *,
    center: bool = False,
    dtype: str = "F32",
    solver: Solver = leading,
) -> Basis:
    """The best basis of a group: leading eigenvectors of its moment (Eckart-Young).

    The entry of largest magnitude in each component is positive.

    Args:
        moment: of the group, n >= 1. With `center`, its arrays are overwritten.
        num_components: k, clamped to min(d, n); or `"auto"`: the smallest k whose share of tr S reaches
            `threshold`.
        center: fit S - s s'/n instead of S (the published method).
        dtype: to which components are rounded for storage: F32, BF16 or F16.
        solver: of leading eigenpairs.
    """
    most = max(1, min(moment.dim, moment.count))
    if center:
        moment = centered(moment)
    if num_components == "auto":
        values, vectors = _auto(moment, threshold, most, solver)
    else:
        values, vectors = solver(moment, min(num_components, most))
    peaks = np.argmax(np.abs(vectors), axis=0)
    vectors *= np.where(vectors[peaks, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    components = as_stored(vectors, dtype)
    return Basis(components, np.clip(values, 0.0, None), moment.energy, explained_variance(moment, components))


def _auto(moment: Moment, threshold: float, most: int, solver: Solver) -> tuple[Float64, Float64]:
    """The smallest k whose share reaches the threshold: guesses while they are cheap, then the whole spectrum."""
    k = min(16, most)
    while prefers_partial(moment, k):
        values, vectors = solver(moment, k)
        enough = _reaching(values, moment.energy, threshold)
        if enough is not None:
            return values[:enough], vectors[:, :enough]
        k *= 2
    return solver(moment, _reaching(spectrum(moment), moment.energy, threshold) or most)


def _reaching(values: Float64, energy: float, threshold: float) -> int | None:
    """The smallest k whose eigenvalues, given in descending order, hold `threshold` of the energy."""
    if energy <= 0:
        return 1
    enough = np.flatnonzero(np.cumsum(np.clip(values, 0.0, None)) >= threshold * (1 - 1e-12) * energy)
    return int(enough[0]) + 1 if len(enough) else None


def centered(moment: Moment) -> Moment:
    """The moment about the mean column: S - s s'/n, energy tr S - s's/n. Overwrites the arrays."""
    mean = moment.sum / max(moment.count, 1)
    if moment.columns is not None:
        rows = moment.columns
        rows -= mean.astype(rows.dtype)
        return Moment(None, rows, np.zeros_like(mean), moment.count, float(np.einsum("ij,ij->", rows, rows)))
    second = moment.rows.T
    for i in range(moment.dim):
        second[:, i] -= moment.sum * mean[i]
    return Moment(second, None, np.zeros_like(mean), moment.count, float(np.trace(second)))


def explained_variance(moment: Moment, components: Array) -> float:
    """1 - ||X - V V'X||^2 / ||X||^2, from the moment alone, exact for columns that are not quite orthonormal.

    With C = V'SV this is (2 tr C - tr(V'V C)) / tr S, which is tr C / tr S for orthonormal V. Products of many float32
    vectors are in float32, whose rounding averages out to some 1e-8; of few it would not.
    """
    if moment.energy <= 0:
        return 1.0
    wide = components.astype(np.float64)
    c = compressed(moment, wide if min(moment.dim, moment.count) <= 512 else components)
    return float((2 * np.trace(c) - np.sum((wide.T @ wide) * c)) / moment.energy)


def break_even(dim: int, count: int) -> float:
    """The k at which a shared group, k (d + n) numbers, is as large as the originals, d n."""
    return dim * count / (dim + count)
