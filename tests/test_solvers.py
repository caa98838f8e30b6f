"""Every solver of the table finds the optimum of a float64 SVD, whatever the spectrum."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import example, given
from hypothesis import strategies as st

from lorashare_stream.linalg import eigen
from lorashare_stream.linalg.basis import explained_variance
from lorashare_stream.linalg.eigen import by_krylov, by_lapack, leading, matvec_of, prefers_partial, spectrum
from lorashare_stream.linalg.krylov import capacity, krylov, sketch, width
from lorashare_stream.linalg.moments import Accumulator, HostSum, Moment, add_block, empty, of_columns, stays_stacked

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
    start = empty(x.shape[1], x.dtype.name)
    acc = Accumulator(start, HostSum(start))
    acc.add(x)
    return acc.finish()


ROUTES = [(700, 800, 4), (700, 800, 56), (100, 800, 40), (800, 700, 100), (900, 256, 8), (900, 256, 64), (900, 200, 8)]


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", [*SPECTRA, "noise", "planted, and noise"])
@pytest.mark.parametrize(
    ("n", "d", "k", "form"),
    [
        (700, 800, 4, "columns, Krylov"),
        (1500, 800, 4, "columns, Krylov"),
        (700, 800, 40, "columns, Krylov"),
        (700, 800, 56, "columns, Krylov"),  # blocks narrower than k
        (100, 800, 4, "columns, Gram matrix"),
        (100, 800, 40, "columns, Gram matrix"),
        (800, 700, 100, "columns, S"),
        (900, 256, 8, "second, Krylov"),
        (900, 256, 64, "second, LAPACK"),
        (900, 200, 8, "second, LAPACK"),
    ],
)
def test_the_energy_of_the_best_basis_is_captured(kind: str, n: int, d: int, k: int, form: str) -> None:
    x = vectors_of(kind, n, d)
    moment = moment_of(x)
    assert (moment.columns is not None) == form.startswith("columns")
    assert prefers_partial(moment, k) == form.endswith("Krylov")
    values, vectors = leading(moment, k)
    wide = x.astype(np.float64)
    best = np.linalg.svd(wide, compute_uv=False) ** 2
    assert np.sum((wide @ vectors) ** 2) >= (1 - 1e-6) * best[:k].sum()
    assert np.abs(vectors.T @ vectors - np.eye(k)).max() < 1e-12
    assert np.allclose(values, best[:k], atol=1e-5 * best[0])
    assert np.allclose(spectrum(moment)[:k], best[:k], atol=1e-5 * best[0])


@pytest.fixture
def fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has written is NaN, and poisons whatever reads it."""
    empty_array, empty_like = np.empty, np.empty_like

    def poisoned(array: np.ndarray) -> np.ndarray:
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    monkeypatch.setattr(np, "empty", lambda *args, **options: poisoned(empty_array(*args, **options)))
    monkeypatch.setattr(np, "empty_like", lambda *args, **options: poisoned(empty_like(*args, **options)))


@pytest.mark.few(5)
@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [*SPECTRA, "noise"])
@pytest.mark.parametrize(("n", "d", "k"), ROUTES)
def test_nothing_is_read_that_was_not_written(kind: str, n: int, d: int, k: int, dtype: type) -> None:
    """LAPACK's syevr may find fewer vectors than it is asked for: 106 of 108, "clustered at k", n = 800, d = 700."""
    x = vectors_of(kind, n, d).astype(dtype)
    moment = moment_of(x)
    best = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    assert np.allclose(spectrum(moment)[:k], best[:k], atol=1e-5 * best[0])
    for found in (by_lapack(moment, k), by_krylov(moment, k, matvec_of(moment)), leading(moment, k)):
        if found is None:  # not converged, which is said
            continue
        values, vectors = found
        assert vectors.shape == (d, k)
        assert np.abs(vectors.T @ vectors - np.eye(k)).max() < 1e-12
        assert np.sum((x.astype(np.float64) @ vectors) ** 2) >= (1 - 1e-6) * best[:k].sum()
        assert np.allclose(values, best[:k], atol=1e-5 * best[0])


POISONED = """
import sys
import numpy as np
from tests.test_solvers import by_lapack, leading, moment_of, spectrum, vectors_of

assert np.empty(10**6, np.float32).min() > 1e38
for n, d, k in ((700, 800, 4), (100, 800, 40), (800, 700, 100), (900, 256, 64)):
    for dtype in (np.float32, np.float64):
        moment = moment_of(vectors_of("clustered at k", n, d).astype(dtype))
        for values, vectors in (leading(moment, k), by_lapack(moment, k)):
            assert np.abs(vectors.T @ vectors - np.eye(k)).max() < 1e-12
            assert np.isfinite(values).all() and values.max() < 2
        assert spectrum(moment).max() < 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is of the GNU C library")
def test_neither_does_compiled_code_read_it() -> None:
    """Fresh memory is 3e38 in float32, whoever asks for it: mallopt(3) writes the complement."""
    environment = {**os.environ, "MALLOC_PERTURB_": str(0x7F ^ 0xFF)}
    done = subprocess.run([sys.executable, "-c", POISONED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "d", "k"), [(100, 200, 40), (300, 200, 40), (900, 200, 40)])
def test_where_lapack_finds_too_few_another_driver_is_taken(
    n: int, d: int, k: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    drivers = []

    def lacking(a: np.ndarray, *, driver: str, **options: Any) -> Any:
        drivers.append(driver)
        values, vectors = scipy.linalg.eigh(a, driver=driver, **options)
        return (values, vectors) if driver == "evd" else (values[2:], vectors[:, 2:])

    moment = moment_of(vectors_of("power law", n, d).astype(dtype))
    expected = leading(moment, k)
    monkeypatch.setattr(eigen, "eigh", lacking)
    values, vectors = leading(moment, k)
    assert drivers == ["evr", "evd"]
    assert np.allclose(values, expected[0], rtol=1e-5)
    assert np.abs(vectors.T @ vectors - np.eye(k)).max() < 1e-12
    assert np.linalg.norm(vectors.T @ expected[1]) ** 2 == pytest.approx(k, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_made_in_place(dtype: type) -> None:
    """What SciPy's wrapper cannot write to, it copies, and the sum would be in the copy."""
    rows = np.random.default_rng(0).standard_normal((40, 600)).astype(dtype)
    second = np.asfortranarray(np.ones((600, 600), dtype))
    tracemalloc.start()
    add_block(second, rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes
    assert np.allclose(np.tril(second), np.tril(1 + rows.T @ rows), atol=1e-4)
    assert (second[~np.tri(600, dtype=bool)] == 1).all()
    for s, x in ((np.ones((600, 600), dtype), rows), (second, rows.astype("f8" if dtype == np.float32 else "f4")),
                 (second, np.asfortranarray(rows))):  # fmt: skip
        with pytest.raises(ValueError, match="column-major S"):
            add_block(s, x)


@pytest.mark.parametrize("kind", SPECTRA)
def test_the_same_bits_every_time(kind: str) -> None:
    moment = of_columns(vectors_of(kind, 700, 800))
    assert all(np.array_equal(a, b) for a, b in zip(leading(moment, 4), leading(moment, 4), strict=True))


@pytest.mark.parametrize(("k", "products"), [(4, 8), (56, 16)])
def test_few_products_suffice(k: int, products: int) -> None:
    moment = of_columns(vectors_of("power law", 700, 800))
    times, calls = matvec_of(moment), []
    assert by_krylov(moment, k, lambda q: (calls.append(1), times(q))[1]) is not None
    assert len(calls) <= products


@pytest.mark.parametrize("by", [1.5, np.inf])
def test_no_convergence_is_said(by: float) -> None:
    calls = []

    def grows(q: np.ndarray) -> np.ndarray:  # no matrix does
        calls.append(1)
        return by ** len(calls) * q * np.arange(1, 801)[:, None]

    assert krylov(grows, np.random.default_rng(0).standard_normal((800, width(4))), 4) is None
    assert len(calls) < 100


def symmetric(values: np.ndarray) -> np.ndarray:
    q = np.linalg.qr(np.random.default_rng(7).standard_normal((len(values),) * 2))[0]
    return np.asarray((q * values) @ q.T, np.float32)


@pytest.mark.few(3)
@pytest.mark.parametrize("k", [20, 40, 100])
@pytest.mark.parametrize("equal", [15, 40, 100, 150])
@pytest.mark.parametrize("rest", [0.0, 0.5, 1e-4])
def test_of_equal_eigenvalues_none_is_missed(k: int, equal: int, rest: float) -> None:
    """More than a block has columns: only random directions find the others."""
    i = np.arange(500)
    s = symmetric(np.where(i < equal, 1.0, rest * (1 - i / 500)))
    found = krylov(lambda q: s @ q, sketch(s, width(k)), k)
    assert found is not None
    assert found[0].sum() >= (1 - 1e-6) * np.linalg.eigvalsh(s.astype(np.float64))[-k:].sum()


@given(st.integers(0, 300), st.sampled_from([1, 7, 24, 50]), st.integers(-15, 12), st.floats(0.0, 2.0), st.booleans())
@example(23, 24, -10, 2.0, False)  # float32 LAPACK missed 1.5e-6
@example(1, 1, -15, 0.0, False)  # what is left of a block is of 1e-42
@example(33, 50, 6, 0.0, False)  # a Ritz value far below what the next block is expected to hold
def test_any_rank_and_scale(rank: int, k: int, scale: int, power: float, double: bool) -> None:
    rng = np.random.default_rng(rank)
    wide = (rng.standard_normal((320, rank)) * (1.0 + np.arange(rank)) ** -power) @ rng.standard_normal((rank, 300))
    x = np.asarray(wide * 10.0**scale, np.float64 if double else np.float32)
    moment, exact = of_columns(x), x.astype(np.float64)
    best = np.sum(np.linalg.svd(exact, compute_uv=False)[:k] ** 2)
    for values, vectors in filter(None, (by_krylov(moment, k, matvec_of(moment)), by_lapack(moment, k))):
        assert np.abs(vectors.T @ vectors - np.eye(k)).max() < 1e-12
        assert np.sum((exact @ vectors) ** 2) >= (1 - 3e-7) * best
        assert np.sum(values) == pytest.approx(best, rel=1e-5)
        explained = explained_variance(moment, vectors.astype(np.float32))
        assert explained == pytest.approx(np.sum((exact @ vectors) ** 2) / moment.energy if rank else 1.0, abs=1e-7)


@pytest.mark.parametrize("k", [16, 48, 49, 200])
def test_a_restarted_space_has_room(k: int) -> None:
    assert capacity(k) <= max(12 * k, 256)  # what the table asks of m
    assert k + 4 * width(k) <= capacity(k)  # what is kept, and the proof
