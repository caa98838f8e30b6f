"""The coded checkpoint: what is recorded of its adapters. docs/format.md has its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.folder import digest_files, open_tensors, tensor_records
from ..adapters.safetensors import TensorRecord
from ..errors import CheckpointError
from ..schema import checked
from ..text import printable
from .config import SHAREConfig, record_of
from .format import ADAPTERS, CODE, CONFIG, DIRECTIONS, INDEX, OURS, SHARED, VERBATIM
from .index import CodedAdapter, Index, read_index
from .packs import Coded, Verbatim, digest_of_tensor
from .records import REPAIR, AdapterMeta, metas_of

VERSION, WITH_DIRECTIONS = 1, 2  # of gauge, quantiser, tables and stream; of these with directions
_ELSEWHERE = {"format", "basis_digest", "verbatim", "files", "layout", "delta_norm", "notes"}  # no record repeats it
_PATH = "path"  # in a record: the original_adapter_path, if it is not the source id
_DIGITS = 7  # of a recorded error: what is measured agrees with it to 1e-6


def staged_adapters(root: Path, names: Iterable[str]) -> Iterator[Coded]:
    """Adapters of a staged checkpoint that lie in folders of their own, to be packed."""
    directions = _whole(root / SHARED) if (root / SHARED).exists() else None
    for meta in metas_of(root, names):
        folder = root / ADAPTERS / meta.adapter_name
        path = folder / VERBATIM
        verbatim = {r.name: _verbatim(path, r) for r in tensor_records((path,))} if meta.ours.verbatim else {}
        if directions is not None and meta.ours.layout:
            verbatim[DIRECTIONS] = directions
        record, code = record_in(meta), folder / CODE
        yield Coded(meta.adapter_name, meta.original_config, meta.ours.layout, record, code, verbatim)


def _whole(path: Path) -> Verbatim:
    """A file as a tensor of bytes."""
    shape, content = (path.stat().st_size,), path.read_bytes()
    return Verbatim("U8", shape, lambda: iter((content,)), digest_of_tensor("U8", shape, (content,)))


def record_in(meta: AdapterMeta) -> dict[str, Any]:
    """What the index records of an adapter, of its adapter_meta.json: what `meta_of` gives back."""
    record = meta.ours.model_dump(exclude_unset=True, exclude=_ELSEWHERE)
    record |= {key: float(f"{record[key]:.{_DIGITS}g}") for key in ("relative_error", "worst_module_error")}
    record |= {"notes": meta.ours.notes} if meta.ours.notes else {}
    return record if meta.original_adapter_path == meta.ours.source_id else record | {_PATH: meta.original_adapter_path}


def _verbatim(path: Path, record: TensorRecord) -> Verbatim:
    chunks = partial(_chunks, path, record)
    return Verbatim(record.dtype, record.shape, chunks, digest_of_tensor(record.dtype, record.shape, chunks()))


def _chunks(path: Path, record: TensorRecord) -> Iterator[memoryview]:
    with open_tensors((path,)) as tensors:
        yield from tensors.chunks(record)


def meta_of(adapter: CodedAdapter, key: str) -> AdapterMeta:
    """What an adapter_meta.json would say of an adapter; `key` is of the checkpoint.

    Raises:
        CheckpointError: if the index tells lies.
    """
    facts = {"notes": [], **adapter.record, "basis_digest": key, "verbatim": sorted({*adapter.verbatim} - {DIRECTIONS})}
    path = facts.pop(_PATH, facts.get("source_id"))
    values = {"adapter_name": adapter.name, "original_config": adapter.config, "original_adapter_path": path}
    return checked(AdapterMeta, {**values, OURS: facts}, INDEX, REPAIR, adapter.name)


def metas_in(root: Path, config: SHAREConfig, names: Iterable[str]) -> Iterator[AdapterMeta]:
    """What a checkpoint of ours, SHARE or coded, records of adapters: as `metas_of`.

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


def index_of(root: Path, coded: Mapping[str, Any]) -> Index:
    """The index of a checkpoint, which must be that of its configuration.

    Args:
        root: of the checkpoint.
        coded: the field of its share_config.json.

    Raises:
        CheckpointError: if it is not, or not what was written.
    """
    if coded.get("version") not in (VERSION, WITH_DIRECTIONS):
        raise CheckpointError(
            "a coded checkpoint of another version", found=printable(coded.get("version")),
            expected=f"{VERSION} or {WITH_DIRECTIONS}",
            remedy="Read it by the version of lorashare-stream that wrote it.",
        )  # fmt: skip
    index = read_index(root / INDEX)
    if digest_files([root / INDEX]) != coded.get("index"):
        raise CheckpointError(
            f"{INDEX} belongs to another {CONFIG}", found=root,
            remedy="If the checkpoint was replaced, open it again; else fetch it again.",
        )  # fmt: skip
    return index
