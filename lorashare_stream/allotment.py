"""How many components each group gets: bought at one price, which a budget of bytes or of error decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .deltas import Float64
from .forms import Ints
from .names import bytes_shown

GRID = 8  # prices that are weighed at a time
WIDTHS = (2.0, 1.25, 1.0)  # up to which factor a round of weighing tries other prices; of the last it does not matter
_SPAN = 40.0  # powers of two, over which prices are tried at most
_HALVINGS = 30  # of a range of prices


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

    def held_bytes(self, k: Ints, ranks: Float64) -> int:
        """Bytes of components k (m, 2), and of loadings of so many ranks (m,) on them."""
        return int((k * (self.dims + ranks[:, None])).sum() * self.item)

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
    """Allotments k (q, m, 2) that are weighed together, each with its price, and whether forms may be own ones (q,)."""

    k: Ints
    prices: Float64
    own: NDArray[np.bool_]


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
        own: whether modules may be stored without bases.
        sizes: bytes of each module, its bases included (m,).
        errors: squared relative dW error of each module (m,), summed over adapters.
        ranks: those that are shared (m,), of all adapters; all there are where none is.
        fixed: bytes of all else.
    """

    k: Ints
    price: float
    own: bool
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
    asked = candidates.prices.tolist(), candidates.own.tolist()
    each = zip(candidates.k, *asked, sizes, found.errors, ranks, found.fixed.tolist(), strict=True)
    return [Allotted(k, p, own, size, e, r, fixed + overhead) for k, p, own, size, e, r, fixed in each], found.least


def bought_at(spectra: Spectra, prices: Sequence[float], ranks: Float64) -> Candidates:
    """Components bought at prices (q,), if `ranks` (m,) have to be paid for of each module."""
    ks = [spectra.bought(price, ranks) for price in prices]
    return candidates_of(np.array(ks, np.int64).reshape(len(ks), -1, 2), prices)


def candidates_of(k: Ints, prices: Sequence[float], *, own: bool = True) -> Candidates:
    """Candidates with the same freedom of forms."""
    return Candidates(k, np.array(prices, float), np.full(len(k), own))


def joined(*some: Candidates) -> Candidates:
    """All candidates, one after the other."""
    ks, prices, own = zip(*((c.k, c.prices, c.own) for c in some), strict=True)
    return Candidates(np.concatenate(ks), np.concatenate(prices), np.concatenate(own))


def best_of(one: Allotted, other: Allotted) -> Allotted:
    """Of two allotments at the same price, for each module the one that is worth more: neither depends on the rest."""
    price = one.price
    better = one.errors + price * one.sizes <= other.errors + price * other.sizes
    return Allotted(
        np.where(better[:, None], one.k, other.k),
        price,
        one.own,
        np.where(better, one.sizes, other.sizes),
        np.where(better, one.errors, other.errors),
        np.where(better, one.ranks, other.ranks),
        max(one.fixed, other.fixed),
    )


def price_range(spectra: Spectra) -> tuple[float, float]:
    """Prices, from one at which all that is fitted is bought to one at which each group gets one component."""
    sides = [
        (values, spectra.item * spectra.dims[m, side], spectra.item * spectra.counts[m])
        for m, both in enumerate(spectra.eigenvalues)
        for side, values in enumerate(both)
        if len(values)
    ]
    high = max((float(values[0] / d) for values, d, _ in sides), default=1.0) or 1.0
    low = min((float(values[-1] / (d + n)) for values, d, n in sides), default=0.0)
    return max(low / 2, high * 2.0**-_SPAN), 2 * high


def price_of_size(spectra: Spectra, ranks: Float64, size: int) -> float:
    """The price at which bases and loadings have `size` bytes, if `ranks` (m,) are shared of each module."""
    low, high = (float(np.log2(price)) for price in price_range(spectra))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        k = spectra.bought(2.0**middle, ranks)
        low, high = (middle, high) if spectra.held_bytes(k, ranks) > size else (low, middle)
    return float(2.0**high)


def largest_within(spectra: Spectra, weigh: Weigh, limit: int, overhead: int) -> tuple[Allotted | None, Allotted]:
    """The allotment of least error whose checkpoint has `limit` bytes at most; None if none has. And the smallest.

    What components cost depends on the ranks that are shared, and these on the components: each round takes the ranks
    that were shared near the limit in the one before, and tries prices nearer to the one at which bases and loadings
    fill it. What is left at the end buys ranks.
    """
    ranks = spectra.counts.astype(float)
    low, high = (price_of_size(spectra, share * ranks, limit) for share in (0.0, 1.0))
    low, high = low / 2, 2 * high  # between these, as forms cost something else too
    tried: list[Allotted] = []
    for width in WIDTHS:
        fresh = _at_prices(spectra, weigh, np.geomspace(low, high, GRID).tolist(), ranks, overhead)
        tried += fresh
        nearest = min(fresh, key=lambda a: abs(a.total - limit))
        ranks = nearest.ranks
        others = nearest.total - spectra.held_bytes(nearest.k, ranks)  # headers, what is verbatim or own
        price = price_of_size(spectra, ranks, max(1, limit - others))
        low, high = price / width, price * width
    if min(a.total for a in tried) > limit:
        top = price_range(spectra)[1]
        tried += _at_prices(spectra, weigh, np.geomspace(high, top, GRID).tolist(), ranks, overhead)
    fitting = [a for a in tried if a.total <= limit]
    if not fitting:
        return None, min(tried, key=lambda a: a.total)
    best = min(fitting, key=lambda a: (a.error, a.total))
    low, high = best.price / 2, best.price  # of ranks only
    for _ in range(2):
        prices = np.geomspace(low, high, GRID).tolist()
        rest = candidates_of(np.repeat(best.k[None], GRID, axis=0), prices, own=best.own)
        filled = [a for a in weighed(spectra, weigh, rest, overhead)[0] if a.total <= limit]
        fitting += filled
        high = min((a.price for a in filled), default=high)
        low = max((p for p in prices if p < high), default=high / 2)
    return min(fitting, key=lambda a: (a.error, a.total)), best


def _at_prices(
    spectra: Spectra, weigh: Weigh, prices: Sequence[float], ranks: Float64, overhead: int
) -> list[Allotted]:
    """What is bought at some prices: with bases only, and with whatever is worth more for each module."""
    path = bought_at(spectra, prices, ranks)
    every = joined(path, candidates_of(0 * path.k, prices), candidates_of(path.k, prices, own=False))
    found, _ = weighed(spectra, weigh, every, overhead)
    n = len(prices)
    return [best_of(one, none) for one, none in zip(found[:n], found[n : 2 * n], strict=True)] + found[2 * n :]


def smallest_with(spectra: Spectra, weigh: Weigh, overhead: int) -> tuple[Allotted, int]:
    """The allotment of fewest bytes that meets the limit on errors of every adapter; and the least uniform k that does.

    It is a heuristic: components are bought as for the mean. Among what is weighed are the best uniform k of all that
    is fitted, all adapters sharing all, and nothing shared at all; so it is never larger than these.
    """
    low, high = price_range(spectra)
    prices = np.geomspace(low, high, 2 * GRID).tolist()
    nothing = candidates_of(np.zeros((1, len(spectra.modules), 2), np.int64), [high])
    (none,), least = weighed(spectra, weigh, nothing, overhead)
    path = weighed(spectra, weigh, bought_at(spectra, prices, spectra.counts.astype(float)), overhead)[0]
    tried = [none, *path]
    if least <= int(spectra.fitted.max(initial=0)):
        tried += weighed(spectra, weigh, candidates_of(spectra.uniform(least)[None], [high]), overhead)[0]
    for _ in range(2):
        path.sort(key=lambda a: a.price)
        place = min(range(len(path)), key=lambda i: path[i].total)
        ends = path[max(0, place - 1)].price, path[min(len(path) - 1, place + 1)].price
        fresh = bought_at(spectra, np.geomspace(*ends, GRID // 2).tolist(), path[place].ranks)
        kept = np.array([path[place].sizes < none.sizes])  # modules whose bases are worth their bytes there
        both = joined(fresh, candidates_of(fresh.k * kept[..., None], fresh.prices.tolist()))
        found = weighed(spectra, weigh, both, overhead)[0]
        tried += found
        path += found[: GRID // 2]
    return min(tried, key=lambda a: (a.total, a.error)), least


def touches(spectra: Spectra, found: Allotted) -> bool:
    """Whether a group has all components that are fitted, and could have more."""
    return bool(((found.k == spectra.fitted) & (spectra.fitted < spectra.most)).any())


def uniform_bytes(spectra: Spectra, k: int) -> int:
    """Bytes of bases and loadings if all share all at the same k, be it fitted or not."""
    return spectra.held_bytes(np.minimum(k, spectra.most), spectra.counts.astype(float))


def told(found: Allotted, adapters: int) -> str:
    """What an allotment comes to, for the log."""
    k = found.k[found.k.sum(axis=-1) > 0]
    ends = f"k from {k.min()} to {k.max()}" if len(k) else "nothing shared"
    return f"{bytes_shown(found.total)}, rms dW error {np.sqrt(found.error / max(1, adapters)):.4f}, {ends}"
