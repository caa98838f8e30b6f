"""Element types as safetensors names them, and the conversion that NumPy lacks: bfloat16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
# Bytes per element of every dtype that safetensors stores in whole bytes.
ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# What torch calls them, for all that it stores densely.
TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
STORAGE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPES = {stored: name for name, stored in STORAGE.items()}


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
        bits = raw.view("<u2").astype(np.uint32, order="C")
        return np.left_shift(bits, 16, out=bits).view(np.float32).reshape(shape)
    if dtype == "F64":
        with np.errstate(over="ignore"):
            return raw.view("<f8").reshape(shape).astype(np.float32)
    return raw.view({"F32": "<f4", "F16": "<f2"}[dtype]).reshape(shape).astype(np.float32, copy=False)


def stacked(raw: NDArray[np.uint8], offsets: Sequence[int], dtype: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Tensors of one dtype and shape that lie at offsets of raw bytes, each as `widened`, in one array (m, *shape).

    Tensors in F32 at equal distances are a view of the bytes.
    """
    size = math.prod(shape) * ITEMSIZE[dtype]
    steps = {after - before for before, after in pairwise(offsets)} or {size}
    if len(steps) == 1:
        rows = as_strided(raw[offsets[0] :], (len(offsets), size), (steps.pop(), 1))
    else:
        rows = np.stack([raw[offset : offset + size] for offset in offsets])
    return widened(rows, dtype, (len(offsets), *shape))


def narrowed(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[Any]:
    """Float values rounded to nearest-even for storage: F32, F16, or BF16 as its bit pattern in uint16."""
    if dtype == "BF16":
        bits = _rounded(values)
        bits >>= 16
        return bits.astype(np.uint16)
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, np.float32)
        return single.astype({"F32": np.float32, "F16": np.float16}[dtype], copy=False)


def _rounded(values: NDArray[np.floating[Any]]) -> NDArray[np.uint32]:
    """Bits of float32 whose upper halves are values rounded to nearest-even bfloat16; the lower halves mean nothing."""
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    return rounded


def as_stored(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[np.float32]:
    """Values as they will be read back after storage in `dtype`."""
    if dtype == "BF16":  # in half the time of narrowing and widening
        bits = _rounded(values)
        bits &= 0xFFFF0000
        return bits.view(np.float32)
    raw = narrowed(values, dtype)
    return widened(raw.reshape(-1).view(np.uint8), dtype, raw.shape)
