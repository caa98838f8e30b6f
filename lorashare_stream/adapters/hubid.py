"""Ids of adapters on the Hugging Face Hub: `org/name`, `org/name@revision`, `org/name//subfolder`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}")
_SHA = re.compile("[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"/models--(?P<repo>[^/]+)/snapshots/(?P<sha>[0-9a-f]{40})(?:/(?P<below>.+))?$")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[\w./-]*[\w])?")


@dataclass(frozen=True, slots=True)
class HubId:
    """An adapter on the Hub; pinned if its revision is the SHA of a commit.

    Attributes:
        repo: `org/name`.
        revision: a branch, a tag, `refs/pr/N` or a SHA; empty is the default branch.
        subfolder: where in the repository; empty is its root.
    """

    repo: str
    revision: str = ""
    subfolder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}{f'//{self.subfolder}' if self.subfolder else ''}"

    @property
    def pinned(self) -> bool:
        """Whether it means the same for ever."""
        return _SHA.fullmatch(self.revision) is not None

    @property
    def name(self) -> str:
        """A name for it that is one path component: `org--name`, which no other repository has."""
        return "--".join([*self.repo.split("/"), *(p for p in self.subfolder.split("/") if p)])

    def path(self, file: str) -> str:
        """A file of it, in its repository."""
        return f"{self.subfolder}/{file}" if self.subfolder else file


def parse_hub_id(text: str) -> HubId | None:
    """The Hub id that a text is, or None if it cannot be one.

    >>> parse_hub_id("org/name@v1//sub/folder")
    HubId(repo='org/name', revision='v1', subfolder='sub/folder')
    >>> parse_hub_id("../org/name") is None
    True
    """
    head, _, subfolder = text.removeprefix("hf://").rstrip("/").partition("//")
    repo, at, revision = head.partition("@")
    parts = subfolder.rstrip("/").split("/") if subfolder else []
    if not is_repo(repo) or (at and (not _REVISION.fullmatch(revision) or ".." in revision)):
        return None
    if any(part in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts):
        return None
    return HubId(repo, revision, "/".join(parts))


def cached_id(folder: str) -> HubId | None:
    """The id of what lies in a folder of the Hub's cache, by its path; None if it is no snapshot.

    >>> str(cached_id(f"/data/hub/models--org--name/snapshots/{'0' * 40}/sub"))
    'org/name@0000000000000000000000000000000000000000//sub'
    """
    found = _SNAPSHOT.search(folder)
    return found and HubId(found["repo"].replace("--", "/", 1), found["sha"], found["below"] or "")


def meant_by(text: str) -> str | None:
    """The id that was meant by an address of a page, or by a path into a repository; None if none can be.

    >>> [meant_by(t) for t in ("https://host/org/x/tree/main/a", "org/x/v1")]
    ['org/x@main//a', 'org/x//v1']
    """
    page = re.fullmatch(r"https?:/+[^/]+/([^/?#]+/[^/?#]+)(?:/(?:tree|blob)/([^/?#]+)(/[^?#]*)?)?/?", text)
    parts = text.split("/")
    if page is not None:
        found = HubId(page[1], page[2] or "", (page[3] or "").strip("/"))
    elif len(parts) > 2 and parts[0] and not text.startswith((".", "~")):
        found = HubId("/".join(parts[:2]), "", "/".join(parts[2:]))
    else:
        return None
    return str(found) if parse_hub_id(str(found)) == found else None


def is_repo(text: str) -> bool:
    """Whether a text can name a repository, by the rules of the Hub."""
    return _REPO.fullmatch(text) is not None and "--" not in text and ".." not in text and len(text) <= 96
