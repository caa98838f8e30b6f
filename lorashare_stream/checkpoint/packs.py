"""Packs: the safetensors files in which the codes of a coded checkpoint lie.

A pack has one U8 tensor for each of its adapters, named by the adapter, which is its code; and, if there are any, one
more, `VERBATIM_PART`, with the verbatim tensors that its adapters have and no pack before it had, back to back. So
adapters can be listed by whatever reads safetensors, and a tensor of a few bytes costs no header. The index
(`checkpoint.index`) says where each code and each tensor lies. A pack is named by the SHA-256 of its bytes, and never
changes.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ..adapters.dtypes import ITEMSIZE
from ..adapters.folder import digest_files
from ..adapters.safetensors import tensor_records_of, write_safetensors
from ..errors import AdapterError, CheckpointError
from ..files import naming, own_folder, sync
from .format import PACKS
from .index import AGAIN, PLANES, CodedAdapter, Index, Json, Location, Pack, StoredTensor, canonical
from .planes import BLOCK, decoded, encoded

ADAPTERS_MOST = 256  # of a pack
CODES_MOST = 64 << 20  # bytes of codes of a pack, in memory until it is written; one more code may come on top
TENSORS_MOST = 1 << 30  # bytes of verbatim tensors of a pack, before any coding; likewise
GAIN = 0.97  # a tensor is stored in planes if that takes at most so much of its bytes
VERBATIM_PART = ":verbatim"  # a name that no adapter can have

_NOWHERE = Pack("", 0, 0, 0, 0)  # of what is not written yet

Read = Callable[[str, int, int], bytes]  # `Place.read`: (file, offset, count) -> bytes, fewer at its end


@dataclass(frozen=True)
class Verbatim:
    """A verbatim tensor to be packed.

    Attributes:
        dtype, shape: as safetensors has them.
        chunks: gives its bytes, from the start, as often as it is called.
        digest: its `digest_of_tensor`.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]
    digest: str


@dataclass(frozen=True)
class Coded:
    """An adapter to be packed: `config`, `layout` and `record` as in `CodedAdapter`, key -> verbatim tensor."""

    name: str
    config: Json
    layout: Any
    record: Json
    code: bytes
    verbatim: Mapping[str, Verbatim] = field(default_factory=dict)


def digest_of_tensor(dtype: str, shape: tuple[int, ...], chunks: Iterable[bytes | memoryview]) -> str:
    """The first 32 hex digits of the SHA-256 of a tensor: of dtype and shape (`F32 [2, 384]`), and of its bytes."""
    digest = _begun(dtype, shape)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:32]


def _begun(dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    return hashlib.sha256(f"{dtype} {[*shape]}\n".encode())


def _digest_of_code(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()[:32]


# -- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class _Draft:
    """The content of a pack that is not written; the locations of its adapters and tensors name no pack yet."""

    spool: IO[bytes]  # the bytes of the tensors, as they will be stored
    codes: list[bytes] = field(default_factory=list)
    adapters: dict[str, CodedAdapter] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def is_full(self) -> bool:
        return (
            len(self.adapters) >= ADAPTERS_MOST
            or sum(map(len, self.codes)) >= CODES_MOST
            or sum(tensor.nbytes for tensor in self.tensors.values()) >= TENSORS_MOST
        )


def write_packs(root: Path, adapters: Iterable[Coded], there: Index) -> Index:
    """Write adapters into packs, in their order, on which alone it depends where packs are cut.

    The codes of a pack are in memory until it is written; tensors pass through a file without a name.

    Args:
        root: the folder of the checkpoint.
        adapters: none of them is in `there`.
        there: what is packed already. Its packs stay as they are, and need not lie in `root`.

    Returns:
        The index of `there` and of all adapters.

    Raises:
        AdapterError: if a tensor is not the one that its digest names.
    """
    packs, done, tensors = list(there.packs), dict(there.adapters), dict(there.tensors)
    shared = {canonical(value): value for adapter in done.values() for value in (adapter.config, adapter.layout)}
    rest = iter(adapters)
    while True:
        with _spool(root) as spool:
            draft = _Draft(spool)
            for adapter in rest:
                _add(draft, adapter, tensors, shared)
                if draft.is_full():
                    break
            if not draft.adapters:
                return Index(tuple(packs), done, tensors)
            written = _write_pack(root, draft)
        packs += written.packs
        done |= written.adapters
        tensors |= written.tensors


def remove_from_packs(root: Path, index: Index, names: Collection[str], read: Read) -> Index:
    """Write those packs anew that hold an adapter of these names, or a tensor that none of the others has.

    Of one pack, this writes the bytes that `write_packs` writes of the others (with the same version of zlib).

    Args:
        root: the folder of the checkpoint, for what is written; other packs are the same as before.
        index: of what is there.
        names: adapters to be removed.
        read: of what is there.

    Returns:
        The index of what is left.

    Raises:
        CheckpointError: if a code that must be copied is damaged.
    """
    content: dict[Pack, tuple[dict[str, CodedAdapter], dict[str, StoredTensor]]]
    content = {pack: ({}, {}) for pack in index.packs}
    for adapter in (adapter for name, adapter in index.adapters.items() if name not in names):
        content[adapter.code.pack][0][adapter.name] = adapter
        for _, digest in sorted(adapter.verbatim.items()):  # in the order in which adapters need them
            tensor = index.tensors[digest]
            content[tensor.at.pack][1].setdefault(digest, tensor)
    packs, done, tensors = list[Pack](), dict[str, CodedAdapter](), dict[str, StoredTensor]()
    for pack, (adapters, kept) in content.items():
        if (len(adapters), len(kept)) == (pack.adapters, pack.tensors):
            left = Index((pack,), adapters, dict(sorted(kept.items(), key=lambda item: item[1].at.offset)))
        elif adapters or kept:
            with _spool(root) as spool:
                draft = _Draft(spool, [read_code(read, adapter) for adapter in adapters.values()], adapters, kept)
                for tensor in kept.values():
                    spool.writelines(_stored(read, tensor.at))
                left = _write_pack(root, draft)
        else:
            continue
        packs += left.packs
        done |= left.adapters
        tensors |= left.tensors
    return Index(tuple(packs), done, tensors)


def _spool(root: Path) -> IO[bytes]:
    """A file without a name, on the disk of the packs."""
    return tempfile.TemporaryFile(dir=own_folder(root / PACKS))


def _add(draft: _Draft, adapter: Coded, there: Mapping[str, StoredTensor], shared: dict[str, Any]) -> None:
    """Add an adapter to a pack, and its tensors if they are not there yet."""
    config, layout = (shared.setdefault(canonical(value), value) for value in (adapter.config, adapter.layout))
    verbatim = {key: adapter.verbatim[key].digest for key in sorted(adapter.verbatim)}
    for key, digest in verbatim.items():
        if digest not in there and digest not in draft.tensors:
            draft.tensors[digest] = _spooled(draft.spool, adapter.verbatim[key], adapter.name, key)
    at = Location(_NOWHERE, 0, len(adapter.code), _digest_of_code(adapter.code))
    draft.codes.append(adapter.code)
    draft.adapters[adapter.name] = CodedAdapter(adapter.name, config, layout, dict(adapter.record), at, verbatim)


def _spooled(spool: IO[bytes], tensor: Verbatim, adapter: str, key: str) -> StoredTensor:
    """Write a tensor to the spool, in planes if that gains."""
    start, coding, size = spool.tell(), PLANES, math.prod(tensor.shape) * ITEMSIZE[tensor.dtype]
    spool.writelines(encoded(_checked(tensor, adapter, key), ITEMSIZE[tensor.dtype]))
    if spool.tell() - start > GAIN * size or not size:
        coding = ""
        spool.seek(start)
        spool.truncate()
        spool.writelines(_checked(tensor, adapter, key))
    at = Location(_NOWHERE, 0, spool.tell() - start, tensor.digest)
    return StoredTensor(tensor.dtype, tuple(tensor.shape), coding, at)


def _checked(tensor: Verbatim, adapter: str, key: str) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor, which must be those that its digest names."""
    digest = _begun(tensor.dtype, tensor.shape)
    for chunk in tensor.chunks():
        digest.update(chunk)
        yield chunk
    found = digest.hexdigest()[:32]
    if found != tensor.digest:
        raise AdapterError(
            "the tensor is not the one that was read before",
            adapter=adapter,
            key=key,
            found=found,
            expected=tensor.digest,
            remedy="Leave the source alone while it is compressed, and run the command again.",
        )


def _write_pack(root: Path, draft: _Draft) -> Index:
    """Write a pack, whole and synced or not at all."""
    parts = [(_key(name), "U8", (adapter.code.nbytes,)) for name, adapter in draft.adapters.items()]
    if draft.tensors:
        parts.append((VERBATIM_PART, "U8", (draft.spool.tell(),)))
    start = tensor_records_of(tuple(parts))[0].offset
    draft.spool.seek(0)
    temporary = root / PACKS / f".{uuid.uuid4().hex}.tmp"
    try:
        with naming(temporary), temporary.open("xb") as f:
            write_safetensors(f, parts, chain(draft.codes, iter(lambda: draft.spool.read(BLOCK), b"")))
            f.flush()
            os.fsync(f.fileno())
            pack = Pack(digest_files([temporary]), f.tell(), start, len(draft.adapters), len(draft.tensors))
            os.replace(temporary, root / pack.file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(root / PACKS)
    end = start

    def placed(at: Location) -> Location:
        nonlocal end
        end += at.nbytes
        return replace(at, pack=pack, offset=end - at.nbytes)

    adapters = {name: replace(adapter, code=placed(adapter.code)) for name, adapter in draft.adapters.items()}
    tensors = {digest: replace(tensor, at=placed(tensor.at)) for digest, tensor in draft.tensors.items()}
    return Index((pack,), adapters, tensors)


def _key(name: str) -> str:
    """The name of an adapter's tensor in a pack; safetensors has another use for one name that an adapter may have."""
    return name if name != "__metadata__" else f":{name}"


# -- reading ---------------------------------------------------------------------------------------------------------


def read_code(read: Read, adapter: CodedAdapter) -> bytes:
    """The code of an adapter.

    Raises:
        CheckpointError: if it is not what was written.
    """
    code = b"".join(_stored(read, adapter.code, adapter.name))
    _check(_digest_of_code(code), adapter.code, "its code", adapter.name)
    return code


def read_verbatim(read: Read, index: Index, adapter: CodedAdapter, key: str) -> bytes:
    """The bytes of the verbatim tensor that an adapter has under a key.

    Raises:
        CheckpointError: if it is not what was written.
    """
    tensor = index.tensors[adapter.verbatim[key]]
    raw = b"".join(_stored(read, tensor.at, adapter.name, key))
    try:
        if tensor.coding:
            raw = decoded(raw, ITEMSIZE[tensor.dtype], tensor.nbytes)
        found = digest_of_tensor(tensor.dtype, tensor.shape, [raw])
    except ValueError as e:
        found = str(e)
    _check(found, tensor.at, "a tensor", adapter.name, key)
    return raw


def check_pack(path: Path, pack: Pack) -> None:
    """Demand that a pack is what was written, by its size and its SHA-256.

    Raises:
        CheckpointError: if it is not, or is not there.
    """
    try:
        size = path.stat().st_size
        found = digest_files([path]) if size == pack.nbytes else f"{size} bytes"
    except FileNotFoundError:
        found = "no file"
    if found != pack.sha256:
        raise CheckpointError(
            f"{pack.file} is damaged",
            found=found,
            expected=f"{pack.nbytes} bytes, SHA-256 {pack.sha256}",
            remedy="Fetch the checkpoint again; or delete that file, and compress the same sources into it again.",
        )


def _stored(read: Read, at: Location, adapter: str | None = None, key: str | None = None) -> Iterator[bytes]:
    """The bytes at a location, as they are stored, a bounded number at a time."""
    for start in range(0, at.nbytes, BLOCK):
        count = min(BLOCK, at.nbytes - start)
        chunk = read(at.pack.file, at.offset + start, count)
        if len(chunk) != count:
            raise CheckpointError(
                f"{at.pack.file} is cut short",
                adapter=adapter,
                key=key,
                expected=f"{at.nbytes} bytes at {at.offset}",
                remedy=AGAIN,
            )
        yield chunk


def _check(found: str, at: Location, what: str, adapter: str, key: str | None = None) -> None:
    """Demand the digest of a location."""
    if found != at.digest:
        raise CheckpointError(
            f"{what} in {at.pack.file} is damaged",
            adapter=adapter,
            key=key,
            found=found,
            expected=at.digest,
            remedy=AGAIN,
        )
