"""Slice: a smaller k from a stored checkpoint, without its sources.

Components are sorted by eigenvalue, so the first k of them are the basis that a smaller k gives, and the first k rows
of the loadings are what projecting on it gives. What is lost by it is measured against what was stored before, and
added to the certified error: with orthonormal components the two errors are orthogonal,

    ||dW - dW_k||^2 = ||dW - dW_K||^2 + ||dW_K - dW_k||^2,

which rounding to bfloat16 leaves true to some 1e-3.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.config import scalings
from ..adapters.dtypes import ITEMSIZE, as_stored
from ..adapters.folder import digest_files, open_tensors, tensor_records
from ..adapters.keys import SIDES, group_id, split_group_id
from ..adapters.safetensors import TensorReader, TensorRecord, float32, write_safetensors
from ..checkpoint.config import CheckpointRecord, Group, SHAREConfig, read_share_config, record_of
from ..checkpoint.format import ADAPTERS, COMPONENTS, LOADINGS, META, SPECTRUM, VERBATIM, skipped_of
from ..checkpoint.records import REPAIR, AdapterRecord, admission_in, check_components, metas_of, sizes_of
from ..checkpoint.staging import Staging
from ..checkpoint.summary import share_config, statistics_of
from ..errors import CheckpointError
from ..files import naming, sealed
from ..linalg.delta import DeltaError, delta_error
from ..plan.plan import settings_key_of
from ..runtime.executors import Mapper
from ..runtime.progress import Progress, silent
from ..text import digest_of
from .components import components_at
from .job import checkpoint_key_of
from .run import LOT


@dataclass(frozen=True)
class Cut:
    """Slice of a checkpoint.

    Attributes:
        source, out: their folders.
        record: of the smaller one.
        digest: of all that decides the result.
        source_digest: of the components of `source`.
    """

    source: Path
    out: Path
    record: CheckpointRecord
    digest: str
    source_digest: str


def cut_of(source: Path, config: SHAREConfig, num_components: int, out: Path) -> Cut:
    """Slice of a checkpoint to `num_components`, not yet written."""
    record = record_of(config)
    sliced = _sliced_record(record, num_components, _spectrum(source), config.num_components)
    digest = checkpoint_key_of(sliced.choice, [admission_in(meta) for meta in metas_of(source, config.adapter_names)])
    return Cut(source, out, sliced, digest, record.basis_digest)


def slice_checkpoint(cut: Cut, mapper: Mapper, at_once: int, progress: Progress = silent) -> None:
    """Write a slice, in place of what is at its output.

    Args:
        cut: what to do.
        mapper, at_once: map the adapters.
        progress: passes the results on as they come.
    """
    config = read_share_config(cut.source)
    names, left_out = config.adapter_names, skipped_of(cut.source)
    check_components(cut.source, cut.record.components)
    with Staging.open(cut.out, digest_of([cut.digest, cut.record.basis_digest])) as staging:
        _write_bases(cut, staging)
        record = cut.record.model_copy(update={"components": digest_files([staging.root / COMPONENTS])})
        admissions = [admission_in(meta) for meta in metas_of(cut.source, names)]
        todo = [r.name for r in admissions if not staging.done(r, cut.record.basis_digest)]
        sliced = mapper.map(partial(slice_adapter, cut, staging), todo, at_once, lot=LOT)
        for _ in progress("project", len(todo), sliced):
            pass
        staging.sync(names)
        statistics = [statistics_of(meta) for meta in metas_of(staging.root, names)]
        sizes = sizes_of(staging.root, names)
        new = share_config(record, statistics, digest=cut.digest, sizes=sizes, skipped=left_out)
        staging.commit(cut.out, new, left_out)


def _sliced_record(
    record: CheckpointRecord, k: int, spectrum: dict[str, NDArray[np.float64]], cut_from: int
) -> CheckpointRecord:
    groups: dict[str, Group] = {}
    for group, f in record.groups.items():
        lost = float(spectrum[group][k:].sum()) / f.energy if f.energy > 0 else 0.0
        groups[group] = f.model_copy(update={"k": min(k, f.k), "explained": f.explained - lost})
    changes = {
        "settings": replace(record.settings, num_components=k),
        "choice": settings_key_of(record.binding, record.base_model, k, 0.0, record.dtype),
        "basis_digest": digest_of(["sliced", record.basis_digest, k]),
        "groups": groups,
        "cut_from": cut_from,
    }
    return record.model_copy(update=changes)


def _spectrum(source: Path) -> dict[str, NDArray[np.float64]]:
    paths = (source / SPECTRUM,)
    if not paths[0].is_file():
        raise CheckpointError(f"{SPECTRUM} is missing", found=source, remedy="Compress its sources again.")
    with open_tensors(paths) as tensors:
        return {r.name: tensors.raw(r).copy().view("<f8") for r in tensor_records(paths)}


def _write_bases(cut: Cut, staging: Staging) -> None:
    source = (cut.source / COMPONENTS,)
    with open_tensors(source) as tensors:
        records = {r.name: r for r in tensor_records(source)}
        shapes = {group: (cut.record.groups[group].d, cut.record.groups[group].k) for group in records}
        chunks = (
            np.ascontiguousarray(tensors.raw(r).reshape(r.shape[0], -1)[:, : ITEMSIZE[r.dtype] * k])
            for r, (_, k) in zip(records.values(), shapes.values(), strict=True)
        )
        staging.write_components(
            (chunk.data.cast("B") for chunk in chunks), shapes, cut.record.dtype, cut.record.basis_digest
        )
    spectrum = _spectrum(cut.source)
    staging.write_spectrum({g: values[: cut.record.groups[g].k].tolist() for g, values in spectrum.items()})


def slice_adapter(cut: Cut, staging: Staging, name: str) -> None:
    """Write the first rows of an adapter's loadings, and the error that this adds."""
    origin = cut.source / ADAPTERS / name
    meta = next(metas_of(cut.source, [name]))
    for file, digest in meta.ours.files.items():
        if digest_files([origin / file]) != digest:
            raise CheckpointError(f"{file} is damaged", adapter=name, remedy=REPAIR)
    paths = (origin / LOADINGS,)
    with staging.adapter(name) as folder, naming(folder), open_tensors(paths) as tensors:
        stored = {r.name: float32(tensors, r) for r in tensor_records(paths)}
        kept = {group: array[: cut.record.groups[group].k] for group, array in stored.items()}
        _write_rows(folder / LOADINGS, tensors, {r: len(kept[r.name]) for r in tensor_records(paths)}, cut.record.dtype)
        if (origin / VERBATIM).exists():
            shutil.copyfile(origin / VERBATIM, folder / VERBATIM)
        lost = _lost(cut, stored, kept, meta.original_config)
        facts = _sliced_facts(meta.ours, lost)
        facts |= {"files": {f: digest_files([folder / f]) for f in meta.ours.files}}
        ours = meta.ours.model_copy(update=facts | {"basis_digest": cut.record.basis_digest})
        values = sealed(meta.model_copy(update={"ours": ours}).plain())
        (folder / META).write_text(json.dumps(values), encoding="utf-8")


def _write_rows(path: Path, tensors: TensorReader, rows: Mapping[TensorRecord, int], dtype: str) -> None:
    """Write the first rows of loadings, byte for byte."""
    shapes = [(r.name, dtype, (k, r.shape[1])) for r, k in rows.items()]
    chunks = (tensors.raw(r)[: ITEMSIZE[dtype] * k * r.shape[1]].data for r, k in rows.items())
    with path.open("wb") as f:
        write_safetensors(f, shapes, chunks, {"format": "pt"})


def _lost(
    cut: Cut, stored: dict[str, NDArray[np.float32]], kept: dict[str, NDArray[np.float32]], config: dict[str, Any]
) -> dict[str, DeltaError]:
    """||dW_K - dW_k||^2 and ||dW_K||^2 of every module."""
    components = components_at(cut.source / COMPONENTS, cut.source_digest)
    ranks = {split_group_id(group)[0]: array.shape[1] for group, array in stored.items()}
    lost: dict[str, DeltaError] = {}
    dtype = cut.record.dtype
    for module, scaling in zip(ranks, scalings(config, ranks), strict=True):
        before, after = [], []
        for group in (group_id(module, side) for side in SIDES):
            v = components[group]
            before.append(as_stored(v @ stored[group], dtype))  # (d, r)
            after.append(as_stored(v[:, : len(kept[group])] @ kept[group], dtype))
        lost[module] = delta_error(before[0].T, before[1], after[0].T, after[1], scaling)
    return lost


def _sliced_facts(ours: AdapterRecord, lost: dict[str, DeltaError]) -> dict[str, Any]:
    worst = max(lost, key=lambda m: lost[m].relative, default=None)
    norm = ours.delta_norm**2
    error = ours.relative_error**2 + (sum(e.error for e in lost.values()) / norm if norm > 0 else 0.0)
    return {
        "relative_error": error**0.5,
        "worst_module": worst,
        "worst_module_error": lost[worst].relative if worst is not None else 0.0,
        "estimated": "sliced from a larger k: relative_error by the law of orthogonal errors, not measured against the "
        "original; worst_module and its error by what slicing lost there",
    }
