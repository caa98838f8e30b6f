"""The choice in lorashare_stream/linalg/eigen.py: block Krylov or LAPACK, of a (d, d) moment and of columns.

    python scripts/bench_solvers.py [--dims 512 1024 2048]

For planted directions in noise, a decaying spectrum, and noise alone; one BLAS thread, as in a run. Prints Markdown:
milliseconds of CPU, and the share of the best energy that either lacks. Compare within one run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lorashare_stream.linalg.eigen import by_krylov, by_lapack, compressed, matvec_of, prefers_partial, spectrum
from lorashare_stream.linalg.moments import Moment, of_columns

SPECTRA = {
    "planted": lambda d: np.hypot(np.where(np.arange(d) < 96, 1 / (1 + np.arange(d)), 0), 0.4 / np.sqrt(d)),
    "decaying": lambda d: (1.0 + np.arange(d)) ** -0.5,
    "noise": np.ones,
}


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(2):
        begun = time.process_time()
        result = fn()
        best = min(best, time.process_time() - begun)
    return 1000 * best, result


def moments(d: int) -> list[tuple[str, str, Moment]]:
    found = []
    for name, scale in SPECTRA.items():
        for form, n in (("columns", 3 * d // 4), ("columns", 3 * d // 2), ("second", 4 * d)):
            rows = (np.random.default_rng(0).standard_normal((n, d)) * scale(d)).astype(np.float32)
            whole = of_columns(rows)
            if form == "second":
                whole = Moment(np.asfortranarray(rows.T @ rows), None, whole.sum, n, whole.energy)
            found.append((name, form, whole))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dims", nargs="+", type=int, default=[512, 1024, 2048])
    dims = parser.parse_args().dims
    print("| d | n | form | spectrum | k | Krylov, ms | LAPACK, ms | chosen | Krylov lacks | LAPACK lacks |")
    print("|" + "---|" * 10)
    with threadpool_limits(1):
        for name, form, moment in (each for d in dims for each in moments(d)):
            best = np.cumsum(spectrum(moment))
            for k in (8, 16, 32, 64, 128):
                partial, a = timed(lambda m=moment, k=k: by_krylov(m, k, matvec_of(m)))
                whole, b = timed(lambda m=moment, k=k: by_lapack(m, k))
                lacks = [1 - np.trace(compressed(moment, v)) / best[k - 1] for v in (a[1], b[1])]
                chosen = "Krylov" if prefers_partial(moment, k) else "LAPACK"
                print(
                    f"| {moment.dim} | {moment.count} | {form} | {name} | {k} | {partial:.1f} | {whole:.1f} "
                    f"| {chosen} | {lacks[0]:.0e} | {lacks[1]:.0e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
