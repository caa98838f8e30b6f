"""Verify: reconstruct every adapter, compare it with its original, and with what the checkpoint claims."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.folder import SAFETENSORS, digest_files
from ..adapters.keys import SIDES, factor_key
from ..adapters.pickles import raw_bytes
from ..adapters.safetensors import TensorReader
from ..adapters.source import Source
from ..checkpoint.config import SHAREConfig
from ..checkpoint.reader import Tensors
from ..checkpoint.restore import as_array, was_reconstructed
from ..codec.factors import errors_of_products
from ..errors import AdapterError, StreamError
from ..hub.client import AT_ONCE
from ..hub.fetch import Fetcher
from ..hub.lookup import loose_ids, resolve_on_hub
from ..linalg.delta import DeltaError, delta_errors, relative_error
from ..plan.catalog import Reader
from ..settings import Settings
from ..text import listed

TOLERANCE = 1e-3  # between a certified error and the one that is measured
EXACTLY = 1e-6, 1e-7  # of one of a coded checkpoint, which is of the tensors themselves: relative, and in any case
# Of components, by which the errors that slicing adds up are not orthogonal.
ROUNDING = {"BF16": 1e-2, "F16": 2e-3}


class Checkpoint(Protocol):
    """Protocol of a checkpoint to verify, which `SHAREModel` follows."""

    config: SHAREConfig

    @property
    def adapter_names(self) -> list[str]:
        """Names of all adapters."""
        ...

    def certified(self, adapter_name: str) -> dict[str, Any]:
        """What compression recorded of one adapter."""
        ...

    def reconstruct(self, adapter_name: str) -> Tensors:
        """PEFT key -> tensor, of one adapter."""
        ...


@dataclass(frozen=True)
class Verdict:
    """Result of the verification of one adapter.

    Attributes:
        name: of the adapter.
        relative_error: ||dW - dW^|| / ||dW|| over its shared modules, measured; NaN if it could not be.
        certified: what the checkpoint claims, if it claims anything.
        worst_module, worst_module_error: where it is farthest off.
        problem: what is wrong, or None.
        beside: files of weights beside the original, which the checkpoint does not hold.
    """

    name: str
    relative_error: float
    certified: float | None = None
    worst_module: str | None = None
    worst_module_error: float = 0.0
    problem: StreamError | None = None
    beside: tuple[str, ...] = ()


def verify(
    model: Checkpoint, originals: Mapping[str, Source], *, workspace: Path | None = None, offline: bool = False
) -> Iterator[Verdict]:
    """Compare every adapter of a checkpoint with its original; those of the Hub in the order in which they arrive.

    Args:
        model: the checkpoint.
        originals: name -> where the original lies.
        workspace: what was read on the Hub for it before is not asked again.
        offline: never ask the Hub.
    """
    ours = model.config.record
    settings = Settings(share_initial=bool(ours and ours.share_initial), offline=offline)
    settings = replace(settings, disk_budget=settings.memory)  # the cache is not filled with what is read once
    local = Reader(settings)
    remote = {name: source for name, source in originals.items() if source.hub is not None}
    for name in model.adapter_names:
        if name not in remote:
            yield _judged(model, name, _local(originals.get(name), local))
    if not remote:
        return
    _, surveyed = resolve_on_hub(list(remote.values()), settings, workspace, writes=False)
    reader, adapters = Reader(settings, surveyed), []
    for name, source in remote.items():
        found = reader.read(replace(source, name=name))
        if isinstance(found, AdapterError):
            yield _judged(model, name, found)
        else:
            adapters.append(found)
    room = 2 * AT_ONCE * max((e.hub_bytes for e in adapters), default=0)
    with (
        tempfile.TemporaryDirectory(prefix="lorashare-stream-") as folder,
        Fetcher(offline, Path(folder), room) as fetcher,
    ):
        for result in fetcher.arriving(adapters):
            if isinstance(result, AdapterError):
                yield _judged(model, str(result.adapter), result)
            else:
                yield _judged(model, result.name, result)
                fetcher.release([result])


def _local(source: Source | None, reader: Reader) -> Adapter | Exception:
    """Local original, or the error why it cannot be read."""
    if source is None:
        return StreamError("its original is not among the sources")
    if not source.path.exists():
        remedy = "Name the folder where the originals are now by --sources: they are found by name."
        return StreamError("its original is no longer where it was", found=source.path, remedy=remedy)
    try:
        return reader.read(source)
    except OSError as e:
        return e


def _judged(model: Checkpoint, name: str, original: Adapter | Exception) -> Verdict:
    """Verdict on an adapter; `original` may be the error why it cannot be read."""
    certified: float | None = None
    try:
        certified = model.certified(name).get("relative_error")
        if isinstance(original, Exception):
            raise original
        return _verdict(model, name, original, certified)
    except (StreamError, OSError) as e:
        problem = e if isinstance(e, StreamError) else StreamError(e.strerror or str(e), found=e.filename)
        return Verdict(name, float("nan"), certified, problem=_of(name, problem))


def _of(name: str, problem: StreamError) -> StreamError:
    problem.adapter = name
    return problem


def _verdict(model: Checkpoint, name: str, adapter: Adapter, certified: float | None) -> Verdict:
    tensors = model.reconstruct(name)
    with adapter.open() as originals:
        kept = model.certified(name).get("verbatim", [])
        lossy = [m.name for m in adapter.layout.modules if factor_key(m.name, "A") not in kept]
        errors = _module_errors(adapter, lossy, originals, tensors, coded=bool(model.config.coded))
        problem = _verbatim_fault(adapter, originals, tensors, kept)
    total = relative_error(sum(e.error for e in errors.values()), sum(e.norm for e in errors.values()))
    worst = max(errors, key=lambda m: errors[m].relative, default=None)
    ours = model.config.record
    rounding = ROUNDING.get(ours.dtype, 0.0) if ours and "estimated" in model.certified(name) else 0.0
    allowed = EXACTLY[0] * total + EXACTLY[1] if model.config.coded else TOLERANCE + rounding
    if problem is None and certified is not None and not abs(total - certified) <= allowed:
        problem = StreamError(
            "the checkpoint claims a relative error that it does not have", found=f"{total:.6f}",
            expected=f"{certified:.6f}",
        )  # fmt: skip
    digest = model.certified(name).get("sha256")
    if problem is not None and digest is not None and digest_files(adapter.paths) != digest:
        problem = StreamError("its original is not the one that was compressed: the files have changed")
    told = None if problem is None else _of(name, problem)
    at_worst = errors[worst].relative if worst else 0.0
    return Verdict(name, total, certified, worst, at_worst, told, adapter.beside)


def _module_errors(
    adapter: Adapter, modules: Sequence[str], originals: TensorReader, tensors: Tensors, *, coded: bool
) -> dict[str, DeltaError]:
    """Errors of some modules, by name; a coded adapter has another gauge than its original."""
    for module in adapter.layout.modules:
        for side in SIDES:
            key = factor_key(module.name, side)
            if key not in tensors or tuple(tensors[key].shape) != tuple(module.record(side).shape):
                raise StreamError("a tensor is missing, or has another shape", key=key)
    measure, found = errors_of_products if coded else delta_errors, dict[str, DeltaError]()
    for batch in adapter.batches_of(modules):
        read = batch.read(originals)
        a_hat, b_hat = (np.stack([as_array(tensors[factor_key(name, side)]) for name in batch.names]) for side in SIDES)
        each = measure(read["A"], read["B"], a_hat, b_hat, adapter.scalings_of(batch.names))
        found |= dict(zip(batch.names, each, strict=True))
    return found


def _verbatim_fault(
    adapter: Adapter, originals: TensorReader, tensors: Tensors, kept: Collection[str]
) -> StreamError | None:
    """Difference between verbatim tensors and the original's bytes; None if there is none."""
    lora = [(factor_key(m.name, side), m.record(side)) for m in adapter.layout.modules for side in SIDES]
    for key, record in (*adapter.layout.extras, *(pair for pair in lora if pair[0] in kept)):
        if key not in tensors:
            return StreamError("a tensor is missing that is kept verbatim", key=key)
        if not np.array_equal(raw_bytes(tensors[key]), originals.raw(record)):
            return StreamError("a tensor that is kept verbatim differs from the original", key=key)
    extra = tensors.keys() - {key for key, _ in adapter.layout.extras}
    unexpected = extra - {factor_key(m.name, side) for m in adapter.layout.modules for side in SIDES}
    return StreamError("tensors that its original has not", found=listed(sorted(unexpected), 3)) if unexpected else None


def pins_in(model: Checkpoint) -> dict[str, str]:
    """Pins of a checkpoint: Hub id without revision -> pinned id."""
    return loose_ids(str(model.certified(name).get("source_id")) for name in model.adapter_names)


def originals_of(model: Checkpoint, sources: list[Source]) -> dict[str, Source]:
    """Match sources to a checkpoint's adapters: by source id where it is recorded, else by name."""
    by_id = {source.id: source for source in sources if source.name is None}
    by_name: dict[str, Source] = {}
    for source in sources:  # a reconstruction stands in for no original
        if source.wanted_name not in by_name or not was_reconstructed(source.path / SAFETENSORS):
            by_name[source.wanted_name] = source
    matched: dict[str, Source] = {}
    for name in model.adapter_names:
        original = by_id.get(str(model.certified(name).get("source_id"))) or by_name.get(name)
        if original is not None:
            matched[name] = original
    return matched
