"""How many components each group gets: bought at one price, which a budget of bytes or of error decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..linalg.types import Float64
from ..text import bytes_shown
from .offers import Allotted, Spectra, Weigh, best_of, bought_at, candidates_of, joined, uniform_bytes, weighed

GRID = 8  # prices that are weighed at a time
WIDTHS = (
    2.0,
    1.25,
    1.04,
    1.0,
)  # factors, up to which the next round tries other prices; the last is not used
_SPAN = 40.0  # powers of two, over which prices are tried at most
_HALVINGS = 30  # of a range of prices


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


def largest_within(spectra: Spectra, weigh: Weigh, limit: int, overhead: int) -> tuple[Allotted | None, list[Allotted]]:
    """The allotment of least error whose checkpoint has `limit` bytes at most, if one has; and all that was tried.

    What components cost depends on the ranks that are shared, and these on the components: each round takes the ranks
    that were shared near the limit in the one before, and tries prices nearer to the one at which bases and loadings
    fill it. The largest uniform k that fits, all ranks being shared, is tried too. What is left at the end buys ranks.
    """
    ranks = spectra.counts.astype(float)
    low, high = (price_of_size(spectra, share * ranks, limit) for share in (0.0, 1.0))
    low, high = low / 2, 2 * high  # between these, as forms cost something else too
    others = 0
    tried: list[Allotted] = []
    for width in WIDTHS:
        fresh = _at_prices(spectra, weigh, np.geomspace(low, high, GRID).tolist(), ranks, overhead)
        tried += fresh
        nearest = min(fresh, key=lambda a: abs(a.total - limit))
        ranks = nearest.ranks
        others = nearest.total - spectra.held_bytes(nearest.k, ranks)  # headers, what is verbatim or own
        price = price_of_size(spectra, ranks, max(1, limit - others))
        low, high = price / width, price * width
    even = _largest_even(spectra, limit - others)
    if even:  # where there is little to buy, steps between prices are coarse
        both = np.stack([spectra.uniform(k) for k in (even, max(1, even - 1))])
        all_ranks = candidates_of(both, [low * 2.0**-_SPAN] * 2, own=False)
        tried += weighed(spectra, weigh, all_ranks, overhead)[0]
    top = price_range(spectra)[1]
    if min(a.total for a in tried) > limit:
        tried += _at_prices(spectra, weigh, np.geomspace(high, top, GRID).tolist(), ranks, overhead)
    tried += _at_prices(spectra, weigh, [top * 2.0**_SPAN], ranks, overhead)  # the smallest that there is
    fitting = [a for a in tried if a.total <= limit]
    if not fitting:
        return None, tried
    best = _filled(spectra, weigh, min(fitting, key=lambda a: (a.error, a.total)), limit, overhead)
    return best, [*tried, best]


def at_many_prices(spectra: Spectra, weigh: Weigh, overhead: int) -> list[Allotted]:
    """What is bought at prices over the whole range: how errors go with bytes."""
    prices = np.geomspace(*price_range(spectra), 2 * GRID).tolist()
    return _at_prices(spectra, weigh, prices, spectra.counts.astype(float), overhead)


def frontier(tried: Sequence[Allotted], adapters: int) -> list[tuple[int, float]]:
    """Bytes and rms relative dW error of what was tried, as predicted, where no smaller one had less error."""
    points: list[tuple[int, float]] = []
    for one in sorted(tried, key=lambda a: (a.total, a.error)):
        error = float(np.sqrt(one.error / max(1, adapters)))
        if not points or error < points[-1][1]:
            points.append((one.total, error))
    return points


def _filled(spectra: Spectra, weigh: Weigh, best: Allotted, limit: int, overhead: int) -> Allotted:
    """An allotment whose ranks are bought at a lower price, for what is left of a limit."""
    fitting, low, high = [best], best.price / 2, best.price
    for _ in range(2):
        prices = np.geomspace(low, high, GRID).tolist()
        rest = candidates_of(np.repeat(best.k[None], GRID, axis=0), prices, own=best.own)
        filled = [a for a in weighed(spectra, weigh, rest, overhead)[0] if a.total <= limit]
        fitting += filled
        high = min((a.price for a in filled), default=high)
        low = max((p for p in prices if p < high), default=high / 2)
    return min(fitting, key=lambda a: (a.error, a.total))


def _largest_even(spectra: Spectra, size: int) -> int:
    """The largest k that all groups can have if all adapters share all, in `size` bytes."""
    fits = [k for k in range(1, int(spectra.fitted.max(initial=0)) + 1) if uniform_bytes(spectra, k) <= size]
    return max(fits, default=0)


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


def told(found: Allotted, adapters: int) -> str:
    """What an allotment comes to, for the log."""
    k = found.k[found.k.sum(axis=-1) > 0]
    ends = f"k from {k.min()} to {k.max()}" if len(k) else "nothing shared"
    return f"{bytes_shown(found.total)}, rms dW error {np.sqrt(found.error / max(1, adapters)):.4f}, {ends}"
