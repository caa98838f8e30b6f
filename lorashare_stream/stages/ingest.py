"""Ingest: read one adapter, once, in file order, before it may touch a moment."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Entry
from ..adapters.dtypes import FLOATS, widened
from ..adapters.folder import digest_files, open_tensors
from ..adapters.keys import SIDES, Side
from ..adapters.safetensors import SafetensorsReader, TensorReader, TensorRecord
from ..errors import AdapterError, DamagedFetchError, ValuesError
from ..linalg.delta import Float64, energies
from ..linalg.delta import grams as grams_of
from ..workspace.journal import Receipt

LARGEST = 1e12  # of a value: the sum of a million squares, times d, still fits a float32 moment


def ingest_adapter(objective: str, entry: Entry) -> tuple[str, Receipt | AdapterError]:
    """Read an adapter once, in file order: all values finite? digest; under `delta` ||dW||^2 of its shared modules.

    Returns:
        Its name, and the receipt; or why the adapter must not touch a moment.
    """
    try:
        with open_tensors(entry.paths) as tensors:
            energy, notes, digest = _scan(entry, tensors, weigh=objective == "delta")
        _check_digest(entry, digest)
    except AdapterError as e:
        e.adapter, e.source = entry.name, entry.where
        return entry.name, e
    sizes, times = tuple(f.size for f in entry.files), tuple(f.mtime_ns for f in entry.files)
    exact = not entry.layout.modules
    shapes = entry.shapes_digest
    of_config, source = entry.config_digest, entry.source_id
    return entry.name, Receipt(entry.name, source, digest, of_config, energy, sizes, times, shapes, notes, exact)


def _check_digest(entry: Entry, digest: str) -> None:
    """Demand that what was fetched is what the Hub lists."""
    listed = None if entry.origin is None else entry.origin.sha256
    if listed not in (None, digest):
        raise DamagedFetchError(
            "what was fetched is not what the Hub lists", found=f"SHA-256 {digest}", expected=f"SHA-256 {listed}",
            remedy="Remove it from the cache of the Hub's files, if it is there, and run the same command again.",
        )  # fmt: skip


def _scan(entry: Entry, tensors: TensorReader, *, weigh: bool) -> tuple[float, tuple[str, ...], str]:
    digest = hashlib.sha256()
    grams: dict[tuple[Side, str], Float64] = {}
    notes = list(entry.layout.notes)
    file = -1
    for chunk in entry.chunks:
        first = chunk.records[0]
        if first.file != file and isinstance(tensors, SafetensorsReader):
            file = first.file
            digest.update(tensors.head(first))
        if not chunk.stacks:
            if not _extra_is_finite(first, tensors, digest.update):
                notes.append(f"{first.name}: tensors kept verbatim hold values that are not finite")
            continue
        block = tensors.block(chunk.records)
        digest.update(block.data)
        for side, modules, values in chunk.stacks_of(block):
            _demand_finite(values, side, modules, entry)
            if not weigh:
                continue
            rows = values if side == "A" else np.swapaxes(values, -1, -2)
            found = grams_of(entry.product(modules[0]), rows, side)  # (m, E, r, r)
            grams |= {(side, module): own for module, own in zip(modules, found, strict=True)}
    whole_digest = digest.hexdigest() if file >= 0 else digest_files(entry.paths)
    return _energy(entry, grams) if weigh else 0.0, tuple(notes), whole_digest


def _energy(entry: Entry, grams: Mapping[tuple[Side, str], Float64]) -> float:
    """||dW||^2 of all shared modules, from the Gram matrices (E, r, r) of their sides."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for module in entry.layout.by_name:
        alike.setdefault(grams["A", module].shape, []).append(module)
    total = 0.0
    for modules in alike.values():
        a, b = (np.stack([grams[side, m] for m in modules]) for side in SIDES)
        scales = np.array([p.scale for p in entry.products_of(modules)])
        total += float(energies(a, b, scales).sum())
    return total


def _demand_finite(values: NDArray[np.float32], side: Side, modules: Sequence[str], entry: Entry) -> None:
    """Demand tensors (m, *shape) of finite values that a moment can hold.

    Raises:
        ValuesError: naming the first tensor that has others.
    """
    if values.min(initial=0.0) >= -LARGEST and values.max(initial=0.0) <= LARGEST:  # false if one is not a number
        return
    for module, tensor in zip(modules, values, strict=True):
        key = entry.layout.by_name[module].record(side).name
        bad = np.argwhere(~np.isfinite(tensor))
        if len(bad):
            raise ValuesError(
                "values that are not finite in float32",
                key=key,
                found=f"{tensor[tuple(bad[0])]} at {bad[0].tolist()}, {len(bad)} in all",
                expected="finite values",
                remedy="Its training diverged, or the file is damaged: leave it out.",
            )
        if np.abs(tensor).max(initial=0.0) > LARGEST:
            raise ValuesError(
                "values larger than a moment can hold",
                key=key,
                found=f"{np.abs(tensor).max():.3g}",
                expected=f"at most {LARGEST:g}",
                remedy="Its training diverged: leave it out.",
            )


def _extra_is_finite(record: TensorRecord, tensors: TensorReader, digest: Callable[[bytes], None]) -> bool:
    finite = True
    for chunk in tensors.chunks(record):
        digest(chunk)
        if record.dtype in FLOATS:
            raw = np.frombuffer(chunk, np.uint8)
            values = raw.view("<f8") if record.dtype == "F64" else widened(raw, record.dtype, (-1,))
            finite = finite and bool(np.isfinite(values).all())
    return finite
