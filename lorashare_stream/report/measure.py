"""One module of some adapters, measured: what bases keep of those they were fitted to, and of others; and by chance.

Vectors of both sides are given as rows (n, d), adapter by adapter, so that all that is asked for follows from their
Gram matrices (n, n): eigenvalues of moments, loadings on bases that are fitted to a part of the adapters, dW on these
bases, products of one dW with another. Under `delta` the rows are the singular vectors of dW, and count by its
singular values: (W M^(1/2))(W M^(1/2))' of `moments.partner_root` is V S^2 V' too.

What chance gives is measured on the same adapters with every block of rows turned at random: the Gram matrix of the
block, and so the singular values of each dW, stay as they are, and what adapters have in common is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..adapters.keys import SIDES, Side
from ..adapters.scaling import Scaling
from ..linalg.delta import gram
from ..linalg.types import Array, Float64

Float32 = NDArray[np.float32]
Indices = NDArray[np.intp]
NEGLIGIBLE = 1e-12  # of the largest eigenvalue: what is below is rounding


@dataclass(frozen=True)
class Blocks:
    """What adapters bring to one module. A block is an adapter's plain layer, or one of its stacked experts.

    Attributes:
        rows: by side, vectors of all blocks, one below the other (n, d).
        weights: (n,) by which rows are multiplied in the moments.
        strengths: (n,); dW_i / ||dW_i|| is the sum over its rows j of strength_j b_j a_j'.
        ranks: (blocks,) how many rows each block has.
        owners: (blocks,) ascending: the number of its adapter.
        initial: lora_A as it is in the file, as rows of length 1 (n', d), for `parallels`; with `initial_owners` (n',)
            and `initial_places` (n',), which row of lora_A it is.
    """

    rows: Mapping[Side, Float32]
    weights: Float64
    strengths: Float64
    ranks: Indices
    owners: Indices
    initial: Float32
    initial_owners: Indices
    initial_places: Indices

    @property
    def row_owners(self) -> Indices:
        """(n,) the adapter of each row."""
        return np.repeat(self.owners, self.ranks)


@dataclass(frozen=True)
class Capture:
    """The energy ||U'dW V||^2 on bases of k components, float64 (ks, adapters), in units of ||dW_i||^2.

    Attributes:
        whole: bases fitted to all adapters.
        seen: to the half with the adapter itself. held: to the other half.
    """

    whole: Float64
    seen: Float64
    held: Float64

    def divided(self, norms: Float64, some: NDArray[np.bool_]) -> Capture:
        """As shares of the norms (adapters,), of some of the adapters."""
        parts = (np.clip(c[:, some] / norms[some], 0.0, 1.0) for c in (self.whole, self.seen, self.held))
        return Capture(*parts)

    def __add__(self, other: Capture) -> Capture:
        return Capture(self.whole + other.whole, self.seen + other.seen, self.held + other.held)


@dataclass(frozen=True)
class SideSpectrum:
    """Of one side: eigenvalues of its moment, descending; energy (ks,) of held-out vectors that is kept, of what."""

    eigenvalues: Float64
    held: Float64
    energy: float


@dataclass(frozen=True)
class Measured:
    """One module, measured.

    Attributes:
        count: n, the vectors of a side.
        norms: (adapters,) ||dW_i||^2 of this module as a part of that of all.
        found, chance: the energy that bases keep; and that of bases of turned vectors.
        spectra, chance_spectra: by side.
        inner: (adapters, adapters) products <dW_i, dW_j> / (||dW_i|| ||dW_j||).
        parallel, compared: (adapters, adapters), sums of cosines of rows of lora_A in the same place; of how many.
    """

    count: int
    norms: Float64
    found: Capture
    chance: Capture
    spectra: Mapping[Side, SideSpectrum]
    chance_spectra: Mapping[Side, SideSpectrum]
    inner: Float64
    parallel: Float64
    compared: Float64


def factored(
    a: Float32, b: Float32, scalings: Sequence[Scaling], objective: str
) -> tuple[dict[Side, Float32], Float64, Float64]:
    """Modules of one shape of one adapter as `Blocks` have them.

    Args:
        a, b: (m, E r, d_in) and (m, d_out, E r). products: how dW comes of them; E is the same in all.
        objective: under `delta` rows are singular vectors, else those of the factors.

    Returns:
        rows (m, E, r, d) by side; weights and strengths (m, E, r), not yet divided by ||dW_i||. Under `delta` r may be
        less than that of the files, where it is larger than d.
    """
    blocks: dict[Side, Array] = {
        "A": scalings[0].blocks(a, "A"), "B": scalings[0].blocks(np.swapaxes(b, -1, -2), "B"),
    }  # fmt: skip
    scales = np.array([p.scale for p in scalings])[:, None, None]
    if objective == "factors":
        one = np.ones(blocks["A"].shape[:-1])
        return {side: np.asarray(rows, np.float32) for side, rows in blocks.items()}, one, scales * one
    bases, triangles = zip(*(np.linalg.qr(np.swapaxes(blocks[side], -1, -2)) for side in SIDES), strict=True)
    core = scales[..., None] * (triangles[1].astype(np.float64) @ np.swapaxes(triangles[0], -1, -2).astype(np.float64))
    left, values, right = np.linalg.svd(core, full_matrices=False)
    rows: dict[Side, Float32] = {
        "A": right.astype(np.float32) @ np.swapaxes(bases[0], -1, -2),
        "B": np.swapaxes(left.astype(np.float32), -1, -2) @ np.swapaxes(bases[1], -1, -2),
    }
    return rows, values, values


def measure(blocks: Blocks, adapters: int, ks: Sequence[int], rng: np.random.Generator, *, center: bool) -> Measured:
    """Measure one module.

    Args:
        blocks: what the adapters that have it bring.
        adapters: how many there are; halves are those of even and of odd number.
        ks: ascending.
        rng: of the chance.
        center: whether bases are those of moments about the mean.
    """
    grams = {side: gram(blocks.rows[side]) for side in SIDES}
    found, spectra = _kept(blocks, blocks.rows, grams, adapters, ks, center=center)
    turned = {side: _turned(blocks.rows[side], blocks.ranks, rng) for side in SIDES}
    turned_grams = {side: gram(turned[side]) for side in SIDES}
    chance, chance_spectra = _kept(blocks, turned, turned_grams, adapters, ks, center=center)
    inner = _inner(blocks, grams, adapters)
    parallel, compared = _parallels(blocks, adapters)
    norms = np.maximum(np.diag(inner), 0.0)
    return Measured(len(blocks.weights), norms, found, chance, spectra, chance_spectra, inner, parallel, compared)


def _kept(
    blocks: Blocks,
    rows: Mapping[Side, Float32],
    grams: Mapping[Side, Float64],
    adapters: int,
    ks: Sequence[int],
    *,
    center: bool,
) -> tuple[Capture, dict[Side, SideSpectrum]]:
    """What bases fitted to all, and to each half, keep; and the spectra."""
    odd = blocks.row_owners % 2 == 1
    everyone = np.ones(len(odd), bool)

    def on(train: NDArray[np.bool_]) -> dict[Side, tuple[Float64, Float64]]:
        return {
            side: _loadings(rows[side], grams[side], blocks.weights, train, ks[-1], center=center) for side in SIDES
        }

    full = on(everyone)
    whole = _captured(blocks, full, adapters, ks)
    seen, held = np.zeros_like(whole), np.zeros_like(whole)
    sides = {side: np.zeros(len(ks)) for side in SIDES}
    numbers = np.arange(adapters) % 2 == 1
    for train, trained in ((odd, numbers), (~odd, ~numbers)):
        half = on(train)
        captured = _captured(blocks, half, adapters, ks)
        seen[:, trained], held[:, ~trained] = captured[:, trained], captured[:, ~trained]
        for side in SIDES:
            squares = (blocks.weights[~train, None] * half[side][1][~train]) ** 2
            total = np.concatenate([[0.0], np.cumsum(squares.sum(axis=0))])
            sides[side] += total[np.minimum(ks, len(total) - 1)]
    lengths = {side: blocks.weights**2 * np.diag(grams[side]) for side in SIDES}
    spectra = {side: SideSpectrum(full[side][0], sides[side], float(lengths[side].sum())) for side in SIDES}
    return Capture(whole, seen, held), spectra


def _loadings(
    rows: Float32, scalings: Float64, weights: Float64, train: NDArray[np.bool_], most: int, *, center: bool
) -> tuple[Float64, Float64]:
    """Eigenvalues of the moment of some weighted rows, and the loadings V'w of all rows, unweighted.

    Where the rows are no more than their length, V = X' Q L^(-1/2) with X X' = Q L Q', and V'w follows from the Gram
    matrix; else V is that of X'X.

    Args:
        rows: (n, d). products: their Gram matrix (n, n).
        weights: (n,) by which they count in the moment.
        train: (n,) which do.
        most: components at most.
        center: about the mean.

    Returns:
        All eigenvalues, descending, and loadings (n, k), k = min(most, d, rows that count).
    """
    chosen = np.flatnonzero(train)
    own = weights[chosen]
    k = min(most, rows.shape[1], len(chosen))
    if not k:
        return np.zeros(0), np.zeros((len(rows), 0))
    if len(chosen) <= rows.shape[1]:
        matrix = own[:, None] * scalings[np.ix_(chosen, chosen)] * own
        values, vectors = np.linalg.eigh(_about_mean(_about_mean(matrix).T) if center else matrix)
        values, vectors = values[::-1], vectors[:, ::-1][:, :k]
        good = values[:k] > NEGLIGIBLE * max(values[0], 0.0)
        vectors = np.where(good, vectors / np.sqrt(np.where(good, values[:k], 1.0)), 0.0)
        mixing = own[:, None] * (_about_mean(vectors) if center else vectors)
        return np.clip(values, 0.0, None), scalings[:, chosen] @ mixing
    columns = own[:, None] * rows[chosen].astype(np.float64)
    columns = _about_mean(columns) if center else columns
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return np.clip(values[::-1], 0.0, None), rows.astype(np.float64) @ vectors[:, ::-1][:, :k]


def _about_mean(rows: Float64) -> Float64:
    return np.asarray(rows - rows.mean(axis=0), np.float64)


def _captured(
    blocks: Blocks, loadings: Mapping[Side, tuple[Float64, Float64]], adapters: int, ks: Sequence[int]
) -> Float64:
    """||U'dW V||^2 (ks, adapters) for bases of k components, from the loadings of both sides.

    U'dW V = sum_j p_j (U'b_j)(V'a_j)', whose squared norm is that of the r x r Gram matrices of the loadings.
    """
    out = np.zeros((len(ks), adapters))
    a, b = loadings["A"][1], loadings["B"][1] * blocks.strengths[:, None]
    starts = np.cumsum(blocks.ranks) - blocks.ranks
    for rank in np.unique(blocks.ranks):
        some = np.flatnonzero(blocks.ranks == rank)
        where = starts[some][:, None] + np.arange(rank)
        both = [x[where] for x in (a, b)]  # (blocks, r, k)
        grams = [np.zeros((len(some), rank, rank)) for _ in both]
        done = 0
        for i, k in enumerate(ks):
            for part, total in zip(both, grams, strict=True):
                piece = part[:, :, done:k]
                total += piece @ np.swapaxes(piece, -1, -2)
            done = k
            np.add.at(out[i], blocks.owners[some], np.sum(grams[0] * grams[1], axis=(1, 2)))
    return out


def _turned(rows: Float32, ranks: Indices, rng: np.random.Generator) -> Float32:
    """Rows (n, d), each block turned at random: R' Q' for rows = R' Q0', Q uniform among orthonormal (d, r)."""
    out = np.empty_like(rows)
    starts = np.cumsum(ranks) - ranks
    for rank in np.unique(ranks):
        where = starts[ranks == rank][:, None] + np.arange(rank)
        noise = rng.standard_normal((rows.shape[1], rank, len(where)), np.float32).transpose(2, 0, 1)
        triangle = np.linalg.qr(np.swapaxes(rows[where], -1, -2), mode="r")
        out[where] = np.swapaxes(np.linalg.qr(noise)[0] @ triangle, -1, -2)
    return out


def _inner(blocks: Blocks, grams: Mapping[Side, Float64], adapters: int) -> Float64:
    """Products <dW_i, dW_j> (adapters, adapters) in units of the norms: sums over pairs of rows."""
    starts = np.cumsum(blocks.ranks) - blocks.ranks
    pairs = grams["A"] * grams["B"] * np.outer(blocks.strengths, blocks.strengths)
    between = np.add.reduceat(np.add.reduceat(pairs, starts, axis=0), starts, axis=1)  # (blocks, blocks)
    holders, experts = np.unique(blocks.owners, return_counts=True)
    count = int(experts[0])  # of one module, the same for all
    own = np.einsum("ieje->ij", between.reshape(len(holders), count, len(holders), count))
    out = np.zeros((adapters, adapters))
    out[np.ix_(holders, holders)] = own
    return out


def _parallels(blocks: Blocks, adapters: int) -> tuple[Float64, Float64]:
    """Sums of cosines of rows of lora_A in the same place, of all pairs of adapters, and how many rows those are."""
    sums, counts = np.zeros((adapters, adapters)), np.zeros((adapters, adapters))
    for place in range(int(blocks.initial_places.max(initial=-1)) + 1):
        here = blocks.initial_places == place
        rows, owners = blocks.initial[here], blocks.initial_owners[here]
        sums[np.ix_(owners, owners)] += rows @ rows.T
        counts[np.ix_(owners, owners)] += 1
    return sums, counts
