"""Joint diagonalisation, JD-Full of Compress-then-Serve (Gabrielsson et al. 2024): for scripts/evidence.py.

dW_i is about U S_i V' for each module, U and V being common to a cluster and S_i (k, k) the adapter's. Alternating
eigenproblems, by power iteration, on dW_i / ||dW_i||, the norm over all modules, as errors are; an adapter is of one
cluster in all modules.
"""

from __future__ import annotations

from collections.abc import Mapping

import evidence_measure as em
import numpy as np
from evidence_measure import Array

ROUNDS, STEPS, SEED = 8, 3, 0


def _moment(left: Array, right: Array) -> Array:
    """The sum of left_i right_i' over i; of (n, d, r) each."""
    x, y = (np.moveaxis(side, 1, 0).reshape(side.shape[1], -1) for side in (left, right))
    return x @ y.T


def _first(left: Array, right: Array, k: int) -> Array:
    """The k eigenvectors (d, k) of the sum of left_i right_i' right_i left_i', from (n, d, r) each."""
    moment = _moment(left @ (right.mT @ right), left)
    return np.linalg.eigh(moment.astype(np.float64))[1][:, -k:].astype(np.float32)


def _improved(b: Array, a: Array, u: Array, v: Array) -> tuple[Array, Array]:
    """U (d_out, k) and V (d_in, k) of b_i a_i' after some steps of power iteration of each, given the other."""
    for _ in range(STEPS):
        av = a.mT @ v
        u = np.linalg.qr(_moment(b @ (av @ av.mT), b) @ u)[0]
        bu = b.mT @ u
        v = np.linalg.qr(_moment(a @ (bu @ bu.mT), a) @ v)[0]
    return u, v


def _cores(side: tuple[Array, Array], bases: tuple[Array, Array]) -> Array:
    """S_i = U' b_i a_i' V, (n, k, k)."""
    cores: Array = (bases[0].T @ side[0]) @ (side[1].mT @ bases[1])
    return cores


def _half(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def joint(adapters: Mapping[str, em.Adapter], k: int, clusters: int = 1) -> tuple[dict[str, em.Adapter], int]:
    """What comes back, all numbers rounded to float16, and their bytes; all adapters are of one shape."""
    norms = {i: em.norm(x) or 1.0 for i, x in adapters.items()}
    sides = {
        name: (
            np.stack([x[name].scale / norms[i] * x[name].b for i, x in adapters.items()]).astype(np.float32),
            np.stack([x[name].a.T for x in adapters.values()]).astype(np.float32),
        )
        for name in next(iter(adapters.values()))
    }
    cluster = np.random.default_rng(SEED).integers(clusters, size=len(adapters))
    start = {m: (_first(b, a, k), _first(a, b, k)) for m, (b, a) in sides.items()}
    fitted = [dict(start) for _ in range(clusters)]
    for left in reversed(range(ROUNDS)):
        for c in set(cluster.tolist()):
            own = cluster == c
            fitted[c] = {m: _improved(b[own], a[own], *fitted[c][m]) for m, (b, a) in sides.items()}
        if clusters > 1 and left:
            kept = [
                sum(np.linalg.norm(_cores(side, x[m]), axis=(1, 2)) ** 2 for m, side in sides.items()) for x in fitted
            ]
            cluster = np.argmax(kept, axis=0)
    back: dict[str, em.Adapter] = {name: {} for name in adapters}
    for n, (name, c) in enumerate(zip(adapters, cluster.tolist(), strict=True)):
        for m, (b, a) in sides.items():
            core = _half(_cores((b[n : n + 1], a[n : n + 1]), fitted[c][m])[0])
            back[name][m] = em.Module(_half(fitted[c][m][1]).T, _half(fitted[c][m][0]) @ core, norms[name])
    numbers = sum(x.size for c in set(cluster.tolist()) for uv in fitted[c].values() for x in uv)
    return back, 2 * (numbers + len(adapters) * (1 + k * k * len(sides))) + len(adapters) * (clusters > 1)
