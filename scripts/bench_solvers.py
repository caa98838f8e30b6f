"""The choices in lorashare_stream/solvers.py: ARPACK or LAPACK of a (d, d) moment, block Krylov or S of columns.

    python scripts/bench_solvers.py [--dims 512 1024 2048]

For a decaying and a flat spectrum; one BLAS thread, as in a run. Prints Markdown: seconds, and the energy that
the partial solver lacks. Compare within one run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import eigsh
from threadpoolctl import threadpool_limits

from lorashare_stream.lapack import add_block
from lorashare_stream.moments import Moment, mirror
from lorashare_stream.solvers import krylov, leading, product_with, suits_krylov


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(2):
        begun = time.perf_counter()
        result = fn()
        best = min(best, time.perf_counter() - begun)
    return best, result


def energy(second: np.ndarray, vectors: np.ndarray) -> float:
    v = np.linalg.qr(vectors.astype(np.float64))[0]
    return float(np.sum(v * (second.astype(np.float64) @ v)))


def of_moments(d: int) -> None:
    print("| d | spectrum | k | ARPACK, s | LAPACK, s | chosen | energy lacking |\n|---|---|---|---|---|---|---|")
    for name, power in (("decaying", -0.5), ("flat", 0.0)):
        x = np.random.default_rng(0).standard_normal((d, 4 * d)) * (1.0 + np.arange(d))[:, None] ** power
        second = (x @ x.T).astype(np.float32)
        for k in (16, 32, 64, 128, 256):
            guess = np.random.default_rng(0).standard_normal(d).astype(np.float32)
            partial, (_, a) = timed(lambda k=k, g=guess, s=second: eigsh(s, k, v0=g, rng=np.random.default_rng(0)))
            wanted = [d - k, d - 1]
            whole, (_, b) = timed(lambda w=wanted, s=second: scipy.linalg.eigh(s.astype(np.float64), subset_by_index=w))
            chosen = "ARPACK" if 16 * k <= d else "LAPACK"
            lacking = 1 - energy(second, a) / energy(second, b)
            print(f"| {d} | {name} | {k} | {partial:.3f} | {whole:.3f} | {chosen} | {lacking:.0e} |", flush=True)


def of_columns(d: int) -> None:
    print(
        "\n| d | n | spectrum | k | Krylov, s | S, then ARPACK or LAPACK, s | chosen | energy lacking |\n|" + "---|" * 8
    )
    for n in (3 * d // 4, 3 * d // 2):
        for name, power in (("decaying", -0.5), ("flat", 0.0)):
            scale = (1.0 + np.arange(d)) ** power
            rows = (np.random.default_rng(0).standard_normal((n, d)) * scale).astype(np.float32)
            for k in (8, 16, 32, 64, 128):
                partial, a = timed(lambda k=k, x=rows: krylov(product_with(x), d, k))
                whole, (_, b) = timed(
                    lambda k=k, x=rows: leading(Moment(second_of(x), None, np.zeros(d), len(x), 1.0), k)
                )
                chosen = "Krylov" if suits_krylov(d, n, k) else "S"
                lacking = 1 - energy(rows.T @ rows, a) / energy(rows.T @ rows, b) if a is not None else float("nan")
                print(
                    f"| {d} | {n} | {name} | {k} | {partial:.3f} | {whole:.3f} | {chosen} | {lacking:.0e} |", flush=True
                )


def second_of(rows: np.ndarray) -> np.ndarray:
    second = np.zeros((rows.shape[1], rows.shape[1]), np.float32, order="F")
    add_block(second, rows)
    mirror(second)
    return second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dims", nargs="+", type=int, default=[512, 1024, 2048])
    dims = parser.parse_args().dims
    with threadpool_limits(1):
        for d in dims:
            of_moments(d)
        for d in dims:
            of_columns(d)


if __name__ == "__main__":
    main()
