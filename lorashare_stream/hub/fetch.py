"""Prefetch of Hub adapters, some at a time, ahead of their use; eviction when room is needed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from ..adapters.adapter import Adapter
from ..adapters.folder import FileFact, file_fact, tensor_records
from ..errors import AdapterError
from ..files import remove_tree, tree_bytes
from ..settings import Settings
from ..text import slug
from ..workspace.workspace import FILES
from .client import AT_ONCE, Hub, cached
from .ledger import digest_of_records

LINGER = 3.0  # seconds in which what is nearly here may come, when a run fails


class Fetcher:
    """Threads that fetch adapters in the order in which they are wanted, until the end of the block.

    Without a folder they come into the Hub's cache and stay there. With one they come into it, within a budget in
    bytes: adapters without a use are evicted when there is need of their room. What a killed run left in the folder is
    used; it is removed at the end of a block that does not fail. Nothing in the Hub's cache is ever removed.
    """

    def __init__(self, offline: bool, folder: Path | None = None, budget: int | None = None) -> None:
        self._offline, self._folder, self._budget = offline, folder, budget
        self._changed = threading.Condition()
        self._client: Hub | None = None
        self._threads: list[threading.Thread] = []
        # By slug of the source id, the name of a subfolder, since a name may be given again, and an adapter have two:
        self._adapters: dict[str, Adapter] = {}  # that were ever wanted
        self._held: Counter[str] = Counter()  # uses that have begun
        self._ahead: set[str] = set()  # prefetched for a use to come
        self._queue: dict[str, Adapter] = {}
        self._in_flight: set[str] = set()
        self._here: dict[str, tuple[FileFact, ...] | AdapterError] = {}
        self._taken: dict[str, int] = {}  # bytes in the folder, those reserved for what is in flight included
        self._failure: BaseException | None = None
        self._closed = False
        for left in folder.iterdir() if folder is not None and folder.is_dir() else ():
            for torn in left.rglob("*.incomplete"):
                torn.unlink()
            self._taken[left.name] = tree_bytes(left) - tree_bytes(left / ".cache")  # of the client, and small

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop fetching; what is in the folder stays if the block failed."""
        with self._changed:
            self._closed = True
            if self._client is not None:
                self._client.stopped.set()
            self._changed.notify_all()
        end = time.monotonic() + (3600 if kind is None else LINGER)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if kind is None and self._folder is not None:
            remove_tree(self._folder)

    def prefetch(self, adapters: Iterable[Adapter]) -> None:
        """Prefetch adapters, in order, as room allows."""
        remote = {slug(e.source_id): e for e in adapters if not e.fetched}
        with self._changed:
            self._ahead |= remote.keys()
            self._want(remote)

    def arriving(self, adapters: Sequence[Adapter]) -> Iterator[Adapter | AdapterError]:
        """The adapters with their files on this machine, as they come: local ones at once, then those of the Hub.

        Those that cannot be had are given as errors. Each is held until it is released.

        Raises:
            UnreachableError: if the Hub does not answer.
        """
        yield from (e for e in adapters if e.fetched)
        remote: dict[str, list[Adapter]] = {}
        for adapter in adapters:
            if not adapter.fetched:
                remote.setdefault(slug(adapter.source_id), []).append(adapter)
        with self._changed:
            self._held.update({key: len(some) for key, some in remote.items()})
            self._ahead -= remote.keys()
            self._want({key: some[0] for key, some in remote.items()})
        while remote:
            with self._changed:
                self._changed.wait_for(lambda: self._failure is not None or remote.keys() & self._here.keys())
                if self._failure is not None:
                    raise self._failure
                come = {key: self._here[key] for key in remote if key in self._here}
            for key, result in come.items():
                yield from (_given(adapter, result) for adapter in remote.pop(key))

    def cancel_except(self, adapters: Iterable[Adapter]) -> None:
        """Cancel every prefetch except those of `adapters`."""
        with self._changed:
            self._ahead &= {slug(e.source_id) for e in adapters}
            self._queue = {key: e for key, e in self._queue.items() if self._is_wanted(key)}

    def release(self, adapters: Iterable[Adapter]) -> None:
        """End a use of adapters."""
        with self._changed:
            for key in (slug(e.source_id) for e in adapters):
                self._held[key] = max(0, self._held[key] - 1)
            self._changed.notify_all()

    def evict(self, adapter: Adapter) -> None:
        """Evict the files of an adapter: a later use fetches them again; the Hub's cache is not touched."""
        with self._changed:
            self._remove(slug(adapter.source_id))

    def _is_wanted(self, key: str) -> bool:
        return self._held[key] > 0 or key in self._ahead

    def _is_awaited(self, key: str) -> bool:
        return self._held[key] > 0 and key not in self._here

    def _want(self, adapters: dict[str, Adapter]) -> None:
        """Queue what is neither here nor on its way; awaited adapters first, then what a killed run has left whole."""
        self._adapters |= adapters
        self._queue |= {k: e for k, e in adapters.items() if k not in self._in_flight and k not in self._here}

        def urgency(item: tuple[str, Adapter]) -> tuple[bool, bool]:
            key, adapter = item
            return not self._is_awaited(key), self._taken.get(key, -1) < adapter.hub_bytes

        self._queue = dict(sorted(self._queue.items(), key=urgency))
        while adapters and len(self._threads) < AT_ONCE:
            self._client = self._client or Hub(offline=self._offline)
            thread = threading.Thread(target=self._work, name="lorashare-stream-fetch", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_room())
                if self._closed:
                    return
                key = next(iter(self._queue))
                adapter = self._queue.pop(key)
                self._in_flight.add(key)
            try:
                result: tuple[FileFact, ...] | AdapterError = self._fetch(key, adapter)
            except AdapterError as e:
                result = e
            except BaseException as e:  # of the Hub or this machine: said by whoever waits
                with self._changed:
                    self._failure, self._closed = e, True
                    self._changed.notify_all()
                return
            with self._changed:
                if isinstance(result, AdapterError):  # nothing that takes room
                    self._remove(key)
                self._here[key] = result
                self._in_flight.discard(key)
                self._changed.notify_all()

    def _has_room(self) -> bool:
        """Whether there is room for the next adapter of the queue, which is reserved; others are evicted for it."""
        key = next(iter(self._queue), None)
        if key is None or self._folder is None or self._budget is None:
            return key is not None
        size, left = self._queue[key].hub_bytes, self._taken.get(key, 0)  # a killed run may have left it, or a part
        while size > left and sum(self._taken.values()) - left + size > self._budget:
            other = next((k for k in self._taken if k != key and self._may_go(k, for_whom=key)), None)
            if other is None:
                return False
            self._remove(other)
            if self._is_wanted(other):  # fetched again in its time
                self._queue.setdefault(other, self._adapters[other])
        self._taken[key] = max(size, left)
        return True

    def _may_go(self, key: str, for_whom: str) -> bool:
        """Whether an adapter has no use; or only one to come, while another is awaited."""
        if self._held[key] or key in self._in_flight:
            return False
        return key not in self._ahead or self._is_awaited(for_whom)

    def _remove(self, key: str) -> None:
        self._here.pop(key, None)
        if self._folder is not None:
            remove_tree(self._folder / key)
            self._taken.pop(key, None)

    def _fetch(self, key: str, adapter: Adapter) -> tuple[FileFact, ...]:
        origin, client = adapter.origin, self._client
        assert origin is not None
        assert client is not None
        folder = None if self._folder is None else self._folder / key
        paths = tuple(client.download(origin.hub, file.path.name, folder) for file in adapter.files)
        facts = tuple(map(file_fact, paths))
        same = [f.size for f in facts] == [f.size for f in adapter.files]
        if not same or digest_of_records(tensor_records(paths)) != origin.records:
            raise AdapterError(
                "what was fetched is not what was planned",
                found=f"{sum(f.size for f in facts)} bytes",
                expected=f"{adapter.hub_bytes} bytes, with the same header",
                remedy="The cache is damaged, or the Hub changes what is pinned: remove the file, and run it again.",
            )
        return facts


def _given(adapter: Adapter, result: tuple[FileFact, ...] | AdapterError) -> Adapter | AdapterError:
    """An adapter with its files; or the error, said of it."""
    if isinstance(result, AdapterError):
        error = copy(result)
        error.adapter, error.source = adapter.name, adapter.where
        return error
    return replace(adapter, folder=result[0].path.parent, files=result, fetched=True)


@contextmanager
def fetching_for(settings: Settings, workspace: Path | None) -> Iterator[Fetcher]:
    """A fetcher into the workspace under a disk budget, else into the Hub's cache."""
    folder = None if workspace is None or settings.disk_budget is None else workspace / FILES
    with Fetcher(settings.offline, folder, settings.disk_budget) as fetcher:
        yield fetcher
    if workspace is not None:
        remove_tree(workspace / FILES)  # of a run before, which had a budget


def bytes_to_fetch(adapters: Iterable[Adapter], known: Iterable[str]) -> int:
    """Bytes of adapters of the Hub that are not in its cache, but for those `known` by name."""
    fresh = [e for e in adapters if e.origin is not None and e.name not in known]
    files = [(e.origin.hub, f) for e in fresh if e.origin is not None for f in e.files]
    return sum(f.size for hub_id, f in files if cached(hub_id, f.path.name) is None)
