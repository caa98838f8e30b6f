"""The shapes of the shared modules of an adapter: what stays known of it when its source is gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


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
