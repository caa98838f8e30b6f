"""dW, which the model sees, from the factors, which the files hold: its norm and its error, never forming it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .keys import Side
from .lapack import Array

Float64 = NDArray[np.float64]
_STRIP = 8 << 20  # bytes of a strip in float64


@dataclass(frozen=True, slots=True)
class Product:
    """How dW comes of the factors of one module.

    A plain layer has dW = s B A. PEFT's `target_parameters` stack E experts in one pair of tensors: lora_A
    (E r, d_in) expert by expert, lora_B (d_out, r E) with the experts innermost, and dW_e = s B_e A_e
    (peft.tuners.lora.layer.ParamWrapper.get_delta_weight).

    Attributes:
        scale: PEFT's factor s.
        experts: E; 1 for a plain layer.
        parameters: what PEFT may mean by the module's name, of the parameters that are adapted there; empty for a
            plain layer.
    """

    scale: float
    experts: int = 1
    parameters: tuple[str, ...] = ()

    def blocks(self, rows: Array, side: Side) -> Array:
        """The vectors of each expert, (E, r, d), of all vectors given as rows (E r, d): lora_A, or lora_B'."""
        count, d = rows.shape
        if side == "A":
            return rows.reshape(self.experts, count // self.experts, d)
        return rows.reshape(count // self.experts, self.experts, d).transpose(1, 0, 2)

    def grams(self, rows: Array, side: Side) -> Float64:
        """Gram matrices (E, r, r) of the vectors of each expert, given as for `blocks`."""
        return np.stack([gram(block) for block in self.blocks(rows, side)])

    def energy(self, grams_a: Float64, grams_b: Float64) -> float:
        """||dW||^2 = s^2 sum_e tr(A_e A_e' B_e'B_e), from the Gram matrices of both sides."""
        return self.scale**2 * max(float(np.sum(grams_a * grams_b)), 0.0)


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


def delta_norm(a: Array, b: Array, product: Product) -> float:
    """||dW||^2 for A (E r, d_in), B (d_out, E r), by Gram matrices in float64."""
    return product.energy(product.grams(a, "A"), product.grams(b.T, "B"))


def delta_error(a: Array, b: Array, a_hat: Array, b_hat: Array, product: Product) -> DeltaError:
    """Error of dW^ = s B^ A^ against dW = s B A, exact to rounding, never forming dW.

    dW - dW^ = s [B - B^, B^] [A ; A - A^], whose squared norm is a product of two 2r x 2r Gram matrices; of
    stacked experts, the sum over them.

    Args:
        a, a_hat: (E r, d_in). b, b_hat: (d_out, E r). product: how dW comes of them.
    """
    blocks = zip(
        product.blocks(a, "A"), product.blocks(a_hat, "A"), product.blocks(b.T, "B"), product.blocks(b_hat.T, "B"),
        strict=True,
    )  # fmt: skip
    error = 0.0
    for ae, ae_hat, be, be_hat in blocks:
        left = np.concatenate([be - be_hat, be_hat])  # (2r, d_out)
        right = np.concatenate([ae, ae - ae_hat])  # (2r, d_in)
        error += product.scale**2 * max(float(np.sum(gram(left) * gram(right))), 0.0)
    return DeltaError(error, delta_norm(a, b, product))


def gram(rows: Array) -> Float64:
    """M = W'W (r, r) in float64, for the r vectors of W given as rows (r, d); by strips of bounded size."""
    r, d = rows.shape
    out = np.zeros((r, r))
    strip = max(1, _STRIP // (8 * r))
    for start in range(0, d, strip):
        wide = rows[:, start : start + strip].astype(np.float64)
        out += wide @ wide.T
    return out
