from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashare_stream.linalg.moments import (
    Accumulator,
    HostSum,
    Moment,
    add_block,
    empty,
    mirror,
    of_columns,
    partner_root,
)


def second_of(moment: Moment) -> np.ndarray:
    """S (d, d), whichever form is kept."""
    return moment.second if moment.columns is None else moment.columns.T @ moment.columns


def rows(seed: int, n: int, d: int, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


def accumulated(x: np.ndarray, cuts: list[int], quantum: int, dtype: str = "float64") -> Moment:
    start = empty(x.shape[1], dtype)
    acc = Accumulator(start, HostSum(start), quantum)
    for part in np.split(x, sorted(cuts)):
        acc.add(part)
    return acc.finish()


def assert_close(a: Moment, b: Moment, rtol: float = 1e-10) -> None:
    assert np.allclose(second_of(a), second_of(b), rtol=rtol, atol=rtol * max(a.energy, 1e-300))
    assert np.allclose(a.sum, b.sum, rtol=rtol, atol=1e-9)
    assert a.count == b.count
    assert a.energy == pytest.approx(b.energy, rel=rtol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 3), (700, 40), (33, 600)])
def test_syrk_is_the_product(dtype: str, n: int, d: int) -> None:
    x = rows(0, n, d, dtype)
    second = np.zeros((d, d), dtype, order="F")
    add_block(second, x)
    add_block(second, x)
    mirror(second, tile=64)
    expected = 2 * x.astype(np.float64).T @ x
    assert np.allclose(
        second, expected, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-3 if dtype == "float32" else 1e-9
    )
    assert np.array_equal(second, second.T)


def test_syrk_refuses_what_it_would_misread() -> None:
    x = rows(0, 4, 3)
    for second, block in ((np.zeros((3, 3), order="C"), x.T), (np.zeros((3, 3), np.float32, order="F"), x)):
        with pytest.raises(ValueError, match="syrk needs"):
            add_block(second, block)


@given(st.integers(0, 60), st.integers(1, 12), st.lists(st.integers(0, 60), max_size=5), st.integers(1, 70))
def test_cutting_the_stream_changes_no_bit_and_the_quantum_only_the_last(
    n: int, d: int, cuts: list[int], quantum: int
) -> None:
    x = rows(n, n, d)
    whole, cut = accumulated(x, [], quantum), accumulated(x, [min(c, n) for c in cuts], quantum)
    assert np.array_equal(second_of(whole), second_of(cut))
    assert np.array_equal(whole.sum, cut.sum)
    assert (whole.count, whole.energy) == (cut.count, cut.energy)
    assert_close(whole, of_columns(x))


@pytest.mark.parametrize("stacked", [True, False])
def test_going_on_from_an_earlier_moment(stacked: bool) -> None:
    x, y = rows(0, 30, 5), rows(1, 40, 5)
    start = of_columns(x) if stacked else accumulated(x, [], 7)
    acc = Accumulator(start, HostSum(start), 16)
    acc.add(y)
    assert_close(acc.finish(), of_columns(np.concatenate([x, y])))


@given(st.integers(1, 6), st.integers(6, 20), st.integers(0, 1000))
def test_the_weighted_side_is_free_of_the_gauge(r: int, d: int, seed: int) -> None:
    """(A, B) -> (M A, B M^-1) leaves dW, and so the weighted second moments of both sides, as they are."""
    rng = np.random.default_rng(seed)
    a, b, m = rng.standard_normal((r, d)), rng.standard_normal((d, r)), rng.standard_normal((r, r)) + 3 * np.eye(r)
    delta = b @ a

    def seconds(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = partner_root(b.T @ b, 0.5) @ a, partner_root(a @ a.T, 0.5) @ b.T
        return x.T @ x, y.T @ y

    for found, expected in zip(
        seconds(m @ a, b @ np.linalg.inv(m)), (delta.T @ delta / 4, delta @ delta.T / 4), strict=True
    ):
        assert np.allclose(found, expected, rtol=1e-7, atol=1e-7 * np.trace(expected))
