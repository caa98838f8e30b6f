"""Adapters of the Hub, looked at without their weights: the header of each by one ranged request.

Pickle and shards have no header to ask for: they are fetched whole, read, and, under a disk budget, removed again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .adapterfiles import (
    CONFIG,
    INDEXES,
    PICKLE,
    SAFETENSORS,
    SHARD,
    config_text,
    missing_config,
    missing_weights,
    tensor_records,
    weight_files,
)
from .errors import AdapterError, MissingFileError
from .hub import Hub
from .hubid import HubId
from .ledger import Known, Ledger, digest_of_records
from .settings import Settings
from .sources import Listing, Source
from .sources.pins import in_parallel, listing_of
from .tensorfile import parse_header


def survey(
    sources: Sequence[Source],
    hub: Callable[[], Hub],
    ledger: Ledger,
    settings: Settings,
    *,
    configs: bool,
    progress: Callable[[str, int, Iterator[object]], Iterator[object]],
) -> dict[str, Known | AdapterError]:
    """Read the headers, and the configurations, of all adapters of the Hub.

    Args:
        sources: pinned; local ones are passed over.
        hub: the client, made when it is needed.
        ledger: what is known already, and will be.
        settings: whether there is a disk budget.
        configs: whether configurations are read as well; a plan that is not run can do without.
        progress: passes the results on as they come.

    Raises:
        UnreachableError: if the Hub does not answer; what was read is kept.
    """
    found: dict[str, Known | AdapterError] = {s.id: s.fault for s in sources if s.fault is not None}
    missing: list[Source] = []
    for source in (s for s in sources if s.hub is not None and s.fault is None):
        known = ledger.get(source.id)
        if known is None or (configs and known.config is None):
            missing.append(source)
        else:
            found[source.id] = known
    if missing:
        client = hub()
        look = _Look(client, ledger, whole_in_cache=settings.disk_budget is None, configs=configs)
        results = progress("look", len(missing), in_parallel(look.at, missing, client))
        for source, result in zip(missing, results, strict=True):
            assert isinstance(result, Known | AdapterError)
            found[source.id] = result
    return found


class _Look:
    """A look at one adapter, by requests that many threads make."""

    def __init__(self, client: Hub, ledger: Ledger, *, whole_in_cache: bool, configs: bool) -> None:
        self.client, self.ledger = client, ledger
        self.whole_in_cache, self.configs = whole_in_cache, configs

    def at(self, source: Source) -> Known:
        hub_id = source.hub
        assert hub_id is not None
        known = self.ledger.get(source.id) or self._weights(hub_id, source.listing)
        if self.configs and known.config is None:
            known = replace(known, config=self._config(hub_id, known.listing))
        return self.ledger.put(source.id, known)

    def _weights(self, hub_id: HubId, listing: Listing) -> Known:
        if self.client.offline and not listing.files:
            config = self.client.cached(hub_id, CONFIG)
            listing = replace(listing, files=() if config is None else tuple(sorted(os.listdir(config.parent))))
        if not listing.files or SAFETENSORS in listing.files:
            try:
                return self._header(hub_id, listing)
            except MissingFileError:
                if listing.files or self.client.offline:
                    raise
                listing = listing_of(self.client.info(hub_id), hub_id.subfolder)  # what is there, then?
        whole = [n for n in listing.files if n == PICKLE or n in INDEXES or SHARD.fullmatch(n)]
        if CONFIG not in listing.files:
            raise missing_config(listing.files)
        if not whole:
            raise missing_weights(listing.files)
        with self._fetched(hub_id, [CONFIG, *whole]) as folder:
            paths = weight_files(folder)
            records = tensor_records(paths)
            files = tuple((p.name, p.stat().st_size) for p in paths)
        return Known(files, records, digest_of_records(records), None, listing)

    def _header(self, hub_id: HubId, listing: Listing) -> Known:
        if listing.files and CONFIG not in listing.files:
            raise missing_config(listing.files)
        cached = self.client.cached(hub_id, SAFETENSORS)
        if cached is not None:
            records, size = tensor_records((cached,)), cached.stat().st_size
        else:
            head, size = self.client.head(hub_id, SAFETENSORS)
            records = parse_header(head, size, Path(SAFETENSORS))
        return Known(((SAFETENSORS, size),), records, digest_of_records(records), None, listing)

    def _config(self, hub_id: HubId, listing: Listing) -> str:
        try:
            with self._fetched(hub_id, [CONFIG]) as folder:
                return config_text(folder)
        except MissingFileError as e:
            raise (missing_config(listing.files) if listing.files else e) from e

    @contextmanager
    def _fetched(self, hub_id: HubId, names: Sequence[str]) -> Iterator[Path]:
        """A folder with files of an adapter: in the Hub's cache; under a disk budget one that is removed."""
        if self.whole_in_cache or all(self.client.cached(hub_id, name) for name in names):
            paths = [self.client.download(hub_id, name, None) for name in names]
            yield paths[0].parent
            return
        with tempfile.TemporaryDirectory(prefix="lorashare-stream-") as folder:
            paths = [self.client.download(hub_id, name, Path(folder)) for name in names]
            yield paths[0].parent
