"""Adapters of the Hub on this machine: fetched ahead of their use, some at a time, and evicted when room is needed."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .adapterfiles import file_fact, tensor_records
from .entry import Entry
from .errors import AdapterError
from .files import remove_tree, tree_bytes
from .hub import Hub
from .ledger import digest_of_records
from .names import slug

AT_ONCE = 8  # downloads in flight
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
        self._queue: deque[Entry] = deque()
        self._wanted: Counter[str] = Counter()  # by name: uses that were announced, and are not over
        self._ahead: Counter[str] = Counter()  # those of them that are yet to begin
        self._awaited: set[str] = set()  # somebody waits for them now: they go before what is fetched ahead
        self._busy: set[str] = set()  # in the queue, or being fetched
        self._here: dict[str, Entry | AdapterError] = {}
        self._taken: dict[str, int] = {}  # bytes by subfolder, those reserved for what is being fetched included
        self._entries: dict[str, Entry] = {}  # by subfolder: what was ever wanted
        self._failure: BaseException | None = None
        self._closed = False
        for left in folder.iterdir() if folder is not None and folder.is_dir() else ():
            for torn in left.rglob("*.incomplete"):
                torn.unlink()
            self._taken[left.name] = tree_bytes(left) - tree_bytes(left / ".cache")  # of the client, and small

    def ahead(self, entries: Iterable[Entry]) -> None:
        """Say what will be wanted, in order, so that it is fetched when there is room."""
        with self._changed:
            remote = [e for e in entries if not e.fetched and not self._ahead[e.name]]
            self._ahead.update(e.name for e in remote)
        self._want(remote)

    def arriving(self, entries: Sequence[Entry]) -> Iterator[Entry | AdapterError]:
        """The adapters with their files on this machine, as they come: local ones at once, then those of the Hub.

        Those that cannot be had are given as errors. Each is held until it is released.

        Raises:
            UnreachableError: if the Hub does not answer.
        """
        yield from (e for e in entries if e.fetched)
        remote = {e.name: e for e in entries if not e.fetched}
        with self._changed:
            fresh = [e for e in remote.values() if not self._ahead[e.name]]
            self._ahead -= Counter(remote.keys())
            self._awaited |= remote.keys()
        self._want(fresh)
        while remote:
            with self._changed:
                self._changed.wait_for(lambda: self._failure is not None or remote.keys() & self._here.keys())
                if self._failure is not None:
                    raise self._failure
                come = [(name, self._here[name]) for name in remote if name in self._here]
                self._awaited -= {name for name, _ in come}
            for name, result in come:
                del remote[name]
                yield result

    def only(self, entries: Iterable[Entry]) -> None:
        """Say that of what was announced no others than these are wanted after all."""
        with self._changed:
            for name in {name for name, count in self._ahead.items() if count} - {e.name for e in entries}:
                self._wanted[name] -= self._ahead.pop(name)
            self._wanted += Counter()  # drops what is at 0
            dropped = {e.name for e in self._queue if not self._wanted[e.name]}
            self._queue = deque(e for e in self._queue if e.name not in dropped)
            self._busy -= dropped

    def release(self, names: Iterable[str]) -> None:
        """Say that a use of adapters is over."""
        with self._changed:
            self._wanted -= Counter(n for n in names if self._wanted[n])
            self._changed.notify_all()

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

    def _want(self, entries: Sequence[Entry]) -> None:
        with self._changed:
            for entry in entries:
                self._entries[slug(entry.source_id)] = entry
                if entry.name not in self._busy and entry.name not in self._here:
                    self._busy.add(entry.name)
                    self._queue.append(entry)
                self._wanted[entry.name] += 1
            self._queue = deque(sorted(self._queue, key=self._urgency))
            while entries and len(self._threads) < AT_ONCE:
                self._client = self._client or self._hub()
                thread = threading.Thread(target=self._work, name="lorashare-stream-fetch", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._queue and self._has_room(self._queue[0])))
                if self._closed:
                    return
                entry = self._queue.popleft()
            try:
                result: Entry | AdapterError = self._fetch(entry)
            except AdapterError as e:
                e.adapter, e.source = entry.name, entry.where
                result = e
            except BaseException as e:  # of the Hub or this machine: said by whoever waits
                with self._changed:
                    self._failure, self._closed = e, True
                    self._changed.notify_all()
                return
            with self._changed:
                self._here[entry.name] = result
                self._busy.discard(entry.name)
                self._changed.notify_all()

    def _has_room(self, entry: Entry) -> bool:
        """Whether there is room for an adapter, which is reserved; what nobody wants is evicted for it."""
        if self._folder is None or self._budget is None:
            return True
        place = slug(entry.source_id)
        need = entry.hub_bytes - self._taken.get(place, 0)  # a killed run may have left it, or a part
        while need > 0 and sum(self._taken.values()) + need > self._budget:
            other = next((p for p in self._taken if self._may_go(p, for_whom=entry.name)), None)
            if other is None:
                return False
            self._evict(self._folder, other)
        self._taken[place] = max(entry.hub_bytes, self._taken.get(place, 0))
        return True

    def _may_go(self, place: str, for_whom: str) -> bool:
        """Whether what is in a subfolder is not wanted; or is ahead of its time, while somebody waits for another."""
        name = self._entries[place].name if place in self._entries else ""
        uses = self._ahead[name] if for_whom in self._awaited else 0
        return self._wanted[name] == uses and name not in self._busy

    def _evict(self, folder: Path, place: str) -> None:
        remove_tree(folder / place)
        del self._taken[place]
        entry = self._entries.get(place)
        if entry is not None:
            self._here.pop(entry.name, None)
            if self._wanted[entry.name]:  # it is fetched again in its time
                self._busy.add(entry.name)
                self._queue.append(entry)

    def _urgency(self, entry: Entry) -> tuple[bool, bool]:
        """What somebody waits for is first, then what a killed run has left, or a part of it."""
        return entry.name not in self._awaited, slug(entry.source_id) not in self._taken

    def _fetch(self, entry: Entry) -> Entry:
        origin, client = entry.origin, self._client
        assert origin is not None
        assert client is not None
        place = None if self._folder is None else self._folder / slug(entry.source_id)
        paths = [
            client.cached(origin.hub, file.path.name) or client.download(origin.hub, file.path.name, place)
            for file in entry.files
        ]
        facts = tuple(file_fact(path) for path in paths)
        same = [f.size for f in facts] == [f.size for f in entry.files]
        if not same or (
            paths[0].suffix != ".bin" and digest_of_records(tensor_records(tuple(paths))) != origin.records
        ):
            raise AdapterError(
                "what was fetched is not what was planned",
                found=f"{sum(f.size for f in facts)} bytes",
                expected=f"{entry.hub_bytes} bytes, with the same header",
                remedy="The cache is damaged, or the Hub changes what is pinned: remove the file, and run it again.",
            )
        return replace(entry, folder=paths[0].parent, files=facts, fetched=True)


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
