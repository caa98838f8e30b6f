"""Ingest: read one adapter, once, in file order, before it may touch a moment."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.dtypes import FLOATS, Float64, widened
from ..adapters.folder import digest_files
from ..adapters.keys import SIDES, Side
from ..adapters.safetensors import TensorReader, TensorRecord
from ..errors import AdapterError, DamagedFetchError, ValuesError
from ..files import remove_tree
from ..linalg.delta import energies, gram
from ..plan.plan import Plan
from ..workspace.journal import Admission

CONVERTED = "converted"  # the folder, in a workspace, of pickles that were converted
LARGEST = 1e12  # of a value: the sum of a million squares, times d, still fits a float32 moment


@contextmanager
def pickles_kept(plan: Plan, workspace: Path) -> Iterator[Plan]:
    """The plan with a place for what its pickles are converted to: once in a run, by who reads one first.

    A run that fails leaves them to the next. Where disk is short, nothing is kept, and each reading converts anew.
    """
    folder = workspace / CONVERTED
    if plan.sizes["converted"]:
        adapters = tuple(replace(e, converted=folder) if e.pickled else e for e in plan.adapters)
        plan = replace(plan, adapters=adapters)
    yield plan
    remove_tree(folder)


def ingest_adapter(objective: str, adapter: Adapter) -> tuple[str, Admission | AdapterError]:
    """Read an adapter once, in file order: all values finite? digest; under `delta` ||dW||^2 of its shared modules.

    Returns:
        Its name, and the admission; or why the adapter must not touch a moment.
    """
    try:
        with adapter.open() as tensors:
            energy, notes, digest = _scan(adapter, tensors, weigh=objective == "delta")
        _check_digest(adapter, digest)
    except AdapterError as e:
        e.adapter, e.source = adapter.name, adapter.where
        return adapter.name, e
    sizes, times = tuple(f.size for f in adapter.files), tuple(f.mtime_ns for f in adapter.files)
    exact = not adapter.layout.modules
    shapes = adapter.shapes_key
    of_config, source = adapter.config_digest, adapter.source_id
    return adapter.name, Admission(adapter.name, source, digest, of_config, energy, sizes, times, shapes, notes, exact)


def _check_digest(adapter: Adapter, digest: str) -> None:
    """Demand that what was fetched is what the Hub lists."""
    listed = None if adapter.origin is None else adapter.origin.sha256
    if listed not in (None, digest):
        raise DamagedFetchError(
            "what was fetched is not what the Hub lists", found=f"SHA-256 {digest}", expected=f"SHA-256 {listed}",
            remedy="Remove it from the cache of the Hub's files, if it is there, and run the same command again.",
        )  # fmt: skip


def _scan(adapter: Adapter, tensors: TensorReader, *, weigh: bool) -> tuple[float, tuple[str, ...], str]:
    digest = hashlib.sha256()
    grams: dict[tuple[Side, str], Float64] = {}
    notes = list(adapter.layout.notes)
    file = -1
    for chunk in adapter.chunks:
        first = chunk.records[0]
        if first.file != file:
            file = first.file
            digest.update(tensors.through(first)[: first.offset].data)
        if not chunk.stacks:
            if not _extra_is_finite(first, tensors, digest.update):
                notes.append(f"{first.name}: tensors kept verbatim hold values that are not finite")
            continue
        last = chunk.records[-1]
        digest.update(tensors.through(last)[first.offset : last.offset + last.nbytes].data)
        for stack in chunk.stacks:
            side, modules, values = stack.side, stack.modules, stack.read(tensors)
            _demand_finite(values, side, modules, adapter)
            if not weigh:
                continue
            rows = values if side == "A" else np.swapaxes(values, -1, -2)
            found = gram(adapter.scaling(modules[0]).blocks(rows, side))  # (m, E, r, r)
            grams |= {(side, module): own for module, own in zip(modules, found, strict=True)}
    whole_digest = digest_files(adapter.paths) if adapter.pickled else digest.hexdigest()
    energy = _energy(adapter, grams) if weigh else 0.0
    if weigh and not energy and adapter.layout.modules:
        notes.append("kept exact, since dW is 0 and tells nothing of lora_A and lora_B")
    return energy, tuple(notes), whole_digest


def _energy(adapter: Adapter, grams: Mapping[tuple[Side, str], Float64]) -> float:
    """||dW||^2 of all shared modules, from the Gram matrices (E, r, r) of their sides."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for module in adapter.layout.by_name:
        alike.setdefault(grams["A", module].shape, []).append(module)
    total = 0.0
    for modules in alike.values():
        a, b = (np.stack([grams[side, m] for m in modules]) for side in SIDES)
        scales = np.array([p.scale for p in adapter.scalings_of(modules)])
        total += float(energies(a, b, scales).sum())
    return total


def _demand_finite(values: NDArray[np.float32], side: Side, modules: Sequence[str], adapter: Adapter) -> None:
    """Demand tensors (m, *shape) of finite values that a moment can hold.

    Raises:
        ValuesError: naming the first tensor that has others.
    """
    if values.min(initial=0.0) >= -LARGEST and values.max(initial=0.0) <= LARGEST:  # false if one is not a number
        return
    for module, tensor in zip(modules, values, strict=True):
        key = adapter.layout.by_name[module].record(side).name
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


def _extra_is_finite(record: TensorRecord, tensors: TensorReader, digest: Callable[[memoryview], None]) -> bool:
    finite = True
    for chunk in tensors.chunks(record):
        digest(chunk)
        if record.dtype in FLOATS:
            raw = np.frombuffer(chunk, np.uint8)
            values = raw.view("<f8") if record.dtype == "F64" else widened(raw, record.dtype, (-1,))
            finite = finite and bool(np.isfinite(values).all())
    return finite
