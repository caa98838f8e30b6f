"""What components there are to buy, and what buying them comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..linalg.types import Float64
from .forms import Ints


@dataclass(frozen=True)
class Spectra:
    """What components there are to buy, for modules (m,) with their sides A and B.

    Attributes:
        modules: names.
        eigenvalues: of the group of each module and side, as many as are fitted, descending: the squared relative dW
            error, summed over adapters, that a component takes away.
        dims: d (m, 2), and what is stored of a component beside.
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
        """Bytes of the components k (..., m, 2) of each module (..., m), and of their eigenvalues."""
        found: Ints = self.item * (k * self.dims).sum(axis=-1) + 8 * k.sum(axis=-1)
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


def uniform_bytes(spectra: Spectra, k: int) -> int:
    """Bytes of bases and loadings if all share all at the same k, be it fitted or not."""
    return spectra.held_bytes(np.minimum(k, spectra.most), spectra.counts.astype(float))
