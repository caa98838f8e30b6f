"""Writes the code tables of coded checkpoints, `lorashare_stream/codec/tables.npy`: once for a version of the format.

A table has whole weights, which sum to 2^24, so that no reader depends on anybody's mathematics: of the integers 0 to K
of a class (those below 0 have the same), and of an escape. They are those of a normal density in the cells of the
quantiser. All tables, from class LOWEST to WHOLE, lie one after the other as uint32.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

from lorashare_stream.codec.quantiser import LOWEST, PER_OCTAVE, TABLES, TOTAL, WHOLE, reach, thresholds

RAREST = 4  # the least weight


def weights(kind: int) -> np.ndarray:
    """The weights of 0 to K, and of an escape."""
    sigma = 2.0 ** (kind / PER_OCTAVE)
    width, first = (float(values[kind - LOWEST]) for values in thresholds())
    edges = np.append(first, (np.arange(1, reach(kind) + 1) + 0.5) * width) / sigma
    cells = np.append(ndtr(-edges[:-1]) - ndtr(-edges[1:]), 0.0)  # of 1 to K, and the escape
    found = np.maximum(np.rint(cells * TOTAL), RAREST).astype(np.int64)
    return np.append(TOTAL - 2 * found[:-1].sum() - found[-1], found).astype(np.uint32)


if __name__ == "__main__":
    np.save(TABLES, np.concatenate([weights(kind) for kind in range(LOWEST, WHOLE + 1)]))
    print(f"{TABLES}: {TABLES.stat().st_size} bytes")
