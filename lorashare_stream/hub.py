"""The Hugging Face Hub, by its own client: what is permanent is said at once, what is not is waited out.

Permanent is what concerns one adapter (missing, gated, private, refused): an `AdapterError`. Waited out are rate
limits, errors of the server, and connections that fail, for `PATIENCE` seconds; then the run stops, and may be run
again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from .errors import StreamError, UnreachableError
from .huberrors import not_cached, passing, permanent
from .hubid import HubId
from .names import shown

T = TypeVar("T")
PATIENCE = 15 * 60.0  # seconds of waiting for one answer, outages of some minutes included
LONGEST = 330.0  # seconds waited at once: the Hub counts requests in windows of 5 minutes
UNHEARD = 60.0  # of the first answer to what may be a mistyped path
FIRST_PAUSE = 1.0  # seconds; doubled each time, up to a minute
FIRST_BYTES = 256 << 10  # of a weight file: the header, unless the adapter has some thousand tensors
TIMEOUT = 20.0  # seconds without a byte
log = logging.getLogger(__name__)


class _Pages:
    """A listing that goes on where a request for a page has failed."""

    def __init__(self, hub: Hub, query: dict[str, Any]) -> None:
        self.hub, self.query = hub, query
        self.given = 0
        self.models: Iterator[Any] | None = None

    def one(self) -> Any:
        """The next model; None after the last."""
        try:
            if self.models is None:
                self.models = islice(self.hub.api.list_models(**self.query), self.given, None)
            model = next(self.models, None)
        except Exception:
            self.models = None
            raise
        self.given += 1
        return model


class Hub:
    """The Hub as the environment has it: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE.

    Args:
        offline: never ask it; HF_HUB_OFFLINE=1 says the same.
        stopped: set when a run ends, so that nobody waits on.
    """

    def __init__(self, *, offline: bool = False, stopped: threading.Event | None = None) -> None:
        from huggingface_hub import is_offline_mode

        self.offline = offline or is_offline_mode()
        self.stopped = stopped or threading.Event()

    @property
    def api(self) -> Any:
        """The client, which takes the token from the environment."""
        from huggingface_hub import HfApi

        from .version import __version__

        return HfApi(library_name="lorashare-stream", library_version=__version__)

    def patiently(self, call: Callable[[], T], what: str, patience: float | None = None) -> T:
        """The result of a request; what may pass is waited out.

        Args:
            call: makes the request.
            what: it is for, in messages.
            patience: seconds; those of `PATIENCE` if None.

        Raises:
            AdapterError: if it cannot be had, whenever it is asked for.
            UnreachableError: if the Hub did not answer for `PATIENCE` seconds.
        """
        pause, waited = FIRST_PAUSE, 0.0
        while True:
            try:
                result = call()
                _HEARD.set()
                return result
            except Exception as e:
                why, seconds = passing(e)
                if why is None:
                    error = permanent(e, what, offline=self.offline)
                    if error is e:
                        raise
                    raise error from e
            seconds = min(LONGEST, pause if seconds is None else seconds)
            if waited + seconds > (PATIENCE if patience is None else patience):
                raise UnreachableError(
                    "the Hub cannot be reached", found=f"{why}, for {waited:.0f} s",
                    remedy="What is done is kept: run the same command again when it can be.",
                )  # fmt: skip
            _say_once(f"the Hub: {why}; waiting {seconds:.0f} s ({what})")
            if self.stopped.wait(seconds):
                raise UnreachableError("stopped while waiting for the Hub", found=why)
            waited, pause = waited + seconds, min(2 * pause, 60.0)

    def info(self, hub_id: HubId) -> Any:
        """The `ModelInfo` of a repository at a revision: one request, of the API.

        If nothing was heard of the Hub yet, what looks like an id may be a path that is mistyped: it is soon said.
        """
        self._demand_online(hub_id)
        return self.patiently(
            lambda: self.api.model_info(hub_id.repo, revision=hub_id.revision or None),
            f"{hub_id}, which is no folder here",
            None if _HEARD.is_set() else UNHEARD,
        )

    def models(self, **query: Any) -> Iterator[Any]:
        """The models that a query finds, as `HfApi.list_models` gives them: one request a page.

        A page that fails is asked for again from the beginning; what was given before is not given twice.
        """
        if self.offline:
            raise StreamError("the Hub cannot be asked offline", remedy="Use a manifest that was made before.")
        pages = _Pages(self, query)
        while (model := self.patiently(pages.one, "listing models")) is not None:
            yield model

    def head(self, hub_id: HubId, file: str) -> tuple[bytes, int]:
        """The first bytes of a safetensors file, its header among them, and its size: one ranged request.

        A header beyond `FIRST_BYTES` takes a second one.
        """
        self._demand_online(hub_id, file)

        def get(first: int, last: int) -> tuple[bytes, int]:
            return self.patiently(lambda: self._range(hub_id, file, first, last), f"{hub_id}: {file}")

        start, size = get(0, FIRST_BYTES - 1)
        end = 8 + int.from_bytes(start[:8], "little")
        if len(start) < end <= min(size, 100_000_000):
            rest, _ = get(len(start), end - 1)
            start += rest
        return start, size

    def _range(self, hub_id: HubId, file: str, first: int, last: int) -> tuple[bytes, int]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(hub_id.repo, hub_id.path(file), revision=hub_id.revision)
        headers = {**build_hf_headers(library_name="lorashare-stream"), "Range": f"bytes={first}-{last}"}
        headers["Accept-Encoding"] = "identity"  # sizes are those of the file
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            whole = response.status_code != 206  # a server that ignores the range sends all: it is not read to the end
            skip = first if whole else 0
            size = response.headers.get("Content-Length") if whole else _total(response.headers.get("Content-Range"))
            found = bytearray()
            for chunk in response.iter_bytes(1 << 16):
                found += chunk
                if len(found) >= skip + last - first + 1:
                    break
        return bytes(found[skip : skip + last - first + 1]), int(size if size is not None else len(found))

    def download(self, hub_id: HubId, file: str, folder: Path | None) -> Path:
        """A file of a pinned adapter, in a folder, or in the user's cache; without a request if it is there."""

        def get() -> str:
            from huggingface_hub import hf_hub_download

            found: str = hf_hub_download(
                hub_id.repo,
                hub_id.path(file),
                revision=hub_id.revision,
                local_dir=folder,
                library_name="lorashare-stream",
                tqdm_class=no_bar(),
                local_files_only=self.offline,
            )
            return found

        return Path(self.patiently(get, f"{hub_id}: {file}"))

    def cached(self, hub_id: HubId, file: str) -> Path | None:
        """A file in the user's cache, if it is there at this revision."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(hub_id.repo, hub_id.path(file), revision=hub_id.revision or None)
        return Path(found) if isinstance(found, str) else None

    def _demand_online(self, hub_id: HubId, file: str | None = None) -> None:
        if self.offline:
            raise not_cached(f"{hub_id}: {file}" if file else str(hub_id))


def cache_folder() -> Path:
    """Where the Hub's files lie for all programs: HF_HUB_CACHE."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _total(content_range: str | None) -> str | None:
    total = (content_range or "").rpartition("/")[2]
    return total if total.isdigit() else None


def no_bar() -> Any:
    """A progress bar that shows nothing: many files are fetched at once."""
    from tqdm import tqdm

    class NoBar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    return NoBar


_HEARD = threading.Event()  # the Hub has answered
_said_at = [0.0]
_SAY = threading.Lock()


def _say_once(text: str) -> None:
    """Of the many requests that wait for the same, one says so."""
    with _SAY:
        now = time.monotonic()
        if now - _said_at[0] > 5:
            _said_at[0] = now
            log.warning("%s", shown(text))
