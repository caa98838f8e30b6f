"""What is there, from headers and configurations alone; and every adapter that is refused, with the reason."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from . import peftconfig
from .adapterfiles import FileFact, file_fact, read_config, tensor_records, weight_files
from .errors import AdapterError
from .keys import SIDES, Side
from .layout import Layout, read_layout
from .names import unique_names
from .sources import Source

T = TypeVar("T")


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
    shared = Interned()
    names = _names(sources, admitted or {})
    for source, name in zip(sources, names, strict=True):
        try:
            entries.append(read_entry(source, name, shared))
        except AdapterError as e:
            e.adapter = name
            refused.append(e)
        except OSError as e:
            refused.append(AdapterError("cannot be read", adapter=name, found=e.strerror or str(e)))
    kept, disagreeing = _agreeing(entries)
    where = dict(zip(names, (str(source.path) for source in sources), strict=True))
    for error in (*refused, *disagreeing):
        error.source = where[str(error.adapter)]
    return Catalog(tuple(kept), (*refused, *disagreeing))


def _names(sources: Sequence[Source], admitted: Mapping[str, str]) -> list[str]:
    known: dict[tuple[str, str | None], str] = {}
    for name, source_id in admitted.items():
        known[source_id, name] = name  # named so by the user, again
        known.setdefault((source_id, None), name)
    fresh = [s for s in sources if (s.id, s.name) not in known]
    given = iter(unique_names([(s.id, s.wanted_name) for s in fresh], admitted))
    return [known[s.id, s.name] if (s.id, s.name) in known else next(given) for s in sources]


@dataclass(frozen=True)
class Interned:
    """Equal parts of many adapters, kept once."""

    layouts: dict[str, Layout] = field(default_factory=dict)
    scales: dict[tuple[float, ...], tuple[float, ...]] = field(default_factory=dict)


def read_entry(source: Source, name: str, shared: Interned) -> Entry:
    """One adapter's header and configuration.

    Args:
        source, name: the adapter.
        shared: where a thousand equal headers are kept once.

    Raises:
        AdapterError: if it cannot be compressed or kept.
    """
    config = read_config(source.path)
    peftconfig.check_lora(config)
    paths = weight_files(source.path)
    files = tuple(file_fact(p) for p in paths)
    records = tensor_records(paths)
    digest = hashlib.sha256(repr(records).encode("utf-8", "surrogatepass")).hexdigest()
    if digest not in shared.layouts:
        shared.layouts[digest] = read_layout(records, digest)
    layout = shared.layouts[digest]
    _check_ranks(layout, config)
    scales = tuple(peftconfig.scale(config, m.name) for m in layout.modules)
    config_digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    base = peftconfig.base_model(config)
    return Entry(
        name, source.id, source.path, files, layout, shared.scales.setdefault(scales, scales), base, config_digest
    )


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
    refused = [_other_base(e, base) for e in entries if e.base_model not in (None, base)]
    of_base = [e for e in entries if e.base_model in (None, base)]
    uses = Counter(e.layout.digest for e in of_base)
    layouts = {e.layout.digest: e.layout for e in of_base}
    dims: dict[tuple[str, Side], Counter[int]] = {}
    for digest, layout in layouts.items():
        for module in layout.modules:
            for side in SIDES:
                dims.setdefault((module.name, side), Counter())[module.dim(side)] += uses[digest]
    common = {group: _commonest(counts) for group, counts in dims.items()}
    odd_shapes = {digest: _odd_shape(layout, common) for digest, layout in layouts.items()}
    refused += [_other_shape(e, *odd) for e in of_base if (odd := odd_shapes[e.layout.digest]) is not None]
    return [e for e in of_base if odd_shapes[e.layout.digest] is None], refused


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
