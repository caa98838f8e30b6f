"""Adapters of a coded checkpoint: from staged folders to packs, and from the index to what is recorded of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.folder import open_tensors, tensor_records
from ..adapters.safetensors import TensorRecord
from ..errors import CheckpointError
from ..schema import checked
from .config import SHAREConfig, record_of
from .format import ADAPTERS, CODE, CONFIG, DIRECTIONS, INDEX, OURS, SHARED, VERBATIM
from .index import CodedAdapter, index_of
from .packs import Coded, Verbatim, digest_of_tensor
from .records import REPAIR, AdapterMeta, metas_of

_ELSEWHERE = {"format", "basis_digest", "verbatim", "files", "layout", "delta_norm", "notes"}  # no record repeats it
_PATH = "path"  # in a record: the original_adapter_path, if it is not the source id
_DIGITS = 7  # of a recorded error: what is measured agrees with it to 1e-6


def staged_adapters(root: Path, names: Iterable[str]) -> Iterator[Coded]:
    """Adapters of a staged checkpoint that lie in folders of their own, to be packed."""
    directions = None
    if (root / SHARED).exists():
        content = (root / SHARED).read_bytes()
        directions = _verbatim("U8", (len(content),), lambda: iter((content,)))
    for meta in metas_of(root, names):
        folder = root / ADAPTERS / meta.adapter_name
        path, verbatim = folder / VERBATIM, dict[str, Verbatim]()
        if meta.ours.verbatim:
            verbatim = {r.name: _verbatim(r.dtype, r.shape, partial(_chunks, path, r)) for r in tensor_records((path,))}
        if directions is not None and meta.ours.layout:
            verbatim[DIRECTIONS] = directions
        record, code = record_in(meta), (folder / CODE).read_bytes()
        yield Coded(meta.adapter_name, meta.original_config, meta.ours.layout, record, code, verbatim)


def _verbatim(dtype: str, shape: tuple[int, ...], chunks: Callable[[], Iterator[bytes | memoryview]]) -> Verbatim:
    return Verbatim(dtype, shape, chunks, digest_of_tensor(dtype, shape, chunks()))


def _chunks(path: Path, record: TensorRecord) -> Iterator[memoryview]:
    with open_tensors((path,)) as tensors:
        yield from tensors.chunks(record)


def record_in(meta: AdapterMeta) -> dict[str, Any]:
    """The record of an adapter in an index, of its adapter_meta.json: the inverse of `meta_of`."""
    record = meta.ours.model_dump(exclude_unset=True, exclude=_ELSEWHERE)
    record |= {key: float(f"{record[key]:.{_DIGITS}g}") for key in ("relative_error", "worst_module_error")}
    record |= {"notes": meta.ours.notes} if meta.ours.notes else {}
    return record if meta.original_adapter_path == meta.ours.source_id else record | {_PATH: meta.original_adapter_path}


def meta_of(adapter: CodedAdapter, key: str) -> AdapterMeta:
    """The adapter_meta.json that an adapter would have; `key` is of the checkpoint.

    Raises:
        CheckpointError: if the index tells lies.
    """
    facts = {"notes": [], **adapter.record, "basis_digest": key, "verbatim": sorted({*adapter.verbatim} - {DIRECTIONS})}
    path = facts.pop(_PATH, facts.get("source_id"))
    values = {"adapter_name": adapter.name, "original_config": adapter.config, "original_adapter_path": path}
    return checked(AdapterMeta, {**values, OURS: facts}, INDEX, REPAIR, adapter.name)


def metas_in(root: Path, config: SHAREConfig, names: Iterable[str]) -> Iterator[AdapterMeta]:
    """What a checkpoint of ours, SHARE or coded, records of adapters.

    Raises:
        CheckpointError: if it is not what was written.
    """
    if not config.coded:
        yield from metas_of(root, names)
        return
    index, key = index_of(root, config.coded), record_of(config).basis_digest
    for name in names:
        if name not in index.adapters:
            raise CheckpointError(f"{CONFIG} and {INDEX} name other adapters", adapter=name, found=root)
        yield meta_of(index.adapters[name], key)
