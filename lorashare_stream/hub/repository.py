"""Repository of a checkpoint at one commit of the Hub: its files come one at a time, and parts of packs.

The commit is pinned at open, so that a checkpoint which is replaced on the Hub meanwhile is never mixed with it. Files
lie in the Hub's cache, where other programs find them; what is there of a commit is not asked for again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from glob import escape
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ..adapters.folder import CONFIG as ADAPTER_CONFIG
from ..adapters.hubid import HubId, cached_id, parse_hub_id
from ..checkpoint.format import ADAPTERS, COMPONENTS, CONFIG, FILES, INDEX, LOADINGS, META, PACKS, VERBATIM
from ..checkpoint.location import Folder, Place
from ..errors import CheckpointError, MissingCheckpointError, StreamError, UsageError
from ..files import atomic_path
from ..text import listed, printable
from .client import Hub, Token, cache_folder, check_token, no_bar, repo_folder
from .retry import first_of, of_adapter

T = TypeVar("T")
LARGE = 64 << 20  # bytes of a part for which the whole file is fetched, since a download goes on where it was cut


class Repository(Place):
    """A checkpoint at a commit of a repository on the Hub.

    Args:
        hub: its client; offline, the cache must do.
        hub_id: of the checkpoint; a revision that is no commit is pinned, by one request of the API.
        token: for the client, which else takes that of the environment; it is said nowhere.
        cache_dir: of the Hub's files, if not that of the environment.
        force_download: whether each file is fetched, once, though it is in the cache.

    Raises:
        MissingCheckpointError: if there is none.
        CheckpointError: if it may not be read.
        UnreachableError: if the Hub cannot be reached; what is in the cache is then no answer.
    """

    mixed = "this commit has parts of two checkpoints, push it again"
    near = 256 << 10  # a request takes as long as so many bytes

    def __init__(
        self,
        hub: Hub,
        hub_id: HubId,
        *,
        token: Token = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
    ) -> None:
        self._hub, self._token, self._force = hub, token, force_download
        self._renewed: set[str] = set()
        self._cache = (Path(cache_dir).expanduser() if cache_dir else cache_folder()).absolute()
        self.id = hub_id
        try:
            self.id = self._pinned()
            self.root = self.file(CONFIG).parent
        except CheckpointError:  # a FileNotFoundError too, where it is the repository that is missing
            raise
        except FileNotFoundError:
            raise self._no_checkpoint() from None
        if not hub.offline and not hub_id.pinned:
            self._remember(hub_id.revision or "main")

    def __str__(self) -> str:
        return str(self.id)

    def _pinned(self) -> HubId:
        if self.id.pinned:
            return self.id
        if self._hub.offline:
            config = self._cached(CONFIG)
            if config is None:
                raise self._not_cached(CONFIG)
            there = cached_id(str(config.parent))
            sha = "" if there is None else there.revision
        else:
            api, revision = self._hub.api, self.id.revision or None
            ask = partial(api.model_info, self.id.repo, revision=revision, expand=["sha"], token=self._token)
            sha = str(self._retry(ask, str(self.id)).sha)
        pinned = replace(self.id, revision=sha)
        if not pinned.pinned:
            raise CheckpointError("no commit is named for the revision", found=sha, expected="40 hex digits")
        return pinned

    def file(self, relative: str) -> Path:
        """The path of a file in the cache, fetched if it is not there.

        Raises:
            FileNotFoundError: if the commit has no such file.
            CheckpointError: if it may not be read, or is not in the cache and this is offline.
        """
        renew = self._force and relative not in self._renewed
        if not renew and (found := self._cached(relative)) is not None:
            return found
        if self._hub.offline:
            raise self._not_cached(relative)
        get = partial(
            self._hub.api.hf_hub_download, self.id.repo, self.id.path(relative), revision=self.id.revision,
            cache_dir=self._cache, token=self._token, force_download=renew,
            tqdm_class=None if relative == COMPONENTS else no_bar(),
        )  # fmt: skip
        path = Path(self._retry(get, f"{self.id}: {relative}"))
        self._renewed.add(relative)
        return path

    def _cached(self, relative: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        revision = self.id.revision or "main"
        found = try_to_load_from_cache(self.id.repo, self.id.path(relative), self._cache, revision)
        if not isinstance(found, str | None):  # it was asked for before, and the commit has no such file
            raise FileNotFoundError(relative)
        return None if found is None else Path(found)

    def read(self, relative: str, offset: int, count: int) -> bytes:
        """Bytes of a file, fewer at its end: by one ranged request, unless it is in the cache; errors as of `file`."""
        if count > LARGE or self._hub.offline or self._cached(relative) is not None:
            return super().read(relative, offset, count)
        part = partial(self._hub.part, self.id, relative, offset, count, self._token)
        return self._retry(part, f"{self.id}: {relative}").start if count else b""

    def adapters(self) -> Collection[str] | None:
        """None: a repository is not listed, the configuration says what is in it."""
        return None

    def fetch(self) -> None:
        """Have all files at once, sooner than one by one.

        Where the client cannot list a commit, it says nothing and gives what is in the cache: `file` asks for the rest.
        """
        if self._hub.offline:
            return
        files = [f for f in FILES if f not in (ADAPTERS, PACKS)] + [f"{PACKS}/*.safetensors"]
        files += [f"{ADAPTERS}/*/{f}" for f in (LOADINGS, META, VERBATIM)]
        pattern = replace(self.id, subfolder=escape(self.id.subfolder))
        get = partial(
            self._hub.api.snapshot_download, self.id.repo, revision=self.id.revision, cache_dir=self._cache,
            token=self._token, allow_patterns=[pattern.path(f) for f in files],
        )  # fmt: skip
        self._retry(get, str(self.id))

    def is_closed(self) -> bool:
        """Whether not everybody may read it."""
        ask = partial(self._hub.api.model_info, self.id.repo, expand=["private", "gated"], token=self._token)
        info = self._retry(ask, str(self.id))
        return bool(info.private or info.gated)

    def _retry(self, call: Callable[[], T], what: str) -> T:
        """The result of a request, with errors that are said of a checkpoint, not of an adapter."""
        return self._hub.retry(call, what, _of_checkpoint)

    def _not_cached(self, relative: str) -> MissingCheckpointError:
        return MissingCheckpointError(
            f"{printable(relative)} is not in the cache of the Hub's files, and this is offline",
            found=f"{printable(self.id)}, in {printable(self._cache)}",
            remedy="Have it once without local_files_only and HF_HUB_OFFLINE, or name a folder.",
        )

    def _no_checkpoint(self) -> MissingCheckpointError:
        names: list[str] = []
        if not self._hub.offline:
            with suppress(Exception):  # of help only: what is wrong is known
                tree = self._hub.api.list_repo_tree(
                    self.id.repo, self.id.subfolder or None, revision=self.id.revision, token=self._token
                )
                names = [item.path.rpartition("/")[2] for item in islice(tree, 1000)]
        but, remedy = "", None
        if {COMPONENTS, ADAPTERS, PACKS, INDEX} & {*names}:
            but, remedy = ", but a part of one", "It may be on its way just now; else push it again."
        elif ADAPTER_CONFIG in names:
            but = ", but a PEFT adapter"
            remedy = "Load it by PEFT, or compress it with others: lorashare-stream compress."
        return MissingCheckpointError(
            f"no checkpoint at {printable(self.id)}{but}",
            found=listed(names) or "nothing",
            expected=CONFIG,
            remedy=remedy,
        )

    def _remember(self, revision: str) -> None:
        """Note in the cache which commit a branch or tag is, as the client does: offline it is known by that."""
        ref = repo_folder(self._cache, self.id.repo) / "refs" / revision
        with suppress(OSError):  # a cache that is only read does as well
            if not ref.exists() or ref.read_text() != self.id.revision:
                ref.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(ref) as path:
                    path.write_text(self.id.revision)


def _of_checkpoint(error: Exception, what: str) -> Exception:
    """The meaning of a permanent error of the client for a checkpoint."""
    from huggingface_hub import errors

    if first_of(error, errors.RemoteEntryNotFoundError):
        return FileNotFoundError(what)
    said = of_adapter(error, what)
    if not isinstance(said, StreamError):
        return said
    missing = first_of(error, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    kind = MissingCheckpointError if missing and not first_of(error, errors.GatedRepoError) else CheckpointError
    return kind(said.problem, found=said.found, expected=said.expected, remedy=said.remedy)


def place_of(
    path: str | Path,
    *,
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
    force_download: bool = False,
) -> Place:
    """The place of a checkpoint: a folder that is there, else what a text names on the Hub.

    Raises:
        UsageError: for a revision or subfolder that cannot be one, or that `path` gives otherwise.
        CheckpointError: as `Repository`.
    """
    hub_id = parse_hub_id(path) if isinstance(path, str) and not os.path.lexists(path) else None
    if hub_id is None:
        if revision is not None and os.path.lexists(path):
            raise UsageError("a folder has no revisions", found=path, remedy="Rename it, or leave out the revision.")
        return Folder(Path(path, subfolder or ""))
    subfolder = (subfolder or "").strip("/")
    for given, said in ((revision, hub_id.revision), (subfolder, hub_id.subfolder)):
        if given and said and given != said:
            raise UsageError("two revisions or subfolders", found=f"{given} and {said}", remedy="Give one.")
    revision, subfolder = revision or hub_id.revision, subfolder or hub_id.subfolder
    asked = parse_hub_id(f"{hub_id.repo}{f'@{revision}' if revision else ''}//{subfolder}")
    if asked is None:
        raise UsageError("no revision or subfolder of a repository", found=f"revision {revision}, folder {subfolder}")
    check_token(token)
    if local_files_only and force_download:
        raise UsageError("local_files_only and force_download exclude each other", remedy="Give one.")
    hub = Hub(offline=local_files_only)
    return Repository(hub, asked, token=token, cache_dir=cache_dir, force_download=force_download)
