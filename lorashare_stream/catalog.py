"""What is there, from headers and configurations alone: modules, extras, and every adapter that is refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from . import peftconfig
from .adapterfiles import FileFact, file_fact, read_config, tensor_records, weight_files
from .dtypes import FLOATS
from .errors import AdapterError
from .keys import SIDES, Key, Side, factor_key, foreign_kind, parse_key
from .names import unique_names
from .sources import Source
from .tensorfile import TensorRecord

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted layer that is shared: lora_A (r, d_in) and lora_B (d_out, r), both 2-D and of float type."""

    name: str
    a: TensorRecord
    b: TensorRecord

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    def record(self, side: Side) -> TensorRecord:
        """The tensor of one side."""
        return self.a if side == "A" else self.b

    def dim(self, side: Side) -> int:
        """D of one side: d_in for A, d_out for B."""
        return self.a.shape[1] if side == "A" else self.b.shape[0]


@dataclass(frozen=True)
class Layout:
    """The tensors of an adapter. Adapters saved by one script have equal headers and share one layout.

    Attributes:
        modules: what is compressed.
        extras: (key as PEFT saves it, record) of what is kept verbatim.
        notes: LoRA tensors among the extras, with the reason why they are not shared.
        digest: of the raw headers.
    """

    modules: tuple[Module, ...]
    extras: tuple[tuple[str, TensorRecord], ...]
    notes: tuple[tuple[str, str], ...]
    digest: str

    @cached_property
    def by_name(self) -> dict[str, Module]:
        """Modules by name."""
        return {m.name: m for m in self.modules}

    @cached_property
    def in_file_order(self) -> tuple[tuple[TensorRecord, str | None, Side | None], ...]:
        """All tensors as they lie in the files, with module and side of those that are shared."""
        shared = [(m.record(side), m.name, side) for m in self.modules for side in SIDES]
        everything = [*shared, *((record, None, None) for _, record in self.extras)]
        return tuple(sorted(everything, key=lambda item: (item[0].file, item[0].offset)))

    @cached_property
    def lora_bytes(self) -> int:
        """Bytes of the tensors that are compressed."""
        return sum(m.a.nbytes + m.b.nbytes for m in self.modules)

    @cached_property
    def extra_bytes(self) -> int:
        """Bytes of the tensors that are kept verbatim."""
        return sum(record.nbytes for _, record in self.extras)


@dataclass(frozen=True)
class Entry:
    """An adapter that was admitted to the catalog.

    Attributes:
        name: unique among all, one path component.
        source_id, folder: where it comes from.
        files: its weight files as they were.
        layout: its tensors.
        scales: PEFT's factor s of each module, in the order of `layout.modules`.
        base_model: the base model that its configuration names, if it names one.
        config_digest: SHA-256 of its configuration's values.
    """

    name: str
    source_id: str
    folder: Path
    files: tuple[FileFact, ...]
    layout: Layout
    scales: tuple[float, ...]
    base_model: str | None
    config_digest: str

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its weight files."""
        return tuple(f.path for f in self.files)

    @cached_property
    def scale_of(self) -> Mapping[str, float]:
        """PEFT's factor s by module."""
        return {m.name: s for m, s in zip(self.layout.modules, self.scales, strict=True)}


@dataclass(frozen=True)
class Catalog:
    """Entries in the order of the sources, and one error for each adapter that was refused."""

    entries: tuple[Entry, ...]
    refused: tuple[AdapterError, ...] = field(default=())


def catalog(sources: Sequence[Source], admitted: Mapping[str, str] | None = None) -> Catalog:
    """Read the headers and configurations of all sources.

    Args:
        sources: what `sources.resolve` gives.
        admitted: name -> source id of adapters that a workspace already holds: they keep their names.
    """
    entries: list[Entry] = []
    refused: list[AdapterError] = []
    shared: dict[Any, Any] = {}
    for source, name in zip(sources, _names(sources, admitted or {}), strict=True):
        try:
            entries.append(read_entry(source, name, shared))
        except AdapterError as e:
            e.adapter = name
            refused.append(e)
        except OSError as e:
            refused.append(AdapterError("cannot be read", adapter=name, found=e.strerror or str(e)))
    kept, disagreeing = _agreeing(entries)
    return Catalog(tuple(kept), (*refused, *disagreeing))


def _names(sources: Sequence[Source], admitted: Mapping[str, str]) -> list[str]:
    known: dict[tuple[str, str | None], str] = {}
    for name, source_id in admitted.items():
        known[source_id, name] = name  # named so by the user, again
        known.setdefault((source_id, None), name)
    fresh = [s for s in sources if (s.id, s.name) not in known]
    given = iter(unique_names([(s.id, s.wanted_name) for s in fresh], admitted))
    return [known[s.id, s.name] if (s.id, s.name) in known else next(given) for s in sources]


def read_entry(source: Source, name: str, shared: dict[Any, Any] | None = None) -> Entry:
    """One adapter's header and configuration.

    Args:
        source, name: the adapter.
        shared: a store for equal parts, so that a thousand equal headers are kept once.

    Raises:
        AdapterError: if it cannot be compressed or kept.
    """
    shared = {} if shared is None else shared
    config = read_config(source.path)
    peftconfig.check_lora(config)
    paths = weight_files(source.path)
    files = tuple(file_fact(p) for p in paths)
    records, digest = tensor_records(paths)
    layout = shared[digest] if digest in shared else shared.setdefault(digest, read_layout(records, digest))
    _check_ranks(layout, config)
    scales = tuple(peftconfig.scale(config, m.name) for m in layout.modules)
    config_digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    base = peftconfig.base_model(config)
    return Entry(name, source.id, source.path, files, layout, shared.setdefault(scales, scales), base, config_digest)


def read_layout(records: Sequence[TensorRecord], digest: str) -> Layout:
    """Sort an adapter's tensors into shared modules and extras.

    Raises:
        AdapterError: for another kind of file, empty tensors, clashing keys, or several adapters in one file.
    """
    kind = foreign_kind(r.name for r in records)
    if kind is not None:
        raise AdapterError(f"not a PEFT LoRA: the keys are those of {kind}", key=records[0].name, expected="LORA keys")
    keyed: dict[str, tuple[Key, TensorRecord]] = {}
    for record in records:
        key = parse_key(record.name)
        if 0 in record.shape:
            raise AdapterError(
                "an empty tensor: ZeRO-3 or FSDP shards that were not gathered before saving",
                key=record.name,
                found=list(record.shape),
                remedy="Gather the weights and save the adapter again.",
            )
        if key.canonical in keyed:
            raise AdapterError(
                "two keys mean the same tensor", key=record.name, found=keyed[key.canonical][1].name, expected="one key"
            )
        keyed[key.canonical] = key, record
    named = sorted({key.adapter for key, _ in keyed.values() if key.adapter is not None})
    if len(named) > 1:
        raise AdapterError("several adapters in one file", found=named, remedy="Save each into a folder of its own.")
    if not any(".lora_" in canonical for canonical in keyed):
        raise AdapterError(
            "holds no LoRA tensors", found=sorted(keyed)[:3] or "no tensors", expected="lora_A and lora_B"
        )
    return _paired(keyed, digest)


def _paired(keyed: Mapping[str, tuple[Key, TensorRecord]], digest: str) -> Layout:
    modules: list[Module] = []
    notes: list[tuple[str, str]] = []
    names = dict.fromkeys(key.module for key, _ in keyed.values() if key.module is not None)
    for name in sorted(names):
        pair = {side: keyed[factor_key(name, side)][1] for side in SIDES if factor_key(name, side) in keyed}
        reason = _unshared(pair)
        if reason is None:
            modules.append(Module(name, pair["A"], pair["B"]))
        else:
            notes += [(factor_key(name, side), reason) for side in pair]
    shared = {factor_key(m.name, side) for m in modules for side in SIDES}
    extras = tuple((canonical, record) for canonical, (_, record) in sorted(keyed.items()) if canonical not in shared)
    return Layout(tuple(modules), extras, tuple(notes), digest)


def _unshared(pair: Mapping[Side, TensorRecord]) -> str | None:
    """Why a module's factors are kept verbatim, or None if they are shared."""
    if len(pair) < 2:
        return f"lora_{'B' if 'A' in pair else 'A'} is missing"
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        return f"{len(a.shape)}-D lora_A and {len(b.shape)}-D lora_B (a convolution)"
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        return f"dtype {a.dtype}"
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            "lora_A and lora_B of a module differ in rank",
            key=b.name,
            found=f"lora_B {list(b.shape)}",
            expected=f"lora_A {list(a.shape)}: rank {a.shape[0]}",
            remedy="Save the adapter again, or leave it out.",
        )
    return None


def _check_ranks(layout: Layout, config: Mapping[str, Any]) -> None:
    """Refuse tensors whose rank is not the configured one: PEFT would not load them."""
    stacked = bool(config.get("target_parameters"))  # experts in one tensor: E * r rows
    for module in layout.modules:
        expected = peftconfig.rank(config, module.name)
        if module.rank != expected and not (stacked and module.rank % expected == 0):
            raise AdapterError(
                "the tensors and adapter_config.json disagree on the rank",
                key=module.a.name,
                found=module.rank,
                expected=f"r = {expected}",
                remedy="Mend r or rank_pattern, or leave the adapter out.",
            )


def _agreeing(entries: Sequence[Entry]) -> tuple[list[Entry], list[AdapterError]]:
    """Split off adapters of another base model, or with another d in some group, than most have."""
    base = _commonest(Counter(e.base_model for e in entries if e.base_model is not None))
    layouts = {e.layout.digest: e.layout for e in entries}
    uses = Counter(e.layout.digest for e in entries)
    dims: dict[tuple[str, Side], Counter[int]] = {}
    for digest, layout in layouts.items():
        for module in layout.modules:
            for side in SIDES:
                dims.setdefault((module.name, side), Counter())[module.dim(side)] += uses[digest]
    common = {group: _commonest(counts) for group, counts in dims.items()}
    odd_shapes = {digest: _odd_shape(layout, common) for digest, layout in layouts.items()}
    kept: list[Entry] = []
    refused: list[AdapterError] = []
    for entry in entries:
        if entry.base_model not in (None, base):
            refused.append(_other_base(entry, base))
        elif (odd := odd_shapes[entry.layout.digest]) is not None:
            refused.append(_other_shape(entry, *odd))
        else:
            kept.append(entry)
    return kept, refused


def _commonest(counts: Counter[T]) -> T | None:
    return min(counts, key=lambda value: (-counts[value], str(value)), default=None)


def _odd_shape(layout: Layout, common: Mapping[tuple[str, Side], int | None]) -> tuple[str, int, int | None] | None:
    for module in layout.modules:
        for side in SIDES:
            if module.dim(side) != common[module.name, side]:
                return module.record(side).name, module.dim(side), common[module.name, side]
    return None


def _other_base(entry: Entry, base: str | None) -> AdapterError:
    return AdapterError(
        "made for another base model than most of the collection",
        adapter=entry.name,
        key="base_model_name_or_path",
        found=entry.base_model,
        expected=base,
        remedy="Compress the adapters of each base model on their own.",
    )


def _other_shape(entry: Entry, key: str, dim: int, common: int | None) -> AdapterError:
    return AdapterError(
        "a shape that differs from the rest of its group",
        adapter=entry.name,
        key=key,
        found=f"d = {dim}",
        expected=f"d = {common}, as most adapters have",
        remedy="It belongs to another base model, or to a resized one: leave it out.",
    )


def modules_of(entries: Iterable[Entry]) -> list[str]:
    """Names of all shared modules, sorted."""
    layouts = {e.layout.digest: e.layout for e in entries}
    return sorted({m.name for layout in layouts.values() for m in layout.modules})
