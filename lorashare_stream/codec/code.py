"""Code: one adapter as bytes, within a limit on its error or at a given step, and what comes back of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..adapters.dtypes import Array
from ..adapters.scaling import Scaling
from ..linalg.delta import DeltaError
from .directions import ALONE, Directions, Shared, Side
from .factors import CodedModule, both_sides, errors, factors, groups_of, layouts_of
from .gauge import Pairs, norm_of, pairs_of
from .refit import Quantised, quantise
from .search import likely_step, search
from .stream import decode, encode

Trial = Sequence[Quantised]
ROUGH = 0.01  # the least error that float32 products tell to 1 %


@dataclass(frozen=True)
class Batch:
    """Modules of one shape: lora_A (m, E r, d_in), lora_B (m, d_out, E r), and how dW comes of them."""

    modules: Sequence[CodedModule]
    a: Array
    b: Array
    scalings: Sequence[Scaling]


@dataclass(frozen=True)
class AdapterCode:
    """The code of an adapter, and the certified error of each of its modules."""

    code: bytes
    step: float
    errors: Mapping[str, DeltaError]


@dataclass(frozen=True)
class Subject:
    """An adapter that is to be coded.

    Attributes:
        modules: in the order of the adapter's.
        batches: of the same modules. pairs: of each batch. on: directions of each, left and right.
        norm: ||dW||, positive.
        shared: the directions of the checkpoint.
    """

    modules: Sequence[CodedModule]
    batches: Sequence[Batch]
    pairs: Sequence[Pairs]
    on: Sequence[tuple[Directions, Directions]]
    norm: float
    shared: Shared

    @classmethod
    def of(cls, modules: Sequence[CodedModule], batches: Sequence[Batch], shared: Shared = ALONE) -> Subject:
        """An adapter in the gauge in which it is quantised."""
        pairs = [pairs_of(batch.a, batch.b, batch.scalings) for batch in batches]
        on = [both_sides(Directions, batch.modules, shared) for batch in batches]
        return cls(modules, batches, pairs, on, norm_of(pairs), shared)

    def within(self, limit: float) -> AdapterCode | None:
        """The code of fewest bytes whose certified relative error is at most `limit`; None if there is none."""
        if self.norm == 0:
            return self.at(1.0)
        certificate: dict[str, DeltaError] = {}

        def certify(trial: Trial, step: float) -> float:
            certificate.update(self.certified(trial, step))
            return sqrt(sum(e.error for e in certificate.values()) / sum(e.norm for e in certificate.values()))

        def attempt(step: float) -> tuple[Trial, float]:
            trial, error = self.attempt(step)
            return trial, error if error > ROUGH else certify(trial, step)

        found = search(limit, likely_step(self.pairs, self.norm, limit), attempt, certify)
        return None if found is None else AdapterCode(self._code(found.trial, found.step), found.step, certificate)

    def at(self, step: float) -> AdapterCode:
        """The code at a step, which is of coefficients divided by ||dW||."""
        trial = self._quantised(self.norm or 1.0, step)
        return AdapterCode(self._code(trial, step), step, self.certified(trial, step))

    def attempt(self, step: float) -> tuple[Trial, float]:
        """The integers at a step, and their relative error."""
        trial = self._quantised(self.norm, step)
        return trial, sqrt(max(0.0, sum(part.error for part in trial)))

    def _quantised(self, norm: float, step: float) -> Trial:
        return [quantise(pairs, on, norm, step) for pairs, on in zip(self.pairs, self.on, strict=True)]

    def certified(self, trial: Trial, step: float) -> dict[str, DeltaError]:
        """The error of each module, in the tensors that come back."""
        groups = groups_of(self.modules, self._integers(trial))
        back = {m.name: (a, b) for m, a, b in factors(self.modules, groups, step * self.norm, self.shared)}
        found: dict[str, DeltaError] = {}
        for batch, pairs in zip(self.batches, self.pairs, strict=True):
            names = [m.name for m in batch.modules]
            a_hat, b_hat = (np.stack([back[name][side] for name in names]) for side in (0, 1))
            found |= zip(names, errors(pairs, a_hat, b_hat, batch.scalings), strict=True)
        return found

    def _code(self, trial: Trial, step: float) -> bytes:
        groups = groups_of(self.modules, self._integers(trial))
        return encode(groups, layouts_of(self.modules, self.shared), step * self.norm)

    def _integers(self, trial: Trial) -> dict[str, tuple[Side, Side]]:
        """The integers of the pairs of each module, on both sides."""
        found = {}
        for batch, part in zip(self.batches, trial, strict=True):
            experts = batch.scalings[0].experts
            for i, m in enumerate(batch.modules):
                own = slice(i * experts, (i + 1) * experts)
                found[m.name] = part.left[own], part.right[own]
        return found


def decoded(
    code: bytes, modules: Sequence[CodedModule], shared: Shared = ALONE
) -> Iterator[tuple[CodedModule, Array, Array]]:
    """Each module with its lora_A and lora_B, as `factors` gives them, of a code whose digest was found right.

    Raises:
        CheckpointError: if it is no code of such modules.
    """
    groups, step = decode(code, layouts_of(modules, shared))
    return factors(modules, groups, step, shared)
