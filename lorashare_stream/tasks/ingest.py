"""Ingest: read one adapter, once, in file order, before it may touch a moment."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..adapterfiles import digest_files, open_tensors
from ..dtypes import FLOATS, widened
from ..entry import Entry
from ..errors import AdapterError, DamagedFetchError, ValuesError
from ..journal import Receipt
from ..names import digest_of
from ..tensorfile import SafetensorsReader, TensorReader, TensorRecord

LARGEST = 1e12  # of a value: the sum of a million squares, times d, still fits a float32 moment


def ingest_adapter(entry: Entry) -> tuple[str, Receipt | AdapterError]:
    """Read an adapter once, in file order: all values finite? digest; ||dW||^2 of its shared modules.

    Returns:
        Its name, and the receipt; or why the adapter must not touch a moment.
    """
    try:
        with open_tensors(entry.paths) as tensors:
            energy, notes, digest = _scan(entry, tensors)
        _check_digest(entry, digest)
    except AdapterError as e:
        e.adapter, e.source = entry.name, entry.where
        return entry.name, e
    sizes, times = tuple(f.size for f in entry.files), tuple(f.mtime_ns for f in entry.files)
    exact = not entry.layout.modules
    shapes = digest_of(entry.shapes)
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


def _scan(entry: Entry, tensors: TensorReader) -> tuple[float, tuple[str, ...], str]:
    digest = hashlib.sha256()
    grams: dict[str, NDArray[np.float64]] = {}
    energy = 0.0
    notes = list(entry.layout.notes)
    file = -1
    for record, module, side in entry.layout.in_file_order:
        if record.file != file and isinstance(tensors, SafetensorsReader):
            file = record.file
            digest.update(tensors.head(record))
        if module is None:
            if not _extra_is_finite(record, tensors, digest.update):
                notes.append(f"{record.name}: tensors kept verbatim hold values that are not finite")
            continue
        raw = tensors.raw(record)
        digest.update(raw.data)
        values = _finite(widened(raw, record.dtype, record.shape), record)
        product = entry.product(module)
        own = product.grams(values if side == "A" else values.T, "A" if side == "A" else "B")
        if module in grams:
            energy += product.energy(grams.pop(module), own)
        else:
            grams[module] = own
    whole = digest.hexdigest() if file >= 0 else digest_files(entry.paths)
    return energy, tuple(notes), whole


def _finite(values: NDArray[np.float32], record: TensorRecord) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))
        raise ValuesError(
            "values that are not finite in float32",
            key=record.name,
            found=f"{values[tuple(bad[0])]} at {bad[0].tolist()}, {len(bad)} in all",
            expected="finite values",
            remedy="Its training diverged, or the file is damaged: leave it out.",
        )
    if values.max(initial=0.0) > LARGEST or values.min(initial=0.0) < -LARGEST:
        raise ValuesError(
            "values larger than a moment can hold",
            key=record.name,
            found=f"{np.abs(values).max():.3g}",
            expected=f"at most {LARGEST:g}",
            remedy="Its training diverged: leave it out.",
        )
    return values


def _extra_is_finite(record: TensorRecord, tensors: TensorReader, digest: Callable[[bytes], None]) -> bool:
    finite = True
    for chunk in tensors.chunks(record):
        digest(chunk)
        if record.dtype in FLOATS:
            raw = np.frombuffer(chunk, np.uint8)
            values = raw.view("<f8") if record.dtype == "F64" else widened(raw, record.dtype, (-1,))
            finite = finite and bool(np.isfinite(values).all())
    return finite
