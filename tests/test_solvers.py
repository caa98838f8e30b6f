"""Every solver of the table finds the optimum of a float64 SVD, whatever the spectrum."""

from __future__ import annotations

import numpy as np
import pytest

from lorashare_stream.moments import Accumulator, HostSum, Moment, empty, of_columns, stays_stacked
from lorashare_stream.solvers import krylov, leading, prefers_partial, product_with, spectrum, suits_krylov

SPECTRA = {
    "power law": lambda m: 1.0 / np.arange(1, m + 1),
    "planted, and a flat tail": lambda m: np.where(np.arange(m) < 12, 4.0, 0.3),
    "flat": np.ones,
    "steep": lambda m: 10.0 ** -np.minimum(np.arange(m) / 2, 6.0),
    "clustered at k": lambda m: np.where(np.arange(m) < 9, 1.0 + 1e-6 * np.arange(m), 0.5),
    "of rank 3": lambda m: (np.arange(m) < 3).astype(float),
}


def vectors_of(kind: str, n: int, d: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    m = min(n, d)
    if kind == "noise":  # Marchenko-Pastur: nothing stands out, and gains fall slowly
        return rng.standard_normal((n, d)).astype(np.float32)
    if kind == "planted, and noise":
        planted = rng.standard_normal((n, 2)) @ rng.standard_normal((2, d))
        return (planted + rng.standard_normal((n, d))).astype(np.float32)
    left, right = (np.linalg.qr(rng.standard_normal((size, m)))[0] for size in (n, d))
    return ((left * SPECTRA[kind](m)) @ right.T).astype(np.float32)


def moment_of(x: np.ndarray) -> Moment:
    if stays_stacked(*x.shape):
        return of_columns(x)
    start = empty(x.shape[1])
    acc = Accumulator(start, HostSum(start))
    acc.add(x)
    return acc.finish()


@pytest.mark.parametrize("kind", [*SPECTRA, "noise", "planted, and noise"])
@pytest.mark.parametrize(
    ("n", "d", "k", "form"),
    [
        (700, 800, 4, "columns, Krylov"),
        (1500, 800, 4, "columns, Krylov"),
        (100, 800, 4, "columns, Gram matrix, ARPACK"),
        (100, 800, 40, "columns, Gram matrix, LAPACK"),
        (800, 700, 40, "columns, S, ARPACK"),
        (800, 700, 100, "columns, S, LAPACK"),
        (900, 256, 8, "second, ARPACK"),
        (900, 256, 64, "second, LAPACK"),
    ],
)
def test_the_energy_of_the_best_basis_is_captured(kind: str, n: int, d: int, k: int, form: str) -> None:
    x = vectors_of(kind, n, d)
    moment = moment_of(x)
    assert (moment.columns is not None) == form.startswith("columns")
    assert (moment.columns is not None and suits_krylov(d, n, k)) == form.endswith("Krylov")
    assert prefers_partial(moment, k) == form.endswith(("Krylov", "second, ARPACK"))
    values, vectors = leading(moment, k)
    wide = x.astype(np.float64)
    best = np.linalg.svd(wide, compute_uv=False) ** 2
    assert np.sum((wide @ vectors) ** 2) >= (1 - 1e-6) * best[:k].sum()
    assert np.abs(vectors.T @ vectors - np.eye(k)).max() < 1e-12
    assert np.allclose(values, best[:k], atol=1e-5 * best[0])
    assert np.allclose(spectrum(moment)[:k], best[:k], atol=1e-5 * best[0])


@pytest.mark.parametrize("kind", SPECTRA)
def test_the_same_bits_every_time(kind: str) -> None:
    moment = of_columns(vectors_of(kind, 700, 800))
    assert all(np.array_equal(a, b) for a, b in zip(leading(moment, 4), leading(moment, 4), strict=True))


def test_few_products_suffice_and_no_convergence_is_said() -> None:
    moment = of_columns(vectors_of("power law", 700, 800))
    assert moment.columns is not None
    times, calls = product_with(moment.columns), []
    assert krylov(lambda q: (calls.append(1), times(q))[1], 800, 4) is not None
    assert len(calls) <= 8

    def grows(q: np.ndarray) -> np.ndarray:  # no matrix does
        calls.append(1)
        return 1.5 ** len(calls) * q * np.arange(1, 801)[:, None]

    assert krylov(grows, 800, 4) is None
