"""Packs: the safetensors files in which the codes of a coded checkpoint lie.

A pack has one U8 tensor for each of its adapters, named by the adapter, which is its code; and, if there are any, one
more, `VERBATIM_PART`, with the verbatim tensors that its adapters have and no pack before it had, back to back. So
adapters can be listed by whatever reads safetensors, and a tensor of a few bytes costs no header. The index
(`checkpoint.index`) says where each code and each tensor lies. A pack is named by the SHA-256 of its bytes, and never
changes.

What is read comes through a `Read`, of a map, a file or ranged requests alike.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
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
CODES_MOST = (
    64 << 20
)  # bytes of codes of a pack, which are in memory until it is written; one more code may come on top
TENSORS_MOST = 1 << 30  # bytes of verbatim tensors of a pack, as they are before any coding; likewise
GAIN = 0.97  # a tensor is stored in planes if that takes at most so much of its bytes
VERBATIM_PART = ":verbatim"  # a name that no adapter can have

_NOWHERE = Pack("", 0, 0)  # of what is not written yet

Read = Callable[[int, int], bytes | memoryview]  # (offset, count) -> bytes of a pack; fewer at its end


@dataclass(frozen=True)
class Verbatim:
    """A tensor that is kept as it is.

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
    """An adapter to be packed; the attributes are those of `CodedAdapter`, but for what is not stored yet.

    Attributes:
        code: its bytes, or a file that holds them.
        verbatim: key -> tensor.
    """

    name: str
    config: Json
    layout: Any
    record: Json
    code: bytes | Path
    verbatim: Mapping[str, Verbatim] = field(default_factory=dict)


def digest_of_tensor(dtype: str, shape: tuple[int, ...], chunks: Iterable[bytes | memoryview]) -> str:
    """The first 32 hex digits of the SHA-256 of a tensor: of dtype and shape (`F32 [2, 384]`), and of its bytes."""
    digest = _begun(dtype, shape)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:32]


def _begun(dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    return hashlib.sha256(f"{dtype} {[*shape]}\n".encode())


# -- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class _Draft:
    """What a pack will hold; the locations of its adapters and tensors name no pack yet."""

    spool: IO[bytes]  # the bytes of the tensors, as they will be stored
    adapters: list[CodedAdapter] = field(default_factory=list)
    codes: list[bytes] = field(default_factory=list)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def is_full(self) -> bool:
        return (
            len(self.adapters) >= ADAPTERS_MOST
            or sum(map(len, self.codes)) >= CODES_MOST
            or sum(tensor.nbytes for tensor in self.tensors.values()) >= TENSORS_MOST
        )


def write_packs(
    root: Path, adapters: Iterable[Coded], there: Index | None = None, packed: Callable[[Index], None] | None = None
) -> Index:
    """Write adapters into packs, in their order.

    Where packs are cut depends on the adapters alone, so that a run which goes on after its last whole pack writes what
    one that was never stopped writes. The codes of a pack are in memory until it is written; tensors pass through a
    file without a name.

    Args:
        root: the folder of the checkpoint.
        adapters: none of them is in `there`.
        there: what is packed already. Its packs stay as they are, and need not lie in `root`.
        packed: called after each pack with the index of what is packed by then.

    Returns:
        The index of `there` and of all adapters.

    Raises:
        AdapterError: if a tensor is not the one that its digest names.
    """
    there = there or Index()
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
            pack = _write_pack(root, draft)
        packs.append(pack)
        done |= {adapter.name: adapter for adapter in draft.adapters}
        tensors |= draft.tensors
        if packed:
            packed(Index(tuple(packs), dict(done), dict(tensors)))


def remove_from_packs(
    root: Path, index: Index, names: Collection[str], open_pack: Callable[[Pack], AbstractContextManager[Read]]
) -> Index:
    """Write those packs anew that hold an adapter of these names, or a tensor that none of the others has.

    Of one pack, this writes the bytes that `write_packs` writes of the others (with the same version of zlib).

    Args:
        root: the folder of the checkpoint, for what is written; other packs are the same as before.
        index: of what is there.
        names: adapters to be removed.
        open_pack: opens a pack of `index`.

    Returns:
        The index of what is left.

    Raises:
        UnknownAdapterError: if one is not there.
        CheckpointError: if a code that must be copied is damaged.
    """
    left = index.without(names)
    before, after = _content(index), _content(left)
    packs, done, tensors = [], dict(left.adapters), dict(left.tensors)
    for pack in index.packs:
        adapters, kept = after[pack]
        if (len(adapters), len(kept)) == (len(before[pack][0]), len(before[pack][1])):
            packs.append(pack)
        elif adapters or kept:
            with _spool(root) as spool, open_pack(pack) as read:
                draft = _Draft(spool, adapters, [read_code(read, a) for a in adapters], {t.at.digest: t for t in kept})
                for tensor in kept:
                    spool.writelines(_stored(read, tensor.at))
                packs.append(_write_pack(root, draft))
            done |= {adapter.name: adapter for adapter in draft.adapters}
            tensors |= draft.tensors
    at = {pack: i for i, pack in enumerate(packs)}
    tensors = dict(sorted(tensors.items(), key=lambda item: (at[item[1].at.pack], item[1].at.offset)))
    return Index(tuple(packs), done, tensors)


def _content(index: Index) -> dict[Pack, tuple[list[CodedAdapter], list[StoredTensor]]]:
    """What each pack holds: adapters in their order, tensors in the order in which adapters need them."""
    content: dict[Pack, tuple[list[CodedAdapter], list[StoredTensor]]] = {pack: ([], []) for pack in index.packs}
    needed: dict[str, None] = {}
    for adapter in index.adapters.values():
        content[adapter.code.pack][0].append(adapter)
        needed |= {adapter.verbatim[key]: None for key in sorted(adapter.verbatim)}
    for tensor in map(index.tensors.__getitem__, needed):
        content[tensor.at.pack][1].append(tensor)
    return content


def _spool(root: Path) -> IO[bytes]:
    """A file without a name, on the disk of the packs."""
    return tempfile.TemporaryFile(dir=own_folder(root / PACKS))


def _add(draft: _Draft, adapter: Coded, there: Mapping[str, StoredTensor], shared: dict[str, Any]) -> None:
    """Add an adapter to a pack, and its tensors if they are not there yet."""
    code = adapter.code if isinstance(adapter.code, bytes) else adapter.code.read_bytes()
    config, layout = (shared.setdefault(canonical(value), value) for value in (adapter.config, adapter.layout))
    verbatim = {key: adapter.verbatim[key].digest for key in sorted(adapter.verbatim)}
    for key, digest in verbatim.items():
        if digest not in there and digest not in draft.tensors:
            draft.tensors[digest] = _spooled(draft.spool, adapter.verbatim[key], adapter.name, key)
    at = Location(_NOWHERE, 0, len(code), _digest_of_code(code))
    draft.codes.append(code)
    draft.adapters.append(CodedAdapter(adapter.name, config, layout, dict(adapter.record), at, verbatim))


def _spooled(spool: IO[bytes], tensor: Verbatim, adapter: str, key: str) -> StoredTensor:
    """Write a tensor to the spool, in planes if that gains."""
    start, coding, size = spool.tell(), PLANES, math.prod(tensor.shape) * ITEMSIZE[tensor.dtype]
    spool.writelines(encoded(_checked(tensor, adapter, key), ITEMSIZE[tensor.dtype]))
    if spool.tell() - start > GAIN * size or not size:
        coding = ""
        spool.seek(start)
        spool.truncate()
        spool.writelines(_checked(tensor, adapter, key))
    return StoredTensor(
        tensor.dtype, tuple(tensor.shape), coding, Location(_NOWHERE, 0, spool.tell() - start, tensor.digest)
    )


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


def _write_pack(root: Path, draft: _Draft) -> Pack:
    """Write a pack, whole and synced or not at all, and give the locations of the draft their places in it."""
    tensors = [(_key(adapter.name), "U8", (adapter.code.nbytes,)) for adapter in draft.adapters]
    if draft.tensors:
        tensors.append((VERBATIM_PART, "U8", (draft.spool.tell(),)))
    draft.spool.seek(0)
    temporary = root / PACKS / f".{uuid.uuid4().hex}.tmp"
    try:
        with naming(temporary), temporary.open("xb") as f:
            write_safetensors(f, tensors, chain(draft.codes, iter(lambda: draft.spool.read(BLOCK), b"")))
            f.flush()
            os.fsync(f.fileno())
            start = tensor_records_of(tuple(tensors))[0].offset
            pack = Pack(digest_files([temporary]), f.tell(), start)
            os.replace(temporary, root / pack.file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(root / PACKS)
    offsets = accumulate((at.nbytes for at in _locations(draft)), initial=start)
    places = [replace(at, pack=pack, offset=offset) for at, offset in zip(_locations(draft), offsets, strict=False)]
    draft.adapters = [replace(a, code=at) for a, at in zip(draft.adapters, places, strict=False)]
    stored = zip(draft.tensors.items(), places[len(draft.adapters) :], strict=True)
    draft.tensors = {digest: replace(tensor, at=at) for (digest, tensor), at in stored}
    return pack


def _locations(draft: _Draft) -> list[Location]:
    return [*(adapter.code for adapter in draft.adapters), *(tensor.at for tensor in draft.tensors.values())]


def _key(name: str) -> str:
    """The name of an adapter's tensor in a pack; safetensors has another use for one name that an adapter may have."""
    return name if name != "__metadata__" else f":{name}"


# -- reading ---------------------------------------------------------------------------------------------------------


def reader_of(pages: bytes | mmap.mmap) -> Read:
    """A `Read` of the bytes of a pack, or of a map of it."""
    return lambda offset, count: pages[offset : offset + count]


@contextmanager
def opened(path: Path) -> Iterator[Read]:
    """A `Read` of a file. It is not mapped, so that one which is cut short meanwhile is an error and no signal."""
    with path.open("rb", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        yield lambda offset, count: os.pread(f.fileno(), max(0, min(count, size - offset)), offset)


def read_code(read: Read, adapter: CodedAdapter) -> bytes:
    """The code of an adapter.

    Raises:
        CheckpointError: if it is not what was written.
    """
    at = adapter.code
    code = bytes(read(at.offset, at.nbytes))
    if len(code) != at.nbytes:
        raise _cut_short(at, adapter.name)
    if _digest_of_code(code) != at.digest:
        raise CheckpointError(
            f"its code in {at.pack.file} is damaged",
            adapter=adapter.name,
            found=_digest_of_code(code),
            expected=at.digest,
            remedy=AGAIN,
        )
    return code


def read_verbatim(read: Read, index: Index, adapter: CodedAdapter, key: str) -> bytes:
    """The bytes of a verbatim tensor of an adapter, in memory: see `verbatim_chunks`."""
    return b"".join(verbatim_chunks(read, index, adapter, key))


def verbatim_chunks(read: Read, index: Index, adapter: CodedAdapter, key: str) -> Iterator[bytes]:
    """The bytes of a verbatim tensor of an adapter, `planes.BLOCK` at a time; they are whole when all have come.

    Args:
        read: of the pack that holds it, `index.tensors[adapter.verbatim[key]].at.pack`.
        index: of the checkpoint.
        adapter: an adapter of it.
        key: of the tensor.

    Raises:
        CheckpointError: if it is not what was written.
    """
    tensor = index.tensors[adapter.verbatim[key]]
    stored, digest = _stored(read, tensor.at, adapter.name, key), _begun(tensor.dtype, tensor.shape)
    chunks = decoded(stored, ITEMSIZE[tensor.dtype], tensor.nbytes) if tensor.coding else stored
    try:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk
        found = digest.hexdigest()[:32]
    except CheckpointError:
        raise
    except ValueError as e:
        found = str(e)
    if found != tensor.at.digest:
        raise CheckpointError(
            f"a tensor in {tensor.at.pack.file} is damaged",
            adapter=adapter.name,
            key=key,
            found=found,
            expected=tensor.at.digest,
            remedy=AGAIN,
        )


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
        expected = f"{pack.nbytes} bytes, SHA-256 {pack.sha256}"
        raise CheckpointError(
            f"{pack.file} is damaged",
            found=found,
            expected=expected,
            remedy="Fetch the checkpoint again, or compress its sources again.",
        )


def _stored(read: Read, at: Location, adapter: str | None = None, key: str | None = None) -> Iterator[bytes]:
    """Bytes of a pack, as they are stored, a bounded number at a time."""
    for start in range(0, at.nbytes, BLOCK):
        count = min(BLOCK, at.nbytes - start)
        chunk = bytes(read(at.offset + start, count))
        if len(chunk) != count:
            raise _cut_short(at, adapter, key)
        yield chunk


def _cut_short(at: Location, adapter: str | None, key: str | None = None) -> CheckpointError:
    expected = f"{at.nbytes} bytes at {at.offset}"
    return CheckpointError(f"{at.pack.file} is cut short", adapter=adapter, key=key, expected=expected, remedy=AGAIN)


def _digest_of_code(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()[:32]
