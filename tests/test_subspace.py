from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashare_stream.adapters.keys import SIDES
from lorashare_stream.adapters.scaling import Scaling
from lorashare_stream.linalg.basis import break_even, centered, fit
from lorashare_stream.linalg.delta import delta_error, gram, projected_errors, relative_error
from lorashare_stream.linalg.eigen import leading
from lorashare_stream.linalg.moments import Moment, empty, of_columns
from lorashare_stream.stages.accumulate import weighted_rows

from .test_moments import second_of


def decaying(seed: int, n: int, d: int, power: float = 1.0) -> np.ndarray:
    """Vectors as rows (n, d), with a power-law spectrum."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (rng.standard_normal((n, d)) * (1.0 + np.arange(d)) ** -power) @ q


def as_second(x: np.ndarray, dtype: str) -> Moment:
    whole = of_columns(x)
    return Moment(np.asfortranarray(second_of(whole), dtype), None, whole.sum, whole.count, whole.energy)


def as_columns(x: np.ndarray, dtype: str) -> Moment:
    whole = of_columns(x)
    return Moment(None, x.astype(dtype), whole.sum, whole.count, whole.energy)


@pytest.mark.few(4)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("n", "d", "form"),
    [(40, 96, as_columns), (96, 96, as_columns), (400, 96, as_second), (97, 96, as_second), (900, 640, as_second)],
)
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 8, 32, 10_000])
def test_captured_energy_is_that_of_a_float64_svd(n: int, d: int, form: Any, power: float, k: int, dtype: str) -> None:
    x = decaying(1, n, d, power)
    if dtype == "float32":
        x = x.astype(np.float32).astype(np.float64)
    basis = fit(form(x, dtype), k)
    k = min(k, n, d)
    assert basis.components.shape == (d, k)
    v = basis.components.astype(np.float64)
    best = np.linalg.svd(x, compute_uv=False) ** 2
    captured = np.sum((x @ v) ** 2)
    assert captured >= (1 - 1e-6) * best[:k].sum()
    assert np.abs(v.T @ v - np.eye(k)).max() <= 1e-5
    assert basis.explained == pytest.approx(captured / best.sum(), abs=1e-6)
    assert np.allclose(basis.eigenvalues, best[:k], atol=1e-6 * best[0])


def test_a_singular_ratio_that_a_float32_gram_matrix_would_lose() -> None:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, 12)))[0] for size in (300, 12))
    x = ((u * np.logspace(0, -5, 12)) @ v.T).T  # (12, 300), singular values down to 1e-5
    basis = fit(as_columns(x, "float64"), 12)
    for j in range(12):  # each direction on its own, not the energy, which the first one owns
        assert np.linalg.norm(u[:, j] - basis.components @ (basis.components.T @ u[:, j])) < 1e-5


@pytest.mark.parametrize("form", [as_columns, as_second])
def test_rank_deficient_and_vanishing_groups_still_have_orthonormal_bases(form: Any) -> None:
    low = np.outer(np.arange(1.0, 31), np.ones(64)) * 1e-3
    for x in (low, np.zeros((30, 64))):
        basis = fit(form(x, "float32"), 4)
        assert np.abs(basis.components.T @ basis.components - np.eye(4)).max() <= 1e-5
        assert basis.explained == pytest.approx(1.0)


def test_signs_are_fixed_and_the_solver_is_seeded() -> None:
    x = decaying(0, 2000, 640)
    first, second = (fit(as_second(x, "float32"), 8) for _ in range(2))
    assert np.array_equal(first.components, second.components)
    peaks = np.abs(first.components).argmax(axis=0)
    assert (first.components[peaks, np.arange(8)] > 0).all()


@given(st.integers(0, 100), st.integers(2, 30), st.integers(2, 30), st.floats(0.05, 1.0))
def test_auto_takes_the_smallest_k_that_reaches_the_threshold(seed: int, n: int, d: int, threshold: float) -> None:
    x = decaying(seed, n, d)
    basis = fit(as_columns(x, "float64") if n <= d else as_second(x, "float64"), "auto", threshold)
    share = np.cumsum(np.linalg.svd(x, compute_uv=False) ** 2) / np.sum(x**2)
    k = basis.components.shape[1]
    assert share[k - 1] >= threshold - 1e-9
    assert k == 1 or share[k - 2] < threshold + 1e-9


def test_auto_grows_past_its_first_guess_and_reaches_all() -> None:
    x = decaying(3, 500, 100, power=0.0)
    assert fit(as_second(x, "float64"), "auto", 1.0).components.shape == (100, 100)
    assert 16 < fit(as_second(x, "float64"), "auto", 0.5).components.shape[1] < 64


@pytest.mark.parametrize("form", [as_columns, as_second])
def test_centring_is_the_covariance(form: Any) -> None:
    x = decaying(0, 50, 20) + 3.0
    about = x - x.mean(axis=0)
    moment = centered(form(x.copy(), "float64"))
    assert np.allclose(second_of(moment), about.T @ about)
    assert moment.energy == pytest.approx(np.sum(about**2))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_explained_variance_is_of_what_is_stored(dtype: str) -> None:
    x = decaying(0, 300, 64)
    basis = fit(as_second(x, "float32"), 8, dtype=dtype)
    v = basis.components.astype(np.float64)
    left = np.sum((x - x @ v @ v.T) ** 2)
    assert basis.explained == pytest.approx(1 - left / np.sum(x**2), abs=1e-6)
    assert np.abs(v.T @ v - np.eye(8)).max() > 1e-5  # rounding does spoil orthonormality


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 30), st.integers(1, 30), st.floats(0.01, 100))
def test_the_certified_error_is_that_of_the_product(seed: int, r: int, d_in: int, d_out: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((r, d_in)), rng.standard_normal((d_out, r))
    a_hat, b_hat = a + 0.1 * rng.standard_normal(a.shape), b * 0.7
    found = delta_error(a, b, a_hat, b_hat, Scaling(scale))
    assert found.error == pytest.approx(scale**2 * np.sum((b @ a - b_hat @ a_hat) ** 2), rel=1e-8, abs=1e-10)
    assert found.norm == pytest.approx(scale**2 * np.sum((b @ a) ** 2), rel=1e-8)


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))
def test_stacked_experts_are_multiplied_as_peft_does(seed: int, experts: int, r: int, d_in: int, d_out: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((experts * r, d_in)), rng.standard_normal((d_out, r * experts))
    a_hat, b_hat = a + 0.1 * rng.standard_normal(a.shape), b * 0.7

    def stack(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # ParamWrapper.get_delta_weight
        by_expert = a.reshape(experts, -1, d_in), b.reshape(d_out, -1, experts)
        return 2.0 * np.einsum("o r e, e r i -> e o i", by_expert[1], by_expert[0])

    found = delta_error(a, b, a_hat, b_hat, Scaling(2.0, experts))
    assert found.error == pytest.approx(np.sum((stack(a, b) - stack(a_hat, b_hat)) ** 2), rel=1e-8, abs=1e-10)
    assert found.norm == pytest.approx(np.sum(stack(a, b) ** 2), rel=1e-8)
    single = a[None].astype(np.float32), b[None].astype(np.float32)
    rows = weighted_rows(*single, [Scaling(2.0, experts)], found.norm, "delta")
    for side, axis in (("A", 2), ("B", 1)):  # each side's moment is that of all dW_e, over ||dW||^2
        matrices = np.moveaxis(stack(a, b), axis, 0).reshape((d_in, d_out)["AB".index(side)], -1)
        moment = matrices @ matrices.T / found.norm
        wide = rows[side][0].astype(np.float64)
        assert np.allclose(wide.T @ wide, moment, atol=1e-4)


def test_a_nearly_exact_reconstruction_has_a_nearly_vanishing_error() -> None:
    """The identity ||dW||^2 - ||core||^2 would leave 1e-8 of cancellation here, an error of 1e-4."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 50)).astype(np.float32), rng.standard_normal((30, 4)).astype(np.float32)
    assert delta_error(a, b, a, b, Scaling(2.0)).relative == 0.0
    assert delta_error(a, b, np.nextafter(a, 2), b, Scaling(2.0)).relative < 1e-6


@given(
    st.integers(0, 1000), st.integers(1, 3), st.integers(1, 6), st.integers(1, 8), st.integers(8, 60),
    st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0]), st.sampled_from([1e-12, 1.0, 1e9]), st.booleans(),
)  # fmt: skip
def test_errors_of_projections_are_those_of_what_comes_back(
    seed: int, experts: int, r: int, k: int, d: int, outside: float, size: float, cancels: bool
) -> None:
    """Wherever `projected_errors` says one, it is that of the float64 products; near nothing it says none."""
    rng = np.random.default_rng(seed)
    n = experts * r
    bases = {side: np.linalg.qr(rng.standard_normal((d, k)))[0].astype(np.float32) for side in SIDES}
    rows = {side: rng.standard_normal((2, n, k)) @ v.T for side, v in bases.items()}
    rows = {side: x + outside * rng.standard_normal(x.shape) for side, x in rows.items()}
    if cancels and n > 1:  # dW is small against A and B
        rows["A"][:, 1:], rows["B"][:, 1:] = rows["A"][:, :1], -rows["B"][:, :1] / (n - 1)
        rows["B"] *= 1 + 1e-3 * rng.standard_normal(rows["B"].shape)
    a, b = (size * rows["A"]).astype(np.float32), np.swapaxes(size * rows["B"], -1, -2).astype(np.float32)
    loadings = {"A": np.swapaxes(a @ bases["A"], -1, -2), "B": bases["B"].T @ b}  # (m, k, n)
    scalings = [Scaling(0.5, experts), Scaling(3.0, experts)]
    kept = {side: gram(scalings[0].blocks(np.swapaxes(loadings[side], -1, -2), side)) for side in SIDES}

    def delta(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """dW (2, E, d, d) in float64."""
        by_expert = a.reshape(2, experts, r, d).astype(np.float64), b.reshape(2, d, r, experts)
        return np.array([0.5, 3.0])[:, None, None, None] * np.einsum("m e r i, m o r e -> m e o i", *by_expert)

    wide = {side: v.astype(np.float64) for side, v in bases.items()}
    restored = delta(np.swapaxes(wide["A"] @ loadings["A"], -1, -2), wide["B"] @ loadings["B"])
    errors = np.square(delta(a, b) - restored).sum(axis=(1, 2, 3))
    norms = np.square(delta(a, b)).sum(axis=(1, 2, 3))
    found = projected_errors(a, b, kept, scalings)
    for f, error, norm in zip(found, errors, norms, strict=True):
        if f is not None:
            assert f.error == pytest.approx(error, rel=5e-5)
            assert f.norm == pytest.approx(norm, rel=1e-9)
    if outside <= 1e-6:
        assert found == [None, None]
    if outside == 1.0 and d > 4 * k and not cancels:
        assert None not in found


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_errors_of_what_is_not_finite_are_left_to_who_looks_closely(bad: float) -> None:
    a, b = np.ones((1, 2, 5), np.float32), np.ones((1, 4, 2), np.float32)
    nothing = {side: np.zeros((1, 1, 2, 2)) for side in SIDES}
    assert projected_errors(a, b, nothing, [Scaling(1.0)]) != [None]
    assert projected_errors(a, b, nothing | {"B": np.full((1, 1, 2, 2), bad)}, [Scaling(1.0)]) == [None]


def test_relative_error_of_nothing() -> None:
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(1.0, 0.0) == float("inf")
    assert relative_error(1.0, 4.0) == 0.5


def test_break_even() -> None:
    assert break_even(384, 128) == 96
    k, d, n = 96, 384, 128
    assert k * (d + n) == d * n


def test_the_moment_of_nothing_is_fitted_to_nothing() -> None:
    values, vectors = leading(empty(5, "float64"), 2)
    assert np.array_equal(values, np.zeros(2))
    assert np.allclose(vectors.T @ vectors, np.eye(2))
