"""Project: write one adapter of the checkpoint, and certify it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..adapterfiles import check_still, digest_files, file_fact, open_tensors, read_config, tensor_records
from ..checkpoint import Staging
from ..deltas import DeltaError, delta_error, relative_error
from ..dtypes import as_stored, narrowed, widened
from ..entry import Entry
from ..errors import AdapterError
from ..files import naming, sealed
from ..journal import Receipt
from ..keys import SIDES, factor_key, group_id
from ..layout import Module
from ..shareformat import LOADINGS, META, OURS, VERBATIM
from ..subspace import project, restore
from ..tensorfile import TensorReader, TensorRecord, float32, write_arrays, write_safetensors
from .job import Job


def project_adapter(job: Job, entry: Entry) -> str:
    """Write one adapter of the checkpoint: loadings, what is verbatim, and the error of what was stored.

    Returns:
        Its name.
    """
    name = entry.name
    receipt = job.receipt_of[name]
    check_unchanged(entry, receipt)
    modules = entry.layout.modules if job.shares(receipt) else ()
    try:
        with (
            open_tensors(entry.paths) as tensors,
            Staging(job.staging).adapter(name) as folder,
            naming(folder),
        ):
            loadings, errors = _project_modules(job, entry, modules, tensors)
            with (folder / LOADINGS).open("wb") as f:
                write_arrays(f, loadings, job.storage, {"format": "pt"})
            verbatim = list(entry.layout.extras)
            if not modules:
                verbatim += [(factor_key(m.name, side), m.record(side)) for m in entry.layout.modules for side in SIDES]
            if verbatim:
                with (folder / VERBATIM).open("wb") as f:
                    _copy_tensors(f, verbatim, tensors)
            check_still(entry.files)
            _write_meta(job, entry, receipt, folder, errors, [key for key, _ in verbatim])
    except AdapterError as e:
        e.adapter = name
        raise
    return name


def check_unchanged(entry: Entry, receipt: Receipt) -> None:
    """Demand that an adapter is what was ingested: by size and time of its files, else by their digest.

    Raises:
        AdapterError: if it has changed.
    """
    if entry.config_digest != receipt.config_digest:
        raise AdapterError(
            "its adapter_config.json has changed since the adapter was added to the moments",
            adapter=entry.name,
            remedy="Restore it; or take it out by lorashare-stream remove, and add it again.",
        )
    if not entry.fetched:  # it is pinned: what is fetched is compared then
        return
    now = [file_fact(path) for path in entry.paths]
    same = tuple(f.size for f in now) == receipt.sizes
    if same and tuple(f.mtime_ns for f in now) == receipt.mtimes_ns:
        return
    if not same or digest_files(entry.paths) != receipt.digest:
        raise AdapterError(
            "the adapter has changed since it was added to the moments",
            adapter=entry.name,
            found=", ".join(f"{f.size} bytes" for f in now),
            expected=f"the files with SHA-256 {receipt.digest}",
            remedy="Restore it; or take it out by lorashare-stream remove, and add it again.",
        )


def _project_modules(
    job: Job, entry: Entry, modules: tuple[Module, ...], tensors: TensorReader
) -> tuple[dict[str, NDArray[Any]], dict[str, DeltaError]]:
    components = components_of(job.components, job.basis_digest)
    loadings: dict[str, NDArray[Any]] = {}
    errors: dict[str, DeltaError] = {}
    for module in modules:
        a, b = float32(tensors, module.a), float32(tensors, module.b)
        hats: list[NDArray[np.float32]] = []
        for side, vectors in zip(SIDES, (a.T, b), strict=True):
            group = group_id(module.name, side)
            v = components[group]
            stored = as_stored(project(v, vectors), job.storage)  # (k, r)
            if not np.isfinite(stored).all():
                raise _overflow(job.storage, group)
            loadings[group] = narrowed(stored, job.storage)
            hats.append(as_stored(restore(v, stored), job.storage))  # (d, r), as `reconstruct` gives it
            if not np.isfinite(hats[-1]).all():
                raise _overflow(job.storage, group)
        errors[module.name] = delta_error(a, b, hats[0].T, hats[1], entry.product(module.name))
    return loadings, errors


def _overflow(storage: str, group: str) -> AdapterError:
    return AdapterError(f"values beyond the range of {storage}", key=group, remedy="Use dtype float32.")


def _copy_tensors(out: IO[bytes], verbatim: list[tuple[str, TensorRecord]], tensors: TensorReader) -> None:
    shapes = [(key, record.dtype, record.shape) for key, record in verbatim]
    write_safetensors(
        out, shapes, (chunk for _, record in verbatim for chunk in tensors.chunks(record)), {"format": "pt"}
    )


def _write_meta(
    job: Job, entry: Entry, receipt: Receipt, folder: Path, errors: Mapping[str, DeltaError], verbatim: list[str]
) -> None:
    norm = sum(e.norm for e in errors.values())
    worst = max(errors, key=lambda m: errors[m].relative, default=None)
    files = [p for p in (LOADINGS, VERBATIM) if (folder / p).exists()]
    ours = {
        "basis_digest": job.basis_digest,
        "source_id": receipt.source_id,
        "sha256": receipt.digest,
        "source_bytes": sum(receipt.sizes),
        "lora_bytes": entry.layout.lora_bytes,
        "relative_error": relative_error(sum(e.error for e in errors.values()), norm),
        "worst_module": worst,
        "worst_module_error": errors[worst].relative if worst is not None else 0.0,
        "delta_norm": float(np.sqrt(norm)),
        "verbatim": verbatim,
        "notes": list(receipt.notes),
        "files": {name: digest_files([folder / name]) for name in files},
    }
    origin = entry.origin
    if origin is not None:
        hub, told = origin.hub, origin.listing
        ours["hub"] = {
            "repo": hub.repo, "revision": hub.revision, "subfolder": hub.subfolder,
            "gated": told.gated, "private": told.private, "license": told.license,
        }  # fmt: skip
    meta = {
        "adapter_name": entry.name,
        "original_config": read_config(entry.folder) if origin is None else json.loads(str(origin.config)),
        "original_adapter_path": str(entry.folder.absolute()) if origin is None else entry.source_id,
        OURS: ours,
    }
    (folder / META).write_text(json.dumps(sealed(meta), indent=2), encoding="utf-8")


class Components(Mapping[str, NDArray[np.float32]]):
    """The bases of all groups (d, k), memory-mapped; float32 without a copy."""

    def __init__(self, path: Path) -> None:
        records = tensor_records((path,))
        self._records = {r.name: r for r in records}
        self._bytes = np.memmap(path, np.uint8, "r")

    def __getitem__(self, group: str) -> NDArray[np.float32]:
        r = self._records[group]
        return widened(self._bytes[r.offset : r.offset + r.nbytes], r.dtype, r.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def components_of(path: Path, digest: str) -> Components:
    """The components at `path`, mapped once in a process; `digest` tells one basis from the next."""
    file = path.stat()  # another file of the same basis may have taken the place of one that was damaged
    return _mapped(path, digest, file.st_ino, file.st_mtime_ns)


@lru_cache(maxsize=1)
def _mapped(path: Path, digest: str, inode: int, mtime_ns: int) -> Components:
    return Components(path)
