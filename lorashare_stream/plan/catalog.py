"""What is there, from headers and configurations alone; and every adapter that is refused, with the reason."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..adapters import config as peftconfig
from ..adapters.adapter import Adapter, Origin
from ..adapters.folder import (
    FileFact,
    digest_config,
    file_fact,
    paths_below,
    read_config,
    tensor_header,
    weight_files,
    weights_beside,
)
from ..adapters.layout import NOTHING, Layout, Reason, kept_verbatim, read_layout, with_note
from ..adapters.safetensors import TensorRecord
from ..adapters.scaling import Scaling, Shapes
from ..adapters.source import Source
from ..checkpoint.format import MARK
from ..errors import AdapterError, UndecidedError
from ..hub.ledger import Known
from ..settings import Settings
from ..text import digest_of, unique_names
from ..workspace.journal import Admission
from .compatibility import Misfit, common_base, misfits, of_base, of_shape, reason_of

MOST_RECORDS = 256  # headers that are kept whole: where each has metadata of its own, none comes again
_NO_SCALE = Reason("lora_alpha is 0, so that dW is 0 and tells nothing of them")
_KEPT_BEFORE = Reason("they were kept so when the adapter was admitted")  # and what did not fit then is gone
Surveyed = Mapping[str, Known | AdapterError]  # by source id: what is known of adapters of the Hub


@dataclass(frozen=True)
class Catalog:
    """What the sources hold.

    Attributes:
        adapters: adapters, in the order of the sources.
        refused: one error for each adapter that was refused.
        base_model: what all are taken to be of; empty if nothing names it.
        inner: name -> subfolders of an adapter's folder that hold adapters too, which are not taken.
        doubles: where reconstructions lie whose originals are there too, which are not taken.
    """

    adapters: tuple[Adapter, ...]
    refused: tuple[AdapterError, ...] = ()
    base_model: str = ""
    inner: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    doubles: tuple[str, ...] = ()


def catalog(
    sources: Sequence[Source],
    settings: Settings,
    *,
    admissions: Sequence[Admission] = (),
    held: Mapping[str, Shapes] = MappingProxyType({}),
    known: Shapes = MappingProxyType({}),
    bound_base: str | None = None,
    surveyed: Surveyed = MappingProxyType({}),
) -> Catalog:
    """Read the headers and configurations of all sources.

    Args:
        sources: what `sources.resolve` gives.
        settings: which base models are accepted, and what is kept exact.
        admissions: admissions of a workspace: they keep their names.
        held: the shapes of the modules of each that are shared there, by name: these stay shared, and no others.
        known: shapes of the modules in that workspace, or of those that a checkpoint has bases for.
        bound_base: the base model of that workspace.
        surveyed: what is known of adapters of the Hub, by source id.
    """
    adapters: list[Adapter] = []
    refused: list[AdapterError] = []
    shared = Interned()
    read = [(source, _read(source, shared, settings, surveyed)) for source in sources]
    admitted = {r.name: r.source_id for r in admissions}
    read, doubles = _without_doubles(read, set(admitted.values()))
    sources = [source for source, _ in read]
    names = _names(sources, admitted)
    for name, (_, result) in zip(names, read, strict=True):
        if isinstance(result, AdapterError):
            result.adapter = name
            refused.append(result)
        else:
            adapters.append(result if result.name == name else replace(result, name=name))
    base = common_base((e.base_model for e in adapters), settings, bound_base)
    adapters, strangers = of_base(adapters, base, settings)
    refused += strangers
    if settings.fits:  # what is coded alone need not fit
        before: dict[str, Shapes] = {r.name: {} for r in admissions if r.exact} | dict(held)
        odd = misfits([e for e in adapters if before.get(e.name) != {}], known)
        adapters, misshapen = of_shape(adapters, odd)
        refused += misshapen
        adapters = [_fitting(e, odd.get(e.name, {}), before.get(e.name), shared) for e in adapters]
    by_name = dict(zip(names, sources, strict=True))
    for error in refused:
        error.source = by_name[str(error.adapter)].where
    inner = {name: source.inner for name, source in by_name.items() if source.inner}
    return Catalog(tuple(adapters), tuple(refused), base, inner, tuple(doubles))


Read = tuple[Source, Adapter | AdapterError]


def _read(source: Source, shared: Interned, settings: Settings, surveyed: Surveyed) -> Adapter | AdapterError:
    """An adapter under the name that its source wants; or why it is refused."""
    try:
        return read_entry(source, source.wanted_name, shared, settings, surveyed)
    except AdapterError as e:
        return e
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # of this machine, not of this adapter
            raise
        remedy = "Mend its permissions or its disk, or leave it out."
        return AdapterError("cannot be read", found=e.strerror or str(e), remedy=remedy)


def _without_doubles(read: Sequence[Read], admitted: Collection[str]) -> tuple[list[Read], list[str]]:
    """What was read but for reconstructions whose originals are there too, or are `admitted`; and where those lie.

    One that was given a name, or was admitted itself, is meant.
    """
    there = {digest_of(source_id) for source_id in (*(source.id for source, _ in read), *admitted)}
    kept: list[Read] = []
    doubles: list[str] = []
    for source, result in read:
        original = None if isinstance(result, AdapterError) else result.reconstructs
        if original in there and source.name is None and source.id not in admitted:
            doubles.append(source.where)
        else:
            kept.append((source, result))
    return kept, doubles


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
    """Equal parts of many adapters, made and kept once.

    Attributes:
        layouts: by their digest.
        read: by what tells the records that they were read from: their digest, or their identity, which is that of the
            header in this process; with the records, so that it is no other's.
        kept: layout and scalings, by digests of configuration and layout and what else decides them.
    """

    layouts: dict[str, Layout] = field(default_factory=dict)
    read: dict[Hashable, tuple[tuple[TensorRecord, ...], Layout]] = field(default_factory=dict)
    kept: dict[Hashable, tuple[Layout, tuple[Scaling, ...]]] = field(default_factory=dict)


def read_entry(source: Source, name: str, shared: Interned, settings: Settings, surveyed: Surveyed) -> Adapter:
    """One adapter's header and configuration.

    Args:
        source, name: the adapter.
        shared: where a thousand equal headers are kept once.
        settings: what is kept exact.
        surveyed: what is known of adapters of the Hub.

    Raises:
        AdapterError: if it cannot be compressed or kept.
    """
    if source.hub is not None:
        return _surveyed_entry(source, name, shared, settings, surveyed[source.id])
    folder = source.path.absolute()  # a worker of a cluster may be in another one
    config = read_config(folder)
    peftconfig.check_lora(config)  # before anything else that is wrong with another kind of adapter
    paths = weight_files(folder)
    files = tuple(file_fact(p) for p in paths)
    beside = weights_beside(paths_below(folder), [p.name for p in paths])
    records, metadata = tensor_header(paths)
    mark = metadata.get(MARK)
    bare = Adapter(name, source.id, folder, files, NOTHING, (), None, "", beside=beside, reconstructs=mark)
    return _entry(bare, config, records, shared, settings)


def _surveyed_entry(
    source: Source, name: str, shared: Interned, settings: Settings, known: Known | AdapterError
) -> Adapter:
    """An adapter of the Hub, of which header and configuration were read, or the header alone."""
    if isinstance(known, AdapterError):
        raise copy(known)
    assert source.hub is not None
    listing = known.listing if known.listing.files else source.listing
    files = tuple(FileFact(Path(file), size, 0) for file, size in known.files)
    origin = Origin(source.hub, source.asked, listing, known.digest, known.sha256, known.refused)
    beside = weights_beside(listing.files, [file for file, _ in known.files])
    bare = Adapter(
        name, source.id, Path(source.id), files, NOTHING, (), None, "", None, origin, fetched=False, beside=beside
    )
    if known.config is not None:
        config = json.loads(known.config)
        peftconfig.check_lora(config)
        return _entry(bare, config, known.records, shared, settings)
    # A plan that is not run takes it for plain LoRA of the base that the Hub says.
    layout = _layout(shared, known.records, known.digest, None, tied=False)
    layout, scalings = shared.kept.setdefault(layout.digest, (layout, (Scaling(1.0),) * len(layout.modules)))
    return replace(bare, layout=layout, scalings=scalings, base_model=listing.base_model)


def _entry(
    bare: Adapter, config: Mapping[str, Any], records: tuple[TensorRecord, ...], shared: Interned, settings: Settings
) -> Adapter:
    exact = peftconfig.other_scaling(config)
    if exact is None and not settings.share_initial:
        exact = peftconfig.initial_part(config)
    tied = bool(config.get("ensure_weight_tying"))
    layout = _layout(shared, records, None if bare.origin is None else bare.origin.records, exact, tied=tied)
    digest = digest_config(config)
    key = digest, layout.digest
    if key not in shared.kept:
        shared.kept[key] = _scaled(layout, config, shared)
    layout, scalings = shared.kept[key]
    base, text = peftconfig.base_model(config), sys.intern(json.dumps(config))  # many have the same
    return replace(bare, layout=layout, scalings=scalings, base_model=base, config_digest=digest, config=text)


def read_entries(
    sources: Sequence[Source], settings: Settings, surveyed: Surveyed = MappingProxyType({})
) -> dict[str, Adapter]:
    """The adapters that can be read, by source id, whatever they have in common."""
    shared, adapters = Interned(), {}
    for source in sources:
        try:
            adapters[source.id] = read_entry(source, source.wanted_name, shared, settings, surveyed)
        except (AdapterError, OSError):
            continue
    return adapters


def _layout(
    shared: Interned, records: tuple[TensorRecord, ...], digest: str | None, exact: str | None, *, tied: bool
) -> Layout:
    key = digest or id(records), exact, tied
    if key in shared.read:
        return shared.read[key][1]
    layout = _interned(shared, read_layout(records, exact=exact, tied=tied))
    if len(shared.read) < MOST_RECORDS:
        shared.read[key] = records, layout
    return layout


def _scaled(layout: Layout, config: Mapping[str, Any], shared: Interned) -> tuple[Layout, tuple[Scaling, ...]]:
    """A layout, with what dW tells nothing of verbatim, and the scalings of its modules."""
    if (note := peftconfig.unknown_fields(config)) is not None:
        layout = with_note(layout, note)
    try:
        scalings = peftconfig.scalings(config, {m.name: m.rank for m in layout.modules})
    except UndecidedError as e:
        return _without(layout, (), {m.name: Reason(e.problem) for m in layout.modules}, shared)
    none = {m.name: _NO_SCALE for m, p in zip(layout.modules, scalings, strict=True) if p.scale == 0}
    return _without(layout, scalings, none, shared)


def _fitting(adapter: Adapter, odd: Mapping[str, Misfit], held: Shapes | None, shared: Interned) -> Adapter:
    """An adapter with the modules verbatim that do not fit those of others, or did not when it was admitted."""
    reasons = {m: reason_of(misfit) for m, misfit in odd.items()}
    if held is not None:
        reasons = {m: reasons.get(m, _KEPT_BEFORE) for m in adapter.layout.by_name if m not in held}
    if not reasons:
        return adapter
    key = adapter.config_digest, adapter.layout.digest, *reasons.items()
    if key not in shared.kept:
        shared.kept[key] = _without(adapter.layout, adapter.scalings, reasons, shared)
    layout, scalings = shared.kept[key]
    return replace(adapter, layout=layout, scalings=scalings)


def _without(
    layout: Layout, scalings: Sequence[Scaling], reasons: Mapping[str, Reason], shared: Interned
) -> tuple[Layout, tuple[Scaling, ...]]:
    if reasons:
        scalings = [p for m, p in zip(layout.modules, scalings, strict=False) if m.name not in reasons]
        layout = _interned(shared, kept_verbatim(layout, reasons))
    return layout, tuple(scalings)


def _interned(shared: Interned, layout: Layout) -> Layout:
    return shared.layouts.setdefault(layout.digest, layout)
