"""A checkpoint, pushed to the Hub: only what is not there yet, and the configuration last.

A repository without share_config.json is no checkpoint, so one that is half pushed cannot be loaded: the first commit
takes the configuration away, unless nothing else changes, and the last one, with nothing else in it, brings the new
one. Run again, a push compares what is there and goes on. Local paths are taken out of what is uploaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.folder import digest_files
from ..adapters.hubid import is_repo, parse_hub_id
from ..adapters.safetensors import read_header
from ..checkpoint.coded import index_of, meta_of, record_in
from ..checkpoint.config import SHAREConfig, config_bytes, read_share_config
from ..checkpoint.format import ADAPTERS, COMPONENTS, CONFIG, INDEX, LOADINGS, META, OURS, SKIPPED, SPECTRUM, VERBATIM
from ..checkpoint.index import index_bytes
from ..checkpoint.packs import check_pack
from ..checkpoint.records import REPAIR, check_components, has_files
from ..errors import CheckpointError, UsageError
from ..files import read_json, sealed, unsealed
from ..runtime.progress import Progress, silent
from ..text import counted, is_component, listed
from .card import MARK, Provenance, card
from .client import Hub, check_token
from .pins import in_parallel, listing_of
from .push_files import Item
from .push_target import CARD, Target, Token
from .retry import unheard
from .scrub import Scrubber

ENTRIES = 10_000  # in one folder: what the Hub advises at most
FILES = 100_000  # in one repository
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Attributes:
        repo: `org/name`.
        url: of the last commit, or of the pull request.
        revision: the SHA of the last commit, or the reference of the pull request.
        files: how many were uploaded now.
        present: how many were there already.
        deleted: how many, of adapters that the checkpoint has no more, were deleted.
        private: whether the repository is.
    """

    repo: str
    url: str
    revision: str
    files: int
    present: int
    deleted: int
    private: bool


def push(
    root: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: Token = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Pushed:
    """Upload a checkpoint; run again, it uploads what is missing.

    Files of adapters that it has no more are deleted on the Hub; its history keeps them. A README.md there that no push
    wrote is left as it is; else it is the one in the folder, or a model card. Of a push into a pull
    request, go on with its reference as `revision`: another run with `create_pr` opens another.

    Args:
        root: the checkpoint.
        repo_id: `org/name`; made if there is none.
        private: whether only its owner may read it; None is yes if a source of an adapter is gated or private.
        token: that may write; None is that of the environment.
        commit_message: else one that says what it is.
        revision: a branch, made if there is none, or `refs/pr/N`; None is the default branch.
        create_pr: propose the commits as a pull request.
        overwrite: replace a checkpoint of other adapters, or push beside files of another kind.
        progress: passes the results on as they come.

    Raises:
        UsageError: for what cannot be meant, or a repository that is public where it should not be.
        CheckpointError: if the checkpoint is not whole.
        StreamError: if the Hub refuses it.
        UnreachableError: if the Hub did not answer for as long as a push waits.
    """
    _check(repo_id, token, revision)
    hub = Hub()
    if hub.offline:
        raise UsageError("a push needs the Hub, and HF_HUB_OFFLINE is set", remedy="Unset it.")
    local = _Local(root)
    items = local.items(progress)
    _warn_of_size(len(local.names), len(items))
    local.sources = _settled(hub, local.sources, token)
    closed = [source.name for source in local.sources if source.access]
    readme = _readme(local, repo_id)
    target = Target(hub, repo_id, token, revision, create_pr=create_pr)
    is_private = target.prepare(private, closed)
    form = "Coded" if local.statistics.coded else "SHARE"
    message = commit_message or f"{form} checkpoint of {counted(len(local.names), 'adapter')}"
    config = Item.of(config_bytes(local.config))
    done = target.upload(local.names, {CARD: readme, **items}, config, message, progress, overwrite=overwrite)
    return Pushed(repo_id, done.url, done.revision, done.uploaded, done.present, done.deleted, is_private)


def _check(repo_id: str, token: Token, revision: str | None) -> None:
    if not is_repo(repo_id):
        raise UsageError("no id of a repository", found=repo_id, expected="org/name")
    if revision is not None:
        asked = parse_hub_id(f"{repo_id}@{revision}")
        if asked is None or asked.revision != revision:
            raise UsageError("no name of a branch", found=revision)
        if asked.pinned:
            raise UsageError("a commit cannot be pushed to", found=revision, expected="a branch, or refs/pr/N")
    check_token(token)


def _warn_of_size(adapters: int, files: int) -> None:
    if adapters > ENTRIES or files > FILES:
        log.warning(
            "%s, %s: the Hub advises at most %d entries in a folder and fewer than %d files in a repository; "
            "listing and loading may be slow, and the push goes on",
            counted(adapters, "adapter"), counted(files, "file"), ENTRIES, FILES,
        )  # fmt: skip


def _readme(local: _Local, repo_id: str) -> Item:
    """The user's own, or the card."""
    path = local.root / CARD
    found = path.read_bytes() if path.is_file() and not path.is_symlink() else None  # a link may lead to any file
    if found is not None and MARK.encode() not in found:
        return Item.of(found)
    return Item.of(card(local.statistics, local.sources, repo_id).encode())


class _Local:
    """What of a checkpoint is pushed, without local paths.

    Args:
        root: the checkpoint.

    Raises:
        CheckpointError: if it is not whole.

    Attributes:
        names: of its adapters.
        config: the content of share_config.json.
        statistics: the same, typed.
        sources: where the adapters came from, known once `items` has run.
    """

    def __init__(self, root: Path) -> None:
        self.root, read = root, read_share_config(root)
        unsafe = [name for name in read.adapter_names if not is_component(name)]
        self.names = [] if unsafe else list(dict.fromkeys(read.adapter_names))
        if unsafe or not self.names:
            found = listed(unsafe) or "none"
            raise CheckpointError("adapter names that are no path components", found=found, expected="names of folders")
        if not read.coded and not has_files(root, self.names):
            raise CheckpointError("files of the checkpoint are missing", found=root, remedy="Fetch it again.")
        settings = read.ours.get("settings", {})
        aliases = settings.get("base_aliases", []) if isinstance(settings, dict) else []
        paths = [str(root.absolute()), str(root.resolve()), read.base_model_name_or_path, *map(str, aliases)]
        self._scrub = Scrubber(read.base_model_name_or_path, paths)
        self.config: dict[str, Any] = self._scrub(read_json(root / CONFIG))
        known = {k: v for k, v in self.config.items() if k in SHAREConfig.__dataclass_fields__}
        self.statistics = replace(read, **known)
        self.sources: list[Provenance] = []

    def items(self, progress: Progress) -> dict[str, Item]:
        """All files but the configuration and the card: path in the repository -> what is uploaded."""
        skipped = {SKIPPED: Item.of(self._skipped(), self._skipped)} if (self.root / SKIPPED).is_file() else {}
        if self.statistics.coded:
            return self._coded(progress) | skipped
        digest = self.statistics.ours.get("components")
        if digest is not None:
            check_components(self.root, str(digest))
        found = {COMPONENTS: self._tensors(COMPONENTS, digest)}
        if (self.root / SPECTRUM).is_file():
            found[SPECTRUM] = self._tensors(SPECTRUM)
        for adapter in progress("look", len(self.names), self._adapters()):
            found |= adapter
        return found | skipped

    def _coded(self, progress: Progress) -> dict[str, Item]:
        """The index, without paths, and the packs, which have none."""
        index = index_of(self.root, self.statistics.coded)
        if index.adapters.keys() != {*self.names}:
            raise CheckpointError(f"{CONFIG} and {INDEX} name other adapters", found=self.root)
        told = {name: self._scrub(meta_of(adapter, "")) for name, adapter in index.adapters.items()}
        self.sources = [_provenance(name, told[name]) for name in self.names]
        adapters = {
            name: replace(adapter, config=told[name]["original_config"], record=record_in(told[name]))
            for name, adapter in index.adapters.items()
        }
        content = index_bytes(replace(index, adapters=adapters))
        self.config["coded"]["index"] = hashlib.sha256(content).hexdigest()

        def packs() -> Iterator[tuple[str, Item]]:
            for pack in index.packs:
                check_pack(self.root / pack.file, pack)
                yield pack.file, Item(pack.sha256, pack.nbytes, self.root / pack.file)

        return {INDEX: Item.of(content), **dict(progress("look", len(index.packs), packs()))}

    def _adapters(self) -> Iterator[dict[str, Item]]:
        for name in self.names:
            folder, meta = f"{ADAPTERS}/{name}", self._meta(name)
            self.sources.append(_provenance(name, meta))
            digests = meta[OURS].get("files", {}) if OURS in meta else {}
            files = [file for file in (LOADINGS, VERBATIM) if file in digests or (self.root / folder / file).is_file()]
            found = {f"{folder}/{file}": self._tensors(f"{folder}/{file}", digests.get(file), name) for file in files}
            again = partial(self._meta_text, name)  # when it is uploaded: all of them may not fit into memory
            yield found | {f"{folder}/{META}": Item.of(_text(meta), again)}

    def _meta_text(self, name: str) -> bytes:
        return _text(self._meta(name))

    def _meta(self, name: str) -> dict[str, Any]:
        """What is recorded of an adapter, without paths; sealed again if it was."""
        path = self.root / ADAPTERS / name / META
        try:
            meta = read_json(path)
        except (FileNotFoundError, ValueError) as e:
            raise CheckpointError(f"{META} cannot be read", adapter=name, found=str(e), remedy=REPAIR) from e
        if not isinstance(meta, dict) or "adapter_name" not in meta:  # a link may lead to any JSON
            raise CheckpointError(f"{META} is not that of an adapter", adapter=name, found=meta, remedy=REPAIR)
        if OURS not in meta:  # lorashare wrote it
            return dict(self._scrub(meta))
        values = unsealed(meta)
        if values is None or not isinstance(values[OURS], dict):
            raise CheckpointError(f"{META} is damaged", adapter=name, remedy=REPAIR)
        basis, expected = values[OURS].get("basis_digest"), self.statistics.ours.get("basis_digest")
        if None not in (basis, expected) and basis != expected:
            raise CheckpointError("an adapter belongs to another basis", adapter=name, found=basis, expected=expected)
        return sealed(self._scrub(values))

    def _skipped(self) -> bytes:
        try:
            skipped = read_json(self.root / SKIPPED)
        except ValueError as e:
            raise CheckpointError(f"{SKIPPED} cannot be read", found=str(e), remedy="Remove it.") from e
        if not (isinstance(skipped, list) and all(isinstance(item, dict) and "reason" in item for item in skipped)):
            raise CheckpointError(f"{SKIPPED} is not what it should be", found=skipped, remedy="Remove it.")
        return _text(self._scrub(skipped))

    def _tensors(self, where: str, digest: str | None = None, adapter: str | None = None) -> Item:
        """A safetensors file, and no other that a link may lead to; whole, if its digest is known."""
        path = self.root / where
        try:
            read_header(path)
            found = digest_files([path])
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path.name} cannot be read", adapter=adapter, found=str(e), remedy=REPAIR) from e
        if digest not in (None, found):
            raise CheckpointError(f"{path.name} is damaged", adapter=adapter, remedy=REPAIR)
        return Item(found, path.stat().st_size, path)


def _text(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(value, indent=2).encode()


def _provenance(name: str, meta: Mapping[str, Any]) -> Provenance:
    """Where an adapter came from, as its meta tells it; of a folder nothing."""
    ours = meta.get(OURS, {})
    source = parse_hub_id(str(ours.get("source_id", "")))
    told = ours.get("hub")
    if not isinstance(told, dict):
        return Provenance(name, source)
    terms = told.get("license")
    gated, private = (None if told.get(k) is None else bool(told[k]) for k in ("gated", "private"))
    return Provenance(name, source, str(terms) if terms else None, gated=gated, private=private)


def _settled(hub: Hub, sources: Sequence[Provenance], token: Token) -> list[Provenance]:
    """The sources, those asked for at the Hub of which it is not known who may read them; what is gone is private."""

    def ask(source: Provenance) -> Provenance:
        assert source.hub is not None
        repo, what = source.hub.repo, ["gated", "private", "cardData", "tags"]
        told = listing_of(hub.retry(lambda: hub.api.model_info(repo, expand=what, token=token), repo, unheard()))
        private = told.private is not False or told.gated is None  # what is not said is not for everybody
        return replace(source, gated=bool(told.gated), private=private, license=source.license or told.license)

    unknown = [s for s in sources if s.hub is not None and None in (s.gated, s.private)]
    asked = zip(unknown, in_parallel(ask, unknown, hub), strict=True)
    known = {s.name: replace(s, private=True) if isinstance(found, Exception) else found for s, found in asked}
    return [known.get(s.name, s) for s in sources]
