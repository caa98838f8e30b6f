"""Project: write one adapter of the checkpoint, and certify it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..adapterfiles import check_still, digest_files, file_fact, open_tensors, read_config, tensor_records
from ..budget import keeps_components
from ..checkpoint import Staging
from ..deltas import DeltaError, delta_errors, relative_error
from ..devices import held_on, product
from ..dtypes import as_stored, narrowed, stacked, widened
from ..entry import Entry
from ..errors import AdapterError
from ..files import naming, sealed
from ..journal import Receipt
from ..keys import SIDES, Side, factor_key, group_id
from ..shareformat import LOADINGS, META, OURS, VERBATIM
from ..tensorfile import TensorReader, TensorRecord, write_arrays, write_safetensors
from .job import Job

Stack = NDArray[np.float32]  # tensors of one shape, (m, *shape)


def project_adapter(job: Job, entry: Entry) -> str:
    """Write one adapter of the checkpoint: loadings, what is verbatim, and the error of what was stored.

    Returns:
        Its name.
    """
    name = entry.name
    receipt = job.receipt_of[name]
    check_unchanged(entry, receipt)
    shared = bool(entry.layout.modules) and job.shares(receipt)
    try:
        with (
            open_tensors(entry.paths) as tensors,
            Staging(job.staging).adapter(name) as folder,
            naming(folder),
        ):
            loadings, errors = _project_modules(job, entry, tensors) if shared else ({}, {})
            with (folder / LOADINGS).open("wb") as f:
                write_arrays(f, loadings, job.storage, {"format": "pt"})
            verbatim = list(entry.layout.extras)
            if not shared:
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
    job: Job, entry: Entry, tensors: TensorReader
) -> tuple[dict[str, NDArray[Any]], dict[str, DeltaError]]:
    components = components_at(job.components, job.basis_digest, job.settings.memory, job.device)
    loadings: dict[str, NDArray[Any]] = {}
    errors: dict[str, DeltaError] = {}
    for bundle in entry.bundles:
        factors = bundle.read(tensors)
        hats: dict[Side, Stack] = {}
        for side, stack in factors.items():
            groups = [group_id(module, side) for module in bundle.names]
            stored, hats[side] = _projected(components, groups, stack, side, job.storage)
            loadings |= stored
            _demand_finite(hats[side], groups, job.storage)
        found = delta_errors(factors["A"], factors["B"], hats["A"], hats["B"], entry.products_of(bundle.names))
        errors |= dict(zip(bundle.names, found, strict=True))
    return loadings, errors


def _projected(
    components: Components, groups: Sequence[str], stack: Stack, side: Side, storage: str
) -> tuple[dict[str, NDArray[Any]], Stack]:
    """Loadings (k, r) by group, as they are stored, and the tensors (m, *shape) that come back from them."""
    loadings: dict[str, NDArray[Any]] = {}
    hats = np.empty_like(stack)
    for some in components.alike(groups):
        places = slice(None) if len(some) == len(groups) else [groups.index(g) for g in some]
        v = components.stack(some)  # (m, d, k)
        vectors = stack[places].swapaxes(-1, -2) if side == "A" else stack[places]
        stored = as_stored(product(v.mT, vectors), storage)  # (m, k, r)
        loadings |= zip(some, narrowed(stored, storage), strict=True)
        restored = product(v, stored)
        hats[places] = restored.swapaxes(-1, -2) if side == "A" else restored
    return loadings, as_stored(hats, storage)  # as `reconstruct` gives them


def _demand_finite(hats: Stack, groups: Sequence[str], storage: str) -> None:
    """Demand that what is restored is finite, and with it what is stored."""
    if np.isfinite(hats.sum()):
        return
    for group, hat in zip(groups, hats, strict=True):
        if not np.isfinite(hat).all():
            raise AdapterError(f"values beyond the range of {storage}", key=group, remedy="Use dtype float32.")


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
    (folder / META).write_text(json.dumps(sealed(meta)), encoding="utf-8")


class Components:
    """The bases of all groups, memory-mapped, and stacked in float32 as they are asked for together.

    Stacks are kept, on the device where they are used, while they are no more than `memory` allows.
    """

    def __init__(self, path: Path, memory: int, device: str) -> None:
        self._device = device
        self._records = {r.name: r for r in tensor_records((path,))}
        self._bytes = np.memmap(path, np.uint8, "r").view(np.ndarray)  # whose slices are cheaper than a memmap's
        size = 4 * sum(math.prod(r.shape) for r in self._records.values())
        self._room = size if keeps_components(size, memory) else 0
        self._stacks: dict[tuple[str, ...], Any] = {}

    def __getitem__(self, group: str) -> NDArray[np.float32]:
        """V (d, k) of a group."""
        r = self._records[group]
        return widened(self._raw(r), r.dtype, r.shape)

    def _raw(self, record: TensorRecord) -> NDArray[np.uint8]:
        return self._bytes[record.offset : record.offset + record.nbytes]

    def alike(self, groups: Sequence[str]) -> list[list[str]]:
        """The groups, those with the same d and k together."""
        found: dict[tuple[int, ...], list[str]] = {}
        for group in groups:
            found.setdefault(self._records[group].shape, []).append(group)
        return list(found.values())

    def stack(self, groups: Sequence[str]) -> Any:
        """V (m, d, k) of groups with the same d and k, as `devices.product` takes it."""
        key = tuple(groups)
        kept = self._stacks.get(key)
        if kept is not None:
            return kept
        records = [self._records[group] for group in groups]
        made = stacked([self._raw(r) for r in records], records[0].dtype, records[0].shape)
        held = held_on(self._device, made)
        if made.nbytes <= self._room:  # of two threads that make it, one counts too much
            self._room -= made.nbytes
            self._stacks[key] = held
        return held


def components_at(path: Path, digest: str, memory: int = 0, device: str = "cpu") -> Components:
    """The components to project on, mapped once in a process; the digest tells one basis from the next.

    Args:
        path, digest: of the components.
        memory: the budget, of which a part may keep them in float32.
        device: where they are used.
    """
    file = path.stat()  # another file of the same basis may have taken the place of one that was damaged
    return _mapped(path, digest, memory, device, file.st_ino, file.st_mtime_ns)


@lru_cache(maxsize=1)
def _mapped(path: Path, digest: str, memory: int, device: str, inode: int, mtime_ns: int) -> Components:
    return Components(path, memory, device)
