"""Push of a checkpoint to the Hub: only files that are not there yet, and the configuration last.

A repository without share_config.json is no checkpoint, so one that is half pushed cannot be loaded: the first commit
takes the configuration away, unless nothing else changes, and the last one brings the new one alone. Run again, a push
compares what is there and goes on.

Not `upload_folder`: that sends a single commit where Xet storage cannot be had, takes parts of its own making where it
can, and follows a given head in the first of them only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..adapters.hubid import HubId, is_repo, parse_hub_id
from ..checkpoint.format import ADAPTERS, COMPONENTS, CONFIG, INDEX, LOADINGS, META, PACKS, SKIPPED, SPECTRUM, VERBATIM
from ..checkpoint.index import read_index
from ..checkpoint.records import HubOrigin
from ..errors import AdapterError, CheckpointError, StreamError, UsageError
from ..runtime.progress import Progress, silent
from ..text import counted, listed, printable
from .card import MARK, Sources, access
from .client import Hub, Token, check_token, listing_of
from .payload import CARD, Item, Payload
from .retry import first_of, of_machine, status_of

T = TypeVar("T")
Changes = dict[str, Item | None]  # path in the repository -> what it becomes; None: it is deleted
BATCH = 200  # files in a commit
ENTRIES = 10_000  # in one folder: what the Hub advises at most
FILES = 100_000  # in one repository
MOST_CONTENT = 1 << 30  # bytes of an index, or a card, that is read
_OURS = {SKIPPED, SPECTRUM, COMPONENTS, INDEX}
_COMMON = {*_OURS, CONFIG, CARD, ".gitattributes", ".gitignore", "LICENSE", "LICENSE.md"}
_ADAPTER = re.compile(f"{ADAPTERS}/([^/]+)/(?:{'|'.join(map(re.escape, (LOADINGS, META, VERBATIM)))})")
_PACK = re.compile(f"{PACKS}/[0-9a-f]{{16}}\\.safetensors")
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
    wrote is left as it is; else it is the one in the folder, or a model card. A push into a pull request goes on with
    its reference as `revision`: another run with `create_pr` opens another.

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
    payload = Payload(root, progress)
    if len(payload.names) > ENTRIES or len(payload.files) > FILES:
        log.warning(
            "%s, %s: the Hub advises at most %d entries in a folder and fewer than %d files in a repository; "
            "listing and loading may be slow, and the push goes on",
            counted(len(payload.names), "adapter"), counted(len(payload.files), "file"), ENTRIES, FILES,
        )  # fmt: skip
    sources = _settled(hub, payload.sources, token)
    items = {CARD: payload.readme(repo_id, sources), **payload.files}
    target = _Target(hub, repo_id, token, revision, create_pr=create_pr)
    is_private = target.prepare(private, [name for name, origin in sources.items() if access(origin)])
    there = target.listing()
    if not overwrite:
        target.demand_kin(payload.names, items, there)
    if not target.may_replace(there.get(CARD), items[CARD]):
        del items[CARD]
    changes = changes_for(items, there)
    form = "Coded" if payload.coded else "SHARE"
    message = commit_message or f"{form} checkpoint of {counted(len(payload.names), 'adapter')}"
    if changes:
        every: Changes = {**({CONFIG: None} if CONFIG in there else {}), **changes}
        for _ in progress("push", len(every), target.commit_all(every, message)):
            pass
        there = target.listing()
        if missing := _undone(every, there):  # what .gitignore keeps out, for one
            raise StreamError(
                "the Hub did not take all files", found=listed(missing, 3), remedy="Run the same command again."
            )
    current = payload.config.is_at(there.get(CONFIG))
    if not current:
        target.commit({CONFIG: payload.config}, message)
    uploaded = sum(item is not None for item in changes.values())
    return Pushed(
        repo_id, target.url, target.at, uploaded + (not current), len(items) - uploaded + current,
        len(changes) - uploaded, is_private,
    )  # fmt: skip


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


def _settled(hub: Hub, sources: Sources, token: Token) -> Sources:
    """The origins; the Hub is asked who may read those of which it is not known, and what is gone is private."""

    def ask(origin: HubOrigin) -> HubOrigin:
        expand = list[Any](("gated", "private", "cardData", "tags"))
        info = hub.retry(lambda: hub.api.model_info(origin.repo, expand=expand, token=token), origin.repo)
        told = listing_of(info)
        private = told.private is not False or told.gated is None  # what is not said is not for everybody
        found = {"gated": bool(told.gated), "private": private, "license": origin.license or told.license}
        return origin.model_copy(update=found)

    unknown = {name: o for name, o in sources.items() if o is not None and None in (o.gated, o.private)}
    asked = zip(unknown.items(), hub.in_parallel(ask, unknown.values()), strict=True)
    return {**sources} | {
        name: origin.model_copy(update={"private": True}) if isinstance(found, AdapterError) else found
        for (name, origin), found in asked
    }


def changes_for(items: Mapping[str, Item], there: Mapping[str, Any]) -> Changes:
    """The changes that make of the files on the Hub those of the checkpoint; files of others are left alone."""
    gone = [path for path in there if path not in items and (path in _OURS or _holds_adapters(path))]
    new = {path: item for path, item in items.items() if not item.is_at(there.get(path))}
    return {**dict.fromkeys(gone), **new}


def _undone(changes: Changes, there: Mapping[str, Any]) -> list[str]:
    """The paths of changes that are not on the Hub."""
    return [p for p, item in changes.items() if (p in there if item is None else not item.is_at(there.get(p)))]


def _holds_adapters(path: str) -> bool:
    return bool(_ADAPTER.fullmatch(path) or _PACK.fullmatch(path))


class _Target:
    """The revision of a repository that is pushed to; with `create_pr`, a pull request that the first commit opens."""

    def __init__(self, hub: Hub, repo: str, token: Token, revision: str | None, *, create_pr: bool) -> None:
        self._hub, self._api, self._repo = hub, hub.api, repo
        self._as: dict[str, Any] = {"repo_id": repo, "token": token}
        self._revision, self._create_pr = revision, create_pr
        self._pull = ""  # the URL of the pull request that was opened
        self._head = ""  # the commit that the next one follows

    @property
    def url(self) -> str:
        """Of the last commit, or of the pull request that was opened."""
        return self._pull or f"{self._api.endpoint}/{self._repo}/commit/{self._head}"

    @property
    def at(self) -> str:
        """The last commit, or the reference of the pull request."""
        into = self._revision or ""
        return into if into.startswith("refs/pr/") else self._head

    def prepare(self, private: bool | None, closed: Sequence[str]) -> bool:
        """Make the repository and its branch if there are none; whether it is private, as asked or for `closed`."""
        is_private = self._ask(self._visibility)
        if is_private is None:
            if private is None and closed:
                log.warning(
                    "the repository is made private, since %d of the adapters come from gated or private ones: %s",
                    len(closed), listed(closed, 3),
                )  # fmt: skip
                private = True
            self._ask(lambda: self._api.create_repo(**self._as, private=private, exist_ok=True))
            is_private = self._ask(self._visibility)
        if is_private is None:
            raise _hidden(self._repo)
        if private is None and closed and not is_private:
            raise UsageError(
                "the repository is public, and some adapters come from gated or private ones",
                found=listed(closed, 3),
                remedy="Make it private on its page, or push to another; --public insists.",
            )
        if private not in (None, is_private):
            raise UsageError(
                f"the repository is there, and is {'private' if is_private else 'public'}",
                found=self._repo, expected="a private one" if private else "a public one",
                remedy="Change that on its page, or push to another.",
            )  # fmt: skip
        if self._revision and not self._revision.startswith("refs/") and not self._create_pr:
            self._ask(self._have_branch)
        self._head = self._ask(self._sha)
        return is_private

    def _visibility(self) -> bool | None:
        """Whether the repository is private; None if there is none, or none that this token can see."""
        from huggingface_hub import errors

        try:
            return bool(self._api.model_info(**self._as, expand=["private"]).private)
        except errors.GatedRepoError:  # a kind of the next
            raise
        except errors.RepositoryNotFoundError:
            return None

    def _have_branch(self) -> None:  # asked for first, since a tag must not get a branch of its name
        if not self._api.revision_exists(**self._as, revision=str(self._revision)):
            self._api.create_branch(**self._as, branch=str(self._revision), exist_ok=True)

    def _sha(self) -> str:
        return str(self._api.model_info(**self._as, revision=self._revision, expand=["sha"]).sha)

    def listing(self) -> dict[str, Any]:
        """The files at the head: path -> `RepoFile`."""

        def get() -> dict[str, Any]:
            from huggingface_hub.hf_api import RepoFile

            tree = self._api.list_repo_tree(**self._as, recursive=True, revision=self._head)
            return {item.path: item for item in tree if isinstance(item, RepoFile)}

        return self._ask(get)

    def demand_kin(self, names: Collection[str], items: Mapping[str, Item], there: Mapping[str, Any]) -> None:
        """Refuse a repository of another checkpoint, or of something else than one."""
        theirs = {found[1] for path in there if (found := _ADAPTER.fullmatch(path))}
        if INDEX in there:
            try:
                theirs |= {*read_index(self._content(INDEX)).adapters}
            except CheckpointError:
                theirs.add(INDEX)  # of whatever it is, it is not of these
        known = {*items, *_COMMON}
        strange = [] if CONFIG in there else [p for p in there if p not in known and not _holds_adapters(p)]
        other = [] if theirs & {*names} else sorted(theirs)
        if strange or other:
            raise UsageError(
                "the repository holds another checkpoint, none of whose adapters is in this one" if other
                else "the repository holds something else than a checkpoint",
                found=f"{self._repo}: {listed(other or strange, 5)}",
                remedy="Push to another; or replace it by --overwrite: files of other kinds stay.",
            )  # fmt: skip

    def may_replace(self, there: Any, mine: Item) -> bool:
        """Whether the card on the Hub may be replaced: there is none, or one of ours."""
        if there is None or mine.is_at(there) or MARK.encode() in self._content(CARD):
            return True
        log.warning("the %s on the Hub is not one that a push wrote: it is left as it is", CARD)
        return False

    def _content(self, path: str) -> bytes:
        """A file at the head."""
        there = HubId(self._repo, self._head)
        return self._ask(lambda: self._hub.part(there, path, 0, MOST_CONTENT, self._as["token"])).start

    def commit_all(self, changes: Changes, message: str) -> Iterator[str]:
        """Commit in batches; paths, as they are done."""
        paths = list(changes)
        batches = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
        for i, batch in enumerate(batches, 1):
            self.commit({path: changes[path] for path in batch}, f"{message}: files, part {i} of {len(batches)}")
            yield from batch

    def commit(self, changes: Changes, message: str) -> None:
        """One commit on the head; a pull request whose answer was lost is not found again, and another is opened."""
        sent = False

        def attempt() -> None:
            nonlocal sent
            if sent and (head := self._sha()) != self._head:  # the answer was lost: was it made?
                self._head = head
                if _undone(changes, self.listing()):
                    raise _overtaken(self._repo)
                return
            sent = True
            made = self._api.create_commit(
                **self._as, operations=[_operation(path, item) for path, item in changes.items()],
                commit_message=message, revision=self._revision, parent_commit=self._head, create_pr=self._create_pr,
            )  # fmt: skip
            self._head = str(made.oid)
            if made.pr_url:  # the other commits go there
                self._pull, self._revision, self._create_pr = str(made.pr_url), made.pr_revision, False

        with _no_bars():
            self._ask(attempt)

    def _ask(self, call: Callable[[], T]) -> T:
        return self._hub.retry(call, f"push to {self._repo}", lambda e, _: _refused(e, self._repo))


def _operation(path: str, item: Item | None) -> Any:
    """A change as the client takes it; the file must be what it was."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if item is None:
        return CommitOperationDelete(path, is_folder=False)
    with suppress(OSError, ValueError):  # it is gone
        operation = CommitOperationAdd(path, item.source)
        if operation.upload_info.sha256.hex() == item.sha256:
            return operation
    raise CheckpointError(
        "the checkpoint was changed during the push", found=printable(path), remedy="Run the same command again."
    )


def _overtaken(repo: str) -> StreamError:
    return StreamError(
        "somebody else has pushed to the repository at the same time", found=repo, remedy="Run the same command again."
    )


def _hidden(repo: str) -> StreamError:
    return StreamError("no such repository on the Hub, or this token cannot see it", found=repo)


def _refused(error: Exception, repo: str) -> Exception:
    """The meaning of a permanent error of the client for a push."""
    from huggingface_hub import errors

    if (local := of_machine(error)) is not None:
        return local
    answer, status = first_of(error, errors.HfHubHTTPError), status_of(error)
    if first_of(error, errors.RevisionNotFoundError):
        return UsageError("no such revision on the Hub", found=repo, remedy="Mend the revision.")
    if status in (409, 412) or first_of(error, errors.RemoteEntryNotFoundError):
        return _overtaken(repo)
    if status == 401:
        return StreamError(
            "the Hub wants a token that may write, and does not accept this one, or has none", found=repo,
            remedy="Set HF_TOKEN to one with write access, or store it by hf auth login.",
        )  # fmt: skip
    if status == 403:
        return StreamError(
            "this token may not write to the repository", found=repo,
            remedy="Use one that may, push to a repository of your own, or propose a pull request (--create-pr).",
        )  # fmt: skip
    if first_of(error, errors.RepositoryNotFoundError):
        return _hidden(repo)
    # of a card, the client says by a ValueError what is wrong in it
    said = str(error) if type(error) is ValueError else getattr(answer, "server_message", None)
    return StreamError(f"the Hub refuses the push{f', by status {status}' if status else ''}", found=said or repo)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the client's own bars: each commit would draw some."""
    from huggingface_hub import utils

    before = utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    if not before:
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if not before:
            utils.enable_progress_bars()  # type: ignore[attr-defined]
