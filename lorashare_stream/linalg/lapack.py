"""BLAS and LAPACK called by their addresses in SciPy, whose own wrappers hold the interpreter's lock.

Under that lock nothing else runs for as long as a call takes: no other task, no heartbeat, no signal.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]


def _capsules(name: str) -> dict[str, Any]:
    """Addresses of routines by name, of a module of `scipy.linalg`, which itself is not imported: 0.1 s, 7 MB."""
    full = f"scipy.linalg.{name}"
    if full not in sys.modules:
        spec = PathFinder.find_spec(full, [str(Path(scipy.__file__).parent / "linalg")])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = module_from_spec(spec)  # where whoever does import it finds it
        spec.loader.exec_module(sys.modules[full])
    return dict(sys.modules[full].__pyx_capi__)


def _routine(capsules: dict[str, Any], name: str, arguments: str) -> Any:
    """A routine as a ctypes function, which releases the lock; `arguments`: c for a flag, p for a pointer."""
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    pointer = api.PyCapsule_GetPointer(capsules[name], api.PyCapsule_GetName(capsules[name]))
    kinds = {"c": ctypes.c_char_p, "p": ctypes.c_void_p}
    return ctypes.CFUNCTYPE(None, *(kinds[a] for a in arguments))(pointer)


_BLAS, _LAPACK = _capsules("cython_blas"), _capsules("cython_lapack")
_SYRK = {"f": _routine(_BLAS, "ssyrk", "ccpppppppp"), "d": _routine(_BLAS, "dsyrk", "ccpppppppp")}
_SYEVR = {dtype: _routine(_LAPACK, f"{name}syevr", "ccc" + 18 * "p") for dtype, name in (("f", "s"), ("d", "d"))}


def add_block(second: Array, rows: Array) -> None:
    """S += X X' in place, lower triangle only: BLAS syrk, half the flops of a product.

    Args:
        second: S (d, d), column-major, float32 or float64.
        rows: X' (m, d), row-major, of the same dtype.
    """
    if not second.flags.f_contiguous or not rows.flags.c_contiguous or second.dtype != rows.dtype:
        raise ValueError("syrk needs column-major S and row-major X' of one dtype")
    real = ctypes.c_double if second.dtype == np.float64 else ctypes.c_float
    n, k, one = ctypes.c_int(second.shape[0]), ctypes.c_int(rows.shape[0]), real(1.0)
    _SYRK[second.dtype.char](
        b"L", b"N", ctypes.byref(n), ctypes.byref(k), ctypes.byref(one),
        rows.ctypes.data, ctypes.byref(n), ctypes.byref(one), second.ctypes.data, ctypes.byref(n),
    )  # fmt: skip


def largest_eigenpairs(matrix: Array, k: int, *, vectors: bool = True) -> tuple[Array, Array]:
    """The k largest eigenvalues, ascending, and their eigenvectors, of a symmetric matrix: LAPACK syevr in its dtype.

    Args:
        matrix: (n, n) float32 or float64, column-major; its lower triangle is read, and overwritten.
        k: how many, from 1.
        vectors: whether eigenvectors are wanted; if not, (n, 0) are given.

    Returns:
        values (m,) ascending, and vectors (n, m), column-major, of its dtype. m is k, or less: syevr's MRRR gives fewer
        eigenvectors than were asked for where eigenvalues are clustered, and info 0 (106 of 108 at n = 700).

    Raises:
        numpy.linalg.LinAlgError: if LAPACK fails.
    """
    n = len(matrix)
    kind = matrix.dtype
    if kind.char not in _SYEVR or not matrix.flags.f_contiguous:
        raise ValueError("syevr needs a column-major matrix, float32 or float64")
    values, found = np.empty(n, kind), np.empty((n, k if vectors else 0), kind, order="F")
    support = np.empty(2 * k, np.intc)
    work, iwork = np.empty(1, kind), np.empty(1, np.intc)
    for asking in (True, False):  # first for the sizes of the work arrays
        if not asking:
            work, iwork = np.empty(int(work[0]), kind), np.empty(int(iwork[0]), np.intc)
        lengths = (-1, -1) if asking else (len(work), len(iwork))
        integers = [ctypes.c_int(i) for i in (n, n, n - k + 1, n, 0, n, *lengths, 0)]
        size, lda, first, last, count, ldz, lwork, liwork, info = integers
        zero, by = ctypes.c_double(0.0), ctypes.byref  # all bytes of it are zero in either dtype
        _SYEVR[kind.char](
            b"V" if vectors else b"N", b"I", b"L", by(size), matrix.ctypes.data, by(lda), by(zero), by(zero),
            by(first), by(last), by(zero), by(count), values.ctypes.data, found.ctypes.data, by(ldz),
            support.ctypes.data, work.ctypes.data, by(lwork), iwork.ctypes.data, by(liwork), by(info),
        )  # fmt: skip
        if info.value != 0:
            raise np.linalg.LinAlgError(f"syevr fails with info {info.value}")
    return values[: count.value], found[:, : count.value]
