"""The forms in which a module of an adapter can be stored, what each costs and loses, and which is taken.

    shared    loadings on the bases, at rank j <= r: dW^ = U C_j V', C_j the best rank-j part of the core C = U'dW V
    own       factors of the adapter's own, at rank q <= r: the best rank-q part of dW (Eckart-Young)
    verbatim  the tensors as they came

A *price* is what a byte is worth, in squared relative dW error of the adapter: a form is better the smaller
error^2 + price * bytes. A *limit* asks for the fewest bytes whose error is within it: then the price is the adapter's
own, the highest that meets the limit (Lagrangian relaxation, Everett 1963: what it finds is optimal for its own error).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..adapters.dtypes import ITEMSIZE, alone_as, stored_bytes
from ..linalg.moments import partner_root
from ..linalg.types import Float64

Ints = NDArray[np.int64]
_HEADER = 70  # bytes of a safetensors header for a tensor, beside its key
_PATTERNS = 24  # bytes of a module in rank_pattern and alpha_pattern, beside its name twice
_DIFFER = 0.5  # share of the modules with another rank than before that need a pattern; most have the same
_HALVINGS = 24  # of the range of prices that is searched
_ROUNDED = 0.015  # relative dW error of rounding to int8, which adds up in squares: 0.011 to 0.020 were measured


@dataclass(frozen=True)
class Rule:
    """By what the form of every module is chosen.

    Attributes:
        price: of a byte, in squared relative dW error of the adapter.
        limit: on the relative dW error of every adapter; None if the price decides.
        own: whether a module may be stored without the bases.
    """

    price: float = 0.0
    limit: float | None = None
    own: bool = True


@dataclass(frozen=True)
class Options:
    """What the modules of one adapter can be stored as.

    Columns are the forms: shared at rank 1 to R, own at rank 1 to R, verbatim. Leading axes are of alternatives.

    Attributes:
        sizes: bytes (..., m, 2R + 1) float64; infinite where a form is not possible.
        errors: squared relative dW error of the adapter that comes of each module (..., m, 2R + 1).
        shared: the column in which each module is shared at its full rank (m,).
    """

    sizes: Float64
    errors: Float64
    shared: Ints

    def of(self, columns: Ints) -> tuple[Float64, Float64]:
        """Bytes and errors (..., m) of the forms that are chosen."""
        at = columns[..., None]
        return (
            np.take_along_axis(self.sizes, at, -1)[..., 0],
            np.take_along_axis(np.broadcast_to(self.errors, self.sizes.shape), at, -1)[..., 0],
        )


@dataclass(frozen=True)
class Kept:
    """What modules of one adapter (m,) are, as far as storing them goes.

    Attributes:
        names: of the modules.
        ranks: r (m,). dims: d_in + d_out (m,).
        nbytes: of both tensors as they came (m,).
        plain: whether each can have another rank: of stacked experts, no.
    """

    names: Sequence[str]
    ranks: Ints
    dims: Ints
    nbytes: Ints
    plain: NDArray[np.bool_]


def options(kept: Kept, own: Float64, core: Float64, k: Ints, storage: str, energy: float) -> Options:
    """All forms of the modules of one adapter.

    Args:
        kept: the modules.
        own: squared singular values of dW (m, R), descending, zero beyond the rank.
        core: those of the core in the bases (..., m, R).
        k: components of A and of B together (..., m); 0 where there is no basis.
        storage: dtype of components and loadings.
        energy: ||dW||^2 of the whole adapter.
    """
    m, most = own.shape
    rank = np.arange(1, most + 1)
    norms = own.sum(axis=-1)[:, None]
    fits = (rank <= kept.ranks[:, None]) & (kept.plain[:, None] | (rank == kept.ranks[:, None]))
    names = np.array([len(name) for name in kept.names])[:, None]
    changed = np.where(rank != kept.ranks[:, None], _DIFFER * (2 * names + _PATTERNS), 0)
    heads = 2 * (names + _HEADER)
    scales = 2 * stored_bytes(0, 1, storage)  # of a rank, on both sides
    loadings = (ITEMSIZE[storage] * k[..., None] + scales) * rank
    shared = np.where(fits & (k[..., None] > 0), loadings + heads + changed, np.inf)
    factors = ITEMSIZE[alone_as(storage)] * kept.dims[:, None] * rank
    alone = np.where(fits & kept.plain[:, None], factors + heads + changed, np.inf)
    whole = kept.nbytes[:, None] + heads
    lost = np.clip(norms - np.cumsum(core, axis=-1), 0.0, None)
    left = np.clip(norms - np.cumsum(own, axis=-1), 0.0, None)
    lead = lost.shape[:-2]
    parts = (shared, np.broadcast_to(alone, (*lead, m, most)), np.broadcast_to(whole, (*lead, m, 1)))
    errors = np.concatenate((lost, np.broadcast_to(left, lost.shape), np.zeros((*lead, m, 1))), axis=-1)
    return Options(np.concatenate(parts, axis=-1), errors / (energy or 1.0), kept.ranks - 1)


def pattern_bytes(kept: Kept, columns: Ints, most: int) -> Ints:
    """Bytes (...) by which patterns exceed what `options` takes for them, given the forms of modules (..., m).

    What most modules have is the default rank, so that only the others need a pattern.
    """
    ranks = np.where(columns == 2 * most, kept.ranks, columns % most + 1)
    each = 2 * np.array([len(name) for name in kept.names]) + _PATTERNS
    commonest = np.array([np.bincount(row).argmax() for row in ranks.reshape(-1, ranks.shape[-1])])
    differing = ranks != commonest.reshape(ranks.shape[:-1])[..., None]
    changed = ranks != kept.ranks
    needed = np.where(changed.any(axis=-1), (differing * each).sum(axis=-1), 0)
    found: Ints = np.ceil(needed - (changed * _DIFFER * each).sum(axis=-1)).astype(np.int64)
    return found


def aimed(limit: float, storage: str) -> float:
    """The error that forms may have for a limit on what is stored: less if rounding takes more than a trifle of it."""
    return max(limit**2 - _ROUNDED**2, limit**2 / 4) ** 0.5 if storage == "I8" else limit


def without_own(given: Options) -> Options:
    """Options of which only the shared forms are open, where there is one."""
    most = given.sizes.shape[-1] // 2
    sizes = given.sizes.copy()
    possible = np.isfinite(sizes[..., :most]).any(axis=-1)
    sizes[..., most:][possible] = np.inf
    return Options(sizes, given.errors, given.shared)


def chosen(given: Options, rule: Rule) -> Ints:
    """The form of each module (..., m), by a rule."""
    if rule.limit is not None:
        return within(given, rule.limit**2)
    return at_price(given if rule.own else without_own(given), np.asarray(rule.price))


def at_price(given: Options, prices: Float64) -> Ints:
    """The forms (..., m) whose errors and bytes, at a price (...) for these, are least."""
    possible = np.isfinite(given.sizes)  # at a price of zero too
    costs = np.where(possible, prices[..., None, None] * np.where(possible, given.sizes, 0.0), np.inf)
    found: Ints = np.argmin(given.errors + costs, axis=-1)
    return found


def within(given: Options, limit: float) -> Ints:
    """Forms (..., m) of few bytes whose errors sum to `limit` at most, which one form of every module must allow."""
    lead = given.sizes.shape[:-2]
    low, high = np.full(lead, -60.0), np.full(lead, 10.0)  # of log2 price; a byte is worth no more than all energy
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = given.of(at_price(given, 2.0**middle))[1].sum(axis=-1) <= limit
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    best = at_price(given, 2.0**low)
    exact = np.broadcast_to(np.int64(given.sizes.shape[-1] - 1), best.shape)
    for other in (np.broadcast_to(given.shared, best.shape), exact):  # what lies off the convex hull, perhaps
        (sizes, errors), (most, lost) = given.of(other), given.of(best)
        total, before = sizes.sum(axis=-1), np.where(lost.sum(axis=-1) <= limit, most.sum(axis=-1), np.inf)
        better = (errors.sum(axis=-1) <= limit) & (total < before)
        best = np.where(better[..., None], other, best)
    return best


def core_values(a: Float64, b: Float64, scales: Float64, experts: int = 1) -> Float64:
    """Squared singular values (..., r), descending, of s L_B L_A', from the Gram matrices of both (..., r, r).

    Of stacked experts, whose ranks stay, the first is the sum of all of theirs.
    """
    if experts > 1:
        return _stacked_values(a, b, scales, experts)
    root: Float64 = partner_root(a, np.abs(scales)[..., None, None])
    values = np.linalg.eigvalsh(root @ b @ np.swapaxes(root, -1, -2))[..., ::-1]
    found: Float64 = np.clip(values, 0.0, None)
    return found


def _stacked_values(a: Float64, b: Float64, scales: Float64, experts: int) -> Float64:
    found = np.zeros(a.shape[:-1])
    r = a.shape[-1] // experts
    for e in range(experts):  # lora_A lies expert by expert, lora_B has them innermost
        block = a[..., e * r : (e + 1) * r, e * r : (e + 1) * r] * b[..., e::experts, e::experts]
        found[..., 0] += np.clip(block.sum(axis=(-2, -1)), 0.0, None)
    found *= np.asarray(scales)[..., None] ** 2
    return found


def reduced(left: Float64, right: Float64, scale: float, rank: int) -> tuple[Float64, Float64]:
    """Balanced factors P (a, rank), Q (b, rank) of the best approximation s P Q' of s L R', for L (a, r), R (b, r).

    Both have the same singular values, so that rounding hurts neither more. Where dW has fewer, the rest is zero.
    """
    (q_left, r_left), (q_right, r_right) = np.linalg.qr(left), np.linalg.qr(right)
    u, values, vt = np.linalg.svd(scale * (r_left @ r_right.T))
    there = min(rank, len(values))
    halves = np.sqrt(values[:there] / (abs(scale) or 1.0))
    p, q = q_left @ (u[:, :there] * halves), q_right @ (vt[:there].T * halves * (np.sign(scale) or 1.0))
    missing = [(0, 0), (0, rank - there)]
    return np.pad(p, missing), np.pad(q, missing)


def padded(values: Float64, most: int) -> Float64:
    """(..., r) with zeros up to (..., most)."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, most - values.shape[-1])])
