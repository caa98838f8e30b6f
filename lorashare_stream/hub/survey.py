"""Adapters of the Hub, looked at without their weights: the header of each file by one ranged request.

Pickle has no header to ask for: it is fetched whole, read, and, under a disk budget, removed again.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
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
from ..adapters.hubid import HubId
from ..adapters.safetensors import TensorRecord, parse_header, read_header
from ..adapters.source import Listing, Source
from ..errors import AdapterError, MissingFileError
from ..settings import Settings
from ..text import bytes_shown
from .client import FIRST_BYTES, Hub, listing_of
from .ledger import Known, Ledger, digest_of_records

_WHOLE = threading.Lock()
_LARGE = threading.Lock()  # headers of many megabytes are parsed one at a time


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
        look = _Look(client, ledger, settings, configs=configs)
        results = progress("look", len(missing), client.in_parallel(look.at, missing))
        for source, result in zip(missing, results, strict=True):
            assert isinstance(result, Known | AdapterError)
            found[source.id] = result
    return found


class _Look:
    """A look at one adapter, by requests that many threads make."""

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
            config = self.client.cached(hub_id, CONFIG)
            listing = replace(listing, files=() if config is None else tuple(sorted(os.listdir(config.parent))))
        if not listing.files or SAFETENSORS in listing.files:
            try:
                return self._of_headers(hub_id, listing, [SAFETENSORS])
            except MissingFileError:
                if listing.files or self.client.offline:
                    raise
                listing = listing_of(self.client.info(hub_id), hub_id.subfolder)  # what is there, then?
        if PICKLE in listing.files:
            return self._of_pickle(hub_id, listing)
        if CONFIG not in listing.files:
            raise missing_config(listing.files)
        index = next((name for name in INDEXES if name in listing.files), None)
        if index is None:
            raise missing_weights(listing.files)
        content = self._json(hub_id, index)
        names = shard_names(index, content, listing.files)
        if not all(name.startswith("adapter_model") for name in names):  # a whole model, merged perhaps
            raise missing_weights(listing.files)
        return self._of_headers(hub_id, listing, names, index, content)

    def _of_headers(
        self, hub_id: HubId, listing: Listing, names: Sequence[str], index: str | None = None, content: Any = None
    ) -> Known:
        if listing.files and CONFIG not in listing.files:
            raise missing_config(listing.files)
        found = [self._header(hub_id, name, number) for number, name in enumerate(names)]
        records = once(record for of_file, _, _ in found for record in of_file)
        if index is not None:
            held = {name: {r.name for r in of_file} for name, (of_file, _, _) in zip(names, found, strict=True)}
            check_shards(index, content["weight_map"], held)
        files = tuple((name, size) for name, (_, size, _) in zip(names, found, strict=True))
        sha256 = found[0][2] if len(names) == 1 else None
        return Known(files, records, digest_of_records(records), None, listing, sha256)

    def _header(self, hub_id: HubId, name: str, number: int) -> tuple[tuple[TensorRecord, ...], int, str | None]:
        """Its tensors, its size, and its SHA-256 if the Hub lists it."""
        cached = self.client.cached(hub_id, name)
        if cached is not None:
            return read_header(cached, number), cached.stat().st_size, None
        head = self.client.head(hub_id, name)
        with _LARGE if len(head.start) > FIRST_BYTES else nullcontext():
            return parse_header(head.start, head.size, Path(name), number), head.size, head.sha256

    def _of_pickle(self, hub_id: HubId, listing: Listing) -> Known:
        if self.client.cached(hub_id, PICKLE) is None:
            size = self.client.head(hub_id, PICKLE).size
            if size > self.largest:
                raise AdapterError(
                    "a pickle, which is read whole, is larger than the memory or the disk budget", key=PICKLE,
                    found=bytes_shown(size), expected=f"at most {bytes_shown(self.largest)}", remedy="Leave it out.",
                )  # fmt: skip
        with self._fetched(hub_id, PICKLE) as path:
            records, size = tensor_records((path,)), path.stat().st_size
        return Known(((PICKLE, size),), records, digest_of_records(records), None, listing)

    def _config(self, hub_id: HubId, listing: Listing) -> str:
        try:
            if self.in_cache or self.client.cached(hub_id, CONFIG) is not None:
                config = read_config(self.client.download(hub_id, CONFIG, None).parent)
            else:
                config = parse_config(self.client.text(hub_id, CONFIG))
            return json.dumps(config, separators=(",", ":"))
        except MissingFileError as e:
            raise (missing_config(listing.files) if listing.files else e) from e

    def _json(self, hub_id: HubId, name: str) -> Any:
        cached = self.client.cached(hub_id, name)
        text = self.client.text(hub_id, name) if cached is None else cached.read_bytes()
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as e:
            fault = AdapterError("an index of shards is not valid JSON", found=str(e), remedy="Leave it out.")
            raise (disguised(Path(name), text[:START], len(text)) or fault) from e

    @contextmanager
    def _fetched(self, hub_id: HubId, name: str) -> Iterator[Path]:
        """A file of an adapter: in the Hub's cache; under a disk budget in a folder that is removed."""
        if self.in_cache or self.client.cached(hub_id, name) is not None:
            yield self.client.download(hub_id, name, None)
            return
        with _WHOLE, tempfile.TemporaryDirectory(prefix="lorashare-stream-") as folder:  # one at a time
            yield self.client.download(hub_id, name, Path(folder))
