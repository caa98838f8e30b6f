"""Ingest: read each adapter once, in file order, before it may touch a moment, and admit it to the journal."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.dtypes import FLOATS, Float64, widened
from ..adapters.folder import digest_files
from ..adapters.keys import SIDES, Side
from ..adapters.safetensors import TensorReader, TensorRecord
from ..errors import AdapterError, DamagedFetchError, LockedError, ValuesError, WorkspaceError, refusal
from ..files import remove_tree
from ..hub.ledger import note_refusal
from ..hub.lookup import loose_id
from ..linalg.delta import energies, gram
from ..plan.plan import Plan, check_enough
from ..text import listed
from ..workspace.journal import Admission, Journal, Removal
from ..workspace.workspace import FACTS, Workspace
from .job import make_job
from .project import check_unchanged
from .run import Run
from .update import is_complete, sum_batch

CONVERTED = "converted"  # the folder, in a workspace, of pickles that were converted
SYNC_EVERY = 64  # admissions that are made durable at once
log = logging.getLogger(__name__)
LARGEST = 1e12  # of a value: the sum of a million squares, times d, still fits a float32 moment


@contextmanager
def pickles_kept(plan: Plan, workspace: Path) -> Iterator[Plan]:
    """Cache, in the workspace, of pickles converted to safetensors; converted once a run, by the first reader.

    A run that fails leaves them to the next. Where disk is short, nothing is kept, and each reading converts anew.
    """
    folder = workspace / CONVERTED
    if plan.sizes["converted"]:
        adapters = tuple(replace(e, converted=folder) if e.pickled else e for e in plan.adapters)
        plan = replace(plan, adapters=adapters)
    yield plan
    remove_tree(folder)


def ingest_adapter(objective: str, adapter: Adapter) -> tuple[str, Admission | AdapterError]:
    """Read an adapter once, in file order: finite values, SHA-256, and under `delta` ||dW||^2 of its shared modules.

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
    """Check the digest of fetched files against the Hub's listing."""
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
        for stack in chunk.stacks:
            side, modules, values = stack.side, stack.modules, stack.read(tensors)
            _demand_finite(values, side, modules, adapter)
            if not weigh:
                continue
            rows = values if side == "A" else np.swapaxes(values, -1, -2)
            found = gram(adapter.scaling(modules[0]).blocks(rows, side))  # (m, E, r, r)
            grams |= {(side, module): own for module, own in zip(modules, found, strict=True)}
        last = chunk.records[-1]  # hashed last, when it is in the cache: SHA-256 waits for memory longer than NumPy
        digest.update(tensors.through(last)[first.offset : last.offset + last.nbytes].data)
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
    """Check that tensors (m, *shape) are finite and within the range of a moment.

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


def ingest(run: Run, work: Workspace, out: Path) -> list[AdapterError]:
    """Admit the adapters of a plan that are not yet in the journal, in the order of the plan.

    If a disk budget does not hold them all, the adapters of a batch are added to the moments before the next comes.

    Returns:
        Those whose values show that they must not touch a moment.
    """
    plan, before = run.plan, _check_journal(run.plan, work)
    fresh = [[e for e in batch if e.name not in before] for batch in plan.batches]
    again = {e.name for e in work.journal().entries if isinstance(e, Removal)} & {e.name for b in fresh for e in b}
    if again:
        log.warning("taken out before, and added again since their sources are named: %s", listed(sorted(again)))
    refused: list[AdapterError] = []
    several, done, sums = len(plan.batches) > 1, 0, plan.settings.fits
    complete = several and sums and is_complete(make_job(plan, work, out, begins=True), work)
    for number, (batch, after) in enumerate(zip(fresh, [*fresh[1:], []], strict=True)):
        if complete and not batch:
            done += len(plan.batches[number])
            continue
        if batch and several:
            log.info("batch %d of %d: %d of %d adapters", number + 1, len(plan.batches), done, len(plan.adapters))
        refused += admit(run, work, batch)
        done += len(plan.batches[number])
        if several and sums:
            names = {e.name for e in plan.batches[number]}
            sum_batch(run, make_job(plan, work, out, begins=True), work, names, _unrefused(after))
        run.fetcher.release(batch)
    if refused and plan.settings.on_error == "raise":
        raise refusal(
            f"{len(refused)} of {len(plan.adapters)} adapters cannot be compressed; the others are ingested",
            refused,
            "Leave them out, or go on without them by --on-error skip.",
        )
    check_enough(len(plan.adapters) + len(plan.absent) - len(refused), refused, plan.fewest)
    return refused


def _check_journal(plan: Plan, work: Workspace) -> set[str]:
    """Names of admitted adapters; checks that the plan has each, unchanged."""
    adapters = {e.name: e for e in plan.adapters}
    journal = journal_of_plan(plan, work)
    absent = {e.adapter for e in plan.absent}
    gone = [r for r in journal.admissions if r.name not in adapters and r.name not in absent]
    if gone:
        raise _gone(gone, plan.refused, _newer(gone, plan))
    for admission in (r for r in journal.admissions if r.name in adapters):
        check_unchanged(adapters[admission.name], admission)
    return {r.name for r in journal.admissions}


def admit(run: Run, work: Workspace, adapters: Sequence[Adapter]) -> list[AdapterError]:
    """Ingest adapters as they arrive, and admit them in order; returns the refused ones."""
    refused: list[AdapterError] = []
    shapes = {e.shapes_key: e.shapes for e in adapters}
    remote = {e.name: e.source_id for e in adapters if e.origin is not None and e.origin.refused is None}
    for count, result in enumerate(ingested(run, adapters), 1):
        if isinstance(result, Admission):
            work.admit(result, shapes[result.shapes], durable=count % SYNC_EVERY == 0 or count == len(adapters))
            continue
        refused.append(result)
        if isinstance(result, DamagedFetchError):
            run.fetcher.evict(next(e for e in adapters if e.name == result.adapter))
        if isinstance(result, ValuesError) and result.adapter in remote:  # it is not fetched for that again
            note_refusal(work.root / FACTS, remote[result.adapter], result)
    work.sync_journal()
    return refused


def ingested(run: Run, adapters: Sequence[Adapter]) -> Iterator[Admission | AdapterError]:
    """Ingest results in the order of the adapters, which may arrive in another one."""
    done: dict[str, Admission | AdapterError] = {}
    waiting = deque(e.name for e in adapters)
    lost = [e for adapter in adapters if (e := _refused_before(adapter)) is not None]
    fresh, task = _unrefused(adapters), partial(ingest_adapter, run.plan.settings.objective)
    for name, result in run.map("ingest", task, run.arriving(fresh, lost), len(fresh)):
        done |= {name: result} | {str(e.adapter): e for e in lost}
        while waiting and waiting[0] in done:
            yield done.pop(waiting.popleft())
    done |= {str(e.adapter): e for e in lost}
    yield from (done[name] for name in waiting)


def _unrefused(adapters: Sequence[Adapter]) -> list[Adapter]:
    return [e for e in adapters if e.origin is None or e.origin.refused is None]


def _refused_before(adapter: Adapter) -> AdapterError | None:
    """Cached refusal of a pinned adapter, which need not be fetched again for it."""
    if adapter.origin is None or adapter.origin.refused is None:
        return None
    error = copy(adapter.origin.refused)
    error.adapter, error.source = adapter.name, adapter.where
    return error


def journal_of_plan(plan: Plan, work: Workspace) -> Journal:
    """Journal of a workspace, repaired, and checked to be the one that the plan was made from.

    Raises:
        LockedError: if another run has changed it since.
    """
    journal = work.recover_journal()
    if plan.journal not in (None, journal.digest(len(journal.entries))):
        raise LockedError(
            "another run has changed the workspace meanwhile", found=work.root, remedy="Run the same command again."
        )
    return journal


def _newer(gone: Sequence[Admission], plan: Plan) -> dict[str, str]:
    """Admitted adapters whose repository is now named at another commit: name -> new id."""
    now = {loose_id(e.source_id): e.source_id for e in plan.adapters if e.origin is not None}
    return {r.name: now[loose_id(r.source_id)] for r in gone if loose_id(r.source_id) in now}


def _gone(gone: Sequence[Admission], refused: Sequence[AdapterError], newer: Mapping[str, str]) -> WorkspaceError:
    now = [error for error in refused if error.adapter in {r.name for r in gone}]
    local = [r.source_id for r in gone if os.path.isabs(r.source_id)]
    away = [path for path in local if not os.path.exists(path) or os.path.realpath(path) != path]
    if newer:
        raise WorkspaceError(
            "adapters of the Hub are named at another commit than the one that is in the workspace",
            found=listed([f"{old} is now {new}" for old, new in newer.items()], 3),
            remedy="Take the old ones out by lorashare-stream remove, then the same command adds the new ones; or name "
            "the commits that are there.",
        )
    if away and not now:
        raise WorkspaceError(
            "adapters of the workspace are no longer where they were",
            found=listed(away, 3),
            remedy="Put them back there, since a workspace knows an adapter by its folder; or take them out by "
            "lorashare-stream remove; or compress into another output and another --workspace.",
        )
    return WorkspaceError(
        "the workspace holds adapters that the sources no longer give",
        found=listed([r.name for r in gone]),
        remedy=f"One of them is refused now: {now[0]}"
        if now
        else "Name them again; or add what is new alone, by lorashare-stream add; or take them out by lorashare-stream "
        "remove, or compress into another output and another --workspace.",
    )
