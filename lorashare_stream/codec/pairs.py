"""Pairs: an adapter in the gauge in which it is coded, quantised at one step, one side refitted to the other.

Gauge: dW = P S Q' with P'P = Q'Q = I, of each module, and of each expert of a stacked one: a form of dW = s B A that
all factors (A, B) of the same dW share. The vectors that are coded are P S / n and Q S / n, where n = ||dW|| over the
whole adapter: to first order the relative squared error of dW is the sum of their squared errors, so that every
coefficient counts the same, whatever its module, side or adapter.

Refit (closed loop): with B^ = step qB, lora_A is the least-squares solution for B^, weighted by the lengths of its
columns, so that its coefficients again count as much as those of B. It takes what B has lost: 4 to 8 % fewer bits at
the same error. In this gauge that is X_A = N G^-1 (qB P) S Q' / n, G = qB qB', N the lengths of the rows of qB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum, sqrt

import numpy as np

from ..adapters.dtypes import Array, Float64
from ..adapters.keys import Side
from ..adapters.scaling import Scaling
from .directions import Directions, Integers

_RIDGE = 1e-9  # of each diagonal entry of G


@dataclass(frozen=True)
class Pairs:
    """Singular triplets of n pairs of factors of one shape, as rows.

    Attributes:
        left: P' (n, r, d_out) float32.
        right: Q' (n, r, d_in) float32.
        values: S (n, r) float64, descending, of s B A.
    """

    left: Array
    right: Array
    values: Float64

    @property
    def energy(self) -> float:
        """The sum of ||dW||^2 over the pairs."""
        return float(np.square(self.values).sum())


def norm_of(batches: Iterable[Pairs]) -> float:
    """||dW|| of an adapter that is made of these pairs."""
    return sqrt(fsum(pairs.energy for pairs in batches))


def pairs_of(a: Array, b: Array, scalings: Sequence[Scaling]) -> Pairs:
    """The pairs of modules of one shape, E from each, module by module.

    Args:
        a: lora_A (m, E r, d_in).
        b: lora_B (m, d_out, E r).
        scalings: of each module; E is the same in all.
    """
    q_a, r_a = _orthonormal(a, "A", scalings[0])
    q_b, r_b = _orthonormal(b.swapaxes(-1, -2), "B", scalings[0])
    scales = np.repeat([p.scale for p in scalings], scalings[0].experts)[:, None, None]
    u, values, vt = np.linalg.svd(scales * (r_b @ r_a.swapaxes(-1, -2)), full_matrices=False)
    left, right = (u.swapaxes(-1, -2) @ q_b.swapaxes(-1, -2)).astype(np.float32), vt @ q_a.swapaxes(-1, -2)
    peaks = np.take_along_axis(left, np.abs(left).argmax(-1, keepdims=True), -1)
    signs = np.where(peaks < 0, np.float32(-1), np.float32(1))  # the largest entry of P is positive
    return Pairs(left * signs, right.astype(np.float32) * signs, values)


def _orthonormal(rows: Array, side: Side, scaling: Scaling) -> tuple[Float64, Float64]:
    """Q (m E, d, r) and R of the vectors of each expert, given as rows (m, E r, d)."""
    blocks = scaling.blocks(rows, side)
    columns = blocks.reshape(-1, *blocks.shape[-2:]).swapaxes(-1, -2)
    return np.linalg.qr(columns.astype(np.float64))


@dataclass(frozen=True)
class Quantised:
    """The integers of n pairs: those of a column that is zero on one side are zero on both.

    Attributes:
        left, right: of the sides of d_out and d_in.
        error: ||dW - dW^||^2 / n^2, summed over the pairs, from float32 products.
    """

    left: Integers
    right: Integers
    error: float


def quantise(pairs: Pairs, on: tuple[Directions, Directions], norm: float, step: float) -> Quantised:
    """Pairs of an adapter with ||dW|| = `norm`, on directions of both sides, quantised at `step`.

    The step is of coefficients divided by the norm.
    """
    weights = (pairs.values / norm).astype(np.float32)[..., None]
    left = on[0].quantised(pairs.left * weights, step)
    columns = on[0].sums(left)
    grams = _products(columns, columns)
    lengths = np.sqrt(np.diagonal(grams, axis1=-2, axis2=-1))[..., None]  # (n, r, 1)
    onto = _products(columns, pairs.left)  # qB P (n, r, r)
    solved = _solved(grams, onto * (pairs.values / norm)[..., None, :]) * lengths
    right = on[1].quantised(solved.astype(np.float32) @ pairs.right, step)
    both = (lengths[..., 0] > 0) & right.live
    if not both.all():
        left, right = left.only(both), right.only(both)
        columns = on[0].sums(left)
    return Quantised(left, right, _error(pairs, norm, step, columns, on[1].sums(right)))


def _solved(grams: Float64, right: Float64) -> Array:
    """G^-1 times (n, r, r), with a ridge; rows of zeros stay zero."""
    i = np.arange(grams.shape[-1])
    diagonal = grams[:, i, i]
    grams[:, i, i] = np.where(diagonal > 0, diagonal * (1 + _RIDGE), 1.0)
    return np.linalg.solve(grams, right)


def _products(rows: Array, others: Array) -> Float64:
    """Scalar products (n, r, r) of rows, in float32."""
    return (rows @ others.swapaxes(-1, -2)).astype(np.float64)


def _error(pairs: Pairs, norm: float, step: float, left: Array, right: Array) -> float:
    """||W - sum_j step qB_j qA_j' / |qB_j| ||^2 of W = P S Q' / n."""
    gram_left, gram_right = _products(left, left), _products(right, right)
    lengths = np.sqrt(np.diagonal(gram_left, axis1=-2, axis2=-1))
    factor = step / np.where(lengths > 0, lengths, 1.0)  # (n, r)
    on_left, on_right = _products(left, pairs.left), _products(right, pairs.right)  # (n, r, r): qB_j . P_i
    cross = np.einsum("nji,nji,ni,nj->", on_left, on_right, pairs.values / norm, factor)
    square = np.einsum("njk,njk,nj,nk->", gram_left, gram_right, factor, factor)
    return float(pairs.energy / norm**2 - 2 * cross + square)
