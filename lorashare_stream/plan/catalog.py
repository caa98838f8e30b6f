"""Catalog: adapters from the headers and configurations of their sources, and errors of those that are refused."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import replace
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
from ..adapters.hubid import HubId
from ..adapters.layout import NOTHING, Layout, Reason, kept_verbatim, read_layout, with_note
from ..adapters.scaling import Scaling, Shapes
from ..adapters.source import Source
from ..checkpoint.format import MARK
from ..errors import AdapterError, UndecidedError
from ..hub.ledger import Known, Records
from ..settings import Settings
from ..text import digest_of, unique_names
from ..workspace.journal import Journal
from .compatibility import Misfit, common_base, misfits, of_other_base, of_other_shape
from .plan import Plan

MOST_RECORDS = 256  # headers that are kept whole: where each has metadata of its own, none comes again
_NO_SCALE = Reason("lora_alpha is 0, so that dW is 0 and tells nothing of them")
_KEPT_BEFORE = Reason("they were kept so when the adapter was admitted")  # and what did not fit then is gone
Surveyed = Mapping[str, Known | AdapterError]  # by source id: what is known of adapters of the Hub
Read = tuple[Source, Adapter | AdapterError]


def make_plan(
    sources: Sequence[Source],
    settings: Settings,
    *,
    surveyed: Surveyed = MappingProxyType({}),
    journal: Journal | None = None,
    held: Mapping[str, Shapes] = MappingProxyType({}),
    known: Shapes = MappingProxyType({}),
    bound_base: str | None = None,
    recalled: Collection[str] = (),
) -> Plan:
    """The plan for some sources, from their headers and configurations alone.

    Args:
        sources: of `sources.resolve`, pinned.
        settings: of the run.
        surveyed: headers and configurations of adapters of the Hub, or errors, by source id.
        journal: of a workspace, or of the adapters of a checkpoint: what is admitted keeps its name.
        held: shared modules of admitted adapters, by name: they stay shared, and no others of them.
        known: shapes of the modules of a workspace, or of the bases of a checkpoint.
        bound_base: base model of the workspace.
        recalled: names of adapters in the workspace whose sources are not named now; those refused are absent.
    """
    reader, absent = Reader(settings, surveyed), set(recalled)
    admissions = () if journal is None else journal.admissions
    admitted = {r.name: r.source_id for r in admissions}
    read, doubles = _without_doubles([(source, reader.read(source)) for source in sources], {*admitted.values()})
    by_name = dict(zip(_names([source for source, _ in read], admitted), read, strict=True))
    refused = {name: result for name, (_, result) in by_name.items() if isinstance(result, AdapterError)}
    adapters = [replace(e, name=name) for name, (_, e) in by_name.items() if isinstance(e, Adapter)]
    base = common_base((e.base_model for e in adapters), settings, bound_base)
    refused |= of_other_base(adapters, base, settings)
    adapters = [e for e in adapters if e.name not in refused]
    if settings.fits:  # adapters that are coded alone need not fit
        before: dict[str, Shapes] = {r.name: {} for r in admissions if r.exact} | dict(held)
        odd = misfits([e for e in adapters if before.get(e.name) != {}], known)
        refused |= of_other_shape(adapters, odd)
        adapters = [e for e in adapters if e.name not in refused]
        adapters = [reader.fitted(e, odd.get(e.name, {}), before.get(e.name)) for e in adapters]
    for name, error in refused.items():
        error.adapter, error.source = name, by_name[name][0].where
    return Plan(
        settings,
        tuple(adapters),
        refused=tuple(e for name, e in refused.items() if name not in absent),
        absent=tuple(e for name, e in refused.items() if name in absent),
        base_model=base,
        bound_base=bound_base if bound_base is not None and bound_base in settings.base_aliases else base,
        inner={name: source.inner for name, (source, _) in by_name.items() if source.inner},
        doubles=tuple(doubles),
        grows=journal is not None and bool(journal.entries),
        journal=None if journal is None else journal.digest(len(journal.entries)),
    )


def _without_doubles(read: Sequence[Read], admitted: Collection[str]) -> tuple[list[Read], list[str]]:
    """All but reconstructions whose originals are there too, or are `admitted`; and where those lie.

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


class Reader:
    """Reader of headers and configurations; equal layouts of many adapters are made and kept once."""

    def __init__(self, settings: Settings, surveyed: Surveyed = MappingProxyType({})) -> None:
        self._settings, self._surveyed = settings, surveyed
        self._layouts: dict[str, Layout] = {}  # by digest
        # By the digest of their records, or by the identity of those of equal headers, which are kept to stay theirs.
        self._of_records: dict[Hashable, tuple[Records, Layout]] = {}
        self._scaled: dict[Hashable, tuple[Layout, tuple[Scaling, ...]]] = {}

    def read(self, source: Source) -> Adapter | AdapterError:
        """An adapter under the name that its source wants; or the error for which it is refused."""
        try:
            return self._local(source) if source.hub is None else self._of_the_hub(source, source.hub)
        except AdapterError as e:
            return e
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # of this machine, not of this adapter
                raise
            remedy = "Mend its permissions or its disk, or leave it out."
            return AdapterError("cannot be read", found=e.strerror or str(e), remedy=remedy)

    def fitted(self, adapter: Adapter, odd: Mapping[str, Misfit], held: Shapes | None) -> Adapter:
        """An adapter with its `odd` modules verbatim, and, if it was admitted, all that are not `held`."""
        reasons = {m: misfit.reason for m, misfit in odd.items()}
        if held is not None:
            reasons = {m: reasons.get(m, _KEPT_BEFORE) for m in adapter.layout.by_name if m not in held}
        if not reasons:
            return adapter
        key = adapter.config_digest, adapter.layout.digest, *reasons.items()
        if key not in self._scaled:
            self._scaled[key] = self._without(adapter.layout, adapter.scalings, reasons)
        layout, scalings = self._scaled[key]
        return replace(adapter, layout=layout, scalings=scalings)

    def _local(self, source: Source) -> Adapter:
        folder = source.path.absolute()  # a worker of a cluster may be in another one
        config = read_config(folder)
        peftconfig.check_lora(config)  # before anything else that is wrong with another kind of adapter
        paths = weight_files(folder)
        files = tuple(file_fact(p) for p in paths)
        beside = weights_beside(paths_below(folder), [p.name for p in paths])
        records, metadata = tensor_header(paths)
        bare = Adapter(
            source.wanted_name, source.id, folder, files, NOTHING, (), None, "", beside=beside,
            reconstructs=metadata.get(MARK),
        )  # fmt: skip
        return self._configured(bare, config, records)

    def _of_the_hub(self, source: Source, hub: HubId) -> Adapter:
        """An adapter of the Hub, of which header and configuration were read, or the header alone."""
        known = self._surveyed[source.id]
        if isinstance(known, AdapterError):
            raise copy(known)
        listing = known.listing if known.listing.files else source.listing
        files = tuple(FileFact(Path(file), size, 0) for file, size in known.files)
        origin = Origin(hub, source.asked, listing, known.digest, known.sha256, known.refused)
        beside = weights_beside(listing.files, [file for file, _ in known.files])
        bare = Adapter(
            source.wanted_name, source.id, Path(source.id), files, NOTHING, (), None, "", None, origin,
            fetched=False, beside=beside,
        )  # fmt: skip
        if known.config is not None:
            config = json.loads(known.config)
            peftconfig.check_lora(config)
            return self._configured(bare, config, known.records)
        # A plan that is not run takes it for plain LoRA of the base that the Hub lists.
        layout = self._layout(known.records, known.digest, None, tied=False)
        scalings = (Scaling(1.0),) * len(layout.modules)
        layout, scalings = self._scaled.setdefault(layout.digest, (layout, scalings))
        return replace(bare, layout=layout, scalings=scalings, base_model=listing.base_model)

    def _configured(self, bare: Adapter, config: Mapping[str, Any], records: Records) -> Adapter:
        exact = peftconfig.other_scaling(config)
        if exact is None and not self._settings.share_initial:
            exact = peftconfig.initial_part(config)
        tied = bool(config.get("ensure_weight_tying"))
        layout = self._layout(records, None if bare.origin is None else bare.origin.records, exact, tied=tied)
        digest = digest_config(config)
        key = digest, layout.digest
        if key not in self._scaled:
            self._scaled[key] = self._with_scalings(layout, config)
        layout, scalings = self._scaled[key]
        base, text = peftconfig.base_model(config), sys.intern(json.dumps(config))  # many have the same
        return replace(bare, layout=layout, scalings=scalings, base_model=base, config_digest=digest, config=text)

    def _layout(self, records: Records, digest: str | None, exact: str | None, *, tied: bool) -> Layout:
        key = digest or id(records), exact, tied
        if key in self._of_records:
            return self._of_records[key][1]
        layout = self._interned(read_layout(records, exact=exact, tied=tied))
        if len(self._of_records) < MOST_RECORDS:
            self._of_records[key] = records, layout
        return layout

    def _with_scalings(self, layout: Layout, config: Mapping[str, Any]) -> tuple[Layout, tuple[Scaling, ...]]:
        """A layout, with modules verbatim whose dW tells nothing, and the scalings of the others."""
        if (note := peftconfig.unknown_fields(config)) is not None:
            layout = with_note(layout, note)
        try:
            scalings = peftconfig.scalings(config, {m.name: m.rank for m in layout.modules})
        except UndecidedError as e:
            return self._without(layout, (), {m.name: Reason(e.problem) for m in layout.modules})
        none = {m.name: _NO_SCALE for m, p in zip(layout.modules, scalings, strict=True) if p.scale == 0}
        return self._without(layout, scalings, none)

    def _without(
        self, layout: Layout, scalings: Sequence[Scaling], reasons: Mapping[str, Reason]
    ) -> tuple[Layout, tuple[Scaling, ...]]:
        if reasons:
            scalings = [p for m, p in zip(layout.modules, scalings, strict=False) if m.name not in reasons]
            layout = self._interned(kept_verbatim(layout, reasons))
        return layout, tuple(scalings)

    def _interned(self, layout: Layout) -> Layout:
        return self._layouts.setdefault(layout.digest, layout)
