"""Index of a coded checkpoint: what it holds of each adapter, and where in its packs (`checkpoint.packs`).

It is one file, `INDEX`: a zlib stream (RFC 1950) with the preset dictionary `DICTIONARY` (by
scripts/make_dictionary.py), of JSON with sorted keys and without blanks, whose schema is `IndexFile`. A pack is its
header, the codes of its adapters, and the bytes of its tensors, back to back, so that lengths tell offsets.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from ..adapters.dtypes import ITEMSIZE
from ..adapters.safetensors import MAX_DIMS
from ..errors import CheckpointError
from ..files import atomic_file
from ..schema import Count, Schema, fault_of
from ..text import name_fault, printable
from .format import CONFIG, INDEX, PACKS
from .planes import MOST

Json = Mapping[str, Any]
V = TypeVar("V")
VERSION, WITH_DIRECTIONS = 1, 2  # of a coded checkpoint: gauge, quantiser, tables, stream; the same with directions
PLANES = "planes"  # the coding of a tensor in byte planes; that of one stored as it is, is ""
LIMIT = 256 << 20  # bytes of JSON; a million adapters have 200 MB
AGAIN = "Fetch the checkpoint again; or take the adapters out (lorashare-stream remove) and add them again."
DICTIONARY = Path(__file__).with_name("dictionary.json")  # data, a part of the format


def _checked_name(name: str) -> str:
    fault = name_fault(name)
    _demand(fault is None, f"an adapter name {printable(name)!r}: {fault}")
    return name


Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]  # the first 32 hex digits of a SHA-256
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, AfterValidator(_checked_name)]
Dtype = Annotated[str, Field(pattern=f"^({'|'.join(ITEMSIZE)})$")]
Shape = Annotated[tuple[Count, ...], Field(max_length=MAX_DIMS, strict=False)]
Kind = Annotated[tuple[Dtype, Shape, Literal["", "planes"]], Field(strict=False)]


class Pack(NamedTuple):
    """A file of codes: its SHA-256 (hex), its bytes, those of its safetensors header, and how much is in it."""

    sha256: Sha256
    nbytes: Count
    start: Count
    adapters: Count
    tensors: Count

    @property
    def file(self) -> str:
        """Its path in the checkpoint."""
        return f"{PACKS}/{self.sha256[:16]}.safetensors"


class Table(Schema, Generic[V]):
    """Objects by columns: distinct sets of `keys`, in `rows` the number of each object's set, and `values` by key."""

    keys: list[list[str]]
    rows: list[Count]
    values: dict[str, list[V]]

    def objects(self) -> list[dict[str, V]]:
        """The objects; ValueError if a column has too few values, or too many."""
        columns = {key: iter(column) for key, column in self.values.items()}
        try:
            objects = [{key: next(columns[key]) for key in self.keys[row]} for row in self.rows]
        except (StopIteration, KeyError):
            raise ValueError("a column with too few values") from None
        _demand(not any(True for column in columns.values() for _ in column), "a column with too many values")
        return objects


class TensorColumns(Schema):
    """Verbatim tensors, in the order of packs and offsets: `kind` is a number in `kinds`, `nbytes` as stored."""

    digest: list[Digest]
    kind: list[Count]
    nbytes: list[Count]


class AdapterColumns(Schema):
    """Adapters, in the order of packs and offsets.

    `digest` and `nbytes` are of the code, `config` and `layout` numbers in `configs` and `layouts`; the values of
    `verbatim` are numbers of tensors, by PEFT key.
    """

    name: list[Name]
    digest: list[Digest]
    nbytes: list[Count]
    config: list[Count]
    layout: list[Count]
    record: Table[Any]
    verbatim: Table[Count]


class IndexFile(Schema):
    """The JSON of an index. `configs` are distinct adapter_config.json, `kinds` dtype, shape and coding of tensors."""

    version: Literal[1]
    packs: list[Pack]
    configs: list[dict[str, Any]]
    layouts: list[Any]
    kinds: list[Kind]
    tensors: TensorColumns
    adapters: AdapterColumns


@dataclass(frozen=True, slots=True)
class Location:
    """Where bytes lie: `nbytes` at `offset` of a pack, and the first 32 hex digits of a SHA-256 of what they are."""

    pack: Pack
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A verbatim tensor: dtype as safetensors names it, coding `PLANES` or "", and where its bytes lie.

    The digest is that of the tensor (`packs.digest_of_tensor`), not of the bytes as they are stored.
    """

    dtype: str
    shape: tuple[int, ...]
    coding: str
    at: Location

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class CodedAdapter:
    """What a coded checkpoint holds of one adapter.

    Attributes:
        name: the adapter.
        config: its adapter_config.json; one object for all adapters that have an equal one.
        layout: what its encoder needs to know of its modules, as JSON; shared likewise.
        record: what is recorded of it: small JSON values by field.
        code: where its code lies.
        verbatim: key -> digest of a tensor in `Index.tensors`.
    """

    name: str
    config: Json
    layout: Any
    record: Json
    code: Location
    verbatim: Mapping[str, str]


@dataclass(frozen=True)
class Index:
    """The content of a coded checkpoint.

    Attributes:
        packs: its files.
        adapters: name -> adapter, in the order of the checkpoint; those of a pack are neighbours.
        tensors: digest -> verbatim tensor, in the order of packs and of offsets.
    """

    packs: tuple[Pack, ...] = ()
    adapters: Mapping[str, CodedAdapter] = field(default_factory=dict)
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)


def write_index(path: Path, index: Index) -> None:
    """Write an index, atomically."""
    with atomic_file(path) as f:
        f.write(index_bytes(index))


def index_bytes(index: Index) -> bytes:
    """The file of an index, on whose content and the version of zlib alone it depends."""
    return deflated(canonical(_as_json(index)).encode())


def deflated(raw: bytes) -> bytes:
    """The zlib stream of the JSON of an index."""
    z = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zdict=_dictionary())
    return z.compress(raw) + z.flush()


def inflated(stream: bytes) -> bytes:
    """The JSON in a zlib stream.

    Raises:
        ValueError: if it is cut short, damaged, or of more than `LIMIT` bytes.
    """
    z = zlib.decompressobj(zlib.MAX_WBITS, _dictionary())
    try:
        raw = z.decompress(stream, LIMIT + 1)
    except zlib.error as e:
        raise ValueError(str(e)) from e
    _demand(len(raw) <= LIMIT, f"more than {LIMIT} bytes of JSON")
    _demand(z.eof and not z.unused_data, "a zlib stream that is cut short, or longer than it should be")
    return raw


@cache
def _dictionary() -> bytes:
    return DICTIONARY.read_bytes()


def canonical(value: Any) -> str:
    """JSON of a plain value, the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def index_of(root: Path, coded: Json) -> Index:
    """The index of a checkpoint, which must be that of its configuration.

    Args:
        root: of the checkpoint.
        coded: the field of its share_config.json.

    Raises:
        CheckpointError: if it is not, or not what was written, or of another version.
    """
    if coded.get("version") not in (VERSION, WITH_DIRECTIONS):
        raise CheckpointError(
            "a coded checkpoint of another version", found=printable(coded.get("version")),
            expected=f"{VERSION} or {WITH_DIRECTIONS}",
            remedy="Read it by the version of lorashare-stream that wrote it.",
        )  # fmt: skip
    stream = _stream(root / INDEX)
    index = read_index(stream)
    if hashlib.sha256(stream).hexdigest() != coded.get("index"):
        raise CheckpointError(
            f"{INDEX} belongs to another {CONFIG}", found=root,
            remedy="If the checkpoint was replaced, open it again; else fetch it again.",
        )  # fmt: skip
    return index


def read_index(source: Path | bytes) -> Index:
    """Read an index, which may be a stranger's: every type, range and sum in it is checked.

    Args:
        source: the file, or its bytes.

    Raises:
        CheckpointError: if it is not what was written, or tells lies.
    """
    stream = source if isinstance(source, bytes) else _stream(source)
    try:
        return _parsed(inflated(stream))
    except (ValueError, IndexError, RecursionError) as e:
        fault = fault_of(e) if isinstance(e, ValidationError) else {"found": str(e)}
        remedy = "Fetch the checkpoint again, or compress its sources again."
        raise CheckpointError(f"{INDEX} is damaged, or no index of a coded checkpoint", remedy=remedy, **fault) from e


def _stream(path: Path) -> bytes:
    try:
        with path.open("rb", buffering=0) as f:
            return f.read(min(os.fstat(f.fileno()).st_size, LIMIT + 1))  # cut there, it is no whole stream
    except FileNotFoundError as e:
        raise CheckpointError(f"{INDEX} is missing", found=str(path), remedy="Fetch the checkpoint again.") from e


def _as_json(index: Index) -> dict[str, Any]:
    adapters, tensors = list(index.adapters.values()), list(index.tensors.values())
    configs, config = _numbered([a.config for a in adapters])
    layouts, layout = _numbered([a.layout for a in adapters])
    kinds, kind = _numbered([[t.dtype, t.shape, t.coding] for t in tensors])
    number = {digest: i for i, digest in enumerate(index.tensors)}
    return {
        "version": 1,
        "packs": index.packs,
        "configs": configs,
        "layouts": layouts,
        "kinds": kinds,
        "tensors": {"digest": list(index.tensors), "kind": kind, "nbytes": [t.at.nbytes for t in tensors]},
        "adapters": {
            "name": list(index.adapters),
            "digest": [a.code.digest for a in adapters],
            "nbytes": [a.code.nbytes for a in adapters],
            "config": config,
            "layout": layout,
            "record": _table([a.record for a in adapters]),
            "verbatim": _table([{k: number[digest] for k, digest in a.verbatim.items()} for a in adapters]),
        },
    }


def _numbered(values: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The distinct ones of plain values, in order, and the number of each value among them."""
    by_id: dict[int, int] = {}  # most adapters share one object, whose JSON is then made once
    by_text: dict[str, int] = {}
    distinct: list[Any] = []
    for value in values:
        if id(value) not in by_id:
            by_id[id(value)] = by_text.setdefault(canonical(value), len(distinct))
            distinct += [value] if len(by_text) > len(distinct) else []
    return distinct, [by_id[id(value)] for value in values]


def _table(objects: Sequence[Json]) -> dict[str, Any]:
    keys, rows = _numbered([sorted(o) for o in objects])
    values: dict[str, list[Any]] = {}
    for o in objects:
        for key, value in o.items():
            values.setdefault(key, []).append(value)
    return {"keys": keys, "rows": rows, "values": values}


def _parsed(raw: bytes) -> Index:
    file = IndexFile.model_validate(json.loads(raw))  # which has names that are not UTF-8
    adapters, tensors, files = file.adapters, file.tensors, [pack.file for pack in file.packs]
    for what, values in (("packs", files), ("adapters", adapters.name), ("tensors", tensors.digest)):
        _demand(len(set(values)) == len(values), f"two {what} of one name or digest")
    code_at, tensor_at = _locations(file)
    kept = [StoredTensor(*file.kinds[n], at) for n, at in zip(tensors.kind, tensor_at, strict=True)]
    for tensor in kept:
        stored, size = tensor.at.nbytes, tensor.nbytes
        fits = stored < size <= MOST * stored if tensor.coding else stored == size
        _demand(fits, f"{stored} bytes for a tensor {tensor.dtype} {[*tensor.shape]}")
    columns = (
        adapters.name,
        [file.configs[n] for n in adapters.config],
        [file.layouts[n] for n in adapters.layout],
        adapters.record.objects(),
        code_at,
        [{key: tensors.digest[n] for key, n in o.items()} for o in adapters.verbatim.objects()],
    )
    found = {row[0]: CodedAdapter(*row) for row in zip(*columns, strict=True)}
    return Index(tuple(file.packs), found, {tensor.at.digest: tensor for tensor in kept})


def _locations(file: IndexFile) -> tuple[list[Location], list[Location]]:
    """Where codes and tensors lie; each pack must be full, and none left."""
    codes, tensors = (list(zip(part.nbytes, part.digest, strict=True)) for part in (file.adapters, file.tensors))
    code_at: list[Location] = []
    tensor_at: list[Location] = []
    for pack in file.packs:
        offset = pack.start
        for parts, found, count in ((codes, code_at, pack.adapters), (tensors, tensor_at, pack.tensors)):
            for nbytes, digest in parts[len(found) : len(found) + count]:
                found.append(Location(pack, offset, nbytes, digest))
                offset += nbytes
        _demand(offset == pack.nbytes, f"{pack.file} of {pack.nbytes} bytes, with {offset} bytes in it")
    held = sum(pack.adapters for pack in file.packs), sum(pack.tensors for pack in file.packs)
    _demand(held == (len(codes), len(tensors)), f"{len(codes)} codes, {len(tensors)} tensors, but {held} in packs")
    return code_at, tensor_at


def _demand(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)
