"""Element types as safetensors names them, and the conversions that NumPy lacks: bfloat16, and int8 with scales.

A matrix (rows, columns) stored in int8 has two rows more: below its first two, which are the bytes of a bfloat16 scale
for each column, lie whole numbers from -127 to 127, by which a scale is to be multiplied. So its first columns are the
first columns of what is stored, a prefix of its rows is one too, and a tensor has one entry in a header. Who does not
know it is told by a product: of V (d + 2, k) and loadings (k + 2, r) there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

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
STORAGE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
DTYPES = {stored: name for name, stored in STORAGE.items()}
# A scale a column, not a row: loadings (k, r) have fewer columns than rows. At k = 32 and r = 8 scales of columns add
# 6 % to their bytes and those of rows 25 %, and dW errors of three real collections differ by 1 % at most. One for a
# whole tensor would do as well there, but ranks may be of any strength. That scales are bfloat16 costs nothing.
_LEVELS, _SCALE_ROWS = 127, 2
_LEAST = np.finfo(np.float32).tiny  # of a scale: smaller ones have not all digits, and zero is none


def stored_shape(shape: tuple[int, int], dtype: str) -> tuple[int, int]:
    """The shape in which a matrix is stored: that of int8 has its scales above it."""
    return shape[0] + (_SCALE_ROWS if dtype == "I8" else 0), shape[1]


def stored_bytes(rows: int, columns: int, dtype: str) -> int:
    """Bytes of components or loadings (rows, columns), with their scales."""
    return ITEMSIZE[dtype] * stored_shape((rows, columns), dtype)[0] * columns


def restored_as(dtype: str) -> str:
    """The dtype of what a product of components and loadings in `dtype` gives."""
    return "F32" if dtype == "I8" else dtype


def alone_as(dtype: str) -> str:
    """The dtype of factors of an adapter's own, which PEFT reads as they are, beside components in `dtype`."""
    return "BF16" if dtype == "I8" else dtype


def widest(dtypes: set[str]) -> str:
    """The storage dtype that keeps the precision of all sources: BF16 or F16 if all are, else F32.

    float16 with bfloat16 gives float32, which holds both exactly; float64 is stored as float32.
    """
    return next(iter(dtypes)) if dtypes in ({"BF16"}, {"F16"}) else "F32"


def widened(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Raw little-endian bytes of a float tensor as float32 of `shape`; exact but for float64.

    A float64 beyond the range of float32 becomes infinite, which ingest refuses. Of I8, `shape` is that of what is
    stored, (..., rows + 2, columns), and gives (..., rows, columns).
    """
    if dtype == "I8":
        scales, whole = np.split(raw.reshape(shape), [_SCALE_ROWS], axis=-2)
        halves = np.ascontiguousarray(np.swapaxes(scales, -1, -2)).reshape(-1)  # (..., columns, 2)
        with np.errstate(over="ignore", invalid="ignore"):
            return whole.view(np.int8) * widened(halves, "BF16", (*shape[:-2], 1, shape[-1]))
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
    """Float values rounded to nearest-even for storage: F32, F16, BF16 as its bit pattern in uint16, or I8 with scales.

    Of I8, matrices (..., rows, columns) give (..., rows + 2, columns) int8, each value off by half its scale at most.
    As the largest of a column is 127 scales, rounding once more changes nothing.
    """
    single = np.ascontiguousarray(values, np.float32)
    if dtype == "I8":
        return _scaled(single)
    if dtype == "F32":
        return single
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return single.astype(np.float16)
    bits = single.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _scaled(values: NDArray[np.float32]) -> NDArray[np.int8]:
    peaks = np.abs(values).max(axis=-2, keepdims=True, initial=0.0)  # (..., 1, columns)
    bits = narrowed(np.maximum(peaks / _LEVELS, _LEAST), "BF16")
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused, once it is read back
        scales = widened(bits.reshape(-1).view(np.uint8), "BF16", bits.shape)
        # The scale is off by 1/256 at most, so that the peak is 126.5 to 127.5 of it.
        whole = np.clip(np.rint(values / scales), -_LEVELS, _LEVELS).astype(np.int8)
    halves = np.ascontiguousarray(np.swapaxes(bits, -1, -2)).view(np.int8)  # (..., columns, 2)
    return np.ascontiguousarray(np.concatenate((np.swapaxes(halves, -1, -2), whole), axis=-2))  # of one column, too


def as_stored(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[np.float32]:
    """Values as they will be read back after storage in `dtype`; in I8, of matrices (..., rows, columns)."""
    raw = narrowed(values, dtype)
    return widened(raw.reshape(-1).view(np.uint8), dtype, raw.shape)
