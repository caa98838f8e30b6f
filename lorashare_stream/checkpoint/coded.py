"""The coded checkpoint: what is recorded of its adapters, and how it is read.

share_config.json        as in a SHARE checkpoint, with one field more, `coded`, at which lorashare raises
packs/<id>.safetensors   codes, and tensors that are kept verbatim
index.json.xz            configurations, layouts, records, and where each code lies
skipped.json             adapters that were left out, with reasons; only if there are some
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapters.dtypes import TORCH_DTYPES
from ..adapters.folder import digest_files, open_tensors, tensor_records
from ..adapters.keys import factor_key
from ..adapters.safetensors import TensorRecord
from ..codec.code import decoded
from ..codec.factors import CodedModule
from ..errors import CheckpointError
from ..text import printable
from .config import read_share_config
from .format import ADAPTERS, CODE, CONFIG, INDEX, OURS, SKIPPED, VERBATIM
from .index import CodedAdapter, Index, read_index
from .location import Place
from .packs import Coded, Verbatim, digest_of_tensor, read_code, read_verbatim
from .reader import CheckpointReader, Tensors
from .records import metas_of

VERSION = 1  # of gauge, quantiser, tables and stream
LARGEST = 1 << 34  # numbers of an adapter; a size that a foreign index may claim
_ELSEWHERE = {"basis_digest", "verbatim", "files", "layout", "delta_norm", "notes"}  # facts that no record repeats
_PATH = "path"  # in a record: the original_adapter_path, if it is not the source id
_DIGITS = 6  # of a recorded error
_TORCH = {stored: getattr(torch, name) for name, stored in TORCH_DTYPES.items()}


def staged_adapters(root: Path, names: Iterable[str]) -> Iterator[Coded]:
    """Adapters of a staged checkpoint that lie in folders of their own, to be packed."""
    for meta in metas_of(root, names):
        ours, folder = meta[OURS], root / ADAPTERS / meta["adapter_name"]
        record = {key: value for key, value in ours.items() if key not in _ELSEWHERE}
        record |= {key: float(f"{record[key]:.{_DIGITS}g}") for key in ("relative_error", "worst_module_error")}
        record |= {"notes": ours["notes"]} if ours["notes"] else {}
        if meta["original_adapter_path"] != record["source_id"]:
            record[_PATH] = meta["original_adapter_path"]
        path = folder / VERBATIM
        verbatim = {r.name: _verbatim(path, r) for r in tensor_records((path,))} if ours["verbatim"] else {}
        yield Coded(meta["adapter_name"], meta["original_config"], ours["layout"], record, folder / CODE, verbatim)


def _verbatim(path: Path, record: TensorRecord) -> Verbatim:
    chunks = partial(_chunks, path, record)
    return Verbatim(record.dtype, record.shape, chunks, digest_of_tensor(record.dtype, record.shape, chunks()))


def _chunks(path: Path, record: TensorRecord) -> Iterator[memoryview]:
    with open_tensors((path,)) as tensors:
        yield from tensors.chunks(record)


def meta_of(adapter: CodedAdapter, key: str) -> dict[str, Any]:
    """What an adapter_meta.json would say of an adapter; `key` is of the checkpoint."""
    facts = {"notes": [], **adapter.record}
    path = facts.pop(_PATH, facts["source_id"])
    return {
        "adapter_name": adapter.name,
        "original_config": adapter.config,
        "original_adapter_path": path,
        OURS: {**facts, "basis_digest": key, "verbatim": sorted(adapter.verbatim)},
    }


def index_of(root: Path, coded: Mapping[str, Any]) -> Index:
    """The index of a checkpoint, which must be that of its configuration.

    Args:
        root: of the checkpoint.
        coded: the field of its share_config.json.

    Raises:
        CheckpointError: if it is not, or not what was written.
    """
    if coded.get("version") != VERSION:
        raise CheckpointError(
            "a coded checkpoint of another version", found=printable(coded.get("version")), expected=VERSION,
            remedy="Read it by the version of lorashare-stream that wrote it.",
        )  # fmt: skip
    index = read_index(root / INDEX)
    if digest_files([root / INDEX]) != coded.get("index"):
        raise CheckpointError(
            f"{INDEX} belongs to another {CONFIG}", found=root,
            remedy="If the checkpoint was replaced, open it again; else fetch it again.",
        )  # fmt: skip
    return index


class Refused(Mapping[str, Any]):
    """What a SHARE checkpoint has, and a coded one has not: any use of it says so."""

    def __init__(self, what: str) -> None:
        self._what = what

    def _refuse(self) -> CheckpointError:
        return CheckpointError(
            f"a coded checkpoint has no {self._what}: each adapter is coded alone",
            remedy="Use reconstruct(name); or compress the sources by -k for a SHARE checkpoint.",
        )

    def __getitem__(self, key: str) -> Any:
        raise self._refuse()

    def __iter__(self) -> Iterator[str]:
        raise self._refuse()

    def __len__(self) -> int:
        raise self._refuse()

    def __contains__(self, key: object) -> bool:
        raise self._refuse()


class CodedReader(CheckpointReader):
    """An open coded checkpoint: its index at open, an adapter when it is asked for.

    Args:
        place: where it lies.

    Raises:
        CheckpointError: if it is not whole.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.config = place, read_share_config(place.root)
        self._file(INDEX)
        self.index = index_of(place.root, self.config.coded)
        self.names = dict.fromkeys(self.config.adapter_names)
        if self.names.keys() != self.index.adapters.keys():
            raise CheckpointError(f"{CONFIG} and {INDEX} name other adapters", found=place)
        self.components: Any = Refused("components")

    def meta(self, name: str) -> dict[str, Any]:
        """What is recorded of one adapter, as SHARE checkpoints have it in adapter_meta.json."""
        return meta_of(self.index.adapters[name], str(self.config.ours.get("basis_digest")))

    def loadings(self, name: str) -> Tensors:
        """There are none.

        Raises:
            CheckpointError: always.
        """
        raise Refused("loadings")._refuse()

    def tensors(self, name: str) -> Tensors:
        """PEFT key -> tensor of one adapter, decoded, in the dtypes that it came with."""
        adapter = self.index.adapters[name]
        found: Tensors = {}
        try:
            modules = _modules(adapter)
            for m, a, b in decoded(read_code(self._read(adapter.code.pack.file), adapter), modules):
                for side, array, dtype in (("A", a, m.dtype_a), ("B", b, m.dtype_b)):
                    tensor = torch.from_numpy(array.copy()).to(_TORCH[dtype])
                    found[factor_key(m.name, side)] = tensor  # type: ignore[arg-type]
        except CheckpointError as e:
            e.adapter = name
            raise
        return found | self.verbatim(name)

    def verbatim(self, name: str) -> Tensors:
        """PEFT key -> tensor, of what is kept verbatim of one adapter."""
        adapter = self.index.adapters[name]
        found: Tensors = {}
        for key, digest in adapter.verbatim.items():
            stored = self.index.tensors[digest]
            raw = bytearray(read_verbatim(self._read(stored.at.pack.file), self.index, adapter, key))
            empty = torch.empty(stored.shape, dtype=_TORCH[stored.dtype])
            found[key] = torch.frombuffer(raw, dtype=empty.dtype).reshape(stored.shape) if raw else empty
        return found

    def _read(self, relative: str) -> Callable[[int, int], bytes]:
        return partial(self._part, relative)

    def _part(self, relative: str, offset: int, count: int) -> bytes:
        try:
            return self.place.read(relative, offset, count)
        except FileNotFoundError as e:
            raise CheckpointError(
                f"{printable(relative)} is missing", found=self.place, remedy="Fetch the checkpoint again."
            ) from e

    def _files(self) -> dict[str, Path]:
        found = {relative: self._file(relative) for relative in (CONFIG, INDEX, *(p.file for p in self.index.packs))}
        skipped = self._optional(SKIPPED)
        return found if skipped is None else {**found, SKIPPED: skipped}


def _modules(adapter: CodedAdapter) -> list[CodedModule]:
    """The modules of an adapter, from its layout, which may be a stranger's."""
    try:
        modules = [CodedModule(*row) for row in adapter.layout]
        for m in modules:
            whole = [m.rank, m.d_out, m.d_in, m.experts]
            sound = all(type(n) is int and 0 < n < LARGEST for n in whole) and m.rank % m.experts == 0
            sound = sound and isinstance(m.scale, float | int) and 0 < abs(m.scale) < float("inf")
            if not sound or not {m.dtype_a, m.dtype_b} <= {"F64", "F32", "F16", "BF16"} or not isinstance(m.name, str):
                raise ValueError(printable(m, 200))
        if sum(m.rank * (m.d_out + m.d_in) for m in modules) > LARGEST:
            raise ValueError(f"more than {LARGEST} numbers")
    except (TypeError, ValueError) as e:
        raise CheckpointError("a layout that cannot be that of an adapter", adapter=adapter.name, found=str(e)) from e
    return modules


def open_checkpoint(place: Place) -> CheckpointReader:
    """Open a checkpoint, SHARE or coded.

    Raises:
        CheckpointError: if it is not whole.
    """
    return CodedReader(place) if read_share_config(place.root).coded else CheckpointReader(place)
