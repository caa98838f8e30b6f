"""Leading eigenpairs of a moment: which solver for which (d, n, k), with m = min(d, n).

| moment            | k              | solver                                   | why                                 |
|-------------------|----------------|------------------------------------------|-------------------------------------|
| columns           | 32 (k+16) <= m | block Krylov, by products with X and X'  | a few passes over X; no S, no n d^2 |
| columns (n <= d)  | else           | X'X (n, n) in float64, then as a second  | n is small; in float32 a singular   |
|                   |                | moment of it                             | ratio of 1e-2 is off by 1e-4        |
| columns (n > d)   | else           | S, then as a second moment               | k d is no longer small against d^2  |
| second (d, d)     | 16 k <= d      | ARPACK (`eigsh`) in the moment's dtype   | faster the smaller k is against d   |
| second (d, d)     | else           | LAPACK (`dsyevr`) in float64             | one reduction serves all k          |

`scripts/bench_solvers.py` measures the choice. Every result is polished in float64: one QR makes the columns
orthonormal to 1e-12 whatever the solver did, and a Rayleigh-Ritz rotation sorts them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, eigsh

from .lapack import Array, add_block, largest_eigenpairs
from .moments import Moment, mirror

Float64 = NDArray[np.float64]
Product = Callable[[Float64], Float64]  # Q (d, b) -> S Q (d, b)
SEED = 0
BLOCKS = 6  # of a Krylov space before it is restarted
OVERSAMPLING = 16  # vectors of a block beyond k
_CONVERGED = 1e-8  # of the captured energy, gained by the last block; on noise some ten times as much is missed then
_RESTARTS = 20
_TILE = 1024  # entries of every vector that are turned into float64 at once
_STRIP = 8 << 20  # bytes of a strip of rows in float64


def leading(moment: Moment, k: int) -> tuple[Float64, Float64]:
    """The k leading eigenpairs of S.

    Args:
        moment: of d-vectors; k <= min(d, n).

    Returns:
        values (k,) descending, float64; vectors (d, k) float64, orthonormal to 1e-12.
    """
    columns = moment.columns
    if columns is not None and suits_krylov(moment.dim, moment.count, k):
        found = krylov(product_with(columns), moment.dim, k)
        if found is not None:
            return polished(moment, found)
    vectors = _of_symmetric(_symmetric(moment), k)
    if columns is not None and moment.count <= moment.dim:
        vectors = _restored(columns, vectors)
    return polished(moment, vectors)


def suits_krylov(dim: int, count: int, k: int) -> bool:
    """Whether k is so small against columns (n, d) that block Krylov is the fastest."""
    return 32 * (k + OVERSAMPLING) <= min(dim, count)


def prefers_partial(moment: Moment, k: int) -> bool:
    """Whether k eigenpairs are had for much less than all eigenvalues."""
    if moment.columns is not None:
        return suits_krylov(moment.dim, moment.count, k)
    return 16 * k <= moment.dim


def product_with(columns: Array) -> Product:
    """Q (d, b) -> X X' Q by columns X' (n, d), in their dtype."""
    return lambda q: ((columns @ q.astype(columns.dtype)).T @ columns).T.astype(np.float64)


def krylov(times: Product, d: int, k: int) -> Float64 | None:
    """Vectors (d, k) that span the leading eigenvectors of S: restarted block Lanczos with full orthogonalisation.

    The block is wider than k, so that its space meets every leading eigenvector, clustered or not (Musco and Musco,
    2015). The iteration ends where a block gains less than 1e-8 of the energy. To go by how fast gains fall would be
    wrong: they fall fast while what is planted is found, and slowly on the noise after it.

    Args:
        times: Q (d, b) -> S Q, b = k + 16.
        d: of S; 6 b <= d.
        k: how many.

    Returns:
        The vectors, float64; None if they do not converge.
    """
    b = k + OVERSAMPLING
    q = np.linalg.qr(np.random.default_rng(SEED).standard_normal((d, b)))[0]
    captured = 0.0
    for _ in range(_RESTARTS):
        space = np.empty((d, BLOCKS * b), order="F")
        inner = np.zeros((BLOCKS * b, BLOCKS * b))  # V'SV
        for end in range(b, BLOCKS * b + 1, b):
            space[:, end - b : end] = q
            basis, image = space[:, :end], times(q)
            inner[:end, end - b : end] = basis.T @ image
            inner[end - b : end, :end] = inner[:end, end - b : end].T
            values, vectors = np.linalg.eigh(inner[:end, :end])
            before, captured = captured, float(values[-k:].sum())
            if end > b and captured - before <= _CONVERGED * captured:  # the first block is what the last cycle found
                return np.asarray(basis @ vectors[:, -k:], np.float64)
            q = _orthonormal(image, basis)
        q = np.linalg.qr(space @ vectors[:, -b:])[0]
    return None


def _orthonormal(image: Float64, basis: Float64) -> Float64:
    """An orthonormal block of what is new in `image` (d, b); twice, since once leaves what was rounded."""
    for _ in range(2):
        image = np.linalg.qr(image - basis @ (basis.T @ image))[0]
    return image


def spectrum(moment: Moment) -> Float64:
    """All eigenvalues that can differ from zero, min(d, n) of them or d, descending, float64."""
    matrix = _symmetric(moment)
    values, _ = largest_eigenpairs(matrix.astype(np.float64, order="F"), len(matrix), vectors=False)
    return np.asarray(values[::-1], np.float64)


def _symmetric(moment: Moment) -> Array:
    """S (d, d), or, of fewer columns than d, X'X (n, n), which has the same eigenvalues but for zeros."""
    if moment.columns is None:
        assert moment.second is not None
        return moment.second
    return _gram(moment.columns) if moment.count <= moment.dim else _second(moment.columns)


def _gram(rows: Array) -> Float64:
    """X'X (n, n) in float64, without a float64 copy of X."""
    n, d = rows.shape
    gram = np.zeros((n, n), order="F")
    for start in range(0, d, _TILE):
        # add_block sums over rows: the transposed tile has one row an entry, one column a vector
        add_block(gram, np.ascontiguousarray(rows[:, start : start + _TILE].T, np.float64))
    mirror(gram)
    return gram


def _second(rows: Array) -> Array:
    """S = X X' (d, d), column-major, in the dtype of the rows X' (n, d)."""
    second: Array = np.zeros((rows.shape[1], rows.shape[1]), rows.dtype, order="F")
    add_block(second, np.ascontiguousarray(rows))
    mirror(second)
    return second


def _restored(rows: Array, q: Float64) -> Float64:
    """X Q (d, k) for the leading eigenvectors Q (n, k) of X'X: spans the leading eigenvectors of X X'."""
    vectors = np.empty((rows.shape[1], q.shape[1]))
    for start in range(0, len(vectors), _TILE):
        vectors[start : start + _TILE] = rows[:, start : start + _TILE].T.astype(np.float64) @ q
    # A direction without energy is a column of noise or zeros; QR replaces it by an orthonormal one.
    norms = np.linalg.norm(vectors, axis=0)
    return vectors / np.where(norms > 0, norms, 1.0)


def _of_symmetric(matrix: Array, k: int) -> Float64:
    """Eigenvectors (m, k) of the k largest eigenvalues, descending, of a symmetric matrix (m, m)."""
    if 16 * k <= len(matrix) and matrix.any():
        try:
            guess = np.asarray(np.random.default_rng(SEED).standard_normal((len(matrix),)), matrix.dtype)
            values, vectors = eigsh(matrix, k, v0=guess, rng=np.random.default_rng(SEED))
            if np.isfinite(vectors).all():
                return np.asarray(vectors[:, np.argsort(values)[::-1]], np.float64)
        except ArpackError:  # clustered or vanishing eigenvalues: LAPACK always answers
            pass
    _, largest = largest_eigenpairs(matrix.astype(np.float64, order="F"), k)
    return np.asarray(largest[:, ::-1], np.float64)


def polished(moment: Moment, raw: Float64) -> tuple[Float64, Float64]:
    """Eigenpairs from vectors (d, k) that span them: orthonormal by QR, sorted by the eigenvalues of V'SV."""
    vectors, _ = np.linalg.qr(raw)
    values, rotation = np.linalg.eigh(compressed(moment, vectors))
    return values[::-1], vectors @ rotation[:, ::-1]


def compressed(moment: Moment, vectors: Array) -> Float64:
    """V' S V (k, k) in float64 for V (d, k), by strips of bounded size."""
    k = vectors.shape[1]
    out = np.zeros((k, k))
    strip = max(1, _STRIP // (8 * moment.dim))
    if moment.columns is not None:
        for start in range(0, len(moment.columns), strip):
            image = moment.columns[start : start + strip].astype(np.float64) @ vectors  # (m, k)
            out += image.T @ image
        return out
    assert moment.second is not None
    for start in range(0, moment.dim, strip):
        rows = np.asarray(moment.second[start : start + strip], np.float64)
        out += vectors[start : start + strip].T @ (rows @ vectors)
    return (out + out.T) / 2
