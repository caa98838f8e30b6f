"""An open checkpoint, SHARE or coded: configuration, bases or index are read at open, an adapter when it is asked for.

It lies in a folder or on the Hub. Checkpoints that lorashare wrote are read as well. In a SHARE checkpoint of ours,
components and every adapter carry the digest of the basis that they belong to, so that two bases are never mixed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from ..adapters.dtypes import FLOATS, TORCH_DTYPES
from ..adapters.folder import digest_files
from ..adapters.keys import SIDES, factor_key, split_group_id
from ..codec.code import decoded
from ..codec.directions import ALONE, Shared, from_bytes
from ..codec.factors import CodedModule
from ..errors import CheckpointError
from ..machine import memory
from ..schema import read_checked
from ..text import has_surrogates, is_component, listed, printable
from .coded import meta_of
from .config import SHAREConfig, read_share_config, record_of
from .format import ADAPTERS, ANEW, COMPONENTS, CONFIG, DIRECTIONS, INDEX, LOADINGS, META, SKIPPED, SPECTRUM, VERBATIM
from .index import CodedAdapter, Location, index_of
from .location import Folder, Place
from .packs import Read, check_pack, read_code, read_verbatim
from .records import REPAIR, Meta

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
LARGEST = 1 << 34  # numbers of an adapter; a foreign index may claim more
DECODED_BYTES = 40  # of each number, in memory while an adapter is decoded, at most
_SHARED_BYTES = 160  # of a number of a direction: classes are decoded one after the other, all of one at once
_TORCH = {stored: getattr(torch, name) for name, stored in TORCH_DTYPES.items()}


class LazyMapping(Mapping[str, T]):
    """Names -> what is read for a name when it is asked for; nothing is kept."""

    def __init__(self, names: Mapping[str, None], load: Callable[[str], T]) -> None:
        self._names, self._load = names, load

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class AbsentMapping(Mapping[str, Any]):
    """What a SHARE checkpoint has, and a coded one has not: any use is a CheckpointError that says so."""

    def __init__(self, what: str) -> None:
        self._what = what

    def _refuse(self, *_: object) -> NoReturn:
        raise _absent(self._what)

    __getitem__ = __iter__ = __len__ = __contains__ = keys = items = values = _refuse

    def __repr__(self) -> str:
        return f"<{_absent(self._what)}>"


def _absent(what: str) -> CheckpointError:
    return CheckpointError(
        f"a coded checkpoint has no {what}: each adapter is coded alone",
        remedy="Use reconstruct(name); or compress the sources by -k for a SHARE checkpoint.",
    )


class CheckpointReader:
    """An open SHARE checkpoint.

    Args:
        place: where it lies.
        config: its share_config.json.

    Raises:
        CheckpointError: if it is not whole.
    """

    def __init__(self, place: Place, config: SHAREConfig) -> None:
        self.place, self.config = place, config
        self.names = self._adapter_names()
        self.components = self._components()

    def _adapter_names(self) -> dict[str, None]:
        there = self.place.adapters()
        names = self.config.adapter_names or sorted(there or ())
        unsafe = [name for name in names if not _is_folder_name(name)]
        if unsafe:
            raise CheckpointError(
                "adapter names that are no path components",
                found=listed(unsafe),
                remedy="Do not trust this checkpoint.",
            )
        missing = [name for name in names if there is not None and name not in there]
        if missing:
            raise CheckpointError("adapters are missing", found=listed(missing), remedy="Fetch the checkpoint again.")
        if not names and there is None:
            raise CheckpointError(f"{CONFIG} names no adapters", found=self.place)
        return dict.fromkeys(names)

    def _components(self) -> Mapping[str, torch.Tensor]:
        """Group id -> V (d, k), memory-mapped from one open file: a replaced checkpoint does not change it."""
        file = _open(self._file(COMPONENTS))
        self._check_digest((file.metadata() or {}).get("basis_digest"), COMPONENTS)
        return LazyMapping(dict.fromkeys(file.keys()), file.get_tensor)

    def _file(self, relative: str) -> Path:
        """A file that must be there."""
        path = self._optional(relative)
        if path is None:
            raise CheckpointError(f"{printable(relative)} is missing", found=self.place, remedy=ANEW)
        return path

    def _optional(self, relative: str) -> Path | None:
        try:
            return self.place.file(relative)
        except CheckpointError:  # a FileNotFoundError too, where nobody knows whether there is such a file
            raise
        except FileNotFoundError:
            return None

    def _check_digest(self, found: str | None, file: str) -> None:
        expected = self.config.record.basis_digest if self.config.record else None
        if None not in (expected, found) and found != expected:  # lorashare, saving ours again, drops the digests
            raise CheckpointError(
                f"{printable(file)} belongs to another basis: {self.place.mixed}",
                found=found,
                expected=expected,
            )

    def meta(self, name: str) -> Meta:
        """What is recorded of one adapter, in adapter_meta.json; it may be lorashare's, which does without."""
        relative = f"{ADAPTERS}/{name}/{META}"
        path = self._file(relative) if self.config.record else self._optional(relative)
        if path is None:
            return Meta()
        meta = read_checked(path, Meta, REPAIR, name)
        self._check_digest(meta.ours.basis_digest if meta.ours else None, f"adapters/{name}")
        return meta

    def adapter_config(self, name: str) -> dict[str, Any]:
        """The adapter_config.json that one adapter came with."""
        return self.meta(name).original_config

    def tensors(self, name: str) -> Tensors:
        """PEFT key -> tensor of one adapter: V L for what is shared, in the dtype of V, and what is kept verbatim."""
        return restored(name, self.components, self.loadings(name)) | self.verbatim(name)

    def loadings(self, name: str) -> Tensors:
        """Group id -> loadings (k, r) of one adapter."""
        path = self._file(f"{ADAPTERS}/{name}/{LOADINGS}")
        loadings = _load(path)
        self._demand_whole(name, path)  # after: what was read before it is of the basis that it names, or one before
        return loadings

    def verbatim(self, name: str) -> Tensors:
        """PEFT key -> tensor, of what is kept verbatim of one adapter."""
        path = self._verbatim_file(name)
        tensors = {} if path is None else _load(path)
        self._demand_whole(name, path)
        return tensors

    def _demand_whole(self, name: str, path: Path | None) -> None:
        """Check the basis that an adapter is of, and a file of it by the digest in its record."""
        for _ in range(2):  # a checkpoint may have taken the place of this one between record and file
            ours, file = self.meta(name).ours, "" if path is None else path.name
            digest = None if ours is None else ours.files.get(file)
            if path is None or digest in (None, digest_files([path])):
                return
        raise CheckpointError(f"{file} is damaged", adapter=name, remedy=REPAIR)

    def _verbatim_file(self, name: str) -> Path | None:
        ours, relative = self.meta(name).ours, f"{ADAPTERS}/{name}/{VERBATIM}"
        if ours is None:
            return self._optional(relative)  # lorashare does not say
        return self._file(relative) if ours.verbatim else None  # not asked for: it would be a request

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder with the whole checkpoint: its own, or one of links to the files of one on the Hub.

        The cache's folder holds what anybody has fetched of the repository, and not surely all.
        """
        if isinstance(self.place, Folder):
            yield self.place.root
            return
        self.place.fetch()
        with tempfile.TemporaryDirectory(prefix="lorashare-stream-") as private:
            folder = Path(private, "checkpoint")  # with the modes of any other folder, since it is copied
            for relative, path in self._files():
                if path is not None:
                    (folder / relative).parent.mkdir(parents=True, exist_ok=True)
                    (folder / relative).symlink_to(path)
            yield folder

    def _files(self) -> Iterator[tuple[str, Path | None]]:
        """Files that the checkpoint may have: path in it -> path on this machine, None of those that it has not."""
        for name in self.names:
            inner = f"{ADAPTERS}/{name}"
            yield f"{inner}/{VERBATIM}", self._verbatim_file(name)
            yield f"{inner}/{LOADINGS}", self._file(f"{inner}/{LOADINGS}")
            yield f"{inner}/{META}", self._optional(f"{inner}/{META}")
        yield from ((needed, self._file(needed)) for needed in (COMPONENTS, CONFIG))
        yield from ((file, self._optional(file)) for file in (SPECTRUM, SKIPPED))

    def damaged(self) -> list[CheckpointError]:
        """Errors of files that many adapters share, by digests; only packs are such."""
        return []


class CodedReader(CheckpointReader):
    """An open coded checkpoint: a `CheckpointReader` without components and loadings."""

    def __init__(self, place: Place, config: SHAREConfig) -> None:
        self.place, self.config = place, config
        self._file(INDEX)
        self.index = index_of(place.root, config.coded)
        self.names = dict.fromkeys(config.adapter_names)
        if self.names.keys() != self.index.adapters.keys():
            raise CheckpointError(f"{CONFIG} and {INDEX} name other adapters", found=place)
        self.components = AbsentMapping("components")
        self._directions: dict[str, Shared] = {}

    def meta(self, name: str) -> Meta:
        """What is recorded of one adapter, as SHARE checkpoints have it in adapter_meta.json."""
        return meta_of(self.index.adapters[name], record_of(self.config).basis_digest)

    def loadings(self, name: str) -> Tensors:
        """Raises CheckpointError: there are none."""
        raise _absent("loadings")

    def tensors(self, name: str) -> Tensors:
        """PEFT key -> tensor of one adapter, decoded, in the dtypes that it came with."""
        adapter = self.index.adapters[name]
        found: Tensors = {}
        read = self._reading([adapter.code, *self._verbatim_parts(adapter)])
        try:
            modules, shared = modules_of(adapter), self._shared(adapter, read)
            for m, a, b in decoded(read_code(read, adapter), modules, shared):
                for side, array, dtype in zip(SIDES, (a, b), (m.dtype_a, m.dtype_b), strict=True):
                    found[factor_key(m.name, side)] = torch.from_numpy(array.copy()).to(_TORCH[dtype])
        except CheckpointError as e:
            e.adapter = name
            raise
        return found | self._verbatim(adapter, read)

    def _shared(self, adapter: CodedAdapter, read: Read) -> Shared:
        """The directions on which an adapter is coded: read once."""
        digest = adapter.verbatim.get(DIRECTIONS)
        if digest is None:
            return ALONE
        if digest not in self._directions:
            stored = read_verbatim(read, self.index, adapter, DIRECTIONS)
            self._directions[digest] = from_bytes(stored, memory() // _SHARED_BYTES)
        return self._directions[digest]

    def verbatim(self, name: str) -> Tensors:
        """PEFT key -> tensor, of what is kept verbatim of one adapter."""
        adapter = self.index.adapters[name]
        return self._verbatim(adapter, self._reading(self._verbatim_parts(adapter)))

    def _verbatim_parts(self, adapter: CodedAdapter) -> list[Location]:
        known = self._directions.keys()
        return [self.index.tensors[digest].at for digest in adapter.verbatim.values() if digest not in known]

    def _verbatim(self, adapter: CodedAdapter, read: Read) -> Tensors:
        found: Tensors = {}
        for key, digest in adapter.verbatim.items():
            if key != DIRECTIONS:
                stored = self.index.tensors[digest]
                raw = bytearray(read_verbatim(read, self.index, adapter, key))
                empty = torch.empty(stored.shape, dtype=_TORCH[stored.dtype])
                found[key] = torch.frombuffer(raw, dtype=empty.dtype).reshape(stored.shape) if raw else empty
        return found

    def damaged(self) -> list[CheckpointError]:
        """Errors of packs, by their SHA-256."""
        found = []
        for pack in self.index.packs:
            try:
                check_pack(self._file(pack.file), pack)
            except CheckpointError as e:
                found.append(e)
        return found

    def _reading(self, parts: Sequence[Location]) -> Read:
        """A `Read` of some parts of packs; those near each other are read at once where that is cheaper."""
        near = self.place.near
        if not near:
            return self._read
        runs: list[tuple[str, int, int]] = []  # of a pack: its file, first byte and end
        for at in sorted(set(parts), key=lambda at: (at.pack.file, at.offset)):
            file, first, end = runs[-1] if runs else ("", 0, 0)
            if file == at.pack.file and at.offset - end <= near:
                runs[-1] = file, first, max(end, at.offset + at.nbytes)
            else:
                runs.append((at.pack.file, at.offset, at.offset + at.nbytes))
        held: dict[tuple[str, int, int], bytes] = {}

        def read(file: str, offset: int, count: int) -> bytes:
            run = next(r for r in runs if r[0] == file and r[1] <= offset and offset + count <= r[2])
            if run not in held:
                held[run] = self._read(file, run[1], run[2] - run[1])
            return held[run][offset - run[1] : offset - run[1] + count]

        return read

    def _read(self, relative: str, offset: int, count: int) -> bytes:
        try:
            return self.place.read(relative, offset, count)
        except CheckpointError:  # a FileNotFoundError too, where nobody knows whether there is such a file
            raise
        except FileNotFoundError as e:
            raise CheckpointError(
                f"{printable(relative)} is missing", found=self.place,
                remedy="If the checkpoint was replaced, open it again; else fetch it again.",
            ) from e  # fmt: skip

    def _files(self) -> Iterator[tuple[str, Path | None]]:
        yield from ((file, self._file(file)) for file in (CONFIG, INDEX, *(pack.file for pack in self.index.packs)))
        yield SKIPPED, self._optional(SKIPPED)


def open_checkpoint(place: Place) -> CheckpointReader:
    """Open a checkpoint, SHARE or coded.

    Raises:
        CheckpointError: if it is not whole.
    """
    config = read_share_config(place.root)
    return CodedReader(place, config) if config.coded else CheckpointReader(place, config)


def restored(name: str, components: Mapping[str, torch.Tensor], loadings: Mapping[str, torch.Tensor]) -> Tensors:
    """V L of each group of an adapter, by PEFT key and oriented as PEFT has it: lora_A (r, d_in), lora_B (d_out, r).

    Raises:
        CheckpointError: if loadings fit no components.
    """
    found: Tensors = {}
    for group, loading in loadings.items():
        try:
            module, side = split_group_id(group)
            v = components[group]
            if v.ndim != 2 or loading.ndim != 2 or v.shape[1] != loading.shape[0]:
                raise ValueError(f"components {list(v.shape)}, loadings {list(loading.shape)}")
        except (ValueError, KeyError) as e:
            raise CheckpointError("loadings that fit no components", adapter=name, key=group, found=str(e)) from e
        vectors = (v.float() @ loading.float()).to(v.dtype)  # (d, r)
        found[factor_key(module, side)] = (vectors.T if side == "A" else vectors).contiguous()
    return found


def modules_of(adapter: CodedAdapter) -> list[CodedModule]:
    """The modules of a coded adapter, from its layout, which may be a stranger's.

    Raises:
        CheckpointError: if no adapter can have it, or this machine's memory does not hold it.
    """
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


def _is_folder_name(name: str) -> bool:
    """Whether a foreign name can be that of a folder here."""
    try:
        return is_component(name) and len(os.fsencode(name)) <= 255
    except UnicodeEncodeError:
        return False


def _open(path: Path, remedy: str = ANEW) -> Any:
    try:
        with path.open("rb") as f:  # safetensors takes no name that is not UTF-8
            return safe_open(f"/dev/fd/{f.fileno()}" if has_surrogates(str(path)) else path, framework="pt")
    except FileNotFoundError:
        where = printable(path.parent)
        raise CheckpointError(f"{printable(path.name)} is missing", found=where, remedy=remedy) from None
    except (SafetensorError, OSError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{printable(path.name)} cannot be read", found=str(e), remedy=remedy) from e


def _load(path: Path) -> Tensors:
    with _open(path, REPAIR) as f:
        return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - safe_open is no mapping
