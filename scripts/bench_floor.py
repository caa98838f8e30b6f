"""The least time that the machine allows for a collection: for scripts/bench.py --floor.

floor = 3 bytes / bandwidth + sum over groups of d d n / rate + sum over groups of solver seconds / cores

Bandwidth is that of positioned reads from the page cache by a thread a core; the rate that of syrk on blocks of 1024 by
a process a core, each with its own S and one BLAS thread; a solver is timed alone, with one BLAS thread, on the moment
of one group of each shape. Groups whose columns are kept have no syrk. Imports, writing, and the journal are not in it.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
from bench_oracle import WEIGHTS, Data
from threadpoolctl import threadpool_limits

from lorashare_stream.linalg.eigen import leading
from lorashare_stream.linalg.moments import Moment, add_block, mirror, of_columns, stays_stacked

BLOCK = 1024
CHUNK = 8 << 20
CORES = len(os.sched_getaffinity(0))
TRIES = 3


def floor(data: Data, ks: list[int]) -> dict[str, Any]:
    with threadpool_limits(1, user_api="blas"):  # after SciPy was imported, whose BLAS it would miss
        shapes = Counter((d, r * data.count) for _, _, d, r in data.dims())
        summed = sorted({d for d, n in shapes if not stays_stacked(n, d)})
        bandwidth, rates = _bandwidth(data), {d: _syrk_rate(d) for d in summed}
        solver: dict[int, float] = dict.fromkeys(ks, 0.0)  # all groups, one after the other
        for d, n in shapes:
            module, side = next((m, s) for m, s, dim, r in data.dims() if (dim, r * data.count) == (d, n))
            moment = _moment(data.columns(module, side, "factors").astype(np.float32))
            for k in ks:
                solver[k] += shapes[d, n] * _best(lambda k=k, m=moment: leading(m, min(k, m.dim, m.count)))
    reading = 3 * data.bytes / bandwidth
    syrk = sum(count * d * d * n / rates[d] for (d, n), count in shapes.items() if d in rates)
    return {
        "bandwidth": bandwidth, "syrk_rates": {str(d): rate for d, rate in rates.items()},
        "reading_s": reading, "syrk_s": syrk,
        "solver_s": {str(k): s / CORES for k, s in solver.items()},
        "floor_s": {str(k): reading + syrk + s / CORES for k, s in solver.items()},
    }  # fmt: skip


def _best(fn: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(TRIES):
        begun = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - begun)
        if best > 5:
            break
    return best


def _bandwidth(data: Data) -> float:
    """Bytes a second, all threads together."""
    paths = [str(f / WEIGHTS) for f in data.folders]

    def share(start: int) -> int:
        buffer, total = bytearray(CHUNK), 0
        for path in paths[start::CORES]:
            fd = os.open(path, os.O_RDONLY)
            offset = 0
            while got := os.preadv(fd, [buffer], offset):
                offset += got
            os.close(fd)
            total += offset
        return total

    with ThreadPoolExecutor(CORES) as pool:
        return data.bytes / _best(lambda: list(pool.map(share, range(CORES))))


def _syrk_rate(d: int) -> float:
    """Multiply-adds d d n of the whole product a second, of which syrk does half; all processes together."""
    rounds = max(1, (1 << 34) // (d * d * BLOCK))
    with ProcessPoolExecutor(CORES, get_context("spawn")) as pool:
        seconds = max(pool.map(_syrk_seconds, [d] * CORES, [rounds] * CORES))
    return CORES * rounds * d * d * BLOCK / seconds


def _syrk_seconds(d: int, rounds: int) -> float:
    rows = np.random.default_rng(0).standard_normal((BLOCK, d), np.float32)
    second = np.zeros((d, d), np.float32, order="F")

    def work() -> None:
        for _ in range(rounds):
            add_block(second, rows)

    with threadpool_limits(1, user_api="blas"):
        return _best(work)


def _moment(rows: np.ndarray) -> Moment:
    n, d = rows.shape
    if stays_stacked(n, d):
        return of_columns(rows)
    second = np.zeros((d, d), np.float32, order="F")
    for start in range(0, n, BLOCK):
        add_block(second, np.ascontiguousarray(rows[start : start + BLOCK]))
    mirror(second)
    return Moment(second, None, rows.sum(axis=0, dtype=np.float64), n, float(np.trace(second, dtype=np.float64)))
