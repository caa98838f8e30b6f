"""Leading eigenpairs of a moment: which solver for which (d, n, k).

| moment           | k        | solver                                      | why                                      |
|------------------|----------|---------------------------------------------|------------------------------------------|
| columns (n <= d) | any      | LAPACK on the Gram matrix (n, n) in float64 | n is small; in float32 a singular ratio  |
|                  |          |                                             | of 1e-2 is off by 1e-4                   |
| second (d, d)    | 16k <= d | ARPACK (`eigsh`) in the moment's dtype      | faster the smaller k is against d; the   |
|                  |          |                                             | energy equals LAPACK's to 1e-11          |
| second (d, d)    | else     | LAPACK (`dsyevr`) in float64                | one reduction serves all k               |

`scripts/bench_solvers.py` measures the choice between the last two. Every result is polished in float64:
one QR makes the columns orthonormal to 1e-12 whatever the solver did, and a Rayleigh-Ritz rotation sorts them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, eigsh

from .lapack import Array, add_block, largest_eigenpairs
from .moments import Moment, mirror

Float64 = NDArray[np.float64]
SEED = 0
_TILE = 1024  # entries of every vector that are turned into float64 at once
_STRIP = 8 << 20  # bytes of a strip of rows in float64


def leading(moment: Moment, k: int) -> tuple[Float64, Float64]:
    """The k leading eigenpairs of S.

    Args:
        moment: of d-vectors; k <= min(d, n).

    Returns:
        values (k,) descending, float64; vectors (d, k) float64, orthonormal to 1e-12.
    """
    if moment.columns is not None:
        return polished(moment, _by_gram(moment.columns, k))
    assert moment.second is not None
    return polished(moment, _by_second(moment.second, k))


def spectrum(moment: Moment) -> Float64:
    """All eigenvalues that can differ from zero, min(d, n) of them or d, descending, float64."""
    matrix = moment.second if moment.columns is None else _gram(moment.columns)
    assert matrix is not None
    values, _ = largest_eigenpairs(matrix.astype(np.float64, order="F"), len(matrix), vectors=False)
    return np.asarray(values[::-1], np.float64)


def prefers_partial(moment: Moment, k: int) -> bool:
    """Whether k eigenpairs are had for much less than all eigenvalues."""
    return moment.second is not None and 16 * k <= moment.dim


def _gram(rows: Array) -> Float64:
    """X'X (n, n) in float64, without a float64 copy of X."""
    n, d = rows.shape
    gram = np.zeros((n, n), order="F")
    for start in range(0, d, _TILE):
        # add_block sums over rows: the transposed tile has one row an entry, one column a vector
        add_block(gram, np.ascontiguousarray(rows[:, start : start + _TILE].T, np.float64))
    mirror(gram)
    return gram


def _by_gram(rows: Array, k: int) -> Float64:
    """X Q for the leading eigenvectors Q of X'X: spans the leading eigenvectors of X X'."""
    q = _eigh(_gram(rows), k)
    vectors = np.empty((rows.shape[1], k))
    for start in range(0, len(vectors), _TILE):
        vectors[start : start + _TILE] = rows[:, start : start + _TILE].T.astype(np.float64) @ q
    # A direction without energy is a column of noise or zeros; QR replaces it by an orthonormal one.
    norms = np.linalg.norm(vectors, axis=0)
    return vectors / np.where(norms > 0, norms, 1.0)


def _by_second(second: Array, k: int) -> Float64:
    if 16 * k <= len(second) and second.any():
        try:
            guess = np.asarray(np.random.default_rng(SEED).standard_normal((len(second),)), second.dtype)
            values, vectors = eigsh(second, k, v0=guess, rng=np.random.default_rng(SEED))
            if np.isfinite(vectors).all():
                return np.asarray(vectors[:, np.argsort(values)[::-1]], np.float64)
        except ArpackError:  # clustered or vanishing eigenvalues: LAPACK always answers
            pass
    return _eigh(second, k)


def _eigh(matrix: Array, k: int) -> Float64:
    """Eigenvectors of the k largest eigenvalues, descending, by LAPACK in float64."""
    _, vectors = largest_eigenpairs(matrix.astype(np.float64, order="F"), k)
    found: Float64 = np.asarray(vectors[:, ::-1], np.float64)
    return found


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
