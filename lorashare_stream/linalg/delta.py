"""Norms and errors of dW = s B A from the factors, without forming dW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..adapters.dtypes import Array, Float64
from ..adapters.keys import Side
from ..adapters.scaling import Scaling

_STRIP = 1 << 20  # bytes of a strip of one stack of vectors in float64
# Of so few vectors a product is faster than NumPy's W'W by syrk, if it is small enough for OpenBLAS to pack nothing (a
# million multiplications), and is not W'W as a whole: up to twice as fast.
_FEW, _SMALL = 32, 1 << 18
_PROJECTED = 0.01  # of ||A A'|| ||B'B||: squared errors above it are known to 1e-4 by `projected_errors`, most to 1e-5


def energies(grams_a: Float64, grams_b: Float64, scales: Float64) -> Float64:
    """||dW||^2 = s^2 sum_e tr(A_e A_e' B_e'B_e) of modules (m,), from the Gram matrices of both sides (m, E, r, r)."""
    norms: Float64 = scales**2 * np.maximum(np.sum(grams_a * grams_b, axis=(-3, -2, -1)), 0.0)
    return norms


@dataclass(frozen=True)
class DeltaError:
    """Squared Frobenius norms for one module, float64: of dW - dW^, and of dW."""

    error: float
    norm: float

    @property
    def relative(self) -> float:
        """||dW - dW^|| / ||dW||; 0 where both vanish."""
        return relative_error(self.error, self.norm)


def relative_error(error: float, norm: float) -> float:
    """sqrt(error / norm) of squared norms; 0 if both are 0, infinite if only the norm is."""
    if norm > 0:
        return float(np.sqrt(error / norm))
    return 0.0 if error <= 0 else float("inf")


def delta_error(a: Array, b: Array, a_hat: Array, b_hat: Array, scaling: Scaling) -> DeltaError:
    """`delta_errors` of one module: a, a_hat (E r, d_in), b, b_hat (d_out, E r)."""
    return delta_errors(a[None], b[None], a_hat[None], b_hat[None], [scaling])[0]


def delta_errors(a: Array, b: Array, a_hat: Array, b_hat: Array, scalings: Sequence[Scaling]) -> list[DeltaError]:
    """Error of dW^ = s B^ A^ against dW = s B A for modules of one shape, exact to rounding, never forming dW.

    dW - dW^ = s [B - B^, B^] [A ; A - A^], whose squared norm is a product of two 2r x 2r Gram matrices, in
    float64; of stacked experts, the sum over them. Those of A and of B, for ||dW||^2, are made of parts of these.

    Args:
        a, a_hat: (m, E r, d_in). b, b_hat: (m, d_out, E r). scalings: of each module; E is the same in all.
    """
    blocks = scalings[0].blocks
    b_rows, b_hat_rows = np.swapaxes(b, -1, -2), np.swapaxes(b_hat, -1, -2)
    left = gram(blocks(b_rows - b_hat_rows, "B"), blocks(b_hat_rows, "B"))  # (m, E, 2r, 2r)
    right = gram(blocks(a, "A"), blocks(a - a_hat, "A"))
    r = right.shape[-1] // 2
    grams_b = left[..., :r, :r] + left[..., :r, r:] + left[..., r:, :r] + left[..., r:, r:]
    scales = np.array([p.scale for p in scalings])
    errors, norms = energies(right, left, scales), energies(right[..., :r, :r], grams_b, scales)
    return [DeltaError(error, norm) for error, norm in zip(errors.tolist(), norms.tolist(), strict=True)]


def projected_errors(
    a: Array, b: Array, kept: Mapping[Side, Float64], scalings: Sequence[Scaling]
) -> list[DeltaError | None]:
    """As `delta_errors`, where A^ and B^ are orthogonal projections: ||dW||^2 - ||U'dW V||^2, by Pythagoras.

    Loadings in float32, and V'V and U'U that are 1 to its rounding, leave it off by some 1e-7, at most 1e-6, of
    ||A A'|| ||B'B||, against which ||dW||^2 is small where B and A cancel.

    Args:
        a, b: (m, E r, d_in) and (m, d_out, E r). scalings: of each module; E is the same in all.
        kept: by side, Gram matrices (m, E, r, r) of the loadings.

    Returns:
        Errors; None where one is not large against that (`_PROJECTED`), or not finite.
    """
    scales, blocks = np.array([p.scale for p in scalings]), scalings[0].blocks
    both = gram(blocks(a, "A")), gram(blocks(np.swapaxes(b, -1, -2), "B"))
    norms = energies(*both, scales)
    with np.errstate(invalid="ignore"):  # loadings beyond the range of their dtype
        found = energies(kept["A"], kept["B"], scales)
    squares = [np.square(gram).sum(axis=(-3, -2, -1)) for gram in both]
    large = norms - found > _PROJECTED * scales**2 * np.sqrt(squares[0] * squares[1])  # false for what is not a number
    errors = zip(large, (norms - found).tolist(), norms.tolist(), strict=True)
    return [DeltaError(error, norm) if usable else None for usable, error, norm in errors]


def gram(*parts: Array) -> Float64:
    """W'W (..., r, r) in float64, for vectors W given as rows (..., r, d), one part after the other.

    By strips of bounded size, in the memory order of the parts, so that nothing is transposed on the way. How strips
    are cut depends on r alone: whatever it is stacked with, a module's matrix is the same to the last bit.
    """
    *stack, _, d = parts[0].shape
    ends = np.cumsum([part.shape[-2] for part in parts]).tolist()
    r = ends[-1]
    out = np.zeros((*stack, r, r))
    few = r <= _FEW
    strip = max(1, (_SMALL if few else _STRIP) // (8 * r))
    halves = (slice(0, r // 2), slice(r // 2, r)) if few else (slice(0, r),)
    by_rows = parts[0].strides[-1] <= parts[0].strides[-2]
    for start in range(0, d, strip):
        width = min(strip, d - start)
        wide = np.empty((*stack, r, width)) if by_rows else np.swapaxes(np.empty((*stack, width, r)), -1, -2)
        for part, end in zip(parts, ends, strict=True):
            wide[..., end - part.shape[-2] : end, :] = part[..., start : start + width]
        for half in halves:
            out[..., half, :] += wide[..., half, :] @ np.swapaxes(wide, -1, -2)
    return out
