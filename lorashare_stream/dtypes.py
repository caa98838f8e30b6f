"""Element types as safetensors names them, and the conversions that NumPy lacks (bfloat16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bytes per element of every dtype that safetensors stores in whole bytes.
ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
FLOATS = ("F64", "F32", "F16", "BF16")
STORAGE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def widest(dtypes: set[str]) -> str:
    """The storage dtype that keeps the precision of all sources: BF16 or F16 if all are, else F32.

    float16 with bfloat16 gives float32, which holds both exactly; float64 is stored as float32.
    """
    return next(iter(dtypes)) if dtypes in ({"BF16"}, {"F16"}) else "F32"


def widened(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Raw little-endian bytes of a float tensor as float32 of `shape`; exact but for float64.

    A float64 beyond the range of float32 becomes infinite, which ingest refuses.
    """
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype == "F64":
        with np.errstate(over="ignore"):
            return raw.view("<f8").reshape(shape).astype(np.float32)
    return raw.view({"F32": "<f4", "F16": "<f2"}[dtype]).reshape(shape).astype(np.float32, copy=False)


def stacked(raws: Sequence[NDArray[np.uint8]], dtype: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Raw bytes of tensors of one dtype and shape, as `widened` gives each, in one array (m, *shape)."""
    out = np.empty((len(raws), *shape), np.float32)
    if dtype == "BF16":
        halves = out.view(np.uint32)
        for i, raw in enumerate(raws):
            halves[i] = raw.view("<u2").reshape(shape)
        np.left_shift(halves, 16, out=halves)
        return out
    for i, raw in enumerate(raws):
        out[i] = widened(raw, dtype, shape)
    return out


def narrowed(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[Any]:
    """Float values rounded to nearest-even for storage: F32, F16, or BF16 as its bit pattern in uint16."""
    single = np.ascontiguousarray(values, np.float32)
    if dtype == "F32":
        return single
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return single.astype(np.float16)
    bits = single.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def as_stored(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[np.float32]:
    """Values as they will be read back after storage in `dtype` (F32, BF16 or F16)."""
    if dtype == "F32":
        return np.ascontiguousarray(values, np.float32)
    raw = np.ascontiguousarray(narrowed(values, dtype))
    return widened(raw.reshape(-1).view(np.uint8), dtype, values.shape)
