"""The Hub side of a plan: ids pinned to commits once, headers and configurations read, files fetched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..adapters.adapter import Adapter
from ..adapters.folder import CONFIG
from ..adapters.hubid import HubId, cached_id, parse_hub_id
from ..adapters.source import Listing, Source, unique
from ..errors import AdapterError, MissingFileError
from ..files import read_sealed, remove_tree
from ..runtime.progress import Progress, silent
from ..settings import Settings
from ..text import listed
from ..workspace.workspace import FACTS, FILES, Workspace
from .client import Hub, listing_of
from .fetch import Fetcher, fetching
from .ledger import Known, Ledger
from .survey import survey


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
        sources: what `resolve` gives.
        settings: of the run.
        workspace: what was pinned and read for it before is not asked again.
        configs: whether configurations are read too.
        writes: whether what is read is kept in the workspace.
        pins: what ids mean that were pinned elsewhere.
        progress: passes the results on as they come.
    """
    if all(s.hub is None for s in sources):
        return list(sources), {}
    hub = cache(lambda: Hub(offline=settings.offline))
    path = None if workspace is None else workspace / FACTS
    ledger = Ledger(path, writes=writes)
    known = {**(pins or {}), **({} if workspace is None else pins_of(workspace))}
    known = {asked: source_id for asked, source_id in known.items() if not ledger.refuses(source_id)}
    found = pinned(sources, hub, known)
    surveyed = survey(found, hub, ledger, settings, configs=configs, progress=progress)
    faults = {source_id: e for source_id, e in surveyed.items() if isinstance(e, AdapterError)}  # not asked for again
    return [replace(s, fault=faults.get(s.id)) for s in found], surveyed


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
    asked = source.hub
    assert asked is not None
    if client.offline:
        sha, listing = _cached_commit(asked, client), source.listing
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


def _cached_commit(hub: HubId, client: Hub) -> str:
    """The commit that a revision is in the cache, or the only one there: what a branch is, the cache need not know."""
    found = client.cached(hub, CONFIG) or client.cached(replace(hub, subfolder=""), CONFIG)
    there = None if found is None else cached_id(str(found.parent))
    if there is not None:
        return there.revision
    commits = client.commits(hub)
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
    """What ids without a revision mean among adapters that are there: the first that has them."""
    return {loose_id(source_id): source_id for source_id in reversed(list(source_ids))}


def loose_id(source_id: str) -> str:
    """A source id without its revision; that of a folder is itself."""
    hub = None if source_id.startswith("/") else parse_hub_id(source_id)
    return source_id if hub is None else str(replace(hub, revision=""))


def recalled(workspace: Path) -> list[Source]:
    """The adapters of a workspace, from where they came from; ids of the Hub stay those that were given."""
    asked = {pinned_id: given for given, pinned_id in pins_of(workspace).items()}  # as it was given, if it was
    admissions = Workspace(workspace).journal().admissions
    return [source_of(r.source_id, r.name, asked.get(r.source_id, "")) for r in admissions]


def source_of(source_id: str, name: str | None, asked: str = "") -> Source:
    """The source that a journal or a checkpoint names: a folder, or a pinned adapter of the Hub."""
    hub = None if source_id.startswith("/") else parse_hub_id(source_id)
    return Source(source_id, Path(source_id), name, hub=hub, asked=asked or source_id)


def bytes_to_fetch(adapters: Iterable[Adapter], settings: Settings, known: Collection[str]) -> int:
    """Bytes of adapters of the Hub that are not in its cache, but for those `known` by name."""
    fresh = [e for e in adapters if e.origin is not None and e.name not in known]
    if not fresh:
        return 0
    hub = Hub(offline=settings.offline)
    files = [(e.origin.hub, f) for e in fresh if e.origin is not None for f in e.files]
    return sum(f.size for hub_id, f in files if hub.cached(hub_id, f.path.name) is None)


@contextmanager
def fetching_for(settings: Settings, workspace: Path | None) -> Iterator[Fetcher]:
    """A fetcher: into the workspace under a disk budget, else into the Hub's cache."""
    folder = None if workspace is None or settings.disk_budget is None else workspace / FILES
    with fetching(settings.offline, folder, settings.disk_budget) as fetcher:
        yield fetcher
    if workspace is not None:
        remove_tree(workspace / FILES)  # of a run before, which had a budget
