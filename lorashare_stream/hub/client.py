"""The Hugging Face Hub, by its own client: each request through one `retry`, headers by ranged requests.

The client's own `parse_safetensors_file_metadata` is not asked: of a file it tells neither its size nor the SHA-256
that the Hub lists, which come with the same request, and it reads all of a file where ranges are ignored.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..adapters.folder import weights_beside
from ..adapters.hubid import HubId
from ..adapters.source import Listing
from ..errors import AdapterError, StreamError, UsageError
from .retry import Meaning, NoSecrets, not_cached, of_adapter, retry, unheard

T = TypeVar("T")
R = TypeVar("R")
Token = str | bool | None
AT_ONCE = 8  # requests in flight
FIRST_BYTES = 256 << 10  # of a weight file: the header, unless the adapter has some thousand tensors
MOST_HEADER = 16 << 20  # bytes of a header: that of a hundred thousand tensors
TIMEOUT = 20.0  # seconds without a byte
LONG_TIMEOUT = 120.0  # the same, of requests that make the Hub work: listings, commits
DEADLINE = 120.0  # seconds for a header


class Head(NamedTuple):
    """The beginning of a file: its first bytes, its size, and the SHA-256 of the whole if the Hub lists it."""

    start: bytes
    size: int
    sha256: str | None


class Hub:
    """The Hub as the environment has it: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE.

    Args:
        offline: never ask it; HF_HUB_OFFLINE=1 says the same.
        stopped: set when a run ends, so that nobody waits on.
    """

    def __init__(self, *, offline: bool = False, stopped: threading.Event | None = None) -> None:
        from huggingface_hub import get_token, is_offline_mode

        check_token(get_token())
        cache_folder()  # is known
        for handler in logging.getLogger("huggingface_hub").handlers:
            if not any(isinstance(f, NoSecrets) for f in handler.filters):
                handler.addFilter(NoSecrets())
        self.offline = offline or is_offline_mode()
        self.stopped = stopped or threading.Event()

    @property
    def api(self) -> Any:
        """The client, which takes the token from the environment."""
        from huggingface_hub import HfApi

        from ..version import __version__

        return HfApi(library_name="lorashare-stream", library_version=__version__)

    def retry(self, call: Callable[[], T], what: str, most: float | None = None, meaning: Meaning | None = None) -> T:
        """The result of a request, as `retry.retry`; errors are those of an adapter unless `meaning` gives others."""

        def attempt() -> T:
            _limit_session()
            return call()

        return retry(attempt, what, self.stopped, meaning or partial(of_adapter, offline=self.offline), most)

    def info(self, hub_id: HubId) -> Any:
        """The `ModelInfo` of a repository at a revision: one request, of the API.

        If nothing was heard of the Hub yet, what looks like an id may be a path that is mistyped: it is soon said.
        """
        self._demand_online(hub_id)

        def get() -> Any:
            try:
                return self.api.model_info(hub_id.repo, revision=hub_id.revision or None, timeout=TIMEOUT)
            except (TypeError, AttributeError, KeyError) as e:
                problem = "what the Hub says of it cannot be read"
                raise AdapterError(problem, found=type(e).__name__, remedy="Leave it out.") from e

        return self.retry(get, str(hub_id), unheard())

    def models(self, **query: Any) -> Iterator[Any]:
        """The models that a query finds, as `HfApi.list_models` gives them: one request a page.

        The client's own function tries a page again by itself, and waits for an answer for ever.
        """
        if self.offline:
            raise StreamError("the Hub cannot be asked offline", remedy="Use a manifest that was made before.")
        url: str | None = f"{self.api.endpoint}/api/models"
        asked: dict[str, Any] | None = {name: value for name, value in query.items() if value}
        while url:
            page, url = self.retry(partial(_page, url, asked), "listing models", unheard())
            asked = None  # the address of the next page has it
            yield from page

    def head(self, hub_id: HubId, file: str) -> Head:
        """The first bytes of a safetensors file, its header among them: one ranged request.

        A header beyond `FIRST_BYTES` takes a second one.
        """
        self._demand_online(hub_id, file)

        def get(first: int, last: int) -> Head:
            return self.retry(lambda: self._range(hub_id, file, first, last), f"{hub_id}: {file}", unheard())

        start, size, sha256 = get(0, FIRST_BYTES - 1)
        end = 8 + int.from_bytes(start[:8], "little")
        if end > MOST_HEADER and end <= size and file.endswith(".safetensors"):
            raise AdapterError(
                "a header that is longer than that of an adapter", key=file, found=f"{end} bytes",
                expected=f"at most {MOST_HEADER}", remedy="Leave it out, or fetch it and name its folder.",
            )  # fmt: skip
        if len(start) < end <= min(size, MOST_HEADER):
            start += get(len(start), end - 1).start
        return Head(start, size, sha256)

    def text(self, hub_id: HubId, file: str) -> bytes:
        """A small file, by one ranged request.

        Raises:
            AdapterError: if it is none.
        """
        self._demand_online(hub_id, file)
        what = f"{hub_id}: {file}"
        found, size, _ = self.retry(lambda: self._range(hub_id, file, 0, MOST_HEADER - 1), what, unheard())
        if size > MOST_HEADER:
            raise AdapterError("a file that is too large", key=file, found=f"{size} bytes", remedy="Leave it out.")
        return found

    def part(self, hub_id: HubId, file: str, offset: int, count: int, token: Token = None) -> bytes:
        """Bytes of a file, fewer at its end: one ranged request, which is not retried.

        Args:
            hub_id, file: the file.
            offset, count: of the bytes.
            token: for the client, which else takes that of the environment.
        """
        return self._range(hub_id, file, offset, offset + count - 1, token).start if count else b""

    def _range(self, hub_id: HubId, file: str, first: int, last: int, token: Token = None) -> Head:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(hub_id.repo, hub_id.path(file), revision=hub_id.revision)
        headers = {**build_hf_headers(token=token, library_name="lorashare-stream"), "Range": f"bytes={first}-{last}"}
        headers["Accept-Encoding"] = "identity"  # sizes are those of the file
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            if response.status_code == 416:  # a file that ends before
                return Head(b"", 0, None)
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            whole = response.status_code != 206  # a server that ignores the range sends all: it is not read to the end
            skip = first if whole else 0
            size = _number(response.headers.get("Content-Length" if whole else "Content-Range", "").rpartition("/")[2])
            if size is None:
                raise ConnectionError("an answer without its length")
            found, end = bytearray(), time.monotonic() + DEADLINE
            for chunk in response.iter_bytes(1 << 16):
                found += chunk
                if time.monotonic() > end:
                    raise TimeoutError("a server that is too slow")
                if len(found) >= skip + last - first + 1:
                    break
            told = [r.headers.get("X-Linked-Etag", "").strip('"') for r in (*response.history, response)]
        sha256 = next((text for text in told if re.fullmatch("[0-9a-f]{64}", text)), None)
        return Head(bytes(found[skip : skip + last - first + 1]), size, sha256)

    def download(self, hub_id: HubId, file: str, folder: Path | None) -> Path:
        """A file of a pinned adapter, in a folder, or in the user's cache; without a request if it is there."""
        get = partial(self.file, hub_id, file, local_dir=folder, tqdm_class=no_bar(), local_files_only=self.offline)
        return self.retry(get, f"{hub_id}: {file}")

    def file(self, hub_id: HubId, file: str, **how: Any) -> Path:
        """A file of a repository at a revision, as `hf_hub_download` has it; it is not retried."""
        return Path(self.api.hf_hub_download(hub_id.repo, hub_id.path(file), revision=hub_id.revision, **how))

    def in_parallel(self, call: Callable[[T], R], items: Iterable[T]) -> Iterator[R | AdapterError]:
        """The results of requests, in order, some at a time; what concerns one adapter alone is a result too."""

        def one(item: T) -> R | AdapterError:
            try:
                return call(item)
            except AdapterError as e:
                return e

        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="hub")
        try:
            yield from pool.map(one, items)
        except BaseException:
            self.stopped.set()  # nobody waits on for an answer
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()

    def cached(self, hub_id: HubId, file: str) -> Path | None:
        """A file in the user's cache, if it is there at this revision."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(hub_id.repo, hub_id.path(file), revision=hub_id.revision or None)
        return Path(found) if isinstance(found, str) else None

    def commits(self, hub_id: HubId) -> list[str]:
        """The commits of a repository that the user's cache has files of."""
        folder = repo_folder(cache_folder(), hub_id.repo) / "snapshots"
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []

    def _demand_online(self, hub_id: HubId, file: str | None = None) -> None:
        if self.offline:
            raise not_cached(f"{hub_id}: {file}" if file else str(hub_id))


def _limit_session() -> None:
    """Have a limit on the time of every request: the client asks without one, and drops its session after a failure."""
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    if _limit not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _limit]}


def _limit(request: Any) -> None:
    """Limit the time of a request where its caller does not."""
    read = min(LONG_TIMEOUT, unheard() or LONG_TIMEOUT)
    given = {name: seconds for name, seconds in request.extensions.get("timeout", {}).items() if seconds is not None}
    request.extensions["timeout"] = {"connect": min(TIMEOUT, read), "read": read, "write": read, "pool": read} | given


def _page(url: str, query: Mapping[str, Any] | None) -> tuple[list[Any], str | None]:
    """One page of a listing of models, and the address of the next one."""
    from huggingface_hub import ModelInfo, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    response = get_session().get(url, params=query, headers=build_hf_headers(library_name="lorashare-stream"))
    hf_raise_for_status(response)
    found = [ModelInfo(**{"siblings": None, **item}) for item in response.json()]  # type: ignore[no-untyped-call]
    return found, response.links.get("next", {}).get("url")


def cache_folder() -> Path:
    """Where the Hub's files lie for all programs: HF_HUB_CACHE.

    Raises:
        StreamError: if nobody has said where, and this user has no home.
    """
    from huggingface_hub import constants

    try:
        return Path(constants.HF_HUB_CACHE).expanduser()
    except RuntimeError as e:
        raise StreamError(
            "there is no place for the Hub's files: this user has no home folder", found=constants.HF_HUB_CACHE,
            remedy="Set HF_HOME to a folder that may be written.",
        ) from e  # fmt: skip


def repo_folder(cache: Path, repo: str) -> Path:
    """Where a cache has the files of a repository."""
    from huggingface_hub.file_download import repo_folder_name

    return cache / repo_folder_name(repo_id=repo, repo_type="model")


def check_token(token: Token) -> None:
    """Refuse a token that cannot be one, without showing it.

    Raises:
        UsageError: if it has characters that none has.
    """
    if isinstance(token, str) and not (token and token.isascii() and token.isprintable()):
        raise UsageError("the token has characters that none has", remedy="Look for a line break, or a blank, in it.")


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def no_bar() -> Any:
    """A progress bar that shows nothing: many files are fetched at once."""
    from tqdm import tqdm

    class NoBar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    return NoBar


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
