"""Spectra of the sides of modules of one kind, in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..adapters.keys import Side
from ..linalg.types import Float64
from .measure import Measured, SideSpectrum

TOPS = 1, 8, 16, 32, 64
REACHES = 0.9, 0.95, 0.99


@dataclass(frozen=True)
class Spectrum:
    """Of one side of the modules of one kind; means over them, shares of the moments' energy.

    Attributes:
        side, kind: which. modules: how many. dim: d, of the first. count: n of the sample, of the first.
        top, top_chance: k -> share in the k leading directions of the sample. held, held_chance: k -> share of the
            vectors of one half that bases fitted to the other keep.
        effective_rank: exponential of the entropy of the eigenvalues.
        reach: share -> the k that has it, of the sample.
    """

    side: Side
    kind: str
    modules: int
    dim: int
    count: int
    top: Mapping[int, float]
    top_chance: Mapping[int, float]
    held: Mapping[int, float]
    held_chance: Mapping[int, float]
    effective_rank: float
    reach: Mapping[float, float]


def spectrum_of(side: Side, kind: str, some: Sequence[tuple[int, Measured]], ks: Sequence[int]) -> Spectrum:
    """The figures of one side of some modules, given with its d; `ks` are those of `SideSpectrum.held`."""
    own = [m.spectra[side] for _, m in some]
    chance = [m.chance_spectra[side] for _, m in some]
    shares = [_cumulative(s.eigenvalues) for s in own]
    return Spectrum(
        side=side,
        kind=kind,
        modules=len(some),
        dim=some[0][0],
        count=some[0][1].count,
        top={k: _mean([_top(s, k) for s in shares]) for k in TOPS},
        top_chance={k: _mean([_top(_cumulative(s.eigenvalues), k) for s in chance]) for k in TOPS},
        held={k: _mean([_held(s, ks, k) for s in own]) for k in TOPS},
        held_chance={k: _mean([_held(s, ks, k) for s in chance]) for k in TOPS},
        effective_rank=_mean([_effective_rank(s) for s in shares]),
        reach={share: _mean([float(np.searchsorted(s, share * (1 - 1e-12))) + 1 for s in shares]) for share in REACHES},
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _cumulative(eigenvalues: Float64) -> Float64:
    """Shares of the energy in the leading directions; ones if there is none."""
    total = float(eigenvalues.sum())
    return np.asarray(np.cumsum(eigenvalues) / total if total > 0 else np.ones(len(eigenvalues)), np.float64)


def _top(shares: Float64, k: int) -> float:
    return float(shares[min(k, len(shares)) - 1])


def _held(spectrum: SideSpectrum, ks: Sequence[int], k: int) -> float:
    energy = spectrum.energy
    return float(np.interp(k, [0, *ks], [0.0, *spectrum.held])) / energy if energy > 0 else 1.0


def _effective_rank(shares: Float64) -> float:
    """The exponential of the entropy of the parts, from their cumulative shares (Roy and Vetterli, 2007)."""
    parts = np.diff(shares, prepend=0.0)
    parts = parts[parts > 0]
    return float(np.exp(-np.sum(parts * np.log(parts))))
