"""Where sums, eigenvectors and projections are computed: NumPy and SciPy on the CPU, or torch on a GPU.

Torch's calls return before a GPU has done its work, and tasks run in threads: the next block is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError
from .lapack import Array
from .moments import HostSum, Moment, Sum
from .solvers import Float64, krylov, leading, polished, suits_krylov

if TYPE_CHECKING:
    import torch

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
    """What sums blocks into S, beginning with `start`."""
    return HostSum(start) if device == "cpu" else TorchSum(start, device)


def solver_on(device: str) -> Callable[[Moment, int], tuple[Float64, Float64]]:
    """What finds leading eigenpairs."""
    return leading if device == "cpu" else partial(torch_leading, device=device)


class TorchSum:
    """S += X X' on a torch device; S comes back once, at the end."""

    def __init__(self, start: Moment, device: str) -> None:
        import torch

        self._device = device
        form = start.second if start.second is not None else start.columns
        assert form is not None
        if start.second is not None:
            self._second = torch.from_numpy(np.ascontiguousarray(form)).to(device)
        else:
            dtype = torch.float64 if form.dtype == np.float64 else torch.float32
            self._second = torch.zeros((start.dim, start.dim), dtype=dtype, device=device)
            if len(form):
                self.add(form)

    def add(self, block: Array) -> None:
        """Add a block (m, d)."""
        rows = _tensor(block, self._device)
        self._second.addmm_(rows.T, rows)

    def result(self) -> Array:
        """S (d, d), column-major as the host has it; it is symmetric."""
        second: Array = self._second.cpu().numpy()
        return second.T


def torch_leading(moment: Moment, k: int, device: str) -> tuple[Float64, Float64]:
    """As `solvers.leading`, with all products on a torch device: block Krylov for small k, else torch's eigh.

    Start, orthogonalisation, convergence and polish are those of the CPU, in float64.

    Args:
        moment: of d-vectors; k <= min(d, n).
        k: how many.
        device: of torch.
    """
    import torch

    found: Float64 | None = None
    if moment.columns is not None:
        rows = _tensor(moment.columns, device)  # (n, d)
        if suits_krylov(moment.dim, moment.count, k):
            found = krylov(lambda q: _host(rows.T @ (rows @ _tensor(q, device).to(rows.dtype))), moment.dim, k)
        if found is None:
            wide = rows.double()
            if moment.count <= moment.dim:
                vectors = wide.T @ torch.linalg.eigh(wide @ wide.T)[1][:, -k:].flip(1)
                found = _host(vectors / torch.linalg.norm(vectors, dim=0).clamp_min(1e-300))
            else:
                found = _host(torch.linalg.eigh(wide.T @ wide)[1][:, -k:].flip(1))
        return polished(moment, found)
    assert moment.second is not None
    second = _tensor(moment.second, device)
    if suits_krylov(moment.dim, moment.dim, k):  # what is exact for columns is for S
        found = krylov(lambda q: _host(second @ _tensor(q, device).to(second.dtype)), moment.dim, k)
    if found is None:
        found = _host(torch.linalg.eigh(second.double())[1][:, -k:].flip(1))
    return polished(moment, found)


def held_on(device: str, stack: Array) -> Any:
    """An array for `product` with others: itself, or a tensor on a torch device."""
    return stack if device == "cpu" else _tensor(stack, device)


def product(left: Any, right: Array) -> Array:
    """The matrix product (..., a, c) of what is held somewhere (..., a, b) with an array (..., b, c), as an array."""
    if isinstance(left, np.ndarray):
        return left @ right
    result: Array = (left @ _tensor(right, left.device)).cpu().numpy()
    return result


def _host(tensor: torch.Tensor) -> Float64:
    found: Float64 = tensor.double().cpu().numpy()
    return found


def _tensor(values: Array, device: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(values, order="C")).to(device)  # a copy: the host block is overwritten
