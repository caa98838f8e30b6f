"""The coded checkpoint, read: its index at open, an adapter when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapters.dtypes import FLOATS, TORCH_DTYPES
from ..adapters.keys import SIDES, factor_key
from ..codec.code import decoded
from ..codec.directions import ALONE, Shared, from_bytes
from ..codec.factors import CodedModule
from ..errors import CheckpointError
from ..machine import memory
from ..text import printable
from .coded import index_of, meta_of
from .config import read_share_config, record_of
from .format import CONFIG, DIRECTIONS, INDEX, SKIPPED
from .index import CodedAdapter, Location, Pack
from .location import Place
from .packs import Read, check_pack, read_code, read_verbatim
from .reader import CheckpointReader, Tensors
from .records import AdapterMeta

LARGEST = 1 << 34  # numbers of an adapter; a foreign index may claim more
DECODED_BYTES = 40  # of each number, in memory while an adapter is decoded, at most
_SHARED_BYTES = 160  # of a number of a direction: classes are decoded one after the other, all of one at once
_TORCH = {stored: getattr(torch, name) for name, stored in TORCH_DTYPES.items()}


class AbsentMapping(Mapping[str, Any]):
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

    def keys(self) -> Any:
        """Raises CheckpointError, as all else."""
        raise self._refuse()

    items = values = keys

    def __repr__(self) -> str:
        return f"<{self._refuse()}>"


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
        self.components: Any = AbsentMapping("components")
        self._directions: dict[str, Shared] = {}

    def meta(self, name: str) -> AdapterMeta:
        """What is recorded of one adapter, as SHARE checkpoints have it in adapter_meta.json."""
        return meta_of(self.index.adapters[name], record_of(self.config).basis_digest)

    def loadings(self, name: str) -> Tensors:
        """There are none.

        Raises:
            CheckpointError: always.
        """
        raise AbsentMapping("loadings")._refuse()

    def modules(self, name: str) -> list[CodedModule]:
        """The coded modules of one adapter, from the index alone."""
        return _modules(self.index.adapters[name])

    def tensors(self, name: str) -> Tensors:
        """PEFT key -> tensor of one adapter, decoded, in the dtypes that it came with."""
        adapter = self.index.adapters[name]
        found: Tensors = {}
        read = self._read([adapter.code, *self._verbatim_parts(adapter)])
        try:
            modules = _modules(adapter)
            shared = self._shared(adapter, read)
            for m, a, b in decoded(read_code(read(adapter.code.pack), adapter), modules, shared):
                for side, array, dtype in zip(SIDES, (a, b), (m.dtype_a, m.dtype_b), strict=True):
                    found[factor_key(m.name, side)] = torch.from_numpy(array.copy()).to(_TORCH[dtype])
        except CheckpointError as e:
            e.adapter = name
            raise
        return found | self._verbatim(adapter, read)

    def _shared(self, adapter: CodedAdapter, read: Callable[[Pack], Read]) -> Shared:
        """The directions on which an adapter is coded: read once."""
        digest = adapter.verbatim.get(DIRECTIONS)
        if digest is None:
            return ALONE
        if digest not in self._directions:
            stored = read_verbatim(read(self.index.tensors[digest].at.pack), self.index, adapter, DIRECTIONS)
            self._directions[digest] = from_bytes(stored, memory() // _SHARED_BYTES)
        return self._directions[digest]

    def verbatim(self, name: str) -> Tensors:
        """PEFT key -> tensor, of what is kept verbatim of one adapter."""
        adapter = self.index.adapters[name]
        return self._verbatim(adapter, self._read(self._verbatim_parts(adapter)))

    def _verbatim_parts(self, adapter: CodedAdapter) -> list[Location]:
        known = self._directions.keys()
        return [self.index.tensors[digest].at for digest in adapter.verbatim.values() if digest not in known]

    def _verbatim(self, adapter: CodedAdapter, read: Callable[[Pack], Read]) -> Tensors:
        found: Tensors = {}
        for key, digest in adapter.verbatim.items():
            if key == DIRECTIONS:
                continue
            stored = self.index.tensors[digest]
            raw = bytearray(read_verbatim(read(stored.at.pack), self.index, adapter, key))
            empty = torch.empty(stored.shape, dtype=_TORCH[stored.dtype])
            found[key] = torch.frombuffer(raw, dtype=empty.dtype).reshape(stored.shape) if raw else empty
        return found

    def damaged(self) -> list[CheckpointError]:
        """Packs that are not what was written, by their SHA-256."""
        found = []
        for pack in self.index.packs:
            try:
                check_pack(self._file(pack.file), pack)
            except CheckpointError as e:
                found.append(e)
        return found

    def _read(self, parts: Sequence[Location]) -> Callable[[Pack], Read]:
        """Reads of packs, for some parts of them: those that lie near each other are read at once."""
        near, runs = self.place.near, list[list[Any]]()
        if not near:
            return lambda pack: partial(self._part, pack.file)
        for at in sorted(set(parts), key=lambda at: (at.pack.file, at.offset)):
            if runs and runs[-1][0] == at.pack and at.offset - runs[-1][2] <= near:
                runs[-1][2] = max(runs[-1][2], at.offset + at.nbytes)
            else:
                runs.append([at.pack, at.offset, at.offset + at.nbytes])
        held: dict[tuple[str, int], memoryview] = {}

        def read(pack: Pack, offset: int, count: int) -> memoryview:
            first, end = next((a, b) for p, a, b in runs if p == pack and a <= offset and offset + count <= b)
            if (pack.file, first) not in held:
                held[pack.file, first] = memoryview(self._part(pack.file, first, end - first))
            return held[pack.file, first][offset - first : offset - first + count]

        return lambda pack: partial(read, pack)

    def _part(self, relative: str, offset: int, count: int) -> bytes:
        try:
            return self.place.read(relative, offset, count)
        except CheckpointError:  # a FileNotFoundError too, where nobody knows whether there is such a file
            raise
        except FileNotFoundError as e:
            raise CheckpointError(
                f"{printable(relative)} is missing", found=self.place,
                remedy="If the checkpoint was replaced, open it again; else fetch it again.",
            ) from e  # fmt: skip

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
            if not sound or not {m.dtype_a, m.dtype_b} <= {*FLOATS} or not isinstance(m.name, str):
                raise ValueError(printable(m, 200))
        numbers = sum(m.rank * (m.d_out + m.d_in) for m in modules)
        if numbers > min(LARGEST, memory() // DECODED_BYTES):
            raise ValueError(f"{numbers} numbers, which this machine's memory does not hold")
    except (TypeError, ValueError) as e:
        raise CheckpointError("a layout that cannot be that of an adapter", adapter=adapter.name, found=str(e)) from e
    return modules


def open_checkpoint(place: Place) -> CheckpointReader:
    """Open a checkpoint, SHARE or coded.

    Raises:
        CheckpointError: if it is not whole.
    """
    return CodedReader(place) if read_share_config(place.root).coded else CheckpointReader(place)
