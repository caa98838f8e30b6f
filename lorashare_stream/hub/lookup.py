"""Lookup of Hub adapters: ids pinned to commits once, headers and configurations read, without the weights.

The header of each file is one ranged request. Pickle has none: it is fetched whole, read, and, under a disk budget,
removed again.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.folder import (
    CONFIG,
    INDEXES,
    PICKLE,
    SAFETENSORS,
    check_shards,
    missing_config,
    missing_weights,
    once,
    parse_config,
    read_config,
    shard_names,
    tensor_records,
)
from ..adapters.foreign import START, disguised
from ..adapters.hubid import HubId, cached_id, parse_hub_id
from ..adapters.safetensors import TensorRecord, parse_header, read_header
from ..adapters.source import Listing, Source, unique
from ..errors import AdapterError, MissingFileError
from ..files import read_sealed
from ..runtime.progress import Progress, silent
from ..settings import Settings
from ..text import bytes_shown, listed
from ..workspace.workspace import FACTS, Workspace
from .client import FIRST_BYTES, Hub, cache_folder, cached, listing_of, repo_folder
from .ledger import Known, Ledger, digest_of_records

_WHOLE = threading.Lock()  # pickles are fetched one at a time
_LARGE = threading.Lock()  # headers of many megabytes are parsed one at a time


def resolve_on_hub(
    sources: Sequence[Source],
    settings: Settings,
    workspace: Path | None = None,
    *,
    configs: bool = True,
    writes: bool = True,
    pins: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> tuple[list[Source], Mapping[str, Known | AdapterError]]:
    """The sources, pinned, and what is known of those of the Hub, by source id.

    Args:
        sources, settings: of the run.
        workspace: what was pinned and read for it before is not asked again.
        configs: whether configurations are read too; a plan that is not run can do without.
        writes: whether the ledger of the workspace is written.
        pins: ids that were pinned elsewhere -> the pinned ids.
        progress: passes the results on as they come.

    Raises:
        UnreachableError: if the Hub does not answer; what was read is kept.
    """
    if all(s.hub is None for s in sources):
        return list(sources), {}
    ledger = Ledger(None if workspace is None else workspace / FACTS, writes=writes)
    known = {**(pins or {}), **({} if workspace is None else pins_of(workspace))}
    known = {asked: source_id for asked, source_id in known.items() if not ledger.refuses(source_id)}
    found = pinned(sources, known, offline=settings.offline)
    looked: dict[str, Known | AdapterError] = {s.id: s.fault for s in found if s.fault is not None}
    asked = [s for s in found if s.hub is not None and s.fault is None]
    looked |= {s.id: before for s in asked if (before := ledger.get(s.id)) and (before.config or not configs)}
    missing = [s for s in asked if s.id not in looked]
    if missing:
        look = _Look(Hub(offline=settings.offline), ledger, settings, configs=configs)
        results = progress("look", len(missing), look.client.in_parallel(look.at, missing))
        looked |= {source.id: result for source, result in zip(missing, results, strict=True)}
    faults = {source_id: e for source_id, e in looked.items() if isinstance(e, AdapterError)}  # not asked for again
    return [replace(s, fault=faults.get(s.id)) for s in found], looked


# -- ids and commits ------------------------------------------------------------------------------------


def pinned(sources: Sequence[Source], known: Mapping[str, str], *, offline: bool) -> list[Source]:
    """The sources, each adapter of the Hub at the commit that its revision names now; no adapter twice.

    `known` are ids that were pinned before -> the pinned ids, which they stay.
    """
    found = [_recall(source, known.get(source.id)) for source in sources]
    if any(map(_is_loose, found)):
        client = Hub(offline=offline)
        results = client.in_parallel(lambda s: _pin(s, client) if _is_loose(s) else s, found)
        found = [replace(s, fault=r) if isinstance(r, AdapterError) else r for s, r in zip(found, results, strict=True)]
    return unique(found)


def _is_loose(source: Source) -> bool:
    return source.hub is not None and not source.hub.pinned and source.fault is None


def _recall(source: Source, before: str | None) -> Source:
    hub = parse_hub_id(before) if before and source.hub is not None else None
    return source if hub is None else replace(source, id=str(hub), hub=hub)


def _pin(source: Source, client: Hub) -> Source:
    asked = source.hub
    assert asked is not None
    if client.offline:
        sha, listing = _cached_commit(asked), source.listing
    else:
        info = client.info(asked)
        sha, listing = str(info.sha), listing_of(info, asked.subfolder)
        _demand_config(asked, listing, [s.rfilename for s in info.siblings or ()])
    hub = replace(asked, revision=sha)
    if not hub.pinned:
        raise AdapterError("the Hub names no commit", found=sha, expected="40 hex digits", remedy="Leave it out.")
    return replace(source, id=str(hub), hub=hub, listing=listing)


def _demand_config(hub: HubId, listing: Listing, paths: Sequence[str]) -> None:
    """Demand an adapter where the id says; else say where there are some."""
    folders = sorted(p.rpartition("/")[0] for p in paths if p.rpartition("/")[2] == CONFIG)
    if CONFIG in listing.files or not folders:
        return
    ids = [str(replace(hub, subfolder=folder)) for folder in folders]
    raise MissingFileError(
        f"no {CONFIG} here", found=listed(listing.files, 5) or "nothing", expected=CONFIG,
        remedy=f"Its adapters are at {listed(ids, 5)}.",
    )  # fmt: skip


def _cached_commit(hub: HubId) -> str:
    """The commit that a revision is in the cache, or the only one there: what a branch is, the cache need not know."""
    found = cached(hub, CONFIG) or cached(replace(hub, subfolder=""), CONFIG)
    there = None if found is None else cached_id(str(found.parent))
    if there is not None:
        return there.revision
    snapshots = repo_folder(cache_folder(), hub.repo) / "snapshots"
    commits = sorted(p.name for p in snapshots.iterdir()) if snapshots.is_dir() else []
    if hub.revision or len(commits) != 1:
        raise MissingFileError(
            "which commit it is, is not known in the cache of the Hub's files, and this is offline",
            found=f"{hub}; commits there: {listed(commits, 3) or 'none'}",
            remedy="Name the commit, or a discovered manifest; or run once without --offline and HF_HUB_OFFLINE.",
        )
    return commits[0]


def pins_of(workspace: Path) -> dict[str, str]:
    """Ids of the Hub as they were given to a workspace -> as they were pinned for it."""
    adapters = read_sealed(workspace / "plan.json").get("adapters", [])
    refused = Workspace(workspace).skipped()  # they may be mended on the Hub
    pins = {str(a["asked"]): str(a["source_id"]) for a in adapters if "asked" in a and a["name"] not in refused}
    return loose_ids(r.source_id for r in Workspace(workspace).journal().admissions) | pins


def loose_ids(source_ids: Iterable[str]) -> dict[str, str]:
    """Ids without a revision -> the first of some adapters that have them."""
    return {loose_id(source_id): source_id for source_id in reversed(list(source_ids))}


def loose_id(source_id: str) -> str:
    """A source id without its revision; that of a folder is itself."""
    hub = _hub_of(source_id)
    return source_id if hub is None else str(replace(hub, revision=""))


def recalled(workspace: Path) -> list[Source]:
    """The adapters of a workspace, from where they came from; ids of the Hub stay those that were given."""
    asked = {pinned_id: given for given, pinned_id in pins_of(workspace).items()}  # as it was given, if it was
    admissions = Workspace(workspace).journal().admissions
    return [source_of(r.source_id, r.name, asked.get(r.source_id, "")) for r in admissions]


def source_of(source_id: str, name: str | None, asked: str = "") -> Source:
    """The source that a journal or a checkpoint names: a folder, or a pinned adapter of the Hub."""
    return Source(source_id, Path(source_id), name, hub=_hub_of(source_id), asked=asked or source_id)


def _hub_of(source_id: str) -> HubId | None:
    return None if source_id.startswith("/") else parse_hub_id(source_id)


# -- headers and configurations -------------------------------------------------------------------------


class _Look:
    """A look at one adapter, by requests that many threads make; the ledger keeps what is found."""

    def __init__(self, client: Hub, ledger: Ledger, settings: Settings, *, configs: bool) -> None:
        self.client, self.ledger, self.configs = client, ledger, configs
        budget = settings.disk_budget
        self.in_cache, self.largest = budget is None, min(settings.memory, (budget or settings.memory))

    def at(self, source: Source) -> Known:
        hub_id = source.hub
        assert hub_id is not None
        known = self.ledger.get(source.id) or self._weights(hub_id, source.listing)
        if self.configs and known.config is None:
            known = replace(known, config=self._config(hub_id, known.listing))
        return self.ledger.put(source.id, known)

    def _weights(self, hub_id: HubId, listing: Listing) -> Known:
        if self.client.offline and not listing.files:
            config = cached(hub_id, CONFIG)
            listing = replace(listing, files=() if config is None else tuple(sorted(os.listdir(config.parent))))
        if not listing.files:
            try:
                return self._of_headers(hub_id, listing, [SAFETENSORS])
            except MissingFileError:
                if self.client.offline:
                    raise
                listing = listing_of(self.client.info(hub_id), hub_id.subfolder)
        if CONFIG not in listing.files:
            raise missing_config(listing.files)
        if SAFETENSORS in listing.files:
            return self._of_headers(hub_id, listing, [SAFETENSORS])
        if PICKLE in listing.files:
            return self._of_pickle(hub_id, listing)
        index = next((name for name in INDEXES if name in listing.files), None)
        if index is None:
            raise missing_weights(listing.files)
        return self._of_shards(hub_id, listing, index)

    def _of_shards(self, hub_id: HubId, listing: Listing, index: str) -> Known:
        content = self._json(hub_id, index)
        names = shard_names(index, content, listing.files)
        if not all(name.startswith("adapter_model") for name in names):  # a whole model, merged perhaps
            raise missing_weights(listing.files)
        known = self._of_headers(hub_id, listing, names)
        held = {name: {r.name for r in known.records if r.file == number} for number, name in enumerate(names)}
        check_shards(index, content["weight_map"], held)
        return known

    def _of_headers(self, hub_id: HubId, listing: Listing, names: Sequence[str]) -> Known:
        found = [self._header(hub_id, name, number) for number, name in enumerate(names)]
        records = once(record for of_file, _, _ in found for record in of_file)
        files = tuple((name, size) for name, (_, size, _) in zip(names, found, strict=True))
        sha256 = found[0][2] if len(names) == 1 else None
        return Known(files, records, digest_of_records(records), None, listing, sha256)

    def _header(self, hub_id: HubId, name: str, number: int) -> tuple[tuple[TensorRecord, ...], int, str | None]:
        """Its tensors, its size, and its SHA-256 if the Hub lists it."""
        path = cached(hub_id, name)
        if path is not None:
            return read_header(path, number), path.stat().st_size, None
        head = self.client.head(hub_id, name)
        with _LARGE if len(head.start) > FIRST_BYTES else nullcontext():
            return parse_header(head.start, head.size, Path(name), number), head.size, head.sha256

    def _of_pickle(self, hub_id: HubId, listing: Listing) -> Known:
        if cached(hub_id, PICKLE) is None:
            size = self.client.head(hub_id, PICKLE).size
            if size > self.largest:
                raise AdapterError(
                    "a pickle, which is read whole, is larger than the memory or the disk budget", key=PICKLE,
                    found=bytes_shown(size), expected=f"at most {bytes_shown(self.largest)}", remedy="Leave it out.",
                )  # fmt: skip
        with self._fetched(hub_id, PICKLE) as path:
            records, size = tensor_records((path,)), path.stat().st_size
        return Known(((PICKLE, size),), records, digest_of_records(records), None, listing)

    @contextmanager
    def _fetched(self, hub_id: HubId, name: str) -> Iterator[Path]:
        """A file of an adapter: in the Hub's cache; under a disk budget in a folder that is removed."""
        if self.in_cache or cached(hub_id, name) is not None:
            yield self.client.download(hub_id, name, None)
            return
        with _WHOLE, tempfile.TemporaryDirectory(prefix="lorashare-stream-") as folder:
            yield self.client.download(hub_id, name, Path(folder))

    def _config(self, hub_id: HubId, listing: Listing) -> str:
        try:
            if self.in_cache or cached(hub_id, CONFIG) is not None:
                config = read_config(self.client.download(hub_id, CONFIG, None).parent)
            else:
                config = parse_config(self.client.text(hub_id, CONFIG))
            return json.dumps(config, separators=(",", ":"))
        except MissingFileError as e:
            raise (missing_config(listing.files) if listing.files else e) from e

    def _json(self, hub_id: HubId, name: str) -> Any:
        path = cached(hub_id, name)
        text = self.client.text(hub_id, name) if path is None else path.read_bytes()
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as e:
            fault = AdapterError("an index of shards is not valid JSON", found=str(e), remedy="Leave it out.")
            raise (disguised(Path(name), text[:START], len(text)) or fault) from e
