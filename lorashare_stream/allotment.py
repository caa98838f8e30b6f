"""How many components each group gets: bought at one price, which a budget of bytes or of error decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .deltas import Float64
from .forms import Ints
from .names import bytes_shown

GRID = 12  # prices that are weighed at a time
ROUNDS = 6  # of weighing, each between two prices of the one before
NEAR = 0.005  # of a budget of bytes, that may be left unused
_SPAN = 40.0  # powers of two, over which prices are tried


@dataclass(frozen=True)
class Spectra:
    """What components there are to buy, for modules (m,) with their sides A and B.

    Attributes:
        modules: names.
        eigenvalues: of the group of each module and side, as many as are fitted, descending: the squared relative dW
            error, summed over adapters, that a component takes away.
        dims: d (m, 2).
        counts: n, the ranks of all adapters together (m,).
        most: min(d, n) (m, 2).
        item: bytes of a number as it is stored.
    """

    modules: tuple[str, ...]
    eigenvalues: Sequence[tuple[Float64, Float64]]
    dims: Ints
    counts: Ints
    most: Ints
    item: int

    @property
    def fitted(self) -> Ints:
        """Components that are there (m, 2)."""
        return np.array([[len(side) for side in both] for both in self.eigenvalues], np.int64).reshape(-1, 2)

    def basis_bytes(self, k: Ints) -> Ints:
        """Bytes of the components k (..., m, 2) of each module (..., m)."""
        found: Ints = self.item * (k * self.dims).sum(axis=-1)
        return found

    def uniform(self, k: int) -> Ints:
        """The same k in all groups (m, 2), clamped to what is there."""
        return np.minimum(k, self.fitted)

    def bought(self, price: float, ranks: Float64) -> Ints:
        """Components (m, 2) worth their price: each costs d numbers, and one for every rank of every adapter (m,)."""
        k = np.ones((len(self.modules), 2), np.int64)
        for m, both in enumerate(self.eigenvalues):
            for side, values in enumerate(both):
                cost = self.item * (self.dims[m, side] + ranks[m])
                k[m, side] = max(1, int((values >= price * cost).sum()))
        return k


@dataclass(frozen=True)
class Candidates:
    """Allotments k (q, m, 2) that are weighed together, each with its price (q,)."""

    k: Ints
    prices: Float64


@dataclass(frozen=True)
class Weighed:
    """What candidates come to, of one adapter or of all.

    Attributes:
        sizes: bytes of what is stored of adapters for each module (q, m).
        errors: squared relative dW error that comes of each module (q, m), summed over adapters.
        ranks: those that are shared (q, m), summed over adapters.
        fixed: bytes of all else (q,).
        least: the smallest uniform k at which the limit is met by all, sharing all; one more than there is if none is.
    """

    sizes: Float64
    errors: Float64
    ranks: Float64
    fixed: Ints
    least: int

    def __add__(self, other: Weighed) -> Weighed:
        return Weighed(
            self.sizes + other.sizes, self.errors + other.errors, self.ranks + other.ranks,
            self.fixed + other.fixed, max(self.least, other.least),
        )  # fmt: skip


@dataclass(frozen=True)
class Allotted:
    """An allotment, weighed.

    Attributes:
        k: components (m, 2).
        price: that bought them, and at which forms were chosen.
        sizes: bytes of each module, its bases included (m,).
        errors: squared relative dW error of each module (m,), summed over adapters.
        ranks: those that are shared (m,), of all adapters; all there are where none is.
        fixed: bytes of all else.
    """

    k: Ints
    price: float
    sizes: Float64
    errors: Float64
    ranks: Float64
    fixed: int

    @property
    def total(self) -> int:
        """Bytes of the whole checkpoint."""
        return int(self.sizes.sum()) + self.fixed

    @property
    def error(self) -> float:
        """Squared relative dW error, summed over adapters."""
        return float(self.errors.sum())


Weigh = Callable[[Candidates], Weighed]


def weighed(spectra: Spectra, weigh: Weigh, candidates: Candidates, overhead: int) -> tuple[list[Allotted], int]:
    """What candidates come to, and the least uniform k that meets the limit."""
    found = weigh(candidates)
    sizes = spectra.basis_bytes(candidates.k) + found.sizes
    ranks = np.where(candidates.k.sum(axis=-1) > 0, found.ranks, spectra.counts)
    each = zip(candidates.k, candidates.prices.tolist(), sizes, found.errors, ranks, found.fixed.tolist(), strict=True)
    return [Allotted(k, p, size, e, r, fixed + overhead) for k, p, size, e, r, fixed in each], found.least


def bought_at(spectra: Spectra, prices: Sequence[float], near: Sequence[Allotted]) -> Candidates:
    """Components bought at prices (q,), with as many ranks to pay for as were shared near them."""
    ks = []
    for price in prices:
        known = min(near, key=lambda a: abs(np.log2(a.price / price)), default=None)
        ks.append(spectra.bought(price, spectra.counts.astype(float) if known is None else known.ranks))
    return Candidates(np.array(ks, np.int64).reshape(len(ks), -1, 2), np.array(prices, float))


def with_none(candidates: Candidates) -> Candidates:
    """Candidates, and at the same prices nothing shared."""
    return Candidates(np.concatenate((candidates.k, 0 * candidates.k)), np.tile(candidates.prices, 2))


def best_of(one: Allotted, other: Allotted) -> Allotted:
    """Of two allotments at the same price, for each module the one that is worth more: neither depends on the rest."""
    price = one.price
    better = one.errors + price * one.sizes <= other.errors + price * other.sizes
    return Allotted(
        np.where(better[:, None], one.k, other.k),
        price,
        np.where(better, one.sizes, other.sizes),
        np.where(better, one.errors, other.errors),
        np.where(better, one.ranks, other.ranks),
        max(one.fixed, other.fixed),
    )


def price_range(spectra: Spectra) -> tuple[float, float]:
    """Prices, from one at which all that is fitted is bought to one at which each group gets one component."""
    firsts = [
        values[0] / (spectra.item * spectra.dims[m, side])
        for m, both in enumerate(spectra.eigenvalues)
        for side, values in enumerate(both)
        if len(values)
    ]
    high = max(firsts, default=1.0) or 1.0
    return high * 2.0**-_SPAN, 2 * high


def largest_within(spectra: Spectra, weigh: Weigh, limit: int, overhead: int) -> tuple[Allotted | None, Allotted]:
    """The allotment of least error whose checkpoint has `limit` bytes at most; None if none has. And the smallest."""
    low, high = price_range(spectra)
    tried: list[Allotted] = []
    for _ in range(ROUNDS):
        prices = np.geomspace(low, high, GRID).tolist()
        found, _ = weighed(spectra, weigh, with_none(bought_at(spectra, prices, tried)), overhead)
        fresh = [best_of(one, none) for one, none in zip(found[:GRID], found[GRID:], strict=True)]
        tried += fresh
        fitting = [a for a in tried if a.total <= limit]
        if not fitting:
            break
        cheapest = min(a.price for a in fitting)
        over = [a.price for a in tried if a.total > limit and a.price < cheapest]
        if max(a.total for a in fitting) >= (1 - NEAR) * limit or not over:
            break
        low, high = max(over), cheapest
    fitting = [a for a in tried if a.total <= limit]
    best = min(fitting, key=lambda a: (a.error, a.total)) if fitting else None
    return best, min(tried, key=lambda a: a.total)


def smallest_with(spectra: Spectra, weigh: Weigh, overhead: int) -> tuple[Allotted, int]:
    """The allotment of fewest bytes that meets the limit on errors of every adapter; and the least uniform k that does.

    It is a heuristic: components are bought as for the mean. Among what is weighed are the best uniform k of all that
    is fitted, all adapters sharing all, and nothing shared at all; so it is never larger than these.
    """
    low, high = price_range(spectra)
    prices = np.geomspace(low, high, GRID).tolist()
    nothing = Candidates(np.zeros((1, len(spectra.modules), 2), np.int64), np.array([high]))
    (none,), least = weighed(spectra, weigh, nothing, overhead)
    path = weighed(spectra, weigh, bought_at(spectra, prices, ()), overhead)[0]
    tried = [none, *path]
    if least <= int(spectra.fitted.max(initial=0)):
        tried += weighed(spectra, weigh, Candidates(spectra.uniform(least)[None], np.array([high])), overhead)[0]
    for _ in range(2):
        path.sort(key=lambda a: a.price)
        place = min(range(len(path)), key=lambda i: path[i].total)
        ends = path[max(0, place - 1)].price, path[min(len(path) - 1, place + 1)].price
        fresh = bought_at(spectra, np.geomspace(*ends, GRID // 2).tolist(), path)
        kept = np.array([path[place].sizes < none.sizes])  # modules whose bases are worth their bytes there
        both = Candidates(np.concatenate((fresh.k, fresh.k * kept[..., None])), np.tile(fresh.prices, 2))
        found = weighed(spectra, weigh, both, overhead)[0]
        tried += found
        path += found[: GRID // 2]
    return min(tried, key=lambda a: (a.total, a.error)), least


def touches(spectra: Spectra, found: Allotted) -> bool:
    """Whether a group has all components that are fitted, and could have more."""
    return bool(((found.k == spectra.fitted) & (spectra.fitted < spectra.most)).any())


def uniform_bytes(spectra: Spectra, k: int) -> int:
    """Bytes of bases and loadings if all share all at the same k, be it fitted or not."""
    clamped = np.minimum(k, spectra.most)
    return int(spectra.item * (clamped * (spectra.dims + spectra.counts[:, None])).sum())


def told(found: Allotted, adapters: int) -> str:
    """What an allotment comes to, for the log."""
    k = found.k[found.k.sum(axis=-1) > 0]
    ends = f"k from {k.min()} to {k.max()}" if len(k) else "nothing shared"
    return f"{bytes_shown(found.total)}, rms dW error {np.sqrt(found.error / max(1, adapters)):.4f}, {ends}"
