"""Where sums, eigenvectors and projections are computed: NumPy and SciPy on the CPU, or torch on a GPU.

Torch's calls return before a GPU has done its work, and tasks run in threads: the next block is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.dtypes import Array, Float64
from ..errors import UsageError
from .eigen import by_krylov, leading, polished, prefers_partial
from .moments import HostSum, Moment, Sum

# A driver's device file; without one there is no GPU, and torch need not be imported to know it.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def resolve_device(asked: str) -> str:
    """`cpu` or `cuda`, whatever `auto` means here.

    Raises:
        UsageError: if cuda is asked for and torch cannot use it.
    """
    if asked == "cpu" or (asked == "auto" and not any(Path(p).exists() for p in _DRIVERS)):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise UsageError("--device cuda, but torch sees no GPU", found=f"torch {torch.__version__}", remedy="Use cpu.")
    return "cpu"


def sum_on(device: str, start: Moment) -> Sum:
    """The sum S = X X' of blocks on a device, beginning with `start`."""
    return HostSum(start) if device == "cpu" else TorchSum(start, device)


def solver_on(device: str) -> Callable[[Moment, int], tuple[Float64, Float64]]:
    """The solver of leading eigenpairs on a device."""
    return leading if device == "cpu" else partial(torch_leading, device=device)


class TorchSum:
    """S += X X' on a torch device; S comes back once, at the end."""

    def __init__(self, start: Moment, device: str) -> None:
        import torch

        self._device = device
        if start.second is not None:
            self._second = _tensor(start.second, device)
        else:
            dtype = torch.float64 if start.rows.dtype == np.float64 else torch.float32
            self._second = torch.zeros((start.dim, start.dim), dtype=dtype, device=device)
            if len(start.rows):
                self.add(start.rows)

    def add(self, block: Array) -> None:
        """Add a block (m, d)."""
        rows = _tensor(block, self._device)
        self._second.addmm_(rows.T, rows)

    def result(self) -> Array:
        """S (d, d), column-major as the host has it; it is symmetric."""
        second: Array = self._second.cpu().numpy()
        return second.T


def torch_leading(moment: Moment, k: int, device: str) -> tuple[Float64, Float64]:
    """As `eigen.leading`, with the products on a torch device: block Krylov or, in float64, torch's eigh.

    Start, orthogonalisation, convergence and polish are those of the CPU.
    """
    import torch

    stacked = moment.columns is not None
    form = _tensor(moment.rows, device)  # X' (n, d) or S (d, d)
    if prefers_partial(moment, k):

        def times(q: Array) -> Array:
            there = _tensor(q, device)
            image: Array = (form.T @ (form @ there) if stacked else form @ there).cpu().numpy()
            return image

        if (found := by_krylov(moment, k, times)) is not None:
            return found
    wide = form.double()
    if stacked and moment.count <= moment.dim:
        vectors = wide.T @ torch.linalg.eigh(wide @ wide.T)[1][:, -k:].flip(1)
        vectors = vectors / torch.linalg.norm(vectors, dim=0).clamp_min(1e-300)
    else:
        vectors = torch.linalg.eigh(wide.T @ wide if stacked else wide)[1][:, -k:].flip(1)
    return polished(moment, vectors.cpu().numpy())


def held_on(device: str, stack: Array) -> Any:
    """The left factor of `product`: the array itself, or a tensor on a torch device."""
    return stack if device == "cpu" else _tensor(stack, device)


def product(left: Any, right: Array) -> Array:
    """The matrix product (..., a, c) of a factor of `held_on` (..., a, b) and an array (..., b, c), as an array."""
    if isinstance(left, np.ndarray):
        return left @ right
    result: Array = (left @ _tensor(right, left.device)).cpu().numpy()
    return result


def _tensor(values: Array, device: str) -> Any:
    import torch

    return torch.from_numpy(np.array(values, order="C")).to(device)  # a copy: the host block is overwritten
