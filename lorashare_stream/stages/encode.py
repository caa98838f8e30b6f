"""Encode: write and certify one adapter of a coded checkpoint."""

from __future__ import annotations

import sys
from functools import lru_cache
from math import inf
from pathlib import Path

from ..adapters.adapter import Adapter
from ..adapters.safetensors import TensorReader
from ..checkpoint.format import CODE
from ..checkpoint.summary import Statistics
from ..codec.code import Batch, Subject
from ..codec.directions import ALONE, Shared, from_bytes
from ..codec.factors import CodedModule
from .job import Admitted, Job
from .project import Stored, write_adapter


def encode_adapter(job: Job, task: Admitted) -> Statistics:
    """Write one adapter of a coded checkpoint: code, verbatim tensors, certified error.

    Returns:
        What the summary of the checkpoint needs of it.
    """
    return write_adapter(job, task, CODE, _encoded)


def _encoded(job: Job, task: Admitted, tensors: TensorReader) -> Stored:
    """Code within the job's limit, or at its step; verbatim tensors if no code is smaller than them."""
    adapter = task.adapter
    subject = subject_of(adapter, tensors, directions_at(job.directions))
    every = list(adapter.layout.by_name)
    if not subject.norm:  # dW, being zero, tells nothing of its factors
        return Stored(b"", {}, every, [])
    limit = job.settings.max_error
    coded = subject.at(job.step) if limit is None else subject.within(limit)
    beyond = coded is not None and any(e.error == inf for e in coded.errors.values())  # the range of its dtypes
    if coded is None or beyond or len(coded.code) >= adapter.layout.lora_bytes:
        return Stored(b"", {}, every, [])
    return Stored(coded.code, coded.errors, [], [list(m) for m in subject.modules])


def directions_at(path: Path | None) -> Shared:
    """Directions read from a file; none if `path` is None."""
    return ALONE if path is None else _decoded(path.read_bytes())


@lru_cache(maxsize=1)
def _decoded(stored: bytes) -> Shared:  # by content: workers of a cluster outlive runs, and clocks of disks are coarse
    return from_bytes(stored, sys.maxsize)


def subject_of(adapter: Adapter, tensors: TensorReader, shared: Shared = ALONE) -> Subject:
    """The codec's subject of an adapter, on directions that it shares with others."""
    modules = {
        m.name: CodedModule(m.name, m.rank, m.dim("B"), m.dim("A"), p.scale, p.experts, m.b.dtype, m.a.dtype)
        for m, p in zip(adapter.layout.modules, adapter.scalings, strict=True)
    }
    batches = []
    for batch in adapter.module_batches:
        read = batch.read(tensors)
        of_batch = [modules[name] for name in batch.names]
        batches.append(Batch(of_batch, read["A"], read["B"], adapter.scalings_of(batch.names)))
    return Subject.of(list(modules.values()), batches, shared)
