"""The Hub side of a push: a revision of a repository, what is there, and commits that bring what is not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from ..checkpoint.format import CONFIG, INDEX
from ..errors import CheckpointError, StreamError, UnreachableError, UsageError
from ..runtime.progress import Progress
from ..text import listed
from .card import MARK
from .client import Hub
from .push_errors import changed_meanwhile, hidden, refused
from .push_files import Changes, Item, changes_for, foreign, operation_for, others, undone
from .retry import unheard

T = TypeVar("T")
Token = str | bool | None
CARD = "README.md"
BATCH = 200  # files in a commit
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """What was uploaded: the URL and revision it is at, and how many files are new, were there, and are gone."""

    url: str
    revision: str
    uploaded: int
    present: int
    deleted: int


class Target:
    """A revision of a repository that is pushed to.

    Args:
        hub: to ask.
        repo: `org/name`.
        token: for the client, which else takes that of the environment; it is said nowhere.
        revision: a branch, or `refs/pr/N`.
        create_pr: whether the first commit opens a pull request, which takes the others.
    """

    def __init__(self, hub: Hub, repo: str, token: Token, revision: str | None, *, create_pr: bool) -> None:
        self._hub, self._api, self._repo = hub, hub.api, repo
        self._as = {"repo_id": repo, "token": token}
        self._revision, self._create_pr = revision, create_pr
        self._pull = ""  # the URL of the pull request that was opened
        self._head = ""  # the commit that the next one follows
        self._uploaded = 0

    def prepare(self, private: bool | None, closed: Sequence[str]) -> bool:
        """Have the repository and its branch.

        Args:
            private: whether it is to be; None is yes if there are closed sources.
            closed: names of adapters whose sources not everybody may read.

        Returns:
            Whether it is private.

        Raises:
            UsageError: if there is one that is public and should not be, or the other way round.
        """
        is_private = self._visibility()
        if is_private is None:
            if private is None and closed:
                log.warning(
                    "the repository is made private, since %d of the adapters come from gated or private ones: %s",
                    len(closed), listed(closed, 3),
                )  # fmt: skip
                private = True
            self._ask(lambda: self._api.create_repo(**self._as, private=private, exist_ok=True))
            is_private = self._visibility()
        if is_private is None:
            raise hidden(self._repo)
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
        return is_private

    def _have_branch(self) -> None:
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            self._sha()
        except RevisionNotFoundError:
            self._api.create_branch(**self._as, branch=self._revision, exist_ok=True)

    def _visibility(self) -> bool | None:
        """Whether the repository is private; None if there is none, or none that this token can see."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        def get() -> bool | None:
            try:
                return bool(self._api.model_info(**self._as, expand=["private"]).private)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        return self._ask(get)

    def _sha(self) -> str:
        return str(self._api.model_info(**self._as, revision=self._revision, expand=["sha"]).sha)

    def _listing(self) -> dict[str, Any]:
        """The files at the head: path -> `RepoFile`."""

        def get() -> dict[str, Any]:
            from huggingface_hub.hf_api import RepoFile

            tree = self._api.list_repo_tree(**self._as, recursive=True, revision=self._head)
            return {item.path: item for item in tree if isinstance(item, RepoFile)}

        return self._ask(get)

    def _check_there(self, names: Collection[str], items: Mapping[str, Item], there: Mapping[str, Any]) -> None:
        """Refuse a repository that is not for this checkpoint."""
        strange = [] if CONFIG in there else foreign(items, there)
        other = others(names, there, self._content(INDEX) if INDEX in there else None)
        if not (strange or other):
            return
        raise UsageError(
            "the repository holds another checkpoint, none of whose adapters is in this one" if other
            else "the repository holds something else than a checkpoint",
            found=f"{self._repo}: {listed(other or strange, 5)}",
            remedy="Push to another; or replace it by --overwrite: files of other kinds stay.",
        )  # fmt: skip

    def upload(
        self,
        names: Collection[str],
        items: Mapping[str, Item],
        config: Item,
        message: str,
        progress: Progress,
        *,
        overwrite: bool = False,
    ) -> Done:
        """Commit what is not there yet, and the configuration last.

        Args:
            names: of the adapters.
            items: path in the repository -> file, all but the configuration.
            config: the configuration.
            message: of the last commit; those before it say which part they are.
            progress: passes the files on as they are committed.
            overwrite: replace another checkpoint, or push beside files of another kind.

        Raises:
            StreamError: if the Hub refuses it, or somebody else pushes at the same time.
        """
        self._head = self._ask(self._sha)
        there = self._listing()
        if not overwrite:
            self._check_there(names, items, there)
        if not self._card_is_ours(there.get(CARD), items[CARD]):
            items = {path: item for path, item in items.items() if path != CARD}
        changes = changes_for(items, there)
        deleted = sum(item is None for item in changes.values())
        present = sum(changes.get(path) is None for path in items)
        if changes:
            before: Changes = {CONFIG: None} if CONFIG in there else {}
            for _ in progress("push", len(changes) + len(before), self._commit_all({**before, **changes}, message)):
                pass
            there = self._listing()
            if CONFIG in there or changes_for(items, there):  # what .gitignore keeps out, for one
                missing = listed(changes_for(items, there), 3)
                raise StreamError("the Hub did not take all files", found=missing, remedy="Run the same command again.")
        if config.is_at(there.get(CONFIG)):
            present += 1
        else:
            self._commit({CONFIG: config}, message)
        url = self._pull or f"{self._api.endpoint}/{self._repo}/commit/{self._head}"
        into = self._revision or ""
        return Done(url, into if into.startswith("refs/pr/") else self._head, self._uploaded, present, deleted)

    def _card_is_ours(self, there: Any, mine: Item) -> bool:
        """Whether the card on the Hub may be replaced: there is none, or one of ours."""
        if there is None or mine.is_at(there):
            return True

        ours = MARK.encode() in self._content(CARD)
        if not ours:
            log.warning("the %s on the Hub is not one that a push wrote: it is left as it is", CARD)
        return ours

    def _content(self, path: str) -> bytes:
        """A file at the head."""

        def get() -> bytes:
            with TemporaryDirectory(prefix="lorashare-stream-") as folder:
                found = self._api.hf_hub_download(**self._as, filename=path, revision=self._head, local_dir=folder)
                return Path(found).read_bytes()

        return self._ask(get)

    def _commit_all(self, changes: Changes, message: str) -> Iterator[str]:
        """Commit in batches; paths, as they are done."""
        paths = list(changes)
        batches = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
        for i, batch in enumerate(batches, 1):
            self._commit({path: changes[path] for path in batch}, f"{message}: files, part {i} of {len(batches)}")
            yield from batch

    def _commit(self, changes: Changes, message: str) -> None:
        """One commit on the head.

        If the answer is lost, it may have been made: before it is sent again, what is there is compared. A pull
        request that was opened so is not found again, and another is opened.
        """
        sent = False

        def attempt() -> None:
            nonlocal sent
            if sent and (head := self._sha()) != self._head:
                self._head = head
                if undone(changes, self._listing()):
                    raise changed_meanwhile(self._repo)
                return
            sent = True
            made = self._api.create_commit(
                **self._as, operations=[operation_for(path, item) for path, item in changes.items()],
                commit_message=message, revision=self._revision, parent_commit=self._head, create_pr=self._create_pr,
            )  # fmt: skip
            self._head = str(made.oid)
            if made.pr_url:  # the other commits go there
                self._pull, self._revision, self._create_pr = str(made.pr_url), made.pr_revision, False

        with _no_bars():
            self._ask(attempt)
        self._uploaded += sum(item is not None for item in changes.values())

    def _ask(self, call: Callable[[], T]) -> T:
        """The result of a request, with errors that are said of a push, not of an adapter."""

        def answered() -> T:
            try:
                return call()
            except json.JSONDecodeError as e:  # the client reads some answers before it looks at their status
                raise ConnectionError("an answer that is no JSON") from e

        try:
            return self._hub.retry(answered, f"push to {self._repo}", unheard())
        except (UnreachableError, UsageError, CheckpointError):
            raise
        except StreamError as e:
            raise (e if e.__cause__ is None else refused(e.__cause__, self._repo)) from e.__cause__


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the client's own bars: each commit would draw some."""
    from huggingface_hub import utils

    if utils.are_progress_bars_disabled():  # type: ignore[attr-defined]
        yield
        return
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.enable_progress_bars()  # type: ignore[attr-defined]
