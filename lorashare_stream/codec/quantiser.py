"""Quantiser: an entropy-constrained scalar quantiser with one step, and the code tables that belong to it.

A uniform step for coefficients of all variances is reverse water-filling (Berger 1971): directions weaker than the
step get no bits, so that neither ranks nor components need be chosen. A column of standard deviation sigma, in steps,
has the class c = round(4 log2 sigma). Its coefficients x, in steps, become the integers q that make

    (x - q)^2 + LAMBDA L_c(q)

least, L_c(q) being the code length of q in bits (Sullivan 1996). For a normal density L_c grows from q - 1 to q by
(2 q - 1) / (2 sigma^2 ln 2), so that thresholds lie at (q - 1/2) w, w = 1 + LAMBDA / (2 sigma^2 ln 2), but for the
first, whose dead zone is wider. Integers then are near the centroids of their cells: exact ones gain less than 0.1 %.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..adapters.dtypes import Array, Float64

LAMBDA = 0.16  # squared steps a bit: of 0.08 to 0.2 the fewest bytes at dW errors of 0.05 to 0.4
PER_OCTAVE = 4  # classes to a factor of 2 of sigma
LOWEST, WHOLE, HIGHEST = -20, 24, 88  # classes; above WHOLE the low bits of a coefficient are coded as they are
REACH = 8  # times sigma, up to which a table has entries
TOTAL = 1 << 24  # of the weights of a table: a range coder of 24 bits knows no less than one of these
TABLES = Path(__file__).with_name("tables.npy")
_WIDEST, _ZONE = 1.25, 0.999  # of w, and of the first threshold: no integer is farther off than the next one
Ints = NDArray[np.int64]


def classes_of(sigmas: Float64) -> Ints:
    """The class of each standard deviation, in steps."""
    least = 2.0 ** (LOWEST / PER_OCTAVE)
    found: Ints = np.rint(PER_OCTAVE * np.log2(np.maximum(sigmas, least))).astype(np.int64)
    return np.minimum(found, HIGHEST)


def low_bits(kind: int) -> int:
    """How many low bits of the integers of a class are coded as they are."""
    return max(0, -(-(kind - WHOLE) // PER_OCTAVE))


@lru_cache(maxsize=1)
def thresholds() -> tuple[Float64, Float64]:
    """The distance w of thresholds, and the first one, in steps, of each class from LOWEST."""
    from scipy.special import ndtr  # only to encode

    sigmas = 2.0 ** (np.arange(LOWEST, HIGHEST + 1) / PER_OCTAVE)
    width = np.minimum(1 + LAMBDA / (2 * np.log(2) * sigmas**2), _WIDEST)
    first = width / 2
    for _ in range(8):  # it decides the lengths of 0 and 1, and these decide it
        zero, one = 2 * ndtr(first / sigmas) - 1, ndtr(-first / sigmas) - ndtr(-1.5 * width / sigmas)
        more = np.log2(zero) - np.log2(np.maximum(one, 4 / TOTAL))
        first = np.clip(0.5 + LAMBDA / 2 * more, width / 2, _ZONE)
    return width, first


def quantised(rows: Array, step: float) -> Array:
    """The integers, as float32, of coefficients (..., d) float32: each row is a column of a factor."""
    sigmas = np.sqrt(np.einsum("...d,...d->...", rows, rows) / np.float32(rows.shape[-1])) / step
    width, first = (table[classes_of(sigmas) - LOWEST][..., None].astype(np.float32) for table in thresholds())
    found = rows * (1 / (np.float32(step) * width))
    kept = np.abs(found) >= first / width
    np.rint(found, out=found)
    found *= kept
    return found


def quantised_in(kinds: Ints, values: Array) -> Array:
    """The integers, as float32, of coefficients in steps, each of a class of its own."""
    width, first = (table[kinds - LOWEST].astype(np.float32) for table in thresholds())
    found: Array = np.rint(values / width) * (np.abs(values) >= first)
    return found


def reach(kind: int) -> int:
    """K of a class: the largest magnitude, without low bits, that is no escape."""
    sigma: float = 2.0 ** (kind / PER_OCTAVE - low_bits(kind))
    return math.ceil(REACH * sigma) + 1


@lru_cache(maxsize=1)
def _weights() -> dict[int, Ints]:
    """By class up to WHOLE, the weights of 0 to K and of an escape."""
    found, at = np.load(TABLES).astype(np.int64), 0
    tables = {}
    for kind in range(LOWEST, WHOLE + 1):
        tables[kind] = found[at : at + reach(kind) + 2]
        at += reach(kind) + 2
    return tables


@lru_cache(maxsize=256)
def table(kind: int) -> Float64:
    """Probabilities of the integers -K to K of a class, without their low bits, and of an escape: (2 K + 2,) float64.

    They are those of a normal density in the cells of the quantiser, as whole parts of 2^24: fixed for all collections,
    and so no part of any file (`scripts/make_tables.py`). Counted ones, at no cost, are 0.2 to 0.5 % shorter.
    """
    weights = _weights()[kind - PER_OCTAVE * low_bits(kind)]
    return np.concatenate([weights[-2:0:-1], weights]) / TOTAL
