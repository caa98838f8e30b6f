"""Block Krylov: the leading eigenvectors of a symmetric matrix S by few products with it.

Large arrays have the dtype of S. Rounding spoils an eigenvector in the first order, and the energy that it captures in
the second; what must be orthonormal to 1e-12 is made so at the end (`eigen`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..adapters.dtypes import Array, Float64

MatVec = Callable[[Array], Array]  # Q (d, b) -> S Q (d, b)
CONVERGED = 2e-8  # of the captured energy, expected of the next block: about what is missed, if not less
_STEPS = 64  # products before it is given up, or as many as 16 k columns take
_PROOF = 3  # products with what grows from a random block
_PROVED = 1e-6  # of the captured energy: what it may gain, rounding among it
_SEED = 0
_WEAK = 1e-7  # of the longest direction of a block: what is shorter is rounding
_SHORT = 1e-30  # its inverse is near the end of float32


def width(k: int) -> int:
    """b, the columns of a block.

    Narrow blocks take fewer columns in all, wide ones less time a column. A space from b >= k columns meets every
    leading eigenvector, however clustered (Musco and Musco, 2015); from fewer it must be proved that none was missed.
    """
    return max(16, k) if k <= 48 else 32


def capacity(k: int) -> int:
    """Columns of a space, which is cut to the best of them when it is full: without limit it takes few steps less."""
    return max(4 * k, 6 * width(k))


def krylov(times: MatVec, start: Array, k: int) -> tuple[Float64, Array] | None:
    """The k leading eigenpairs: block Lanczos with full orthogonalisation and thick restarts (Wu and Simon, 2000).

    It ends when the next block is expected to gain less than 2e-8 of the energy. To go by how fast gains fall would be
    wrong: they fall fast while what is planted is found, and slowly on the noise after it. A block of b < k columns
    sees only b of equal eigenvalues: the space must then stand a proof, that three blocks from a random one gain
    nothing.

    Args:
        times: Q (d, b) -> S Q.
        start: (d, b) with b = `width(k)`, in the dtype to work in, with something of every direction in it.
        k: how many; `capacity(k)` <= d.

    Returns:
        values (k,) descending, float64; vectors (d, k), orthonormal as far as their dtype goes. None if they do not
        converge.
    """
    (d, b), most, rng = start.shape, capacity(k), np.random.default_rng(_SEED)
    space, inner = np.empty((d, most), start.dtype, order="F"), np.zeros((most, most))  # V, V'SV
    q, end, claimed, due = _orthonormal(start, space[:, :0], rng), 0, -np.inf, max(3, k // b + 1)
    for step in range(1, max(_STEPS, 16 * k // b) + 1):
        space[:, end : end + b] = q
        end += b
        basis, image = space[:, :end], times(q)
        if not np.isfinite(image).all():
            return None
        across = basis.T @ image
        inner[:end, end - b : end], inner[end - b : end, :end] = across, across.T
        image -= basis @ across
        q = _orthonormal(image, basis, rng)
        if step < due and end + b <= most:
            continue
        values, rotation = np.linalg.eigh(inner[:end, :end])
        captured = float(values[-k:].sum())
        gain = _next_gain(q.T @ image, inner[end - b : end, end - b : end], values[-k:], rotation[:, -k:])
        settled = gain <= CONVERGED * abs(captured)
        if settled and (b >= k or captured - claimed <= _PROVED * abs(captured)):
            return values[: -k - 1 : -1], basis @ rotation[:, : -k - 1 : -1].astype(basis.dtype)
        due = _next_look(step, gain / max(captured, 1e-300))
        if settled or end + b > most:  # go on with the best of the space
            end = min(end, k + b if settled else (k + most) // 2)
            space[:, :end] = basis @ rotation[:, -end:].astype(basis.dtype)
            inner[:end, :end] = np.diag(values[-end:])
        if settled:
            claimed, due = captured, step + _PROOF
            q = _orthonormal(_random(q, rng), space[:, :end], rng)
    return None


def _next_look(step: int, share: float) -> int:
    """The step to look at next, sooner than it converges if gains, a share of the energy, fall as they did at most."""
    log = float(np.log(min(max(share, 1e-300), 0.9)))
    return step + max(1, int(step * (float(np.log(CONVERGED)) / log - 1)))


def _next_gain(r: Array, last: Float64, values: Float64, rotation: Float64) -> float:
    """The gain in the sum of the k largest Ritz values by the next block Q, of which the last image has R (b, b)."""
    # The Ritz vector V s has the residual Q R s', s' of the last block. With mu for what S is on Q, and e = |R s'|, the
    # larger eigenvalue of [[value, e], [e, mu]] is e^2 / (h + sqrt(h^2 + e^2)) above the value, h = (value - mu) / 2.
    # As mu stands what S is on the last block, on average.
    squares = np.square(r.astype(np.float64) @ rotation[-len(r) :]).sum(axis=0)
    half = (values - np.trace(last) / len(last)) / 2
    root = np.sqrt(np.square(half) + squares)
    above = half > 0  # else half + root may cancel, and root - half is the same
    return float(np.sum(np.where(above, squares / np.where(above, half + root, 1.0), root - half)))


def _orthonormal(block: Array, basis: Array, rng: np.random.Generator) -> Array:
    """An orthonormal basis (d, b) of `block`, which is orthogonal to `basis` (d, m) but for rounding."""
    # Cholesky QR, by Gram matrices in float64, again until it hardly changes anything: twice, mostly. What is only
    # rounding gives way to random directions.
    for turn in range(6):
        if turn:
            block = block - basis @ (basis.T @ block)
        wide = block.astype(np.float64)
        gram = wide.T @ wide
        try:
            factor = np.linalg.cholesky(gram)
            lengths = factor.diagonal()
            if lengths.min() > max(_WEAK * lengths.max(), _SHORT):
                block = block @ np.linalg.inv(factor).T.astype(block.dtype)
                if turn and lengths.min() > 0.7 and lengths.max() < 1.4:
                    break
                continue
        except np.linalg.LinAlgError:
            pass
        squares, axes = np.linalg.eigh(gram)
        weak = squares <= _WEAK**2 * squares[-1]
        block = (wide @ (axes / np.sqrt(np.where(weak, np.inf, squares)))).astype(block.dtype)
        block[:, weak] = _random(block[:, weak], rng)
    return block


def _random(like: Array, rng: np.random.Generator) -> Array:
    """Random columns (d, b), about of length 1."""
    return np.asarray(rng.standard_normal(like.shape) / np.sqrt(len(like)), like.dtype)


def sketch(rows: Array, b: int) -> Array:
    """A start (d, b) from vectors as rows (n, d), or from S: random sums of every eighth row, and some noise.

    It has half a product's worth of the leading eigenvectors for a sixteenth of its time. The noise has something of
    what is in none of these rows.
    """
    rng, some = np.random.default_rng(_SEED), rows[::8]
    sums = some.T @ np.asarray(rng.standard_normal((len(some), b)), rows.dtype)
    lengths = np.linalg.norm(sums, axis=0)
    return sums / np.where(lengths > 0, lengths, 1).astype(rows.dtype) + _random(sums, rng) * rows.dtype.type(0.1)
