"""ARPACK against LAPACK for k leading eigenpairs of a (d, d) moment: the choice in lorashare_stream/solvers.py.

    python scripts/bench_solvers.py [--dims 512 1024 2048]

For a decaying and a flat spectrum; one BLAS thread, as in a run. Prints Markdown: seconds, and the energy that
ARPACK lacks against LAPACK. Compare within one run.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dims", nargs="+", type=int, default=[512, 1024, 2048])
    print("| d | spectrum | k | ARPACK, s | LAPACK, s | chosen | energy lacking |\n|---|---|---|---|---|---|---|")
    with threadpool_limits(1):
        for d in parser.parse_args().dims:
            for name, power in (("decaying", -0.5), ("flat", 0.0)):
                x = np.random.default_rng(0).standard_normal((d, 4 * d)) * (1.0 + np.arange(d))[:, None] ** power
                second = (x @ x.T).astype(np.float32)
                for k in (16, 32, 64, 128, 256):
                    guess = np.random.default_rng(0).standard_normal(d).astype(np.float32)
                    partial, (_, a) = timed(
                        lambda k=k, s=second, g=guess: eigsh(s, k, v0=g, rng=np.random.default_rng(0))
                    )
                    wanted = [d - k, d - 1]
                    whole, (_, b) = timed(
                        lambda s=second, w=wanted: scipy.linalg.eigh(s.astype(np.float64), subset_by_index=w)
                    )
                    chosen = "ARPACK" if 16 * k <= d else "LAPACK"
                    lacking = 1 - energy(second, a) / energy(second, b)
                    print(
                        f"| {d} | {name} | {k} | {partial:.3f} | {whole:.3f} | {chosen} | {lacking:.0e} |", flush=True
                    )


if __name__ == "__main__":
    main()
