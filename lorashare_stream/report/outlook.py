"""From a sample to its collection: errors to expect for every k, what adapters have in common, and what to do.

W(n, k) is the mean energy of dW, in units of ||dW_i||^2, that bases of k components keep of the n adapters that they
were fitted to, H(n, k) that of others. A collection of N adapters has W(N, k). A sample of m bounds it, in expectation:

    W(N, k) <= W(m, k)                                                  fewer adapters are fitted better
    W(N, k) >= max over j of w + (1 - w) f                              i = j + (k - j) m / N
               w = H(m/2, j) + W(m, i) - W(m, j)                        f = (k - i)^2 / ((d_in - i) (d_out - i))

The second: j components are fitted to a half and hold for all; what is left of k is dealt out to the N/m samples that
the collection is of, for each to have its own, and those of the others take in f of what is left, by chance. All these
together span k components, and the best k of all N fall behind them by the factor of HOSVD at most. On vectors without
anything in common it is met to 0.02 where k is up to d/4. With m = N both bounds are W(m, k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..linalg.types import Float64
from .measure import Capture

Curve = Callable[[Float64], Float64]  # k, which need not be whole -> mean energy
TARGETS = 0.1, 0.25  # mean relative dW errors: hardly to be told from the original, and what tasks mostly bear
WORTH, PLENTY = 1.2, 2.0  # times smaller, from which compressing is worth it; and worth more than a smaller error
_ROUNDING = 1e-4  # squared errors below it are not looked at one by one
BEYOND_CHANCE = 0.05  # of the energy, from which adapters have something in common
SAME_DIRECTION, COPY = 0.99, 0.01  # cosine of two dW; their distance, relative to the larger


@dataclass(frozen=True)
class Outlook:
    """What is to be expected of one k.

    Attributes:
        k: components.
        bytes: of basis and loadings of the whole collection.
        ratio: how many times smaller than the LoRA tensors.
        low, expected, high: mean relative dW error.
        chance: what is expected of adapters of the same strengths and ranks that have nothing in common.
    """

    k: int
    bytes: int
    ratio: float
    low: float
    expected: float
    high: float
    chance: float


def ladder(most: int) -> list[int]:
    """The numbers of components that are looked at: up to `most`, which is the last, at most a quarter apart.

    >>> ladder(30)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 30]
    """
    steps = {quarters << octave >> 2 for octave in range(32) for quarters in (4, 5, 6, 7)}
    return [*sorted(k for k in steps if k < most), most] if most > 0 else []


@dataclass(frozen=True)
class Errors:
    """Errors of a collection, from the energy that was kept of a sample.

    Attributes:
        found, chance: the energy (ks, adapters) that bases of `ks` components keep, as shares of that of each adapter.
        ks: ascending.
        share: m / N, by vectors.
        dims: (modules, 2) d_in and d_out. energies: (modules,) of dW in them.
    """

    found: Capture
    chance: Capture
    ks: Sequence[int]
    share: float
    dims: Float64
    energies: Float64

    def at(self, k: int) -> tuple[float, float, float, float]:
        """The mean relative dW error: low, expected, high, and by chance.

        Where chance gives the same, `high` is expected, which is right for adapters that have nothing in common. Where
        chance gives an error of 1 and they none, it is what W(m/2, k) and W(m, k) lead to, if W approaches its limit
        as 1/sqrt(n). Between, by the energy. On planted structure, 64 of 400 adapters: right to 0.03.
        Root mean squares become means as those of the sample do, and the bounds are apart by twice the standard error.
        """
        low, trend, high = self._bounds(self.found, k)
        chance = self._bounds(self.chance, k)[2]
        common = min(max(1 - high / chance, 0.0), 1.0) if chance > 0 else 0.0
        expected = high - common * (high - trend)
        own, spread = self._mean_over_rms(self.found, k)
        by_chance, _ = self._mean_over_rms(self.chance, k)
        low, expected, high = (own * e**0.5 for e in (low, expected, high))
        return max(low - 2 * spread, 0.0), expected, min(high + 2 * spread, 1.0), by_chance * chance**0.5

    def _bounds(self, of: Capture, k: int) -> tuple[float, float, float]:
        """Squared errors: the lower bound, where the trend leads, the upper bound."""
        whole, seen, held = (self._curve(c) for c in (of.whole, of.seen, of.held))
        j = np.linspace(0.0, k, 65)
        i = j + (k - j) * self.share
        own = held(j) + whole(i) - whole(j)
        kept = float(np.max(own + np.clip(1 - own, 0, None) * self._taken_in(k, i)))
        here = np.array([float(k)])
        low, half = 1 - float(whole(here)[0]), 1 - float(seen(here)[0])
        high = min(max(1 - kept, low), 1.0)
        trend = low + (low - half) * (1 - np.sqrt(self.share)) / (np.sqrt(2) - 1)
        return max(low, 0.0), float(np.clip(trend, max(low, 0.0), max(high, 0.0))), max(high, 0.0)

    def _curve(self, kept: Float64) -> Curve:
        points, options = [0.0, *self.ks], [0.0, *kept.mean(axis=1)]
        return lambda k: np.interp(k, points, options)

    def _taken_in(self, k: int, own: Float64) -> Float64:
        """Share of what `own` of k components leave of dW that the others take in by chance; mean over the modules."""
        left = np.maximum(self.dims[:, :, None] - own, 0.0)
        other = np.clip(k - own, 0.0, left)
        shares = np.divide(other, left, out=np.ones_like(left), where=left > 0).prod(axis=1)
        return np.asarray(self.energies @ shares / max(float(self.energies.sum()), 1e-300), np.float64)

    def _mean_over_rms(self, of: Capture, k: int) -> tuple[float, float]:
        """Of the errors of single adapters; and the standard error of their mean in a sample of so many of N.

        As they are in the sample for this k, or for the largest that leaves an error.
        """
        left = np.clip(1 - of.whole, 0, None)
        telling = np.flatnonzero((np.asarray(self.ks) <= max(k, self.ks[0])) & (left.mean(axis=1) > _ROUNDING))
        if not len(telling):
            return 1.0, 0.0
        errors = np.sqrt(left[telling[-1]])
        deviation = float(errors.std()) * ((1 - self.share) / len(errors)) ** 0.5
        return float(errors.mean() / np.sqrt((errors**2).mean())), deviation


def alike(likeness: Float64, least: Float64 | float) -> list[list[int]]:
    """Groups of two and more numbers that are connected by pairs at least so alike, the largest first.

    >>> alike(np.array([[1, 0, 0.9], [0, 1, 0], [0.9, 0, 1]]), 0.5)
    [[0, 2]]
    """
    left, groups = set(range(len(likeness))), []
    near = likeness >= least
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {int(j) for i in edge for j in np.flatnonzero(near[i])} - group
        left -= group
        groups.append(sorted(group))
    return sorted((g for g in groups if len(g) > 1), key=lambda g: (-len(g), g))


def with_common_initial(parallel: Float64, compared: Float64) -> list[list[int]]:
    """Groups of adapters whose lora_A began as the same random matrix, from cosines of rows in the same place.

    PEFT draws A at random and training adds to it, so that rows in the same place stay nearly parallel where the seed
    was the same: mean cosines of 0.7 to 1.0 in public collections. Elsewhere, what is learnt in common comes to a row
    with a sign of its own, so that the mean over c rows has a standard deviation of 1/sqrt(c) at most: 0.02 to 0.05 was
    measured. Unlike angles between row spaces, this does not take what is learnt in common for a common beginning.

    Args:
        parallel: (m, m) sums of these cosines. compared: (m, m) of how many rows.
    """
    count = np.maximum(compared, 1.0)
    return alike(parallel / count, np.clip(4 / np.sqrt(count), 0.3, 0.6))


def near_duplicates(inner: Float64) -> list[tuple[int, int, float, float]]:
    """Pairs of adapters with nearly the same dW, the nearest first: numbers, relative distance, cosine.

    Args:
        inner: (m, m) products of dW.
    """
    squares = np.maximum(np.diag(inner), 0.0)
    distance = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * inner, 0.0))
    larger = np.sqrt(np.maximum(squares[:, None], squares[None]))
    both = np.sqrt(np.outer(squares, squares))
    relative, cosine = distance / np.where(larger > 0, larger, 1.0), inner / np.where(both > 0, both, 1.0)
    pairs = np.argwhere(np.triu((cosine > SAME_DIRECTION) | ((relative < COPY) & (larger > 0)), 1)).tolist()
    return sorted(((i, j, float(relative[i, j]), float(cosine[i, j])) for i, j in pairs), key=lambda p: (p[2], p[:2]))


def recommended(outlooks: Sequence[Outlook]) -> str:
    """What to do, in one line.

    The rule: for each error of `TARGETS` there is a smallest k that is expected to have no more. The first target is
    taken of which that k is `PLENTY` times smaller, else the first of which it is `WORTH` times; else the adapters
    should stay as they are. That they share little is said unless, at the largest k that is `WORTH` times smaller, or
    that which is taken, at least `BEYOND_CHANCE` more of the energy is kept than by chance.

    Args:
        outlooks: by k, ascending.
    """
    worth = [o for o in outlooks if o.ratio >= WORTH]
    widest = worth[-1] if worth else None
    for enough in (PLENTY, WORTH):
        for target in TARGETS:
            best = next((o for o in worth if o.expected <= target), None)
            if best is not None and best.ratio >= enough:
                return f"{_little(best, widest)}compress -k {best.k}: {described(best)}"
    if widest is None:
        return f"{_little(None, None)}leave them as they are: no k saves much"
    if beyond_chance(widest):
        return f"compress -k {widest.k}, if that error will do: {described(widest)}"
    return f"{_little(widest)}leave them as they are; compress -k {widest.k} gives {described(widest)}"


def _little(*outlooks: Outlook | None) -> str:
    """That adapters share little, unless one of these has more than chance gives."""
    return (
        ""
        if any(o is not None and beyond_chance(o) for o in outlooks)
        else "these adapters share little beyond chance: "
    )


def beyond_chance(outlook: Outlook) -> bool:
    """Whether more is kept than adapters with nothing in common would let."""
    return outlook.chance**2 - outlook.expected**2 >= BEYOND_CHANCE


def described(o: Outlook) -> str:
    """Its figures, in one clause."""
    return (
        f"mean dW error about {o.expected:.3f} ({o.low:.3f} to {o.high:.3f}; by chance {o.chance:.3f}), LoRA "
        f"{o.ratio:.2f} times smaller"
    )
