"""Where sums and eigenvectors are computed: NumPy and SciPy on the CPU, or torch on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError
from .lapack import Array
from .moments import HostSum, Moment, Sum
from .solvers import Float64, leading, polished

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
    """As `solvers.leading`, by torch's eigh on a device; the polish is the same.

    Args:
        moment: of d-vectors; k <= min(d, n).
    """
    import torch

    if moment.columns is not None:
        rows = _tensor(moment.columns, device).double()  # (n, d)
        vectors = rows.T @ torch.linalg.eigh(rows @ rows.T)[1][:, -k:].flip(1)
        vectors /= torch.linalg.norm(vectors, dim=0).clamp_min(1e-300)
    else:
        assert moment.second is not None
        vectors = torch.linalg.eigh(_tensor(moment.second, device))[1][:, -k:].flip(1)
    raw: Any = vectors.double().cpu().numpy()
    return polished(moment, raw)


def _tensor(values: Array, device: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(values, order="C")).to(device)  # a copy: the host block is overwritten
