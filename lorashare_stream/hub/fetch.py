"""Adapters of the Hub on this machine: fetched ahead of their use, some at a time, and evicted when room is needed."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path

from ..adapters.adapter import Adapter
from ..adapters.folder import FileFact, file_fact, tensor_records
from ..errors import AdapterError
from ..files import remove_tree, tree_bytes
from ..text import slug
from .client import AT_ONCE, Hub
from .ledger import digest_of_records

LINGER = 3.0  # seconds in which what is nearly here may come, when a run fails


class Fetcher:
    """Fetches adapters in the order in which they are wanted, by threads of its own.

    Without a folder they come into the Hub's cache and stay there. With one they come into it, up to a number of
    bytes: what nobody wants any more goes when there is need of its room. What is in the Hub's cache is used from
    there; nothing in it is ever removed.

    Args:
        hub: the client, made when something is fetched.
        folder: a private one; what a killed run left in it is used.
        budget: bytes that the adapters in it may have.
    """

    def __init__(self, hub: Callable[[], Hub], folder: Path | None = None, budget: int | None = None) -> None:
        self._hub, self._folder, self._budget = hub, folder, budget
        self._changed = threading.Condition()
        self._client: Hub | None = None
        self._threads: list[threading.Thread] = []
        self._queue: deque[Adapter] = deque()
        # By source id, since a name may be given again, and an adapter have two:
        self._wanted: Counter[str] = Counter()  # uses that were announced, and are not over
        self._ahead: Counter[str] = Counter()  # those of them that are yet to begin
        self._awaited: set[str] = set()  # somebody waits for them now: they go before what is fetched ahead
        self._queued: set[str] = set()
        self._fetched: set[str] = set()  # being fetched
        self._here: dict[str, tuple[FileFact, ...] | AdapterError] = {}
        self._entries: dict[str, Adapter] = {}  # by subfolder: what was ever wanted
        self._taken: dict[str, int] = {}  # bytes by subfolder, those reserved for what is being fetched included
        self._failure: BaseException | None = None
        self._closed = False
        for left in folder.iterdir() if folder is not None and folder.is_dir() else ():
            for torn in left.rglob("*.incomplete"):
                torn.unlink()
            self._taken[left.name] = tree_bytes(left) - tree_bytes(left / ".cache")  # of the client, and small

    def prefetch(self, adapters: Iterable[Adapter]) -> None:
        """Prefetch adapters, in order, as room allows."""
        with self._changed:
            remote = {e.source_id: e for e in adapters if not e.fetched and not self._ahead[e.source_id]}
            self._ahead.update(remote.keys())
        self._want(remote.values())

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
                remote.setdefault(adapter.source_id, []).append(adapter)
        with self._changed:
            announced = {source_id for source_id in remote if self._ahead.pop(source_id, 0)}  # one use of each
            fresh = [e for source_id, some in remote.items() for e in some[source_id in announced :]]
            self._awaited |= remote.keys()
        self._want(fresh)
        while remote:
            with self._changed:
                self._changed.wait_for(lambda: self._failure is not None or remote.keys() & self._here.keys())
                if self._failure is not None:
                    raise self._failure
                come = [(source_id, self._here[source_id]) for source_id in remote if source_id in self._here]
                self._awaited -= {source_id for source_id, _ in come}
            for source_id, result in come:
                yield from (_given(adapter, result) for adapter in remote.pop(source_id))

    def cancel_except(self, adapters: Iterable[Adapter]) -> None:
        """Cancel every prefetch except those of `adapters`."""
        with self._changed:
            for source_id in self._ahead.keys() - {e.source_id for e in adapters}:
                self._wanted[source_id] -= self._ahead.pop(source_id)
            self._wanted += Counter()  # drops what is at 0
            self._queue = deque(e for e in self._queue if self._wanted[e.source_id])
            self._queued = {e.source_id for e in self._queue}

    def release(self, adapters: Iterable[Adapter]) -> None:
        """Say that a use of adapters is over."""
        with self._changed:
            for adapter in adapters:
                if self._wanted[adapter.source_id]:
                    self._wanted[adapter.source_id] -= 1
            self._changed.notify_all()

    def evict(self, adapter: Adapter) -> None:
        """Evict the files of an adapter: a later use fetches them again; the Hub's cache is not touched."""
        with self._changed:
            self._here.pop(adapter.source_id, None)
            if self._folder is not None:
                remove_tree(self._folder / slug(adapter.source_id))
                self._taken.pop(slug(adapter.source_id), None)

    def close(self, *, finished: bool) -> None:
        """Stop fetching; once nothing is wanted any more, remove what was fetched into the folder."""
        with self._changed:
            self._closed = True
            if self._client is not None:
                self._client.stopped.set()
            self._changed.notify_all()
        end = time.monotonic() + (LINGER if not finished else 3600)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if finished and self._folder is not None:
            remove_tree(self._folder)

    def _want(self, adapters: Iterable[Adapter]) -> None:
        adapters = list(adapters)
        with self._changed:
            for adapter in adapters:
                self._entries[slug(adapter.source_id)] = adapter
                if not any(adapter.source_id in some for some in (self._queued, self._fetched, self._here)):
                    self._enqueue(adapter)
                self._wanted[adapter.source_id] += 1
            self._queue = deque(sorted(self._queue, key=self._urgency))
            while adapters and len(self._threads) < AT_ONCE:
                self._client = self._client or self._hub()
                thread = threading.Thread(target=self._work, name="lorashare-stream-fetch", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def _enqueue(self, adapter: Adapter) -> None:
        self._queued.add(adapter.source_id)
        self._queue.append(adapter)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._queue and self._has_room(self._queue[0])))
                if self._closed:
                    return
                adapter = self._queue.popleft()
                self._queued.discard(adapter.source_id)
                self._fetched.add(adapter.source_id)
            try:
                result: tuple[FileFact, ...] | AdapterError = self._fetch(adapter)
            except AdapterError as e:
                result = e
            except BaseException as e:  # of the Hub or this machine: said by whoever waits
                with self._changed:
                    self._failure, self._closed = e, True
                    self._changed.notify_all()
                return
            with self._changed:
                if isinstance(result, AdapterError) and self._folder is not None:  # nothing that takes room
                    remove_tree(self._folder / slug(adapter.source_id))
                    self._taken.pop(slug(adapter.source_id), None)
                self._here[adapter.source_id] = result
                self._fetched.discard(adapter.source_id)
                self._changed.notify_all()

    def _has_room(self, adapter: Adapter) -> bool:
        """Whether there is room for an adapter, which is reserved; what nobody wants is evicted for it."""
        if self._folder is None or self._budget is None:
            return True
        place = slug(adapter.source_id)
        need = adapter.hub_bytes - self._taken.get(place, 0)  # a killed run may have left it, or a part
        while need > 0 and sum(self._taken.values()) + need > self._budget:
            other = next((p for p in self._taken if p != place and self._may_go(p, for_whom=adapter.source_id)), None)
            if other is None:
                return False
            self._evict(self._folder, other)
        self._taken[place] = max(adapter.hub_bytes, self._taken.get(place, 0))
        return True

    def _may_go(self, place: str, for_whom: str) -> bool:
        """Whether what is in a subfolder is not wanted; or is ahead of its time, while somebody waits for another."""
        source_id = self._entries[place].source_id if place in self._entries else ""
        uses = self._ahead[source_id] if for_whom in self._awaited else 0
        return self._wanted[source_id] == uses and source_id not in self._fetched

    def _evict(self, folder: Path, place: str) -> None:
        remove_tree(folder / place)
        del self._taken[place]
        adapter = self._entries.get(place)
        if adapter is not None:
            self._here.pop(adapter.source_id, None)
            if self._wanted[adapter.source_id] and adapter.source_id not in self._queued:  # fetched again in its time
                self._enqueue(adapter)

    def _urgency(self, adapter: Adapter) -> tuple[bool, bool]:
        """What somebody waits for is first, then what a killed run has left whole: it needs no more room."""
        left = self._taken.get(slug(adapter.source_id), -1)
        return adapter.source_id not in self._awaited, left < adapter.hub_bytes

    def _fetch(self, adapter: Adapter) -> tuple[FileFact, ...]:
        origin, client = adapter.origin, self._client
        assert origin is not None
        assert client is not None
        place = None if self._folder is None else self._folder / slug(adapter.source_id)
        paths = [
            client.cached(origin.hub, file.path.name) or client.download(origin.hub, file.path.name, place)
            for file in adapter.files
        ]
        facts = tuple(file_fact(path) for path in paths)
        same = [f.size for f in facts] == [f.size for f in adapter.files]
        if not same or digest_of_records(tensor_records(tuple(paths))) != origin.records:
            raise AdapterError(
                "what was fetched is not what was planned",
                found=f"{sum(f.size for f in facts)} bytes",
                expected=f"{adapter.hub_bytes} bytes, with the same header",
                remedy="The cache is damaged, or the Hub changes what is pinned: remove the file, and run it again.",
            )
        return facts


def _given(adapter: Adapter, result: tuple[FileFact, ...] | AdapterError) -> Adapter | AdapterError:
    """An adapter with its files, or the error, for one of those who wait for it."""
    if isinstance(result, AdapterError):
        error = copy(result)
        error.adapter, error.source = adapter.name, adapter.where
        return error
    return replace(adapter, folder=result[0].path.parent, files=result, fetched=True)


@contextmanager
def fetching(offline: bool, folder: Path | None = None, budget: int | None = None) -> Iterator[Fetcher]:
    """A fetcher, closed at the end of the block; what it has in the folder stays if the block fails."""
    fetcher = Fetcher(lambda: Hub(offline=offline), folder, budget)
    try:
        yield fetcher
    except BaseException:
        fetcher.close(finished=False)
        raise
    fetcher.close(finished=True)
