"""Gauge: a form of dW = s B A that all factors (A, B) of the same dW share.

dW_i = P S Q' with P'P = Q'Q = I, of each module i, and of each expert of a stacked one. The vectors that are coded are
P S / n and Q S / n, where n = ||dW|| over the whole adapter: to first order the relative squared error of dW is the sum
of their squared errors, so that every coefficient counts the same, whatever its module, side or adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum, sqrt

import numpy as np

from ..adapters.dtypes import Array, Float64
from ..adapters.keys import Side
from ..adapters.scaling import Scaling


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
