"""Leading eigenpairs of a moment: which solver for which (d, n, k), with m = min(d, n) of columns, d of S.

| moment           | k         | solver                                | why                                      |
|------------------|-----------|---------------------------------------|------------------------------------------|
| either           | 12 k <= m | block Krylov (`krylov`), in its dtype | 5 to 7 k products with a vector, and no S |
| columns (n <= d) | else      | LAPACK (`syevr`), X'X in float64      | float32 spoils singular ratios below 1e-2 |
| columns (n > d)  | else      | S, then as a second moment            | k d is no longer small against d^2       |
| second (d, d)    | else      | LAPACK (`syevr`) in its dtype         | one reduction serves all k               |

Below m = 256 it is LAPACK whatever k is. `scripts/bench_solvers.py` measures the choice. Vectors are made orthonormal
to 1e-12 in float64 at the end. Of a float32 moment the energy that they capture is short of the best by up to 1e-7 of
it, and where LAPACK must tell eigenvalues apart that are below the moment's own rounding, by some times that.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh

from ..adapters.dtypes import Array, Float64
from .krylov import MatVec, krylov, sketch, width
from .moments import HostSum, Moment, add_block, mirror

_SPARE = 8  # eigenvectors of float32 beyond those that are wanted
_TILE = 1024  # entries of every vector that are turned into float64 at once
STRIP = 256  # rows that are multiplied at a time, and are still in the cache for their second product


def leading(moment: Moment, k: int) -> tuple[Float64, Float64]:
    """The k <= min(d, n) leading eigenpairs of S.

    Returns:
        values (k,) descending, float64; vectors (d, k) float64, orthonormal to 1e-12.
    """
    if prefers_partial(moment, k) and (found := by_krylov(moment, k, matvec_of(moment))) is not None:
        return found
    return by_lapack(moment, k)


def by_lapack(moment: Moment, k: int) -> tuple[Float64, Float64]:
    """The k leading eigenpairs by reducing S, or X'X, to tridiagonal form.

    In float32 squares of what is small vanish, so that S is scaled; and eigenvalues are blurred which are 1e-5 of the
    largest one, so that some vectors more are taken, out of which a product with S takes what does not belong there.
    """
    vectors = _eigenvectors(moment, k)
    if moment.columns is not None and moment.count <= moment.dim:
        return polished(moment, _restored(moment.columns, vectors))
    if vectors.dtype == np.float32:
        vectors = _normalized(matvec_of(moment)(vectors))
    values, best = polished(moment, vectors)
    return values[:k], best[:, :k]


def by_krylov(moment: Moment, k: int, times: MatVec) -> tuple[Float64, Float64] | None:
    """The k leading eigenpairs by products `times`, Q -> S Q; None if they do not converge."""
    found = krylov(times, sketch(moment.rows, width(k)), k)
    return None if found is None else (found[0], orthonormal(found[1]))


def suits_krylov(size: int, k: int) -> bool:
    """Whether k is so small against m that block Krylov is the fastest."""
    return size >= 256 and 12 * k <= size


def prefers_partial(moment: Moment, k: int) -> bool:
    """Whether k eigenpairs cost much less than all eigenvalues."""
    return suits_krylov(min(moment.dim, moment.count) if moment.columns is not None else moment.dim, k)


def matvec_of(moment: Moment) -> MatVec:
    """Q (d, b) -> S Q (d, b), by columns X' (n, d) or by S, in their dtype."""
    every = moment.rows
    if moment.columns is None:
        return lambda q: every @ q

    def times(q: Array) -> Array:
        image = np.zeros(q.shape, every.dtype)
        for rows in _strips(every):
            image += rows.T @ (rows @ q)
        return image

    return times


def _strips(rows: Array) -> list[Array]:
    return [rows[i : i + STRIP] for i in range(0, len(rows), STRIP)]


def orthonormal(vectors: Array) -> Float64:
    """Vectors (d, k) that rounding spoiled, orthonormal to 1e-12: Cholesky QR in float64, which keeps their order."""
    wide = vectors.astype(np.float64)
    return wide @ np.linalg.inv(np.linalg.cholesky(wide.T @ wide)).T


def _scaled(matrix: Array) -> Array:
    """A symmetric matrix (n, n), scaled in place by a power of two to a largest diagonal entry in [0.5, 1)."""
    matrix *= matrix.dtype.type(2.0 ** -np.clip(np.frexp(matrix.diagonal().max(initial=0.0))[1], -126, 126))
    return matrix


def _eigenvectors(moment: Moment, k: int) -> Array:
    """The k leading ones of the matrix of `_symmetric`, and some more in float32, ascending, in its dtype."""
    # Where eigenvalues are clustered, MRRR (syevr) may find fewer than it is asked for, and only their number says so
    # (106 of 108 at n = 700); divide and conquer (syevd) finds all, in three times the memory.
    matrix = _scaled(_symmetric(moment))
    n = len(matrix)
    wanted = min(k + _SPARE, n) if matrix.dtype == np.float32 else k
    largest = n - wanted, n - 1
    vectors = eigh(matrix, subset_by_index=largest, driver="evr", overwrite_a=True, check_finite=False)[1]
    if vectors.shape[1] < wanted:
        del matrix, vectors
        matrix = _scaled(_symmetric(moment))  # what syevr was given, it has overwritten
        vectors = eigh(matrix, driver="evd", overwrite_a=True, check_finite=False)[1][:, -wanted:].copy(order="F")
    return vectors


def spectrum(moment: Moment) -> Float64:
    """All eigenvalues that can differ from zero, min(d, n) of them or d, descending, float64."""
    matrix = _symmetric(moment).astype(np.float64, order="F", copy=False)
    return eigh(matrix, eigvals_only=True, driver="evd", overwrite_a=True, check_finite=False)[::-1]


def _symmetric(moment: Moment) -> Array:
    """A copy of S (d, d), or, of fewer columns than d, X'X (n, n), which has the same eigenvalues but for zeros."""
    if moment.columns is None:
        return moment.rows.T.copy(order="F")
    return _gram(moment.columns) if moment.count <= moment.dim else HostSum(moment).result()


def _gram(rows: Array) -> Float64:
    """X'X (n, n) in float64, without a float64 copy of X."""
    n, d = rows.shape
    gram = np.zeros((n, n), order="F")
    for start in range(0, d, _TILE):
        # add_block sums over rows: the transposed tile has one row an entry, one column a vector
        add_block(gram, np.ascontiguousarray(rows[:, start : start + _TILE].T, np.float64))
    mirror(gram)
    return gram


def _restored(rows: Array, q: Array) -> Float64:
    """X Q (d, k) for the leading eigenvectors Q (n, k) of X'X: spans the leading eigenvectors of X X'."""
    vectors = np.empty((rows.shape[1], q.shape[1]))
    for start in range(0, len(vectors), _TILE):
        vectors[start : start + _TILE] = rows[:, start : start + _TILE].T.astype(np.float64) @ q
    return _normalized(vectors)


def _normalized(vectors: Array) -> Float64:
    """Columns of length 1. One without energy is noise or zeros; QR replaces it by an orthonormal one."""
    wide = vectors.astype(np.float64, copy=False)
    norms = np.linalg.norm(wide, axis=0)
    found: Float64 = wide / np.where(norms > 0, norms, 1.0)
    return found


def polished(moment: Moment, raw: Array) -> tuple[Float64, Float64]:
    """Eigenpairs from vectors (d, k) that span them: orthonormal by QR, sorted by the eigenvalues of V'SV."""
    vectors, _ = np.linalg.qr(raw.astype(np.float64))
    values, rotation = np.linalg.eigh(compressed(moment, vectors))
    return values[::-1], vectors @ rotation[:, ::-1]


def compressed(moment: Moment, vectors: Array) -> Float64:
    """V' S V (k, k) for V (d, k): the product with X or S in the wider of both dtypes, the rest in float64."""
    out = np.zeros((vectors.shape[1],) * 2)
    if moment.columns is not None:
        for rows in _strips(moment.columns):
            image = (rows @ vectors).astype(np.float64)  # (m, k)
            out += image.T @ image
        return out
    image = np.concatenate([rows @ vectors for rows in _strips(moment.rows)])  # (d, k)
    out = vectors.T.astype(np.float64) @ image
    return (out + out.T) / 2
