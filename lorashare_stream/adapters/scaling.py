"""LoRA scaling: how dW of a module comes of its factors, dW = s B A, or with stacked experts dW_e = s B_e A_e.

And the shapes of modules: what stays known of an adapter when its source is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .dtypes import Array
from .keys import Side


@dataclass(frozen=True, slots=True)
class Scaling:
    """How dW comes of the factors of one module.

    A plain layer has dW = s B A. PEFT's `target_parameters` stack E experts in one pair of tensors: lora_A
    (E r, d_in) expert by expert, lora_B (d_out, r E) with the experts innermost, and dW_e = s B_e A_e
    (peft.tuners.lora.layer.ParamWrapper.get_delta_weight).

    Attributes:
        scale: s. experts: E; 1 for a plain layer.
        parameters: which PEFT may mean by the module's name; empty for a plain layer.
    """

    scale: float
    experts: int = 1
    parameters: tuple[str, ...] = ()

    def blocks(self, rows: Array, side: Side) -> Array:
        """The vectors of each expert, (..., E, r, d), of all given as rows (..., E r, d): lora_A, or lora_B'."""
        *stack, count, d = rows.shape
        if side == "A":
            return rows.reshape(*stack, self.experts, count // self.experts, d)
        return rows.reshape(*stack, count // self.experts, self.experts, d).swapaxes(-3, -2)


class ModuleShape(NamedTuple):
    """What stays known of a shared module of an adapter when its source is gone.

    Attributes:
        rank: of its vectors, those of all stacked experts.
        d_in, d_out: their lengths, of A and of B.
        experts: how many are stacked; 0 where that is not known.
        parameters: which its name means, where it names several.
    """

    rank: int
    d_in: int
    d_out: int
    experts: int = 1
    parameters: tuple[str, ...] = ()


Shapes = Mapping[str, ModuleShape]  # by module
