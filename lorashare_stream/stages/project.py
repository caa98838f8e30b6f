"""Project: write and certify the adapters of a checkpoint."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.folder import check_still, digest_files, file_fact
from ..adapters.keys import SIDES, factor_key
from ..adapters.safetensors import TensorReader, write_arrays, write_safetensors
from ..checkpoint.format import LOADINGS, META, VERBATIM
from ..checkpoint.records import AdapterMeta, AdapterRecord, metas_of
from ..checkpoint.staging import Staging
from ..checkpoint.summary import Statistics, statistics_of
from ..errors import AdapterError
from ..files import naming, sealed
from ..linalg.delta import DeltaError, relative_error
from ..schema import FORMAT
from ..workspace.journal import Admission, Journal
from .components import components_at, project_factors
from .job import Admitted, Job
from .run import Run, check_none_lost


@dataclass(frozen=True)
class Stored:
    """What is stored of one adapter.

    Attributes:
        content: of its file.
        errors: of every module that is stored in it.
        exact: modules that are kept verbatim though they could be in it: all or none.
        layout: what a decoder must know of its modules, if the file does not tell.
    """

    content: bytes | memoryview
    errors: Mapping[str, DeltaError]
    exact: Sequence[str]
    layout: Sequence[Any] | None = None


def project_adapter(job: Job, task: Admitted) -> Statistics:
    """Write one adapter of a SHARE checkpoint: loadings, verbatim tensors, certified error.

    Returns:
        What the summary of the checkpoint needs of it.
    """
    return write_adapter(job, task, LOADINGS, _projected)


def _projected(job: Job, task: Admitted, tensors: TensorReader) -> Stored:
    """Loadings; an adapter whose dW is zero is kept verbatim, since dW tells nothing of its factors."""
    adapter = task.adapter
    shared = bool(adapter.layout.modules) and job.shares(task.admission)
    loadings: dict[str, NDArray[Any]] = {}
    errors: dict[str, DeltaError] = {}
    if shared:
        components = components_at(job.components, job.basis_key, job.settings.memory, job.device)
        loadings, errors = project_factors(components, job.storage, adapter, tensors)
    write_arrays(content := io.BytesIO(), loadings, job.storage, {"format": "pt"})
    return Stored(content.getbuffer(), errors, [] if shared else list(adapter.layout.by_name))


def write_adapter(
    job: Job, task: Admitted, file: str, store: Callable[[Job, Admitted, TensorReader], Stored]
) -> Statistics:
    """Write one adapter into its folder of the staged checkpoint: content, verbatim tensors, adapter_meta.json.

    Returns:
        What the summary of the checkpoint needs of it.
    """
    adapter, admission = task.adapter, task.admission
    check_unchanged(adapter, admission)
    with adapter.open() as tensors, Staging(job.staging).adapter(adapter.name) as folder, naming(folder):
        stored = store(job, task, tensors)
        (folder / file).write_bytes(stored.content)
        digests = {file: hashlib.sha256(stored.content).hexdigest()}
        verbatim = _write_verbatim(adapter, tensors, folder, stored.exact)
        if verbatim:
            digests[VERBATIM] = digest_files([folder / VERBATIM])
        check_still(adapter.files)
        meta = _meta(job, task, stored, verbatim, digests)
        (folder / META).write_text(json.dumps(sealed(meta.plain())), encoding="utf-8")
    return statistics_of(meta)


def check_unchanged(adapter: Adapter, admission: Admission) -> None:
    """Check that an adapter is the one that was ingested: by size and time of its files, else by SHA-256.

    Raises:
        AdapterError: if it has changed.
    """
    if adapter.config_digest != admission.config_digest:
        raise AdapterError(
            "its adapter_config.json has changed since the adapter was admitted",
            adapter=adapter.name,
            remedy="Restore it; or take it out by lorashare-stream remove, and add it again.",
        )
    if not adapter.fetched:  # it is pinned: what is fetched is compared then
        return
    now = [file_fact(path) for path in adapter.paths]
    same = tuple(f.size for f in now) == admission.sizes
    if same and tuple(f.mtime_ns for f in now) == admission.mtimes_ns:
        return
    if not same or digest_files(adapter.paths) != admission.digest:
        raise AdapterError(
            "the adapter has changed since it was admitted",
            adapter=adapter.name,
            found=", ".join(f"{f.size} bytes" for f in now),
            expected=f"the files with SHA-256 {admission.digest}",
            remedy="Restore it; or take it out by lorashare-stream remove, and add it again.",
        )


def _write_verbatim(adapter: Adapter, tensors: TensorReader, folder: Path, exact: Sequence[str]) -> list[str]:
    """Write the verbatim tensors, and return their keys."""
    kept = [(factor_key(m, side), adapter.layout.by_name[m].record(side)) for m in exact for side in SIDES]
    verbatim = [*adapter.layout.extras, *kept]
    shapes = [(key, record.dtype, record.shape) for key, record in verbatim]
    chunks = (chunk for _, record in verbatim for chunk in tensors.chunks(record))
    if shapes:
        with (folder / VERBATIM).open("wb") as f:
            write_safetensors(f, shapes, chunks, {"format": "pt"})
    return [key for key, _ in verbatim]


def _meta(job: Job, task: Admitted, stored: Stored, verbatim: list[str], digests: dict[str, str]) -> AdapterMeta:
    adapter, admission, errors = task.adapter, task.admission, stored.errors
    norm = sum(e.norm for e in errors.values())
    worst = max(errors, key=lambda m: errors[m].relative, default=None)
    ours: dict[str, Any] = {
        "format": FORMAT,
        "basis_digest": job.basis_key,
        "source_id": admission.source_id,
        "sha256": admission.digest,
        "source_bytes": sum(admission.sizes),
        "lora_bytes": adapter.layout.lora_bytes,
        "relative_error": relative_error(sum(e.error for e in errors.values()), norm),
        "worst_module": worst,
        "worst_module_error": errors[worst].relative if worst is not None else 0.0,
        "delta_norm": float(np.sqrt(norm)),
        "verbatim": verbatim,
        "notes": list(admission.notes),
        "files": digests,
    }
    origin = adapter.origin
    if origin is not None:
        hub, told = origin.hub, origin.listing
        ours["hub"] = {
            "repo": hub.repo, "revision": hub.revision, "subfolder": hub.subfolder,
            "gated": told.gated, "private": told.private, "license": told.license,
        }  # fmt: skip
    if stored.layout is not None:
        ours["layout"] = stored.layout
    return AdapterMeta(
        adapter_name=adapter.name,
        original_config=json.loads(str(adapter.config)),
        original_adapter_path=str(adapter.folder.absolute()) if origin is None else adapter.source_id,
        lorashare_stream=AdapterRecord(**ours),
    )


def project(run: Run, job: Job, staging: Staging, admissions: Sequence[Admission]) -> dict[str, Statistics]:
    """Project adapters into the staged checkpoint: `write_adapters`."""
    return write_adapters(run, job, staging, admissions, "project", project_adapter)


def write_adapters(
    run: Run,
    job: Job,
    staging: Staging,
    admissions: Sequence[Admission],
    step: str,
    task: Callable[[Job, Admitted], Statistics],
) -> dict[str, Statistics]:
    """Map a task that writes adapters into the staged checkpoint, those that are missing, and sync them.

    Returns:
        Their figures, by name.

    Raises:
        CollectionError: at the end, naming those that the Hub has no more.
    """
    there = [r.name for r in admissions if staging.done(r, job.basis_key)]
    staging.sync(there)  # a run that was killed may not have come to it
    statistics = {f.name: f for f in map(statistics_of, metas_of(staging.root, there))}
    adapters = [job.adapter(r.name) for r in admissions if r.name not in statistics]
    run.fetcher.cancel_except(adapters)
    lost: list[AdapterError] = []
    arriving = run.arriving(adapters, lost)
    with staging.syncing() as written:
        bare = replace(job, adapters={}, journal=Journal())  # each task has its own
        admitted = (Admitted(adapter, job.admission_of[adapter.name]) for adapter in arriving)
        tasks = list(admitted) if isinstance(arriving, Sequence) else admitted
        for each in run.map(step, partial(task, bare), tasks, len(adapters), lambda task: run.release(task.adapter)):
            statistics[each.name] = each
            written(each.name)
    check_none_lost(lost)
    return statistics
