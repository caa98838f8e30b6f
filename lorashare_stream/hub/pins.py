"""What ids of the Hub mean now, and from then on: a revision is looked up once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ..adapters.beside import weights_beside
from ..adapters.folder import CONFIG
from ..adapters.hubid import HubId, parse_hub_id
from ..adapters.source import Listing, Source, unique
from ..errors import AdapterError, MissingFileError
from ..text import listed
from .client import Hub


def pinned(sources: Sequence[Source], hub: Callable[[], Hub], known: Mapping[str, str] | None = None) -> list[Source]:
    """The sources, each adapter of the Hub at the commit that its revision names now; no adapter twice.

    Args:
        sources: what `resolve` gives.
        hub: the client, made when it is needed.
        known: ids that were pinned before -> the pinned ids, which they stay.
    """
    known = known or {}
    recalled = [_recall(source, known.get(source.id)) for source in sources]
    loose = [s for s in recalled if s.hub is not None and not s.hub.pinned and s.fault is None]
    if not loose:
        return unique(recalled)
    client = hub()
    fresh = dict(zip((s.id for s in loose), client.in_parallel(lambda s: _pin(s, client), loose), strict=True))
    found = []
    for source in recalled:
        result = fresh.get(source.id)
        found.append(
            source if result is None else replace(source, fault=result) if isinstance(result, AdapterError)
            else replace(source, id=result.id, hub=result.hub, listing=result.listing)
        )  # fmt: skip
    return unique(found)


def _recall(source: Source, before: str | None) -> Source:
    hub = parse_hub_id(before) if before and source.hub is not None else None
    return source if hub is None else replace(source, id=str(hub), hub=hub)


def _pin(source: Source, client: Hub) -> Source:
    assert source.hub is not None
    if client.offline:
        found = client.cached(source.hub, CONFIG) or client.cached(HubId(source.hub.repo, source.hub.revision), CONFIG)
        parts = () if found is None else found.parts
        sha = next((after for before, after in pairwise(parts) if before == "snapshots"), None)
        listing = source.listing
    else:
        info = client.info(source.hub)
        sha, listing = info.sha, listing_of(info, source.hub.subfolder)
        _demand_config(source.hub, listing, [s.rfilename for s in info.siblings or ()])
    if sha is None and client.offline:
        sha = _only_commit(source.hub, client)
    hub = replace(source.hub, revision=str(sha))
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


def _only_commit(hub: HubId, client: Hub) -> str:
    """The commit of a repository that the cache has, if it has one only: what a branch is, it need not know.

    Raises:
        MissingFileError: if there is none, or several.
    """
    commits = client.commits(hub)
    if hub.revision or len(commits) != 1:
        raise MissingFileError(
            "which commit it is, is not known in the cache of the Hub's files, and this is offline",
            found=f"{hub}; commits there: {listed(commits, 3) or 'none'}",
            remedy="Name the commit, or a discovered manifest; or run once without --offline and HF_HUB_OFFLINE.",
        )
    return commits[0]


def listing_of(info: Any, subfolder: str = "") -> Listing:
    """What a `ModelInfo` says of an adapter."""
    below = f"{subfolder}/" if subfolder else ""
    paths = [s.rfilename.removeprefix(below) for s in info.siblings or () if s.rfilename.startswith(below)]
    beside = set(weights_beside(paths))
    card = info.card_data
    tags = [str(tag) for tag in info.tags or ()]
    return Listing(
        tuple(path for path in paths if "/" not in path or path in beside),
        _peft(info).get("base_model_name_or_path") or _first(getattr(card, "base_model", None)),
        None if info.gated is None else bool(info.gated),
        None if info.private is None else bool(info.private),
        _first(getattr(card, "license", None)) or next((t[8:] for t in tags if t.startswith("license:")), None),
    )


def peft_type_of(info: Any) -> str | None:
    """The kind of adapter that the Hub has read from the configuration, if it has."""
    found = _peft(info).get("peft_type")
    return found if isinstance(found, str) else None


def _peft(info: Any) -> dict[str, Any]:
    config = info.config if isinstance(info.config, dict) else {}
    found = config.get("peft")
    return found if isinstance(found, dict) else {}


def _first(value: Any) -> str | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) and value else None
