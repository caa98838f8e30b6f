"""The index of a coded checkpoint: what it holds of each adapter, and where.

The codes of adapters lie in packs (`checkpoint.packs`); all else about them is in one file, `INDEX`: a zlib stream (RFC
1950) with the preset dictionary `DICTIONARY` (made by scripts/make_dictionary.py), of JSON with sorted keys and without
blanks,

    {"version": 1,
     "packs":    [[SHA-256, bytes, bytes of its header, adapters, tensors], ...],
     "configs":  [distinct adapter_config.json, ...],
     "layouts":  [distinct layouts, ...],
     "kinds":    [distinct [dtype, shape, coding], ...],
     "tensors":  {"digest": [...], "kind": [...], "nbytes": [...]},
     "adapters": {"name": [...], "digest": [...], "nbytes": [...], "config": [...], "layout": [...],
                  "record": TABLE, "verbatim": TABLE}}

with one entry an adapter, or a tensor, in each list, in the order of the packs. A pack is its header, the codes of its
adapters, and the bytes of its tensors, back to back, so that lengths alone say where each lies. A TABLE is a list of
objects by columns: {"keys": distinct sets of keys, "rows": number of the set of each object, "values": {key: [...]}};
the values of "verbatim" are numbers of tensors.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..adapters.dtypes import ITEMSIZE
from ..adapters.safetensors import MAX_DIMS
from ..errors import CheckpointError, unknown_adapter
from ..files import atomic_file
from ..text import name_fault, printable
from .format import INDEX, PACKS
from .planes import MOST

Json = Mapping[str, Any]
VERSION = 1
PLANES = "planes"  # the coding of a tensor in byte planes; that of one stored as it is, is ""
LIMIT = 256 << 20  # bytes of JSON; a million adapters have 200 MB
AGAIN = "Fetch the checkpoint again; or take the adapters out (lorashare-stream remove) and add them again."
DICTIONARY = Path(__file__).with_name("dictionary.json")  # data, a part of the format
_DIGEST = 32  # hex digits


@dataclass(frozen=True, slots=True)
class Pack:
    """A file of codes: its SHA-256 (hex), its bytes, and those of its safetensors header."""

    sha256: str
    nbytes: int
    start: int

    @property
    def file(self) -> str:
        """Its path in the checkpoint."""
        return f"{PACKS}/{self.sha256[:16]}.safetensors"


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

    def without(self, names: Collection[str]) -> Index:
        """What is left if adapters go: the others, and the tensors that one of them has, where they lie now.

        Raises:
            UnknownAdapterError: if one is not there.
        """
        for name in names:
            if name not in self.adapters:
                raise unknown_adapter(name, self.adapters)
        gone = set(names)
        adapters = {name: adapter for name, adapter in self.adapters.items() if name not in gone}
        needed = {digest for adapter in adapters.values() for digest in adapter.verbatim.values()}
        tensors = {digest: tensor for digest, tensor in self.tensors.items() if digest in needed}
        return Index(self.packs, adapters, tensors)


def write_index(path: Path, index: Index) -> int:
    """Write an index, atomically.

    Returns:
        Bytes of the file.
    """
    with atomic_file(path) as f:
        return f.write(index_bytes(index))


def index_bytes(index: Index) -> bytes:
    """The file of an index: it depends on what is in it alone, and on the version of zlib."""
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


def read_index(source: Path | bytes) -> Index:
    """Read an index, which may be a stranger's: every type, range and sum in it is checked.

    Args:
        source: the file, or its bytes.

    Raises:
        CheckpointError: if it is not what was written, or tells lies.
    """
    try:
        compressed = source if isinstance(source, bytes) else _bytes_of(source)
    except FileNotFoundError as e:
        raise CheckpointError(f"{INDEX} is missing", found=str(source), remedy="Fetch the checkpoint again.") from e
    try:
        return _parsed(json.loads(inflated(compressed)))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
        found = f"no {e}" if isinstance(e, KeyError) else str(e)
        remedy = "Fetch the checkpoint again, or compress its sources again."
        raise CheckpointError(
            f"{INDEX} is damaged, or no index of a coded checkpoint", found=found, remedy=remedy
        ) from e


def _bytes_of(path: Path) -> bytes:
    with path.open("rb", buffering=0) as f:
        return f.read(min(os.fstat(f.fileno()).st_size, LIMIT + 1))  # cut there, it is no whole stream


def _as_json(index: Index) -> dict[str, Any]:
    adapters, tensors = list(index.adapters.values()), list(index.tensors.values())
    held = {pack: [0, 0] for pack in index.packs}
    for i, locations in enumerate(([a.code for a in adapters], [t.at for t in tensors])):
        for at in locations:
            held[at.pack][i] += 1
    configs, config = _numbered([a.config for a in adapters])
    layouts, layout = _numbered([a.layout for a in adapters])
    kinds, kind = _numbered([[t.dtype, list(t.shape), t.coding] for t in tensors])
    number = {digest: i for i, digest in enumerate(index.tensors)}
    return {
        "version": VERSION,
        "packs": [[pack.sha256, pack.nbytes, pack.start, *counts] for pack, counts in held.items()],
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
    """The distinct ones of plain values, in the order in which they come, and the number of each value among them."""
    by_id: dict[int, int] = {}  # most adapters share one object: it is written once to be compared
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


def _parsed(root: Any) -> Index:
    _demand(root["version"] == VERSION, f"version {printable(root['version'])}, where this release reads {VERSION}")
    packs = [Pack(_hex(row[0], 64), _count(row[1]), _count(row[2])) for row in root["packs"]]
    _demand(len({p.file for p in packs}) == len(packs), "two packs of one name")
    adapters, tensors = root["adapters"], root["tensors"]
    names = [_name(name) for name in _list(adapters["name"])]
    _demand(len(set(names)) == len(names), "two adapters of one name")
    codes = list(zip(*(_column(adapters, key, len(names)) for key in ("nbytes", "digest")), strict=True))
    digests = [_hex(digest) for digest in _list(tensors["digest"])]
    _demand(len(set(digests)) == len(digests), "two tensors of one digest")
    stored = list(zip(_column(tensors, "nbytes", len(digests)), digests, strict=True))
    code_at, tensor_at = _locations(root["packs"], packs, codes, stored)
    kinds = [_kind(*kind) for kind in _list(root["kinds"])]
    kind_of = [_item(kinds, n) for n in _column(tensors, "kind", len(digests))]
    found = {at.digest: _tensor(kind, at) for kind, at in zip(kind_of, tensor_at, strict=True)}
    configs, layouts = _list(root["configs"]), _list(root["layouts"])
    _demand(all(isinstance(config, dict) for config in configs), "an adapter_config.json that is no object")
    columns = (
        names,
        [_item(configs, n) for n in _column(adapters, "config", len(names))],
        [_item(layouts, n) for n in _column(adapters, "layout", len(names))],
        _objects(adapters["record"], len(names)),
        code_at,
        [{k: _item(digests, n) for k, n in o.items()} for o in _objects(adapters["verbatim"], len(names))],
    )
    return Index(tuple(packs), {row[0]: CodedAdapter(*row) for row in zip(*columns, strict=True)}, found)


def _locations(
    rows: Sequence[Any], packs: Sequence[Pack], *parts: Sequence[tuple[Any, Any]]
) -> tuple[list[Location], ...]:
    """Where codes and tensors, (bytes, digest) in the order of packs, lie; each pack must be full, and none left."""
    located: tuple[list[Location], ...] = tuple([] for _ in parts)
    for row, pack in zip(rows, packs, strict=True):
        offset = pack.start
        for part, found, count in zip(parts, located, row[3:], strict=True):
            _demand(
                _count(count) <= len(part) - len(found), f"{pack.file} with {count} codes or tensors, of {len(part)}"
            )
            for nbytes, digest in part[len(found) : len(found) + count]:
                found.append(Location(pack, offset, _count(nbytes), _hex(digest)))
                offset += nbytes
        _demand(offset == pack.nbytes, f"{pack.file} of {pack.nbytes} bytes, with {offset} bytes in it")
    for part, found in zip(parts, located, strict=True):
        _demand(len(part) == len(found), f"{len(part)} codes or tensors, {len(found)} of them in packs")
    return located


def _kind(dtype: Any, shape: Any, coding: Any) -> tuple[str, tuple[int, ...], str]:
    _demand(isinstance(dtype, str) and dtype in ITEMSIZE, f"a dtype {printable(dtype)}")
    _demand(coding in ("", PLANES), f"a coding {printable(coding)}")
    _demand(len(_list(shape)) <= MAX_DIMS, f"a shape of {len(shape)} dimensions")
    return dtype, tuple(_count(n) for n in shape), coding


def _tensor(kind: tuple[str, tuple[int, ...], str], at: Location) -> StoredTensor:
    tensor, (dtype, shape, coding) = StoredTensor(*kind, at), kind
    fits = at.nbytes < tensor.nbytes <= MOST * at.nbytes if coding else at.nbytes == tensor.nbytes
    _demand(fits, f"{at.nbytes} bytes for a tensor {dtype} {[*shape]}")
    return tensor


def _objects(table: Any, count: int) -> list[dict[str, Any]]:
    """The objects of a table; each of its values is in one of them."""
    keys = [_list(row) for row in _list(table["keys"])]
    _demand(all(isinstance(key, str) for row in keys for key in row), "a key that is no text")
    columns: dict[str, Iterator[Any]] = {key: iter(_list(column)) for key, column in table["values"].items()}
    try:
        objects = [{key: next(columns[key]) for key in _item(keys, n)} for n in _column(table, "rows", count)]
    except StopIteration:
        raise ValueError("a column with too few values") from None
    _demand(not any(True for column in columns.values() for _ in column), "a column with too many values")
    return objects


def _column(table: Any, key: str, count: int) -> list[Any]:
    column = _list(table[key])
    _demand(len(column) == count, f"{len(column)} values of {key} for {count}")
    return column


def _item(values: Sequence[Any], number: Any) -> Any:
    return values[_count(number)]


def _list(value: Any) -> list[Any]:
    _demand(isinstance(value, list), f"{printable(value, 40)}, where a list should be")
    found: list[Any] = value
    return found


def _count(value: Any) -> int:
    _demand(type(value) is int and 0 <= value < 1 << 63, f"{printable(value, 40)}, where a count should be")
    return int(value)


def _name(value: Any) -> str:
    _demand(isinstance(value, str), f"an adapter name {printable(value, 40)}")
    fault = name_fault(value)
    _demand(fault is None, f"an adapter name {printable(value)!r}: {fault}")
    return str(value)


def _hex(value: Any, digits: int = _DIGEST) -> str:
    whole = isinstance(value, str) and len(value) == digits and not value.strip("0123456789abcdef")
    _demand(whole, f"{printable(value, 40)}, where {digits} hex digits should be")
    return str(value)


def _demand(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)
