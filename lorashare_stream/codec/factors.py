"""Factors: lora_A and lora_B of what is coded, as `reconstruct` writes them, and how far they are from dW.

A column of a pair becomes lora_B[:, j] = qB_j step 2^e and lora_A[j] = qA_j 2^-e / (|qB_j| s), with e such that both
have nearly the same length, rounded to the dtypes that the adapter came with. Rank, alpha and keys stay as they came: a
column without bits is zero. All operations are exact or correctly rounded: every machine gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..adapters.dtypes import Array, Float64, as_stored
from ..adapters.keys import SIDES, group_id
from ..adapters.scaling import Scaling
from ..linalg.delta import DeltaError, energies, gram
from .directions import Axes, Directions, Shared
from .pairs import Pairs, pairs_of
from .stream import Group, Layout, Shape

OfPairs = TypeVar("OfPairs", Axes, Directions)
_AT_ONCE = 1 << 20  # numbers in float64


class CodedModule(NamedTuple):
    """What a decoder must know of a module: of the tensors that it came with, and how dW comes of them."""

    name: str
    rank: int  # of the tensors: of all experts
    d_out: int
    d_in: int
    scale: float
    experts: int
    dtype_b: str
    dtype_a: str

    @property
    def shape(self) -> Shape:
        """Columns, d_out and d_in of its pairs; dW has no more columns than rows or columns."""
        return min(self.rank // self.experts, self.d_out, self.d_in), self.d_out, self.d_in


def layouts_of(modules: Sequence[CodedModule], shared: Shared) -> list[Layout]:
    """The layouts of the groups, of ascending shapes; `shared` are the directions of the checkpoint."""
    alike = [[m for m in modules if m.shape == shape] for shape in _shapes(modules)]
    return [Layout(some[0].shape, both_sides(Axes, some, shared)) for some in alike]


def both_sides(kind: type[OfPairs], modules: Sequence[CodedModule], shared: Shared) -> tuple[OfPairs, OfPairs]:
    """The axes, or the directions, of the pairs of modules of one shape, left and right."""
    _, *dims = modules[0].shape
    left, right = (kind.of(shared, groups, d) for groups, d in zip(_names(modules), dims, strict=True))
    return left, right


def _names(modules: Sequence[CodedModule]) -> tuple[list[str], list[str]]:
    """The groups of each pair, left and right."""
    right, left = ([group for m in modules for group in m.experts * [group_id(m.name, side)]] for side in SIDES)
    return left, right


def _shapes(modules: Sequence[CodedModule]) -> list[Shape]:
    return sorted({m.shape for m in modules})


def factors(
    modules: Sequence[CodedModule], groups: Sequence[Group], step: float, shared: Shared
) -> Iterator[tuple[CodedModule, Array, Array]]:
    """Each module with its lora_A (E r, d_in) and lora_B (d_out, E r), in values of its dtypes, group by group."""
    for shape, group in zip(_shapes(modules), groups, strict=True):
        alike = [m for m in modules if m.shape == shape]
        ends = np.cumsum([0, *(m.experts for m in alike)]).tolist()
        some = max(1, _AT_ONCE // (sum(shape[1:]) * shape[0] * alike[0].experts))
        for first in range(0, len(alike), some):
            part = alike[first : first + some]
            pairs = slice(ends[first], ends[first + len(part)])
            scales = np.repeat([m.scale for m in part], [m.experts for m in part])
            left, right = both_sides(Directions, part, shared)
            a, b = _rows(left.exactly(group.left[pairs]), right.exactly(group.right[pairs]), step, scales)
            starts = [end - ends[first] for end in ends[first:]]
            for m, start in zip(part, starts, strict=False):
                own = slice(start, start + m.experts)
                lora_a = _padded(m, a[own]).reshape(m.rank, m.d_in)
                lora_b = _padded(m, b[own]).swapaxes(0, 1).reshape(m.rank, m.d_out).T  # experts innermost
                yield m, rounded(lora_a, m.dtype_a), rounded(lora_b, m.dtype_b)


def _rows(q_b: Float64, q_a: Float64, step: float, scales: Float64) -> tuple[Float64, Float64]:
    """The rows of lora_A and lora_B' of pairs (n, r, d), in place of these."""
    lengths, others = (np.sqrt(np.einsum("...d,...d->...", q, q)) for q in (q_b, q_a))  # of integers: exact sums
    lengths[lengths == 0] = 1.0
    with np.errstate(all="ignore"):  # a foreign step or scale may be beyond all that have dW
        exponents = np.frexp(others / (lengths * lengths * np.abs(scales)[:, None] * (step or 1.0)))[1] // 2
        q_b *= np.ldexp(step, exponents)[..., None]
        q_a *= (np.ldexp(1.0, -exponents) / (lengths * scales[:, None]))[..., None]
    return q_a, q_b


def _padded(m: CodedModule, rows: Float64) -> Float64:
    """Rows (E, columns, d) with zeros up to the rank, where dW has fewer columns."""
    missing = m.rank // m.experts - rows.shape[1]
    return np.pad(rows, [(0, 0), (0, missing), (0, 0)]) if missing else rows


def rounded(values: Float64, dtype: str) -> Array:
    """Values as a tensor of a dtype holds them; infinite beyond its range."""
    return values if dtype == "F64" else as_stored(values, dtype)


def errors(pairs: Pairs, a_hat: Array, b_hat: Array, scalings: Sequence[Scaling]) -> list[DeltaError]:
    """Error of dW^ = s B^ A^ for the modules of some pairs, in float64; infinite where a number of it is.

    dW - dW^ = [P, -B^] [S Q' ; s A^], of each expert. What both have in common cancels: to some 1e-7 of ||dW||, in
    whatever gauge dW came.

    Args:
        pairs: of all experts of the modules. a_hat: (m, E r, d_in). b_hat: (m, d_out, E r).
        scalings: of each module; E is the same in all.
    """
    scaling, count = scalings[0], len(scalings)
    p, q = (side.reshape(count, scaling.experts, *side.shape[1:]) for side in (pairs.left, pairs.right))
    values = pairs.values.reshape(p.shape[:3])
    scales = np.array([s.scale for s in scalings])[:, None, None, None]
    with np.errstate(over="ignore", invalid="ignore"):
        left = gram(p, scaling.blocks(-b_hat.swapaxes(-1, -2), "B"))
        right = gram(values[..., None] * q, scales * scaling.blocks(a_hat, "A"))
        found = energies(right, left, np.ones(count))
    found[~np.isfinite(found)] = np.inf
    norms = np.square(values).sum(axis=(-2, -1))
    return [DeltaError(error, norm) for error, norm in zip(found.tolist(), norms.tolist(), strict=True)]


def errors_of_products(a: Array, b: Array, a_hat: Array, b_hat: Array, scalings: Sequence[Scaling]) -> list[DeltaError]:
    """`errors` for modules of one shape, given by lora_A (m, E r, d_in) and lora_B (m, d_out, E r)."""
    return errors(pairs_of(a, b, scalings), a_hat, b_hat, scalings)
