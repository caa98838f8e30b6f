"""Requests to the Hugging Face Hub by its own client, each through one `retry`; headers by ranged requests.

Of the client's own functions, `list_models` and `HfFileSystem` retry by themselves, outside of our limits, and
`parse_safetensors_file_metadata` tells neither the size of a file nor the SHA-256 that the Hub lists, which come with
the same request, and reads all of a file where ranges are ignored.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..adapters.folder import weights_beside
from ..adapters.hubid import HubId
from ..adapters.source import Listing
from ..errors import AdapterError, StreamError, UsageError
from .retry import Meaning, no_secrets, not_cached, of_adapter, retry, unheard

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
    """The first bytes of a file, its size, and the SHA-256 of the whole if the Hub lists it."""

    start: bytes
    size: int
    sha256: str | None


class Hub:
    """Client of the Hub, as the environment has it: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE.

    Attributes:
        api: huggingface_hub's, which takes the token from the environment.
        offline: whether the Hub is never asked; HF_HUB_OFFLINE=1 says the same.
        stopped: set when a run ends: retries end too.
    """

    def __init__(self, *, offline: bool = False) -> None:
        from huggingface_hub import HfApi, get_token, is_offline_mode

        from ..version import __version__

        check_token(get_token())
        cache_folder()  # is known
        for handler in logging.getLogger("huggingface_hub").handlers:
            handler.addFilter(no_secrets)
        self.api = HfApi(library_name="lorashare-stream", library_version=__version__)
        self.offline = offline or is_offline_mode()
        self.stopped = threading.Event()

    def retry(self, call: Callable[[], T], what: str, meaning: Meaning | None = None, *, certain: bool = False) -> T:
        """The result of a request, as `retry.retry`; the meaning of permanent errors is, if not given, `of_adapter`.

        Unless it is `certain` that the Hub has what is asked for, an id may be a mistyped path: a request is then soon
        given up, if nothing was heard of the Hub yet.
        """

        def attempt() -> T:
            _limit_session()
            return call()

        most = None if certain else unheard()
        return retry(attempt, what, self.stopped, meaning or partial(of_adapter, offline=self.offline), most)

    def info(self, hub_id: HubId) -> Any:
        """The `ModelInfo` of a repository at a revision: one request, of the API."""

        def get() -> Any:
            if self.offline:
                raise not_cached(str(hub_id))
            try:
                return self.api.model_info(hub_id.repo, revision=hub_id.revision or None, timeout=TIMEOUT)
            except (TypeError, AttributeError, KeyError) as e:
                problem = "what the Hub says of it cannot be read"
                raise AdapterError(problem, found=type(e).__name__, remedy="Leave it out.") from e

        return self.retry(get, str(hub_id))

    def head(self, hub_id: HubId, file: str) -> Head:
        """The first bytes of a safetensors file, its header among them: one ranged request.

        A header beyond `FIRST_BYTES` takes a second one.
        """
        start, size, sha256 = self._ask(hub_id, file, 0, FIRST_BYTES)
        end = 8 + int.from_bytes(start[:8], "little")
        if end > MOST_HEADER and end <= size and file.endswith(".safetensors"):
            raise AdapterError(
                "a header that is longer than that of an adapter", key=file, found=f"{end} bytes",
                expected=f"at most {MOST_HEADER}", remedy="Leave it out, or fetch it and name its folder.",
            )  # fmt: skip
        if len(start) < end <= min(size, MOST_HEADER):
            start += self._ask(hub_id, file, len(start), end - len(start)).start
        return Head(start, size, sha256)

    def text(self, hub_id: HubId, file: str) -> bytes:
        """A small file, by one ranged request.

        Raises:
            AdapterError: if it is none.
        """
        found, size, _ = self._ask(hub_id, file, 0, MOST_HEADER)
        if size > MOST_HEADER:
            raise AdapterError("a file that is too large", key=file, found=f"{size} bytes", remedy="Leave it out.")
        return found

    def _ask(self, hub_id: HubId, file: str, offset: int, count: int) -> Head:
        return self.retry(lambda: self.part(hub_id, file, offset, count), f"{hub_id}: {file}")

    def part(self, hub_id: HubId, file: str, offset: int, count: int, token: Token = None) -> Head:
        """Bytes of a file, fewer at its end: one ranged request, which is not retried."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        if self.offline:
            raise not_cached(f"{hub_id}: {file}")
        url = hf_hub_url(hub_id.repo, hub_id.path(file), revision=hub_id.revision)
        headers = build_hf_headers(token=token, library_name="lorashare-stream")
        headers |= {"Range": f"bytes={offset}-{offset + count - 1}"}
        headers["Accept-Encoding"] = "identity"  # sizes are those of the file
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            if response.status_code == 416:  # a file that ends before
                return Head(b"", 0, None)
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            whole = response.status_code != 206  # a server that ignores the range sends all: it is not read to the end
            size = response.headers.get("Content-Length" if whole else "Content-Range", "").rpartition("/")[2]
            if re.fullmatch("[0-9]{1,18}", size) is None:
                raise ConnectionError("an answer without its length")
            skip, found, end = offset if whole else 0, bytearray(), time.monotonic() + DEADLINE
            for chunk in response.iter_bytes(1 << 16):
                found += chunk
                if time.monotonic() > end:
                    raise TimeoutError("a server that is too slow")
                if len(found) >= skip + count:
                    break
            told = [r.headers.get("X-Linked-Etag", "").strip('"') for r in (*response.history, response)]
        sha256 = next((text for text in told if re.fullmatch("[0-9a-f]{64}", text)), None)
        return Head(bytes(found[skip : skip + count]), int(size), sha256)

    def download(self, hub_id: HubId, file: str, folder: Path | None) -> Path:
        """A file of a pinned adapter: in the user's cache if it is there, else fetched, into a folder or the cache."""
        if (found := cached(hub_id, file)) is not None:
            return found
        get = partial(
            self.api.hf_hub_download, hub_id.repo, hub_id.path(file), revision=hub_id.revision, local_dir=folder,
            tqdm_class=no_bar(), local_files_only=self.offline,
        )  # fmt: skip
        return Path(self.retry(get, f"{hub_id}: {file}", certain=True))

    def in_parallel(self, call: Callable[[T], R], items: Iterable[T]) -> Iterator[R | AdapterError]:
        """The results of requests, in order, `AT_ONCE` at a time; an AdapterError is a result too."""

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


def _limit_session() -> None:
    """Limit the time of every request: the client has no limit, and drops its session after a failure."""
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


def cache_folder() -> Path:
    """The folder of the Hub's files for all programs: HF_HUB_CACHE.

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
    """The folder of a repository in a cache."""
    from huggingface_hub.file_download import repo_folder_name

    return cache / repo_folder_name(repo_id=repo, repo_type="model")


def cached(hub_id: HubId, file: str) -> Path | None:
    """A file in the user's cache, if it is there at this revision."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id.repo, hub_id.path(file), revision=hub_id.revision or None)
    return Path(found) if isinstance(found, str) else None


def check_token(token: Token) -> None:
    """Refuse a token that cannot be one, without showing it.

    Raises:
        UsageError: if it has characters that none has.
    """
    if isinstance(token, str) and not (token and token.isascii() and token.isprintable()):
        raise UsageError("the token has characters that none has", remedy="Look for a line break, or a blank, in it.")


def no_bar() -> Any:
    """A progress bar that shows nothing, since many files are fetched at once; `silent_tqdm` lacks what Xet calls."""
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
        peft_of(info).get("base_model_name_or_path") or _first(getattr(card, "base_model", None)),
        None if info.gated is None else bool(info.gated),
        None if info.private is None else bool(info.private),
        _first(getattr(card, "license", None)) or next((t[8:] for t in tags if t.startswith("license:")), None),
    )


def peft_of(info: Any) -> dict[str, Any]:
    """What the Hub has read of an adapter's configuration."""
    found = info.config.get("peft") if isinstance(info.config, dict) else None
    return found if isinstance(found, dict) else {}


def _first(value: Any) -> str | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) and value else None
