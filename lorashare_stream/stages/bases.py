"""The bases of all modules, which are fitted one by one, as one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..adapters.folder import open_tensors, tensor_records
from ..adapters.keys import SIDES, group_id
from ..checkpoint.staging import Staging
from .job import Job

Bases = Mapping[str, Mapping[str, Any]]  # module -> facts of its sides


def write_bases(staging: Staging, job: Job, bases: Bases) -> None:
    """Stream the bases, and their eigenvalues, into the staged checkpoint."""
    staging.write_components(raw_components(job, bases), shapes_of(bases), job.storage, job.basis_key)
    sides = {group_id(m, side): facts[side] for m, facts in bases.items() for side in SIDES if side in facts}
    staging.write_spectrum({group: facts["eigenvalues"] for group, facts in sides.items()})


def shapes_of(bases: Bases) -> dict[str, tuple[int, int]]:
    """Group -> (d, k) of the components of bases, of each module A before B."""
    both = [(m, side, facts[side]) for m, facts in bases.items() for side in SIDES if side in facts]
    return {group_id(m, side): (facts["d"], facts["k"]) for m, side, facts in both}


def raw_components(job: Job, bases: Bases) -> Iterator[bytes | memoryview]:
    """The components of bases, as they are stored, in the order of `shapes_of`."""
    for module in bases:
        path = (job.basis_file(module),)
        with open_tensors(path) as reader:
            for record in tensor_records(path):
                yield from reader.chunks(record)
